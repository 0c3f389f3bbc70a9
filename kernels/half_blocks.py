"""Adapted linears and the halves of a transformer block in Triton kernels, each one node of the autograd graph.

    attention half   x + out(attention(qkv(norm(x))))      4 launches forward, 6 backward
    MLP half         x + fc2(φ(fc1(norm(x))))              4 launches forward, 5 backward

The halves fuse across linears: the epilogue of attention computes P of `out`, dX of fc2 is stored as dY of fc1, and the
norm's backward adds the gradient of the residual connection. A half saves its input, the packed qkv, attention's output
and φ's argument; outputs of norms and activations are recomputed in the kernels.

Adapters are folded (`fold_rows`), one launch per branch before the first linear; one per branch at the end of the
backward reduces the partial sums that all linears wrote to one workspace. That reduction is the backward of the
*anchor*, an empty tensor that every linear takes as an input: autograd runs it after the backward of all linears.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastdlp.kernels.activation import RECOMPUTABLE
from fastdlp.kernels.fold import BranchTensors, fold, sum_partials
from fastdlp.kernels.frozen import FrozenLinear
from fastdlp.kernels.gradients import LinearInput, adapter_gradients, gradients_tile
from fastdlp.kernels.groups import RowGroups
from fastdlp.kernels.low_rank import BranchOffsets, FoldedAdapters, PartialSums, Span
from fastdlp.kernels.norm import down_product, norm_backward
from fastdlp.kernels.product import backward_product, forward_product, rows_per_tile
from fastdlp.kernels.short_attention import attention_backward, attention_forward

Partials = tuple[Tensor | None, Tensor | None]  # of T and dA; None: not computed


@dataclass(frozen=True)
class BranchRows:
    """A branch of the active slots as flat rows, leaves of the autograd graph.

    weights: [slots, D] fp32, A and B of all linears. gates: [slots, Q], Q = 0 without gates. view_scale: [views] fp32,
    the branch's scale for the views that include it and 0 for the others.
    """

    weights: Tensor
    gates: Tensor
    view_scale: Tensor
    offsets: BranchOffsets

    def tensors(self) -> BranchTensors:
        """The arguments of the fold."""
        weights, gates = self.weights.detach(), self.gates.detach()
        if gates.shape[1]:
            return BranchTensors(weights, weights, gates, (gates.stride(0), 0, 1), self.view_scale, self.offsets)
        return BranchTensors(weights, weights, self.view_scale, (0, 1, 0), None, self.offsets)


@dataclass(frozen=True)
class FoldedRows:
    """The folded adapters of all linears, and the anchor that connects each linear to the rows in the graph."""

    folded: FoldedAdapters
    anchor: Tensor


def fold_rows(
    rows: Sequence[BranchRows], views: int, down_entries: int, up_entries: int, dtype: torch.dtype
) -> FoldedRows:
    """Fold all branches; arguments as in `fold.fold`."""
    branches = [row.tensors() for row in rows]
    folded = fold(branches, len(rows[0].weights), views, down_entries, up_entries, dtype)
    leaves = [leaf for row in rows for leaf in (row.weights, row.gates)]
    return FoldedRows(folded, _Fold.apply(folded, branches, *leaves))


class _Fold(torch.autograd.Function):
    """Returns the anchor; its backward reduces the partial sums of all linears to the gradients of the rows."""

    @staticmethod
    def forward(ctx: Any, folded: FoldedAdapters, branches: list[BranchTensors], *leaves: Tensor) -> Tensor:
        ctx.folded, ctx.branches = folded, branches
        ctx.shapes = [leaf.shape for leaf in leaves]
        ctx.set_materialize_grads(False)
        return leaves[0].new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: Tensor | None) -> tuple[Any, ...]:
        grads: list[Any] = [None, None]
        for number, branch in enumerate(ctx.branches):
            weights = branch.A.new_empty(ctx.shapes[2 * number])
            gates = None if branch.view_scale is None else branch.A.new_empty(ctx.shapes[2 * number + 1])
            sum_partials(branch, ctx.folded, weights, weights, gates)
            grads += [weights, gates]
        ctx.folded.release()
        return tuple(grads)


@dataclass(frozen=True)
class AdaptedLinear:
    """φ(norm(x) Wᵀ + b + LoRA) + residual over the rows of `groups`; `span` are its adapters among the folded ones."""

    frozen: FrozenLinear
    span: Span
    groups: RowGroups

    def forward(self, x: Tensor, residual: Tensor | None, folded: FoldedAdapters, save: bool) -> tuple[Tensor, Any]:
        """y and, for the backward, the norm's stats [2, M] (if any), P [M, L] and φ's argument (if saved)."""
        site = folded.site(self.span)
        h, stats, P = down_product(x, self.frozen.norm, site, self.groups)
        y, u = forward_product(h, self.frozen, P, site, self.groups, residual, save)
        return y, (stats, P, u)

    def gradients(
        self,
        dy: Tensor,
        P: Tensor,
        x: LinearInput,
        folded: FoldedAdapters,
        partials: Partials,
        need_x: bool,
        residual: Tensor | None = None,
    ) -> Tensor | None:
        """dX from dY of the linear without φ, and its partial sums of the adapters' gradients.

        With a norm, dX is with respect to the norm's input, plus `residual`.
        """
        site, (T, dA) = folded.site(self.span), partials
        Q = adapter_gradients(dy, P, site, self.groups, T, dA, None if dA is None else x)
        if not need_x:
            return None
        dx = backward_product(dy, self.frozen.weight, Q, site, self.groups)
        if x.norm is not None and x.stats is not None:
            dx = norm_backward(dx, x.rows, x.stats, x.norm.weight, residual)
        return dx

    def reserve_one(self, like: Tensor, folded: FoldedAdapters, recomputed: bool = False) -> PartialSums:
        """`recomputed`: the linear's input is φ(u), recomputed from u, as that of fc2."""
        site = folded.site(self.span)
        shape = self.groups.rows, site.parts * site.out, site.down.shape[2]
        tile = rows_per_tile(like, *shape) if recomputed else 0
        return folded.reserve(self.span, self.groups, gradients_tile(like, *shape)["BLOCK_M"], tile)

    def reserve(self, like: Tensor, folded: FoldedAdapters) -> list[PartialSums]:
        return [self.reserve_one(like, folded)]

    def backward(
        self, dy: Tensor, saved: Any, folded: FoldedAdapters, partials: list[Partials], need_x: bool
    ) -> Tensor | None:
        x, stats, P, u = saved
        du = dy if u is None else activation_backward(dy, u, self.frozen.activation)
        return self.gradients(du, P, LinearInput(x, self.frozen.norm, stats), folded, partials[0], need_x)


