"""Every kernel in every checked-in configuration, compiled without a GPU: registers, stack, shared memory, tensor code.

What is launched comes from `cases.py`; each launch is compiled as Triton's JIT would specialise it: a None and the
integer 1 are constants, and addresses and integers divisible by 16 say so. Launches of the same code are compiled once.

A row fails when it has a stack or touches local memory (its registers did not suffice), asks for more shared memory
than a block may have, or multiplies large tiles of 16 bits without the tensor instruction of its architecture.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fastdlp.bench.cases import launches_of
from fastdlp.bench.machine import machine
from fastdlp.errors import FastdlpError
from fastdlp.kernels import tiles
from fastdlp.kernels.backend import interpreted
from fastdlp.kernels.launch import Launch

SHARED_LIMIT = {"80": 163 * 1024, "90": 227 * 1024}  # bytes that a block may ask for
TENSOR_CODE = {"80": "mma.sync", "90": "wgmma"}
HALF = {"bf16": "bf16", "fp16": "f16"}  # as PTX calls them
TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
}
FIGURES = ("registers", "stack", "local", "spill_stores", "spill_loads", "shared")
BY = ("kernel", "arch", "dtype", "constexprs", "num_warps", "num_stages")  # what makes a row of the result
WIDTH = 132  # of the table on the screen: narrower, its figures would be cut
ALIGNED = 16  # what Triton's JIT looks for in addresses (bytes) and integers


@dataclass(frozen=True)
class Job:
    """What determines a kernel's code. Plain values, so that it hashes and goes to another process.

    signature: (parameter, type) in order; constants: (parameter, value); aligned: positions divisible by 16.
    """

    module: str
    kernel: str
    arch: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    warps: int
    stages: int

    @property
    def constexprs(self) -> dict[str, Any]:
        """Of the constants, those that the kernel declares so."""
        return {name: value for name, value in self.constants if not name.islower()}

    @property
    def dtype(self) -> str:
        """Of the large operands, the smallest float type among the pointers; tf32 is how fp32 is multiplied."""
        if self.constexprs.get("PRECISION") == "tf32":
            return "tf32"
        pointers = {kind.removeprefix("*") for _, kind in self.signature}
        return next(name for name in ("bf16", "fp16", "fp32") if name in pointers)

    @property
    def integers(self) -> str:
        """How its integers are specialised: `K:16` is divisible by 16, `K=1` a constant."""
        ones = {name for name, value in self.constants if name not in self.constexprs and value is not None}
        found = []
        for position, (name, kind) in enumerate(self.signature):
            if kind in ("i32", "i64"):
                found.append(name + (":16" if position in self.aligned else ""))
            elif name in ones:
                found.append(f"{name}=1")
        return " ".join(found)


def bench_compile(archs: Sequence[str], small: bool, tell: Callable[[str], None]) -> dict[str, Any]:
    """Compile for every architecture; a row each, with what is wrong with it under "faults".

    Args:
        archs: keys of tiles.json, "80" and "90".
        small: every tile, but not every case; see `launches_of`.

    Raises:
        FastdlpError: Triton is missing or interprets.
    """
    if importlib.util.find_spec("triton") is None:
        raise FastdlpError("there is nothing to compile without the package triton: pip install triton")
    if interpreted():
        raise FastdlpError("TRITON_INTERPRET=1 has Triton interpret its kernels instead of compiling them: unset it")
    import triton

    jobs, dead = list_jobs(archs, small)
    rows: list[dict[str, Any]] = []
    for (job, case), figures in zip(jobs.items(), _compiled(jobs, tell)):
        row = {
            "kernel": job.kernel,
            "arch": job.arch,
            "dtype": job.dtype,
            "case": case,
            "constexprs": job.constexprs,
            "num_warps": job.warps,
            "num_stages": job.stages,
            "compiled": 1,
            **figures,
        }
        rows.append(row | {"faults": [f"{fault} ({job.integers})" for fault in faults(row)]})
    command = ["fastdlp bench compile", *(f"--arch {arch}" for arch in archs), *(["--small"] if small else [])]
    return {
        "what": "every kernel in every configuration of tiles.json, compiled without a GPU",
        "command": " ".join(command),
        "commit": machine(torch.device("cpu"))["commit"],
        "triton": triton.__version__,
        "never_taken": dead,
        "rows": sorted(merged(rows, BY), key=lambda row: (row["kernel"], row["arch"], row["dtype"])),
    }


def list_jobs(archs: Sequence[str], small: bool) -> tuple[dict[Job, str], list[tuple[str, str]]]:
    """Every job with the first case that needs it, and (architecture, row) of the tile table that no case takes."""
    jobs: dict[Job, str] = {}
    dead: list[tuple[str, str]] = []
    for arch in archs:
        with tiles.assume(arch), _noting_rows() as taken:
            for case, launch in launches_of(small):
                jobs.setdefault(specialised(launch, arch), case)
        dead += [(arch, json.dumps(row)) for row in tiles.table()[arch]["rows"] if row not in taken]
    return jobs, dead


@contextmanager
def _noting_rows() -> Iterator[list[dict[str, Any]]]:
    """List the rows of the tile table that are looked up inside."""
    rows: list[dict[str, Any]] = []
    tile_of = tiles.tile_of

    def noted(row: dict[str, Any]) -> tiles.Tile:
        rows.append(row)
        return tile_of(row)

    tiles._lookup.cache_clear()
    with mock.patch.object(tiles, "tile_of", noted):
        yield rows


def faults(row: dict[str, Any]) -> list[str]:
    """What is wrong with a compiled row; the limits of the module's docstring."""
    found = []
    if row["stack"] or row["local"]:
        found.append(
            f"registers do not suffice: {row['stack'] + row['local']} bytes of stack and local memory, "
            f"{row['spill_stores']} stored, {row['spill_loads']} loaded"
        )
    if row["shared"] > SHARED_LIMIT[row["arch"]]:
        found.append(f"{row['shared']} bytes of shared memory, {SHARED_LIMIT[row['arch']]} are allowed")
    operand, expected = HALF.get(row["dtype"]), TENSOR_CODE[row["arch"]]
    if operand and row["kernel"] == "product_kernel" and row["constexprs"]["BLOCK_M"] >= 64:
        code = row["mma"].split(", ")
        if not all(name.startswith(expected) and name.endswith(f".{operand}") for name in code):
            found.append(f"tensor code {row['mma']}, expected {expected} of {operand}")
    return found


