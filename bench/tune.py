"""The tile table of this GPU's architecture, measured: `fastdlp bench tune` writes kernels/tiles.json.

Every kernel of the operator runs on the linears of ViT-B/32 and ViT-L/14 at three numbers of rows, in every candidate
tile and, for the products, in the library's form too. A candidate is timed after its outputs agreed with library
products. `choose` then takes one tile for each number of rows, and one of its own for a shape where that wins by more
than 3 %. Kernels that were not reached in time, and those whose launchers take no tile, keep their rows.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from fastdlp.bench.forms import Case
from fastdlp.bench.kernels import TOLERANCE, TOWERS, ImageTower, cases
from fastdlp.bench.machine import machine
from fastdlp.bench.timing import measure
from fastdlp.bench.work import make_work
from fastdlp.device import DTYPES
from fastdlp.errors import FastdlpError
from fastdlp.kernels import tiles
from fastdlp.kernels.tiles import FALLBACK, Tile, table, tile_of

TABLE = Path(tiles.__file__).with_name("tiles.json")
MILLISECONDS = 8.0  # of timing for a candidate on a shape
WINS = 0.97  # of the general tile's time: below it a shape gets a tile of its own
TUNED_TOWERS = {name: TOWERS[name] for name in ("ViT-B-32", "ViT-L-14")}


@dataclass(frozen=True)
class RowClass:
    """Up to how many rows (None: more than the others) a row of the table serves, and what stands for them."""

    rows_to: int | None
    clients: int
    images: int
    tokens: int


CLASSES = (RowClass(512, 1, 32, 1), RowClass(4096, 1, 32, 50), RowClass(None, 10, 32, 50))

# Which linears run through a kernel; the most of a step first, because time may run out.
LINEARS = {
    "product": ("qkv", "out", "fc2"),
    "product_activated": ("fc1",),
    "product_backward": ("qkv", "out", "fc1", "fc2"),
    "adapter_gradients": ("qkv", "out", "fc2"),
    "adapter_gradients_activated": ("fc1",),
    "down_gradient": ("qkv", "out", "fc1", "fc2"),
    "norm_down": ("qkv", "fc1"),
    "down": ("out", "fc2"),
    "norm_backward": ("qkv",),
}
NO_TILE = ("fold", "sum_chunks", "row_norms", "adamw")  # their launchers take none


def candidates(kernel: str, itemsize: int) -> list[Tile]:
    """The tiles that are tried besides those in the table."""
    if kernel.startswith("product"):
        sizes = PRODUCT_TILES[itemsize]
        names = ("BLOCK_M", "BLOCK_N", "BLOCK_K")
        cut = [Tile("triton", {**dict(zip(names, blocks)), "GROUP_M": 8}, w, s) for *blocks, w, s in sizes]
        return [Tile(form="torch"), *cut]
    if kernel == "norm_backward":
        return [Tile("triton", {"BLOCK_M": m}, warps, 1) for m, warps in ((1, 4), (2, 4), (4, 4), (4, 8), (8, 8))]
    if kernel == "down_gradient":
        return [
            Tile("triton", {"BLOCK_M": m, "BLOCK_K": k}, 4, 3, chunk)
            for chunk in (128, 256, 512)
            for m, k in ((32, 64), (64, 64), (64, 128))
        ]
    across = "BLOCK_N" if kernel.startswith("adapter") else "BLOCK_K"
    return [Tile("triton", {"BLOCK_M": m, across: k}, w, s) for m, k, w, s in STRIP_TILES[itemsize]]


# BLOCK_M, BLOCK_N, BLOCK_K, warps, stages
PRODUCT_TILES = {
    2: [
        (32, 64, 128, 4, 4),
        (64, 64, 64, 4, 4),
        (64, 128, 64, 4, 4),
        (128, 64, 64, 4, 4),
        (128, 128, 64, 4, 3),
        (128, 128, 64, 8, 3),
        (128, 128, 64, 8, 4),
        (128, 256, 64, 8, 3),
        (256, 128, 64, 8, 3),
    ],
    4: [(32, 64, 32, 4, 3), (64, 64, 32, 4, 3), (64, 128, 16, 8, 3), (128, 64, 16, 8, 3), (128, 128, 16, 8, 2)],
}
# BLOCK_M, BLOCK_K or BLOCK_N, warps, stages
STRIP_TILES = {
    2: [
        (16, 128, 4, 4),
        (32, 64, 4, 3),
        (32, 128, 4, 3),
        (64, 64, 4, 3),
        (64, 128, 4, 3),
        (64, 128, 8, 2),
        (128, 64, 8, 3),
    ],
    4: [(16, 64, 4, 3), (32, 32, 4, 2), (32, 64, 4, 3), (64, 32, 4, 2), (64, 64, 8, 2)],
}


# -- choosing -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one tile on one shape of one class of rows; `out` and `width` as `tile_for` is asked."""

    rows_to: int | None
    out: int
    width: int
    tile: Tile
    ms: float


