"""The Triton form of `dual_lora`: one adapted linear as torch ops.

Forward, three launches:
    fold            A → compute dtype, B' = (B · diag(c))ᵀ, what is not finite kept apart
    [norm_]down     P = x Aᵀ; with a LayerNorm before the linear, h = LN(x) and P = h Aᵀ in one pass over x
    product         y = φ(h Wᵀ + b + P B') + residual

Backward, three launches, four behind a LayerNorm; two where x needs no gradient:
    adapter_gradients   one pass over dY and x: Q = dY B', and per chunk of rows T = dYᵀ P and dA = Qᵀ h
    product             dX = dY W + Q A, the forward's kernel with W as it lies
    norm_backward       dX of the LayerNorm
    sum_shares          chunks to dA, dB = T · diag(c) and dc = Σ_n B ⊙ T, in a fixed order

`fastdlp::dual_lora` and `fastdlp::dual_lora_backward` are custom ops with fake and autograd registrations, so the
operator goes through torch.compile in one graph and into a CUDA graph, after one call with the same split of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdlp.kernels.fold import Source, fold, sum_shares
from fastdlp.kernels.frozen import FrozenLinear, Norm
from fastdlp.kernels.gradients import Input, gradients_tile
from fastdlp.kernels.groups import RowGroups
from fastdlp.kernels.half_blocks import activation_backward, backward_of, forward_of
from fastdlp.kernels.launch import last_contiguous
from fastdlp.kernels.low_rank import Branch, Folded, Part, padded


def dual_lora_fused(
    x: Tensor, linear: FrozenLinear, A: Tensor, B: Tensor, c: Tensor, groups: RowGroups, residual: Tensor | None = None
) -> Tensor:
    """`dual_lora` in the Triton form; same arguments, shapes and gradients."""
    norm = (None, None, 0.0) if linear.norm is None else (linear.norm.weight, linear.norm.bias, linear.norm.eps)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, A, B, c, residual))
    split = (list(groups.sizes), groups.views)
    frozen = (linear.weight, linear.bias, *norm, linear.activation)
    return dual_lora_op(x, *frozen, A, B, c, *split, residual, keep)[0]


def forward_pass(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    activation: str,
    A: Tensor,
    B: Tensor,
    c: Tensor,
    sizes: Sequence[int],
    views: int,
    residual: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, and what the backward needs: stats, P, u, down, up, poison (empty where there is none or not `keep`)."""
    groups, linear = RowGroups(tuple(sizes), views), _frozen(weight, bias, norm_weight, norm_bias, eps, activation)
    x, residual = last_contiguous(x), None if residual is None else last_contiguous(residual)
    folded = fold_adapters(A, B, c, x.dtype)
    y, stats, P, u = forward_of(x, linear, folded.site(0, A.shape[1]), groups, residual, keep)
    kept = (stats, P, u, folded.down, folded.up, folded.poison) if keep else (None,) * 6
    dtypes = (torch.float32, x.dtype, x.dtype, x.dtype, x.dtype, torch.float32)
    found = [x.new_empty(0, dtype=dtype) if tensor is None else tensor for tensor, dtype in zip(kept, dtypes)]
    return y, found[0], found[1], found[2], found[3], found[4], found[5]


dual_lora_op = torch.library.custom_op("fastdlp::dual_lora", forward_pass, mutates_args=())


@dual_lora_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    activation: str,
    A: Tensor,
    B: Tensor,
    c: Tensor,
    sizes: Sequence[int],
    views: int,
    residual: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    slots, parts, rank, width = A.shape
    rows, out, L = x.shape[0], B.shape[2], parts * padded(rank)
    y = x.new_empty(rows, parts * out)
    return (
        y,
        x.new_empty((2, rows) if keep and norm_weight is not None else (0,), dtype=torch.float32),
        x.new_empty((rows, L) if keep else (0,)),
        torch.empty_like(y) if keep and activation != "none" else x.new_empty(0),
        x.new_empty((slots, L * width) if keep else (0,)),
        x.new_empty((slots * views, L * out) if keep else (0,)),
        x.new_empty((slots, parts) if keep else (0,), dtype=torch.float32),
    )


