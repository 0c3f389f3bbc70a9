"""The engine of full fine-tuning: clients train one after another in one copy of the weights."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fastdlp.engine.aggregation import client_weights
from fastdlp.engine.engine import Engine
from fastdlp.engine.round_losses import RoundLosses
from fastdlp.engine.schedule import StepPlan


class SequentialEngine(Engine):
    """An engine whose bank has one row, for what is too large to be held once per client.

    Each client starts a round from the server's weights with a new optimizer, and the weighted average is accumulated
    as clients finish. All branches are shared.
    """

    stateful_clients = False

    def row(self, slot: int) -> int:
        return 0

    @property
    def state_fields(self) -> tuple[str, ...]:
        return ("weights",)

    @property
    def _max_rows(self) -> int:
        return 1  # one batch per step

    def train_round(self, number: int) -> RoundLosses:
        batches = self.batches(number)
        weights = client_weights([self.slots[slot] for slot in batches])
        fractions = (weights / weights.sum()).tolist()
        self._averages = {name: torch.zeros_like(self.server[name]) for name in self.method.shared}
        self._diverged: list[int] = []
        plans: list[tuple[StepPlan, list[Tensor]]] = []
        for slot, fraction in zip(batches, fractions):
            if slot not in self.own:
                continue
            for name in self.method.shared:
                self.bank.state[name].restart(self.server[name])
            plan = self._plan({slot: batches[slot]})
            plans.append((plan, [self.run(*inputs) for inputs in plan.inputs(self.task.stage)]))
            self._diverged += [slot] if self.bank.not_finite() else []
            for name, average in self._averages.items():
                average.add_(self.bank.state[name].weights, alpha=fraction)
        return self._mean_losses(plans, batches)

    def diverged(self) -> list[int]:
        return self._diverged

    def aggregate(self) -> None:
        for name, average in self._averages.items():
            self.server[name] = self.group.all_reduce(average)
            self.bank.state[name].weights.copy_(average)

    def collect(self, *fields: str) -> None:
        """No client holds a row of its own."""

    def ordered_batches(self, number: int) -> Iterator[tuple[int, int, np.ndarray]]:
        for slot, queue in self.batches(number).items():
            for step, samples in enumerate(queue):
                yield slot, step, samples
