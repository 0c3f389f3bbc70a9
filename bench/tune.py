"""The tile table of this GPU's architecture, measured: `fastdlp bench tune` writes kernels/tiles.json.

Every kernel of the operator runs on the linears of ViT-B/32 and ViT-L/14 at three numbers of rows, in every candidate
tile and, for the products, in the library's product too. One is timed after its outputs agreed with library products.
`choose` takes one tile for each number of rows, and one of its own for a shape where that is faster by more than 3 %.
The table is written after every kernel and number of rows, so that a killed run keeps what it found. What was not
reached in time, and kernels whose launchers take no tile, keep their rows.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from fastdlp.bench import common
from fastdlp.bench.common import Progress, measure, survive, synchronize
from fastdlp.bench.each_tile import LINEARS, describe, make_work
from fastdlp.bench.kernels import TOLERANCE, TOWERS, Case, ImageTower, cases
from fastdlp.engine.device import DTYPES
from fastdlp.errors import FastdlpError
from fastdlp.kernels import tiles
from fastdlp.kernels.tiles import FALLBACK, Tile, table, tile_of

TABLE = Path(tiles.__file__).with_name("tiles.json")
MILLISECONDS = 8.0  # of timing for a candidate on a shape
PROCESSES = 16  # that compile, at most
COMPILING = 0.4  # of the time, at most
WINS = 0.97  # of the general tile's time: below it a shape gets a tile of its own
TUNED_TOWERS = {name: TOWERS[name] for name in ("ViT-B-32", "ViT-L-14")}
# Kernels whose rows are kept: they are launched once a pass, or once an image and head.
NO_TILE = ("fold", "sum_partials", "attention", "attention_backward", "normalize", "row_norms", "adamw")


@dataclass(frozen=True)
class RowClass:
    """Up to how many rows (None: more than the others) a row of the table serves, and what represents them."""

    rows_to: int | None
    clients: int
    images: int
    tokens: int


CLASSES = (RowClass(None, 10, 32, 50), RowClass(4096, 1, 32, 50), RowClass(512, 1, 32, 1))  # in the order of importance

# Candidates by itemsize: the blocks of a kernel, then warps and stages.
PRODUCT, STRIP, ROWS = ("BLOCK_M", "BLOCK_N", "BLOCK_K"), ("BLOCK_M", "BLOCK_K"), ("BLOCK_M",)
PRODUCT_TILES = {
    2: """32 64 128 4 4, 64 64 64 4 4, 64 128 64 4 4, 128 64 64 4 4, 128 128 64 4 3, 128 128 64 8 3, 128 128 64 8 4,
        128 256 64 8 3, 256 128 64 8 3""",
    4: "32 64 32 4 3, 64 64 32 4 3, 64 128 16 8 3, 128 64 16 8 3, 128 128 16 8 2",
}
GRADIENT_TILES = {
    2: "64 64 64 4 3, 128 64 32 8 3, 128 128 32 8 3, 256 64 32 8 3, 256 64 32 8 2",
    4: "32 32 32 4 2, 64 32 16 8 2, 128 32 16 8 2",
}
STRIP_TILES = {
    2: "16 128 4 4, 32 64 4 3, 32 128 4 3, 64 64 4 3, 64 128 4 3, 64 128 8 2, 128 64 8 3",
    4: "16 64 4 3, 32 32 4 2, 32 64 4 3, 64 32 4 2, 64 64 8 2",
}
ROW_TILES = dict.fromkeys((2, 4), "1 4 1, 2 4 1, 4 4 1, 4 8 1, 8 8 1")


def candidates(kernel: str, itemsize: int) -> list[Tile]:
    """The tiles that are tried besides those in the table."""

    def read(names: Sequence[str], text: dict[int, str]) -> list[Tile]:
        numbers = [list(map(int, tile.split())) for tile in text[itemsize].split(",")]
        return [Tile("triton", dict(zip(names, blocks)), warps, stages) for *blocks, warps, stages in numbers]

    if kernel.startswith("product"):
        cut = [replace(tile, blocks={**tile.blocks, "GROUP_M": 8}) for tile in read(PRODUCT, PRODUCT_TILES)]
        described = [replace(tile, form="descriptor") for tile in cut if itemsize == 2 and tile["BLOCK_M"] >= 128]
        return [Tile(form="torch"), *cut, *described]
    if kernel == "norm_backward":
        return read(ROWS, ROW_TILES)
    return read(PRODUCT, GRADIENT_TILES) if kernel == "adapter_gradients" else read(STRIP, STRIP_TILES)


# -- choosing -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one tile on one shape of one class of rows; `out` and `width` as `tile_for` takes them."""

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
        # Two linears may look up the same tile (K alone does not tell fc1 from qkv): their times add up.
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
    form = tile.form if tile.form != "triton" else None
    limits = {"form": form, "chunk": tile.chunk, "rows_to": rows_to, "out": out, "width": width}
    row = {"kernel": kernel, "itemsize": [itemsize]} | {name: value for name, value in limits.items() if value}
    launch = {"blocks": tile.blocks, "warps": tile.warps, "stages": tile.stages}
    return row if tile.form == "torch" else row | launch


