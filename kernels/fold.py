"""Per pass and branch, for all linears in one launch: the fold of the adapters, and the reduction of their gradients.

The fold casts A and multiplies B by its gates, so that gates and branch masks never enter a large product, and replaces
entries that are not finite in both. After the backward, `sum_partials` adds up the partial sums of T = dYᵀ P and dA and
computes dB and dc from T. Conventions as in `product.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdlp.kernels.launch import launch, row_stride
from fastdlp.kernels.low_rank import BranchOffsets, FoldedAdapters, padded, part_table, reduction_table
from fastdlp.kernels.tiles import tile_for


@triton.jit
def fold_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    view_scale_ptr,
    down_ptr,
    up_ptr,
    nan_flag_ptr,
    part_ptr,
    stride_a,
    stride_b,
    stride_cs,
    stride_cv,
    stride_cr,
    stride_down,
    stride_up,
    stride_flag,
    branch,
    BRANCHES: tl.constexpr,
    VIEWS: tl.constexpr,
    R: tl.constexpr,
    COLUMN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HAS_VIEW_SCALE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """down = A in the compute dtype; up[g] = (B · diag(c_g))ᵀ, rounded once. Grid (parts of all linears, slots).

    Entries that are not finite become 0, and the slot's `nan_flag` of the part NaN: 0 · NaN would spread to the other
    rows of a tile, so a slot that has diverged gets NaN in its own rows of P instead. The first branch also writes the
    zeros of the padding.

    Per slot and part reads 4·R·(K + N) bytes, writes 2·RP·(K + views·N) in bf16; R·views·N FLOPs.
    """
    part, slot = tl.program_id(0), tl.program_id(1).to(tl.int64)
    part_ptr += part * 7
    K, N = tl.load(part_ptr).to(tl.int32), tl.load(part_ptr + 1).to(tl.int32)
    a_offset, b_offset, c_offset = tl.load(part_ptr + 2), tl.load(part_ptr + 3), tl.load(part_ptr + 4)
    down_offset, up_offset = tl.load(part_ptr + 5), tl.load(part_ptr + 6)
    if ALIGNED:
        K, N = tl.multiple_of(K, 16), tl.multiple_of(N, 16)
        a_offset, down_offset = tl.multiple_of(a_offset, 16), tl.multiple_of(down_offset, 16)
        up_offset = tl.multiple_of(up_offset, 16)
    r, j = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK)
    in_r = r < R
    nan_flag = tl.zeros((BLOCK_R, BLOCK), dtype=tl.float32)

    a_ptr += slot * stride_a + a_offset
    down_ptr += slot * stride_down + down_offset + COLUMN * K
    for k0 in range(0, K, BLOCK):
        in_k = (j < K - k0)[None, :]
        offsets = r[:, None] * K + k0 + j[None, :]
        a = tl.load(a_ptr + offsets, mask=in_r[:, None] & in_k, other=0.0).to(down_ptr.dtype.element_ty)
        zero_or_nan = a.to(tl.float32) * 0.0
        nan_flag += zero_or_nan
        mask = in_k if COLUMN == 0 else in_r[:, None] & in_k
        tl.store(down_ptr + offsets, tl.where(zero_or_nan == 0.0, a, 0.0), mask=mask)

    b_ptr += slot * stride_b + b_offset
    for view in tl.static_range(VIEWS):
        c = tl.load(c_ptr + slot * stride_cs + view * stride_cv + (c_offset + r) * stride_cr, mask=in_r, other=0.0)
        c = c.to(tl.float32)
        if HAS_VIEW_SCALE:
            c *= tl.load(view_scale_ptr + view)
        up_ptrs = up_ptr + (slot * VIEWS + view) * stride_up + up_offset + COLUMN * N
        for n0 in range(0, N, BLOCK):
            in_n = (j < N - n0)[None, :]
            b = tl.load(b_ptr + (n0 + j)[None, :] * R + r[:, None], mask=in_r[:, None] & in_n, other=0.0)
            up = (b.to(tl.float32) * c[:, None]).to(up_ptr.dtype.element_ty)
            zero_or_nan = up.to(tl.float32) * 0.0
            nan_flag += zero_or_nan
            mask = in_n if COLUMN == 0 else in_r[:, None] & in_n
            tl.store(up_ptrs + r[:, None] * N + n0 + j[None, :], tl.where(zero_or_nan == 0.0, up, 0.0), mask=mask)
    tl.store(nan_flag_ptr + slot * stride_flag + part * BRANCHES + branch, tl.sum(tl.sum(nan_flag, 1), 0))


@triton.jit
def sum_partials_kernel(
    partial_ptr,
    b_ptr,
    c_ptr,
    view_scale_ptr,
    da_ptr,
    db_ptr,
    dc_ptr,
    reduction_ptr,
    bounds_ptr,
    stride_b,
    stride_cs,
    stride_cv,
    stride_cr,
    stride_da,
    stride_db,
    stride_dcs,
    stride_dcv,
    VIEWS: tl.constexpr,
    R: tl.constexpr,
    HAS_VIEW_SCALE: tl.constexpr,
    HAS_DC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dA, dB = Σ_views T · diag(c) and dc = Σ_n B ⊙ T: the partial sums of all chunks, added first to last.

    Grid (reductions, slots); a reduction is one rank row of one part, of A or of B. With `view_scale`, c is the gate
    times it, and dc the gate's gradient, summed over the views. An owner without chunks gets zeros. A gate of zero, and
    so a zero in c, still gets its gradient. Reads 4 bytes per entry of the partial sums and of B, writes 4 per entry of
    the gradients; one FLOP per entry read.
    """
    slot = tl.program_id(1).to(tl.int64)
    reduction_ptr += tl.program_id(0) * 8
    is_up, size = tl.load(reduction_ptr), tl.load(reduction_ptr + 1).to(tl.int32)
    partial_ptr += tl.load(reduction_ptr + 2)
    stride, gradient_offset = tl.load(reduction_ptr + 3), tl.load(reduction_ptr + 5)
    bounds_ptr += 2 * tl.load(reduction_ptr + 4)
    j = tl.arange(0, BLOCK)
    if is_up == 0:
        first, end = tl.load(bounds_ptr + 2 * slot), tl.load(bounds_ptr + 2 * slot + 1)
        for k0 in range(0, size, BLOCK):
            acc = _sum_chunks(partial_ptr + k0, stride, first, end, size - k0, BLOCK)
            tl.store(da_ptr + slot * stride_da + gradient_offset + k0 + j, acc, mask=j < size - k0)
    else:
        b_ptr += slot * stride_b + tl.load(reduction_ptr + 6)
        db_ptr += slot * stride_db + gradient_offset
        c_offset, gate_gradient = tl.load(reduction_ptr + 7), 0.0
        bounds_ptr += 2 * slot * VIEWS
        for view in tl.static_range(VIEWS):
            first, end = tl.load(bounds_ptr + 2 * view), tl.load(bounds_ptr + 2 * view + 1)
            c = tl.load(c_ptr + slot * stride_cs + view * stride_cv + c_offset * stride_cr).to(tl.float32)
            view_scale = 1.0
            if HAS_VIEW_SCALE:
                view_scale = tl.load(view_scale_ptr + view)
            dc = tl.zeros((BLOCK,), dtype=tl.float32)
            for n0 in range(0, size, BLOCK):
                in_n = j < size - n0
                t = _sum_chunks(partial_ptr + n0, stride, first, end, size - n0, BLOCK)
                if HAS_DC:
                    dc += t * tl.load(b_ptr + (n0 + j) * R, mask=in_n, other=0.0).to(tl.float32)
                t *= c * view_scale
                if view > 0:  # stored by the same thread
                    t += tl.load(db_ptr + (n0 + j) * R, mask=in_n, other=0.0)
                tl.store(db_ptr + (n0 + j) * R, t, mask=in_n)
            if HAS_DC:
                if HAS_VIEW_SCALE:
                    gate_gradient += view_scale * tl.sum(dc)
                    if view == VIEWS - 1:
                        tl.store(dc_ptr + slot * stride_dcs + c_offset, gate_gradient)
                else:
                    tl.store(dc_ptr + slot * stride_dcs + view * stride_dcv + c_offset, tl.sum(dc))