def merged(rows: Iterable[dict[str, Any]], by: Sequence[str]) -> list[dict[str, Any]]:
    """One row for all that agree in `by`: the largest figures, all tensor code and all faults."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(json.dumps([row[name] for name in by]), []).append(row)
    return [
        group[0]
        | {name: max(row[name] for row in group) for name in FIGURES}
        | {
            "mma": ", ".join(sorted({code for row in group for code in row["mma"].split(", ")})),
            "faults": sorted({fault for row in group for fault in row["faults"]}),
            "compiled": sum(row["compiled"] for row in group),
        }
        for group in groups.values()
    ]


def specialised(launch: Launch, arch: str) -> Job:
    """The launch as Triton's JIT would specialise it."""
    options = dict(launch.options)
    warps, stages = options.pop("num_warps"), options.pop("num_stages")
    names = launch.kernel.arg_names
    general = {parameter.name for parameter in launch.kernel.params if parameter.do_not_specialize}
    values = dict(zip(names, launch.operands)) | options
    signature: list[tuple[str, str]] = []
    constants: list[tuple[str, Any]] = []
    aligned: list[int] = []
    for position, name in enumerate(names):
        value = values[name]
        if name in options or value is None or (isinstance(value, int) and value == 1 and name not in general):
            constants.append((name, value))
            signature.append((name, "constexpr"))
        elif isinstance(value, float):
            signature.append((name, "fp32"))
        else:
            if isinstance(value, Tensor):
                kind, divided = "*" + TYPES[value.dtype], value.storage_offset() * value.element_size()
            else:
                kind, divided = "i32" if abs(value) < 2**31 else "i64", value
            signature.append((name, kind))
            if divided % ALIGNED == 0 and name not in general:
                aligned.append(position)
    module, kernel = launch.kernel.fn.__module__, launch.kernel.fn.__name__
    return Job(module, kernel, arch, tuple(signature), tuple(constants), tuple(aligned), warps, stages)