@dataclass(frozen=True)
class MLPHalf:
    """x + fc2(φ(fc1(norm(x)))): [M, width] → [M, width]; x is not added without `skip`."""

    fc1: AdaptedLinear
    fc2: AdaptedLinear
    skip: bool = True

    def forward(self, x: Tensor, residual: None, folded: FoldedAdapters, save: bool) -> tuple[Tensor, Any]:
        h, (stats, P1, u) = self.fc1.forward(x, None, folded, save)
        y, (_, P2, _) = self.fc2.forward(h, x if self.skip else None, folded, save)
        return y, (stats, P1, u, P2)

    def reserve(self, like: Tensor, folded: FoldedAdapters) -> list[PartialSums]:
        return [self.fc1.reserve_one(like, folded), self.fc2.reserve_one(like, folded, recomputed=True)]

    def backward(
        self, dy: Tensor, saved: Any, folded: FoldedAdapters, partials: list[Partials], need_x: bool
    ) -> Tensor | None:
        x, stats, P1, u, P2 = saved
        site, groups, (T, dA) = folded.site(self.fc2.span), self.fc2.groups, partials[1]
        Q = adapter_gradients(dy, P2, site, groups, T)
        du = backward_product(dy, self.fc2.frozen.weight, Q, site, groups, u, self.fc1.frozen.activation, dA)
        x = LinearInput(x, self.fc1.frozen.norm, stats)
        return self.fc1.gradients(du, P1, x, folded, partials[0], need_x, dy if self.skip else None)


