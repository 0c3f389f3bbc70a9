"""Q = dY B' and the partial sums of the adapters' gradients in one pass over dY. Conventions as in `product.py`."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from fastdlp.kernels.frozen import Norm
from fastdlp.kernels.groups import RowGroups, chunks
from fastdlp.kernels.launch import launch, precision, row_stride
from fastdlp.kernels.low_rank import SiteAdapters
from fastdlp.kernels.norm import load_nan_flag
from fastdlp.kernels.product import COUNTS
from fastdlp.kernels.tiles import Tile, tile_for


@triton.jit(do_not_specialize=COUNTS)
def adapter_gradients_kernel(
    dy_ptr,
    p_ptr,
    up_ptr,
    nan_flag_ptr,
    x_ptr,
    stats_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    q_ptr,
    t_ptr,
    da_ptr,
    chunk_ptr,
    chunks,
    M,
    N,
    K,
    stride_dym,
    stride_xm,
    stride_up,
    stride_flag,
    PARTS: tl.constexpr,
    VIEWS: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_L: tl.constexpr,
    FLAGS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    HAS_T: tl.constexpr,
    HAS_DA: tl.constexpr,
    HAS_NORM: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Q = dY B' of a chunk of a group's rows, and its partial sums of T = dYᵀ P and dA = Qᵀ x. Grid (chunks,).

    Both products are computed transposed, with dY as the right operand: it then has the same layout in shared memory
    for both, so its copies are pipelined on every architecture.

    HAS_NORM: x is recomputed from the input of a LayerNorm and its `stats`, so that it need not be saved.

    4·M·parts·N·RP + 2·M·K·L FLOPs; reads 2·M·(parts·N + K + L) bytes (bf16), writes 2·M·L of Q and 4·parts·R·(N + K)
    of partial sums per chunk, which `sum_partials_kernel` reads: 2·R / BLOCK_M of the bytes of dY and x for each.
    """
    chunk = tl.program_id(0)
    group = tl.load(chunk_ptr + chunk).to(tl.int64)
    start = tl.load(chunk_ptr + chunks + chunk).to(tl.int64)
    m, n, r = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)
    in_m = m < tl.load(chunk_ptr + 2 * chunks + chunk) - start
    L: tl.constexpr = PARTS * BLOCK_R
    nan_flag = load_nan_flag(nan_flag_ptr, group // VIEWS, stride_flag, FLAGS, BLOCK_F)
    low_offsets = start * L + (m[None, :] * L + r[:, None])
    dy_ptrs = dy_ptr + start * stride_dym + (m[:, None] * stride_dym + n[None, :])
    up_ptrs = up_ptr + group * stride_up + (r[:, None] * N + n[None, :])
    t_offsets = chunk.to(tl.int64) * PARTS * R * N + (r[:, None] * N + n[None, :])
    for part in range(PARTS):
        p = tl.load(p_ptr + low_offsets + part * BLOCK_R, mask=in_m[None, :], other=0.0)
        q = tl.zeros((BLOCK_R, BLOCK_M), dtype=tl.float32)
        for n0 in range(0, N, BLOCK_N):
            in_n = n < N - n0
            dy = tl.load(dy_ptrs + n0, mask=in_m[:, None] if EVEN_N else in_m[:, None] & in_n[None, :], other=0.0)
            up = tl.load(up_ptrs + n0) if EVEN_N else tl.load(up_ptrs + n0, mask=in_n[None, :], other=0.0)
            q = tl.dot(up, tl.trans(dy), q, input_precision=PRECISION)
            if HAS_T:
                t = tl.dot(p, dy, input_precision=PRECISION)
                mask = (r < R)[:, None] if EVEN_N else (r < R)[:, None] & in_n[None, :]
                tl.store(t_ptr + t_offsets + n0, t, mask=mask)
        tl.store(q_ptr + low_offsets + part * BLOCK_R, q + nan_flag, mask=in_m[None, :])
        dy_ptrs += N
        up_ptrs += BLOCK_R * N
        t_offsets += R * N
    if HAS_DA:
        tl.debug_barrier()  # other threads of this program wrote the columns of Q
        l, k = tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_K)
        q_ptrs = q_ptr + start * L + (m[None, :] * L + l[:, None])
        q_all = tl.load(q_ptrs, mask=in_m[None, :] & (l < L)[:, None], other=0.0)
        row = l // BLOCK_R * R + l % BLOCK_R  # without padding
        stored = ((l < L) & (l % BLOCK_R < R))[:, None]
        x_ptrs = x_ptr + start * stride_xm + (m[:, None] * stride_xm + k[None, :])
        da_ptrs = da_ptr + chunk.to(tl.int64) * PARTS * R * K + (row[:, None] * K + k[None, :])
        if HAS_NORM:
            mean = tl.load(stats_ptr + start + m, mask=in_m, other=0.0)[:, None]
            rstd = tl.load(stats_ptr + M + start + m, mask=in_m, other=0.0)[:, None]
        for k0 in range(0, K, BLOCK_K):
            in_k = k < K - k0
            x = tl.load(x_ptrs + k0, mask=in_m[:, None] if EVEN_K else in_m[:, None] & in_k[None, :], other=0.0)
            if HAS_NORM:
                weight = tl.load(norm_weight_ptr + k0 + k, mask=in_k, other=0.0).to(tl.float32)
                bias = tl.load(norm_bias_ptr + k0 + k, mask=in_k, other=0.0).to(tl.float32)
                x = ((x.to(tl.float32) - mean) * rstd * weight[None, :] + bias[None, :]).to(x.dtype)
            da = tl.dot(q_all, x, input_precision=PRECISION)
            tl.store(da_ptrs + k0, da, mask=stored if EVEN_K else stored & in_k[None, :])


