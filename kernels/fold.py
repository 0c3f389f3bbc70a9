"""What happens to adapters once a pass, for all linears in one launch: the fold before it, the sums behind it.

The fold casts A and multiplies B by its gates, so that gates and branch masks never enter a large product, and keeps
entries that are not finite out of both. Behind the backward, `sum_shares` adds up what the chunks of rows left of
T = dYᵀ P and dA, and makes dB and dc of T. Conventions as in `product.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdlp.kernels.launch import launch
from fastdlp.kernels.low_rank import Branch, Folded, line_table, padded, part_table
from fastdlp.kernels.tiles import tile_for


@triton.jit
def fold_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    seen_ptr,
    down_ptr,
    up_ptr,
    poison_ptr,
    part_ptr,
    stride_a,
    stride_b,
    stride_cs,
    stride_cv,
    stride_cr,
    stride_down,
    stride_up,
    stride_poison,
    branch,
    BRANCHES: tl.constexpr,
    VIEWS: tl.constexpr,
    R: tl.constexpr,
    COLUMN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HAS_SEEN: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """down = A in the compute dtype; up[g] = (B · diag(c_g))ᵀ, rounded once. Grid (parts of all linears, slots).

    Every entry that is not finite becomes 0, and the slot's `poison` for the part NaN: 0 · NaN would reach the other
    rows of a tile, so a slot that has diverged shows through its own rows of P instead. The first branch also writes
    the zeros of the padding.

    Per slot and part reads 4·R·(K + N) bytes, writes 2·RP·(K + views·N) in bf16; R·views·N products.
    """
    part, slot = tl.program_id(0), tl.program_id(1).to(tl.int64)
    part_ptr += part * 7
    K, N = tl.load(part_ptr).to(tl.int32), tl.load(part_ptr + 1).to(tl.int32)
    a_at, b_at, c_at = tl.load(part_ptr + 2), tl.load(part_ptr + 3), tl.load(part_ptr + 4)
    down_at, up_at = tl.load(part_ptr + 5), tl.load(part_ptr + 6)
    if ALIGNED:
        K, N = tl.multiple_of(K, 16), tl.multiple_of(N, 16)
        a_at, down_at, up_at = tl.multiple_of(a_at, 16), tl.multiple_of(down_at, 16), tl.multiple_of(up_at, 16)
    r, at = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK)
    in_r = r < R
    lost = tl.zeros((BLOCK_R, BLOCK), dtype=tl.float32)

    a_ptr += slot * stride_a + a_at
    down_ptr += slot * stride_down + down_at + COLUMN * K
    for k0 in range(0, K, BLOCK):
        in_k = (at < K - k0)[None, :]
        place = r[:, None] * K + k0 + at[None, :]
        a = tl.load(a_ptr + place, mask=in_r[:, None] & in_k, other=0.0).to(down_ptr.dtype.element_ty)
        bad = a.to(tl.float32) * 0.0
        lost += bad
        mask = in_k if COLUMN == 0 else in_r[:, None] & in_k
        tl.store(down_ptr + place, tl.where(bad == 0.0, a, 0.0), mask=mask)

    b_ptr += slot * stride_b + b_at
    for view in tl.static_range(VIEWS):
        c = tl.load(c_ptr + slot * stride_cs + view * stride_cv + (c_at + r) * stride_cr, mask=in_r, other=0.0)
        c = c.to(tl.float32)
        if HAS_SEEN:
            c *= tl.load(seen_ptr + view)
        up_ptrs = up_ptr + (slot * VIEWS + view) * stride_up + up_at + COLUMN * N
        for n0 in range(0, N, BLOCK):
            in_n = (at < N - n0)[None, :]
            b = tl.load(b_ptr + (n0 + at)[None, :] * R + r[:, None], mask=in_r[:, None] & in_n, other=0.0)
            up = (b.to(tl.float32) * c[:, None]).to(up_ptr.dtype.element_ty)
            bad = up.to(tl.float32) * 0.0
            lost += bad
            mask = in_n if COLUMN == 0 else in_r[:, None] & in_n
            tl.store(up_ptrs + r[:, None] * N + n0 + at[None, :], tl.where(bad == 0.0, up, 0.0), mask=mask)
    tl.store(poison_ptr + slot * stride_poison + part * BRANCHES + branch, tl.sum(tl.sum(lost, 1), 0))


@triton.jit
def sum_shares_kernel(
    share_ptr,
    b_ptr,
    c_ptr,
    seen_ptr,
    da_ptr,
    db_ptr,
    dc_ptr,
    line_ptr,
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
    HAS_SEEN: tl.constexpr,
    HAS_DC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dA, dB = Σ_views T · diag(c) and dc = Σ_n B ⊙ T, from the shares of every chunk, first to last.

    Grid (lines, slots): a line is one row of the rank of one part, of A or of B. With `seen`, c is gate · seen and dc
    the gate's gradient, summed over the views. An owner without chunks gets zeros. A gate at zero, and so a zero in c,
    still gets its gradient. Reads 4 bytes an entry of the shares and of B, writes 4 an entry of the gradients.
    """
    slot = tl.program_id(1).to(tl.int64)
    line_ptr += tl.program_id(0) * 8
    is_up, size = tl.load(line_ptr), tl.load(line_ptr + 1).to(tl.int32)
    share_ptr += tl.load(line_ptr + 2)
    step, goes = tl.load(line_ptr + 3), tl.load(line_ptr + 5)
    bounds_ptr += 2 * tl.load(line_ptr + 4)
    at = tl.arange(0, BLOCK)
    if is_up == 0:
        first, last = tl.load(bounds_ptr + 2 * slot), tl.load(bounds_ptr + 2 * slot + 1)
        for k0 in range(0, size, BLOCK):
            acc = _sum_of_chunks(share_ptr + k0, step, first, last, size - k0, BLOCK)
            tl.store(da_ptr + slot * stride_da + goes + k0 + at, acc, mask=at < size - k0)
    else:
        b_ptr += slot * stride_b + tl.load(line_ptr + 6)
        db_ptr += slot * stride_db + goes
        c_at, gate_gradient = tl.load(line_ptr + 7), 0.0
        bounds_ptr += 2 * slot * VIEWS
        for view in tl.static_range(VIEWS):
            first, last = tl.load(bounds_ptr + 2 * view), tl.load(bounds_ptr + 2 * view + 1)
            c = tl.load(c_ptr + slot * stride_cs + view * stride_cv + c_at * stride_cr).to(tl.float32)
            seen = 1.0
            if HAS_SEEN:
                seen = tl.load(seen_ptr + view)
            dc = tl.zeros((BLOCK,), dtype=tl.float32)
            for n0 in range(0, size, BLOCK):
                here = at < size - n0
                t = _sum_of_chunks(share_ptr + n0, step, first, last, size - n0, BLOCK)
                if HAS_DC:
                    dc += t * tl.load(b_ptr + (n0 + at) * R, mask=here, other=0.0).to(tl.float32)
                t *= c * seen
                if view > 0:  # written by this very thread
                    t += tl.load(db_ptr + (n0 + at) * R, mask=here, other=0.0)
                tl.store(db_ptr + (n0 + at) * R, t, mask=here)
            if HAS_DC:
                if HAS_SEEN:
                    gate_gradient += seen * tl.sum(dc)
                    if view == VIEWS - 1:
                        tl.store(dc_ptr + slot * stride_dcs + c_at, gate_gradient)
                else:
                    tl.store(dc_ptr + slot * stride_dcs + view * stride_dcv + c_at, tl.sum(dc))


