"""Which batches step together, and how the device learns of a whole round of them at once.

Between two exchanges clients do not depend on each other: a client's batches have an order, those of different clients
have none. So a step takes whatever is ready: the clients with the most batches left first, which ends a round in the
fewest steps, and full batches before the last, smaller one of an epoch, so that those wait for each other and go
through together (padded, all have one shape, and none waits). A client with most of the data steps alone once the
others are done; nothing is computed for those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Batch = tuple[int, np.ndarray]  # a slot and its sample numbers
T = TypeVar("T")
R = TypeVar("R")


def pack(
    queues: Mapping[int, Sequence[np.ndarray]], size: int, room: int, rows: Callable[[int], int], padded: bool = False
) -> list[list[Batch]]:
    """Steps that take every slot's batches in their order.

    Args:
        queues: per slot its batches, arrays of sample numbers.
        size: samples of a full batch.
        room: rows that a step takes at the most (one batch at the least).
        rows: how many rows that many samples need.
        padded: every batch needs the rows of a full one, and the number of batches in a step is one of a few.

    Returns:
        Steps of one batch a slot; equal sizes stand side by side, largest first.
    """
    done = dict.fromkeys((slot for slot, batches in queues.items() if len(batches)), 0)
    steps: list[list[Batch]] = []
    while done:
        ready = sorted(done, key=lambda slot: (done[slot] - len(queues[slot]), slot))
        following = [(slot, queues[slot][done[slot]]) for slot in ready]
        step: list[Batch] = []
        left = room
        full = following if padded else [batch for batch in following if len(batch[1]) == size]
        for slot, samples in full or following:
            need = rows(size if padded else len(samples))
            if step and need > left:
                break
            step.append((slot, samples))
            left -= need
        if padded:
            step = step[: width(len(step))]
        for slot, _ in step:
            done[slot] += 1
            if done[slot] == len(queues[slot]):
                del done[slot]
        steps.append(sorted(step, key=lambda batch: (-len(batch[1]), batch[0])))
    return steps


def width(batches: int) -> int:
    """The largest number that is no larger and has three significant bits: 1 … 8, 10, 12, 14, 16, 20, 24, …"""
    return batches - batches % (1 << max(0, batches.bit_length() - 3))


@dataclass(frozen=True)
class Shape:
    """What the products of a step are shaped by: rows computed for every slot, and samples that a slot is padded to."""

    sizes: tuple[int, ...]
    samples: int

    @staticmethod
    def of(step: Sequence[Batch], padded_to: int | None = None) -> Shape:
        """The sizes of the batches themselves, or all padded to `padded_to`."""
        sizes = tuple(padded_to or len(samples) for _, samples in step)
        return Shape(sizes, max(sizes))

    @property
    def words(self) -> int:
        """Entries of the step's inputs: slot, number of samples and sample numbers of every batch."""
        return len(self.sizes) * (2 + self.samples)


@dataclass(frozen=True)
class Inputs:
    """What a step is told on the device. All int64."""

    slots: Tensor  # [n] rows of the bank
    counts: Tensor  # [n] samples
    ids: Tensor  # [n, S] sample numbers, padded with the slot's first, so that no slot sees another's

    @staticmethod
    def read(words: Tensor, shape: Shape) -> Inputs:
        """Views of a step's `words`."""
        n = len(shape.sizes)
        return Inputs(words[:n], words[n : 2 * n], words[2 * n :].view(n, shape.samples))

    @staticmethod
    def write(step: Sequence[Batch], shape: Shape, row: Callable[[int], int]) -> np.ndarray:
        """The words of a step; `row` is the bank's row of a slot."""
        slots, counts = [row(slot) for slot, _ in step], [len(samples) for _, samples in step]
        return np.concatenate([np.array([slots, counts], np.int64).ravel(), _padded(step, shape)])


def _padded(step: Sequence[Batch], shape: Shape) -> np.ndarray:
    """The sample numbers of all batches, [n · S], each padded with its own first."""
    return np.concatenate([np.concatenate([b, np.full(shape.samples - len(b), b[0])]) for _, b in step])


class Plan:
    """Steps in their order, with all their inputs on the device: one copy from the host, whatever their number."""

    def __init__(
        self,
        steps: Sequence[Sequence[Batch]],
        row: Callable[[int], int],
        device: torch.device,
        padded_to: int | None = None,
    ) -> None:
        self.steps = [list(step) for step in steps]
        self.shapes = [Shape.of(step, padded_to) for step in self.steps]
        pieces = [Inputs.write(step, shape, row) for step, shape in zip(self.steps, self.shapes)]
        words = torch.from_numpy(np.concatenate(pieces or [np.zeros(0, np.int64)]))
        if device.type == "cuda":
            words = words.pin_memory().to(device, non_blocking=True)
        self.words = words.split([shape.words for shape in self.shapes])

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def samples(self) -> int:
        """In all steps."""
        return sum(len(samples) for step in self.steps for _, samples in step)

    @property
    def computed(self) -> int:
        """Samples that are computed, padding included."""
        return sum(sum(shape.sizes) for shape in self.shapes)

    def ids(self, number: int) -> np.ndarray:
        """The sample numbers of a step on the host, [n · S] with their padding."""
        return _padded(self.steps[number], self.shapes[number])


def ahead(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """`function` of every item, each computed in a thread while the caller works with the one before."""
    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for item in items:
            coming = pool.submit(function, item)
            if waiting is not None:
                yield waiting.result()
            waiting = coming
        if waiting is not None:
            yield waiting.result()
