"""Memory layout of folded adapters, as the kernels read them, and of the partial sums of their gradients.

An adapter's rank is padded: RP is the next power of two of R, at least 16, the smallest size of a tensor-core product.
So every row of P and Q, and every slice of a part, is a multiple of 32 bytes and needs no mask; the padding is zero.

A *site* is an adapted linear; its `parts` are the adapters over one packed weight. Nothing here imports Triton.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from fastdlp.kernels.groups import RowGroups, chunks, device_table

MIN_RANK = 16
Span = tuple[int, int]  # parts first..end of the folded ones: one site


def padded(rank: int) -> int:
    """RP of a rank R."""
    return max(MIN_RANK, 1 << (rank - 1).bit_length())


@dataclass(frozen=True)
class SiteAdapters:
    """All slots' folded adapters of one site.

    down [slots, L, K]: A in the compute dtype, L = parts · RP. up [slots · views, L, N]: B' = (B · diag(c))ᵀ. Both are
    always finite; nan_flag [slots, F] fp32 sums to NaN for a slot with an adapter entry that is not, and to 0
    otherwise. rank: R, without padding.
    """

    down: Tensor
    up: Tensor
    nan_flag: Tensor
    parts: int
    rank: int

    @property
    def padded_rank(self) -> int:
        return self.down.shape[1] // self.parts

    @property
    def out(self) -> int:
        """N of a part."""
        return self.up.shape[2]


@dataclass(frozen=True)
class PartOffsets:
    """Sizes and offsets of one part's adapter, in entries of a slot's row.

    A [R, K] starts at `a`, B [N, R] at `b` and c [R] at `c` of the trained tensors; `down` and `up` are the offsets of
    its A and B' in the folded rows of a slot and of a group.
    """

    width: int
    out: int
    a: int
    b: int
    c: int
    down: int
    up: int


@dataclass(frozen=True)
class BranchOffsets:
    """Adapters of one rank on all parts, in order; `column` is their first rank index among the folded branches."""

    parts: tuple[PartOffsets, ...]
    rank: int
    column: int


@dataclass(frozen=True)
class PartialSums:
    """Where a site that ran forward writes the partial sums of its gradients in the workspace.

    The site is parts span[0]..span[1] of the folded ones, over the rows of `groups`. From entry `t` on there are
    [chunks, parts, R, N] of T = dYᵀ P, and from `da` on [chunks, parts, R, K] of dA; a chunk has `block` rows. With
    `tile` > 0, dA is split by row tiles instead: number i + s is slot s in rows i · tile to (i + 1) · tile.
    """

    span: Span
    groups: RowGroups
    block: int
    tile: int = 0
    t: int = 0
    da: int = 0

    @property
    def counts(self) -> tuple[int, int]:
        """The number of partial sums of T, and of dA."""
        groups = self.groups
        count = groups.views * sum(-(-size // self.block) for size in groups.sizes)
        return count, -(-groups.rows // self.tile) + len(groups.sizes) if self.tile else count

    def bounds(self) -> tuple[Tensor, Tensor]:
        """First and end index, of dA for every slot [slots, 2] and of T for every group [groups, 2]; int32."""
        first = chunks(self.groups, self.block, torch.device("cpu")).bounds
        views = self.groups.views
        if not self.tile:
            by_slot = torch.stack([first[:-1:views], first[views::views]], 1)
        else:
            rows = self.groups.by_slot.groups()
            ranges = [(s + a // self.tile, s - (-b // self.tile)) if a < b else (0, 0) for s, _, a, b in rows]
            by_slot = torch.tensor(ranges, dtype=torch.int32).reshape(-1, 2)
        return by_slot, torch.stack([first[:-1], first[1:]], 1)


@device_table
def part_table(branch: BranchOffsets, device: torch.device) -> Tensor:
    """[parts, 7] int64, the fields of every `PartOffsets`."""
    return torch.tensor([list(vars(part).values()) for part in branch.parts], dtype=torch.int64).to(device)


@device_table
def reduction_table(
    branch: BranchOffsets, rank: int, written: tuple[PartialSums, ...], slots: int, views: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The reductions that give the gradients of a branch, one per rank row of every part, first of A and then of B.

    Args:
        rank: R of all branches together, the rows of a partial sum.

    Returns:
        reductions [2 · parts · R, 8] int64: (is B, size, offset of the first partial sum, its stride, first row in
        `bounds`, offset of the gradient, offset of B, offset of c); bounds [n, 2] int32: first and end index of the
        partial sums of every owner, site by site, after rows of zeros for the sites that did not run.
    """
    bounds = [torch.zeros(slots * views, 2, dtype=torch.int32)]
    for sums in written:
        bounds += sums.bounds()
    starts = list(accumulate(map(len, bounds), initial=0))
    rows: dict[bool, list[list[int]]] = {False: [], True: []}
    for number, part in enumerate(branch.parts):
        i = next((i for i, sums in enumerate(written) if sums.span[0] <= number < sums.span[1]), None)
        for is_up, size in ((False, part.width), (True, part.out)):
            for r in range(branch.rank):
                gradient = part.b + r if is_up else part.a + r * part.width
                offset = stride = start = 0
                if i is not None:
                    (first, end), row0 = written[i].span, written[i].t if is_up else written[i].da
                    offset = row0 + ((number - first) * rank + branch.column + r) * size
                    stride, start = (end - first) * rank * size, starts[1 + 2 * i + is_up]
                rows[is_up].append([is_up, size, offset, stride, start, gradient, part.b + r, part.c + r])
    reductions = torch.tensor(rows[False] + rows[True], dtype=torch.int64).reshape(-1, 8)
    return reductions.to(device), torch.cat(bounds).to(device)