def _compiled(jobs: Iterable[Job], tell: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """The figures of every job, in order, from a process a core: up to 8, as each loads torch."""
    todo = list(jobs)
    cores = min(len(os.sched_getaffinity(0)), 8)
    with ProcessPoolExecutor(cores, multiprocessing.get_context("spawn")) as pool:
        for number, (job, figures) in enumerate(zip(todo, pool.map(compile_job, todo, chunksize=4)), 1):
            tell(f"sm_{job.arch} {job.kernel}: {number} of {len(todo)}")
            yield figures


def compile_job(job: Job) -> dict[str, Any]:
    """Compile one kernel and read its binary.

    Returns:
        registers, stack and local bytes a thread; bytes that the spills' instructions store and load, each counted
        once; shared bytes a block; the tensor instructions of its PTX, "-" where there are none.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(job.module), job.kernel)
    divisible = {(position,): [["tt.divisibility", ALIGNED]] for position in job.aligned}
    source = ASTSource(kernel, dict(job.signature), dict(job.constants), divisible)
    options = {"num_warps": job.warps, "num_stages": job.stages, "enable_fp_fusion": True}
    try:
        built = triton.compile(source, target=GPUTarget("cuda", int(job.arch), 32), options=options)
    except Exception as error:
        raise RuntimeError(f"does not compile: {job}") from error
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(built.asm["cubin"])
        usage = _cuobjdump("-res-usage", file.name)
        found = re.search(rf"Function {job.kernel}:\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
        if found is None:
            raise RuntimeError(f"cuobjdump says nothing of {job.kernel}: {usage}")
        registers, stack, local = map(int, found.groups())
        assembly = _cuobjdump("-sass", file.name) if stack or local else ""
    return {
        "registers": registers,
        "stack": stack,
        "local": local,
        "spill_stores": bytes_moved("STL", assembly),
        "spill_loads": bytes_moved("LDL", assembly),
        "shared": built.metadata.shared,
        "mma": ", ".join(tensor_instructions(built.asm["ptx"])) or "-",
    }


def _cuobjdump(option: str, path: str) -> str:
    import triton

    command = [triton.knobs.nvidia.cuobjdump.path, option, path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def bytes_moved(instruction: str, assembly: str) -> int:
    """Bytes of all stores to local memory, `STL`, or loads, `LDL`, in SASS: 4 each, 8 and 16 with .64 and .128."""
    modifiers = re.findall(rf"\b{instruction}((?:\.\w+)*) ", assembly)
    return sum(16 if ".128" in found else 8 if ".64" in found else 4 for found in modifiers)


def tensor_instructions(ptx: str) -> list[str]:
    """Tensor instructions by shape and operand type: `wgmma.m64n256k16.bf16`, `mma.sync.m16n8k16.bf16`."""
    pattern = r"\b(wgmma|mma)(?:\.mma_async)?\.sync\.aligned\.(m\d+n\d+k\d+)(?:\.row\.col)?\.f32\.(\w+)"
    names = {"wgmma": "wgmma", "mma": "mma.sync"}
    return sorted({f"{names[name]}.{size}.{kind}" for name, size, kind in re.findall(pattern, ptx)})


def failures(result: dict[str, Any]) -> list[str]:
    """A line for every row that fails and for every row of the tile table that nothing takes."""
    lines = [f"sm_{arch}: no launch takes this row of tiles.json: {row}" for arch, row in result["never_taken"]]
    for row in result["rows"]:
        lines += [f"sm_{row['arch']} {row['kernel']} {row['dtype']}, {row['case']}: {fault}" for fault in row["faults"]]
    return lines


def to_json(result: dict[str, Any]) -> str:
    """The result with a line for every row."""
    head = json.dumps({name: value for name, value in result.items() if name != "rows"}, indent=1, ensure_ascii=False)
    rows = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in result["rows"])
    return f"{head[:-2]},\n" + f' "rows": [\n{rows}\n ]\n' + "}\n"


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """The worst of every kernel, architecture, dtype and tile, as text by column."""
    tiled = ({**row, "tile": _tile(row)} for row in rows)
    return [
        {
            "kernel": row["kernel"].removesuffix("_kernel"),
            "sm": row["arch"],
            "dtype": row["dtype"],
            "tile": row["tile"],
            "compiled": str(row["compiled"]),
            "regs": str(row["registers"]),
            "stack": str(row["stack"] + row["local"]),
            "spills": str(row["spill_stores"] + row["spill_loads"]),
            "shared": f"{row['shared']:,}",
            "tensor code": row["mma"],
        }
        for row in merged(tiled, ("kernel", "arch", "dtype", "tile"))
    ]


def _tile(row: dict[str, Any]) -> str:
    """`M128 N256 K64 w8 s3`; blocks that follow from the rank are left out."""
    blocks = {name.removeprefix("BLOCK"): size for name, size in row["constexprs"].items() if name.startswith("BLOCK")}
    sizes = [f"{name[1:]}{size}" for name, size in blocks.items() if name not in ("_R", "_L", "_SHARES")]
    return " ".join([*sizes, f"w{row['num_warps']}", f"s{row['num_stages']}"])


def to_markdown(result: dict[str, Any]) -> str:
    """The summary as a document."""
    lines = summary(result["rows"])
    table = [[*lines[0]], ["---"] * len(lines[0]), *([*line.values()] for line in lines)]
    return f"{_caption(result)}\n\n" + "".join(f"| {' | '.join(cells)} |\n" for cells in table)


def print_compile(result: dict[str, Any], console: Console) -> None:
    """The summary as a table on the screen."""
    lines = summary(result["rows"])
    table = Table(title=result["what"], title_justify="left", title_style="bold", box=box.SIMPLE, width=WIDTH)
    for column, text in lines[0].items():
        table.add_column(column, justify="right" if text.replace(",", "").isdecimal() else "left")
    for line in lines:
        table.add_row(*line.values(), style=None if line["stack"] == "0" else "red")
    console.print(table, crop=False)
    console.print(_caption(result), highlight=False)


def _caption(result: dict[str, Any]) -> str:
    compiled = sum(row["compiled"] for row in result["rows"])
    return (
        f"`{result['command']}`, Triton {result['triton']}, commit {result['commit']}: {compiled:,} kernels compiled, "
        "none run. A line shows the worst of those compiled for its tile (w: warps, s: stages): registers a thread; "
        "bytes of stack a thread, of spills' stores and loads, and of shared memory a block."
    )
