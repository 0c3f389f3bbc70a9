"""Which batches of which clients form a step, and the transfer of all their indices to the device at once.

Between two aggregations clients are independent: the order of one client's batches is fixed, that of different clients
is free. A step therefore takes the clients with the most batches left first, which minimizes the number of steps of a
round, and full batches before the last, smaller batch of an epoch, so that the smaller ones share a step. A client that
holds most of the data trains alone once the others have finished; nothing is computed for those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Batch = tuple[int, np.ndarray]  # a slot and its sample numbers
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Slot:
    """One client of one federation: its samples, and the seed of its batch order."""

    train: np.ndarray  # [n_train] int64 sample numbers
    test: np.ndarray  # [n_test]
    federation: int
    client: int
    seed: int
    val: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # [n_val]


@dataclass(frozen=True)
class Schedule:
    """How a round is divided into steps.

    Attributes:
        batch_size: samples of a client per step.
        local_epochs: passes over a client's samples per round.
        micro_batch: rows per view that go through the tower at once.
        mixed: whether clients of several federations may share a step. If not, every federation is divided as it would
            be alone, so that its products have the same shapes and its results the same bits.
        padded: every batch is computed as a full one, and the number of batches of a step is one of a few, so that few
            shapes occur; padding contributes to no loss.
    """

    batch_size: int
    local_epochs: int
    micro_batch: int
    mixed: bool = True
    padded: bool = False

    def batches(self, slot: Slot, number: int) -> list[np.ndarray]:
        """The sample numbers of a client's batches in round `number`, in their order."""
        batches = []
        for epoch in range(self.local_epochs):
            order = epoch_order(slot, number, epoch)
            batches += [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        return batches


def epoch_order(slot: Slot, number: int, epoch: int) -> np.ndarray:
    """The order of a client's samples in one epoch: a function of seed, client, round and epoch.

    A run thus needs no random state to be resumed, and no client's order depends on another client.
    """
    seeds = [slot.seed, 1, slot.client, number, epoch]
    return slot.train[np.random.Generator(np.random.PCG64(np.random.SeedSequence(seeds))).permutation(len(slot.train))]


def assemble_steps(
    queues: Mapping[int, Sequence[np.ndarray]],
    size: int,
    max_rows: int,
    rows: Callable[[int], int],
    padded: bool = False,
) -> list[list[Batch]]:
    """Steps that take every slot's batches in their order.

    Args:
        queues: per slot its batches, arrays of sample numbers.
        size: samples of a full batch.
        max_rows: rows of a step at most, unless its only batch has more.
        rows: number of rows for a number of samples.
        padded: every batch needs the rows of a full one, and the number of batches of a step is one of a few.

    Returns:
        Steps of one batch per slot; equal sizes are adjacent, largest first.
    """
    done = dict.fromkeys((slot for slot, batches in queues.items() if len(batches)), 0)
    steps: list[list[Batch]] = []
    while done:
        ready = sorted(done, key=lambda slot: (done[slot] - len(queues[slot]), slot))
        following = [(slot, queues[slot][done[slot]]) for slot in ready]
        step: list[Batch] = []
        left = max_rows
        full = following if padded else [batch for batch in following if len(batch[1]) == size]
        for slot, samples in full or following:
            need = rows(size if padded else len(samples))
            if step and need > left:
                break
            step.append((slot, samples))
            left -= need
        if padded:
            step = step[: graph_width(len(step))]
        for slot, _ in step:
            done[slot] += 1
            if done[slot] == len(queues[slot]):
                del done[slot]
        steps.append(sorted(step, key=lambda batch: (-len(batch[1]), batch[0])))
    return steps


def graph_width(batches: int) -> int:
    """The largest number of at most `batches` with three significant bits: 1 … 8, 10, 12, 14, 16, 20, 24, …"""
    return batches - batches % (1 << max(0, batches.bit_length() - 3))


@dataclass(frozen=True)
class Shape:
    """What the shapes of a step's products follow from."""

    sizes: tuple[int, ...]  # samples computed for every slot
    samples: int  # samples that every slot's indices are padded to

    @staticmethod
    def of(step: Sequence[Batch], padded_to: int | None = None) -> Shape:
        """The sizes of the batches themselves, or all padded to `padded_to`."""
        sizes = tuple(padded_to or len(samples) for _, samples in step)
        return Shape(sizes, max(sizes))

    @property
    def numel(self) -> int:
        """Elements of the step's input buffer: slot, number of samples and sample numbers of every batch."""
        return len(self.sizes) * (2 + self.samples)


@dataclass(frozen=True)
class Inputs:
    """A step's inputs on the device, int64."""

    slots: Tensor  # [n] rows of the bank
    counts: Tensor  # [n] samples
    ids: Tensor  # [n, S] sample numbers, padded with the slot's first, so that no slot reads another's samples

    @staticmethod
    def unpack(buffer: Tensor, shape: Shape) -> Inputs:
        """Views of a step's input buffer [shape.numel]."""
        n = len(shape.sizes)
        return Inputs(buffer[:n], buffer[n : 2 * n], buffer[2 * n :].view(n, shape.samples))

    @staticmethod
    def pack(step: Sequence[Batch], shape: Shape, row: Callable[[int], int]) -> np.ndarray:
        """The input buffer of a step; `row` gives the bank's row of a slot."""
        slots, counts = [row(slot) for slot, _ in step], [len(samples) for _, samples in step]
        return np.concatenate([np.array([slots, counts], np.int64).ravel(), _padded(step, shape)])


def _padded(step: Sequence[Batch], shape: Shape) -> np.ndarray:
    """The sample numbers of all batches, [n · S], each padded with its own first."""
    return np.concatenate([np.concatenate([b, np.full(shape.samples - len(b), b[0])]) for _, b in step])


class StepPlan:
    """A sequence of steps with all their inputs on the device, copied there in one transfer."""

    def __init__(
        self,
        steps: Sequence[Sequence[Batch]],
        row: Callable[[int], int],
        device: torch.device,
        padded_to: int | None = None,
    ) -> None:
        self.steps = [list(step) for step in steps]
        self.shapes = [Shape.of(step, padded_to) for step in self.steps]
        pieces = [Inputs.pack(step, shape, row) for step, shape in zip(self.steps, self.shapes)]
        buffer = torch.from_numpy(np.concatenate(pieces or [np.zeros(0, np.int64)]))
        if device.type == "cuda":
            buffer = buffer.pin_memory().to(device, non_blocking=True)
        self.buffers = buffer.split([shape.numel for shape in self.shapes])

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def samples(self) -> int:
        """Samples in all steps."""
        return sum(len(samples) for step in self.steps for _, samples in step)

    @property
    def computed(self) -> int:
        """Samples that are computed, padding included."""
        return sum(sum(shape.sizes) for shape in self.shapes)

    def ids(self, number: int) -> np.ndarray:
        """The sample numbers of a step on the host, [n · S] with their padding."""
        return _padded(self.steps[number], self.shapes[number])

    def inputs(self, stage: Callable[[np.ndarray], Tensor] | None) -> Iterator[tuple[Tensor, Shape, Tensor | None]]:
        """Input buffer, shape and staged images of each step; `stage` runs one step ahead, in a thread."""
        if stage is None:
            return ((buffer, shape, None) for buffer, shape in zip(self.buffers, self.shapes))
        return zip(self.buffers, self.shapes, prefetch(lambda number: stage(self.ids(number)), range(len(self))))


def prefetch(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """`function` of every item, each computed in a thread while the caller processes the previous one."""
    with ThreadPoolExecutor(1) as pool:
        current = None
        for item in items:
            following = pool.submit(function, item)
            if current is not None:
                yield current.result()
            current = following
        if current is not None:
            yield current.result()