def replaced(
    rows: list[dict[str, Any]], kernel: str, itemsize: int, rows_to: int | None, new: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The rows with `new` in the place of those of this kernel, element size and class; fewest rows first."""
    single = [row | {"itemsize": [size]} for row in rows if row["kernel"] == kernel for size in row["itemsize"]]
    own = [row for row in single if row["itemsize"] != [itemsize] or row.get("rows_to") != rows_to] + new
    own.sort(key=lambda row: row.get("rows_to", math.inf))  # stable: a shape's own tile stays before the general one
    first = next((number for number, row in enumerate(rows) if row["kernel"] == kernel), len(rows))
    others = [row for row in rows if row["kernel"] != kernel]
    return others[:first] + own + others[first:]


def format_table(tables: dict[str, Any]) -> str:
    """The text of tiles.json: one row a line."""
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


@dataclass
class Notes:
    """Lines about what was left out, and about tiles that compute wrong results."""

    dropped: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def measure_kernel(
    kernel: str,
    precision: str,
    towers: dict[str, ImageTower],
    rows: RowClass,
    tried: Sequence[Tile],
    device: torch.device,
    deadline: float,
    notes: Notes,
    progress: Progress,
) -> list[Timing]:
    """Timings of a kernel on every shape of a class, in every tile that runs here and computes the right results.

    Raises:
        OutOfTime: `deadline` (of time.monotonic) passed.
    """
    from triton.errors import TritonError

    timings: list[Timing] = []
    out = set[str]()  # tiles that are tried no more
    for case in _cases(kernel, towers, rows):
        work = make_work(kernel, case, DTYPES[precision], device)
        right = work.right()
        where = f"{case.model} {case.linear}, {case.all_rows} rows"
        for key, tile in {_key(tile): tile for tile in tried}.items():
            if time.monotonic() > deadline:
                raise OutOfTime
            if key in out:
                continue
            progress(f"{kernel}, {precision}, {where}: {describe(tile)}")
            try:
                outputs = work.run(tile)
            except (TritonError, RuntimeError) as error:
                if not isinstance(error, TritonError) and "PassManager" not in str(error):
                    raise  # of the GPU or of a library, not of the tile
                out.add(key)
                why = " ".join(str(error).split())[:80]
                notes.dropped.append(f"{kernel}, {precision}: {describe(tile)} does not run here ({why})")
                continue
            wrong = max(_error(ours, reference) for ours, reference in zip(outputs, right, strict=True))
            if not wrong <= TOLERANCE[precision]:
                out.add(key)
                notes.wrong.append(
                    f"{kernel} in {precision} with {describe(tile)} computes {where}, wrongly: "
                    f"relative error {wrong:.1e}"
                )
                continue
            ms = measure(partial(work.run, tile), device, MILLISECONDS, graph=True).ms_50
            timings.append(Timing(rows.rows_to, work.out, work.width, tile, ms))
    return [t for t in timings if _key(t.tile) not in out]


def _error(ours: Tensor, reference: Tensor) -> float:
    """‖ours − reference‖ / ‖reference‖; infinite where it is NaN, which `max` would ignore."""
    error = ((ours.float() - reference.float()).norm() / reference.float().norm()).item()
    return math.inf if math.isnan(error) else error


def compile_ahead(
    jobs: Sequence[tuple[str, str, Case, Tile]], device: torch.device, pool: Executor, seconds: float
) -> int:
    """Launch (kernel, precision, case, tile) once each in other processes, which fills Triton's cache on disk.

    An error is ignored here, because `measure_kernel` meets it again. The device is idle at the end.

    Returns:
        How many ran within `seconds`.
    """
    futures = [pool.submit(_launch, *job, device) for job in jobs]
    finished, others = wait(futures, timeout=seconds)
    wait([future for future in others if not future.cancel()])
    return sum(future.exception() is None for future in finished)


def _launch(kernel: str, precision: str, case: Case, tile: Tile, device: torch.device) -> None:
    make_work(kernel, case, DTYPES[precision], device).run(tile)
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the processes share the memory


def tune(
    device: torch.device,
    precisions: Sequence[str],
    minutes: float,
    progress: Progress,
    save: Callable[[dict[str, Any]], None] = lambda tables: None,
    processes: int | None = None,
) -> dict[str, Any]:
    """Measure the table of this GPU; `save` gets the content for tiles.json whenever there are new rows.

    Returns:
        "tables": that content; "rows": the new rows; "notes": tiles and kernels that were left out; "failed": tiles
        that compute wrong results, which the table does not have.

    Raises:
        FastdlpError: no CUDA GPU.
    """
    if device.type != "cuda":
        raise FastdlpError("bench tune measures a CUDA GPU and torch sees none here: run it on one")
    major, minor = torch.cuda.get_device_capability(device)
    own, deadline, tables = f"{major}{minor}", time.monotonic() + 60 * minutes, table()
    rows = (tables.get(own) or tables[FALLBACK])["rows"]
    measured = (tables.get(own) or {}).get("measured")
    notes = Notes([f"{', '.join(NO_TILE)}: rows kept, their launchers take no tile"])
    plan = [
        (precision, of_class, kernel, _tried(rows, kernel, DTYPES[precision].itemsize))
        for precision in precisions
        for of_class in CLASSES
        for kernel in LINEARS
    ]
    if processes := min(PROCESSES, os.cpu_count() or 1) if processes is None else processes:
        jobs = [
            (kernel, precision, case, tile)
            for name, tower in TUNED_TOWERS.items()  # much of what the second needs is compiled for the first
            for precision, of_class, kernel, tried in plan
            for case in _cases(kernel, {name: tower}, of_class)
            for tile in tried
        ]
        progress(f"compiling in {processes} processes")
        with suppress(BrokenExecutor), ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            ran = compile_ahead(jobs, device, pool, COMPILING * 60 * minutes)
            notes.dropped.append(f"{ran} of {len(jobs)} candidates were compiled ahead")
    new: list[dict[str, Any]] = []
    missing = set[str]()  # precisions of which something was not reached
    for precision, of_class, kernel, tried in plan:
        itemsize = DTYPES[precision].itemsize
        chosen = list[dict[str, Any]]()
        with survive(f"{kernel}, {precision}", notes.wrong):
            try:
                timings = measure_kernel(
                    kernel, precision, TUNED_TOWERS, of_class, tried, device, deadline, notes, progress
                )
                chosen = choose(kernel, itemsize, timings)
            except OutOfTime:
                up_to = f" up to {of_class.rows_to} rows" if of_class.rows_to else ""
                notes.dropped.append(f"{kernel}{up_to}, {precision}: rows kept, {minutes:g} minutes were over")
        if not chosen:
            missing.add(precision)
            continue
        new += chosen
        rows = replaced(rows, kernel, itemsize, of_class.rows_to, chosen)
        save(tables | {own: {"measured": measured, "rows": rows}})
    if complete := [precision for precision in precisions if precision not in missing]:
        measured = _facts(device, complete)
    tables = tables | {own: {"measured": measured, "rows": rows}}
    save(tables)
    return {"tables": tables, "rows": new, "notes": notes.dropped, "failed": notes.wrong}


def _tried(rows: Sequence[dict[str, Any]], kernel: str, itemsize: int) -> list[Tile]:
    """The tiles of the table and the candidates, each once."""
    of_table = [tile_of(row) for row in rows if row["kernel"] == kernel and itemsize in row["itemsize"]]
    return list({_key(tile): tile for tile in [*of_table, *candidates(kernel, itemsize)]}.values())


def _facts(device: torch.device, precisions: Sequence[str]) -> dict[str, Any]:
    """ "measured" of a table."""
    facts = common.facts(device, "triton")
    versions = {name: facts["versions"][name] for name in ("torch", "triton")}
    sizes = [DTYPES[precision].itemsize for precision in precisions]
    today = date.today().isoformat()
    return {"device": facts["device"], **versions, "commit": facts["commit"], "date": today, "itemsize": sizes}


def _cases(kernel: str, towers: dict[str, ImageTower], rows: RowClass) -> Iterator[Case]:
    for name, tower in towers.items():
        sized = ImageTower(tower.shape, rows.tokens)
        yield from cases(name, sized, rows.clients, rows.images, LINEARS[kernel])


def print_tune(result: dict[str, Any], console: Console) -> None:
    """The rows that `tune` chose, and what it left out."""
    lines = [
        {
            "kernel": row["kernel"],
            "bytes": str(row["itemsize"][0]),
            **{name: str(row.get(key, "")) for name, key in (("rows to", "rows_to"), ("N", "out"), ("K", "width"))},
            "tile": describe(tile_of(row)),
        }
        for row in result["rows"]
    ]
    common.print_table(console, "new rows of the tile table", lines)
    for note in result["notes"]:
        console.print(note, style="yellow", highlight=False, markup=False)
