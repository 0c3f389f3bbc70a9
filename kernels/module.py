"""The dual-LoRA operator as a module, for any model and training loop.

    y = x Wᵀ + b + Σ s · ((x Aᵀ) ⊙ gate) Bᵀ      over the branches of the row's view; s = alpha / rank

`DualLoRALinear` replaces an `nn.Linear`; `adapt.py` replaces those of a whole model. It has `slots` independent sets of
adapters (a client, a user, a run of a sweep), each with the same named branches, all applied in one call. The samples,
entries of x's first dimension, are sorted slot by slot, and within a slot *view* by view; a view is the set of branches
that are summed for its samples.

Optimizer, averaging and thresholds of gates are up to the caller.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdlp.kernels.dual_lora import FrozenLinear, dual_lora
from fastdlp.kernels.groups import RowGroups

INITS = ("gaussian", "peft-gaussian", "kaiming")
View = str | Sequence[str]  # a branch, or several that are summed; empty: the frozen linear


class LoRABranch(nn.Module):
    """One branch of all slots: A [slots, parts, r, K], B [slots, parts, N, r] and, if gated, gate [slots, parts, r].

    Every slot starts from the same values: A by `init`, gate ~ N(0, 1), B = 0. The parameters are at least fp32 for any
    dtype of the frozen weight.
    """

    gate: nn.Parameter | None

    def __init__(
        self, weight: Tensor, rank: int, *, alpha: float, gated: bool, slots: int, parts: int, init: str
    ) -> None:
        super().__init__()
        out, width = weight.shape[0] // parts, weight.shape[1]
        A = weight.new_empty(parts, rank, width, dtype=torch.promote_types(weight.dtype, torch.float32))
        if init == "kaiming":
            A.uniform_(-1 / math.sqrt(width), 1 / math.sqrt(width))
        else:
            A.normal_(std=1 / rank if init == "peft-gaussian" else 1 / math.sqrt(rank))
        self.A = nn.Parameter(A.repeat(slots, 1, 1, 1))
        self.B = nn.Parameter(A.new_zeros(slots, parts, out, rank))
        self.gate = nn.Parameter(A.new_empty(parts, rank).normal_().repeat(slots, 1, 1)) if gated else None
        self.scale = alpha / rank

    def scales(self) -> Tensor:
        """s · gate [slots, parts, r]."""
        return self.A.new_full(self.A.shape[:3], self.scale) if self.gate is None else self.gate * self.scale


class DualLoRALinear(nn.Module):
    """A frozen linear with separate low-rank branches for every slot.

    Args:
        linear: its weight [parts·N, K] and bias are shared, not copied, and frozen.
        ranks: rank of every branch by name.
        alpha: scale of a branch times its rank.
        gated: branches with a trained gate in the rank space, as in SoRA.
        slots: independent sets of adapters.
        parts: adapters over a packed weight, e.g. 3 over q, k and v.
        init: of A. "gaussian": N(0, 1/r), variance 1/r; "peft-gaussian": standard deviation 1/r; "kaiming": uniform in
            ±1/sqrt(K), PEFT's default.
        backend: as for `dual_lora`.

    The state has `weight` and `bias`, as nn.Linear's, and `branches.{name}.A`, `.B` and `.gate`.
    """

    branches: Mapping[str, LoRABranch]

    def __init__(
        self,
        linear: nn.Linear,
        ranks: Mapping[str, int],
        *,
        alpha: float = 16.0,
        gated: Collection[str] = (),
        slots: int = 1,
        parts: int = 1,
        init: str = "gaussian",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if not ranks or min(ranks.values()) < 1 or slots < 1:
            raise ValueError(f"ranks={dict(ranks)}, slots={slots}: a branch at least, a rank and slots of 1 at least")
        if parts < 1 or linear.out_features % parts:
            raise ValueError(f"parts={parts} does not divide the {linear.out_features} outputs of the linear")
        if unknown := sorted(set(gated) - set(ranks)):
            raise ValueError(f"gated: no branch {unknown[0]!r}: choose from {', '.join(ranks)}")
        if init not in INITS:
            raise ValueError(f"unknown init {init!r}: choose from {', '.join(INITS)}")
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight.requires_grad_(False), linear.bias
        if self.bias is not None:
            self.bias.requires_grad_(False)
        branches = {
            name: LoRABranch(self.weight, r, alpha=alpha, gated=name in gated, slots=slots, parts=parts, init=init)
            for name, r in ranks.items()
        }
        self.branches = nn.ModuleDict(branches)  # type: ignore[assignment]
        self.slots, self.backend = slots, backend
        self.select()

    def select(self, *views: View, sizes: Sequence[int] | None = None) -> None:
        """Set the views of the samples for later calls; without views, all branches.

        Args:
            views: a branch's name, or a tuple of names that are summed. Several views split the samples of a slot into
                equal groups, in this order.
            sizes: samples of every slot in each view. None: equally many for every slot.
        """
        self.views = self._views(views)
        self.sizes = None if sizes is None else tuple(sizes)

    def branch(self, name: str) -> LoRABranch:
        """A branch by its name."""
        if name not in self.branches:
            raise ValueError(f"no branch {name!r}: choose from {', '.join(self.branches)}")
        return self.branches[name]

    def forward(self, x: Tensor, views: Sequence[View] | None = None, sizes: Sequence[int] | None = None) -> Tensor:
        """[samples, ..., K] → [samples, ..., N]; `views` and `sizes` for this call only, as in `select`."""
        selected = self.views if views is None else self._views(views)
        groups = self._groups(x, len(selected), self.sizes if sizes is None else tuple(sizes))
        active = {name: branch for name, branch in self.branches.items() if any(name in view for view in selected)}
        if not active:
            return F.linear(x, self.weight, self.bias)
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        A = torch.cat([branch.A for branch in active.values()], dim=2)
        B = torch.cat([branch.B for branch in active.values()], dim=3)
        scales = {name: branch.scales() for name, branch in active.items()}
        by_view = [[s if name in view else torch.zeros_like(s) for name, s in scales.items()] for view in selected]
        c = torch.stack([torch.cat(row, dim=2) for row in by_view], dim=1)
        rows = x.reshape(groups.rows, x.shape[-1])
        y = dual_lora(rows, FrozenLinear(weight, bias), A, B, c, groups, backend=self.backend)
        return y.view(*x.shape[:-1], -1)

    @torch.no_grad()
    def merged(self, slot: int = 0, view: View | None = None) -> nn.Linear:
        """A plain linear with one slot's branches folded into its weight; None: all branches."""
        weight = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32), copy=True)
        for name in self.branches if view is None else self._views((view,))[0]:
            branch = self.branches[name]
            up = branch.B[slot] * branch.scales()[slot, :, None]
            weight += (up.to(weight.dtype) @ branch.A[slot].to(weight.dtype)).flatten(0, 1)
        return frozen_module(weight.to(self.weight.dtype), self.bias)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """`x @ layer` calls the layer: open_clip multiplies by a projection that is not an nn.Linear."""
        if function not in (Tensor.__matmul__, Tensor.matmul, torch.matmul) or not isinstance(args[1], cls):
            return NotImplemented
        return args[1](args[0])

    def extra_repr(self) -> str:
        ranks = [
            f"{name} r={branch.A.shape[2]}{'' if branch.gate is None else ' gated'}"
            for name, branch in self.branches.items()
        ]
        return f"{self.in_features} → {self.out_features}, {', '.join(ranks)}, slots={self.slots}"

    def _views(self, views: Sequence[View]) -> tuple[tuple[str, ...], ...]:
        """Every view as a tuple of checked names; without views, one of all branches."""
        names = tuple((view,) if isinstance(view, str) else tuple(dict.fromkeys(view)) for view in views)
        for view in names:
            for name in view:
                self.branch(name)
        return names or (tuple(self.branches),)

    def _groups(self, x: Tensor, views: int, sizes: tuple[int, ...] | None) -> RowGroups:
        samples = x.shape[0] if x.ndim > 1 else 1
        if sizes is None:
            if samples % (self.slots * views):
                raise ValueError(f"{samples} samples do not divide into {self.slots} slots, {views} views: pass sizes")
            sizes = (samples // (self.slots * views),) * self.slots
        if len(sizes) != self.slots or views * sum(sizes) != samples:
            raise ValueError(f"sizes={list(sizes)} in {views} views do not fit {self.slots} slots, {samples} samples")
        return RowGroups(sizes, views).times(math.prod(x.shape[1:-1]))


def frozen_module(weight: Tensor, bias: nn.Parameter | None) -> nn.Linear:
    """A frozen nn.Linear around a weight [N, K] and a bias [N]."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = bias  # type: ignore[assignment]
    return linear
