"""L2 normalization of rows, y = x / ‖x‖, in one launch each way: the backward of F.normalize takes a dozen.

Conventions as in `product.py`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastdlp.kernels.launch import launch
from fastdlp.kernels.product import COUNTS
from fastdlp.kernels.tiles import tile_for

EPS = 1e-12  # F.normalize's


@triton.jit(do_not_specialize=COUNTS)
def normalize_kernel(x_ptr, y_ptr, scale_ptr, M, K, eps, BLOCK_M: tl.constexpr, BLOCK_ROW: tl.constexpr):
    """y = x · scale in fp32, scale = 1 / max(‖x‖, eps) [M]. Whole rows per program (BLOCK_ROW ≥ K).

    Reads 2·M·K bytes (bf16), writes 4·M·(K + 1); ~3·M·K FLOPs.
    """
    rows, k = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_ROW)
    mask = (rows < M)[:, None] & (k < K)[None, :]
    at = rows[:, None] * K + k[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    scale = 1.0 / tl.maximum(tl.sqrt(tl.sum(x * x, 1)), eps, propagate_nan=tl.PropagateNan.ALL)
    tl.store(y_ptr + at, x * scale[:, None], mask=mask)
    tl.store(scale_ptr + rows, scale, mask=rows < M)


@triton.jit(do_not_specialize=COUNTS)
def normalize_backward_kernel(dy_ptr, y_ptr, scale_ptr, dx_ptr, M, K, BLOCK_M: tl.constexpr, BLOCK_ROW: tl.constexpr):
    """dx = scale · (dy − y · (dy · y)). Reads 8·M·K bytes, writes 2·M·K (bf16); ~5·M·K FLOPs."""
    rows, k = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_ROW)
    mask = (rows < M)[:, None] & (k < K)[None, :]
    at = rows[:, None] * K + k[None, :]
    dy = tl.load(dy_ptr + at, mask=mask, other=0.0)
    y = tl.load(y_ptr + at, mask=mask, other=0.0)
    scale = tl.load(scale_ptr + rows, mask=rows < M, other=0.0)
    dx = scale[:, None] * (dy - y * tl.sum(dy * y, 1)[:, None])
    tl.store(dx_ptr + at, dx, mask=mask)


def normalize(x: Tensor) -> Tensor:
    """F.normalize(x.float(), dim=-1): x [M, K] → [M, K] fp32."""
    return _Normalize.apply(x)


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        y, scale = x.new_empty(x.shape, dtype=torch.float32), x.new_empty(len(x), dtype=torch.float32)
        _launch(normalize_kernel, x, x, y, scale, *x.shape, EPS)
        ctx.save_for_backward(y, scale)
        ctx.dtype = x.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        y, scale = ctx.saved_tensors
        dx = y.new_empty(y.shape, dtype=ctx.dtype)
        _launch(normalize_backward_kernel, dx, grads[0].contiguous(), y, scale, dx, *y.shape)
        return dx


def _launch(kernel: Any, like: Tensor, *operands: Any) -> None:
    rows, width = like.shape
    tile = tile_for("normalize", like.device, like.dtype.itemsize, rows, 0, width)
    block_row = triton.next_power_of_2(width)
    launch(kernel, (triton.cdiv(rows, tile["BLOCK_M"]),), *operands, BLOCK_ROW=block_row, **tile.launch)
