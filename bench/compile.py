"""Every kernel in every checked-in configuration, compiled without a GPU: registers, memory, tensor code, main loop.

What is launched comes from `cases.py`; each launch is compiled as Triton's JIT would specialise it: a None and the
integer 1 are constants, and addresses and integers divisible by 16 say so. Launches of the same code are compiled once.

A row fails when it has a stack or touches local memory (its registers did not suffice), asks for more shared memory
than a block may have, multiplies large tiles of 16 bits without the tensor instruction of its architecture or waits for
each of them, or when ptxas warns that it serializes wgmma (C75xx).
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stdout
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
from fastdlp.bench.sass import COUNTED, count_main_loop
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
TENSOR = ("hgmma", "hmma", "waits", "drains")  # of the main loop; they mean something only together
FIGURES = ("registers", "stack", "local", "spill_stores", "spill_loads", "shared", "loop")
FIGURES += tuple(name for name in COUNTED if name not in TENSOR)
BY = ("kernel", "arch", "dtype", "tile")  # what makes a row of the result
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
        types = {word for _, kind in self.signature for word in re.findall(r"\w+", kind)}
        return next(name for name in ("bf16", "fp16", "fp32") if name in types)

    @property
    def tile(self) -> str:
        """`M128 N256 K64 w8 s3`; blocks that follow from the rank are left out."""
        blocks = {name.removeprefix("BLOCK"): size for name, size in self.constexprs.items() if "BLOCK" in name}
        sizes = [
            f"{name[1:]}{size}" for name, size in blocks.items() if size and name not in ("_R", "_L", "_F", "_PARTIALS")
        ]
        return " ".join([*sizes, f"w{self.warps}", f"s{self.stages}"])

    @property
    def specialisation(self) -> str:
        """What it is besides its tile. `K:16` is divisible by 16, `K=1` a constant, as is a flag by its name alone."""
        ones = {name for name, value in self.constants if name not in self.constexprs and value is not None}
        flags = {name: value for name, value in self.constexprs.items() if isinstance(value, str) or value is True}
        found = [name if value is True else f"{name}={value}" for name, value in flags.items()]
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
        found = faults(job, figures)
        del figures["warnings"]  # which are among the faults
        rows.append(
            {
                "kernel": job.kernel,
                "arch": job.arch,
                "dtype": job.dtype,
                "tile": job.tile,
                "case": f"{case} ({job.specialisation})",
                "compiled": 1,
                **figures,
                "faults": found,
            }
        )
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


def faults(job: Job, figures: dict[str, Any]) -> list[str]:
    """What is wrong with a compiled kernel; the limits of the module's docstring."""
    found = [f"ptxas {warning}" for warning in figures["warnings"]]
    if figures["stack"] or figures["local"]:
        found.append(
            f"registers do not suffice: {figures['stack'] + figures['local']} bytes of stack and local memory, "
            f"{figures['spill_stores']} stored, {figures['spill_loads']} loaded"
        )
    if figures["shared"] > SHARED_LIMIT[job.arch]:
        found.append(f"{figures['shared']} bytes of shared memory, {SHARED_LIMIT[job.arch]} are allowed")
    operand, expected = HALF.get(job.dtype), TENSOR_CODE[job.arch]
    if operand and job.kernel.startswith("product"):
        # A partial sum of dA has 16 rows, too few for wgmma: beside the expected code there may be mma.sync.
        code = figures["mma"].split(", ")
        right = any(name.startswith(expected) for name in code) and all(name.endswith(f".{operand}") for name in code)
        in_loop = figures["hgmma" if expected == "wgmma" else "hmma"]
        if job.constexprs["BLOCK_M"] >= 64 and not (right and in_loop):
            found.append(f"tensor code {figures['mma']}, expected {expected} of {operand}")
        hgmma, waits = figures["hgmma"], figures["waits"]
        # A loop with one HGMMA needs one wait an iteration. That wait is for the iteration before, and the tensor cores
        # stay busy, as long as it leaves the newest HGMMA in flight.
        if hgmma and (figures["drains"] if hgmma == waits == 1 else waits >= hgmma):
            found.append(f"{waits} waits for {hgmma} HGMMA in the main loop: they run one after another")
    return found


