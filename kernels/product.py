"""The frozen product with its low-rank term, forward and for dX: y = φ(x · w + bias + low · up[group]) + residual.

Two kernels compute it, a row of `tiles.json` says which: `product_kernel` reads through pointers (any GPU), and
`product_descriptor_kernel` is persistent and reads through tensor descriptors, so that the copies run in Hopper's
copy engine (sm_90; operands whose strides are multiples of 16 bytes). A row with the form "torch" leaves the product to
the library and everything else to Triton.

Conventions of every kernel in this package:

- rows are sorted by group; `row_group_ptr` [M] int32 says which, and a *chunk* is a run of rows within one group (or
  slot), listed in a table [3, chunks] int32 of (owner, first row, end row);
- a tile's first row is int64 before it is multiplied by a stride, because M · N exceeds 2³¹ for a hundred clients of
  ViT-L/14; within a tile 32 bits hold every offset, and registers are scarce;
- products accumulate in fp32, and nothing is added atomically: sums across programs go through partial results that
  are added in a fixed order, so every run gives the same bits;
- a masked load reads 0, never what lies behind the end, so unwritten memory cannot reach a result.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastdlp.kernels.frozen import FrozenLinear
from fastdlp.kernels.groups import RowGroups, row_group
from fastdlp.kernels.launch import launch, precision, tiles_of
from fastdlp.kernels.library_product import library_backward, library_forward
from fastdlp.kernels.low_rank import LEAST_RANK, SiteAdapters
from fastdlp.kernels.tiles import Tile, multiprocessors, tile_for

# Differ from batch to batch and scale no address that is read in vectors: not worth a compilation each.
COUNTS = ["chunks", "M", "slots"]


@triton.jit
def activated(u, ACTIVATION: tl.constexpr):
    """φ(u) and φ'(u) in fp32; what the caller does not use is not computed."""
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
def _tile_at(number, M, N, PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(row tile, part, column tile) of a tile number: neighbouring programs share rows and columns in L2."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), PARTS * tl.cdiv(N, BLOCK_N)
    band = GROUP_M * tiles_n
    first_m = number // band * GROUP_M
    height = tl.minimum(tiles_m - first_m, GROUP_M)
    tile_m, tile_n = first_m + number % band % height, number % band // height
    return tile_m, tile_n // tl.cdiv(N, BLOCK_N), tile_n % tl.cdiv(N, BLOCK_N)


@triton.jit
def _finish(
    acc,
    tile_m,
    part,
    tile_n,
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
    ARGUMENT: tl.constexpr,
    R: tl.constexpr,
    HAS_DA: tl.constexpr,
    EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Adds the low-rank term behind the K loop, then bias, activation and residual; stores the tile and shares of dA.

    The low-rank loop runs group by group over those that the tile's rows belong to, BLOCK_R of the rank at a time: one
    dot in most tiles, and a tile that crosses groups is as right as any other. Before the K loop it would make the
    compiler serialize every WGMMA of that loop (ptxas C7515).
    """
    corner = tile_m.to(tl.int64) * BLOCK_M
    m, n, r = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)
    here, in_n = m < M - tile_m * BLOCK_M, n < N - tile_n * BLOCK_N
    row_group_ptr += corner
    owner = tl.load(row_group_ptr + m, mask=here, other=-1) // GROUPS_PER_UP
    first = tl.load(row_group_ptr) // GROUPS_PER_UP
    last = tl.load(row_group_ptr + tl.minimum(BLOCK_M, M - tile_m * BLOCK_M) - 1) // GROUPS_PER_UP
    low_ptrs = low_ptr + corner * L + part * RANK + m[:, None] * L + r[None, :]
    up_ptrs = up_ptr + part * RANK * N + tile_n * BLOCK_N + r[:, None] * N + n[None, :]
    steps: tl.constexpr = RANK // BLOCK_R
    group_stride = tl.full((), 1, tl.int64) * stride_up
    for step in tl.range(first * steps, (last + 1) * steps, num_stages=1):
        group, at = step // steps, step % steps * BLOCK_R
        low = tl.load(low_ptrs + at, mask=here[:, None], other=0.0)
        up = tl.load(up_ptrs + (group * group_stride + at * N), mask=in_n[None, :], other=0.0)
        # `up` is finite (the fold sees to it), so a group that has diverged shows in its own rows of `low` alone, and
        # the select keeps those from its neighbours in the tile.
        mine = tl.where((owner == group)[:, None], low, 0.0)
        acc = tl.dot(mine, up, acc, input_precision=PRECISION)

    # With dA in two halves, for φ'(u) and φ(u) of one read of u do not both fit beside the whole accumulator.
    pieces = (acc,)
    if HAS_DA:
        pieces = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
    WIDTH: tl.constexpr = BLOCK_N // 2 if HAS_DA else BLOCK_N
    n = tl.arange(0, WIDTH)
    for piece in tl.static_range(BLOCK_N // WIDTH):
        acc = pieces[piece]
        n0 = tile_n * BLOCK_N + piece * WIDTH
        column, in_n = part * N + n0, n < N - n0
        mask = here[:, None] if EVEN_N else here[:, None] & in_n[None, :]
        out = corner * (PARTS * N) + column + m[:, None] * (PARTS * N) + n[None, :]
        if HAS_BIAS:
            bias = tl.load(bias_ptr + column + n) if EVEN_N else tl.load(bias_ptr + column + n, mask=in_n, other=0.0)
            acc += bias.to(tl.float32)[None, :]
        if ARGUMENT == "read":
            h, slope = activated(tl.load(u_ptr + out, mask=mask, other=0.0).to(tl.float32), ACTIVATION)
            acc *= slope
        elif ACTIVATION != "none":
            if ARGUMENT == "write":
                tl.store(u_ptr + out, acc, mask=mask)
            acc = activated(acc, ACTIVATION)[0]
        if HAS_RESIDUAL:
            residual = residual_ptr + corner * stride_rm + column + m[:, None] * stride_rm + n[None, :]
            acc += tl.load(residual, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + out, acc, mask=mask)
        if HAS_DA:
            h = h.to(y_ptr.dtype.element_ty)
            for step in tl.range(first * steps, (last + 1) * steps, num_stages=1):
                slot, at = step // steps, step % steps * BLOCK_R
                mine = here & (owner == slot)
                q = tl.load(low_ptrs + at, mask=mine[:, None], other=0.0)
                # Both are masked: a neighbour's rows may hold what is not finite.
                da = tl.dot(tl.trans(q), tl.where(mine[:, None], h, 0.0), input_precision=PRECISION)
                share = tl.full((), tile_m + slot, tl.int64) * (R * N) + at * N + n0
                in_share = (r < R - at)[:, None] if EVEN_N else (r < R - at)[:, None] & in_n[None, :]
                tl.store(da_ptr + share + r[:, None] * N + n[None, :], da, mask=in_share)


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
    ARGUMENT: tl.constexpr,
    R: tl.constexpr,
    HAS_DA: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """y = φ(x · w + bias + low · up[group]) + residual, the frozen product with its low-rank term, in one pass.

    Forward: w = Wᵀ, low = P, up = B' of the row's group, PARTS column blocks of N, each with RANK columns of `low`.
    Backward: w = W, x = dY, low = Q, up = A of the row's slot (GROUPS_PER_UP views share it), RANK = L.

    ARGUMENT says what u [M, PARTS·N] is: "write" stores the activation's argument beside y, for the backward; "read"
    multiplies by φ'(u) in place of applying φ, which makes dX of the linear behind an activation the dY of the one
    before it; "none" has no u. With HAS_DA (and "read") every row tile t also leaves its share of dA = Qᵀ φ(u) for each
    slot s that it has rows of, as number t + s [R, N], so that no other kernel reads u.

    2·M·PARTS·N·(K + RANK) FLOP, and 2·M·N·RANK for dA; in bf16 reads 2·(M·K + PARTS·N·K + M·L) bytes and `up`, writes
    2·M·PARTS·N, and as much again for u and for a residual, and 4·R·N bytes a share of dA.
    """
    tile_m, part, tile_n = _tile_at(tl.program_id(0), M, N, PARTS, BLOCK_M, BLOCK_N, GROUP_M)
    corner = tile_m.to(tl.int64) * BLOCK_M
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    here, in_n = m < M - tile_m * BLOCK_M, n < N - tile_n * BLOCK_N
    column = part * N + tile_n * BLOCK_N
    x_ptrs = x_ptr + corner * stride_xm + m[:, None] * stride_xm + k[None, :]
    w_ptrs = w_ptr + column.to(tl.int64) * stride_wn + n[None, :] * stride_wn + k[:, None] * stride_wk
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k0 in range(0, K, BLOCK_K):
        in_k = k < K - k0
        x = tl.load(x_ptrs, mask=here[:, None] if EVEN_K else here[:, None] & in_k[None, :], other=0.0)
        if EVEN_K:
            w = tl.load(w_ptrs) if EVEN_N else tl.load(w_ptrs, mask=in_n[None, :], other=0.0)
        else:
            w = tl.load(w_ptrs, mask=in_k[:, None] & in_n[None, :], other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K * stride_wk
    _finish(
        acc,
        tile_m,
        part,
        tile_n,
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
        stride_rm,
        stride_up,
        PARTS,
        GROUPS_PER_UP,
        L,
        RANK,
        BLOCK_R,
        ACTIVATION,
        HAS_BIAS,
        HAS_RESIDUAL,
        ARGUMENT,
        R,
        HAS_DA,
        EVEN_N,
        PRECISION,
        BLOCK_M,
        BLOCK_N,
    )


@triton.jit(do_not_specialize=COUNTS)
def product_descriptor_kernel(
    x_desc,
    w_desc,
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
    ARGUMENT: tl.constexpr,
    R: tl.constexpr,
    HAS_DA: tl.constexpr,
    EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """`product_kernel` in PROGRAMS persistent programs, x and w read through descriptors.

    TRANSPOSED: w_desc is of W [PARTS·N, K], as in the forward, else of W [K, N]. Beyond an end a descriptor reads 0;
    columns beyond a part are those of the next one, and are not stored. FLOP and bytes as `product_kernel`.
    """
    tiles = tl.cdiv(M, BLOCK_M) * PARTS * tl.cdiv(N, BLOCK_N)
    for number in tl.range(tl.program_id(0), tiles, PROGRAMS):
        tile_m, part, tile_n = _tile_at(number, M, N, PARTS, BLOCK_M, BLOCK_N, GROUP_M)
        row, column = tile_m * BLOCK_M, part * N + tile_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k0 in tl.range(0, K, BLOCK_K):
            x = x_desc.load([row, k0])
            if TRANSPOSED:
                acc = tl.dot(x, w_desc.load([column, k0]).T, acc, input_precision=PRECISION)
            else:
                acc = tl.dot(x, w_desc.load([k0, column]), acc, input_precision=PRECISION)
        _finish(
            acc,
            tile_m,
            part,
            tile_n,
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
            stride_rm,
            stride_up,
            PARTS,
            GROUPS_PER_UP,
            L,
            RANK,
            BLOCK_R,
            ACTIVATION,
            HAS_BIAS,
            HAS_RESIDUAL,
            ARGUMENT,
            R,
            HAS_DA,
            EVEN_N,
            PRECISION,
            BLOCK_M,
            BLOCK_N,
        )


def forward_product(
    x: Tensor,
    linear: FrozenLinear,
    P: Tensor,
    site: SiteAdapters,
    groups: RowGroups,
    residual: Tensor | None = None,
    keep: bool = False,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor | None]:
    """y = φ(x Wᵀ + b + P B') + residual, and φ's argument where it is to be kept.

    Args:
        x: [M, K], behind the norm. P: [M, parts·RP]. residual: [M, parts·N] or None.
    """
    parts, out, activation = site.parts, site.out, linear.activation
    name = "product" if activation == "none" else "product_activated"
    tile = tile or tile_for(name, x.device, x.dtype.itemsize, len(x), parts * out, x.shape[1])
    if tile.form == "torch":
        return library_forward(x, linear, P, site, groups, residual, keep)
    y = x.new_empty(len(x), parts * out)
    u = torch.empty_like(y) if keep and activation != "none" else None
    _launch(
        tile,
        x,
        linear.weight,
        True,
        linear.bias,
        P,
        site.up,
        row_group(groups, x.device),
        residual,
        u,
        y,
        parts,
        1,
        activation,
        "none" if u is None else "write",
    )
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
    tile: Tile | None = None,
) -> Tensor:
    """dX = dY W + Q A: dy [M, N], weight [N, K], Q [M, L] → [M, K]; times φ'(u) where x = φ(u), u [M, K].

    Args:
        dA: [shares, 1, R, K] fp32 of a linear of one part, to which the shares of dA = Qᵀ φ(u) go, or None. Share t + s
            is that of slot s in the row tile t, which has `rows_of_tile` rows; numbers without such rows stay as
            they are.

    Raises:
        ValueError: dA without u, or of a linear of several parts.
    """
    if dA is not None and (u is None or site.parts > 1):
        raise ValueError(f"backward_product: dA of {site.parts} parts; it is computed of φ(u), for one part")
    name = "product_backward" if u is None else "product_backward_activated"
    tile = tile or tile_for(name, dy.device, dy.dtype.itemsize, len(dy), weight.shape[1], dy.shape[1])
    if tile.form == "torch":
        return library_backward(dy, weight, Q, site, groups, u, activation, dA)
    dx = dy.new_empty(len(dy), weight.shape[1])
    _launch(
        tile,
        dy,
        weight,
        False,
        None,
        Q,
        site.down,
        row_group(groups, dy.device),
        None,
        u,
        dx,
        1,
        groups.views,
        activation if u is not None else "none",
        "none" if u is None else "read",
        dA,
    )
    return dx


def rows_of_tile(like: Tensor, rows: int, out: int, width: int) -> int:
    """Rows that `backward_product` with u gives one share of dA, for dy [rows, out] and u [rows, width]."""
    tile = tile_for("product_backward_activated", like.device, like.dtype.itemsize, rows, width, out)
    return max(rows, 1) if tile.form == "torch" else tile["BLOCK_M"]


def _launch(
    tile: Tile,
    x: Tensor,
    weight: Tensor,
    transposed: bool,
    bias: Tensor | None,
    low: Tensor,
    up: Tensor,
    row_groups: Tensor,
    residual: Tensor | None,
    u: Tensor | None,
    y: Tensor,
    parts: int,
    groups_per_up: int,
    activation: str,
    argument: str,
    dA: Tensor | None = None,
) -> None:
    """Either kernel; `transposed`: x Wᵀ, and x W otherwise. `up` [owners, parts·RANK, N]."""
    rows, width = x.shape
    out, L = up.shape[2], low.shape[1]
    rank = L // parts
    options: dict[str, Any] = {
        "PARTS": parts,
        "GROUPS_PER_UP": groups_per_up,
        "L": L,
        "RANK": rank,
        "BLOCK_R": LEAST_RANK,
        "ACTIVATION": activation,
        "HAS_BIAS": bias is not None,
        "HAS_RESIDUAL": residual is not None,
        "ARGUMENT": argument,
        "R": 0 if dA is None else dA.shape[2],
        "HAS_DA": dA is not None,
        "EVEN_N": out % tile["BLOCK_N"] == 0,
        "PRECISION": precision(x),
    }
    tiles = tiles_of(rows, tile["BLOCK_M"]) * parts * tiles_of(out, tile["BLOCK_N"])
    operands = (bias, low, up, row_groups, residual, u, y, dA, rows, out, width)
    strides = (0 if residual is None else residual.stride(0), up.stride(0))
    if tile.form == "descriptor" and rows and describable(x) and describable(weight):
        programs = multiprocessors(x.device)
        blocks = [tile["BLOCK_N"], tile["BLOCK_K"]] if transposed else [tile["BLOCK_K"], tile["BLOCK_N"]]
        x_desc = TensorDescriptor.from_tensor(x, [tile["BLOCK_M"], tile["BLOCK_K"]])
        w_desc = TensorDescriptor.from_tensor(weight, blocks)
        options |= {"TRANSPOSED": transposed, "PROGRAMS": programs}
        launch(
            product_descriptor_kernel,
            (min(programs, tiles),),
            x_desc,
            w_desc,
            *operands,
            *strides,
            **options,
            **tile.launch,
        )
        return
    stride_wn, stride_wk = weight.stride() if transposed else weight.stride()[::-1]
    options["EVEN_K"] = width % tile["BLOCK_K"] == 0
    launch(
        product_kernel,
        (tiles,),
        x,
        weight,
        *operands,
        x.stride(0),
        stride_wn,
        stride_wk,
        *strides,
        **options,
        **tile.launch,
    )


def describable(matrix: Tensor) -> bool:
    """Whether a tensor descriptor takes a matrix: rows contiguous, base and row stride multiples of 16 bytes."""
    itemsize = matrix.element_size()
    return (
        matrix.stride(1) == 1
        and matrix.stride(0) * itemsize % 16 == 0
        and (matrix.is_meta or matrix.data_ptr() % 16 == 0)
    )
