"""Tuning: the choice from timings, the table's text, and what is measured, in Triton's interpreter where no GPU is."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

import pytest
import torch

from fastdlp.adapters.branches import TowerShape
from fastdlp.bench import tune
from fastdlp.bench.common import Times
from fastdlp.bench.tune import Block, Timing, choose, compile_ahead, measure_kernel, replaced
from fastdlp.errors import FastdlpError
from fastdlp.kernels.tiles import Tile, table, tile_for

SMALL, LARGE = Tile(blocks={"BLOCK_M": 16}), Tile(blocks={"BLOCK_M": 64}, warps=8, stages=3)
LIBRARY = Tile(variant="torch")
SHAPE = TowerShape(1, 48, 96, 32)
NAMES = {"small": SMALL, "large": LARGE, "library": LIBRARY}


def timings(**ms: dict[int, float]) -> list[Timing]:
    """Of tiles by name, from {width: ms}."""
    return [(NAMES[name], {(96, width): value for width, value in of.items()}) for name, of in ms.items()]


def test_one_tile_for_a_number_of_rows() -> None:
    rows = choose("product", 2, 512, timings(small={48: 1.0}, large={48: 3.0}, library={48: 2.0}))
    assert rows == [
        {"kernel": "product", "itemsize": [2], "rows_to": 512, "blocks": {"BLOCK_M": 16}, "warps": 4, "stages": 2}
    ]
    rows = choose("product", 2, None, timings(small={48: 3.0}, large={48: 1.0}, library={48: 2.0}))
    assert rows == [{"kernel": "product", "itemsize": [2], "blocks": {"BLOCK_M": 64}, "warps": 8, "stages": 3}]


def test_a_shape_gets_its_own_tile_only_where_it_wins_clearly() -> None:
    of_library = {48: 1.10, 64: 0.98, 80: 0.96}  # 2 % are noise
    own, general = choose("product", 2, None, timings(small=dict.fromkeys(of_library, 1.0), library=of_library))
    assert own == {"kernel": "product", "itemsize": [2], "variant": "torch", "out": 96, "width": 80}
    assert general["blocks"] == {"BLOCK_M": 16}
    assert "width" not in general


def test_general_is_the_least_geometric_mean() -> None:
    of_shapes = timings(small={48: 1.0, 64: 1.5}, large={48: 2.0, 64: 1.0}, library={48: 0.1, 64: 20.0})
    *own, general = choose("product", 2, None, of_shapes)
    assert general["blocks"] == {"BLOCK_M": 16}
    assert [(row.get("variant"), row["width"]) for row in own] == [("torch", 48), (None, 64)]
    with pytest.raises(FastdlpError, match="no tile of product ran on every shape"):
        choose("product", 2, None, [])


def test_a_chosen_row_is_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastdlp.kernels import tiles

    described = Tile("descriptor", {"BLOCK_M": 16})
    rows = choose("product", 2, 512, [(described, {(0, 48): 1.0})]) + choose("product", 2, None, timings(large={48: 1}))
    monkeypatch.setattr(tiles, "table", lambda: {"interpreter": {"rows": rows}})
    tiles._lookup.cache_clear()
    found = [tile_for("product", torch.device("cpu"), 2, rows=m, width=48) for m in (512, 513)]
    tiles._lookup.cache_clear()
    assert found == [described, LARGE]


def test_new_rows_take_the_place_of_the_old() -> None:
    a, b, c = ({"kernel": name, "itemsize": [2, 4]} for name in "abc")
    new, other = ([{"kernel": "b", "itemsize": [size], "warps": 8}] for size in (2, 4))
    assert replaced([a, b, c], new) == [a, b | {"itemsize": [4]}, *new, c]
    assert replaced(replaced([a, b, c], new), other) == [a, *new, *other, c]


def test_other_numbers_of_rows_stay_and_the_fewest_come_first() -> None:
    few, many, general = ({"kernel": "b", "itemsize": [2], **to} for to in ({"rows_to": 8}, {"rows_to": 64}, {}))
    own = [{"kernel": "b", "itemsize": [2], "rows_to": 64, "width": 48}, {**many, "warps": 8}]
    assert replaced([few, many, general], own) == [few, *own, general]
    assert replaced([many, general], [few]) == [few, many, general]


def test_the_table_keeps_its_text() -> None:
    text = tune.TABLE.read_text()
    assert tune.format_table(json.loads(text)) == text
    assert tune.format_table(table()) == text


def test_every_kernel_is_tuned_or_kept() -> None:
    names = {row["kernel"] for entry in table().values() for row in entry["rows"]}
    assert names == {*tune.LAUNCHERS, *tune.KEPT}
    for kernel in tune.LAUNCHERS:
        for itemsize in (2, 4):
            (row,) = [row for row in table()["interpreter"]["rows"] if row["kernel"] == kernel]  # the one never tuned
            for tile in tune.candidates(kernel, itemsize):
                if tile.variant == "triton":
                    assert set(tile.blocks) == set(row["blocks"])
                    assert tile.chunk == row.get("chunk", 0) == 0


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    def once(call: Callable[[], Any], device: torch.device, milliseconds: float, graph: bool) -> Times:
        call()
        return Times(1.0, 1.0, 1.0)

    monkeypatch.setattr(tune, "measure", once)
    monkeypatch.setattr(tune, "SHAPES", {"tiny": SHAPE})
    monkeypatch.setattr(tune, "CLASSES", {None: (2, 4, 3)})
    tune.make_block.cache_clear()


def measured(kernel: str, tried: list[Tile], seconds: float = 60.0) -> tuple[list[Timing], list[str], list[str]]:
    """Timings, notes and failures."""
    cpu, deadline = torch.device("cpu"), time.monotonic() + seconds
    result: dict[str, Any] = {"notes": [], "failed": []}
    found = measure_kernel(kernel, "fp32", None, tried, cpu, deadline, result, lambda text: None)
    return found, result["notes"], result["failed"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="for Triton's interpreter")
@pytest.mark.usefixtures("untimed")
@pytest.mark.parametrize("kernel", ["product", "product_backward_activated", "adapter_gradients", "norm_backward"])
def test_a_kernel_agrees_with_torch_in_other_tiles(kernel: str) -> None:
    tile = tile_for(kernel, torch.device("cpu"), 4)
    tried = [Tile(blocks=tile.blocks | {"BLOCK_M": 16})]
    if kernel.startswith("product"):
        tried.append(LIBRARY)
    found, *lines = measured(kernel, tried)
    assert [tile for tile, _ in found] == tried
    assert lines == [[], []]
    for _, ms in found:
        for out, width in ms:  # as the launcher would look it up
            assert tile_for(kernel, torch.device("cpu"), 4, 48, out, width)


@pytest.fixture
def faked(untimed: None, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replace a block's pass by a function of the tile in which it runs; right are ones."""

    def replace(run: Callable[[Tile], list[torch.Tensor]]) -> None:
        def one(backend: str) -> list[torch.Tensor]:
            return run(tile_for("down", torch.device("cpu"), 4))

        monkeypatch.setattr(tune, "make_block", lambda *of: Block("tiny, 48 rows", one, [torch.ones(3)]))

    return replace


