"""The time of one FEDDLP step by kernel, from torch's profiler, for each teacher.

On a GPU the step is the replay of its CUDA graph; on a CPU the rows are torch's operations.
"""

from __future__ import annotations

from typing import Any

import torch
from rich.console import Console
from torch.profiler import ProfilerActivity, profile

from fastdlp.bench import common
from fastdlp.bench.common import Progress, synchronize
from fastdlp.bench.fastdlp_rounds import EngineRounds
from fastdlp.bench.problem import make_problem

WARM_UP = 3  # steps before the one that is profiled: eager, recorded, replayed
SHOWN = 30  # rows of a printed table


def bench_profile(
    model: str, clients: int, batch: int, precision: str, backend: str, device: torch.device, progress: Progress
) -> dict[str, Any]:
    """Kernels of one step of all clients in the image tower, most time first."""
    problem = make_problem(model, batch, clients)
    steps = []
    for teacher in ("fresh", "pre-update"):
        progress(f"a step with --teacher {teacher}")
        rounds = EngineRounds(problem, precision, device, backend, teacher=teacher, graph=device.type == "cuda")
        steps.append({"teacher": teacher, "kernels": profiled(rounds, device)})
    what = f"one FEDDLP step, {model}, image encoder, {clients} clients × {batch} images, {precision}, {backend}"
    return {"what": what, "steps": steps, **common.facts(device, "triton")}


def profiled(rounds: EngineRounds, device: torch.device) -> list[dict[str, Any]]:
    """Calls and milliseconds of every kernel of a step."""
    for _ in range(WARM_UP):
        rounds.step()
    synchronize(device)
    gpu = device.type == "cuda"
    activity = ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU
    with profile(activities=[activity], acc_events=True) as profiler:  # without acc_events torch warns of lost events
        rounds.step()
        synchronize(device)
    rows = [
        {"name": e.key, "calls": e.count, "ms": (e.self_device_time_total if gpu else e.self_cpu_time_total) / 1e3}
        for e in profiler.key_averages()
    ]
    return sorted(rows, key=lambda row: -row["ms"])


def print_profile(result: dict[str, Any], console: Console) -> None:
    """A table for each teacher."""
    for step in result["steps"]:
        total = sum(row["ms"] for row in step["kernels"])
        lines = [
            {
                "ms": f"{row['ms']:.3f}",
                "share": f"{row['ms'] / total:.1%}",
                "calls": str(row["calls"]),
                "kernel": row["name"],
            }
            for row in step["kernels"][:SHOWN]
        ]
        shown = f"{total:.2f} ms in {len(step['kernels'])} kernels, the first {len(lines)}"
        common.print_table(console, f"{result['what']}, --teacher {step['teacher']}: {shown}", lines)
    common.print_facts(console, result)
