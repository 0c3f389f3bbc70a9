"""Launchers of the dual-LoRA kernels: operands in, tensors out, no autograd. The jit code is in `_dual_lora.py`.

What was declined: a second dot for x Aᵀ in the K loop of the product (on sm_80 it spills 3.7 KB at 128×256×64, and it
would run once a column tile); the P of fc2 in the epilogue of fc1 (its accumulators leave no registers for it, and the
column tiles' shares would have to be summed); atomics anywhere.

A tile comes from `tiles.json` unless the caller brings one; where it says "torch" for a shape, the product is cuBLAS
and baddbmm_ and everything else stays.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdlp.kernels import _dual_lora as jit
from fastdlp.kernels.activation import KEPT
from fastdlp.kernels.frozen import frozen_linear, frozen_linear_backward
from fastdlp.kernels.groups import RowGroups, chunks, row_group
from fastdlp.kernels.launch import launch
from fastdlp.kernels.tiles import Tile, tile_for


def fold(A: Tensor, B: Tensor, c: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A [slots, parts, R, K] and B' = (B · diag(c))ᵀ in the compute dtype.

    Returns:
        down [slots, parts·R, K] and up [slots·views, parts·R, N].
    """
    A, B, c = _rows_contiguous(A), _rows_contiguous(B), last_contiguous(c)
    slots, parts, rank, width = A.shape
    out, views = B.shape[2], c.shape[1]
    down = A.new_empty(slots, parts * rank, width, dtype=dtype)
    up = A.new_empty(slots * views, parts * rank, out, dtype=dtype)
    tile = tile_for("fold", A.device, dtype.itemsize)
    grid = (slots, parts, _tiles(max(width, out), tile["BLOCK"]))
    launch(
        jit.fold_kernel,
        grid,
        A,
        B,
        c,
        down,
        up,
        width,
        out,
        A.stride(0),
        B.stride(0),
        c.stride(0),
        c.stride(1),
        c.stride(2),
        PARTS=parts,
        VIEWS=views,
        R=rank,
        BLOCK_R=_power(rank),
        **tile.launch,
    )
    return down, up


def down_product(x: Tensor, down: Tensor, groups: RowGroups, tile: Tile | None = None) -> Tensor:
    """P = x Aᵀ: x [M, K], down [slots, L, K] → [M, L] in the dtype of x."""
    (rows, width), L = x.shape, down.shape[1]
    tile = tile or tile_for("down", x.device, x.dtype.itemsize, rows, 0, width)
    cut = chunks(groups.by_slot, tile["BLOCK_M"], 1, x.device)
    P = x.new_empty(rows, L)
    launch(
        jit.down_kernel,
        (cut.count,),
        x,
        down,
        P,
        cut.table,
        cut.count,
        width,
        x.stride(0),
        L=L,
        BLOCK_L=_rank_block(L),
        EVEN_K=width % tile["BLOCK_K"] == 0,
        PRECISION=_precision(x),
        **tile.launch,
    )
    return P


