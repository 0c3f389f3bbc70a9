"""What a transformer block is made of, in the Triton form: each half of it one node of autograd's graph.

    attention half   x + out(attention(qkv(norm(x))))      4 launches forward, 6 backward
    MLP half         x + fc2(φ(fc1(norm(x))))              4 launches forward, 5 backward

The halves fuse across linears what single ones cannot: attention's epilogue computes the P of `out`, dX of fc2 is
stored as the dY of fc1, and the norm's backward adds the gradient of the residual connection. A half saves its input,
the packed qkv, attention's output and φ's argument; the outputs of norms and activations are recomputed in the kernels.

Adapters come folded (`fold_rows`): one launch a branch before the first linear, and one after the backward, which
sums the shares that every linear left in one workspace. That sum is the backward of an empty tensor, the token, which
every linear takes as an input and gives no gradient: autograd runs it when all linears are done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastdlp.kernels.activation import KEPT
from fastdlp.kernels.fold import Source, fold, sum_shares
from fastdlp.kernels.frozen import FrozenLinear
from fastdlp.kernels.gradients import Input, adapter_gradients, gradients_tile
from fastdlp.kernels.groups import RowGroups
from fastdlp.kernels.low_rank import Branch, Folded, SiteAdapters, Use
from fastdlp.kernels.norm import down_product, norm_backward, norm_down_product
from fastdlp.kernels.product import backward_product, forward_product, rows_of_tile
from fastdlp.kernels.short_attention import attention_backward, attention_forward

Span = tuple[int, int]  # parts first..end of the folded ones: one linear


@dataclass(frozen=True)
class BranchRows:
    """A branch of the active slots as flat rows, leaves of autograd's graph.

    weights: [slots, D] fp32, A and B of all linears. gates: [slots, Q], or of no column where there are none. seen:
    [views] fp32, the branch's scale for the views that see it and 0 for the others.
    """

    weights: Tensor
    gates: Tensor
    seen: Tensor
    branch: Branch

    def source(self) -> Source:
        """As the fold reads it."""
        weights, gates = self.weights.detach(), self.gates.detach()
        if gates.shape[1]:
            return Source(weights, weights, gates, (gates.stride(0), 0, 1), self.seen, self.branch)
        return Source(weights, weights, self.seen, (0, 1, 0), None, self.branch)


@dataclass(frozen=True)
class FoldedRows:
    """The folded adapters of all linears, and the token that leads from each of them back to the rows."""

    folded: Folded
    token: Tensor


def fold_rows(
    rows: Sequence[BranchRows], views: int, down_entries: int, up_entries: int, dtype: torch.dtype
) -> FoldedRows:
    """Fold all branches; arguments as in `fold.fold`."""
    sources = [row.source() for row in rows]
    folded = fold(sources, len(rows[0].weights), views, down_entries, up_entries, dtype)
    leaves = [leaf for row in rows for leaf in (row.weights, row.gates)]
    return FoldedRows(folded, _Fold.apply(folded, sources, *leaves))


class _Fold(torch.autograd.Function):
    """Gives the token; its backward sums the shares of every linear to the gradients of the rows."""

    @staticmethod
    def forward(ctx: Any, folded: Folded, sources: list[Source], *leaves: Tensor) -> Tensor:
        ctx.folded, ctx.sources = folded, sources
        ctx.shapes = [leaf.shape for leaf in leaves]
        ctx.set_materialize_grads(False)
        return leaves[0].new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: Tensor | None) -> tuple[Any, ...]:
        found: list[Any] = [None, None]
        for number, source in enumerate(ctx.sources):
            weights = source.A.new_empty(ctx.shapes[2 * number])
            gates = None if source.seen is None else source.A.new_empty(ctx.shapes[2 * number + 1])
            sum_shares(source, ctx.folded, weights, weights, gates)
            found += [weights, gates]
        ctx.folded.release()
        return tuple(found)


def linear(
    x: Tensor, frozen: FrozenLinear, adapters: FoldedRows, span: Span, groups: RowGroups, residual: Tensor | None = None
) -> Tensor:
    """φ(norm(x) Wᵀ + b + LoRA) + residual: x [M, K] → [M, parts·N]."""
    keep = _keeps(adapters, x, residual)
    return _Linear.apply(x, residual, adapters.token, frozen, adapters.folded, span, groups, keep)


@dataclass(frozen=True)
class Heads:
    """Attention over sequences of `tokens` rows; causal: a query sees the keys up to its own position."""

    heads: int
    tokens: int
    causal: bool


def attention_half(
    x: Tensor,
    qkv: FrozenLinear,
    out: FrozenLinear,
    heads: Heads,
    adapters: FoldedRows,
    spans: tuple[Span, Span],
    groups: RowGroups,
    skip: bool = True,
) -> Tensor:
    """x + out(attention(qkv(norm(x)))): [M, width] → [M, width]; without `skip`, x is not added.

    Args:
        groups: of sequences; M = groups.rows · tokens. The sequences must fit `short_attention`.
    """
    keep = _keeps(adapters, x)
    return _AttentionHalf.apply(x, adapters.token, qkv, out, heads, adapters.folded, spans, groups, skip, keep)


def mlp_half(
    x: Tensor,
    fc1: FrozenLinear,
    fc2: FrozenLinear,
    adapters: FoldedRows,
    spans: tuple[Span, Span],
    groups: RowGroups,
    skip: bool = True,
) -> Tensor:
    """x + fc2(φ(fc1(norm(x)))): [M, width] → [M, width]; without `skip`, x is not added."""
    keep = _keeps(adapters, x)
    return _MLPHalf.apply(x, adapters.token, fc1, fc2, adapters.folded, spans, groups, skip, keep)


def forward_of(
    x: Tensor, frozen: FrozenLinear, site: SiteAdapters, groups: RowGroups, residual: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """One linear without autograd: y, the norm's stats [2, M] (if any), P [M, L] and φ's argument (if kept)."""
    if frozen.norm is None:
        P, stats = down_product(x, site, groups), None
    else:
        x, stats, P = norm_down_product(x, frozen.norm, site, groups)
    y, u = forward_product(x, frozen, P, site, groups, residual, keep)
    return y, stats, P, u


def backward_of(
    dy: Tensor,
    P: Tensor,
    frozen: FrozenLinear,
    site: SiteAdapters,
    groups: RowGroups,
    x: Input,
    shares: tuple[Tensor, Tensor] | None,
    need_x: bool,
    residual: Tensor | None = None,
) -> Tensor | None:
    """dX of a linear behind its activation, and its shares of the adapters' gradients.

    Behind a norm, dX is with respect to the rows before it, plus `residual`.
    """
    T, dA = (None, None) if shares is None else shares
    Q = adapter_gradients(dy, P, site, groups, T, dA, None if dA is None else x)
    if not need_x:
        return None
    dx = backward_product(dy, frozen.weight, Q, site, groups)
    if x.norm is not None and x.stats is not None:
        dx = norm_backward(dx, x.rows, x.stats, x.norm.weight, residual)
    return dx


def activation_backward(dy: Tensor, u: Tensor, activation: str) -> Tensor:
    """dY ⊙ φ'(u): what a single linear does that has nothing behind it to fuse this with."""
    kept = KEPT[activation]
    return kept.backward(dy, kept.keep(u.clone()))


