"""The Triton backend of `dual_lora`: one adapted linear as custom ops.

Forward, three launches:
    fold            A → compute dtype, B' = (B · diag(c))ᵀ, entries that are not finite flagged
    down            P = x Aᵀ; with a LayerNorm before the linear, h = LN(x) and P = h Aᵀ in one pass over x
    product         y = φ(h Wᵀ + b + P B') + residual

Backward, three launches, four with a LayerNorm; two where x needs no gradient:
    adapter_gradients   one pass over dY and x: Q = dY B', and per chunk of rows T = dYᵀ P and dA = Qᵀ h
    product             dX = dY W + Q A, the forward's kernel with W not transposed
    norm_backward       dX of the LayerNorm
    sum_partials        chunks to dA, dB = T · diag(c) and dc = Σ_n B ⊙ T, in a fixed order

`fastdlp::dual_lora` and `fastdlp::dual_lora_backward` are custom ops with fake and autograd registrations, so the
operator goes through torch.compile in one graph and into a CUDA graph, after one call with the same groups of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdlp.kernels.fold import BranchTensors, fold, sum_partials
from fastdlp.kernels.frozen import FrozenLinear, Norm
from fastdlp.kernels.gradients import LinearInput
from fastdlp.kernels.groups import RowGroups
from fastdlp.kernels.half_blocks import AdaptedLinear, activation_backward
from fastdlp.kernels.launch import last_contiguous
from fastdlp.kernels.low_rank import BranchOffsets, FoldedAdapters, PartOffsets, padded

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


def dual_lora_fused(
    x: Tensor, linear: FrozenLinear, A: Tensor, B: Tensor, c: Tensor, groups: RowGroups, residual: Tensor | None = None
) -> Tensor:
    """`dual_lora` on the Triton backend; same arguments, shapes and gradients."""
    norm = (None, None, 0.0) if linear.norm is None else (linear.norm.weight, linear.norm.bias, linear.norm.eps)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, A, B, c, residual))
    frozen, sizes = (linear.weight, linear.bias, *norm, linear.activation), list(groups.sizes)
    return dual_lora_op(x, *frozen, A, B, c, sizes, groups.views, residual, save)[0]


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
    save: bool,
) -> Outputs:
    """y, and what the backward needs: stats, P, u, down, up, nan_flag (empty where there is none or not `save`)."""
    norm, groups = _norm(norm_weight, norm_bias, eps), RowGroups(tuple(sizes), views)
    frozen = FrozenLinear(weight, None if bias is None else bias.contiguous(), norm, activation)
    x, residual = last_contiguous(x), None if residual is None else last_contiguous(residual)
    folded = fold_adapters(A, B, c, x.dtype)
    y, saved = AdaptedLinear(frozen, (0, A.shape[1]), groups).forward(x, residual, folded, save)
    saved = (*saved, folded.down, folded.up, folded.nan_flag) if save else (None,) * 6
    dtypes = (torch.float32, x.dtype, x.dtype, x.dtype, x.dtype, torch.float32)
    out = [x.new_empty(0, dtype=dtype) if tensor is None else tensor for tensor, dtype in zip(saved, dtypes)]
    return y, out[0], out[1], out[2], out[3], out[4], out[5]


dual_lora_op = torch.library.custom_op("fastdlp::dual_lora", forward_pass, mutates_args=())


@dual_lora_op.register_fake
def _(*inputs: Any) -> Outputs:
    x, _, _, norm_weight, _, _, activation, A, B, _, _, views, _, save = inputs
    slots, parts, rank, width = A.shape
    rows, out, L = x.shape[0], B.shape[2], parts * padded(rank)
    y = x.new_empty(rows, parts * out)
    return (
        y,
        x.new_empty((2, rows) if save and norm_weight is not None else (0,), dtype=torch.float32),
        x.new_empty((rows, L) if save else (0,)),
        torch.empty_like(y) if save and activation != "none" else x.new_empty(0),
        x.new_empty((slots, L * width) if save else (0,)),
        x.new_empty((slots * views, L * out) if save else (0,)),
        x.new_empty((slots, parts) if save else (0,), dtype=torch.float32),
    )


def backward_pass(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    P: Tensor,
    u: Tensor,
    down: Tensor,
    up: Tensor,
    nan_flag: Tensor,
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
) -> Gradients:
    """dX [M, K] in the dtype of x, dA, dB and dc in fp32; empty where not needed."""
    frozen, groups = FrozenLinear(weight, None, _norm(norm_weight, norm_bias, eps)), RowGroups(tuple(sizes), views)
    linear = AdaptedLinear(frozen, (0, A.shape[1]), groups)
    dy, x, branch = last_contiguous(dy), last_contiguous(x), branch_tensors(A, B, c)
    folded = FoldedAdapters(down, up, nan_flag, [branch.offsets], views)
    du = dy if activation == "none" else activation_backward(dy, u, activation)
    partials = folded.partial_sums(linear.reserve_one(x, folded)) if need_adapters else (None, None)
    dx = linear.gradients(du, P, LinearInput(x, frozen.norm, stats), folded, partials, need_x)
    dA, dB, dc = (
        torch.empty_like(t, dtype=torch.float32, memory_format=torch.contiguous_format)
        if need_adapters
        else x.new_empty(0, dtype=torch.float32)
        for t in (A, B, c)
    )
    if need_adapters:
        sum_partials(branch, folded, dA, dB, dc.flatten(2))
    return x.new_empty(0) if dx is None else dx, dA, dB, dc


dual_lora_backward_op = torch.library.custom_op("fastdlp::dual_lora_backward", backward_pass, mutates_args=())


@dual_lora_backward_op.register_fake
def _(*inputs: Any) -> Gradients:
    x, A, B, c, need_x, need_adapters = inputs[1], *inputs[13:16], *inputs[18:]
    dx = x.new_empty(x.shape if need_x else (0,))
    dA, dB, dc = (x.new_empty(t.shape if need_adapters else (0,), dtype=torch.float32) for t in (A, B, c))
    return dx, dA, dB, dc


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, norm_weight, norm_bias, eps, activation, A, B, c, sizes, views, _, _ = inputs
    ctx.save_for_backward(x, *output[1:], weight, norm_weight, norm_bias, A, B, c)
    ctx.eps, ctx.activation, ctx.sizes, ctx.views = eps, activation, list(sizes), views
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


X, ADAPTERS, RESIDUAL, INPUTS = 0, (7, 8, 9), 12, 14  # indices of the op's inputs


def _backward(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    grads: list[Tensor | None] = [None] * INPUTS
    if dy is None:
        return tuple(grads)
    *saved, weight, norm_weight, norm_bias, A, B, c = ctx.saved_tensors
    need_x, need_adapters = ctx.needs_input_grad[X], any(ctx.needs_input_grad[i] for i in ADAPTERS)
    if need_x or need_adapters:
        frozen, split = (weight, norm_weight, norm_bias, ctx.eps, ctx.activation), (ctx.sizes, ctx.views)
        dx, *of_adapters = dual_lora_backward_op(dy, *saved, *frozen, A, B, c, *split, need_x, need_adapters)
        grads[X] = dx if need_x else None
        for i, gradient, tensor in zip(ADAPTERS, of_adapters, (A, B, c)):
            grads[i] = gradient.to(tensor.dtype) if ctx.needs_input_grad[i] else None
    grads[RESIDUAL] = dy if ctx.needs_input_grad[RESIDUAL] else None
    return tuple(grads)


dual_lora_op.register_autograd(_backward, setup_context=_setup_context)


def _norm(weight: Tensor | None, bias: Tensor | None, eps: float) -> Norm | None:
    return None if weight is None or bias is None else Norm(weight.contiguous(), bias.contiguous(), eps)


def branch_tensors(A: Tensor, B: Tensor, c: Tensor) -> BranchTensors:
    """A [slots, parts, R, K], B [slots, parts, N, R] and c [slots, views, parts, R] as one branch of one linear."""
    A, B, c = _rows_contiguous(A), _rows_contiguous(B), c.contiguous()
    _, parts, rank, width = A.shape
    out, RP = B.shape[2], padded(rank)
    offsets = (
        PartOffsets(width, out, i * rank * width, i * out * rank, i * rank, i * RP * width, i * RP * out)
        for i in range(parts)
    )
    return BranchTensors(A, B, c, (c.stride(0), c.stride(1), 1), None, BranchOffsets(tuple(offsets), rank, 0))


def fold_adapters(A: Tensor, B: Tensor, c: Tensor, dtype: torch.dtype) -> FoldedAdapters:
    """The adapters of one linear, shaped as `dual_lora` takes them, in the compute dtype."""
    L = A.shape[1] * padded(A.shape[2])
    return fold([branch_tensors(A, B, c)], len(A), c.shape[1], L * A.shape[3], L * B.shape[2], dtype)


def _rows_contiguous(tensor: Tensor) -> Tensor:
    """A stack whose entries are each contiguous, at any stride."""
    return tensor if tensor.numel() == 0 or tensor[0].is_contiguous() else tensor.contiguous()
