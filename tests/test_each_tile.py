"""Every tile of the table against fp64, on a GPU those of its architecture in 5,120 rows: before anything is timed."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdlp.adapters.branches import TowerShape
from fastdlp.bench import each_tile
from fastdlp.bench.each_tile import CASE, LARGE, LAUNCHERS, Case, describe, table_rows, tiled
from fastdlp.clip.tower import Tower
from fastdlp.engine.device import DTYPES
from fastdlp.kernels import tiles
from fastdlp.kernels.launch import recording
from fastdlp.kernels.tiles import Tile, forced

GPU, CPU = torch.cuda.is_available(), torch.device("cpu")
DEVICE = torch.device("cuda") if GPU else CPU
# Triton's interpreter is slow, and computes bf16 products wrongly. Its table has one row a kernel: one pass takes all.
SHAPE = CASE if GPU else Case(TowerShape(1, width=48, mlp=80, embed=16), clients=2, images=8, tokens=5)
# Two blocks, because the tower's output does not depend on the first token of the last one.
SHAPE = replace(SHAPE, shape=replace(SHAPE.shape, layers=2))
ROWS = table_rows(DEVICE) if GPU else [row for row in table_rows(DEVICE) if row[1] == "fp32"][:1]
# Of the largest entry. Two blocks by torch are off by 6e-6 and 2.2e-2; TF32 would be by 3e-4.
TOLERANCE = {"fp32": 5e-5, "bf16": 8e-2}


@pytest.fixture(scope="module")
def right() -> dict[str, list[Tensor]]:
    """Outputs and gradients by torch on the same operands in fp64, by precision."""
    features = Tower.features

    def in_doubles(self: Tower, x: Tensor, *others: Any, **named: Any) -> Tensor:
        return features(self.to(x.device, torch.float64), x.double(), *others, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tower, "features", in_doubles)
        return {name: SHAPE.run(name, DEVICE)("torch") for name in dict.fromkeys(row[1] for row in ROWS)}


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]}, {row[1]}, {describe(row[2])}")
def test_tile(row: tuple[str, str, Tile], right: dict[str, list[Tensor]]) -> None:
    """By the largest entry, so that one bad row is seen."""
    kernel, precision, tile = row
    run = SHAPE.run(precision, DEVICE, ["mlp"])
    with tiled(kernel, tile, partial(run, "triton")) as (outputs, calls):
        assert calls
    for ours, reference in zip(outputs, right[precision], strict=True):
        assert ours.shape == reference.shape
        assert (ours.double() - reference).abs().max() <= TOLERANCE[precision] * reference.abs().max()


def test_rows_are_all_of_the_table() -> None:
    rows = tiles.table()["90"]["rows"]
    with tiles.assume("90"):
        found = [(kernel, tile) for kernel, _, tile in table_rows(DEVICE)]
    for row in rows:
        tile = tiles.tile_of(row)
        expected = len(row["itemsize"]) if row["kernel"] in LAUNCHERS and tile.variant != "torch" else 0
        assert found.count((row["kernel"], tile)) >= expected
    assert {kernel for kernel, _ in found} <= LAUNCHERS.keys()


def test_shapes_of_the_program() -> None:
    assert (CASE.rows, CASE.rows // CASE.clients // 2, CASE.shape.mlp, CASE.shape.width) == (5120, 160, 256, 192)
    assert (LARGE.rows, LARGE.shape.width) == (10 * 2 * 32 * 50, 768)


@pytest.mark.skipif(GPU, reason="for Triton's interpreter")
@pytest.mark.parametrize(
    ("kernel", "shapes"),
    {
        "product": {(8, 24, 8): 1, (8, 8, 8): 1, (8, 8, 16): 1},
        "product_activated": {(8, 16, 8): 1},
        "product_backward": {(8, 8, 24): 1, (8, 8, 8): 1, (8, 8, 16): 1},
        "product_backward_activated": {(8, 16, 8): 1},
        "adapter_gradients": {(8, 24, 8): 1, (8, 8, 8): 1, (8, 16, 8): 1, (8, 8, 16): 1},
        "norm_down": {(8, 0, 8): 2},
        "down": {(8, 0, 8): 1, (8, 0, 16): 1},
        "norm_backward": {(8, 0, 8): 2},
    }.items(),
)
def test_calls_are_those_of_the_kernel(kernel: str, shapes: dict[tuple[int, int, int], int]) -> None:
    """Of every linear that launches it, by what is looked up; repeated, they launch the kernel in the same tile."""
    case, tile = Case(TowerShape(1, width=8, mlp=16, embed=8), 1, 2, 2), tiles.tile_for(kernel, CPU, 4)
    tile = replace(tile, blocks=tile.blocks | {"BLOCK_M": 16})
    with tiled(kernel, tile, partial(case.run("fp32", CPU), "triton")) as (_, calls):
        assert {shape: len(same) for shape, same in calls.items()} == shapes
        for call in [call for same in calls.values() for call in same]:
            with recording(dry=True) as launches:
                call()
            assert [launch.options["BLOCK_M"] for launch in launches] == [16]
    with forced(kernel, Tile(variant="torch")) as looked_up:
        assert tiles.tile_for(kernel, CPU, 4, 3, 2, 1).variant == "torch"
        assert tiles.tile_for("fold", CPU, 4).variant == "triton"
        assert looked_up == [(3, 2, 1)]


@pytest.mark.skipif(GPU, reason="for Triton's interpreter")
def test_the_program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    small = Case(TowerShape(1, width=8, mlp=16, embed=8), 1, 2, 2)
    monkeypatch.setattr(each_tile, "CASE", small)
    monkeypatch.setattr(each_tile, "LARGE", small)
    monkeypatch.setattr(each_tile, "table_rows", lambda device: ROWS[:1])
    monkeypatch.setattr(sys, "argv", ["each_tile", "--device", "cpu"])
    each_tile.main()
    assert capsys.readouterr().out == "down, fp32, 8 rows: M 32 K 32, 4 warps, 1 stages\n"
    monkeypatch.setitem(DTYPES, "bf16", torch.float32)  # which the interpreter computes wrongly
    monkeypatch.setattr(sys, "argv", ["each_tile", "--device", "cpu", "--large", "2"])
    each_tile.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["product, bf16, 8 rows", "product_activated, bf16, 8 rows"]


@pytest.mark.parametrize(("tile", "beside"), [(Tile(blocks={"BLOCK_M": 1}), tiles.INTERPRETER), (None, "80")])
def test_the_other_kernels_run_in_tiles_that_fit(tile: Tile | None, beside: str) -> None:
    def run() -> list[Tensor]:
        assert tiles.tile_for("norm_backward", CPU, 4) == tile or tile is None
        assert tiles.architecture(CPU) == beside
        return []

    with tiles.assume("80"), tiled("norm_backward", tile, run) as (outputs, calls):
        assert tiles.architecture(CPU) == "80"
        assert (outputs, calls) == ([], {})
