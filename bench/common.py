"""What all benchmarks share: timing, facts about the machine, failures that do not end a run, and tables."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
import platform
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from fastdlp.errors import FastdlpError
from fastdlp.kernels.frozen import frozen_linear

QUANTILES = [0.2, 0.5, 0.8]
PEAK_SIDE = {"cuda": 8192, "cpu": 1024}  # of the square product whose speed counts as the peak
TEXT = ("variant", "dtype", "kernel", "tile", "linear", "tensor code", "axis")  # columns aligned to the left

Progress = Callable[[str], None]


# -- facts --------------------------------------------------------------------------------------------------


def facts(device: torch.device, *packages: str) -> dict[str, Any]:
    """Command, device, threads, commit, and versions of python, torch and those of `packages` that are installed."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        name = models[0] if models else platform.processor()
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {
        "command": " ".join(["fastdlp", *sys.argv[1:]]),
        "device": name,
        "threads": torch.get_num_threads(),
        "commit": _commit(),
        "versions": versions | {name: importlib.metadata.version(name) for name in packages if installed(name)},
    }


def _commit() -> str:
    """Of the checkout; $FASTDLP_COMMIT names it for a copy without history."""
    command = ["git", "describe", "--always", "--dirty"]
    given = os.environ.get("FASTDLP_COMMIT")
    if given is None:
        given = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    return given or "unknown"


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def require_peft() -> None:
    """Raises FastdlpError where PEFT is not installed."""
    if not (installed("peft") and installed("transformers")):
        raise FastdlpError(
            "the PEFT baseline is not installed: pip install '.[bench]' in the checkout, or leave PEFT out"
        )


# -- timing -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Times:
    """Quantiles of a call in milliseconds. timed: "calls", or "graph" for replays of a CUDA graph."""

    ms_20: float
    ms_50: float
    ms_80: float
    timed: str = "calls"


def measure(call: Callable[[], Any], device: torch.device, milliseconds: float, graph: bool = False) -> Times:
    """Time a call for about `milliseconds`, after warm-up.

    Args:
        graph: on a GPU, record the call and time its replays, because launching a few kernels takes the host longer
            than they run. A call that cannot be recorded is timed as it is.
    """
    if device.type != "cuda":
        # Importing it logs a line where a CUDA toolkit is installed without a GPU.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        from torch.utils.benchmark import Timer

        timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
        call()
        return Times(*quantiles(timer.blocked_autorange(min_run_time=milliseconds / 1e3).times))
    from triton.testing import do_bench, do_bench_cudagraph

    torch.cuda.synchronize(device)
    if graph:
        try:
            low, middle, high = do_bench_cudagraph(call, rep=milliseconds, quantiles=QUANTILES)
            return Times(low, middle, high, "graph")
        except RuntimeError:  # it waits for the device, or copies from the host
            torch.cuda.synchronize(device)
    return Times(*do_bench(call, warmup=milliseconds / 5, rep=milliseconds, quantiles=QUANTILES))


def quantiles(times: Sequence[float]) -> tuple[float, float, float]:
    """20, 50 and 80 % of times in seconds, in milliseconds."""
    low, middle, high = (1e3 * np.quantile(times, QUANTILES)).tolist()
    return low, middle, high


def peak_flops(dtype: torch.dtype, device: torch.device, milliseconds: float) -> float:
    """FLOP a second of a large square product."""
    side = PEAK_SIDE[device.type]
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / (measure(lambda: frozen_linear(a, b), device, milliseconds).ms_50 / 1e3)


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Of one call, until the device has finished it."""
    synchronize(device)
    start = perf_counter()
    call()
    synchronize(device)
    return perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def survive(what: str, failed: list[str]) -> Iterator[None]:
    """Turn what is raised inside into a line of `failed`, and print the traceback of an unexpected error.

    The other variants are still measured; the command exits with 1 in the end.
    """
    try:
        yield
    except Exception as error:
        line = " ".join(str(error).split())[:400]
        if not isinstance(error, FastdlpError):
            traceback.print_exc()
            line = f"{type(error).__name__} {line}"
        failed.append(line if line.startswith(what) else f"{what}: {line}")


# -- tables -------------------------------------------------------------------------------------------------

Lines = Sequence[Mapping[str, str]]


def print_table(console: Console, title: str, lines: Lines) -> None:
    """Lines as text by column; all have the columns of the first."""
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE, pad_edge=False)
    table.collapse_padding = True
    for column in lines[0] if lines else ():
        justify: Any = "left" if column in TEXT else "right"
        table.add_column(
            column.replace(" ", "\n").replace("_", " ") if column not in TEXT else column, justify=justify, no_wrap=True
        )
    for line in lines:
        table.add_row(*line.values())
    # A terminal that is too narrow wraps the lines; rich would cut the numbers.
    table.width = console.measure(table, options=console.options.update(max_width=1000)).maximum
    console.print(table, highlight=False, markup=False, crop=False)


def print_facts(console: Console, result: Mapping[str, Any], explanation: str = "") -> None:
    """What the columns mean, and device, versions and commit."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    where = f"{result['device']}, {result['threads']} threads; {versions}; commit {result['commit']}"
    for line in (*result.get("notes", ()), explanation, where):
        if line:
            console.print(line, highlight=False, markup=False)


def markdown(lines: Lines) -> str:
    """The same lines as a Markdown table."""
    table = [[*lines[0]], ["---"] * len(lines[0]), *([*line.values()] for line in lines)] if lines else []
    return "".join(f"| {' | '.join(cells)} |\n" for cells in table)
