"""What a FEDDLP step spends its time on: every kernel of one step by torch's profiler, for each teacher.

On a GPU the step is the replay of its CUDA graph, and what is neither a kernel nor a copy is idle time between them. On
a CPU, which has no kernels, the rows are torch's operations.
"""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from fastdlp.bench.engine import image_rounds
from fastdlp.bench.machine import machine
from fastdlp.bench.problem import make_problem

TEACHERS = ("fresh", "pre-update")
BEFORE = 3  # steps before the one that is profiled: as it is, recorded, replayed
SHOWN = 30  # rows of a printed table
NAME = 90  # characters of a kernel's name there


def bench_profile(
    model: str,
    clients: int,
    batch: int,
    precision: str,
    backend: str,
    device: torch.device,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Kernels of one step of all clients in the image tower, most time first."""
    problem = make_problem(model, batch, clients)
    steps = []
    for teacher in TEACHERS:
        tell(f"a step with --teacher {teacher}")
        rounds = image_rounds(problem, precision, device, backend, teacher=teacher, graph=device.type == "cuda")
        for _ in range(BEFORE):
            rounds.step()
        steps.append({"teacher": teacher, **profiled(rounds.step, device)})
    options = f"--model {model} --clients {clients} --batch-size {batch} --precision {precision} --backend {backend}"
    return {
        "what": f"one FEDDLP step, {model}, image encoder, {clients} clients × {batch} images, {precision}, {backend}",
        "command": f"fastdlp bench profile {options}",
        "steps": steps,
        **machine(device),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }


def profiled(step: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Milliseconds from the first kernel of a step to the end of its last, of all kernels, and of each."""
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.synchronize(device)
    activity = ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU
    with profile(activities=[activity], acc_events=True) as profiler:  # without it torch warns of what is lost
        step()
        if gpu:
            torch.cuda.synchronize(device)
    events = [event for event in profiler.events() if (event.device_type == DeviceType.CUDA) == gpu]
    calls, ms = Counter[str](), Counter[str]()
    for event in events:
        calls[event.name] += 1
        ms[event.name] += (event.time_range.elapsed_us() if gpu else event.self_cpu_time_total) / 1e3
    ranges = [event.time_range for event in events]
    return {
        "ms_span": (max(r.end for r in ranges) - min(r.start for r in ranges)) / 1e3,
        "ms_kernels": ms.total(),
        "kernels": [{"name": name, "calls": calls[name], "ms": value} for name, value in ms.most_common()],
    }


def print_profile(result: dict[str, Any], console: Console) -> None:
    """A table for each teacher."""
    for step in result["steps"]:
        title = f"{result['what']}, --teacher {step['teacher']}: "
        title += f"{step['ms_span']:.2f} ms, of them kernels {step['ms_kernels']:.2f} ms"
        console.print(title, style="bold", highlight=False)
        table = Table(box=SIMPLE, pad_edge=False)
        for column in ("ms", "share", "calls"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("kernel", no_wrap=True)
        for row in step["kernels"][:SHOWN]:
            share = f"{row['ms'] / step['ms_kernels']:.1%}"
            table.add_row(f"{row['ms']:.3f}", share, str(row["calls"]), row["name"][:NAME])
        if rest := step["kernels"][SHOWN:]:
            calls = sum(row["calls"] for row in rest)
            table.add_row(f"{sum(row['ms'] for row in rest):.3f}", "", str(calls), f"{len(rest)} others")
        console.print(table, highlight=False, markup=False)
