"""A sweep beside its members as runs of their own: how much faster, and whether they are the same runs.

Against two baselines: the members one after another in this process, which starts Python once and has everything
loaded; and as commands, each a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from fastdlp.bench.machine import machine
from fastdlp.config import TrainConfig
from fastdlp.engine.device import pick_device
from fastdlp.methods import make_method
from fastdlp.run.folder import ADAPTERS, METRICS
from fastdlp.run.sweep import Grid, sweep
from fastdlp.run.train import Callbacks, train


@dataclass(frozen=True)
class Row:
    """One member: its seconds as a run of its own, and how it differs from that run."""

    member: str
    seconds_alone: float
    seconds_command: float
    counts_equal: bool  # every client's correct predictions and gates at zero in every round
    losses_differ_by: float  # the largest difference of a round's loss, relative
    adapters_differ_by: float  # the largest difference of an entry


def bench_sweep(config: TrainConfig, grid: Grid, tell: Callable[[str], None]) -> dict[str, Any]:
    """Time a sweep and its members alone, and compare what they wrote.

    Returns:
        Seconds of both, their ratio, and per member how far the two are apart.
    """
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        tell("the sweep")
        clock = time.perf_counter()
        sweep(replace(config, out=str(place / "sweep")), grid, callbacks=Callbacks())
        together = time.perf_counter() - clock
        rows: list[Row] = []
        for name, member in grid.configs(config).items():
            tell(f"{name} alone")
            clock = time.perf_counter()
            train(replace(member, out=str(place / name)))
            seconds = time.perf_counter() - clock
            tell(f"{name} as a command")
            clock = time.perf_counter()
            _command(replace(member, out=str(place / f"{name}-command")))
            command = time.perf_counter() - clock
            apart = _compare(place / "sweep" / name, place / name)
            rows.append(Row(name, round(seconds, 3), round(command, 3), *apart))
    alone, commands = sum(row.seconds_alone for row in rows), sum(row.seconds_command for row in rows)
    return {
        "command": " ".join(["fastdlp", *sys.argv[1:]]),
        "method": config.method,
        "encoder": config.encoder,
        "dataset": config.dataset,
        "model": config.model,
        "members": len(rows),
        "rounds": next(iter(grid.configs(config).values())).rounds,
        **machine(pick_device(config.device)),
        "torch": torch.__version__,
        "seconds_sweep": round(together, 1),
        "seconds_alone": round(alone, 1),
        "seconds_commands": round(commands, 1),
        "speed_up": round(alone / together, 3),
        "speed_up_commands": round(commands / together, 3),
        "equal_counts": sum(row.counts_equal for row in rows),
        "losses_differ_by": max(row.losses_differ_by for row in rows),
        "adapters_differ_by": max(row.adapters_differ_by for row in rows),
        "rows": [asdict(row) for row in rows],
    }


def markdown(result: dict[str, Any]) -> str:
    """The comparison in a few lines."""
    return (
        f"{result['members']} members × {result['rounds']} rounds of {result['method']} on {result['dataset']}: "
        f"{result['seconds_sweep']} s as one sweep, {result['seconds_alone']} s one after another in one process "
        f"({result['speed_up']:.2f}×), {result['seconds_commands']} s as {result['members']} commands "
        f"({result['speed_up_commands']:.2f}×); {result['threads']} threads. {result['equal_counts']} of "
        f"{result['members']} members count the same predictions and gates in every round; adapters differ by at most "
        f"{result['adapters_differ_by']:.1e}, losses by {result['losses_differ_by']:.1e} of themselves.\n"
    )


def _command(config: TrainConfig) -> None:
    """`fastdlp train` of a member."""
    words = ["--out", str(config.out), "--method", config.method, "--rounds", str(config.rounds)]
    words += ["--lr", str(config.lr), "--seed", str(config.seed), "--device", config.device]
    words += ["--alpha", str(config.alpha)] if "alpha" in make_method(config).reads() else []
    subprocess.run([sys.executable, "-m", "fastdlp", "train", "--quiet", *words], check=True)


def _compare(member: Path, alone: Path) -> tuple[bool, float, float]:
    """Whether all counts are equal, and the largest differences of losses and of adapters."""
    ours, theirs = _lines(member), _lines(alone)
    losses = [
        abs(one["losses"][name] - loss) / abs(loss)
        for one, other in zip(ours, theirs)
        for name, loss in other["losses"].items()
    ]
    worst = 0.0
    for path in sorted((alone / ADAPTERS).glob("*.safetensors")):
        tensors = load_file(member / ADAPTERS / path.name)
        worst = max(worst, *(float((tensors[name] - t).abs().max()) for name, t in load_file(path).items()))
    return _counts(ours) == _counts(theirs), max(losses), worst


def _lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / METRICS).read_text().splitlines()]


def _counts(lines: list[dict[str, Any]]) -> list[Any]:
    return [[(c["correct"], c["n"], c["gates_zero"]) for c in line["clients"]] for line in lines]
