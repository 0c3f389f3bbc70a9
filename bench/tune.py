"""The tile table of this GPU's architecture, measured: `fastdlp bench tune` writes kernels/tiles.json.

A block of ViT-B/32 and of ViT-L/14 runs forward and backward at three numbers of rows, with every kernel of the
operator in every candidate tile and, for the products, in the library's product too. The kernel is then timed alone, on
each of the block's linears, if outputs and all gradients agree with the torch backend. `choose` takes one tile for each
number of rows, and one of its own for a shape where that is faster by more than 3 %. The table is written after every
kernel and number of rows, so that a killed run keeps what it found. What was not reached in time, and kernels that are
not tuned, keep their rows.
"""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import date
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from fastdlp.adapters.branches import TowerShape
from fastdlp.bench import common
from fastdlp.bench.common import Progress, measure, survive, synchronize
from fastdlp.bench.each_tile import LAUNCHERS, SHAPES, Case, describe, tiled
from fastdlp.engine.autotune import Run, largest_error, nan_filled, tolerance_of
from fastdlp.engine.device import DTYPES
from fastdlp.errors import FastdlpError
from fastdlp.kernels import tiles
from fastdlp.kernels.launch import recording
from fastdlp.kernels.tiles import FALLBACK, INTERPRETER, Tile, table, tile_of

TABLE = Path(tiles.__file__).with_name("tiles.json")
MILLISECONDS = 8.0  # of timing for a candidate on a shape
PROCESSES = 16  # that compile, at most
COMPILING = 0.4  # of the time, at most
WINS = 0.97  # of the general tile's time: below it a shape gets a tile of its own
# Up to how many rows (None: more than the others) a row of the table serves, and the clients, images and tokens that
# represent them; in the order of importance.
CLASSES = {None: (10, 32, 50), 4096: (1, 32, 50), 512: (1, 8, 4)}
# Kernels whose rows are kept: they are launched once a pass, or once an image and head.
KEPT = ("fold", "sum_partials", "attention", "attention_backward", "normalize", "row_norms", "adamw")

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
        described = [replace(tile, variant="descriptor") for tile in cut if itemsize == 2 and tile["BLOCK_M"] >= 128]
        return [Tile(variant="torch"), *cut, *described]
    if kernel == "norm_backward":
        return read(ROWS, ROW_TILES)
    return read(PRODUCT, GRADIENT_TILES) if kernel == "adapter_gradients" else read(STRIP, STRIP_TILES)


# -- choosing -----------------------------------------------------------------------------------------------

Timing = tuple[Tile, dict[tuple[int, int], float]]  # milliseconds of a tile by (N, K) as `tile_for` takes them


def choose(kernel: str, itemsize: int, rows_to: int | None, timings: Sequence[Timing]) -> list[dict[str, Any]]:
    """The table's rows for a kernel and a class of rows, a shape's own tile before the general one.

    General is the tile with the least geometric mean of its times over the shapes; all tiles have the same shapes.

    Raises:
        FastdlpError: no tile ran.
    """
    if not timings:
        raise FastdlpError(f"no tile of {kernel} ran on every shape: give it candidates that fit this GPU")

    def row(tile: Tile, **shape: int) -> dict[str, Any]:
        """What it does not restrict is left out."""
        limits = {"variant": tile.variant.replace("triton", ""), "rows_to": rows_to, **shape}
        launch = {"blocks": tile.blocks, "warps": tile.warps, "stages": tile.stages} if tile.variant != "torch" else {}
        return {"kernel": kernel, "itemsize": [itemsize]} | {k: v for k, v in limits.items() if v} | launch

    general, of_general = min(timings, key=lambda timing: math.fsum(map(math.log, timing[1].values())))
    rows = []
    for (out, width), general_ms in of_general.items():
        own, ms = min(timings, key=lambda timing: timing[1][out, width])
        if ms[out, width] < WINS * general_ms:
            rows.append(row(own, out=out, width=width))
    return [*rows, row(general)]


