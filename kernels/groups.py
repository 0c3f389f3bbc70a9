"""The grouping of a batch's rows, and the tables that give it to the kernels.

Rows are sorted: slot by slot, and within a slot one group per *view*. All views of a slot have the same number of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

Run = tuple[int, int, int, int, int]
P = ParamSpec("P")
T = TypeVar("T")

CACHED_TABLES = 1024  # of each kind; at 32,000 rows the largest kind takes 128 KB each


def device_table(build: Callable[P, T]) -> Callable[P, T]:
    """Cache what `build` returned for its latest CACHED_TABLES arguments, so that a step copies nothing from the host.

    Those that a CUDA graph captured are kept permanently, because a graph reads them by their addresses. Building a
    table copies from the host, which is not allowed during capture: the same step has to run once before its capture.
    """
    recent = lru_cache(CACHED_TABLES)(build)
    captured: dict[object, T] = {}

    @wraps(build)
    def table(*args: P.args, **kwargs: P.kwargs) -> T:
        key = args, *kwargs.items()
        if captured and key in captured:
            return captured[key]
        result = recent(*args, **kwargs)  # type: ignore[arg-type]
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            captured[key] = result
        return result

    return table


@dataclass(frozen=True)
class RowGroups:
    """The rows of a batch by group: `sizes[s]` rows in every view of slot s, `views` groups per slot."""

    sizes: tuple[int, ...]
    views: int = 1

    def __post_init__(self) -> None:
        if self.views < 1 or min(self.sizes, default=0) < 0:
            raise ValueError(
                f"RowGroups: sizes {self.sizes} in {self.views} views; sizes are 0 or more, views 1 or more"
            )

    @property
    def rows(self) -> int:
        """Total rows: views · Σ sizes."""
        return self.views * sum(self.sizes)

    @property
    def runs(self) -> tuple[Run, ...]:
        """Consecutive slots of equal size, as (first slot, end slot, first row, end row, size); none is empty."""
        return _runs(self)

    def times(self, tokens: int) -> RowGroups:
        """The same groups with `tokens` rows for every row."""
        return self if tokens == 1 else RowGroups(tuple(n * tokens for n in self.sizes), self.views)

    def groups(self) -> Iterator[tuple[int, int, int, int]]:
        """Every group as (slot, view, first row, end row)."""
        row = 0
        for slot, size in enumerate(self.sizes):
            for view in range(self.views):
                yield slot, view, row, row + size
                row += size

    @property
    def by_slot(self) -> RowGroups:
        """The same rows with all views of a slot as one group."""
        return RowGroups(tuple(n * self.views for n in self.sizes))


@lru_cache(CACHED_TABLES)
def _runs(groups: RowGroups) -> tuple[Run, ...]:
    runs: list[Run] = []
    row = slot = 0
    while slot < len(groups.sizes):
        size, end = groups.sizes[slot], slot
        while end < len(groups.sizes) and groups.sizes[end] == size:
            end += 1
        rows = (end - slot) * groups.views * size
        if rows:
            runs.append((slot, end, row, row + rows, size))
        row, slot = row + rows, end
    return tuple(runs)


@dataclass(frozen=True)
class Chunks:
    """Groups split into runs of at most `block` rows, none of which crosses a group.

    table: [3, count] int32, of (group, first row, end row). bounds: [groups + 1] int32, the first chunk of every
    group; a group without rows has no chunk.
    """

    table: Tensor
    bounds: Tensor
    count: int


@device_table
def row_group(groups: RowGroups, device: torch.device) -> Tensor:
    """[M] int32, the group of every row."""
    sizes = torch.tensor(groups.sizes, dtype=torch.int64).repeat_interleave(groups.views)
    return torch.arange(len(sizes), dtype=torch.int32).repeat_interleave(sizes).to(device)


@device_table
def chunks(groups: RowGroups, block: int, device: torch.device) -> Chunks:
    """Split `groups` into chunks of `block` rows."""
    rows: list[tuple[int, int, int]] = []
    bounds = [0]
    for number, (_, _, first, end) in enumerate(groups.groups()):
        rows += [(number, row, min(row + block, end)) for row in range(first, end, block)]
        bounds.append(len(rows))
    table = torch.tensor(rows, dtype=torch.int32).reshape(-1, 3).T.contiguous()
    return Chunks(table.to(device), torch.tensor(bounds, dtype=torch.int32).to(device), len(rows))
