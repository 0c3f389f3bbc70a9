"""The units that `--backend auto` measures: parts of the run's tower and its optimizer, at the run's own shapes.

Half a block is measured as one block whose other half uses torch, through `Tower.features`, so that the code compared
and timed is the code that trains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastdlp.adapters.bank import AdapterBank, BranchState, View
from fastdlp.adapters.branches import AnyBranch, TowerShape, tower_sites
from fastdlp.adapters.optimizer import Hyperparameters, update
from fastdlp.clip.tower import Tower
from fastdlp.engine.autotune import Run, Unit, cuda_identity, cuda_meter, select, tolerance_of
from fastdlp.engine.schedule import graph_width
from fastdlp.kernels.groups import RowGroups
from fastdlp.methods.base import Method
from fastdlp.selection import Choice, Selection

MAX_SIZES = 3  # numbers of rows that a unit is measured for


@dataclass(frozen=True)
class Pass:
    """A forward of a step with `rows` rows per client and view, and its backward if `grad`."""

    clients: int
    rows: int
    views: tuple[View, ...]
    grad: bool = True

    @property
    def all_rows(self) -> int:
        return self.clients * self.rows * len(self.views)


@dataclass(frozen=True)
class Load:
    """Sizes of a run's steps: clients, rows per client in a training step and in a scoring pass, rows per view that go
    through the tower at once, and whether steps are padded."""

    clients: int
    rows: int
    scored: int
    micro_batch: int
    padded: bool

    def clients_at_once(self, rows: int) -> int:
        """Clients per step."""
        return max(1, min(self.clients, self.micro_batch // max(rows, 1)))


def passes(method: Method, load: Load) -> list[list[Pass]]:
    """The forwards of a full training step, a scoring pass and a step of one client, grouped by number of rows."""
    recorder = _ViewRecorder()
    method.step(recorder)  # type: ignore[arg-type]
    wide = load.clients_at_once(load.rows)
    training = [
        Pass(clients, load.rows, views)
        for clients in (graph_width(wide) if load.padded else wide, 1)
        for views in recorder.views
    ]
    scoring = Pass(load.clients_at_once(load.scored), max(load.scored, 1), (method.scored,), grad=False)
    found: dict[int, list[Pass]] = {}
    for one in sorted([*training, scoring], key=lambda p: (p.clients == 1, not p.grad)):
        others = found.setdefault(one.all_rows, [])
        if one not in others and (one.grad or not others):
            others.append(one)
    return list(found.values())[:MAX_SIZES]


class _ViewRecorder:
    """A `Step` that records which views a method runs; its losses are zeros."""

    alpha = 0.0

    def __init__(self) -> None:
        self.views: list[tuple[View, ...]] = []

    def forward(self, *views: View, grad: bool = True) -> list[_ViewRecorder]:
        self.views += [views] if grad and views not in self.views else []
        return [self] * len(views)

    def detach(self) -> _ViewRecorder:
        return self

    def task(self, *outputs: Any) -> float:
        return 0.0

    distil = task

    def update(self, loss: float, *branches: str) -> None:
        pass


def tower_units(tower: Tower, method: Method, tokens: int, load: Load) -> list[Unit]:
    """The units of `Tower.features`: those of full steps first, large ones before small ones."""
    dense = replace(tower, blocks=tower.blocks[:1], pool="avg", norm_after_pool=True, pooled_only=False)
    pieces = {"attention": (dense, tokens), "mlp": (dense, tokens)}
    if tower.pooled_only and tower.pool != "avg":
        pieces["last"] = (replace(tower, blocks=tower.blocks[-1:]), tokens)
    pieces["projection"] = (replace(tower, blocks=()), 1)
    return [
        Unit(name, same_rows[0].all_rows, partial(_tower_run, name, piece, tower.shape, length, same_rows, method))
        for same_rows in passes(method, load)
        for name, (piece, length) in pieces.items()
    ]


def _tower_run(
    name: str, tower: Tower, shape: TowerShape, tokens: int, same_rows: Sequence[Pass], method: Method
) -> Run:
    runs = [pass_run((name,), tower, shape, tokens, one, method.branches()) for one in same_rows]
    return lambda backend: [tensor for run in runs for tensor in run(backend)]


def pass_run(
    units: Sequence[str], tower: Tower, shape: TowerShape, tokens: int, one: Pass, branches: Sequence[AnyBranch]
) -> Run:
    """One pass over random rows, with adapters of the magnitude of the frozen weights, so that their errors show.

    The run's backend is that of `units`; the others use torch.
    """
    weight = tower.proj.weight
    device, generator = weight.device, torch.Generator(weight.device).manual_seed(0)
    sites = tower_sites(replace(shape, layers=len(tower.blocks)))
    bank = _random_bank(AdapterBank(sites, branches, one.clients, device), generator)
    x = torch.randn(one.all_rows, tokens, shape.width, generator=generator, dtype=weight.dtype, device=device)
    x.requires_grad_(one.grad)
    dy = torch.randn(one.all_rows, shape.embed, generator=generator, device=device)
    index = torch.full((one.all_rows,), tokens - 1, device=device) if tower.pool == "index" else None
    groups, slots = RowGroups((one.rows,) * one.clients, len(one.views)), torch.arange(one.clients, device=device)

    def run(backend: str) -> list[Tensor]:
        with torch.set_grad_enabled(one.grad):
            adapters = bank.adapters(slots, one.views, one.grad)
            chosen = replace(tower, backend=Selection(tuple(Choice(unit, 1, backend) for unit in units)))
            y = chosen.features(x, groups, adapters, index, normalize=True)
        if not one.grad:
            return [y]
        leaves = [leaf for pair in adapters.leaves.values() for leaf in pair if leaf.numel()]
        dx, *rest = torch.autograd.grad(y, [x, *leaves], dy)
        outputs, grads = [y.detach(), dx], iter(rest)
        for branch, (_, gates) in adapters.leaves.items():  # per tensor, so that a large one does not mask a small one
            named = bank.layouts[branch].named(next(grads), next(grads) if gates.numel() else None)
            outputs += named.values()
        return outputs

    return run


def optimizer_unit(bank: AdapterBank, hyper: Hyperparameters, clients: int) -> Unit:
    """One update of all trained branches of `clients` slots."""

    def make() -> Run:
        generator = torch.Generator(bank.device).manual_seed(0)
        vectors = {name: getattr(hyper, name)[:clients] for name in ("lr", "gate_lr", "xi", "alpha")}
        branches = [bank.branches[name] for name in bank.trained]
        own = _random_bank(AdapterBank(bank.sites, branches, clients, bank.device), generator)
        slots = torch.arange(clients, device=bank.device)
        grads = {
            name: [torch.empty_like(t).normal_(generator=generator) for t in (state.weights, state.gates)]
            for name, state in own.state.items()
        }

        def run(backend: str) -> list[Tensor]:
            found: list[Tensor] = []
            for name, state in own.state.items():
                copy = BranchState(*(getattr(state, part).clone() for part in BranchState.FIELDS))
                weights, gates = grads[name]
                update(copy, slots, (weights.clone(), gates.clone()), replace(hyper, **vectors), backend)
                found += [getattr(copy, part) for part in BranchState.FIELDS]
            return found

        return run

    return Unit("optimizer", clients, make)


def _random_bank(bank: AdapterBank, generator: torch.Generator) -> AdapterBank:
    for state in bank.state.values():
        state.weights.normal_(0, 0.05, generator=generator)
        state.gates.normal_(1, 0.25, generator=generator)
    return bank


def measured(
    tower: Tower, tokens: int, method: Method, bank: AdapterBank, hyper: Hyperparameters, load: Load
) -> Selection:
    """The backends for a run on this GPU, measured or cached. Raises FastdlpError as `select` does."""
    dtype = tower.proj.weight.dtype
    units = [optimizer_unit(bank, hyper, load.clients_at_once(load.rows)), *tower_units(tower, method, tokens, load)]
    about = tower.heads, tower.activation, tower.causal, tower.pool, tower.norm_after_pool, tower.blocks[0].ls1 is None
    update_ = hyper.clip_norm, hyper.threshold, hyper.weight_decay, hyper.optimizer
    setting = f"{tower.shape} {about} {tokens} tokens, {method.branches()}, {passes(method, load)}, {update_}"
    selection = select(units, cuda_identity(bank.device, dtype, setting), tolerance_of(dtype), cuda_meter(bank.device))
    torch.cuda.empty_cache()
    return selection
