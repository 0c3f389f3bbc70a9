"""The frozen LayerNorm and the down-projection P = x Aᵀ, fused in one pass forward, and dX of the norm.

Conventions as in `product.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdlp.kernels.frozen import Norm
from fastdlp.kernels.groups import RowGroups, chunks
from fastdlp.kernels.launch import launch, precision, row_stride
from fastdlp.kernels.low_rank import SiteAdapters
from fastdlp.kernels.product import COUNTS
from fastdlp.kernels.tiles import tile_for

ENTRIES_PER_WARP = 2048  # of whole rows in registers: 64 a thread


@triton.jit
def load_nan_flag(nan_flag_ptr, slot, stride_flag, FLAGS: tl.constexpr, BLOCK_F: tl.constexpr):
    """0, or NaN for a slot whose adapters are not finite."""
    f = tl.arange(0, BLOCK_F)
    return tl.sum(tl.load(nan_flag_ptr + slot * stride_flag + f, mask=f < FLAGS, other=0.0))


@triton.jit(do_not_specialize=COUNTS)
def down_kernel(
    x_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    down_ptr,
    nan_flag_ptr,
    h_ptr,
    stats_ptr,
    p_ptr,
    chunk_ptr,
    chunks,
    M,
    K,
    stride_xm,
    stride_down,
    stride_flag,
    eps,
    HAS_NORM: tl.constexpr,
    L: tl.constexpr,
    BLOCK_L: tl.constexpr,
    FLAGS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_ROW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """P = x Aᵀ over all parts, [M, L]; with HAS_NORM h = LayerNorm(x) and P = h Aᵀ. Grid (chunks of a slot's rows,).

    2·M·K·L FLOPs; reads 2·M·K bytes of x (bf16) and A once a chunk, writes 2·M·L: bound by reading x.

    HAS_NORM: ROWS whole rows at a time are in registers (BLOCK_ROW ≥ K), so mean and variance are two reductions. Then
    h, just written by this program, is read again from cache for P. `stats` [2, M] fp32 saves mean and 1/σ for the
    backward. ~9·M·K FLOPs and 2·M·K bytes written on top.
    """
    chunk = tl.program_id(0)
    slot = tl.load(chunk_ptr + chunk).to(tl.int64)
    start = tl.load(chunk_ptr + chunks + chunk).to(tl.int64)
    count = tl.load(chunk_ptr + 2 * chunks + chunk) - start
    nan_flag = load_nan_flag(nan_flag_ptr, slot, stride_flag, FLAGS, BLOCK_F)
    x_ptr += start * stride_xm
    if HAS_NORM:
        count = count.to(tl.int32)
        i, j = tl.arange(0, ROWS), tl.arange(0, BLOCK_ROW)
        in_row = j < K
        weight = tl.load(norm_weight_ptr + j, mask=in_row, other=0.0).to(tl.float32)
        bias = tl.load(norm_bias_ptr + j, mask=in_row, other=0.0).to(tl.float32)
        h_ptr += start * K
        stats_ptr += start
        for row0 in range(0, BLOCK_M, ROWS):
            rows = row0 + i
            mask = (rows < count)[:, None] & in_row[None, :]
            row = tl.load(x_ptr + rows[:, None] * stride_xm + j[None, :], mask=mask, other=0.0).to(tl.float32)
            mean = tl.sum(row, 1) / K
            centered = tl.where(in_row[None, :], row - mean[:, None], 0.0)
            rstd = 1.0 / tl.sqrt(tl.sum(centered * centered, 1) / K + eps)
            h = centered * rstd[:, None] * weight[None, :] + bias[None, :]
            tl.store(h_ptr + rows[:, None] * K + j[None, :], h, mask=mask)
            tl.store(stats_ptr + rows, mean, mask=rows < count)
            tl.store(stats_ptr + M + rows, rstd, mask=rows < count)
        tl.debug_barrier()  # other threads of this program wrote the rows of h
        x_ptr, stride_xm = h_ptr, K
    m, l, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_K)
    in_m, in_l = m < count, (l < L)[None, :]
    x_ptrs = x_ptr + m[:, None] * stride_xm + k[None, :]
    a_ptrs = down_ptr + slot * stride_down + l[None, :] * K + k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_L), dtype=tl.float32)
    for k0 in range(0, K, BLOCK_K):
        in_k = k < K - k0
        x = tl.load(x_ptrs + k0, mask=in_m[:, None] if EVEN_K else in_m[:, None] & in_k[None, :], other=0.0)
        a = tl.load(a_ptrs + k0, mask=in_l if EVEN_K else in_l & in_k[:, None], other=0.0)
        acc = tl.dot(x, a, acc, input_precision=PRECISION)
    tl.store(p_ptr + start * L + m[:, None] * L + l[None, :], acc + nan_flag, mask=in_m[:, None] & in_l)


@triton.jit(do_not_specialize=COUNTS)
def norm_backward_kernel(
    dh_ptr,
    x_ptr,
    stats_ptr,
    norm_weight_ptr,
    residual_ptr,
    dx_ptr,
    M,
    K,
    stride_xm,
    stride_rm,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_ROW: tl.constexpr,
):
    """dx of a LayerNorm with frozen weights: rstd · (g − mean(g) − x̂ · mean(g ⊙ x̂)), g = dh ⊙ weight; plus `residual`,
    the gradient of x along the residual connection.

    Whole rows per program (BLOCK_ROW ≥ K). Reads 4·M·K bytes (bf16), 6 with a residual, writes 2·M·K; ~10·M·K FLOPs.
    """
    start = tl.program_id(0).to(tl.int64) * BLOCK_M
    m, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_ROW)
    in_m = m < M - start
    mask = in_m[:, None] & (k < K)[None, :]
    offsets = m[:, None] * K + k[None, :]
    dh = tl.load(dh_ptr + start * K + offsets, mask=mask, other=0.0).to(tl.float32)
    x_ptrs = x_ptr + start * stride_xm + (m[:, None] * stride_xm + k[None, :])
    x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(norm_weight_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    mean = tl.load(stats_ptr + start + m, mask=in_m, other=0.0)
    rstd = tl.load(stats_ptr + M + start + m, mask=in_m, other=0.0)
    g = dh * weight[None, :]
    xhat = tl.where(mask, (x - mean[:, None]) * rstd[:, None], 0.0)
    g_mean, gx_mean = tl.sum(g, 1) / K, tl.sum(g * xhat, 1) / K
    dx = rstd[:, None] * (g - g_mean[:, None] - xhat * gx_mean[:, None])
    if HAS_RESIDUAL:
        residual_ptrs = residual_ptr + start * stride_rm + (m[:, None] * stride_rm + k[None, :])
        dx += tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.store(dx_ptr + start * K + offsets, dx, mask=mask)


def down_product(
    x: Tensor, norm: Norm | None, site: SiteAdapters, groups: RowGroups
) -> tuple[Tensor, Tensor | None, Tensor]:
    """h, stats and P = h Aᵀ: x [M, K] → [M, K], [2, M] fp32 (mean, 1/σ) and [M, L].

    h = LayerNorm(x); without a norm h is x and there are no stats.
    """
    (rows, width), L = x.shape, site.down.shape[1]
    tile = tile_for("down" if norm is None else "norm_down", x.device, x.dtype.itemsize, rows, 0, width)
    row_chunks = chunks(groups.by_slot, tile["BLOCK_M"], x.device)
    P = x.new_empty(rows, L)
    h, stats, block_row = x, None, 0
    if norm is not None:
        h, stats = x.new_empty(rows, width), x.new_empty(2, rows, dtype=torch.float32)
        block_row = triton.next_power_of_2(width)
    weight, bias, eps = (None, None, None) if norm is None else (norm.weight, norm.bias, norm.eps)
    inputs, outputs = (x, weight, bias, site.down, site.nan_flag), (None if norm is None else h, stats, P)
    sizes = (row_chunks.count, rows, width)
    strides = (x.stride(0), site.down.stride(0), site.nan_flag.stride(0))
    launch(
        down_kernel,
        (row_chunks.count,),
        *inputs,
        *outputs,
        row_chunks.table,
        *sizes,
        *strides,
        eps,
        HAS_NORM=norm is not None,
        L=L,
        BLOCK_L=triton.next_power_of_2(L),
        FLAGS=site.nan_flag.shape[1],
        BLOCK_F=triton.next_power_of_2(site.nan_flag.shape[1]),
        EVEN_K=width % tile["BLOCK_K"] == 0,
        PRECISION=precision(x),
        ROWS=min(tile["BLOCK_M"], max(1, tile.warps * ENTRIES_PER_WARP // block_row)) if block_row else 0,
        BLOCK_ROW=block_row,
        **tile.launch,
    )
    return h, stats, P


def norm_backward(dh: Tensor, x: Tensor, stats: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor:
    """dX of a frozen LayerNorm, plus `residual`: dh [M, K], x [M, K], stats [2, M], residual [M, K] → [M, K]."""
    rows, width = x.shape
    tile = tile_for("norm_backward", x.device, x.dtype.itemsize, rows, 0, width)
    dx = torch.empty_like(dh)
    tensors, strides = (dh, x, stats, weight, residual, dx), (x.stride(0), row_stride(residual))
    launch(
        norm_backward_kernel,
        (triton.cdiv(rows, tile["BLOCK_M"]),),
        *tensors,
        rows,
        width,
        *strides,
        HAS_RESIDUAL=residual is not None,
        BLOCK_ROW=triton.next_power_of_2(width),
        **tile.launch,
    )
    return dx
