"""The tile table of this GPU's architecture, measured: `fastdlp bench tune` writes kernels/tiles.json.

Every kernel of the operator runs on the linears of ViT-B/32 and ViT-L/14 at three numbers of rows, in every candidate
tile and, for the products, in the library's form too. They are compiled beforehand, in several processes; one is timed
after its outputs agreed with library products. `choose` then takes one tile for each number of rows, and one of its own
for a shape where that wins by more than 3 %. The table is written after every kernel and number of rows, so that a run
that is killed keeps what it found. What was not reached in time, and kernels whose launchers take no tile, keep their
rows.
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
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdlp.bench.forms import Case
from fastdlp.bench.kernels import TOLERANCE, TOWERS, ImageTower, cases
from fastdlp.bench.machine import machine
from fastdlp.bench.survive import survive
from fastdlp.bench.timing import graph_stream, measure
from fastdlp.bench.work import make_work
from fastdlp.engine.device import DTYPES
from fastdlp.errors import FastdlpError
from fastdlp.kernels import tiles
from fastdlp.kernels.tiles import FALLBACK, Tile, table, tile_of

TABLE = Path(tiles.__file__).with_name("tiles.json")
MILLISECONDS = 8.0  # of timing for a candidate on a shape
PROCESSES = 16  # that compile, at the most
COMPILING = 0.4  # of the time, at the most
WINS = 0.97  # of the general tile's time: below it a shape gets a tile of its own
TUNED_TOWERS = {name: TOWERS[name] for name in ("ViT-B-32", "ViT-L-14")}


@dataclass(frozen=True)
class RowClass:
    """Up to how many rows (None: more than the others) a row of the table serves, and what stands for them."""

    rows_to: int | None
    clients: int
    images: int
    tokens: int


CLASSES = (RowClass(None, 10, 32, 50), RowClass(4096, 1, 32, 50), RowClass(512, 1, 32, 1))  # time may run out

# Which linears run through a kernel; the most of a step first.
LINEARS = {
    "product": ("qkv", "out", "fc2"),
    "product_activated": ("fc1",),
    "product_backward": ("qkv", "out", "fc1"),
    "product_backward_activated": ("fc2",),
    "adapter_gradients": ("qkv", "out", "fc1", "fc2"),
    "norm_down": ("qkv", "fc1"),
    "down": ("out", "fc2"),
    "norm_backward": ("qkv",),
}
# Launched once a pass, or once an image and head; their rows are kept.
NO_TILE = ("fold", "sum_partials", "attention", "attention_backward", "normalize", "row_norms", "adamw")


def candidates(kernel: str, itemsize: int) -> list[Tile]:
    """The tiles that are tried besides those in the table."""
    if kernel.startswith("product"):
        sizes = PRODUCT_TILES[itemsize]
        names = ("BLOCK_M", "BLOCK_N", "BLOCK_K")
        cut = [Tile("triton", {**dict(zip(names, blocks)), "GROUP_M": 8}, w, s) for *blocks, w, s in sizes]
        described = [replace(tile, form="descriptor") for tile in cut if itemsize == 2 and tile["BLOCK_M"] >= 128]
        return [Tile(form="torch"), *cut, *described]
    if kernel == "norm_backward":
        return [Tile("triton", {"BLOCK_M": m}, warps, 1) for m, warps in ((1, 4), (2, 4), (4, 4), (4, 8), (8, 8))]
    if kernel == "adapter_gradients":
        names = ("BLOCK_M", "BLOCK_N", "BLOCK_K")
        return [Tile("triton", dict(zip(names, blocks)), w, s) for *blocks, w, s in GRADIENT_TILES[itemsize]]
    return [Tile("triton", {"BLOCK_M": m, "BLOCK_K": k}, w, s) for m, k, w, s in STRIP_TILES[itemsize]]


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
GRADIENT_TILES = {
    2: [(64, 64, 64, 4, 3), (128, 64, 32, 8, 3), (128, 128, 32, 8, 3), (256, 64, 32, 8, 3), (256, 64, 32, 8, 2)],
    4: [(32, 32, 32, 4, 2), (64, 32, 16, 8, 2), (128, 32, 16, 8, 2)],
}
# BLOCK_M, BLOCK_K, warps, stages
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
    if tile.form != "torch":
        row |= {"blocks": tile.blocks, "warps": tile.warps, "stages": tile.stages}
    return row


def replaced(
    rows: list[dict[str, Any]], kernel: str, itemsize: int, rows_to: int | None, new: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The rows with `new` in the place of those of this kernel, element size and class; fewest rows first."""
    kept, own = list[dict[str, Any]](), list(new)
    put = None
    for row in rows:
        if row["kernel"] != kernel or itemsize not in row["itemsize"]:
            kept.append(row)
            continue
        put = len(kept) if put is None else put
        if row.get("rows_to") != rows_to:
            own.append(row | {"itemsize": [itemsize]})
        if rest := [size for size in row["itemsize"] if size != itemsize]:
            kept.append(row | {"itemsize": rest})
    own.sort(key=lambda row: row.get("rows_to", math.inf))  # stable: a shape's own tile stays before the general one
    put = len(kept) if put is None else put
    return kept[:put] + own + kept[put:]


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


