"""The adapter bank: every client's adapters and Adam moments, stacked over slots.

A slot is one client of one federation. Per branch there are two flat buffers, `weights` [slots, D] (A and B of all
sites, or the tensors of a head or an encoder) and `gates` [slots, Q], so that the optimizer, clipping, FedAvg and the
checkpoint are each a few operations over whole rows, for any kind of branch. The forward uses shaped copies of the
active rows (`Adapters`); their gradients are flat rows again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fastdlp.adapters.branches import AnyBranch, Branch, Site
from fastdlp.adapters.layout import FoldedLayout, Layout, Shapes, flat, folded_layout, lora_layout, split

if TYPE_CHECKING:
    from fastdlp.kernels.half_blocks import FoldedRows

View = tuple[str, ...]  # the branches applied to a row of the batch


@dataclass
class BranchState:
    """One branch of all slots: parameters and Adam's moments, fp32. D = entries of all tensors but gates, Q = gates."""

    weights: Tensor  # [slots, D]
    gates: Tensor  # [slots, Q]; Q = 0 for a branch without gate
    weights_m: Tensor
    weights_v: Tensor
    gates_m: Tensor
    gates_v: Tensor
    steps: Tensor  # [slots] int64, updates done

    FIELDS = ("weights", "gates", "weights_m", "weights_v", "gates_m", "gates_v", "steps")

    @staticmethod
    def zeros(slots: int, layout: Layout, device: torch.device) -> BranchState:
        """All zero."""

        def rows(length: int) -> Tensor:
            return torch.zeros(slots, length, device=device)

        w, g = layout.weights, layout.gates
        steps = torch.zeros(slots, dtype=torch.int64, device=device)
        return BranchState(rows(w), rows(g), rows(w), rows(w), rows(g), rows(g), steps)

    def restart(self, weights: Tensor) -> None:
        """Replace the weights [slots, D] and reset the optimizer's state."""
        self.weights.copy_(weights)
        for moments in (self.weights_m, self.weights_v, self.steps):
            moments.zero_()


