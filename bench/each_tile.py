"""Every tile of this GPU's table launched once: what compute-sanitizer and ncu watch, and tests compare with fp64.

    compute-sanitizer python -m fastdlp.bench.each_tile
    ncu --profile-from-start off --clock-control none python -m fastdlp.bench.each_tile --large 5

The first takes 5,120 rows, N 256 and K 192, of groups of 160 rows, which end within a tile of 64 rows or more; the
second the kernels that take most of a step, in bf16 on ViT-B/32 for ten clients.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fastdlp.bench.forms import Case
from fastdlp.bench.kernels import TOWERS, cases
from fastdlp.bench.tune import LINEARS, describe
from fastdlp.bench.work import make_work
from fastdlp.engine.device import DTYPES, pick_device
from fastdlp.kernels.tiles import Tile, architecture, table, tile_for, tile_of

PRECISIONS = {torch.finfo(dtype).bits // 8: name for name, dtype in DTYPES.items()}
CASE = Case("tile", "fc2", clients=16, rows=160, parts=1, out=256, width=192, bias=True)  # fc2 has a residual


@dataclass(frozen=True)
class TableRow:
    """A row of the table for one precision. Kernels whose launchers take no tile have none: every test runs theirs."""

    kernel: str
    precision: str
    tile: Tile

    def __str__(self) -> str:
        return f"{self.kernel}, {self.precision}, {describe(self.tile)}"


def table_rows(device: torch.device) -> list[TableRow]:
    """Of the device's architecture; tiles of the library's form are not ours to test."""
    rows = table()[architecture(device)]["rows"]
    return [
        TableRow(row["kernel"], PRECISIONS[itemsize], tile_of(row))
        for row in rows
        if row["kernel"] in LINEARS and tile_of(row).form != "torch"
        for itemsize in row["itemsize"]
    ]


def large(count: int) -> Iterator[tuple[str, Case]]:
    """The first `count` kernels of LINEARS, each on its first linear."""
    for kernel in list(LINEARS)[:count]:
        yield kernel, cases("ViT-B-32", TOWERS["ViT-B-32"], 10, 32, LINEARS[kernel][:1])[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", type=int, metavar="N", help="the N kernels that take most of a step, once each")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    given = parser.parse_args()
    device = pick_device(given.device)
    if given.large is None:
        for row in table_rows(device):
            _launch(row.kernel, CASE, row.precision, row.tile, device)
        return
    for kernel, case in large(given.large):
        work = make_work(kernel, case, DTYPES["bf16"], device)
        tile = tile_for(kernel, device, 2, case.all_rows, work.out, work.width)
        _launch(kernel, case, "bf16", tile, device)


def _launch(kernel: str, case: Case, precision: str, tile: Tile, device: torch.device) -> None:
    """Compiled and run beforehand, so that a profiler that waits for it sees one launch."""
    print(f"{kernel}, {precision}, {case.all_rows} rows: {describe(tile)}")
    work = make_work(kernel, case, DTYPES[precision], device)
    work.run(tile)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.profiler.start()
        work.run(tile)
        torch.cuda.synchronize(device)
        torch.cuda.profiler.stop()


if __name__ == "__main__":
    main()