def _keeps(adapters: FoldedRows, *inputs: Tensor | None) -> bool:
    tensors = (adapters.token, *inputs)
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _reserve(folded: Folded, span: Span, groups: RowGroups, like: Tensor, activated: bool = False) -> Use:
    """`activated`: the linear's input is recomputed from an activation's argument, as fc2's."""
    site = folded.site(*span)
    shape = groups.rows, site.parts * site.out, site.down.shape[2]
    tile = rows_of_tile(like, *shape) if activated else 0
    return folded.use(*span, groups, gradients_tile(like, *shape)["BLOCK_M"], tile)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        token: Tensor,
        frozen: FrozenLinear,
        folded: Folded,
        span: Span,
        groups: RowGroups,
        keep: bool,
    ) -> Tensor:
        y, stats, P, u = forward_of(x, frozen, folded.site(*span), groups, residual, keep)
        if keep:
            ctx.frozen, ctx.folded, ctx.span, ctx.groups = frozen, folded, span, groups
            ctx.use = _reserve(folded, span, groups, x)
            ctx.save_for_backward(x, stats, P, u)
            ctx.set_materialize_grads(False)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if grads[0] is None:
            return (None,) * 8
        x, stats, P, u = ctx.saved_tensors
        dy = grads[0].contiguous()
        du = dy if u is None else activation_backward(dy, u, ctx.frozen.activation)
        shares = ctx.folded.shares(ctx.use) if ctx.needs_input_grad[2] else None
        made = Input(x, ctx.frozen.norm, stats)
        site = ctx.folded.site(*ctx.span)
        dx = backward_of(du, P, ctx.frozen, site, ctx.groups, made, shares, ctx.needs_input_grad[0])
        return dx, dy if ctx.needs_input_grad[1] else None, *(None,) * 6


