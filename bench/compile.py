"""Every kernel in every configuration of tiles.json, compiled without a GPU, and the conditions that it has to meet.

What is launched comes from `cases.py`; each launch is compiled as Triton's JIT specializes it, and launches of the same
code once. The result has a row for each kernel, architecture and dtype, with the worst value of all its tiles.

A kernel fails when it has a stack or spills, asks for more shared memory than a block may have, multiplies large tiles
of 16 bits without the tensor instruction of its architecture or without asynchronous loads in its main loop, waits
there for each HGMMA, or when ptxas warns that it serializes wgmma (C75xx).
"""

from __future__ import annotations

import importlib
import io
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from rich.console import Console

from fastdlp.bench import common
from fastdlp.bench.cases import launches_of
from fastdlp.bench.common import Progress
from fastdlp.bench.sass import main_loop
from fastdlp.errors import FastdlpError
from fastdlp.kernels import tiles
from fastdlp.kernels.backend import interpreted

SHARED_LIMIT = {"80": 163 * 1024, "90": 227 * 1024}  # bytes that a block may ask for
TENSOR_CODE = {"80": "mma.sync", "90": "wgmma"}
HALF = {"bf16": "bf16", "fp16": "f16"}  # their names in PTX
# Instructions that are counted in a kernel's main loop; waits are for wgmma, drains those that leave none in flight.
COUNTED = {
    "hgmma": r"\bHGMMA\b",
    "hmma": r"\bHMMA\b",
    "waits": r"\bWARPGROUP\.DEPBAR\b",
    "drains": r"\bWARPGROUP\.DEPBAR\b.* 0x0$",
    "barriers": r"\bBAR\.(?:SYNC|RED)\b",
    "loads": r"\bLDG\b",
    "async_loads": r"\b(?:LDGSTS|UTMALDG)\b",
}
TENSOR = ("hgmma", "hmma", "waits", "drains")  # of one kernel, so that they are taken together
WORST = ("registers", "stack", "spill_stores", "spill_loads", "shared", "barriers", "loads", "async_loads")
KEY = ("kernel", "arch", "dtype")


@dataclass(frozen=True)
class Job:
    """What determines a kernel's code: an architecture, and the JIT's own record of a specialization as JSON."""

    arch: str
    specialization: str

    @cached_property
    def record(self) -> dict[str, Any]:
        """ "name" with its module, "signature" (types by parameter), "constant" and "attrs", each as keys, which are
        lists of one position, and values, and "options"."""
        return json.loads(self.specialization)

    @property
    def kernel(self) -> str:
        return self.record["name"].rpartition(".")[2]

    def by_name(self, what: str) -> dict[str, Any]:
        """The "constant" or "attrs" of the record by parameter; of attributes there is one, divisibility by 16."""
        names, positions = list(self.record["signature"]), self.record[f"{what}_keys"]
        return {names[position]: value for (position,), value in zip(positions, self.record[f"{what}_vals"])}

    @property
    def constexprs(self) -> dict[str, Any]:
        """Of the constants, those that the kernel declares so."""
        return {name: value for name, value in self.by_name("constant").items() if not name.islower()}

    @property
    def dtype(self) -> str:
        """Of the large operands, the smallest float type among the pointers; tf32 is a precision of fp32 products."""
        if self.constexprs.get("PRECISION") == "tf32":
            return "tf32"
        types = {word for kind in self.record["signature"].values() for word in re.findall(r"\w+", kind)}
        return next(name for name in ("bf16", "fp16", "fp32") if name in types)

    def __str__(self) -> str:
        """Tile and flags: `BLOCK_M=128 BLOCK_N=256 EVEN_N=True, 8 warps, 3 stages`."""
        flags = " ".join(f"{name}={value}" for name, value in self.constexprs.items() if value is not False)
        options = self.record["options"]
        return f"{flags}, {options['num_warps']} warps, {options['num_stages']} stages"


def bench_compile(archs: Sequence[str], small: bool, progress: Progress) -> dict[str, Any]:
    """Compile for every architecture.

    Args:
        archs: keys of tiles.json, "80" and "90".
        small: every tile, but not every case; see `launches_of`.

    Raises:
        FastdlpError: Triton is missing or interprets.
    """
    if not common.installed("triton"):
        raise FastdlpError("there is nothing to compile without the package triton: pip install triton")
    if interpreted():
        raise FastdlpError("TRITON_INTERPRET=1 has Triton interpret its kernels instead of compiling them: unset it")
    jobs, unused = list_jobs(archs, small)
    failed = [f"sm_{arch}: no launch uses this row of tiles.json: {row}" for arch, row in unused]
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    cores = min(len(os.sched_getaffinity(0)), 8)  # each process loads torch
    with ProcessPoolExecutor(cores, multiprocessing.get_context("spawn")) as pool:
        compiled = pool.map(compile_job, jobs, chunksize=4)
        for number, ((job, case), found) in enumerate(zip(jobs.items(), compiled), 1):
            progress(f"sm_{job.arch} {job.kernel}: {number} of {len(jobs)}")
            groups.setdefault((job.kernel, job.arch, job.dtype), []).append(found)
            where = f"sm_{job.arch} {job.kernel} {job.dtype}, {case} ({job})"
            failed += [f"{where}: {fault}" for fault in faults(job, found)]
    return {
        "what": "every kernel in every configuration of tiles.json, compiled without a GPU",
        "rows": [dict(zip(KEY, key)) | worst(found) for key, found in sorted(groups.items())],
        "failed": failed,
        **common.facts(torch.device("cpu"), "triton"),
    }