class AdapterBank:
    """The trained parameters of all slots.

    Args:
        sites: the adapted linears, in forward order.
        branches: the branches of every slot.
        slots: the number of clients.
        device: of the buffers.
        backend: of the optimizer's update, "torch" or "triton".
        shapes: of the named tensors of every branch that is not a LoRA.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        branches: Sequence[AnyBranch],
        slots: int,
        device: torch.device | str = "cpu",
        backend: str = "torch",
        shapes: Mapping[str, Shapes] | None = None,
    ) -> None:
        self.sites = tuple(sites)
        self.branches = {branch.name: branch for branch in branches}
        self.lora = {branch.name: branch for branch in branches if isinstance(branch, Branch)}
        self.slots = slots
        self.device, self.backend = torch.device(device), backend
        self.state: dict[str, BranchState] = {}
        self.layouts: dict[str, Layout] = {}
        self._view_scales: dict[tuple[str, tuple[View, ...]], Tensor] = {}
        self._folded_layouts: dict[tuple[str, ...], FoldedLayout] = {}
        for branch in branches:
            if isinstance(branch, Branch):
                layout = lora_layout(self.sites, branch)
            else:
                layout = Layout((shapes or {})[branch.name])
            self.layouts[branch.name] = layout
            self.state[branch.name] = BranchState.zeros(slots, layout, self.device)

    @property
    def copies(self) -> dict[str, str]:
        """The frozen copies among the branches, and the branch that each is a copy of."""
        return {name: branch.copy_of for name, branch in self.lora.items() if branch.copy_of}

    @property
    def trained(self) -> tuple[str, ...]:
        """The branches that are not copies."""
        return tuple(name for name in self.branches if name not in self.copies)

    def parameters(self, branch: str) -> int:
        """Trained entries of one slot's branch, gates included."""
        return self.layouts[branch].weights + self.layouts[branch].gates

    def tensors(self) -> list[Tensor]:
        """All tensors that updates modify, [slots, …] each."""
        return [getattr(self.state[branch], name) for branch in self.trained for name in BranchState.FIELDS]

    def refresh_copies(self) -> None:
        """Copy the source of every frozen copy."""
        for name, source in self.copies.items():
            self.state[name].weights.copy_(self.state[source].weights)

    def initialize(
        self,
        init: str,
        seeds: Mapping[str, Sequence[Sequence[int]]],
        starts: Mapping[str, Callable[[np.random.Generator], Mapping[str, Tensor]]] | None = None,
    ) -> None:
        """Draw A and gate and set B = 0, on the CPU, so that a seed gives the same values on every device.

        Args:
            init: "gaussian": A ~ N(0, 1/r), variance 1/r (the paper's notation); "peft-gaussian": standard
                deviation 1/r; "kaiming": uniform in ±1/sqrt(K), PEFT's default. Gates ~ N(0, 1) always.
            seeds: per branch and slot, its seed sequence; slots with equal seeds start equal.
            starts: functions that draw the tensors of a branch that is not a LoRA.
        """
        for name in self.branches:
            rows: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
            for slot, seed in enumerate(seeds[name]):
                key = tuple(seed)
                if key not in rows:
                    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))
                    tensors = self._draw(name, init, rng) if name in self.lora else (starts or {})[name](rng)
                    gates = torch.from_numpy(rng.normal(0, 1, self.layouts[name].gates)).float()
                    rows[key] = flat(tensors), gates
                weights, gates = rows[key]
                self.state[name].weights[slot] = weights.to(self.device)
                self.state[name].gates[slot] = gates.to(self.device)
        self.refresh_copies()

    def _draw(self, branch: str, init: str, rng: np.random.Generator) -> Mapping[str, Tensor]:
        drawn: dict[str, np.ndarray] = {}
        rank = self.lora[branch].rank
        for name, shape in self.layouts[branch].in_weights.items():
            if name.endswith("/B"):
                drawn[name] = np.zeros(shape)
            elif init == "kaiming":
                bound = 1 / math.sqrt(shape[1])
                drawn[name] = rng.uniform(-bound, bound, shape)
            else:
                std = 1 / rank if init == "peft-gaussian" else 1 / math.sqrt(rank)
                drawn[name] = rng.normal(0, std, shape)
        return {name: torch.from_numpy(values) for name, values in drawn.items()}

    def adapters(self, slots: Tensor, views: Sequence[View], grad: bool) -> Adapters:
        """Shaped copies of the rows `slots` [n] for a batch whose rows see `views` (n · len(views) groups)."""
        return Adapters(self, slots, tuple(views), grad)

    def view_scale(self, branch: str, views: tuple[View, ...]) -> Tensor:
        """[views] fp32, cached: the branch's scale for the views that include it, 0 for the others."""
        if (branch, views) not in self._view_scales:
            scales = [self.lora[branch].scale if branch in view else 0.0 for view in views]
            self._view_scales[branch, views] = torch.tensor(scales, device=self.device)
        return self._view_scales[branch, views]

    def folded_layout(self, branches: tuple[str, ...]) -> FoldedLayout:
        """The layout of these branches folded side by side, cached."""
        if branches not in self._folded_layouts:
            self._folded_layouts[branches] = folded_layout(self.sites, [self.lora[name].rank for name in branches])
        return self._folded_layouts[branches]

    def named(self, branch: str, slot: int | None = None, weights: Tensor | None = None) -> dict[str, Tensor]:
        """One slot's branch (or a flat row of weights without gates) as fp32 CPU tensors by name; see `Layout`."""
        state = self.state[branch]
        row = state.weights[slot] if weights is None else weights
        gates = state.gates[slot] if weights is None else None
        return {name: t.float().cpu().clone() for name, t in self.layouts[branch].named(row, gates).items()}

    def load_named(self, branch: str, slot: int, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `named` for one slot.

        Raises:
            ValueError: names or shapes that do not match this branch's.
        """
        self.layouts[branch].load(tensors, self.state[branch].weights[slot], self.state[branch].gates[slot])

    def not_finite(self) -> list[int]:
        """Slots with a weight or gate that is not finite. The loss shows it a step later, or never."""
        finite = [t.isfinite().all(1) for state in self.state.values() for t in (state.weights, state.gates)]
        return (~torch.stack(finite).all(0)).nonzero().flatten().tolist()


@dataclass
class Adapters:
    """The active slots' adapters of the branches that `views` name.

    The leaves of the autograd graph are flat rows, weights [n, D] and gates [n, Q] per branch; sites and heads use
    views of them, so the backward of one split gathers all gradients. The Triton kernels use them folded instead.
    """

    bank: AdapterBank
    slots: Tensor
    views: tuple[View, ...]
    grad: bool
    leaves: dict[str, tuple[Tensor, Tensor]] = field(init=False)
    _folded: FoldedRows | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.leaves = {name: self._rows(name) for name in dict.fromkeys(b for view in self.views for b in view)}

    def _rows(self, name: str) -> tuple[Tensor, Tensor]:
        """The active rows as leaves of the graph: copies, because an update writes to the bank while graphs exist.

        A whole encoder's only row is not copied: it is large, and not read again after its update.
        """
        state = self.bank.state[name]
        if name not in self.bank.lora and self.bank.slots == 1:
            rows = (state.weights.detach(), state.gates.detach())
        else:
            weights, gates = state.weights.index_select(0, self.slots), state.gates
            no_gates = gates.new_empty(len(self.slots), 0)
            rows = (weights, gates.index_select(0, self.slots) if gates.shape[1] else no_gates)
        return rows[0].requires_grad_(self.grad), rows[1].requires_grad_(self.grad)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The named tensors [n, *shape] of a branch that is not a LoRA."""
        return self.bank.layouts[name].named(self.leaves[name][0], None)

    def site(self, index: int, parts: slice = slice(None)) -> tuple[Tensor, Tensor, Tensor]:
        """A [n, parts, R, K], B [n, parts, N, R] and c [n, views, parts, R] of a site, branches stacked along R."""
        A, B, c = self._stacked[index]
        return A[:, parts], B[:, parts], c[:, :, parts]

    @cached_property
    def _stacked(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        branches = [self._shaped(name) for name in self.leaves if name in self.bank.lora]
        if len(branches) == 1:
            return branches[0]
        sites = [zip(*site) for site in zip(*branches)]
        return [(torch.cat(A, dim=2), torch.cat(B, dim=3), torch.cat(c, dim=3)) for A, B, c in sites]

    def folded(self, dtype: torch.dtype) -> FoldedRows:
        """All sites' adapters as the Triton kernels read them, in the compute dtype."""
        from fastdlp.kernels.half_blocks import BranchRows, fold_rows

        if self._folded is None:
            names = tuple(name for name in self.leaves if name in self.bank.lora)
            layout = self.bank.folded_layout(names)
            rows = [
                BranchRows(*self.leaves[name], self.bank.view_scale(name, self.views), offsets)
                for name, offsets in zip(names, layout.branches)
            ]
            self._folded = fold_rows(rows, len(self.views), layout.down, layout.up, dtype)
        return self._folded

    def span(self, index: int, parts: slice = slice(None)) -> tuple[int, int]:
        """A site's parts first..end among the folded ones."""
        before = sum(len(site.parts) for site in self.bank.sites[:index])
        selected = range(before, before + len(self.bank.sites[index].parts))[parts]
        return selected.start, selected.stop

    def gradients(self, loss: Tensor, branches: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
        """d Σ loss / d (weights [n, D], gates [n, Q]) of each branch, as flat fp32 rows."""
        leaves = {name: self.leaves[name] for name in branches}
        inputs = [leaf for pair in leaves.values() for leaf in pair if leaf.numel()]
        grads = iter(torch.autograd.grad(loss, inputs, torch.ones_like(loss)))
        return {name: (next(grads), next(grads) if gates.numel() else gates) for name, (_, gates) in leaves.items()}

    def _shaped(self, name: str) -> list[tuple[Tensor, Tensor, Tensor]]:
        """A, B and c of one branch, site by site."""
        sites, rank = self.bank.sites, self.bank.lora[name].rank
        weights, gates = self.leaves[name]
        view_scale = self.bank.view_scale(name, self.views)[None, :, None]
        shapes, of_scales = {}, {site.name: (len(site.parts), rank) for site in sites}
        for site in sites:
            shapes[f"{site.name}/A"] = (len(site.parts), rank, site.in_features)
            shapes[f"{site.name}/B"] = (len(site.parts), site.out_features, rank)
        if gates.shape[1]:
            scales = gates[:, None] * view_scale
        else:
            scales = view_scale.repeat(len(self.slots), 1, sum(map(math.prod, of_scales.values())))
        tensors, c = split(weights, shapes), split(scales, of_scales)
        return [(tensors[f"{site.name}/A"], tensors[f"{site.name}/B"], c[site.name]) for site in sites]