class FoldedAdapters:
    """Folded adapters of all sites, and the partial sums of their gradients until the backward reduces them.

    Args:
        down: [slots, *], up: [slots · views, *], nan_flag: [slots, F]: every site is a contiguous part of each row.
        branches: concatenated along the rank; all have the same parts.
    """

    def __init__(
        self, down: Tensor, up: Tensor, nan_flag: Tensor, branches: Sequence[BranchOffsets], views: int
    ) -> None:
        self.down, self.up, self.nan_flag, self.views = down, up, nan_flag, views
        self.branches = tuple(branches)
        self.rank = sum(branch.rank for branch in branches)
        self.reserved: list[PartialSums] = []
        self.written: list[PartialSums] = []  # those that the current backward reached
        self._backward = -1  # autograd's id of that backward
        self._entries = 0  # of the workspace
        self._workspace: Tensor | None = None

    def site(self, span: Span) -> SiteAdapters:
        """The adapters of one site."""
        (first, end), part, RP, flags = span, self.branches[0].parts[span[0]], padded(self.rank), len(self.branches)
        L = (end - first) * RP
        down = self.down[:, part.down : part.down + L * part.width].unflatten(1, (L, part.width))
        up = self.up[:, part.up : part.up + L * part.out].unflatten(1, (L, part.out))
        return SiteAdapters(down, up, self.nan_flag[:, first * flags : end * flags], end - first, self.rank)

    def reserve(self, span: Span, groups: RowGroups, block: int, tile: int = 0) -> PartialSums:
        """Reserve workspace for a site that runs forward; arguments as in `PartialSums`.

        Raises:
            ValueError: it ran before in this forward.
        """
        if any(sums.span[0] < span[1] and span[0] < sums.span[1] for sums in self.reserved):
            raise ValueError("a linear with folded adapters runs once a forward")
        part, sums = self.branches[0].parts[span[0]], PartialSums(span, groups, block, tile, self._entries)
        t_entries, da_entries = (count * (span[1] - span[0]) * self.rank for count in sums.counts)
        sums = replace(sums, da=sums.t + _aligned(t_entries * part.out))
        self._entries = sums.da + _aligned(da_entries * part.width)
        self.reserved.append(sums)
        return sums

    def partial_sums(self, sums: PartialSums) -> tuple[Tensor, Tensor]:
        """T [count, parts, R, N] and dA [count, parts, R, K] of a site, fp32, which the caller has to write."""
        backward = torch._C._current_graph_task_id()
        if backward != self._backward:  # an earlier one may have ended before the reduction, with gradients of x only
            self._backward, self.written = backward, []
        self.written.append(sums)
        part, parts, workspace = self.branches[0].parts[sums.span[0]], sums.span[1] - sums.span[0], self.workspace()
        shapes = [(n, parts, self.rank, size) for n, size in zip(sums.counts, (part.out, part.width))]
        T, dA = (workspace[i : i + math.prod(shape)].view(shape) for i, shape in zip((sums.t, sums.da), shapes))
        return T, dA

    def workspace(self) -> Tensor:
        """fp32 entries for all partial sums; allocated when the backward begins and freed with `release`."""
        if self._workspace is None:
            self._workspace = self.down.new_empty(self._entries, dtype=torch.float32)
        return self._workspace

    def release(self) -> None:
        """Free the workspace at the end of the backward."""
        self._workspace, self.written = None, []


def _aligned(entries: int) -> int:
    """Rounded up to a multiple of 16 bytes of fp32."""
    return -(-entries // 4) * 4