class _MLPHalf(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        token: Tensor,
        fc1: FrozenLinear,
        fc2: FrozenLinear,
        folded: Folded,
        spans: tuple[Span, Span],
        groups: RowGroups,
        skip: bool,
        keep: bool,
    ) -> Tensor:
        h, stats, P1, u = forward_of(x, fc1, folded.site(*spans[0]), groups, None, keep)
        y, _, P2, _ = forward_of(h, fc2, folded.site(*spans[1]), groups, x if skip else None, keep)
        if keep:
            ctx.fc1, ctx.fc2, ctx.folded, ctx.spans, ctx.groups, ctx.skip = fc1, fc2, folded, spans, groups, skip
            ctx.uses = [_reserve(folded, spans[0], groups, x), _reserve(folded, spans[1], groups, x, activated=True)]
            ctx.save_for_backward(x, stats, P1, u, P2)
            ctx.set_materialize_grads(False)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if grads[0] is None:
            return (None,) * 9
        x, stats, P1, u, P2 = ctx.saved_tensors
        folded, groups, dy = ctx.folded, ctx.groups, grads[0].contiguous()
        need_x, need_adapters = ctx.needs_input_grad[:2]
        shares = [folded.shares(use) if need_adapters else None for use in ctx.uses]
        T, dA = shares[1] or (None, None)
        site = folded.site(*ctx.spans[1])
        Q = adapter_gradients(dy, P2, site, groups, T)
        du = backward_product(dy, ctx.fc2.weight, Q, site, groups, u, ctx.fc1.activation, dA)
        before, residual = Input(x, ctx.fc1.norm, stats), dy if ctx.skip else None
        dx = backward_of(du, P1, ctx.fc1, folded.site(*ctx.spans[0]), groups, before, shares[0], need_x, residual)
        return dx, *(None,) * 8


class _AttentionHalf(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        token: Tensor,
        qkv: FrozenLinear,
        out: FrozenLinear,
        heads: Heads,
        folded: Folded,
        spans: tuple[Span, Span],
        sequences: RowGroups,
        skip: bool,
        keep: bool,
    ) -> Tensor:
        groups, site = sequences.times(heads.tokens), folded.site(*spans[1])
        packed, stats, P1, _ = forward_of(x, qkv, folded.site(*spans[0]), groups, None, keep)
        a, P2 = attention_forward(packed, heads.heads, heads.tokens, heads.causal, site.down, site.poison, sequences)
        assert P2 is not None
        y, _ = forward_product(a, out, P2, site, groups, x if skip else None)
        if keep:
            ctx.qkv, ctx.out, ctx.heads, ctx.folded, ctx.spans = qkv, out, heads, folded, spans
            ctx.groups, ctx.skip = groups, skip
            ctx.uses = [_reserve(folded, span, groups, x) for span in spans]
            ctx.save_for_backward(x, stats, P1, packed, a, P2)
            ctx.set_materialize_grads(False)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if grads[0] is None:
            return (None,) * 10
        x, stats, P1, packed, a, P2 = ctx.saved_tensors
        folded, groups, heads, dy = ctx.folded, ctx.groups, ctx.heads, grads[0].contiguous()
        need_x, need_adapters = ctx.needs_input_grad[:2]
        shares = [folded.shares(use) if need_adapters else None for use in ctx.uses]
        da = backward_of(dy, P2, ctx.out, folded.site(*ctx.spans[1]), groups, Input(a), shares[1], True)
        assert da is not None
        dqkv = attention_backward(packed, da, heads.heads, heads.tokens, heads.causal)
        before, residual = Input(x, ctx.qkv.norm, stats), dy if ctx.skip else None
        dx = backward_of(dqkv, P1, ctx.qkv, folded.site(*ctx.spans[0]), groups, before, shares[0], need_x, residual)
        return dx, *(None,) * 9