@triton.jit
def _sum_chunks(partial_ptr, stride, first, end, size, BLOCK: tl.constexpr):
    j = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    partial_ptr += first.to(tl.int64) * stride
    for _ in range(first, end):
        acc += tl.load(partial_ptr + j, mask=j < size, other=0.0)
        partial_ptr += stride
    return acc


@dataclass(frozen=True)
class BranchTensors:
    """The adapters of a branch in memory.

    A, B: [slots, ...], entry (slot, i) at slot · stride(0) + i. c: read at (slot, view, i) by `c_strides`. view_scale
    [views] fp32: multiplies c, which then holds the gates only, or None.
    """

    A: Tensor
    B: Tensor
    c: Tensor
    c_strides: tuple[int, int, int]
    view_scale: Tensor | None
    offsets: BranchOffsets


def fold(
    branches: list[BranchTensors], slots: int, views: int, down_entries: int, up_entries: int, dtype: torch.dtype
) -> FoldedAdapters:
    """A and B' of every part of all branches, concatenated along the rank.

    Args:
        branches: of the same linears in the same order.
        down_entries, up_entries: length of a slot's row of A and of a group's row of B', padding included.
    """
    A = branches[0].A
    down, up = (A.new_empty(shape, dtype=dtype) for shape in ((slots, down_entries), (slots * views, up_entries)))
    parts = len(branches[0].offsets.parts)
    nan_flag = A.new_empty(slots, parts * len(branches), dtype=torch.float32)
    folded = FoldedAdapters(down, up, nan_flag, [branch.offsets for branch in branches], views)
    tile = tile_for("fold", A.device, dtype.itemsize)
    for number, branch in enumerate(branches):
        tensors = (branch.A, branch.B, branch.c, branch.view_scale, down, up, nan_flag)
        strides = (branch.A.stride(0), branch.B.stride(0), *branch.c_strides)
        launch(
            fold_kernel,
            (parts, slots),
            *tensors,
            part_table(branch.offsets, A.device),
            *strides,
            down_entries,
            up_entries,
            nan_flag.stride(0),
            number,
            BRANCHES=len(branches),
            VIEWS=views,
            R=branch.offsets.rank,
            COLUMN=branch.offsets.column,
            BLOCK_R=padded(folded.rank),
            HAS_VIEW_SCALE=branch.view_scale is not None,
            ALIGNED=all(n % 16 == 0 for p in branch.offsets.parts for n in (p.width, p.out, p.a, p.down, p.up)),
            **tile.launch,
        )
    return folded


