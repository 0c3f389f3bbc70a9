"""The federated engine: all clients step together over one copy of the frozen weights.

A step takes a batch of each of many clients (`plan.pack` says of which). Who steps together never decides a result:
every client has its own adapters, loss, optimizer state and random stream. The device is told of a whole round at once
and is read once, at its end: no step waits for the host, or the host for a step.

A sequential method has one row for all: clients take turns, each from the server's copy on, and the average is summed
up as they end.

Of several processes (`fastdlp.engine.distributed`) each trains and scores its own slots; what they share is averaged
over all.

The engine knows no method by name, no dataset and no file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat

import numpy as np
import torch
from torch import Tensor

from fastdlp.adapters.bank import AdapterBank, Adapters, BranchState, View
from fastdlp.adapters.optimizer import Hyperparameters, update
from fastdlp.engine.cuda_graph import Step
from fastdlp.engine.distributed import ALONE, Shards
from fastdlp.engine.schedule import Batch, Plan, Shape, ahead, pack
from fastdlp.engine.tasks import ClassificationTask, Samples
from fastdlp.methods.base import Method
from fastdlp.methods.losses import Objective, Outputs

ROWS = 64  # of clients that are summed at once


@dataclass(frozen=True)
class Slot:
    """One client of one federation: its samples, and the seed of its batches."""

    train: np.ndarray  # [n_train] int64 sample numbers
    test: np.ndarray  # [n_test]
    federation: int
    client: int
    seed: int
    val: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # [n_val]


@dataclass(frozen=True)
class Schedule:
    """How a round is cut into steps.

    micro_batch: rows per view that go through the tower at once. mixed: whether clients of several federations may
    share a step; where they may not, every federation is cut as it would be alone, so its products have the same
    shapes and its results the same bits. padded: every batch is computed as a full one, and a step has one of a few
    numbers of them, so that few shapes occur; what is padded has no part in any loss.
    """

    batch_size: int
    local_epochs: int
    micro_batch: int
    mixed: bool = True
    padded: bool = False


@dataclass
class RoundLosses:
    """Losses of one round: per name and slot the mean over the samples of the round (nan: no step)."""

    means: dict[str, np.ndarray] = field(default_factory=dict)
    steps: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    not_finite: dict[int, tuple[int, str]] = field(default_factory=dict)  # slot → (step, loss) of its first such loss
    diverged: list[int] = field(default_factory=list)  # of a sequential method: slots whose weights are not finite
    batches: int = 0  # steps of all clients together, as they were computed
    samples: int = 0  # of all clients' steps
    computed: int = 0  # samples that were computed, padding included


class Engine:
    """Trains, averages and scores the slots of a bank.

    Args:
        method: what a step is and which branches are exchanged.
        bank: the adapters of all slots; of a sequential method one row.
        task: the adapted tower and the frozen rest.
        objective: task loss and distillation.
        hyper: per-slot hyperparameters on the bank's device.
        slots: one entry per client; row by row those of the bank.
        labels: [samples] int64 class numbers.
        schedule: batches, epochs, chunks.
        shards: who trains which slot; every process holds all rows, and those of others as it last heard of them.
        runner: makes what runs a step out of the step itself, such as `replay.CudaGraphs`; None: it runs as it is.
    """

    def __init__(
        self,
        method: Method,
        bank: AdapterBank,
        task: ClassificationTask,
        objective: Objective,
        hyper: Hyperparameters,
        slots: Sequence[Slot],
        labels: np.ndarray,
        schedule: Schedule,
        shards: Shards = ALONE,
        runner: Callable[[Step], Step] | None = None,
    ) -> None:
        self.method, self.bank, self.task, self.objective, self.hyper = method, bank, task, objective, hyper
        self.slots, self.schedule, self.shards = tuple(slots), schedule, shards
        self.owners = shards.owners([len(slot.train) for slot in slots])
        self.own = frozenset(slot for slot, owner in enumerate(self.owners) if owner == shards.rank)
        self._labels = torch.from_numpy(np.asarray(labels, np.int64)).to(bank.device)
        self._losses: tuple[str, ...] = ()  # names, in the order in which a step returns them
        self.run: Step = self._step if runner is None else runner(self._step)  # what runs a step
        self._scoring: dict[tuple[str, frozenset[int]], Plan] = {}
        # Called as (round, slot, step, sample numbers) for every batch, in order; for whoever keeps a record.
        self.on_batch: Callable[[int, int, int, np.ndarray], None] | None = None
        # The server's copy of each shared branch, one row per federation: [federations, D].
        self.server: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}  # of a sequential method, while a round runs: [1, D]
        self.idle: set[int] = set()  # slots that take no further part: a run that diverged beside others
        self.restore_server()

    def row(self, slot: int) -> int:
        """The bank's row of a slot."""
        return 0 if self.method.sequential else slot

    def restore_server(self) -> None:
        """Take the server's adapters from the clients, who all hold them between rounds."""
        first = {slot.federation: self.row(i) for i, slot in reversed(list(enumerate(self.slots)))}
        rows = [first[federation] for federation in sorted(first)]
        self.server = {name: self.bank.state[name].weights[rows].clone() for name in self.method.shared}

    def train_round(self, number: int) -> RoundLosses:
        """Local epochs of every own slot that has training samples; no exchange. Losses are of own slots alone."""
        result = RoundLosses(steps=np.zeros(len(self.slots), np.int64))
        history: list[tuple[Plan, list[Tensor]]] = []
        self.bank.refresh_copies()
        for together in self._turns():
            queues = {slot: self._batches(number, slot) for slot in together}
            plan = Plan(
                self._steps(
                    {slot: batches for slot, batches in queues.items() if slot in self.own},
                    self.schedule.batch_size,
                    self.schedule.padded,
                ),
                self.row,
                self.bank.device,
                self.schedule.batch_size if self.schedule.padded else None,
            )
            history.append((plan, [self.run(*inputs) for inputs in self._inputs(plan)]))
            if self.on_batch:
                for step, own in sorted((step, slot) for slot in queues for step in range(len(queues[slot]))):
                    self.on_batch(number, own, step, queues[own][step])
            for slot, batches in queues.items():
                result.steps[slot] = len(batches)
            if self.method.sequential and self.bank.not_finite():  # the row is the next client's before the round ends
                result.diverged += together
        self._sum(history, result)
        return result

    def aggregate(self) -> None:
        """FedAvg: the server's branch = Σ n_k/n · client's, A and B separately; everyone goes on from it."""
        if self.method.sequential:
            for name in self.method.shared:
                self.server[name] = self.shards.total(self._sums.pop(name))
                self.bank.state[name].weights.copy_(self.server[name])
            return
        rows_of: dict[int, list[int]] = {}
        for row, slot in enumerate(self.slots):
            rows_of.setdefault(slot.federation, []).append(row)
        places = [(name, federation) for name in self.method.shared for federation in rows_of]
        sums = [self._own_sum(name, rows_of[federation]) for name, federation in places]
        totals = self.shards.total(torch.cat(sums)).split([len(own) for own in sums]) if sums else ()
        for (name, federation), total in zip(places, totals):
            rows = rows_of[federation]
            mean = (total / sum(len(self.slots[row].train) for row in rows)).float()
            self.server[name][federation] = mean
            self.bank.state[name].weights[rows] = mean

    def _own_sum(self, branch: str, rows: Sequence[int]) -> Tensor:
        """Σ n_k · weights over the own ones of these rows, fp64 [D].

        A product of a count and an fp32 number is exact in fp64, and their sum nearly always: its order, and so the
        number of processes, decides nothing.
        """
        weights = self.bank.state[branch].weights
        own = [row for row in rows if row in self.own]
        total = torch.zeros(weights.shape[1], dtype=torch.float64, device=weights.device)
        for at in range(0, len(own), ROWS):  # not all at once: a copy in fp64 of a thousand clients is large
            some = own[at : at + ROWS]
            counts = torch.tensor([len(self.slots[row].train) for row in some], dtype=torch.float64)
            total += counts.to(weights.device) @ weights[some].double()
        return total

    def collect(self, *fields: str) -> None:
        """Bring these fields of the bank's rows (all, where none is named) from their owners to every process."""
        if self.method.sequential:  # one row, the server's
            return
        for branch in self.bank.trained:
            for name in fields or BranchState.FIELDS:
                self.shards.spread(getattr(self.bank.state[branch], name), self.owners)

    def score(self, part: str = "test", adapted: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Correct predictions and samples of every slot, [slots] each; see `hits`."""
        return counted(self.hits(part, adapted))

    @torch.no_grad()
    def hits(self, part: str = "test", adapted: bool = True, among: range | None = None) -> list[np.ndarray]:
        """Whether each sample is predicted right, bool [n] a slot, in the order of its samples; False for idle slots.

        Args:
            part: "test", "val" or "train".
            adapted: or the frozen model.
            among: score these slots alone; the others are False.
        """
        chosen = (set(among if among is not None else range(len(self.slots))) - self.idle) & self.own
        samples_of: list[np.ndarray] = [getattr(slot, part) for slot in self.slots]
        found = [np.zeros(len(samples), bool) for samples in samples_of]
        plan = self._scoring_plan(part, frozenset(chosen))
        right: list[Tensor] = []
        for words, shape, staged in self._inputs(plan):
            rows, samples = Samples.read(words, shape, self._labels, staged)
            adapters = self.bank.adapters(rows, [self.method.scored], grad=False) if adapted else None
            (out,) = self.task.forward(samples, 1, adapters, scoring=True)
            right.append((out.class_logits.argmax(-1) == samples.labels).flatten())
        told = torch.cat(right).cpu().numpy() if right else np.zeros(0, bool)  # all at once
        at = 0
        seen = dict.fromkeys(chosen, 0)
        for step, shape in zip(plan.steps, plan.shapes):
            for slot, batch in step:
                found[slot][seen[slot] : seen[slot] + len(batch)] = told[at : at + len(batch)]
                seen[slot] += len(batch)
                at += shape.samples
        return self.shards.union(found)

    def _scoring_plan(self, part: str, chosen: frozenset[int]) -> Plan:
        """The passes that score these slots; made once, since nobody's samples change."""
        if (part, chosen) not in self._scoring:
            size = self.task.scoring_batch
            queues = {
                slot: np.array_split(samples, -(-len(samples) // size))
                for slot in sorted(chosen)
                if len(samples := getattr(self.slots[slot], part))
            }
            self._scoring[part, chosen] = Plan(self._steps(queues, size), self.row, self.bank.device)
        return self._scoring[part, chosen]

    def _turns(self) -> Iterator[list[int]]:
        """The slots that step together: all, or of a sequential method one after another from the server's copy on.

        Those of other processes are among them, for the record of batches.
        """
        slots = [i for i, slot in enumerate(self.slots) if len(slot.train) and i not in self.idle]
        if not self.method.sequential:
            yield slots
            return
        self._sums = {name: torch.zeros_like(self.server[name]) for name in self.method.shared}
        for slot, share in zip(slots, self._shares(slots).tolist()):
            for name in self.method.shared:
                self.bank.state[name].restart(self.server[name])
            yield [slot]
            for name, total in self._sums.items() if slot in self.own else ():
                total.add_(self.bank.state[name].weights, alpha=share)

    def _shares(self, slots: Sequence[int]) -> Tensor:
        """n_k/n of these slots, fp64."""
        sizes = torch.tensor([len(self.slots[i].train) for i in slots], dtype=torch.float64)
        return sizes / sizes.sum()

    def _batches(self, number: int, slot: int) -> list[np.ndarray]:
        """A client's batches of a round, in their order."""
        size, batches = self.schedule.batch_size, []
        for epoch in range(self.schedule.local_epochs):
            order = epoch_order(self.slots[slot], number, epoch)
            batches += [order[start : start + size] for start in range(0, len(order), size)]
        return batches

    def _steps(self, queues: Mapping[int, Sequence[np.ndarray]], size: int, padded: bool = False) -> list[list[Batch]]:
        """Who steps together: slots of one federation where those do not mix, one slot of a sequential method."""
        room = 1 if self.method.sequential else self.schedule.micro_batch
        if self.schedule.mixed:
            return pack(queues, size, room, self.task.rows, padded)
        apart: dict[int, dict[int, Sequence[np.ndarray]]] = {}
        for slot, batches in queues.items():
            apart.setdefault(self.slots[slot].federation, {})[slot] = batches
        return [step for own in apart.values() for step in pack(own, size, room, self.task.rows, padded)]

    def _inputs(self, plan: Plan) -> Iterator[tuple[Tensor, Shape, Tensor | None]]:
        """What each step of a plan takes; what the host has to send for it is on its way one step ahead."""
        staged: Iterator[Tensor | None] = repeat(None)
        if stage := self.task.stage:
            staged = ahead(lambda number: stage(plan.ids(number)), range(len(plan)))
        return zip(plan.words, plan.shapes, staged)

    def _step(self, words: Tensor, shape: Shape, staged: Tensor | None) -> Tensor:
        """One step of the method on the device; its losses, [names, n]."""
        losses = self.method.step(_Step(self, *Samples.read(words, shape, self._labels, staged)))
        self._losses = tuple(losses)
        return torch.stack([loss.detach() for loss in losses.values()])

    def _sum(self, history: list[tuple[Plan, list[Tensor]]], result: RoundLosses) -> None:
        """Means over the round. Losses leave the device here, in one piece."""
        losses = [loss for _, of_plan in history for loss in of_plan]
        if not losses:
            return
        told = torch.cat([loss.flatten() for loss in losses]).double().cpu().numpy()
        seen = np.zeros(len(self.slots), np.int64)
        weight = np.zeros(len(self.slots))
        totals = np.zeros((len(self._losses), len(self.slots)))
        for plan, _ in history:
            result.batches += len(plan)
            result.samples += plan.samples
            result.computed += plan.computed
            for step in plan.steps:
                slots, sizes = [slot for slot, _ in step], np.array([len(samples) for _, samples in step])
                values, told = np.split(told, [len(self._losses) * len(step)])
                values = values.reshape(-1, len(step))
                for name, column in np.argwhere(~np.isfinite(values)):
                    slot = slots[column]
                    result.not_finite.setdefault(slot, (int(seen[slot]), self._losses[name]))
                totals[:, slots] += values * sizes
                weight[slots] += sizes
                seen[slots] += 1
        with np.errstate(invalid="ignore"):
            result.means = dict(zip(self._losses, totals / weight))


def counted(hits: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Correct predictions and samples, int64 [slots] each."""
    return np.array([h.sum() for h in hits], np.int64), np.array([len(h) for h in hits], np.int64)


def epoch_order(slot: Slot, number: int, epoch: int) -> np.ndarray:
    """The order of a client's samples in one epoch: a function of seed, client, round and epoch alone.

    So a run needs no random state to be continued, and no client's order depends on another's.
    """
    words = [slot.seed, 1, slot.client, number, epoch]
    return slot.train[np.random.Generator(np.random.PCG64(np.random.SeedSequence(words))).permutation(len(slot.train))]


class _Step:
    """The engine's side of `fastdlp.methods.base.Step`: one chunk of active slots."""

    def __init__(self, engine: Engine, slots: Tensor, samples: Samples) -> None:
        self.engine, self.slots, self.samples = engine, slots, samples
        self.task = engine.objective.task
        self.distil = engine.objective.distil
        self._live: dict[str, Adapters] = {}  # per branch, the leaves of its latest forward with gradients

    @property
    def alpha(self) -> Tensor:
        return self.engine.hyper.alpha[self.slots]

    def forward(self, *views: View, grad: bool = True) -> list[Outputs]:
        adapters = self.engine.bank.adapters(self.slots, views, grad)
        with torch.set_grad_enabled(grad):
            outputs = self.engine.task.forward(self.samples, len(views), adapters)
        if grad:
            self._live |= dict.fromkeys(adapters.leaves, adapters)
        return outputs

    def update(self, loss: Tensor, *branches: str) -> None:
        adapters = self._live[branches[0]]
        grads = adapters.gradients(loss, branches)
        for name in branches:
            bank = self.engine.bank
            update(bank.state[name], self.slots, grads[name], self.engine.hyper, bank.backend)
            del self._live[name]