def backward_pass(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    P: Tensor,
    u: Tensor,
    down: Tensor,
    up: Tensor,
    poison: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    activation: str,
    A: Tensor,
    B: Tensor,
    c: Tensor,
    sizes: Sequence[int],
    views: int,
    need_x: bool,
    need_adapters: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dX [M, K] in the dtype of x, dA, dB and dc in fp32; empty where not needed."""
    groups, linear = RowGroups(tuple(sizes), views), _frozen(weight, None, norm_weight, norm_bias, eps, activation)
    dy, x = last_contiguous(dy), last_contiguous(x)
    source = source_of(A, B, c)
    folded = Folded(down, up, poison, [source.branch], views)
    parts = A.shape[1]
    du = dy if activation == "none" else activation_backward(dy, u, activation)
    shares = None
    if need_adapters:
        tile = gradients_tile(x, len(x), parts * B.shape[2], x.shape[1])
        shares = folded.shares(folded.use(0, parts, groups, tile["BLOCK_M"]))
    made = Input(x, linear.norm, stats)
    dx = backward_of(du, P, linear, folded.site(0, parts), groups, made, shares, need_x)
    nothing = [x.new_empty(0, dtype=torch.float32) for _ in range(3)]
    if need_adapters:
        nothing = [torch.empty_like(t, dtype=torch.float32, memory_format=torch.contiguous_format) for t in (A, B, c)]
        dA, dB, dc = nothing
        sum_shares(source, folded, dA, dB, dc.flatten(2))
    return x.new_empty(0) if dx is None else dx, nothing[0], nothing[1], nothing[2]


dual_lora_backward_op = torch.library.custom_op("fastdlp::dual_lora_backward", backward_pass, mutates_args=())


@dual_lora_backward_op.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    P: Tensor,
    u: Tensor,
    down: Tensor,
    up: Tensor,
    poison: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    activation: str,
    A: Tensor,
    B: Tensor,
    c: Tensor,
    sizes: Sequence[int],
    views: int,
    need_x: bool,
    need_adapters: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx = x.new_empty(x.shape if need_x else (0,))
    dA, dB, dc = (x.new_empty(t.shape if need_adapters else (0,), dtype=torch.float32) for t in (A, B, c))
    return dx, dA, dB, dc


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, norm_weight, norm_bias, eps, activation, A, B, c, sizes, views, _, _ = inputs
    ctx.save_for_backward(x, *output[1:], weight, norm_weight, norm_bias, A, B, c)
    ctx.eps, ctx.activation, ctx.split = eps, activation, (list(sizes), views)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


X, ADAPTERS, RESIDUAL, INPUTS = 0, (7, 8, 9), 12, 14  # places among the op's inputs


def _backward(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing: list[Tensor | None] = [None] * INPUTS
    if dy is None:
        return tuple(nothing)
    *kept, weight, norm_weight, norm_bias, A, B, c = ctx.saved_tensors
    need_x, need_adapters = ctx.needs_input_grad[X], any(ctx.needs_input_grad[at] for at in ADAPTERS)
    if need_x or need_adapters:
        frozen = (weight, norm_weight, norm_bias, ctx.eps, ctx.activation)
        dx, *adapters = dual_lora_backward_op(dy, *kept, *frozen, A, B, c, *ctx.split, need_x, need_adapters)
        nothing[X] = dx if need_x else None
        for at, gradient, tensor in zip(ADAPTERS, adapters, (A, B, c)):
            nothing[at] = gradient.to(tensor.dtype) if ctx.needs_input_grad[at] else None
    nothing[RESIDUAL] = dy if ctx.needs_input_grad[RESIDUAL] else None
    return tuple(nothing)


dual_lora_op.register_autograd(_backward, setup_context=_setup_context)


def _frozen(
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    activation: str,
) -> FrozenLinear:
    norm = None
    if norm_weight is not None and norm_bias is not None:
        norm = Norm(norm_weight.contiguous(), norm_bias.contiguous(), eps)
    return FrozenLinear(weight, None if bias is None else bias.contiguous(), norm, activation)


def source_of(A: Tensor, B: Tensor, c: Tensor) -> Source:
    """A [slots, parts, R, K], B [slots, parts, N, R] and c [slots, views, parts, R] as one branch of one linear."""
    A, B, c = _rows_contiguous(A), _rows_contiguous(B), c.contiguous()
    _, parts, rank, width = A.shape
    out, RP = B.shape[2], padded(rank)
    placed = (
        Part(width, out, i * rank * width, i * out * rank, i * rank, i * RP * width, i * RP * out) for i in range(parts)
    )
    return Source(A, B, c, (c.stride(0), c.stride(1), 1), None, Branch(tuple(placed), rank, 0))


def fold_adapters(A: Tensor, B: Tensor, c: Tensor, dtype: torch.dtype) -> Folded:
    """The adapters of one linear, shaped as `dual_lora` takes them, in the compute dtype."""
    L = A.shape[1] * padded(A.shape[2])
    return fold([source_of(A, B, c)], len(A), c.shape[1], L * A.shape[3], L * B.shape[2], dtype)


def _rows_contiguous(tensor: Tensor) -> Tensor:
    """A stack whose entries are each contiguous, whatever lies between them."""
    return tensor if tensor.numel() == 0 or tensor[0].is_contiguous() else tensor.contiguous()