def merged(rows: Iterable[dict[str, Any]], by: Sequence[str]) -> list[dict[str, Any]]:
    """One row for all that agree in `by`: the largest figures, all tensor code and all faults.

    The case is the first with a fault, and the tensor instructions are of the loop with the most waits for each.
    """
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in by), []).append(row)
    found = []
    for group in groups.values():
        serial = max(group, key=lambda row: (row["waits"] / max(row["hgmma"], 1), row["hmma"]))
        found.append(
            next((row for row in group if row["faults"]), group[0])
            | {name: max(row[name] for row in group) for name in FIGURES}
            | {name: serial[name] for name in TENSOR}
            | {
                "mma": ", ".join(sorted({code for row in group for code in row["mma"].split(", ")})),
                "faults": sorted({fault for row in group for fault in row["faults"]}),
                "compiled": sum(row["compiled"] for row in group),
            }
        )
    return found


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
        elif hasattr(value, "block_shape"):  # Triton's TensorDescriptor, whose alignment is a condition of its own
            signature.append((name, f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"))
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
        once; shared bytes a block; the tensor instructions of its PTX, "-" where there are none; what `count_main_loop`
        counts; ptxas' warnings of performance.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(job.module), job.kernel)
    divisible = {(position,): [["tt.divisibility", ALIGNED]] for position in job.aligned}
    source = ASTSource(kernel, dict(job.signature), dict(job.constants), divisible)
    options = {"num_warps": job.warps, "num_stages": job.stages, "enable_fp_fusion": True}
    try:
        built, log, assembly = _build(source, GPUTarget("cuda", int(job.arch), 32), options)
    except Exception as error:
        raise RuntimeError(f"does not compile: {job}") from error
    usage = _cuobjdump("-res-usage", built)
    found = re.search(rf"Function {job.kernel}:\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assembly = assembly.partition(f"Function : {job.kernel}\n")[2].partition("Function :")[0]
    if found is None or not assembly:
        raise RuntimeError(f"cuobjdump says nothing of {job.kernel}: {usage}")
    registers, stack, local = map(int, found.groups())
    return {
        "registers": registers,
        "stack": stack,
        "local": local,
        "spill_stores": bytes_moved("STL", assembly),
        "spill_loads": bytes_moved("LDL", assembly),
        "shared": built.metadata.shared,
        "mma": ", ".join(tensor_instructions(built.asm["ptx"])) or "-",
        **count_main_loop(assembly),
        "warnings": performance_warnings(log),
    }


def _build(source: Any, target: Any, options: dict[str, Any]) -> tuple[Any, str, str]:
    """The kernel as Triton compiles it, the log of its ptxas, and its SASS.

    Triton prints the log when it runs ptxas, which it does not for what is in its cache; so the log is kept there too,
    and the SASS, which takes half as long as the compilation.
    """
    import triton
    from triton.runtime.cache import get_cache_manager

    log = io.StringIO()
    with redirect_stdout(log), triton.knobs.nvidia.scope(), triton.knobs.compilation.scope():
        triton.knobs.nvidia.dump_ptxas_log = True
        built = triton.compile(source, target=target, options=options)
        cache = get_cache_manager(built.hash)
        if not log.getvalue() and cache.get_file("ptxas.log") is None:  # compiled by someone who did not keep the log
            triton.knobs.compilation.always_compile = True
            built = triton.compile(source, target=target, options=options)
    if log.getvalue():
        cache.put(log.getvalue(), "ptxas.log", binary=False)
    if cache.get_file("sass") is None:
        cache.put(re.sub(r" +/\* 0x[0-9a-f]{16} \*/\n?", "", _cuobjdump("-sass", built)), "sass", binary=False)
    return built, *(Path(cache.get_file(name)).read_text() for name in ("ptxas.log", "sass"))


def performance_warnings(log: str) -> list[str]:
    """Of ptxas' log, the warnings C75xx: `C7515: ... wgmma.mma_async instructions are serialized due to ...`."""
    found = re.findall(r"\((C75\d\d)\) (.+?)(?: in the function .*)?$", log, re.MULTILINE)
    return sorted({f"{code}: {text}" for code, text in found})


def _cuobjdump(option: str, built: Any) -> str:
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(built.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, option, file.name]
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
    """Rows of a result as text by column."""
    return [
        {
            "kernel": row["kernel"].removesuffix("_kernel"),
            "sm": row["arch"],
            "dtype": row["dtype"],
            "tile": row["tile"],
            "n": str(row["compiled"]),
            "regs": str(row["registers"]),
            "stack": str(row["stack"] + row["local"]),
            "shared": f"{row['shared']:,}",
            "mma": f"{row['hgmma']}/{row['waits']}" if row["hgmma"] else str(row["hmma"]),
            "bar": f"{row['barriers']}+{row['syncs']}" if row["syncs"] else str(row["barriers"]),
            "shfl": str(row["shuffles"]),
            "loads": f"{row['ldg']}+{row['cp_async'] + row['tma']}" + "*" * (not row["loop"]),
            "tensor code": row["mma"],
        }
        for row in rows
    ]


def compared(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """What differs between two results, as `before → after`: the worst of every kernel, then every tile."""
    found = []
    for by in (BY[:-1], BY):
        old, new = _by_key(before, by), _by_key(after, by)
        for key in sorted(old.keys() | new.keys()):
            was, now = old.get(key), new.get(key)
            if was != now:
                missing = dict.fromkeys(was or now or {}, "-")
                pairs = zip((was or missing).items(), (now or missing).values())
                names = dict(zip(("kernel", "sm", "dtype", "tile"), (*key, "all")))
                found.append({column: a if a == b else f"{a} → {b}" for (column, a), b in pairs} | names)
    return found


def _by_key(rows: Sequence[dict[str, Any]], by: Sequence[str]) -> dict[tuple[str, ...], dict[str, str]]:
    """The summary's lines of rows merged by `by`, without what says nothing of a kernel's speed."""
    lines = {}
    for row in merged(rows, by):
        line = summary([row | {"tile": "all"}])[0]
        lines[tuple(row[name] for name in by)] = {k: v for k, v in line.items() if k not in ("n", "tensor code")}
    return lines


def to_markdown(result: dict[str, Any], before: dict[str, Any] | None) -> str:
    """The summary as a document, with the comparison where there is something to compare with."""
    text = f"{_caption(result)}\n\n{_markdown(summary(result['rows']))}"
    if before is not None:
        text += f"\n{_title(before)}\n\n{_markdown(compared(before['rows'], result['rows']))}"
    return text


def _markdown(lines: Sequence[dict[str, str]]) -> str:
    table = [[*lines[0]], ["---"] * len(lines[0]), *([*line.values()] for line in lines)] if lines else []
    return "".join(f"| {' | '.join(cells)} |\n" for cells in table)


def print_compile(result: dict[str, Any], before: dict[str, Any] | None, console: Console) -> None:
    """The summary as a table on the screen, and the comparison as another."""
    styles = ["red" if row["faults"] else "" for row in result["rows"]]
    _print(result["what"], summary(result["rows"]), styles, console)
    if before is not None:
        lines = compared(before["rows"], result["rows"])
        _print(_title(before), lines, [""] * len(lines), console)
    console.print(_caption(result), highlight=False)


def _print(title: str, lines: Sequence[dict[str, str]], styles: Sequence[str], console: Console) -> None:
    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE, width=WIDTH, padding=(0, 1, 0, 0)
    )
    for column in lines[0] if lines else ():
        table.add_column(column, justify="left" if column in ("kernel", "dtype", "tile", "tensor code") else "right")
    for line, style in zip(lines, styles):
        table.add_row(*line.values(), style=style)
    console.print(table, crop=False)


def _title(before: dict[str, Any]) -> str:
    return (
        f"What differs from commit {before['commit']}, Triton {before['triton']}: the worst of a kernel, and its tiles"
    )


def _caption(result: dict[str, Any]) -> str:
    compiled = sum(row["compiled"] for row in result["rows"])
    return (
        f"`{result['command']}`, Triton {result['triton']}, commit {result['commit']}: {compiled:,} kernels compiled, "
        "none run. A line shows the worst of the n compiled for its tile (w: warps, s: stages): registers and bytes of "
        "stack a thread, bytes of shared memory a block. An iteration of the main loop: HGMMA/waits for them, or HMMA; "
        "barriers + waits for TMA; shuffles; plain loads + asynchronous ones (* no loop: the whole kernel)."
    )