def choose(kernel: str, itemsize: int, timings: Sequence[Timing]) -> list[dict[str, Any]]:
    """The table's rows for a kernel, fewest rows first, and a shape's own tile before the general one.

    General is the tile with the least geometric mean of (its time / the best time) over the shapes of a class.

    Raises:
        FastdlpError: no tile ran on every shape of a class.
    """
    nothing = FastdlpError(f"no tile of {kernel} ran on every shape: give it candidates that fit this GPU")
    if not timings:
        raise nothing
    rows = []
    for rows_to in sorted({t.rows_to for t in timings}, key=lambda rows_to: rows_to or math.inf):
        of_class = [t for t in timings if t.rows_to == rows_to]
        shapes = list(dict.fromkeys((t.out, t.width) for t in of_class))
        by_key = {_key(t.tile): t.tile for t in of_class}
        # Two linears may ask for the same tile (K alone says little of fc1 and qkv): their times add up.
        ms = {
            (key, shape): math.fsum(t.ms for t in of_class if (t.out, t.width) == shape and _key(t.tile) == key)
            or math.inf
            for key in by_key
            for shape in shapes
        }
        best = {shape: min(by_key, key=lambda key: ms[key, shape]) for shape in shapes}
        loss = {key: math.fsum(math.log(ms[key, shape] / ms[best[shape], shape]) for shape in shapes) for key in by_key}
        general = min(by_key, key=lambda key: loss[key])
        if math.isinf(loss[general]):
            raise nothing
        own = [shape for shape in shapes if ms[best[shape], shape] < WINS * ms[general, shape]]
        rows += [row_of(kernel, itemsize, by_key[best[shape]], rows_to, *shape) for shape in own]
        rows.append(row_of(kernel, itemsize, by_key[general], rows_to))
    return rows


def row_of(
    kernel: str, itemsize: int, tile: Tile, rows_to: int | None = None, out: int = 0, width: int = 0
) -> dict[str, Any]:
    """A row of the table; what it does not restrict is left out."""
    row: dict[str, Any] = {"kernel": kernel, "itemsize": [itemsize]}
    limits = {"form": tile.form if tile.form != "triton" else None, "chunk": tile.chunk, "rows_to": rows_to}
    row |= {name: value for name, value in {**limits, "out": out, "width": width}.items() if value}
    if tile.form == "triton":
        row |= {"blocks": tile.blocks, "warps": tile.warps, "stages": tile.stages}
    return row


