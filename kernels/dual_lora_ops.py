"""The Triton form of the dual-LoRA operator: what is launched, in which order, and as torch ops.

Forward, three launches a linear:
    fold            A → compute dtype, B' = (B · diag(c))ᵀ
    [norm_]down     P = x Aᵀ; with a LayerNorm before the linear, h = LN(x) and P = h Aᵀ in one pass over x
    product         y = φ(h Wᵀ + b + P B') + residual

Backward, four launches, five behind a LayerNorm; three where x needs no gradient:
    adapter_gradients   one pass over dY: dU = dY ⊙ φ', Q = dU B', and per chunk of rows T = dUᵀ P for dB and dc
    product             dX = dU W + Q A, the forward's kernel with W as it lies
    norm_backward       dX of the LayerNorm
    down_gradient       per chunk dA = Qᵀ h
    sum_chunks          chunks to dA, dB and dc, in a fixed order

`fastdlp::dual_lora` and `fastdlp::dual_lora_backward` are custom ops with fake and autograd registrations, so the
operator goes through torch.compile in one graph and into a CUDA graph, after one call with the same split of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastdlp.kernels.dual_lora_launch import (
    adapter_gradients,
    backward_product,
    down_gradient,
    down_product,
    fold,
    forward_product,
    last_contiguous,
    norm_backward,
    norm_down_product,
    sum_chunks,
)
from fastdlp.kernels.groups import RowGroups

if TYPE_CHECKING:
    from fastdlp.kernels.dual_lora import Norm


def dual_lora_fused(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    c: Tensor,
    groups: RowGroups,
    norm: Norm | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """`dual_lora` in the Triton form; same arguments, shapes and gradients."""
    norm_weight, norm_bias, eps = (None, None, 0.0) if norm is None else (norm.weight, norm.bias, norm.eps)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, A, B, c, residual))
    sizes = list(groups.sizes)
    return dual_lora_op(
        x, weight, bias, A, B, c, sizes, groups.views, norm_weight, norm_bias, eps, activation, residual, keep
    )[0]


def forward_pass(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    c: Tensor,
    sizes: Sequence[int],
    views: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    activation: str,
    residual: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, and what the backward needs: h, stats, P, φ', down, up (empty where there is none or not `keep`)."""
    groups = RowGroups(tuple(sizes), views)
    x = last_contiguous(x)
    residual = None if residual is None else last_contiguous(residual)
    bias, norm_weight, norm_bias = (None if v is None else v.contiguous() for v in (bias, norm_weight, norm_bias))
    down, up = fold(A, B, c, x.dtype)
    h, stats = x, None
    if norm_weight is None or norm_bias is None:
        P = down_product(x, down, groups)
    else:
        h, stats, P = norm_down_product(x, norm_weight, norm_bias, eps, down, groups)
    y, slope = forward_product(h, weight, bias, P, up, A.shape[1], groups, activation, residual, keep)
    if not keep:
        stats = slope = None
        P, down, up = x.new_empty(0), x.new_empty(0), x.new_empty(0)
    return (
        y,
        x.new_empty(0) if stats is None else h,
        x.new_empty(0, dtype=torch.float32) if stats is None else stats,
        P,
        x.new_empty(0) if slope is None else slope,
        down,
        up,
    )


dual_lora_op = torch.library.custom_op("fastdlp::dual_lora", forward_pass, mutates_args=())


@dual_lora_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    c: Tensor,
    sizes: Sequence[int],
    views: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    activation: str,
    residual: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    slots, parts, rank, width = A.shape
    rows, out = x.shape[0], B.shape[2]
    y = x.new_empty(rows, parts * out)
    normed, activated = keep and norm_weight is not None, keep and activation != "none"
    return (
        y,
        x.new_empty(rows, width) if normed else x.new_empty(0),
        x.new_empty(2, rows, dtype=torch.float32) if normed else x.new_empty(0, dtype=torch.float32),
        x.new_empty(rows, parts * rank) if keep else x.new_empty(0),
        torch.empty_like(y) if activated else x.new_empty(0),
        x.new_empty(slots, parts * rank, width) if keep else x.new_empty(0),
        x.new_empty(slots * views, parts * rank, out) if keep else x.new_empty(0),
    )