@dataclass(frozen=True)
class LinearInput:
    """A linear's input x [M, K], or the input and stats [2, M] fp32 (mean, 1/σ) of the norm that recomputes it."""

    rows: Tensor
    norm: Norm | None = None
    stats: Tensor | None = None


def gradients_tile(dy_like: Tensor, rows: int, out: int, width: int) -> Tile:
    """The tile of `adapter_gradients`; its BLOCK_M is the rows of a chunk, which share a partial sum."""
    return tile_for("adapter_gradients", dy_like.device, dy_like.dtype.itemsize, rows, out, width)


def adapter_gradients(
    dy: Tensor,
    P: Tensor,
    site: SiteAdapters,
    groups: RowGroups,
    T: Tensor | None = None,
    dA: Tensor | None = None,
    x: LinearInput | None = None,
) -> Tensor:
    """Q [M, L] from dy [M, parts·N] and P [M, L].

    Args:
        T: [chunks, parts, R, N] fp32, to which the partial sums of T are written, or None. dA: [chunks, parts, R, K]
            likewise.
        x: the linear's input; required with dA.
    """
    parts, out, rows, width = site.parts, site.out, len(dy), site.down.shape[2]
    tile = gradients_tile(dy, rows, parts * out, width)
    row_chunks = chunks(groups, tile["BLOCK_M"], dy.device)
    Q = dy.new_empty(rows, P.shape[1])
    x_rows, norm, stats = (None, None, None) if x is None else (x.rows, x.norm, x.stats)
    weight, bias = (None, None) if norm is None else (norm.weight, norm.bias)
    inputs, outputs = (dy, P, site.up, site.nan_flag, x_rows, stats, weight, bias), (Q, T, dA)
    sizes = (row_chunks.count, rows, out, width)
    strides = (dy.stride(0), row_stride(x_rows), site.up.stride(0), site.nan_flag.stride(0))
    launch(
        adapter_gradients_kernel,
        (row_chunks.count,),
        *inputs,
        *outputs,
        row_chunks.table,
        *sizes,
        *strides,
        PARTS=parts,
        VIEWS=groups.views,
        R=site.rank,
        BLOCK_R=site.padded_rank,
        BLOCK_L=triton.next_power_of_2(P.shape[1]),
        FLAGS=site.nan_flag.shape[1],
        BLOCK_F=triton.next_power_of_2(site.nan_flag.shape[1]),
        HAS_T=T is not None,
        HAS_DA=dA is not None,
        HAS_NORM=norm is not None,
        EVEN_N=out % tile["BLOCK_N"] == 0,
        EVEN_K=width % tile["BLOCK_K"] == 0,
        PRECISION=precision(dy),
        **tile.launch,
    )
    return Q
