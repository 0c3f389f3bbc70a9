"""The frozen product with its low-rank term, forward and for dX: y = φ(x · w + bias + low · up[group]) + residual.

A row of `tiles.json` selects the variant: "triton" loads through pointers (any GPU); "descriptor" is persistent and
loads through tensor descriptors, that is TMA (sm_90; operands whose strides are multiples of 16 bytes); "torch" leaves
the product to cuBLAS.

Conventions of all kernels in this package:

- rows are sorted by group; `row_group_ptr` [M] int32 is the group of every row, and a *chunk* is a run of rows within
  one group (or slot), listed in a table [3, chunks] int32 of (owner, first row, end row);
- a tile's first row is int64 before it is multiplied by a stride, because M · N exceeds 2³¹ for a hundred clients of
  ViT-L/14; offsets within a tile are 32-bit to save registers;
- products accumulate in fp32, and there are no atomics: sums across programs are partial sums that are reduced in a
  fixed order, so results are deterministic;
- a masked load returns 0, never memory out of bounds, so uninitialized memory cannot affect a result.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastdlp.kernels.activation import RECOMPUTABLE
from fastdlp.kernels.frozen import FrozenLinear, frozen_linear, frozen_linear_backward
from fastdlp.kernels.groups import RowGroups, row_group
from fastdlp.kernels.launch import launch, precision, row_stride
from fastdlp.kernels.low_rank import MIN_RANK, SiteAdapters
from fastdlp.kernels.tiles import Tile, multiprocessors, tile_for

# Vary from batch to batch and do not affect the alignment of vector loads: not worth a recompilation each.
COUNTS = ["chunks", "M", "slots"]


@triton.jit
def activated(u, ACTIVATION: tl.constexpr):
    """φ(u) and φ'(u) in fp32; an unused one is eliminated."""
    if ACTIVATION == "quick_gelu":
        s = tl.sigmoid(1.702 * u)
        return u * s, s * (1.0 + 1.702 * u * (1.0 - s))
    elif ACTIVATION == "gelu":
        phi = 0.5 * (1.0 + tl.erf(u * 0.7071067811865476))
        return u * phi, phi + u * 0.3989422804014327 * tl.exp(-0.5 * u * u)
    else:  # gelu_tanh, by tanh(z) = 2 sigmoid(2z) − 1
        s = tl.sigmoid(1.5957691216057308 * (u + 0.044715 * u * u * u))
        return u * s, s + u * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * u * u)