@pytest.mark.parametrize("value", [1.001, float("nan")])
def test_a_wrong_tile_is_not_timed(faked: Callable[..., None], value: float) -> None:
    faked(lambda tile: [torch.tensor([1.0, value if tile is LARGE else 1.0, 1.0])])
    found, notes, (line,) = measured("down", [SMALL, LARGE])
    assert ([tile for tile, _ in found], notes) == ([SMALL], [])
    assert line.startswith("down in fp32 with M 64, 8 warps, 3 stages computes tiny, 48 rows, wrongly: relative error")


@pytest.mark.usefixtures("untimed")
def test_what_a_tile_leaves_unwritten_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory is filled with NaN; the rest of the block is right."""
    from fastdlp.kernels import half_blocks

    def partial_backward(dh: torch.Tensor, x: torch.Tensor, *others: Any) -> torch.Tensor:
        dx = right(dh, x, *others)
        unwritten = torch.empty_like(dx)
        unwritten[:-1] = dx[:-1]
        return unwritten

    right = half_blocks.norm_backward
    monkeypatch.setattr(half_blocks, "norm_backward", partial_backward)
    found, _, (line,) = measured("norm_backward", [tile_for("norm_backward", torch.device("cpu"), 4)])
    assert found == []
    assert line.endswith("relative error nan")


def test_a_tile_that_does_not_fit_is_dropped_with_a_line(faked: Callable[..., None]) -> None:
    from triton.runtime.errors import OutOfResources

    def run(tile: Tile) -> list[torch.Tensor]:
        if tile is LARGE:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return [torch.ones(3)]

    faked(run)
    found, (line,), failed = measured("down", [SMALL, LARGE])
    assert ([tile for tile, _ in found], failed) == ([SMALL], [])
    assert line.startswith("down, fp32: M 64, 8 warps, 3 stages does not run here (out of resource: shared memory")


def test_another_error_is_not_swallowed(faked: Callable[..., None]) -> None:
    def run(tile: Tile) -> list[torch.Tensor]:
        raise RuntimeError("an illegal memory access was encountered")

    faked(run)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        measured("down", [SMALL])


@pytest.mark.usefixtures("untimed")
def test_time_runs_out() -> None:
    with pytest.raises(TimeoutError):
        measured("down", [SMALL], seconds=-1.0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A GPU of architecture 90 by the name of X, on which the library's products and LARGE tiles win."""

    def measured(kernel: str, precision: str, rows_to: int | None, *arguments: Any) -> list[Timing]:
        if (kernel, precision, rows_to) == ("norm_backward", "fp32", None):
            raise TimeoutError
        if kernel == "adapter_gradients" and precision == "fp32":
            return []
        return timings(**{"library" if kernel.startswith("product") else "large": {48: 1.0}})

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
    assert rows["product", 2] == {"kernel": "product", "itemsize": [2], "variant": "torch"}  # the last, of all rows
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
    assert len(saved) == len(tune.CLASSES) * len(tune.LAUNCHERS) + 1
    before = table()["90"]
    first = [row for row in saved[0]["90"]["rows"] if row not in before["rows"]]
    assert first == [{"kernel": "product", "itemsize": [2], "variant": "torch"}]
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
    jobs = [("down", tile, SHAPE, "fp32") for tile in (tile_for("down", device, 4), Tile(blocks={}))]
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
    assert {kernel for kernel, *_ in given} == set(tune.LAUNCHERS)
    widths = [shape.width for _, _, shape, _ in given]
    assert widths == sorted(widths)
    assert set(widths) == {768, 1024}


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu(cli: Callable[..., tuple[int, str, str]]) -> None:
    before = tune.TABLE.read_bytes()
    code, out, err = cli("bench", "tune")
    assert (code, out) == (2, "")
    assert err == "fastdlp: bench tune measures a CUDA GPU and torch sees none here: run it on one\n"
    assert tune.TABLE.read_bytes() == before
