"""Every tile of the table against fp64, on a GPU those of its architecture in 5,120 rows: before anything is timed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fastdlp.bench import each_tile
from fastdlp.bench.each_tile import CASE, LINEARS, TableRow, make_work, table_rows
from fastdlp.bench.kernels import TOLERANCE
from fastdlp.engine.device import DTYPES
from fastdlp.kernels import frozen, tiles

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
# Triton's interpreter is slow, and computes bf16 products wrongly.
SHAPE = CASE if GPU else replace(CASE, clients=2, rows=40, out=48, width=80)
ROWS = [row for row in table_rows(DEVICE) if GPU or row.precision == "fp32"]


class InDoubles(TorchDispatchMode):
    """Every operation of torch in fp64, whatever it is given; a backward's results are rounded, as autograd wants."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*tree_map(_widened, args), **tree_map(_widened, kwargs or {}))
        if torch._C._current_graph_task_id() == -1:
            return result
        dtype = next(value.dtype for value in tree_leaves(args) if isinstance(value, Tensor))
        return tree_map(lambda value: value.to(dtype) if isinstance(value, Tensor) else value, result)


def _widened(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_tile(row: TableRow, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's products of the same operands, in fp64; by the largest entry, so that one bad row is seen."""
    monkeypatch.setattr(frozen, "ONEDNN", False)  # has no fp64
    work = make_work(row.kernel, SHAPE, DTYPES[row.precision], DEVICE)
    with InDoubles():
        right = work.right()
    for ours, reference in zip(work.run(row.tile), right, strict=True):
        assert ours.shape == reference.shape
        assert (ours.double() - reference).abs().max() <= TOLERANCE[row.precision] * reference.abs().max()


def test_rows_are_all_of_the_table() -> None:
    rows = tiles.table()["90"]["rows"]
    with tiles.assume("90"):
        found = [(row.kernel, row.tile) for row in table_rows(DEVICE)]
    for row in rows:
        tile = tiles.tile_of(row)
        expected = len(row["itemsize"]) if row["kernel"] in LINEARS and tile.form != "torch" else 0
        assert found.count((row["kernel"], tile)) >= expected
    assert {kernel for kernel, _ in found} <= LINEARS.keys()


def test_shape_and_kernels_of_a_step() -> None:
    assert (CASE.all_rows, CASE.out, CASE.width) == (5120, 256, 192)
    kernels = dict(each_tile.large(5))
    assert list(kernels) == list(LINEARS)[:5]
    assert {case.all_rows for case in kernels.values()} == {10 * 2 * 32 * 50}