def norm_down_product(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, down: Tensor, groups: RowGroups, tile: Tile | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """h = LayerNorm(x) [M, K], stats [2, M] fp32 (mean, 1/σ) and P = h Aᵀ [M, L]."""
    (rows, width), L = x.shape, down.shape[1]
    tile = tile or tile_for("norm_down", x.device, x.dtype.itemsize, rows, 0, width)
    cut = chunks(groups.by_slot, tile["BLOCK_M"], 1, x.device)
    h, P = x.new_empty(rows, width), x.new_empty(rows, L)
    stats = x.new_empty(2, rows, dtype=torch.float32)
    launch(
        jit.norm_down_kernel,
        (cut.count,),
        x,
        weight,
        bias,
        down,
        h,
        stats,
        P,
        cut.table,
        cut.count,
        rows,
        width,
        x.stride(0),
        eps,
        L=L,
        BLOCK_L=_rank_block(L),
        PRECISION=_precision(x),
        **tile.launch,
    )
    return h, stats, P


def norm_backward(dh: Tensor, x: Tensor, stats: Tensor, weight: Tensor, tile: Tile | None = None) -> Tensor:
    """dX of a frozen LayerNorm: dh [M, K], x [M, K], stats [2, M] → [M, K]."""
    rows, width = x.shape
    tile = tile or tile_for("norm_backward", x.device, x.dtype.itemsize, rows, 0, width)
    dx = torch.empty_like(dh)
    launch(
        jit.norm_backward_kernel,
        (_tiles(rows, tile["BLOCK_M"]),),
        dh,
        x,
        stats,
        weight,
        dx,
        rows,
        width,
        x.stride(0),
        BLOCK_K=_power(width),
        **tile.launch,
    )
    return dx


def forward_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    P: Tensor,
    up: Tensor,
    parts: int,
    groups: RowGroups,
    activation: str = "none",
    residual: Tensor | None = None,
    keep: bool = False,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor | None]:
    """y = φ(x Wᵀ + b + P B') + residual, and φ' at φ's argument where it is to be kept.

    Args:
        x: [M, K]; weight: [parts·N, K]; bias: [parts·N] or None; P: [M, parts·R]; up: [groups, parts·R, N].
    """
    (rows, width), out, L = x.shape, up.shape[2], P.shape[1]
    name = "product" if activation == "none" else "product_activated"
    tile = tile or tile_for(name, x.device, x.dtype.itemsize, rows, parts * out, width)
    if tile.form == "torch":
        return _library_forward(x, weight, bias, P, up, parts, groups, activation, residual, keep)
    y = x.new_empty(rows, parts * out)
    slope = torch.empty_like(y) if keep and activation != "none" else None
    launch(
        jit.product_kernel,
        (_tiles(rows, tile["BLOCK_M"]) * parts * _tiles(out, tile["BLOCK_N"]),),
        x,
        weight,
        bias,
        P,
        up,
        row_group(groups, x.device),
        residual,
        y,
        slope,
        rows,
        out,
        width,
        x.stride(0),
        weight.stride(0),
        weight.stride(1),
        0 if residual is None else residual.stride(0),
        PARTS=parts,
        GROUPS_PER_UP=1,
        L=L,
        RANK=L // parts,
        BLOCK_R=_rank_block(L // parts),
        ACTIVATION=activation,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        KEEP=slope is not None,
        EVEN_N=out % tile["BLOCK_N"] == 0,
        EVEN_K=width % tile["BLOCK_K"] == 0,
        PRECISION=_precision(x),
        **tile.launch,
    )
    return y, slope


def backward_product(
    dy: Tensor, weight: Tensor, Q: Tensor, down: Tensor, groups: RowGroups, tile: Tile | None = None
) -> Tensor:
    """dX = dY W + Q A: dy [M, N], weight [N, K], Q [M, L], down [slots, L, K] → [M, K]."""
    (rows, inner), width, L = dy.shape, weight.shape[1], Q.shape[1]
    tile = tile or tile_for("product_backward", dy.device, dy.dtype.itemsize, rows, width, inner)
    if tile.form == "torch":
        return _library_backward(dy, weight, Q, down, groups)
    dx = dy.new_empty(rows, width)
    launch(
        jit.product_kernel,
        (_tiles(rows, tile["BLOCK_M"]) * _tiles(width, tile["BLOCK_N"]),),
        dy,
        weight,
        None,
        Q,
        down,
        row_group(groups, dy.device),
        None,
        dx,
        None,
        rows,
        width,
        inner,
        dy.stride(0),
        weight.stride(1),
        weight.stride(0),
        0,
        PARTS=1,
        GROUPS_PER_UP=groups.views,
        L=L,
        RANK=L,
        BLOCK_R=_rank_block(L),
        ACTIVATION="none",
        HAS_BIAS=False,
        HAS_RESIDUAL=False,
        KEEP=False,
        EVEN_N=width % tile["BLOCK_N"] == 0,
        EVEN_K=inner % tile["BLOCK_K"] == 0,
        PRECISION=_precision(dy),
        **tile.launch,
    )
    return dx


def adapter_gradients(
    dy: Tensor,
    slope: Tensor | None,
    P: Tensor,
    B: Tensor,
    c: Tensor,
    up: Tensor,
    groups: RowGroups,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One pass over dY [M, parts·N]; `slope` [M, parts·N] is φ' where there was an activation.

    Returns:
        dU [M, parts·N] (dY itself without a slope), Q [M, parts·R]; shares of dB [chunks, parts, N, R] and of
        dc [chunks, parts, R], fp32, with the first chunk of every slot and of every group, int32.
    """
    B, c = _rows_contiguous(B), last_contiguous(c)
    _, parts, out, rank = B.shape
    name = "adapter_gradients" if slope is None else "adapter_gradients_activated"
    tile = tile or tile_for(name, dy.device, dy.dtype.itemsize, len(dy), parts * out)
    by_slot = chunks(groups, tile["BLOCK_M"], groups.views, dy.device)
    by_group = chunks(groups, tile["BLOCK_M"], 1, dy.device)
    du = dy if slope is None else dy.new_empty(dy.shape)
    Q = dy.new_empty(len(dy), parts * rank)
    dB = dy.new_empty(by_group.count, parts, out, rank, dtype=torch.float32)
    dc = dy.new_empty(by_group.count, parts, rank, dtype=torch.float32)
    launch(
        jit.adapter_gradients_kernel,
        (by_group.count, parts),
        dy,
        slope,
        P,
        B,
        c,
        up,
        du,
        Q,
        dB,
        dc,
        by_group.table,
        by_group.count,
        out,
        dy.stride(0),
        B.stride(0),
        c.stride(0),
        c.stride(1),
        c.stride(2),
        PARTS=parts,
        VIEWS=groups.views,
        R=rank,
        BLOCK_R=_rank_block(rank),
        HAS_SLOPE=slope is not None,
        EVEN_N=out % tile["BLOCK_N"] == 0,
        PRECISION=_precision(dy),
        **tile.launch,
    )
    return du, Q, dB, dc, by_slot.bounds, by_group.bounds


def down_gradient(x: Tensor, Q: Tensor, groups: RowGroups, tile: Tile | None = None) -> tuple[Tensor, Tensor]:
    """Shares of dA = Qᵀ x, [chunks, L, K] fp32, and the first chunk of every slot."""
    (rows, width), L = x.shape, Q.shape[1]
    tile = tile or tile_for("down_gradient", x.device, x.dtype.itemsize, rows, 0, width)
    cut = chunks(groups.by_slot, tile.chunk, 1, x.device)
    dA = x.new_empty(cut.count, L, width, dtype=torch.float32)
    launch(
        jit.down_gradient_kernel,
        (cut.count, _tiles(width, tile["BLOCK_K"])),
        x,
        Q,
        dA,
        cut.table,
        cut.count,
        width,
        x.stride(0),
        L=L,
        BLOCK_L=_rank_block(L),
        EVEN_K=width % tile["BLOCK_K"] == 0,
        PRECISION=_precision(x),
        **tile.launch,
    )
    return dA, cut.bounds


def sum_chunks(
    dA: tuple[Tensor, Tensor], dB: tuple[Tensor, Tensor], dc: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Each of (shares [chunks, ...], first chunk of every owner [owners + 1]) summed to [owners, ...], fp32."""
    sizes = [math.prod(share.shape[1:]) for share, _ in (dA, dB, dc)]
    sums = [share.new_empty(len(bounds) - 1, *share.shape[1:]) for share, bounds in (dA, dB, dc)]
    tile = tile_for("sum_chunks", dA[0].device, 4)
    grid = (len(sums[2]), sum(_tiles(size, tile["BLOCK"]) for size in sizes))
    launch(
        jit.sum_chunks_kernel,
        grid,
        dA[0],
        dB[0],
        dc[0],
        *sums,
        dA[1],
        dB[1],
        dc[1],
        len(sums[0]),
        *sizes,
        **tile.launch,
    )
    return sums[0], sums[1], sums[2]


def _library_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    P: Tensor,
    up: Tensor,
    parts: int,
    groups: RowGroups,
    activation: str,
    residual: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor | None]:
    """`forward_product` as cuBLAS for the frozen product and baddbmm_ for the low-rank term."""
    y = frozen_linear(x, weight, bias)
    out, rank = up.shape[2], up.shape[1] // parts
    for s0, s1, m0, m1, size in groups.runs:
        g0, g1 = s0 * groups.views, s1 * groups.views
        p, target = P[m0:m1].view(g1 - g0, size, parts, rank), y[m0:m1].view(g1 - g0, size, parts, out)
        for part in range(parts):
            target[:, :, part].baddbmm_(p[:, :, part], up[g0:g1, part * rank : (part + 1) * rank])
    slope = None
    if activation != "none":
        kept = KEPT[activation].keep(y)
        slope = KEPT[activation].backward(torch.ones_like(kept), kept) if keep else None
        y = KEPT[activation].value(kept)
    return (y if residual is None else y + residual), slope


def _library_backward(dy: Tensor, weight: Tensor, Q: Tensor, down: Tensor, groups: RowGroups) -> Tensor:
    """`backward_product` likewise."""
    dx = frozen_linear_backward(dy, weight)
    for s0, s1, m0, m1, size in groups.runs:
        shape = (s1 - s0, groups.views * size, -1)
        dx[m0:m1].view(shape).baddbmm_(Q[m0:m1].view(shape), down[s0:s1])
    return dx


def _tiles(size: int, block: int) -> int:
    return -(-size // block)


def _power(size: int) -> int:
    """The next power of two: what tl.arange takes."""
    return 1 << (size - 1).bit_length()


def _rank_block(rank: int) -> int:
    """Columns of a low-rank operand in a tile: a dot takes no fewer than 16."""
    return max(16, _power(rank))


def _precision(x: Tensor) -> str:
    """tf32 for fp32 only where torch allows it for its own products."""
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if x.is_cuda and x.dtype == torch.float32 and allowed else "ieee"


def last_contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _rows_contiguous(tensor: Tensor) -> Tensor:
    """A stack whose entries are each contiguous, whatever lies between them."""
    return tensor if tensor.numel() == 0 or tensor[0].is_contiguous() else tensor.contiguous()
