"""Tuning: the choice from timings, the table's text, and what is measured, in Triton's interpreter where no GPU is."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch

from fastdlp.adapters.branches import TowerShape
from fastdlp.bench import tune
from fastdlp.bench.common import Times
from fastdlp.bench.each_tile import Work
from fastdlp.bench.kernels import ImageTower
from fastdlp.bench.tune import Notes, OutOfTime, RowClass, Timing, choose, compile_ahead, measure_kernel, replaced
from fastdlp.errors import FastdlpError
from fastdlp.kernels.tiles import Tile, table, tile_for

SMALL, LARGE = Tile(blocks={"BLOCK_M": 16}), Tile(blocks={"BLOCK_M": 64}, warps=8, stages=3)
LIBRARY = Tile(form="torch")
TINY = {"tiny": ImageTower(TowerShape(1, 48, 96, 32), 3)}
ROWS = RowClass(None, 2, 8, 3)


def timings(ms: dict[tuple[int | None, int], dict[str, float]]) -> list[Timing]:
    """From {(rows_to, width): {tile: ms}}."""
    tiles = {"small": SMALL, "large": LARGE, "library": LIBRARY}
    return [
        Timing(rows_to, 96, width, tiles[name], value)
        for (rows_to, width), of in ms.items()
        for name, value in of.items()
    ]


def test_one_tile_for_each_number_of_rows() -> None:
    rows = choose(
        "product",
        2,
        timings(
            {
                (None, 48): {"small": 3.0, "large": 1.0, "library": 2.0},
                (512, 48): {"small": 1.0, "large": 3.0, "library": 2.0},
            }
        ),
    )
    assert rows == [
        {"kernel": "product", "itemsize": [2], "rows_to": 512, "blocks": {"BLOCK_M": 16}, "warps": 4, "stages": 2},
        {"kernel": "product", "itemsize": [2], "blocks": {"BLOCK_M": 64}, "warps": 8, "stages": 3},
    ]


def test_a_shape_gets_its_own_tile_only_where_it_wins_clearly() -> None:
    of_shapes = {
        (None, 48): {"small": 1.00, "library": 1.10},
        (None, 64): {"small": 1.00, "library": 0.98},  # 2 %: noise
        (None, 80): {"small": 1.00, "library": 0.96},
    }
    own, general = choose("product", 2, timings(of_shapes))
    assert own == {"kernel": "product", "itemsize": [2], "form": "torch", "out": 96, "width": 80}
    assert general["blocks"] == {"BLOCK_M": 16}
    assert "width" not in general


def test_general_is_the_least_loss_and_ran_everywhere() -> None:
    of_shapes = {
        (None, 48): {"small": 1.0, "large": 2.0, "library": 0.1},
        (None, 64): {"small": 1.5, "large": 1.0},
    }
    *own, general = choose("product", 2, timings(of_shapes))
    assert general["blocks"] == {"BLOCK_M": 16}
    assert [row["width"] for row in own] == [48, 64]
    with pytest.raises(FastdlpError, match="no tile of product ran on every shape"):
        choose("product", 2, timings({(None, 48): {"small": 1.0}, (None, 64): {"large": 1.0}}))
    with pytest.raises(FastdlpError, match="no tile of product ran on every shape"):
        choose("product", 2, [])


def test_linears_that_share_a_row_are_weighed_together() -> None:
    shared = [Timing(None, 0, 48, tile, ms) for tile, ms in ((SMALL, 1.0), (LARGE, 3.0), (SMALL, 4.0), (LARGE, 1.0))]
    assert [row["blocks"] for row in choose("down", 2, shared)] == [{"BLOCK_M": 64}]


def test_a_chosen_row_is_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastdlp.kernels import tiles

    rows = choose(
        "product", 2, [Timing(512, 0, 48, replace(SMALL, form="descriptor"), 1.0), Timing(None, 0, 48, LARGE, 1.0)]
    )
    monkeypatch.setattr(tiles, "table", lambda: {"interpreter": {"rows": rows}})
    tiles._lookup.cache_clear()
    found = [tile_for("product", torch.device("cpu"), 2, rows=m, width=48) for m in (512, 513)]
    tiles._lookup.cache_clear()
    assert found == [replace(SMALL, form="descriptor"), LARGE]


def test_new_rows_take_the_place_of_the_old() -> None:
    a, b, c = ({"kernel": name, "itemsize": [2, 4]} for name in "abc")
    new = [{"kernel": "b", "itemsize": [2], "warps": 8}]
    assert replaced([a, b, c], "b", 2, None, new) == [a, b | {"itemsize": [4]}, *new, c]
    assert replaced(replaced([a, b, c], "b", 2, None, new), "b", 4, None, []) == [a, *new, c]
    assert replaced([a], "b", 2, None, new) == [a, *new]


def test_other_numbers_of_rows_stay_and_the_fewest_come_first() -> None:
    few, many, general = ({"kernel": "b", "itemsize": [2], **to} for to in ({"rows_to": 8}, {"rows_to": 64}, {}))
    own = [{"kernel": "b", "itemsize": [2], "rows_to": 64, "width": 48}, {**many, "warps": 8}]
    assert replaced([few, many, general], "b", 2, 64, own) == [few, *own, general]
    assert replaced([many, general], "b", 2, 8, [few]) == [few, many, general]


def test_the_table_keeps_its_text() -> None:
    text = tune.TABLE.read_text()
    assert tune.format_table(json.loads(text)) == text
    assert tune.format_table(table()) == text


def test_every_kernel_is_tuned_or_kept() -> None:
    names = {row["kernel"] for entry in table().values() for row in entry["rows"]}
    assert names == {*tune.LINEARS, *tune.NO_TILE}
    for kernel in tune.LINEARS:
        for itemsize in (2, 4):
            (row,) = [row for row in table()["interpreter"]["rows"] if row["kernel"] == kernel]  # the one never tuned
            for tile in tune.candidates(kernel, itemsize):
                if tile.form == "triton":
                    assert set(tile.blocks) == set(row["blocks"])
                    assert bool(tile.chunk) == ("chunk" in row)


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    def once(call: Callable[[], Any], device: torch.device, milliseconds: float, graph: bool) -> Times:
        call()
        return Times(1.0, 1.0, 1.0)

    monkeypatch.setattr(tune, "measure", once)


@pytest.mark.usefixtures("untimed")
@pytest.mark.parametrize("kernel", tune.LINEARS)
def test_every_launcher_agrees_with_the_library(device: torch.device, kernel: str) -> None:
    tried = [tile_for(kernel, device, 4)]
    if kernel.startswith("product"):
        tried.append(LIBRARY)
    notes = Notes()
    deadline = time.monotonic() + 60
    found = measure_kernel(kernel, "fp32", TINY, ROWS, tried, device, deadline, notes, lambda text: None)
    assert len(found) == len(tune.LINEARS[kernel]) * len(tried)
    assert notes == Notes()
    for timing in found:  # as the launcher would look it up
        assert tile_for(kernel, device, 4, 96, timing.out, timing.width)


def work(run: Callable[[Tile], list[torch.Tensor]]) -> Callable[..., Work]:
    return lambda *arguments: Work(96, 48, run, lambda: [torch.ones(3)])


def measured(tried: list[Tile], seconds: float = 60.0) -> tuple[list[Timing], Notes]:
    cpu, deadline, notes = torch.device("cpu"), time.monotonic() + seconds, Notes()
    return measure_kernel("down", "fp32", TINY, ROWS, tried, cpu, deadline, notes, lambda text: None), notes


@pytest.mark.usefixtures("untimed")
@pytest.mark.parametrize("value", [1.001, float("nan")])
def test_a_wrong_tile_is_not_timed(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    monkeypatch.setattr(tune, "make_work", work(lambda tile: [torch.full((3,), value if tile is LARGE else 1.0)]))
    found, notes = measured([SMALL, LARGE])
    assert {timing.tile is SMALL for timing in found} == {True}
    (line,) = notes.wrong
    assert line.startswith("down in fp32 with M 64, 8 warps, 3 stages computes tiny out, 96 rows, wrongly: relative er")


@pytest.mark.usefixtures("untimed")
def test_a_tile_that_does_not_fit_is_dropped_with_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.errors import OutOfResources

    def run(tile: Tile) -> list[torch.Tensor]:
        if tile is LARGE:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return [torch.ones(3)]

    monkeypatch.setattr(tune, "make_work", work(run))
    found, notes = measured([SMALL, LARGE])
    assert {timing.tile is SMALL for timing in found} == {True}
    (line,) = notes.dropped
    assert line.startswith("down, fp32: M 64, 8 warps, 3 stages does not run here (out of resource: shared memory")


@pytest.mark.usefixtures("untimed")
def test_another_error_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(tile: Tile) -> list[torch.Tensor]:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(tune, "make_work", work(run))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        measured([SMALL])


def test_time_runs_out() -> None:
    with pytest.raises(OutOfTime):
        measured([SMALL], seconds=-1.0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A GPU of architecture 90 by the name of X, on which the library's products and LARGE tiles win."""

    def measured(kernel: str, precision: str, towers: Any, rows: RowClass, *arguments: Any) -> list[Timing]:
        if (kernel, precision, rows.rows_to) == ("norm_backward", "fp32", None):
            raise OutOfTime
        if kernel == "adapter_gradients" and precision == "fp32":
            return []
        best = LIBRARY if kernel.startswith("product") else LARGE
        return [Timing(rows.rows_to, 96, 48, best, 1.0)]

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    facts = {"device": "X", "commit": "abc", "versions": {"torch": "2", "triton": "3"}}
    monkeypatch.setattr(tune.common, "facts", lambda *arguments: facts)
    monkeypatch.setattr(tune, "measure_kernel", measured)
    return torch.device("cuda")