@triton.jit
def _tile_at(index, M, N, PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(row tile, part, column tile) of a tile index, grouped so that neighboring programs share rows in L2."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), PARTS * tl.cdiv(N, BLOCK_N)
    band = GROUP_M * tiles_n
    first_m = index // band * GROUP_M
    height = tl.minimum(tiles_m - first_m, GROUP_M)
    tile_m, tile_n = first_m + index % band % height, index % band // height
    return tile_m, tile_n // tl.cdiv(N, BLOCK_N), tile_n % tl.cdiv(N, BLOCK_N)


@triton.jit(do_not_specialize=COUNTS)
def product_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    low_ptr,
    up_ptr,
    row_group_ptr,
    residual_ptr,
    u_ptr,
    y_ptr,
    da_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_wn,
    stride_wk,
    stride_rm,
    stride_up,
    PARTS: tl.constexpr,
    GROUPS_PER_UP: tl.constexpr,
    L: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    PREACTIVATION: tl.constexpr,
    R: tl.constexpr,
    HAS_DA: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    NUM_PROGRAMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """y = φ(x · w + bias + low · up[group]) + residual, the frozen product with its low-rank term, in one pass.

    Forward: w = Wᵀ, low = P, up = B' of the row's group, PARTS column blocks of N, each with RANK columns of `low`.
    Backward: w = W, x = dY, low = Q, up = A of the row's slot (GROUPS_PER_UP views share it), RANK = L.

    With DESCRIPTORS, `x_ptr` and `w_ptr` are tensor descriptors and NUM_PROGRAMS persistent programs run over all
    tiles; TRANSPOSED: `w_ptr` describes W [PARTS·N, K], as in the forward, else W [K, N]. Loads out of bounds return 0;
    columns beyond a part belong to the next one and are not stored. Without DESCRIPTORS, a program computes one tile.

    PREACTIVATION: "store" writes φ's argument u [M, PARTS·N] for the backward; "load" multiplies by φ'(u) instead of
    applying φ, which turns dX of the linear after an activation into dY of the linear before it; "none" ignores u. With
    HAS_DA (and "load") row tile t also writes its partial sum of dA = Qᵀ φ(u) for every slot s that it has rows of, as
    number t + s [R, N], so that no other kernel has to read u.

    2·M·PARTS·N·(K + RANK) FLOPs, and 2·M·N·RANK for dA; in bf16 reads 2·(M·K + PARTS·N·K + M·L) bytes and `up`, writes
    2·M·PARTS·N, and as much again for u and for a residual, and 4·R·N bytes per partial sum of dA.
    """
    steps: tl.constexpr = RANK // BLOCK_R
    WIDTH: tl.constexpr = BLOCK_N // 2 if HAS_DA else BLOCK_N
    tiles = tl.cdiv(M, BLOCK_M) * PARTS * tl.cdiv(N, BLOCK_N)
    # Without descriptors this is a loop of one iteration, which the compiler removes.
    for index in tl.range(tl.program_id(0) if DESCRIPTORS else 0, tiles if DESCRIPTORS else 1, NUM_PROGRAMS):
        tile = index if DESCRIPTORS else tl.program_id(0)
        tile_m, part, tile_n = _tile_at(tile, M, N, PARTS, BLOCK_M, BLOCK_N, GROUP_M)
        row0 = tile_m.to(tl.int64) * BLOCK_M
        if DESCRIPTORS:
            column0 = part * N + tile_n * BLOCK_N
            acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            for k0 in tl.range(0, K, BLOCK_K):
                x = x_ptr.load([tile_m * BLOCK_M, k0])
                w = w_ptr.load([column0, k0]).T if TRANSPOSED else w_ptr.load([k0, column0])
                acc = tl.dot(x, w, acc, input_precision=PRECISION)
        else:
            m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
            in_m, in_n = m < M - tile_m * BLOCK_M, n < N - tile_n * BLOCK_N
            column0 = part * N + tile_n * BLOCK_N
            x_ptrs = x_ptr + row0 * stride_xm + m[:, None] * stride_xm + k[None, :]
            w_ptrs = w_ptr + column0.to(tl.int64) * stride_wn + n[None, :] * stride_wn + k[:, None] * stride_wk
            acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            for k0 in range(0, K, BLOCK_K):
                in_k = k < K - k0
                x = tl.load(x_ptrs, mask=in_m[:, None] if EVEN_K else in_m[:, None] & in_k[None, :], other=0.0)
                if EVEN_K:
                    w = tl.load(w_ptrs) if EVEN_N else tl.load(w_ptrs, mask=in_n[None, :], other=0.0)
                else:
                    w = tl.load(w_ptrs, mask=in_k[:, None] & in_n[None, :], other=0.0)
                acc = tl.dot(x, w, acc, input_precision=PRECISION)
                x_ptrs += BLOCK_K
                w_ptrs += BLOCK_K * stride_wk

        # The low-rank term, BLOCK_R of the rank at a time, for every group that the tile's rows belong to: one dot in
        # most tiles. Before the K loop it would make ptxas serialize every WGMMA of that loop (C7515). Offsets and
        # masks are computed here, because their registers would be live across that loop.
        m, n, r = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)
        in_m, in_n = m < M - tile_m * BLOCK_M, n < N - tile_n * BLOCK_N
        group_ptrs = row_group_ptr + row0
        owner = tl.load(group_ptrs + m, mask=in_m, other=-1) // GROUPS_PER_UP
        first = tl.load(group_ptrs) // GROUPS_PER_UP
        last = tl.load(group_ptrs + tl.minimum(BLOCK_M, M - tile_m * BLOCK_M) - 1) // GROUPS_PER_UP
        low_ptrs = low_ptr + row0 * L + part * RANK + m[:, None] * L + r[None, :]
        up_ptrs = up_ptr + part * RANK * N + tile_n * BLOCK_N + r[:, None] * N + n[None, :]
        group_stride = tl.full((), 1, tl.int64) * stride_up
        for step in tl.range(first * steps, (last + 1) * steps, num_stages=1):
            group, rank0 = step // steps, step % steps * BLOCK_R
            low = tl.load(low_ptrs + rank0, mask=in_m[:, None], other=0.0)
            up = tl.load(up_ptrs + (group * group_stride + rank0 * N), mask=in_n[None, :], other=0.0)
            # `up` is always finite (see fold_kernel), so a diverged group has NaN only in its own rows of `low`, and
            # the select keeps them out of the other rows of the tile.
            low = tl.where((owner == group)[:, None], low, 0.0)
            acc = tl.dot(low, up, acc, input_precision=PRECISION)

        # In two halves with HAS_DA: φ'(u) and φ(u) of the whole tile do not fit into registers beside the accumulator.
        pieces = (acc,)
        if HAS_DA:
            pieces = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
        j = tl.arange(0, WIDTH)
        for piece in tl.static_range(BLOCK_N // WIDTH):
            value = pieces[piece]
            n0 = tile_n * BLOCK_N + piece * WIDTH
            column, in_piece = part * N + n0, j < N - n0
            mask = in_m[:, None] if EVEN_N else in_m[:, None] & in_piece[None, :]
            out = row0 * (PARTS * N) + column + m[:, None] * (PARTS * N) + j[None, :]
            if HAS_BIAS:
                bias_ptrs = bias_ptr + column + j
                bias = tl.load(bias_ptrs) if EVEN_N else tl.load(bias_ptrs, mask=in_piece, other=0.0)
                value += bias.to(tl.float32)[None, :]
            if PREACTIVATION == "load":
                h, slope = activated(tl.load(u_ptr + out, mask=mask, other=0.0).to(tl.float32), ACTIVATION)
                value *= slope
            elif ACTIVATION != "none":
                if PREACTIVATION == "store":
                    tl.store(u_ptr + out, value, mask=mask)
                value = activated(value, ACTIVATION)[0]
            if HAS_RESIDUAL:
                residual_ptrs = residual_ptr + row0 * stride_rm + column + m[:, None] * stride_rm + j[None, :]
                value += tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
            tl.store(y_ptr + out, value, mask=mask)
            if HAS_DA:
                h = h.to(y_ptr.dtype.element_ty)
                for step in tl.range(first * steps, (last + 1) * steps, num_stages=1):
                    slot, rank0 = step // steps, step % steps * BLOCK_R
                    of_slot = (in_m & (owner == slot))[:, None]
                    q = tl.load(low_ptrs + rank0, mask=of_slot, other=0.0)
                    # Both operands are masked: rows of other slots may not be finite.
                    da = tl.dot(tl.trans(q), tl.where(of_slot, h, 0.0), input_precision=PRECISION)
                    da_offset = tl.full((), tile_m + slot, tl.int64) * (R * N) + rank0 * N + n0
                    in_da = (r < R - rank0)[:, None] if EVEN_N else (r < R - rank0)[:, None] & in_piece[None, :]
                    tl.store(da_ptr + da_offset + r[:, None] * N + j[None, :], da, mask=in_da)


def forward_product(
    x: Tensor,
    linear: FrozenLinear,
    P: Tensor,
    site: SiteAdapters,
    groups: RowGroups,
    residual: Tensor | None = None,
    save: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """y = φ(x Wᵀ + b + P B') + residual and, with `save`, φ's argument u (None without an activation).

    Args:
        x: [M, K], the output of the norm. P: [M, parts·RP]. residual: [M, parts·N] or None.
    """
    name = "product" if linear.activation == "none" else "product_activated"
    columns, width = linear.weight.shape
    tile = tile_for(name, x.device, x.dtype.itemsize, len(x), columns, width)
    if tile.variant == "torch":
        return library_forward(x, linear, P, site, groups, residual, save)
    y = x.new_empty(len(x), columns)
    u = torch.empty_like(y) if save and linear.activation != "none" else None
    _launch(tile, x, linear.weight, linear.bias, linear.activation, P, site, groups, residual, u, y, None, False)
    return y, u


def backward_product(
    dy: Tensor,
    weight: Tensor,
    Q: Tensor,
    site: SiteAdapters,
    groups: RowGroups,
    u: Tensor | None = None,
    activation: str = "none",
    dA: Tensor | None = None,
) -> Tensor:
    """dX = dY W + Q A: dy [M, N], weight [N, K], Q [M, L] → [M, K]; times φ'(u) where x = φ(u), u [M, K].

    Args:
        dA: [count, 1, R, K] fp32, to which the partial sums of dA = Qᵀ φ(u) are written, or None; for a linear of one
            part. Number t + s is that of slot s in row tile t of `rows_per_tile` rows; numbers without such rows are
            left unwritten.

    Raises:
        ValueError: dA without u, or of a linear of several parts.
    """
    if dA is not None and (u is None or site.parts > 1):
        raise ValueError(f"backward_product: dA of {site.parts} parts; it is computed from φ(u), for one part")
    name = "product_backward" if u is None else "product_backward_activated"
    tile = tile_for(name, dy.device, dy.dtype.itemsize, len(dy), weight.shape[1], dy.shape[1])
    if tile.variant == "torch":
        return library_backward(dy, weight, Q, site, groups, u, activation, dA)
    dx, activation = dy.new_empty(len(dy), weight.shape[1]), "none" if u is None else activation
    _launch(tile, dy, weight, None, activation, Q, site, groups, None, u, dx, dA, True)
    return dx


def rows_per_tile(like: Tensor, rows: int, out: int, width: int) -> int:
    """Rows that share a partial sum of dA in `backward_product` with u, for dy [rows, out] and u [rows, width]."""
    tile = tile_for("product_backward_activated", like.device, like.dtype.itemsize, rows, width, out)
    return max(rows, 1) if tile.variant == "torch" else tile["BLOCK_M"]


def _launch(
    tile: Tile,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    low: Tensor,
    site: SiteAdapters,
    groups: RowGroups,
    residual: Tensor | None,
    u: Tensor | None,
    y: Tensor,
    dA: Tensor | None,
    backward: bool,
) -> None:
    up, parts, groups_per_up = (site.down, 1, groups.views) if backward else (site.up, site.parts, 1)
    (rows, width), out, L = x.shape, up.shape[2], low.shape[1]
    num_tiles = triton.cdiv(rows, tile["BLOCK_M"]) * parts * triton.cdiv(out, tile["BLOCK_N"])
    descriptors = tile.variant == "descriptor" and rows > 0 and describable(x) and describable(weight)
    num_programs = multiprocessors(x.device) if descriptors else 1
    tensors = (bias, low, up, row_group(groups, x.device), residual, u, y, dA)
    sizes = (rows, out, width)
    matrices: tuple[Any, Any] = (x, weight)
    strides = (x.stride(0), *(weight.stride()[::-1] if backward else weight.stride()))
    if descriptors:
        w_block = [tile["BLOCK_K"], tile["BLOCK_N"]] if backward else [tile["BLOCK_N"], tile["BLOCK_K"]]
        blocks = [tile["BLOCK_M"], tile["BLOCK_K"]], w_block
        matrices = tuple(map(TensorDescriptor.from_tensor, matrices, blocks))
        strides = (0, 0, 0)
    launch(
        product_kernel,
        (min(num_programs, num_tiles) if descriptors else num_tiles,),
        *matrices,
        *tensors,
        *sizes,
        *strides,
        row_stride(residual),
        up.stride(0),
        PARTS=parts,
        GROUPS_PER_UP=groups_per_up,
        L=L,
        RANK=L // parts,
        BLOCK_R=MIN_RANK,
        ACTIVATION=activation,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        PREACTIVATION="none" if u is None else "load" if backward else "store",
        R=0 if dA is None else dA.shape[2],
        HAS_DA=dA is not None,
        EVEN_N=out % tile["BLOCK_N"] == 0,
        EVEN_K=width % tile["BLOCK_K"] == 0,
        PRECISION=precision(x),
        DESCRIPTORS=descriptors,
        TRANSPOSED=not backward,
        NUM_PROGRAMS=num_programs,
        **tile.launch,
    )


def describable(matrix: Tensor) -> bool:
    """Whether a tensor descriptor can describe a matrix: rows contiguous, base and row stride multiples of 16 bytes."""
    aligned = matrix.is_meta or matrix.data_ptr() % 16 == 0
    return matrix.stride(1) == 1 and matrix.stride(0) * matrix.element_size() % 16 == 0 and aligned


def library_forward(
    x: Tensor,
    linear: FrozenLinear,
    P: Tensor,
    site: SiteAdapters,
    groups: RowGroups,
    residual: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor | None]:
    """`forward_product` in library calls: cuBLAS for the frozen product, baddbmm_ for the low-rank term."""
    u = frozen_linear(x, linear.weight, linear.bias)
    parts, out, rank = site.parts, site.out, site.padded_rank
    for s0, s1, m0, m1, size in groups.runs:
        g0, g1 = s0 * groups.views, s1 * groups.views
        p, target = P[m0:m1].view(g1 - g0, size, parts, rank), u[m0:m1].view(g1 - g0, size, parts, out)
        for part in range(parts):
            target[:, :, part].baddbmm_(p[:, :, part], site.up[g0:g1, part * rank : (part + 1) * rank])
    if linear.activation == "none":
        return (u if residual is None else u + residual), None
    phi = RECOMPUTABLE[linear.activation]
    y = phi.value(phi.saved(u.clone() if save else u))
    return (y if residual is None else y + residual), u if save else None


def library_backward(
    dy: Tensor,
    weight: Tensor,
    Q: Tensor,
    site: SiteAdapters,
    groups: RowGroups,
    u: Tensor | None = None,
    activation: str = "none",
    dA: Tensor | None = None,
) -> Tensor:
    """`backward_product` in library calls; its one row tile has all rows, so partial sum s of dA is that of slot s."""
    dx, phi = frozen_linear_backward(dy, weight), RECOMPUTABLE[activation]
    saved = None if u is None else phi.saved(u.clone())
    h = None if saved is None or dA is None else phi.value(saved)
    for s0, s1, m0, m1, size in groups.runs:
        by_slot = (s1 - s0, groups.views * size, -1)
        q = Q[m0:m1].view(by_slot)
        dx[m0:m1].view(by_slot).baddbmm_(q, site.down[s0:s1])
        if dA is not None and h is not None:
            dA[s0:s1, 0] = q[:, :, : site.rank].mT @ h[m0:m1].view(by_slot)
    return dx if saved is None else phi.backward(dx, saved)