@dataclass
class Notes:
    """Lines about what was left out, and about tiles that compute wrongly."""

    dropped: list[str]
    wrong: list[str]


def measure_kernel(
    kernel: str,
    precision: str,
    towers: dict[str, ImageTower],
    rows: RowClass,
    tried: Sequence[Tile],
    device: torch.device,
    deadline: float,
    notes: Notes,
    tell: Callable[[str], None],
) -> list[Timing]:
    """Timings of a kernel on every shape of a class, in every tile that runs here and computes rightly.

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
            tell(f"{kernel}, {precision}, {where}: {describe(tile)}")
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
            with graph_stream(device):  # few rows take less than their launch
                ms = measure(lambda: work.run(tile), device, MILLISECONDS, graph=True).ms_50  # noqa: B023
            timings.append(Timing(rows.rows_to, work.out, work.width, tile, ms))
    return [t for t in timings if _key(t.tile) not in out]


def _error(ours: Tensor, reference: Tensor) -> float:
    """‖ours − reference‖ / ‖reference‖; infinite where it is no number, which `max` would pass over."""
    error = ((ours.float() - reference.float()).norm() / reference.float().norm()).item()
    return math.inf if math.isnan(error) else error


def compile_ahead(
    jobs: Sequence[tuple[str, str, Case, Tile]], device: torch.device, pool: Executor, seconds: float
) -> int:
    """Launch (kernel, precision, case, tile) once each in other processes, for Triton's cache on disk.

    What does not run is met again by who measures. The device is idle again at the end.

    Returns:
        How many ran within `seconds`.
    """
    futures = [
        pool.submit(_launch, kernel, DTYPES[precision], case, tile, device) for kernel, precision, case, tile in jobs
    ]
    finished, others = wait(futures, timeout=seconds)
    for future in others:
        future.cancel()
    wait([future for future in others if not future.cancelled()])
    return sum(future.exception() is None for future in finished)


def _launch(kernel: str, dtype: torch.dtype, case: Case, tile: Tile, device: torch.device) -> None:
    make_work(kernel, case, dtype, device).run(tile)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()  # the processes share the memory


def tune(
    device: torch.device,
    architecture: str,
    precisions: Sequence[str],
    minutes: float,
    tell: Callable[[str], None],
    save: Callable[[dict[str, Any]], None] = lambda tables: None,
    processes: int | None = None,
) -> dict[str, Any]:
    """Measure the table of this GPU anew; `save` gets the content for tiles.json whenever there are new rows.

    Returns:
        "tables": that content; "rows": the new rows; "notes": tiles and kernels that were left out; "failed": tiles
        that compute wrongly, which the table does not have.

    Raises:
        FastdlpError: no CUDA GPU, another architecture than asked for.
    """
    if device.type != "cuda":
        raise FastdlpError("bench tune measures a CUDA GPU and torch sees none here: run it on one")
    major, minor = torch.cuda.get_device_capability(device)
    own = f"{major}{minor}"
    if architecture not in ("auto", own):
        raise FastdlpError(f"--arch {architecture}: this GPU is {own}, and only what is here can be measured")
    deadline = time.monotonic() + 60 * minutes
    tables = table()
    rows = (tables.get(own) or tables[FALLBACK])["rows"]
    measured = (tables.get(own) or {}).get("measured")
    notes = Notes([f"{', '.join(NO_TILE)}: rows kept, their launchers take no tile"], [])
    plan = [
        (precision, of_class, kernel, _tried(rows, kernel, DTYPES[precision].itemsize))
        for precision in precisions
        for of_class in CLASSES
        for kernel in LINEARS
    ]
    if processes := min(PROCESSES, os.cpu_count() or 1) if processes is None else processes:
        jobs = [
            (kernel, precision, case, tile)
            for name, tower in TUNED_TOWERS.items()  # the second one finds what the first one compiled
            for precision, of_class, kernel, tried in plan
            for case in _cases(kernel, {name: tower}, of_class)
            for tile in tried
        ]
        tell(f"compiling in {processes} processes")
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
                    kernel, precision, TUNED_TOWERS, of_class, tried, device, deadline, notes, tell
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
    """What "measured" says of a table."""
    import triton

    here = machine(device)
    return {
        "device": here["device"],
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": here["commit"],
        "date": date.today().isoformat(),
        "itemsize": [DTYPES[precision].itemsize for precision in precisions],
    }


def describe(tile: Tile | dict[str, Any]) -> str:
    """A tile in a few characters."""
    tile = tile if isinstance(tile, dict) else row_of("", 0, tile)
    if "blocks" not in tile:
        return "library"
    blocks = " ".join(f"{name.removeprefix('BLOCK_')} {size}" for name, size in tile["blocks"].items())
    chunk = f", chunk {tile['chunk']}" if "chunk" in tile else ""
    form = ", descriptors" if tile.get("form") == "descriptor" else ""
    return f"{blocks}, {tile['warps']} warps, {tile['stages']} stages{chunk}{form}"


def _cases(kernel: str, towers: dict[str, ImageTower], rows: RowClass) -> Iterator[Case]:
    for name, tower in towers.items():
        sized = ImageTower(tower.shape, rows.tokens)
        yield from cases(name, sized, rows.clients, rows.images, LINEARS[kernel])