def tuned(gpu: torch.device, *precisions: str, **more: Any) -> dict[str, Any]:
    return tune.tune(gpu, precisions, 1.0, lambda text: None, processes=0, **more)


def test_only_this_architecture_is_written(gpu: torch.device) -> None:
    result = tuned(gpu, "bf16", "fp32")
    new, before = result["tables"], table()
    assert list(new) == list(before)
    assert {name: new[name] for name in new if name != "90"} == {name: before[name] for name in before if name != "90"}
    rows = {(row["kernel"], size): row for row in new["90"]["rows"] for size in row["itemsize"]}
    assert rows["product", 2] == {"kernel": "product", "itemsize": [2], "form": "torch"}  # the last, of all rows
    limits = [row.get("rows_to") for row in new["90"]["rows"] if row["kernel"] == "product" and row["itemsize"] == [2]]
    assert limits == [512, 4096, None]
    assert rows["down", 4]["blocks"] == LARGE.blocks
    old = {(row["kernel"], size): row for row in before["90"]["rows"] for size in row["itemsize"]}
    assert rows["norm_backward", 4]["blocks"] == old["norm_backward", 4]["blocks"]
    measured = new["90"]["measured"]
    assert list(measured) == ["device", "torch", "triton", "commit", "date", "itemsize"]
    assert (measured["device"], measured["commit"], measured["itemsize"]) == ("X", "abc", [2])
    assert "norm_backward, fp32: rows kept, 1 minutes were over" in result["notes"]
    assert result["failed"][0] == (
        "adapter_gradients, fp32: no tile of adapter_gradients ran on every shape: give it candidates that fit this GPU"
    )
    assert rows["adapter_gradients", 4] == old["adapter_gradients", 4]


