"""The frozen LayerNorm and the down-projection P = x Aᵀ: together in one pass forward, and the norm's dX.

Conventions as in `product.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdlp.kernels.frozen import Norm
from fastdlp.kernels.groups import RowGroups, chunks
from fastdlp.kernels.launch import launch, precision, tiles_of
from fastdlp.kernels.low_rank import SiteAdapters
from fastdlp.kernels.product import COUNTS
from fastdlp.kernels.tiles import Tile, tile_for


@triton.jit
def poisoned(poison_ptr, slot, stride_poison, POISONS: tl.constexpr, BLOCK_P: tl.constexpr):
    """0, or NaN for a slot whose adapters are not finite."""
    at = tl.arange(0, BLOCK_P)
    return tl.sum(tl.load(poison_ptr + slot * stride_poison + at, mask=at < POISONS, other=0.0))


@triton.jit
def _down(
    x_ptr,
    down_ptr,
    p_ptr,
    poison,
    here,
    K,
    stride_xm,
    L: tl.constexpr,
    BLOCK_L: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """P of BLOCK_M rows; the pointers are at the first row, and at the slot's A."""
    m, l, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + m[:, None] * stride_xm + k[None, :]
    a_ptrs = down_ptr + l[None, :] * K + k[:, None]
    in_l = (l < L)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_L), dtype=tl.float32)
    for k0 in range(0, K, BLOCK_K):
        in_k = k < K - k0
        x = tl.load(x_ptrs + k0, mask=here[:, None] if EVEN_K else here[:, None] & in_k[None, :], other=0.0)
        a = tl.load(a_ptrs + k0, mask=in_l if EVEN_K else in_l & in_k[:, None], other=0.0)
        acc = tl.dot(x, a, acc, input_precision=PRECISION)
    tl.store(p_ptr + m[:, None] * L + l[None, :], acc + poison, mask=here[:, None] & in_l)


