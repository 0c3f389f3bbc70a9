"""How rows belong to groups, and that chunks hold every row exactly once and never cross a group."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch

from fastdlp.kernels import groups as row_groups
from fastdlp.kernels.groups import RowGroups, chunks, device_table, row_group
from tests.awkward import GROUPS

ALL = {**GROUPS, "no slots": RowGroups(()), "three views": RowGroups((3, 0, 2), views=3)}
CPU = torch.device("cpu")


@pytest.mark.parametrize("groups", ALL.values(), ids=ALL)
def test_groups_follow_each_other(groups: RowGroups) -> None:
    listed = list(groups.groups())
    assert [(slot, view) for slot, view, _, _ in listed] == [
        (slot, view) for slot in range(len(groups.sizes)) for view in range(groups.views)
    ]
    assert [end - start for _, _, start, end in listed] == [n for n in groups.sizes for _ in range(groups.views)]
    for (*_, end), (_, _, start, _) in pairwise(listed):
        assert start == end
    assert groups.rows == (listed[-1][3] if listed else 0)


@pytest.mark.parametrize("groups", ALL.values(), ids=ALL)
def test_by_slot_joins_the_views(groups: RowGroups) -> None:
    joined = groups.by_slot
    assert (joined.views, joined.rows) == (1, groups.rows)
    for slot, _, start, end in joined.groups():
        views = [group for group in groups.groups() if group[0] == slot]
        assert (start, end) == (views[0][2], views[-1][3])


@pytest.mark.parametrize("groups", ALL.values(), ids=ALL)
def test_runs_hold_every_row_once(groups: RowGroups) -> None:
    rows = []
    for s0, s1, m0, m1, size in groups.runs:
        assert set(groups.sizes[s0:s1]) == {size}
        assert m1 - m0 == (s1 - s0) * groups.views * size > 0
        rows += range(m0, m1)
    assert rows == list(range(groups.rows))


@pytest.mark.parametrize("groups", ALL.values(), ids=ALL)
def test_row_group_numbers_every_row(groups: RowGroups) -> None:
    expected = [number for number, (_, _, start, end) in enumerate(groups.groups()) for _ in range(start, end)]
    table = row_group(groups, CPU)
    assert table.dtype == torch.int32
    assert table.tolist() == expected


@pytest.mark.parametrize("block", [1, 16, 63, 64, 1000])
@pytest.mark.parametrize("groups", ALL.values(), ids=ALL)
def test_chunks_hold_every_row_once(groups: RowGroups, block: int) -> None:
    cut = chunks(groups, block, CPU)
    table, bounds = cut.table.T.tolist(), cut.bounds.tolist()
    assert (cut.table.dtype, cut.bounds.dtype) == (torch.int32, torch.int32)
    assert cut.table.is_contiguous()
    assert cut.table.shape == (3, cut.count)
    assert [row for _, start, end in table for row in range(start, end)] == list(range(groups.rows))
    spans = [(start, end) for _, _, start, end in groups.groups()]
    for group, start, end in table:
        assert 0 < end - start <= block
        assert spans[group][0] <= start < end <= spans[group][1]
    assert (len(bounds), bounds[0], bounds[-1]) == (len(spans) + 1, 0, cut.count)
    for owner, (first, after) in enumerate(pairwise(bounds)):
        assert {group for group, _, _ in table[first:after]} <= {owner}
        rows = spans[owner][1] - spans[owner][0]
        assert (after > first) == (rows > 0)


def test_tables_are_built_once() -> None:
    """A CUDA graph keeps their addresses."""
    one, same = RowGroups((5, 4), views=2), RowGroups((5, 4), views=2)
    assert chunks(one, 16, CPU) is chunks(same, 16, CPU)
    assert row_group(one, CPU) is row_group(same, CPU)
    assert chunks(one, 16, CPU) is not chunks(one, 17, CPU)


def test_times_stretches_every_group() -> None:
    assert RowGroups((2, 0, 1), views=2).times(50) == RowGroups((100, 0, 50), views=2)
    groups = RowGroups((2, 3))
    assert groups.times(1) is groups


@pytest.mark.parametrize(("sizes", "views"), [((-1, 3), 1), ((2, -2), 2), ((3,), 0)])
def test_refuses_what_is_no_split(sizes: tuple[int, ...], views: int) -> None:
    with pytest.raises(ValueError, match="sizes are 0 or more, views 1 or more"):
        RowGroups(sizes, views)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of every table that was built; two are cached."""
    monkeypatch.setattr(row_groups, "CACHED_TABLES", 2)
    return []


def counted_tables(built: list[int]) -> Callable[[int], torch.Tensor]:
    @device_table
    def table(rows: int) -> torch.Tensor:
        built.append(rows)
        return torch.arange(rows)

    return table


def test_tables_are_kept_within_bounds(built: list[int]) -> None:
    table = counted_tables(built)
    first = weakref.ref(table(1))
    table(1)
    table(2)
    assert built == [1, 2]
    table(3)
    gc.collect()
    assert first() is None


def test_a_table_that_a_graph_reads_stays(built: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    table = counted_tables(built)
    before = table(1).data_ptr()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert table(1).data_ptr() == before
    monkeypatch.undo()
    for rows in range(2, 9):
        table(rows)
    assert table(1).data_ptr() == before
    assert built == list(range(1, 9))