def test_the_table_is_written_as_it_grows(gpu: torch.device) -> None:
    saved: list[dict[str, Any]] = []
    result = tuned(gpu, "bf16", save=lambda tables: saved.append(json.loads(json.dumps(tables))))
    assert len(saved) == len(tune.CLASSES) * len(tune.LINEARS) + 1
    before = table()["90"]
    first = [row for row in saved[0]["90"]["rows"] if row not in before["rows"]]
    assert first == [{"kernel": "product", "itemsize": [2], "form": "torch"}]
    assert all(tables["90"]["measured"] == before["measured"] for tables in saved[:-1])
    assert saved[-1] == result["tables"]


def test_what_was_not_finished_is_not_called_measured(gpu: torch.device) -> None:
    entry = tuned(gpu, "fp32")["tables"]["90"]
    assert entry["measured"] == table()["90"]["measured"]


def test_a_new_architecture_starts_from_the_fallback(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    tables = tuned(gpu, "bf16")["tables"]
    assert {row["kernel"] for row in tables["120"]["rows"]} == {row["kernel"] for row in tables["80"]["rows"]}
    assert table().keys() == tables.keys() - {"120"}


@pytest.mark.slow
def test_candidates_are_compiled_in_other_processes(device: torch.device) -> None:
    case = next(tune._cases("down", TINY, ROWS))
    jobs = [("down", "fp32", case, tile) for tile in (tile_for("down", device, 4), Tile(blocks={}))]
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert compile_ahead(jobs, device, pool, 100.0) == 1  # the other tile has no blocks
    with ThreadPoolExecutor(1) as pool:
        pool.submit(time.sleep, 0.2)
        assert compile_ahead(jobs, device, pool, 0.0) == 0


def test_all_candidates_are_compiled_first(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(tune, "compile_ahead", lambda jobs, *others: given.extend(jobs) or len(jobs))
    notes = tune.tune(gpu, ["bf16"], 1.0, lambda text: None, processes=1)["notes"]
    assert f"{len(given)} of {len(given)} candidates were compiled ahead" in notes
    assert {kernel for kernel, *_ in given} == set(tune.LINEARS)
    assert [case.model for *_, case, _ in given] == sorted(case.model for *_, case, _ in given)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu(cli: Callable[..., tuple[int, str, str]]) -> None:
    before = tune.TABLE.read_bytes()
    code, out, err = cli("bench", "tune")
    assert (code, out) == (2, "")
    assert err == "fastdlp: bench tune measures a CUDA GPU and torch sees none here: run it on one\n"
    assert tune.TABLE.read_bytes() == before
