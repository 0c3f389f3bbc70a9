"""A sweep beside its members as runs of their own: how much faster it is, and whether they are the same runs.

The members run one after another in this process, which has everything loaded, and as commands, each a new process.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors.torch import load_file

from fastdlp.bench import common
from fastdlp.bench.common import Progress
from fastdlp.config import TrainConfig
from fastdlp.engine.device import pick_device
from fastdlp.methods import make_method
from fastdlp.run.folder import ADAPTERS, METRICS
from fastdlp.run.sweep import Grid, sweep
from fastdlp.run.train import Callbacks, train


def bench_sweep(config: TrainConfig, grid: Grid, progress: Progress) -> dict[str, Any]:
    """Seconds of a sweep and of its members alone, and per member how far the two are apart."""
    device = pick_device(config.device)
    seconds = {"one sweep": 0.0, "one after another": 0.0, "as commands": 0.0}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        progress("the sweep")
        together = partial(sweep, replace(config, out=str(place / "sweep")), grid, callbacks=Callbacks())
        seconds["one sweep"] = common.seconds(together, device)
        for name, member in grid.configs(config).items():
            progress(f"{name} alone")
            seconds["one after another"] += common.seconds(
                partial(train, replace(member, out=str(place / name))), device
            )
            progress(f"{name} as a command")
            command = partial(_command, replace(member, out=str(place / f"{name}-command")))
            seconds["as commands"] += common.seconds(command, device)
            rows.append({"member": name, **_compare(place / "sweep" / name, place / name)})
    what = f"{len(rows)} members of a sweep, {config.method} on {config.dataset}, {config.rounds} rounds"
    return {"what": what, "seconds": seconds, "rows": rows, **common.facts(device)}


def _command(config: TrainConfig) -> None:
    """`fastdlp train` of a member."""
    options = ["out", "method", "rounds", "lr", "seed", "device"]
    options += ["alpha"] if "alpha" in make_method(config).reads() else []
    arguments = [text for name in options for text in (f"--{name}", str(getattr(config, name)))]
    subprocess.run([sys.executable, "-m", "fastdlp", "train", "--quiet", *arguments], check=True)


def _compare(member: Path, alone: Path) -> dict[str, Any]:
    """Whether all counts are equal, the largest relative difference of losses, and the largest of adapters."""
    ours, theirs = ([json.loads(line) for line in (run / METRICS).open()] for run in (member, alone))
    counts, others = (
        [[(c["correct"], c["n"], c["gates_zero"]) for c in line["clients"]] for line in lines]
        for lines in (ours, theirs)
    )
    losses = [
        abs(one["losses"][name] - loss) / abs(loss)
        for one, other in zip(ours, theirs)
        for name, loss in other["losses"].items()
    ]
    adapters = [
        float((load_file(member / ADAPTERS / path.name)[name] - tensor).abs().max())
        for path in (alone / ADAPTERS).glob("*.safetensors")
        for name, tensor in load_file(path).items()
    ]
    return {"counts_equal": counts == others, "losses_differ_by": max(losses), "adapters_differ_by": max(adapters)}


def print_sweep(result: dict[str, Any], console: Console) -> None:
    together = result["seconds"]["one sweep"]
    lines = [
        {"variant": name, "seconds": f"{seconds:.1f}", "÷ sweep": f"{seconds / together:.2f}"}
        for name, seconds in result["seconds"].items()
    ]
    common.print_table(console, result["what"], lines)
    worst = {n: max(row[n] for row in result["rows"]) for n in ("losses_differ_by", "adapters_differ_by")}
    equal = sum(row["counts_equal"] for row in result["rows"])
    explanation = (
        f"{equal} of {len(result['rows'])} members have the same predictions and gates in every round; "
        f"adapters differ by at most {worst['adapters_differ_by']:.1e}, losses by {worst['losses_differ_by']:.1e}"
    )
    common.print_facts(console, result, explanation)