def replaced(rows: list[dict[str, Any]], kernel: str, itemsize: int, new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with `new` in the place of those of this kernel and element size."""
    kept: list[dict[str, Any]] = []
    put = False
    for row in rows:
        if row["kernel"] != kernel or itemsize not in row["itemsize"]:
            kept.append(row)
            continue
        if not put:
            kept += new
            put = True
        if rest := [size for size in row["itemsize"] if size != itemsize]:
            kept.append(row | {"itemsize": rest})
    return kept if put else kept + new


def format_table(tables: dict[str, Any]) -> str:
    """The table as it is checked in: one row a line."""
    blocks = []
    for architecture, entry in tables.items():
        rows = ",\n".join("   " + json.dumps(row) for row in entry["rows"])
        measured = json.dumps(entry["measured"])
        blocks.append(f' "{architecture}": {{\n  "measured": {measured},\n  "rows": [\n{rows}\n  ]\n }}')
    return "{\n" + ",\n".join(blocks) + "\n}\n"


def _key(tile: Tile) -> str:
    return json.dumps([tile.form, tile.blocks, tile.warps, tile.stages, tile.chunk])


# -- measuring ----------------------------------------------------------------------------------------------


class OutOfTime(Exception):
    """The budget ended."""


def measure_kernel(
    kernel: str,
    precision: str,
    towers: dict[str, ImageTower],
    classes: Sequence[RowClass],
    tried: Sequence[Tile],
    device: torch.device,
    deadline: float,
    tell: Callable[[str], None],
) -> tuple[list[Timing], list[str]]:
    """Timings of a kernel in every tile on every shape, and a line for every tile that cannot run here.

    Raises:
        FastdlpError: a tile's outputs are not those of the library.
        OutOfTime: `deadline` (of time.monotonic) passed.
    """
    from triton.errors import TritonError

    dtype = DTYPES[precision]
    timings: list[Timing] = []
    dropped: dict[str, str] = {}
    for rows in classes:
        for case in _cases(kernel, towers, rows):
            work = make_work(kernel, case, dtype, device)
            right = work.right()
            for key, tile in {_key(tile): tile for tile in tried}.items():
                if time.monotonic() > deadline:
                    raise OutOfTime
                if key in dropped:
                    continue
                tell(f"{kernel}, {precision}, {case.model} {case.linear}, {case.all_rows} rows: {describe(tile)}")
                try:
                    outputs = work.run(tile)
                except (TritonError, RuntimeError) as error:
                    if not isinstance(error, TritonError) and "PassManager" not in str(error):
                        raise  # of the GPU or of a library, not of the tile
                    why = " ".join(str(error).split())[:80]
                    dropped[key] = f"{kernel}, {precision}: {describe(tile)} does not run here ({why})"
                    continue
                for ours, reference in zip(outputs, right, strict=True):
                    wrong = ((ours.float() - reference.float()).norm() / reference.float().norm()).item()
                    if not wrong <= TOLERANCE[precision]:
                        raise FastdlpError(
                            f"{kernel} in {precision} with {describe(tile)} computes {case.model} {case.linear}, "
                            f"{case.all_rows} rows, wrongly: relative error {wrong:.1e}; the table was left alone"
                        )
                ms = measure(lambda: work.run(tile), device, MILLISECONDS).ms_50  # noqa: B023
                timings.append(Timing(rows.rows_to, work.out, work.width, tile, ms))
    return [t for t in timings if _key(t.tile) not in dropped], list(dropped.values())


def tune(
    device: torch.device, architecture: str, precisions: Sequence[str], minutes: float, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Measure the table of this GPU anew.

    Returns:
        "tables": the content for tiles.json; "rows": the new rows; "notes": tiles and kernels that were left out.

    Raises:
        FastdlpError: no CUDA GPU, another architecture than asked for, a kernel that computes wrongly.
    """
    if device.type != "cuda":
        raise FastdlpError("bench tune measures a CUDA GPU and torch sees none here: run it on one")
    import triton

    major, minor = torch.cuda.get_device_capability(device)
    own = f"{major}{minor}"
    if architecture not in ("auto", own):
        raise FastdlpError(f"--arch {architecture}: this GPU is {own}, and only what is here can be measured")
    deadline = time.monotonic() + 60 * minutes
    tables = table()
    rows = (tables.get(own) or tables[FALLBACK])["rows"]
    notes = [f"{', '.join(NO_TILE)}: rows kept, their launchers take no tile"]
    new: list[dict[str, Any]] = []
    complete = list(precisions)
    for precision in precisions:
        itemsize = DTYPES[precision].itemsize
        for kernel in LINEARS:
            of_table = [tile_of(r) for r in rows if r["kernel"] == kernel and itemsize in r["itemsize"]]
            tried = [*of_table, *candidates(kernel, itemsize)]
            try:
                timings, dropped = measure_kernel(
                    kernel, precision, TUNED_TOWERS, CLASSES, tried, device, deadline, tell
                )
            except OutOfTime:
                notes.append(f"{kernel}, {precision}: rows kept, {minutes:g} minutes were over")
                complete = [p for p in complete if p != precision]
                continue
            notes += dropped
            chosen = choose(kernel, itemsize, timings)
            new += chosen
            rows = replaced(rows, kernel, itemsize, chosen)
    measured = (tables.get(own) or {}).get("measured")
    if complete:
        here = machine(device)
        measured = {
            "device": here["device"],
            "torch": torch.__version__,
            "triton": triton.__version__,
            "commit": here["commit"],
            "date": date.today().isoformat(),
            "itemsize": [DTYPES[precision].itemsize for precision in complete],
        }
    return {"tables": tables | {own: {"measured": measured, "rows": rows}}, "rows": new, "notes": notes}


def describe(tile: Tile | dict[str, Any]) -> str:
    """A tile in a few characters."""
    tile = tile if isinstance(tile, dict) else row_of("", 0, tile)
    if "blocks" not in tile:
        return "library"
    blocks = " ".join(f"{name.removeprefix('BLOCK_')} {size}" for name, size in tile["blocks"].items())
    chunk = f", chunk {tile['chunk']}" if "chunk" in tile else ""
    return f"{blocks}, {tile['warps']} warps, {tile['stages']} stages{chunk}"


def _cases(kernel: str, towers: dict[str, ImageTower], rows: RowClass) -> Iterator[Case]:
    for name, tower in towers.items():
        sized = ImageTower(tower.shape, rows.tokens)
        yield from cases(name, sized, rows.clients, rows.images, LINEARS[kernel])
