"""Clients one after another through one model: how a federation is simulated where no batch holds several clients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fastdlp.bench.problem import CHECKED, Problem
from fastdlp.bench.runner import Losses

Held = list[list[Tensor]]  # tensors of one device and dtype together, so that each group is copied at once


class TurnsRounds(ABC):
    """A client's adapters and Adam's moments are copied into the one model before its turn, and out of it after.

    A subclass makes the model, then calls `begin`.
    """

    problem: Problem

    def begin(
        self,
        adapters: Mapping[str, Sequence[nn.Parameter]],
        optimizers: Mapping[str, torch.optim.Optimizer],
        starts: Sequence[Mapping[str, Sequence[Tensor]]],
        shared: str,
    ) -> None:
        """Take the adapters of every client from their starts.

        Args:
            adapters: by name, the model's parameters.
            optimizers: of each adapter.
            starts: of each client, by adapter, the values of these parameters.
            shared: the adapter that is averaged.
        """
        moments = [tensor for name in adapters for tensor in _moments(optimizers[name], adapters[name])]
        self._live = _grouped([p.detach() for name in adapters for p in adapters[name]] + moments)
        averaged = {p.data_ptr() for p in adapters[shared]}
        self._shared = [[i for i, t in enumerate(group) if t.data_ptr() in averaged] for group in self._live]
        self._held: list[Held] = []
        for start in starts:
            with torch.no_grad():
                for name, parameters in adapters.items():
                    for parameter, value in zip(parameters, start[name], strict=True):
                        parameter.copy_(value)
            self._held.append([[tensor.clone() for tensor in group] for group in self._live])

    @abstractmethod
    def train(self, client: int, step: int) -> dict[str, Tensor]:
        """One step on a batch; returns its losses, each a scalar on the device."""

    def round(self) -> None:
        self._epoch(range(self.problem.steps))
        self._average()

    def step(self) -> None:
        for client in range(self.problem.clients):
            self.train(client, 0)

    def first_steps(self) -> Losses:
        first = self._epoch(range(CHECKED - 1))
        self._average()
        last = self._epoch(range(CHECKED - 1, CHECKED))
        return stacked([one + other for one, other in zip(first, last)])

    def _epoch(self, steps: range) -> list[list[dict[str, Tensor]]]:
        """Losses by client and step."""
        losses = []
        for client, held in enumerate(self._held):
            _copy(self._live, held)
            losses.append([self.train(client, step) for step in steps])
            _copy(held, self._live)
        return losses

    def _average(self) -> None:
        """FedAvg of clients with equally many samples."""
        for group, chosen in enumerate(self._shared):
            if not chosen:
                continue
            clients = [[held[group][i] for i in chosen] for held in self._held]
            mean = [tensor.clone() for tensor in clients[0]]
            for tensors in clients[1:]:
                torch._foreach_add_(mean, tensors)
            torch._foreach_div_(mean, len(clients))
            for tensors in clients:
                torch._foreach_copy_(tensors, mean)


def stacked(losses: Sequence[Sequence[Mapping[str, Tensor]]]) -> Losses:
    """Scalars by client and step → [steps, clients] by name."""
    names = losses[0][0]
    return {name: np.array([[float(step[name]) for step in client] for client in losses]).T for name in names}


def _moments(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """The optimizer's state, all zero. torch makes it in the first step, so one step is taken with zero gradients."""
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    found = [tensor for parameter in parameters for tensor in optimizer.state[parameter].values()]
    for tensor in found:
        tensor.zero_()
    return found


def _grouped(tensors: Sequence[Tensor]) -> Held:
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return list(groups.values())


@torch.no_grad()
def _copy(targets: Held, sources: Held) -> None:
    for target, source in zip(targets, sources):
        torch._foreach_copy_(target, source)