def list_jobs(archs: Sequence[str], small: bool) -> tuple[dict[Job, str], list[tuple[str, str]]]:
    """Every job with the first case that needs it, and (architecture, row) of the tile table that no case uses."""
    from triton import knobs

    jobs: dict[Job, str] = {}
    unused: list[tuple[str, str]] = []
    found: list[str] = []

    def keep(**details: Any) -> bool:
        found.append(details["compile"]["specialization_data"])
        return True  # instead of compiling

    with knobs.runtime.scope():
        knobs.runtime.jit_cache_hook = keep
        for arch in archs:
            tiles._lookup.cache_clear()  # so that every row that is used is read
            with _target(arch), tiles.assume(arch), mock.patch.object(tiles, "tile_of", wraps=tiles.tile_of) as read:
                for case, launch in launches_of(small):
                    launch.kernel.warmup(*launch.operands, grid=launch.grid, enable_fp_fusion=True, **launch.options)
                    jobs.setdefault(Job(arch, found.pop()), case)
            used = [row for (row,), _ in read.call_args_list]
            unused += [(arch, json.dumps(row)) for row in tiles.table()[arch]["rows"] if row not in used]
    return jobs, unused


@contextmanager
def _target(arch: str) -> Iterator[None]:
    """Let Triton's JIT compile for an architecture, without a GPU; what it has compiled it keeps by device."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    stub = {
        "get_current_target": lambda: GPUTarget("cuda", int(arch), 32),
        "get_current_device": lambda: arch,
        "get_current_stream": lambda device: 0,
    }
    driver.set_active(SimpleNamespace(**stub))
    try:
        yield
    finally:
        driver.set_active(None)  # the default one is created when it is asked for, which takes a GPU


def faults(job: Job, found: dict[str, Any]) -> list[str]:
    """The conditions of the module's docstring that a compiled kernel does not meet."""
    lines = [f"ptxas {warning}" for warning in found["warnings"]]
    if found["stack"] or found["spill_stores"] or found["spill_loads"]:
        lines.append(
            f"registers do not suffice: {found['stack']} bytes of stack, {found['spill_stores']} stored, "
            f"{found['spill_loads']} loaded"
        )
    if found["shared"] > SHARED_LIMIT[job.arch]:
        lines.append(f"{found['shared']} bytes of shared memory, {SHARED_LIMIT[job.arch]} are allowed")
    operand, expected = HALF.get(job.dtype), TENSOR_CODE[job.arch]
    if operand and job.kernel.startswith("product"):
        # The partial sums of dA in a product have 16 rows, too few for wgmma: mma.sync may occur beside it.
        code = found["mma"].split(", ")
        right = any(name.startswith(expected) for name in code) and all(name.endswith(f".{operand}") for name in code)
        in_loop = found["hgmma" if expected == "wgmma" else "hmma"]
        large = job.constexprs["BLOCK_M"] >= 64
        if large and not (right and in_loop):
            lines.append(f"tensor code {found['mma']}, expected {expected} of {operand}")
        if large and not found["async_loads"] and job.by_name("attrs").get("K"):
            lines.append("no asynchronous loads")
        hgmma, waits = found["hgmma"], found["waits"]
        # A loop with one HGMMA needs one wait an iteration. That wait is for the iteration before, and the tensor cores
        # stay busy, as long as it leaves the newest HGMMA in flight.
        if hgmma and (found["drains"] if hgmma == waits == 1 else waits >= hgmma):
            lines.append(f"{waits} waits for {hgmma} HGMMA in the main loop: they run one after another")
    return lines


