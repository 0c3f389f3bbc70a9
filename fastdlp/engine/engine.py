"""The federated engine: all clients step together over one copy of the frozen weights.

A step takes a batch of each of many clients (`fastdlp.engine.schedule`). Which clients share a step does not affect
their results: every client has its own adapters, loss, optimizer state and random stream. The inputs of a round are
copied to the device in one transfer and its losses are read once, at its end, so that no step waits for the host.

With several processes (`fastdlp.engine.distributed`) each trains and scores its own slots; shared branches are averaged
over all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fastdlp.adapters.bank import AdapterBank, Adapters, BranchState, View
from fastdlp.adapters.optimizer import Hyperparameters, update
from fastdlp.engine.aggregation import client_weights, weighted_sum
from fastdlp.engine.cuda_graph import StepFn
from fastdlp.engine.distributed import SINGLE_PROCESS, ProcessGroup
from fastdlp.engine.round_losses import RoundLosses, mean_losses
from fastdlp.engine.schedule import Batch, Schedule, Shape, Slot, StepPlan, assemble_steps
from fastdlp.engine.tasks import ClassificationTask, Samples
from fastdlp.methods.base import Method
from fastdlp.methods.losses import Objective, Outputs


class Engine:
    """Trains, averages and scores the clients of one or several federations.

    Args:
        method: what a step is and which branches are shared.
        bank: the adapters of all slots.
        task: the adapted tower and the frozen rest.
        objective: task loss and distillation.
        hyper: per-slot hyperparameters on the bank's device.
        slots: one entry per client; row by row those of the bank.
        labels: [samples] int64 class numbers.
        schedule: batches, epochs, rows per step.
        group: the processes that share the run. Every process holds all rows of the bank; rows of other processes are
            as last collected.
        runner: wraps the step function, for example into CUDA graphs; None: eager.
    """

    stateful_clients = True  # clients keep adapters and optimizer state of their own between rounds

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
        group: ProcessGroup = SINGLE_PROCESS,
        runner: Callable[[StepFn], StepFn] | None = None,
    ) -> None:
        self.method, self.bank, self.task, self.objective, self.hyper = method, bank, task, objective, hyper
        self.slots, self.schedule, self.group = tuple(slots), schedule, group
        self.owners = group.owners([len(slot.train) for slot in slots])
        self.own = frozenset(slot for slot, owner in enumerate(self.owners) if owner == group.rank)
        self.idle: set[int] = set()  # slots that take no further part: a run that diverged beside others
        # The server's copy of each shared branch, one row per federation: [federations, D].
        self.server: dict[str, Tensor] = {}
        self.run: StepFn = self._step if runner is None else runner(self._step)
        self._labels = torch.from_numpy(np.asarray(labels, np.int64)).to(bank.device)
        self._loss_names: tuple[str, ...] = ()  # in the order in which a step returns the losses
        self._scoring: dict[tuple[str, frozenset[int]], StepPlan] = {}
        self.restore_server()

    def row(self, slot: int) -> int:
        """The bank's row of a slot."""
        return slot

    @property
    def state_fields(self) -> tuple[str, ...]:
        """The fields of `BranchState` that a round starts from, and that a checkpoint therefore holds."""
        return BranchState.FIELDS

    def restore_server(self) -> None:
        """Set the server's adapters from the clients, which all hold them between rounds."""
        first = {slot.federation: self.row(i) for i, slot in reversed(list(enumerate(self.slots)))}
        rows = [first[federation] for federation in sorted(first)]
        self.server = {name: self.bank.state[name].weights[rows].clone() for name in self.method.shared}

    # A round is: schedule, run, losses; then aggregate.

    def train_round(self, number: int) -> RoundLosses:
        """Local epochs of every active slot, without aggregation. Losses are those of this process's slots."""
        batches = self.batches(number)
        self.bank.refresh_copies()
        plan = self._plan(batches)
        losses = [self.run(*inputs) for inputs in plan.inputs(self.task.stage)]
        return self._mean_losses([(plan, losses)], batches)

    def aggregate(self) -> None:
        """FedAvg per federation (`fastdlp.engine.aggregation`); all clients continue from the average."""
        rows_of: dict[int, list[int]] = {}
        for row, slot in enumerate(self.slots):
            rows_of.setdefault(slot.federation, []).append(row)
        groups = [(name, federation) for name in self.method.shared for federation in rows_of]
        sums = [self._own_sum(name, rows_of[federation]) for name, federation in groups]
        totals = self.group.all_reduce(torch.cat(sums)).split([len(own) for own in sums]) if sums else ()
        for (name, federation), total in zip(groups, totals):
            rows = rows_of[federation]
            mean = (total / float(client_weights([self.slots[row] for row in rows]).sum())).float()
            self.server[name][federation] = mean
            self.bank.state[name].weights[rows] = mean

    def _own_sum(self, branch: str, rows: Sequence[int]) -> Tensor:
        own = [row for row in rows if row in self.own]
        return weighted_sum(self.bank.state[branch].weights, own, client_weights([self.slots[row] for row in own]))

    def diverged(self) -> list[int]:
        """Slots whose weights are not finite after the round's training."""
        return self.bank.not_finite()

    def collect(self, *fields: str) -> None:
        """Copy these fields of the bank's rows (default: all) from their owners to every process."""
        for branch in self.bank.trained:
            for name in fields or BranchState.FIELDS:
                self.group.broadcast_rows(getattr(self.bank.state[branch], name), self.owners)

    def batches(self, number: int) -> dict[int, list[np.ndarray]]:
        """The batches of round `number` of every active slot with training samples, of all processes."""
        active = [i for i, slot in enumerate(self.slots) if len(slot.train) and i not in self.idle]
        return {slot: self.schedule.batches(self.slots[slot], number) for slot in active}

    def ordered_batches(self, number: int) -> Iterator[tuple[int, int, np.ndarray]]:
        """(slot, step of the slot, sample numbers) of round `number`, in an order that no batching changes."""
        batches = self.batches(number)
        for step, slot in sorted((step, slot) for slot, queue in batches.items() for step in range(len(queue))):
            yield slot, step, batches[slot][step]

    def _plan(self, batches: Mapping[int, Sequence[np.ndarray]]) -> StepPlan:
        """The steps of this process's slots."""
        size, padded = self.schedule.batch_size, self.schedule.padded
        own = {slot: queue for slot, queue in batches.items() if slot in self.own}
        return StepPlan(self._steps(own, size, padded), self.row, self.bank.device, size if padded else None)

    @property
    def _max_rows(self) -> int:
        return self.schedule.micro_batch

    def _steps(self, queues: Mapping[int, Sequence[np.ndarray]], size: int, padded: bool = False) -> list[list[Batch]]:
        """Batches assembled to steps, per federation where those are not mixed."""
        if self.schedule.mixed:
            return assemble_steps(queues, size, self._max_rows, self.task.rows, padded)
        by_federation: dict[int, dict[int, Sequence[np.ndarray]]] = {}
        for slot, batches in queues.items():
            by_federation.setdefault(self.slots[slot].federation, {})[slot] = batches
        return [
            step
            for own in by_federation.values()
            for step in assemble_steps(own, size, self._max_rows, self.task.rows, padded)
        ]

    def _step(self, buffer: Tensor, shape: Shape, staged: Tensor | None) -> Tensor:
        """One step of the method on the device; its losses, [names, n]."""
        losses = self.method.step(_EngineStep(self, *Samples.unpack(buffer, shape, self._labels, staged)))
        self._loss_names = tuple(losses)
        return torch.stack([loss.detach() for loss in losses.values()])

    def _mean_losses(
        self, plans: Sequence[tuple[StepPlan, Sequence[Tensor]]], batches: Mapping[int, Sequence[np.ndarray]]
    ) -> RoundLosses:
        steps = {slot: len(queue) for slot, queue in batches.items()}
        return mean_losses(plans, self._loss_names, steps, len(self.slots))

    def score(self, part: str = "test", adapted: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Correct predictions and samples of every slot, [slots] each; see `hits`."""
        return counted(self.hits(part, adapted))

    @torch.no_grad()
    def hits(self, part: str = "test", adapted: bool = True, among: range | None = None) -> list[np.ndarray]:
        """Whether each sample is predicted correctly, bool [n] per slot in sample order; False for idle slots.

        Args:
            part: "test", "val" or "train".
            adapted: False scores the frozen model.
            among: score these slots only; the others are False.
        """
        chosen = (set(among if among is not None else range(len(self.slots))) - self.idle) & self.own
        hits = [np.zeros(len(getattr(slot, part)), bool) for slot in self.slots]
        plan = self._scoring_plan(part, frozenset(chosen))
        correct: list[Tensor] = []
        for buffer, shape, staged in plan.inputs(self.task.stage):
            rows, samples = Samples.unpack(buffer, shape, self._labels, staged)
            adapters = self.bank.adapters(rows, [self.method.scored], grad=False) if adapted else None
            (out,) = self.task.forward(samples, 1, adapters, scoring=True)
            correct.append((out.class_logits.argmax(-1) == samples.labels).flatten())
        correct_cpu = torch.cat(correct).cpu().numpy() if correct else np.zeros(0, bool)  # one transfer
        start = 0
        scored = dict.fromkeys(chosen, 0)
        for step, shape in zip(plan.steps, plan.shapes):
            for slot, batch in step:
                hits[slot][scored[slot] : scored[slot] + len(batch)] = correct_cpu[start : start + len(batch)]
                scored[slot] += len(batch)
                start += shape.samples
        return self.group.any_reduce(hits)

    def _scoring_plan(self, part: str, chosen: frozenset[int]) -> StepPlan:
        """The passes that score these slots; cached, since a slot's samples do not change."""
        if (part, chosen) not in self._scoring:
            size = self.task.scoring_batch
            queues = {
                slot: np.array_split(samples, -(-len(samples) // size))
                for slot in sorted(chosen)
                if len(samples := getattr(self.slots[slot], part))
            }
            self._scoring[part, chosen] = StepPlan(self._steps(queues, size), self.row, self.bank.device)
        return self._scoring[part, chosen]


def counted(hits: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Correct predictions and samples, int64 [slots] each."""
    return np.array([h.sum() for h in hits], np.int64), np.array([len(h) for h in hits], np.int64)


class _EngineStep:
    """The engine's implementation of `fastdlp.methods.base.Step` for the active slots of one step."""

    def __init__(self, engine: Engine, slots: Tensor, samples: Samples) -> None:
        self.engine, self.slots, self.samples = engine, slots, samples
        self.task = engine.objective.task
        self.distil = engine.objective.distil
        self._adapters: dict[str, Adapters] = {}  # per branch, the leaves of its latest forward with gradients

    @property
    def alpha(self) -> Tensor:
        return self.engine.hyper.alpha[self.slots]

    def forward(self, *views: View, grad: bool = True) -> list[Outputs]:
        adapters = self.engine.bank.adapters(self.slots, views, grad)
        with torch.set_grad_enabled(grad):
            outputs = self.engine.task.forward(self.samples, len(views), adapters)
        if grad:
            self._adapters |= dict.fromkeys(adapters.leaves, adapters)
        return outputs

    def update(self, loss: Tensor, *branches: str) -> None:
        grads = self._adapters[branches[0]].gradients(loss, branches)
        bank = self.engine.bank
        for name in branches:
            update(bank.state[name], self.slots, grads[name], self.engine.hyper, bank.backend)
            del self._adapters[name]