def backward_pass(
    dy: Tensor,
    x: Tensor,
    h: Tensor,
    stats: Tensor,
    P: Tensor,
    slope: Tensor,
    down: Tensor,
    up: Tensor,
    weight: Tensor,
    B: Tensor,
    c: Tensor,
    sizes: Sequence[int],
    views: int,
    norm_weight: Tensor | None,
    activation: str,
    need_x: bool,
    need_adapters: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dX [M, K] in the dtype of x, dA, dB and dc in fp32; empty where not needed. `h` is empty without a norm."""
    groups = RowGroups(tuple(sizes), views)
    dy, x = last_contiguous(dy), last_contiguous(x)
    norm_weight = None if norm_weight is None else norm_weight.contiguous()
    normed = x if norm_weight is None else h
    du, Q, dB, dc, of_slot, of_group = adapter_gradients(
        dy, None if activation == "none" else slope, P, B, c, up, groups
    )
    dx = x.new_empty(0)
    if need_x:
        dx = backward_product(du, weight, Q, down, groups)
        if norm_weight is not None:
            dx = norm_backward(dx, x, stats, norm_weight)
    if not need_adapters:
        nothing = [x.new_empty(0, dtype=torch.float32) for _ in range(3)]
        return dx, nothing[0], nothing[1], nothing[2]
    dA, dB, dc = sum_chunks(down_gradient(normed, Q, groups), (dB, of_slot), (dc, of_group))
    slots, parts, _, rank = B.shape
    return dx, dA.view(slots, parts, rank, x.shape[1]), dB, dc.view(slots, views, parts, rank)


dual_lora_backward_op = torch.library.custom_op("fastdlp::dual_lora_backward", backward_pass, mutates_args=())


@dual_lora_backward_op.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    h: Tensor,
    stats: Tensor,
    P: Tensor,
    slope: Tensor,
    down: Tensor,
    up: Tensor,
    weight: Tensor,
    B: Tensor,
    c: Tensor,
    sizes: Sequence[int],
    views: int,
    norm_weight: Tensor | None,
    activation: str,
    need_x: bool,
    need_adapters: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    slots, parts, _, rank = B.shape
    shapes = [(slots, parts, rank, x.shape[1]), tuple(B.shape), tuple(c.shape)] if need_adapters else [(0,)] * 3
    dx = x.new_empty(x.shape if need_x else (0,))
    gradients = [x.new_empty(shape, dtype=torch.float32) for shape in shapes]
    return dx, gradients[0], gradients[1], gradients[2]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, A, B, c, sizes, views, norm_weight, _, _, activation, _, _ = inputs
    _, h, stats, P, slope, down, up = output
    ctx.save_for_backward(x, h, stats, P, slope, down, up, weight, B, c, norm_weight)
    ctx.split, ctx.activation, ctx.dtypes = (list(sizes), views), activation, (A.dtype, B.dtype, c.dtype)
    ctx.mark_non_differentiable(h, stats, P, slope, down, up)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    x, h, stats, P, slope, down, up, weight, B, c, norm_weight = ctx.saved_tensors
    nothing: list[Tensor | None] = [None] * 14
    if dy is None:
        return tuple(nothing)
    need_x, need_adapters = ctx.needs_input_grad[0], any(ctx.needs_input_grad[3:6])
    if need_x or need_adapters:
        dx, *adapters = dual_lora_backward_op(
            dy,
            x,
            h,
            stats,
            P,
            slope,
            down,
            up,
            weight,
            B,
            c,
            *ctx.split,
            norm_weight,
            ctx.activation,
            need_x,
            need_adapters,
        )
        nothing[0] = dx if need_x else None
        for at, gradient, dtype in zip((3, 4, 5), adapters, ctx.dtypes):
            nothing[at] = gradient.to(dtype) if ctx.needs_input_grad[at] else None
    nothing[12] = dy if ctx.needs_input_grad[12] else None
    return tuple(nothing)


dual_lora_op.register_autograd(_backward, setup_context=_setup_context)