@triton.jit(do_not_specialize=COUNTS)
def down_kernel(
    x_ptr,
    down_ptr,
    poison_ptr,
    p_ptr,
    chunk_ptr,
    chunks,
    K,
    stride_xm,
    stride_down,
    stride_poison,
    L: tl.constexpr,
    BLOCK_L: tl.constexpr,
    POISONS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """P = x Aᵀ over all parts, [M, L]. One program a chunk of a slot's rows.

    2·M·K·L FLOP; reads 2·M·K bytes of x (bf16) and A once a chunk, writes 2·M·L: bound by reading x.
    """
    chunk = tl.program_id(0)
    slot = tl.load(chunk_ptr + chunk).to(tl.int64)
    start = tl.load(chunk_ptr + chunks + chunk).to(tl.int64)
    here = tl.arange(0, BLOCK_M) < tl.load(chunk_ptr + 2 * chunks + chunk) - start
    poison = poisoned(poison_ptr, slot, stride_poison, POISONS, BLOCK_P)
    _down(
        x_ptr + start * stride_xm,
        down_ptr + slot * stride_down,
        p_ptr + start * L,
        poison,
        here,
        K,
        stride_xm,
        L,
        BLOCK_L,
        EVEN_K,
        PRECISION,
        BLOCK_M,
        BLOCK_K,
    )


@triton.jit(do_not_specialize=COUNTS)
def norm_down_kernel(
    x_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    down_ptr,
    poison_ptr,
    h_ptr,
    stats_ptr,
    p_ptr,
    chunk_ptr,
    chunks,
    M,
    K,
    stride_xm,
    stride_down,
    stride_poison,
    eps,
    L: tl.constexpr,
    BLOCK_L: tl.constexpr,
    POISONS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_ROW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """h = LayerNorm(x) and P = h Aᵀ in one program a chunk: x comes from memory once.

    ROWS whole rows at a time stand in registers (BLOCK_ROW ≥ K), so mean and variance are two sums over them. Then h,
    which this program has just written, is read again from cache for P. `stats` [2, M] fp32 keeps mean and 1/σ for the
    backward. Reads 2·M·K bytes of x (bf16), writes 2·M·K of h and 2·M·L of P; 2·M·K·L + ~9·M·K FLOP.
    """
    chunk = tl.program_id(0)
    slot = tl.load(chunk_ptr + chunk).to(tl.int64)
    start = tl.load(chunk_ptr + chunks + chunk).to(tl.int64)
    count = (tl.load(chunk_ptr + 2 * chunks + chunk) - start).to(tl.int32)
    poison = poisoned(poison_ptr, slot, stride_poison, POISONS, BLOCK_P)
    row, k = tl.arange(0, ROWS), tl.arange(0, BLOCK_ROW)
    in_k = k < K
    weight = tl.load(norm_weight_ptr + k, mask=in_k, other=0.0).to(tl.float32)
    bias = tl.load(norm_bias_ptr + k, mask=in_k, other=0.0).to(tl.float32)
    x_ptr += start * stride_xm
    h_ptr += start * K
    stats_ptr += start
    for row0 in range(0, BLOCK_M, ROWS):
        rows = row0 + row
        mask = (rows < count)[:, None] & in_k[None, :]
        x = tl.load(x_ptr + rows[:, None] * stride_xm + k[None, :], mask=mask, other=0.0).to(tl.float32)
        mean = tl.sum(x, 1) / K
        off = tl.where(in_k[None, :], x - mean[:, None], 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(off * off, 1) / K + eps)
        h = off * rstd[:, None] * weight[None, :] + bias[None, :]
        tl.store(h_ptr + rows[:, None] * K + k[None, :], h, mask=mask)
        tl.store(stats_ptr + rows, mean, mask=rows < count)
        tl.store(stats_ptr + M + rows, rstd, mask=rows < count)
    tl.debug_barrier()  # the rows of h were written by other threads of this program
    _down(
        h_ptr,
        down_ptr + slot * stride_down,
        p_ptr + start * L,
        poison,
        tl.arange(0, BLOCK_M) < count,
        K,
        K,
        L,
        BLOCK_L,
        EVEN_K,
        PRECISION,
        BLOCK_M,
        BLOCK_K,
    )


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
    the gradient that x has from elsewhere.

    A program holds whole rows (BLOCK_ROW ≥ K). Reads 4·M·K bytes (bf16), 6 with a residual, writes 2·M·K; ~10·M·K FLOP.
    """
    start = tl.program_id(0).to(tl.int64) * BLOCK_M
    m, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_ROW)
    here = m < M - start
    mask = here[:, None] & (k < K)[None, :]
    at = m[:, None] * K + k[None, :]
    dh = tl.load(dh_ptr + start * K + at, mask=mask, other=0.0).to(tl.float32)
    x_ptrs = x_ptr + start * stride_xm + (m[:, None] * stride_xm + k[None, :])
    x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(norm_weight_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    mean = tl.load(stats_ptr + start + m, mask=here, other=0.0)
    rstd = tl.load(stats_ptr + M + start + m, mask=here, other=0.0)
    g = dh * weight[None, :]
    xhat = tl.where(mask, (x - mean[:, None]) * rstd[:, None], 0.0)
    g_mean, gx_mean = tl.sum(g, 1) / K, tl.sum(g * xhat, 1) / K
    dx = rstd[:, None] * (g - g_mean[:, None] - xhat * gx_mean[:, None])
    if HAS_RESIDUAL:
        residual_ptrs = residual_ptr + start * stride_rm + (m[:, None] * stride_rm + k[None, :])
        dx += tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.store(dx_ptr + start * K + at, dx, mask=mask)


def down_product(x: Tensor, site: SiteAdapters, groups: RowGroups, tile: Tile | None = None) -> Tensor:
    """P = x Aᵀ: x [M, K] → [M, L] in the dtype of x."""
    (rows, width), L = x.shape, site.down.shape[1]
    tile = tile or tile_for("down", x.device, x.dtype.itemsize, rows, 0, width)
    cut = chunks(groups.by_slot, tile["BLOCK_M"], x.device)
    P = x.new_empty(rows, L)
    launch(
        down_kernel,
        (cut.count,),
        x,
        site.down,
        site.poison,
        P,
        cut.table,
        cut.count,
        width,
        x.stride(0),
        site.down.stride(0),
        site.poison.stride(0),
        L=L,
        BLOCK_L=triton.next_power_of_2(L),
        POISONS=site.poison.shape[1],
        BLOCK_P=triton.next_power_of_2(site.poison.shape[1]),
        EVEN_K=width % tile["BLOCK_K"] == 0,
        PRECISION=precision(x),
        **tile.launch,
    )
    return P


def norm_down_product(
    x: Tensor, norm: Norm, site: SiteAdapters, groups: RowGroups, tile: Tile | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """h = LayerNorm(x) [M, K], stats [2, M] fp32 (mean, 1/σ) and P = h Aᵀ [M, L]."""
    (rows, width), L = x.shape, site.down.shape[1]
    tile = tile or tile_for("norm_down", x.device, x.dtype.itemsize, rows, 0, width)
    cut = chunks(groups.by_slot, tile["BLOCK_M"], x.device)
    h, P = x.new_empty(rows, width), x.new_empty(rows, L)
    stats = x.new_empty(2, rows, dtype=torch.float32)
    block_row = triton.next_power_of_2(width)
    launch(
        norm_down_kernel,
        (cut.count,),
        x,
        norm.weight,
        norm.bias,
        site.down,
        site.poison,
        h,
        stats,
        P,
        cut.table,
        cut.count,
        rows,
        width,
        x.stride(0),
        site.down.stride(0),
        site.poison.stride(0),
        norm.eps,
        L=L,
        BLOCK_L=triton.next_power_of_2(L),
        POISONS=site.poison.shape[1],
        BLOCK_P=triton.next_power_of_2(site.poison.shape[1]),
        EVEN_K=width % tile["BLOCK_K"] == 0,
        PRECISION=precision(x),
        ROWS=_rows_that_fit(block_row, tile),
        BLOCK_ROW=block_row,
        **tile.launch,
    )
    return h, stats, P


def norm_backward(
    dh: Tensor, x: Tensor, stats: Tensor, weight: Tensor, residual: Tensor | None = None, tile: Tile | None = None
) -> Tensor:
    """dX of a frozen LayerNorm, plus `residual`: dh [M, K], x [M, K], stats [2, M], residual [M, K] → [M, K]."""
    rows, width = x.shape
    tile = tile or tile_for("norm_backward", x.device, x.dtype.itemsize, rows, 0, width)
    dx = torch.empty_like(dh)
    launch(
        norm_backward_kernel,
        (tiles_of(rows, tile["BLOCK_M"]),),
        dh,
        x,
        stats,
        weight,
        residual,
        dx,
        rows,
        width,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        HAS_RESIDUAL=residual is not None,
        BLOCK_ROW=triton.next_power_of_2(width),
        **tile.launch,
    )
    return dx


ENTRIES_A_WARP = 2048  # of rows that stand in registers at once: 64 a thread


def _rows_that_fit(block_row: int, tile: Tile) -> int:
    """Rows of a chunk that a program normalizes at once, a power of two."""
    return min(tile["BLOCK_M"], max(1, tile.warps * ENTRIES_A_WARP // block_row))