@triton.jit
def _sum_of_chunks(share_ptr, step, first, last, size, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    share_ptr += first.to(tl.int64) * step
    for _ in range(first, last):
        acc += tl.load(share_ptr + at, mask=at < size, other=0.0)
        share_ptr += step
    return acc


@dataclass(frozen=True)
class Source:
    """Where a branch's adapters lie, slot by slot.

    A, B: [slots, ...], entry (slot, i) is `stride(0)` · slot + i behind the first. c: read at (slot, view, i) by
    `c_strides`. seen [views] fp32: multiplies c where it holds gates alone, or None.
    """

    A: Tensor
    B: Tensor
    c: Tensor
    c_strides: tuple[int, int, int]
    seen: Tensor | None
    branch: Branch


def fold(
    sources: list[Source], slots: int, views: int, down_entries: int, up_entries: int, dtype: torch.dtype
) -> Folded:
    """A and B' of every part of all branches, side by side along the rank.

    Args:
        sources: one a branch; their parts are the same linears' in the same order.
        down_entries, up_entries: of a slot's row of A and of a group's row of B', padding included.
    """
    like, branches = sources[0].A, [source.branch for source in sources]
    down, up = (
        like.new_empty(rows, entries, dtype=dtype)
        for rows, entries in ((slots, down_entries), (slots * views, up_entries))
    )
    parts = len(branches[0].parts)
    poison = like.new_empty(slots, parts * len(sources), dtype=torch.float32)
    folded = Folded(down, up, poison, branches, views)
    tile = tile_for("fold", like.device, dtype.itemsize)
    for number, source in enumerate(sources):
        branch = source.branch
        launch(
            fold_kernel,
            (parts, slots),
            source.A,
            source.B,
            source.c,
            source.seen,
            down,
            up,
            poison,
            part_table(branch, like.device),
            source.A.stride(0),
            source.B.stride(0),
            *source.c_strides,
            down_entries,
            up_entries,
            poison.stride(0),
            number,
            BRANCHES=len(sources),
            VIEWS=views,
            R=branch.rank,
            COLUMN=branch.column,
            BLOCK_R=padded(folded.rank),
            HAS_SEEN=source.seen is not None,
            ALIGNED=_aligned(branch),
            **tile.launch,
        )
    return folded


def sum_shares(source: Source, folded: Folded, dA: Tensor, dB: Tensor, dc: Tensor | None) -> None:
    """Write a branch's gradients, laid out as its A, B and gates are, from the shares of all uses that were written.

    Args:
        dA, dB: [slots, ...] fp32, laid out as A and B in `source`; they may be one tensor.
        dc: [slots, entries of c] with `seen`, else [slots, views, entries of c]; fp32, or None: not wanted.
    """
    slots, branch, views = len(folded.down), source.branch, folded.views
    lines, bounds = line_table(branch, folded.rank, tuple(folded.written), slots, views, dA.device)
    tile = tile_for("sum_shares", dA.device, 4)
    launch(
        sum_shares_kernel,
        (len(lines), slots),
        folded.workspace(),
        source.B,
        source.c,
        source.seen,
        dA,
        dB,
        dc,
        lines,
        bounds,
        source.B.stride(0),
        *source.c_strides,
        dA.stride(0),
        dB.stride(0),
        0 if dc is None else dc.stride(0),
        0 if dc is None or source.seen is not None else dc.stride(1),
        VIEWS=views,
        R=branch.rank,
        HAS_SEEN=source.seen is not None,
        HAS_DC=dc is not None,
        **tile.launch,
    )


def _aligned(branch: Branch) -> bool:
    """Whether sizes and offsets allow vector loads and stores."""
    return all(n % 16 == 0 for p in branch.parts for n in (p.width, p.out, p.a, p.down, p.up))