def replaced(rows: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with `new`, of one kernel, element size and class, in the place of those before; fewest rows first."""
    kernel, (itemsize,), rows_to = new[0]["kernel"], new[0]["itemsize"], new[0].get("rows_to")
    order = list(dict.fromkeys(row["kernel"] for row in rows))
    kept = []
    for row in rows:
        sizes = row["itemsize"]
        if (row["kernel"], row.get("rows_to")) == (kernel, rows_to):
            sizes = [size for size in sizes if size != itemsize]
        kept += [row | {"itemsize": sizes}] if sizes else []
    # Stable: a shape's own tile stays before the general one.
    return sorted([*kept, *new], key=lambda row: (order.index(row["kernel"]), row.get("rows_to", math.inf)))


def format_table(tables: dict[str, Any]) -> str:
    """The text of tiles.json: one row a line."""
    blocks = []
    for architecture, entry in tables.items():
        rows = ",\n".join("   " + json.dumps(row) for row in entry["rows"])
        measured = json.dumps(entry["measured"])
        blocks.append(f' "{architecture}": {{\n  "measured": {measured},\n  "rows": [\n{rows}\n  ]\n }}')
    return "{\n" + ",\n".join(blocks) + "\n}\n"


# -- measuring ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A block of a tower, and its outputs and gradients by torch."""

    name: str
    run: Run
    right: list[Tensor]


@lru_cache(maxsize=len(SHAPES))
def make_block(name: str, shape: TowerShape, rows_to: int | None, precision: str, device: torch.device) -> Block:
    """For the number of rows that represents its class."""
    case = Case(shape, *CLASSES[rows_to])
    run = case.run(precision, device)
    return Block(f"{name}, {case.rows} rows", run, run("torch"))


def measure_tile(
    kernel: str, tile: Tile, block: Block, precision: str, device: torch.device
) -> dict[tuple[int, int], float]:
    """Milliseconds of a kernel by (N, K); linears that look up the same tile (K alone does not tell fc1 from qkv) add.

    Raises:
        FastdlpError: the results are wrong.
    """

    def run() -> list[Tensor]:
        with nan_filled():
            return block.run("triton")

    with tiled(kernel, tile, run) as (outputs, calls):
        error = largest_error(outputs, block.right)
        if not error <= tolerance_of(DTYPES[precision]):
            raise FastdlpError(
                f"{kernel} in {precision} with {describe(tile)} computes {block.name}, wrongly: relative error "
                f"{error:.1e}"
            )
        return {
            (out, width): measure(partial(_repeat, same), device, MILLISECONDS, graph=True).ms_50
            for (_, out, width), same in calls.items()
        }


def _repeat(calls: Sequence[Callable[[], Any]]) -> None:
    for call in calls:
        call()


def measure_kernel(
    kernel: str,
    precision: str,
    rows_to: int | None,
    tried: Sequence[Tile],
    device: torch.device,
    deadline: float,
    result: dict[str, Any],
    progress: Progress,
) -> list[Timing]:
    """Timings of a kernel on every shape of a class, in every tile that runs here and computes the right results.

    The others go into the result's "notes" and "failed".

    Raises:
        TimeoutError: `deadline` (of time.monotonic) passed.
    """
    from triton.errors import TritonError

    timings: list[Timing] = []
    for tile in tried:
        ms: dict[tuple[int, int], float] = {}
        try:
            for name, shape in SHAPES.items():
                if time.monotonic() > deadline:
                    raise TimeoutError
                block = make_block(name, shape, rows_to, precision, device)
                progress(f"{kernel}, {precision}, {block.name}: {describe(tile)}")
                ms |= measure_tile(kernel, tile, block, precision, device)
        except FastdlpError as error:
            result["failed"].append(str(error))
        except (TritonError, RuntimeError) as error:
            if not isinstance(error, TritonError) and "PassManager" not in str(error):
                raise  # of the GPU or of a library, not of the tile
            why = " ".join(str(error).split())[:80]
            result["notes"].append(f"{kernel}, {precision}: {describe(tile)} does not run here ({why})")
        else:
            timings.append((tile, ms))
    return timings


def compile_ahead(
    jobs: Sequence[tuple[str, Tile, TowerShape, str]], device: torch.device, pool: Executor, seconds: float
) -> int:
    """Run (kernel, tile, shape of a tower, precision) once each in other processes, which fills Triton's cache on disk.

    An error is ignored here, because `measure_kernel` meets it again. The device is idle at the end.

    Returns:
        How many ran within `seconds`.
    """
    futures = [pool.submit(_launch, *job, device) for job in jobs]
    finished, others = wait(futures, timeout=seconds)
    wait([future for future in others if not future.cancel()])
    return sum(future.exception() is None for future in finished)


def _launch(kernel: str, tile: Tile, shape: TowerShape, precision: str, device: torch.device) -> None:
    """On few rows, because a kernel's code does not depend on their number, and without the other kernels."""
    run = Case(shape, *CLASSES[512]).run(precision, device)

    def dry_run() -> list[Tensor]:
        with recording(dry=True):
            return run("triton")

    with tiled(kernel, tile, dry_run) as (_, calls):
        for same in calls.values():
            _repeat(same)
    synchronize(device)


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
    result: dict[str, Any] = {"rows": [], "notes": [f"{', '.join(KEPT)}: rows kept, they are not tuned"], "failed": []}
    tried = {
        (kernel, precision): _tried(rows, kernel, DTYPES[precision].itemsize)
        for precision in precisions
        for kernel in LAUNCHERS
    }
    if processes := min(PROCESSES, os.cpu_count() or 1) if processes is None else processes:
        jobs = [  # much of what the second tower needs is compiled for the first
            (kernel, tile, shape, precision)
            for shape in SHAPES.values()
            for (kernel, precision), of_kernel in tried.items()
            for tile in of_kernel
        ]
        progress(f"compiling in {processes} processes")
        with suppress(BrokenExecutor), ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            ran = compile_ahead(jobs, device, pool, COMPILING * 60 * minutes)
            result["notes"].append(f"{ran} of {len(jobs)} candidates were compiled ahead")
    complete = dict.fromkeys(precisions)  # those of which everything was reached
    for precision, rows_to, kernel in itertools.product(precisions, CLASSES, LAUNCHERS):
        chosen = list[dict[str, Any]]()
        with survive(f"{kernel}, {precision}", result["failed"]):
            try:
                timings = measure_kernel(
                    kernel, precision, rows_to, tried[kernel, precision], device, deadline, result, progress
                )
                chosen = choose(kernel, DTYPES[precision].itemsize, rows_to, timings)
            except TimeoutError:
                up_to = f" up to {rows_to} rows" if rows_to else ""
                result["notes"].append(f"{kernel}{up_to}, {precision}: rows kept, {minutes:g} minutes were over")
        if not chosen:
            complete.pop(precision, None)
            continue
        result["rows"] += chosen
        rows = replaced(rows, chosen)
        save(tables | {own: {"measured": measured, "rows": rows}})
    if complete:
        measured = _facts(device, list(complete))
    result["tables"] = tables | {own: {"measured": measured, "rows": rows}}
    save(result["tables"])
    return result


def _tried(rows: Sequence[dict[str, Any]], kernel: str, itemsize: int) -> list[Tile]:
    """The tiles of the table, the candidates, and the interpreter's, in which the other kernels run; each once."""
    of_table = [*rows, *table()[INTERPRETER]["rows"]]
    found = [tile_of(row) for row in of_table if row["kernel"] == kernel and itemsize in row["itemsize"]]
    found += candidates(kernel, itemsize)
    return [tile for number, tile in enumerate(found) if tile not in found[:number]]


def _facts(device: torch.device, precisions: Sequence[str]) -> dict[str, Any]:
    """ "measured" of a table."""
    facts = common.facts(device, "triton")
    versions = {name: facts["versions"][name] for name in ("torch", "triton")}
    sizes = [DTYPES[precision].itemsize for precision in precisions]
    today = date.today().isoformat()
    return {"device": facts["device"], **versions, "commit": facts["commit"], "date": today, "itemsize": sizes}


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
