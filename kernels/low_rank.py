"""How the adapters of linears lie in memory where the kernels read them, and where the shares of their gradients go.

An adapter's rank is padded: RP is the next power of two of R, at least 16, the least that a tensor-core product takes.
So every row of P and Q, and every slice of a part, is a multiple of 32 bytes and needs no mask; the padding is zero.
Nothing here imports Triton.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from fastdlp.kernels.groups import RowGroups, chunks
from fastdlp.kernels.tables import device_table

LEAST_RANK = 16


def padded(rank: int) -> int:
    """RP of a rank R."""
    return max(LEAST_RANK, 1 << (rank - 1).bit_length())


@dataclass(frozen=True)
class SiteAdapters:
    """All slots' adapters of one linear, folded.

    down [slots, L, K]: A in the compute dtype, L = parts · RP. up [slots · views, L, N]: B' = (B · diag(c))ᵀ. Both are
    finite whatever the adapters hold; poison [slots, F] fp32 sums to NaN for a slot that held an entry that is not, and
    to 0 for the others. rank: R, without padding.
    """

    down: Tensor
    up: Tensor
    poison: Tensor
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
class Part:
    """One adapter of rank R on one part of one linear, by entries of a slot's row.

    A [R, K] from `a` on, B [N, R] from `b` on and c [R] from `c` on where they are trained; `down` and `up` say where
    its rows of A and B' begin in a slot's (a group's) row of the folded ones.
    """

    width: int
    out: int
    a: int
    b: int
    c: int
    down: int
    up: int


@dataclass(frozen=True)
class Branch:
    """One set of adapters on some linears, of one rank, in the order of the folded ones; `column`: its first rank."""

    parts: tuple[Part, ...]
    rank: int
    column: int


@dataclass(frozen=True)
class Use:
    """A linear that ran forward: parts first..end of the folded ones, over the rows of `groups`.

    Its shares of the gradients are [chunks, parts, R, N] of T = dYᵀ P from entry `t` of the workspace on, and
    [chunks, parts, R, K] of dA from entry `da` on; a chunk has `block` rows. Where `tile` is not 0, dA is not cut by
    chunks: share i + s is that of slot s in rows i · tile to (i + 1) · tile.
    """

    first: int
    end: int
    groups: RowGroups
    block: int
    tile: int
    t: int
    da: int

    @property
    def shares(self) -> tuple[int, int]:
        """How many of T, and how many of dA."""
        groups = self.groups
        cut = groups.views * sum(-(-size // self.block) for size in groups.sizes)
        return cut, -(-groups.rows // self.tile) + len(groups.sizes) if self.tile else cut

    def bounds(self) -> tuple[Tensor, Tensor]:
        """First share and end, of dA for every slot [slots, 2] and of T for every group [groups, 2]; int32."""
        first = chunks(self.groups, self.block, torch.device("cpu")).bounds
        views = self.groups.views
        if not self.tile:
            by_slot = torch.stack([first[:-1:views], first[views::views]], 1)
        else:
            rows = self.groups.by_slot.groups()
            cut = [(s + a // self.tile, s - (-b // self.tile)) if a < b else (0, 0) for s, _, a, b in rows]
            by_slot = torch.tensor(cut, dtype=torch.int32).reshape(-1, 2)
        return by_slot, torch.stack([first[:-1], first[1:]], 1)


@device_table
def part_table(branch: Branch, device: torch.device) -> Tensor:
    """[parts, 7] int64, the fields of every `Part`."""
    return torch.tensor([list(vars(part).values()) for part in branch.parts], dtype=torch.int64).to(device)


LINE_FIELDS = 8


@device_table
def line_table(
    branch: Branch, rank: int, uses: tuple[Use, ...], slots: int, views: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """What is summed to the gradients of a branch, rank row by rank row, first those of A and then those of B.

    Args:
        rank: R of all branches together, the rows of a share.

    Returns:
        lines [2 · parts · R, 8] int64: (is B, size, first share, entries from share to share, first of its bounds,
        where the gradient goes, where B begins, where c lies); bounds [n, 2] int32: first share and end of every owner,
        use by use, behind zeros that stand for a linear that was not used.
    """
    tables = [torch.zeros(slots * views, 2, dtype=torch.int32)]
    for use in uses:
        tables += use.bounds()
    starts = list(accumulate(map(len, tables), initial=0))
    rows: dict[bool, list[list[int]]] = {False: [], True: []}
    for number, part in enumerate(branch.parts):
        at = next((i for i, use in enumerate(uses) if use.first <= number < use.end), None)
        for up, size in ((False, part.width), (True, part.out)):
            for r in range(branch.rank):
                goes = part.b + r if up else part.a + r * part.width
                if at is None:
                    share = step = start = 0
                else:
                    use = uses[at]
                    row = (number - use.first) * rank + branch.column + r
                    share = (use.t if up else use.da) + row * size
                    step, start = (use.end - use.first) * rank * size, starts[1 + 2 * at + up]
                rows[up].append([up, size, share, step, start, goes, part.b + r, part.c + r])
    lines = torch.tensor(rows[False] + rows[True], dtype=torch.int64).reshape(-1, LINE_FIELDS)
    return lines.to(device), torch.cat(tables).to(device)


class Folded:
    """Folded adapters of many linears, and the uses that the backward has to sum up.

    Args:
        down: [slots, *], up: [slots · views, *], poison: [slots, F]: every linear's in a stretch of each row.
        branches: stacked along the rank; all of them have the same parts.
    """

    def __init__(self, down: Tensor, up: Tensor, poison: Tensor, branches: Sequence[Branch], views: int) -> None:
        self.down, self.up, self.poison, self.views = down, up, poison, views
        self.branches = tuple(branches)
        self.rank = sum(branch.rank for branch in branches)
        self.uses: list[Use] = []
        self.written: list[Use] = []  # of them, those that this backward reached
        self._backward = -1  # autograd's number of the one that wrote them
        self._taken = 0  # entries of the workspace
        self._workspace: Tensor | None = None

    def site(self, first: int, end: int) -> SiteAdapters:
        """Parts first..end, which belong to one linear."""
        part, RP, count = self.branches[0].parts[first], padded(self.rank), end - first
        L, each = count * RP, len(self.branches)
        down = self.down[:, part.down : part.down + L * part.width].unflatten(1, (L, part.width))
        up = self.up[:, part.up : part.up + L * part.out].unflatten(1, (L, part.out))
        return SiteAdapters(down, up, self.poison[:, first * each : end * each], count, self.rank)

    def use(self, first: int, end: int, groups: RowGroups, block: int, tile: int = 0) -> Use:
        """Reserve the shares of a linear that runs forward; arguments as in `Use`.

        Raises:
            ValueError: it ran before in this forward.
        """
        if any(use.first < end and first < use.end for use in self.uses):
            raise ValueError("a linear with folded adapters runs once a forward")
        part = self.branches[0].parts[first]
        use = Use(first, end, groups, block, tile, self._taken, self._taken)
        of_t, of_da = (count * (end - first) * self.rank for count in use.shares)
        use = replace(use, da=use.t + _rounded(of_t * part.out))
        self._taken = use.da + _rounded(of_da * part.width)
        self.uses.append(use)
        return use

    def shares(self, use: Use) -> tuple[Tensor, Tensor]:
        """T [shares, parts, R, N] and dA [shares, parts, R, K] of a use, fp32, to be written before they are summed."""
        backward = torch._C._current_graph_task_id()
        if backward != self._backward:  # an earlier one may have ended before the sum, as where x alone is asked for
            self._backward, self.written = backward, []
        self.written.append(use)
        part, (of_t, of_da), each = self.branches[0].parts[use.first], use.shares, (use.end - use.first, self.rank)
        return self._stretch(use.t, of_t, *each, part.out), self._stretch(use.da, of_da, *each, part.width)

    def _stretch(self, first: int, *shape: int) -> Tensor:
        return self.workspace()[first : first + math.prod(shape)].view(shape)

    def workspace(self) -> Tensor:
        """Room for the shares of all uses so far; made when the backward begins, and freed with `release`."""
        if self._workspace is None:
            self._workspace = self.down.new_empty(self._taken, dtype=torch.float32)
        return self._workspace

    def release(self) -> None:
        """Free the workspace: the backward is done."""
        self._workspace, self.written = None, []


def _rounded(entries: int) -> int:
    """Up to a multiple of 16 bytes of fp32."""
    return -(-entries // 4) * 4