def worst(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of what `compile_job` found for a kernel's tiles, their number, the largest values and all tensor code.

    The tensor instructions are of the kernel with the most waits for each.
    """
    serial = max(found, key=lambda one: (one["waits"] / max(one["hgmma"], 1), one["hmma"]))
    return {
        "compiled": len(found),
        **{name: max(one[name] for one in found) for name in WORST},
        **{name: serial[name] for name in TENSOR},
        "mma": ", ".join(sorted({code for one in found for code in one["mma"].split(", ")} - {"-"})) or "-",
    }


def compile_job(job: Job) -> dict[str, Any]:
    """Compile one kernel.

    Returns:
        registers, bytes of stack a thread and bytes of spills; shared bytes a block; the tensor instructions of its
        PTX, "-" where there are none; counts of COUNTED in the main loop; ptxas' warnings of performance.
    """
    try:
        built, log, sass = _build(job)
    except Exception as error:
        raise RuntimeError(f"does not compile: {job.kernel} {job}") from error
    loop = main_loop(sass)
    return {
        **resources(log),
        "shared": built.metadata.shared,
        "mma": ", ".join(tensor_instructions(built.asm["ptx"])) or "-",
        **{name: sum(bool(re.search(pattern, line)) for line in loop) for name, pattern in COUNTED.items()},
        "warnings": performance_warnings(log),
    }


def _build(job: Job) -> tuple[Any, str, str]:
    """The kernel as Triton compiles it, the log of its ptxas, and its SASS.

    Triton prints the log when it runs ptxas, which it does not for what is in its cache; so the log is kept there too,
    and the SASS, which takes half as long as the compilation.
    """
    from triton import knobs
    from triton.runtime.cache import get_cache_manager

    kernel = getattr(importlib.import_module(job.record["name"].rpartition(".")[0]), job.kernel)
    log = io.StringIO()
    with redirect_stdout(log), _target(job.arch), knobs.nvidia.scope(), knobs.compilation.scope():
        knobs.nvidia.dump_ptxas_log = True
        built = kernel.preload(job.specialization)
        cache = get_cache_manager(built.hash)
        if not log.getvalue() and cache.get_file("ptxas.log") is None:  # was compiled without keeping the log
            knobs.compilation.always_compile = True
            built = kernel.preload(job.specialization)
    if log.getvalue():
        cache.put(log.getvalue(), "ptxas.log", binary=False)
    if cache.get_file("sass") is None:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(built.asm["cubin"])
            command = [knobs.nvidia.cuobjdump.path, "-sass", file.name]
            sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        cache.put(re.sub(r" +/\* 0x[0-9a-f]{16} \*/\n?", "", sass), "sass", binary=False)
    return built, *(Path(cache.get_file(name)).read_text() for name in ("ptxas.log", "sass"))


def resources(log: str) -> dict[str, int]:
    """Registers, bytes of stack and of spills a thread, from ptxas' log."""
    patterns = {
        "registers": r"Used (\d+) registers",
        "stack": r"(\d+) bytes stack frame",
        "spill_stores": r"(\d+) bytes spill stores",
        "spill_loads": r"(\d+) bytes spill loads",
    }
    return {name: max(map(int, re.findall(pattern, log))) for name, pattern in patterns.items()}


def performance_warnings(log: str) -> list[str]:
    """Of ptxas' log, the warnings C75xx: `C7515: ... wgmma.mma_async instructions are serialized due to ...`."""
    found = re.findall(r"\((C75\d\d)\) (.+?)(?: in the function .*)?$", log, re.MULTILINE)
    return sorted({f"{code}: {text}" for code, text in found})


def tensor_instructions(ptx: str) -> list[str]:
    """Tensor instructions by shape and operand type: `wgmma.m64n256k16.bf16`, `mma.sync.m16n8k16.bf16`."""
    pattern = r"\b(wgmma|mma)(?:\.mma_async)?\.sync\.aligned\.(m\d+n\d+k\d+)(?:\.row\.col)?\.f32\.(\w+)"
    names = {"wgmma": "wgmma", "mma": "mma.sync"}
    return sorted({f"{names[name]}.{size}.{kind}" for name, size, kind in re.findall(pattern, ptx)})


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Rows of a result as text by column."""
    return [
        {
            "kernel": row["kernel"].removesuffix("_kernel"),
            "sm": row["arch"],
            "dtype": row["dtype"],
            "compiled": str(row["compiled"]),
            "registers": str(row["registers"]),
            "stack": str(row["stack"]),
            "shared": f"{row['shared']:,}",
            "mma": f"{row['hgmma']}/{row['waits']}" if row["hgmma"] else str(row["hmma"]),
            "barriers": str(row["barriers"]),
            "loads": f"{row['loads']}+{row['async_loads']}",
            "tensor code": row["mma"],
        }
        for row in rows
    ]


def to_markdown(result: dict[str, Any]) -> str:
    """The summary as a document."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    command = f"`{result['command']}`, {versions}, commit {result['commit']}: {_explanation(result)}"
    return f"{command}\n\n{common.markdown(summary(result['rows']))}"


def print_compile(result: dict[str, Any], console: Console) -> None:
    """The summary as a table."""
    common.print_table(console, result["what"], summary(result["rows"]))
    common.print_facts(console, result, _explanation(result))


def _explanation(result: dict[str, Any]) -> str:
    return (
        f"{sum(row['compiled'] for row in result['rows']):,} kernels compiled, none run. Each line has the worst of "
        "all tiles: registers and bytes of stack a thread, bytes of shared memory a block; in an iteration of the main "
        "loop HGMMA/waits for them or HMMA, barriers, plain + asynchronous loads."
    )