@dataclass(frozen=True)
class AttentionHalf:
    """x + out(attention(qkv(norm(x)))): [M, width] → [M, width]; x is not added without `skip`.

    M = sequences.rows · tokens, and both linears have the groups `sequences.times(tokens)`. The sequences must fit
    `short_attention`. causal: a query attends to the keys up to its own position.
    """

    qkv: AdaptedLinear
    out: AdaptedLinear
    sequences: RowGroups
    heads: int
    tokens: int
    causal: bool
    skip: bool = True

    def forward(self, x: Tensor, residual: None, folded: FoldedAdapters, save: bool) -> tuple[Tensor, Any]:
        site = folded.site(self.out.span)
        packed, (stats, P1, _) = self.qkv.forward(x, None, folded, save)
        shape = self.heads, self.tokens, self.causal
        a, P2 = attention_forward(packed, *shape, site.down, site.nan_flag, self.sequences)
        assert P2 is not None
        y, _ = forward_product(a, self.out.frozen, P2, site, self.out.groups, x if self.skip else None)
        return y, (stats, P1, packed, a, P2)

    def reserve(self, like: Tensor, folded: FoldedAdapters) -> list[PartialSums]:
        return [self.qkv.reserve_one(like, folded), self.out.reserve_one(like, folded)]

    def backward(
        self, dy: Tensor, saved: Any, folded: FoldedAdapters, partials: list[Partials], need_x: bool
    ) -> Tensor | None:
        x, stats, P1, packed, a, P2 = saved
        da = self.out.gradients(dy, P2, LinearInput(a), folded, partials[1], need_x=True)
        assert da is not None
        dqkv = attention_backward(packed, da, self.heads, self.tokens, self.causal)
        x = LinearInput(x, self.qkv.frozen.norm, stats)
        return self.qkv.gradients(dqkv, P1, x, folded, partials[0], need_x, dy if self.skip else None)


def run(
    x: Tensor, unit: AdaptedLinear | MLPHalf | AttentionHalf, adapters: FoldedRows, residual: Tensor | None = None
) -> Tensor:
    """A unit on rows x [M, K] as one node of the graph: [M, N]; `residual` [M, N] is for an `AdaptedLinear` only."""
    inputs = (adapters.anchor, x, residual)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    return _Run.apply(x, residual, adapters.anchor, unit, adapters.folded, save)


class _Run(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, anchor: Tensor, unit: Any, folded: FoldedAdapters, save: bool
    ) -> Tensor:
        y, saved = unit.forward(x, residual, folded, save)
        if save:
            ctx.unit, ctx.folded, ctx.sums = unit, folded, unit.reserve(x, folded)
            ctx.save_for_backward(x, *saved)
            ctx.set_materialize_grads(False)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if grads[0] is None:
            return (None,) * 6
        dy, (need_x, need_residual, need_adapters) = grads[0].contiguous(), ctx.needs_input_grad[:3]
        partials = [ctx.folded.partial_sums(sums) if need_adapters else (None, None) for sums in ctx.sums]
        dx = ctx.unit.backward(dy, ctx.saved_tensors, ctx.folded, partials, need_x)
        return dx, dy if need_residual else None, *(None,) * 4


def activation_backward(dy: Tensor, u: Tensor, activation: str) -> Tensor:
    """dY ⊙ φ'(u), for a linear that is not followed by another to fuse this with."""
    phi = RECOMPUTABLE[activation]
    return phi.backward(dy, phi.saved(u.clone()))