def sum_partials(branch: BranchTensors, folded: FoldedAdapters, dA: Tensor, dB: Tensor, dc: Tensor | None) -> None:
    """Write a branch's gradients, in the layout of its A, B and gates, from all partial sums that were written.

    Args:
        dA, dB: [slots, ...] fp32, laid out as A and B in `branch`; they may be one tensor.
        dc: [slots, entries of c] with `view_scale`, else [slots, views, entries of c]; fp32, or None: not computed.
    """
    slots, offsets, views = len(folded.down), branch.offsets, folded.views
    reductions, bounds = reduction_table(offsets, folded.rank, tuple(folded.written), slots, views, dA.device)
    tensors = (folded.workspace(), branch.B, branch.c, branch.view_scale, dA, dB, dc)
    stride_dcv = 0 if dc is None or branch.view_scale is not None else dc.stride(1)
    strides = (branch.B.stride(0), *branch.c_strides, dA.stride(0), dB.stride(0), row_stride(dc), stride_dcv)
    launch(
        sum_partials_kernel,
        (len(reductions), slots),
        *tensors,
        reductions,
        bounds,
        *strides,
        VIEWS=views,
        R=offsets.rank,
        HAS_VIEW_SCALE=branch.view_scale is not None,
        HAS_DC=dc is not None,
        **tile_for("sum_partials", dA.device, 4).launch,
    )
