"""Sweeps: several runs at once, learning rate × α × seed over one model and one partition, as slots of one bank.

Every member of a sweep is a federation of its own: its clients have their own seeds, learning rates and adapters, and
FedAvg averages within a member only. Each member's folder is what `fastdlp.train` would have written, and can be
evaluated, reported and resumed like any run. See `fastdlp.run.sweep_folder` for the files of a sweep.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from fastdlp.config import TrainConfig
from fastdlp.errors import FastdlpError
from fastdlp.files import check_free, remove_temporaries, write_atomic
from fastdlp.methods import make_method, resolve
from fastdlp.run.checkpoint import load_checkpoint, save_checkpoint
from fastdlp.run.folder import CHECKPOINT, PARTITION, SUMMARY, RunFolder
from fastdlp.run.loop import Stopped, run_rounds
from fastdlp.run.recorder import Recorder, identity
from fastdlp.run.setup import Callbacks, Federation, prepare_together
from fastdlp.run.sweep_folder import FILE, SweepFolder, member_name

METRICS = (  # of a member's summary, also in the sweep's
    "zero_shot",
    "accuracy_last",
    "accuracy_best_test",
    "round_best_test",
    "accuracy_chosen",
    "round_chosen",
    "accuracy_val_chosen",
    "clients_lowest",
)


@dataclass(frozen=True)
class Grid:
    """The members: every learning rate with every α and every seed."""

    lr: tuple[float, ...]
    alpha: tuple[float, ...]
    seed: tuple[int, ...]

    def configs(self, config: TrainConfig) -> dict[str, TrainConfig]:
        """The members' resolved configs by name.

        Raises:
            FastdlpError: an empty or repeated value, or a config that a sweep does not support.
        """
        for name, values in asdict(self).items():
            if not values:
                raise FastdlpError(f"--{name} needs at least one value")
            if len(set(values)) < len(values):
                raise FastdlpError(f"--{name} {' '.join(map(str, values))} names a value twice")
        members = {}
        for lr, alpha, seed in itertools.product(self.lr, self.alpha, self.seed):
            member = resolve(replace(config, lr=lr, alpha=alpha, seed=seed))
            members[member_name(member)] = member
        if len(members) < len(self.lr) * len(self.alpha) * len(self.seed):
            raise FastdlpError(
                "two values of --lr or --alpha are the same to six digits: a folder's name holds no more"
            )
        first = next(iter(members.values()))
        if make_method(first).sequential:
            raise FastdlpError(
                f"--method {first.method} trains all weights of one copy: it cannot sweep; use fastdlp train for each"
            )
        if first.trace:
            raise FastdlpError("--trace is not supported in a sweep: trace a single member with fastdlp train")
        if first.pretrained == "none" and len(self.seed) > 1:
            raise FastdlpError("--pretrained none draws the weights from --seed: sweep one seed, or pass weights")
        return members


def sweep(
    config: TrainConfig, grid: Grid, overwrite: bool = False, callbacks: Callbacks | None = None
) -> dict[str, Any]:
    """Run every member of a grid together and return the sweep's summary (the content of summary.json).

    Args:
        config: what all members have in common; `out` is the sweep's folder.
        overwrite: replace a sweep that is already there.
        callbacks: `finished_round` gets the line of the best member.

    Raises:
        FastdlpError: invalid input, a failed write, or every member diverged.
        Stopped: `callbacks.should_stop` returned True.
    """
    start_time = time.perf_counter()
    callbacks = callbacks or Callbacks()
    members = grid.configs(config)
    if config.out is None:
        raise FastdlpError("a sweep needs a folder: pass --out")
    path = Path(config.out)
    check_free(path, FILE, "sweep", overwrite)
    configs = [replace(member, out=str(path / name)) for name, member in members.items()]
    federations = prepare_together(configs, callbacks)
    folder = SweepFolder.create(path, list(members), overwrite)
    for name, f in zip(members, federations):
        RunFolder.create(path / name, f.config, f.partition, f.pixels.ids, overwrite)
    return _run(folder, federations, 0, callbacks, start_time)


def resume_sweep(path: Path, callbacks: Callbacks | None = None) -> dict[str, Any]:
    """Resume a sweep that was stopped; returns its summary.

    Raises:
        FastdlpError: not a sweep's folder, or a damaged one.
        Stopped: `callbacks.should_stop` returned True.
    """
    start_time = time.perf_counter()
    callbacks = callbacks or Callbacks()
    folder = SweepFolder(path)
    if (summary := folder.summary()) is not None:
        return summary
    configs = [replace(run.config(), out=str(run.path)) for run in folder.runs().values()]
    for config in configs:
        same = {name: getattr(configs[0], name) for name in ("lr", "gate_lr", "alpha", "seed", "out")}
        if replace(config, **same) != configs[0]:
            raise FastdlpError(f"{config.out} has other options than the sweep's first member: put its config back")
    partition = path / folder.members[0] / PARTITION
    federations = prepare_together(configs, callbacks, partition)
    finished = 0
    if (path / CHECKPOINT).exists():
        engine = federations[0].engine
        finished = load_checkpoint(path / CHECKPOINT, engine, range(engine.bank.slots), _identity(federations))
    return _run(folder, federations, finished, callbacks, start_time)


def _run(
    folder: SweepFolder, federations: Sequence[Federation], finished: int, callbacks: Callbacks, start_time: float
) -> dict[str, Any]:
    """Run all members from round finished + 1 to the last; then write their summaries and the sweep's."""
    path, first = folder.path, federations[0]
    engine, rounds = first.engine, first.config.rounds or 0
    members = dict(zip(folder.members, federations))
    identities = _identity(federations)

    def checkpoint(number: int) -> None:
        if number:
            save_checkpoint(path / CHECKPOINT, engine, range(engine.bank.slots), number, identities)

    folder.check_alive()
    engine.idle = {row for name in folder.failed for row in members[name].rows}
    with ExitStack() as stack:
        runs = {name: run for name, run in folder.runs().items() if name not in folder.failed}
        for run in runs.values():
            stack.enter_context(run.locked())
        remove_temporaries(path)
        recorders = [Recorder(run, members[name], finished) for name, run in runs.items()]
        callbacks_ = replace(callbacks, started=lambda run, *facts: callbacks.started(path, *facts))
        try:
            ended = run_rounds(recorders, finished, callbacks_, start_time, checkpoint, folder.fail)
        except Stopped as stopped:
            raise Stopped(path, stopped.finished, stopped.rounds, "sweep") from None
        summaries = {}
        for recorder in ended:
            recorder.checkpoint(rounds)
            summaries[recorder.run.path.name] = recorder.finish()
        seconds = {"seconds_total": round(time.perf_counter() - start_time, 3)}
        summary = summarise_sweep(members, summaries, folder.failed) | seconds
        write_atomic(path / SUMMARY, json.dumps(summary, indent=1) + "\n")
        (path / CHECKPOINT).unlink(missing_ok=True)
    return summary


def summarise_sweep(
    members: Mapping[str, Federation], summaries: Mapping[str, dict[str, Any]], failed: Mapping[str, str]
) -> dict[str, Any]:
    """The metrics of all members and settings, and the setting with the highest accuracy on validation, if measured.

    The metrics of a setting (learning rate and α) are means over its seeds; None if a seed diverged.
    """
    rows: list[dict[str, Any]] = []
    for name, federation in members.items():
        c = federation.config
        row: dict[str, Any] = {"name": name, "lr": c.lr, "alpha": c.alpha, "seed": c.seed, "failed": failed.get(name)}
        rows.append(row | {metric: summaries[name][metric] if name in summaries else None for metric in METRICS})
    settings: list[dict[str, Any]] = []
    for lr, alpha in dict.fromkeys((row["lr"], row["alpha"]) for row in rows):
        seeds = [row for row in rows if (row["lr"], row["alpha"]) == (lr, alpha)]
        means = {name: _mean([row[name] for row in seeds]) for name in METRICS if not name.startswith("round")}
        settings.append({"lr": lr, "alpha": alpha, "seeds": [row["seed"] for row in seeds]} | means)
    judged = [setting for setting in settings if setting["accuracy_val_chosen"] is not None]
    picked = max(judged, key=lambda setting: setting["accuracy_val_chosen"], default=None)
    first = next(iter(members.values()))
    return {
        "config": asdict(first.config) | {"lr": None, "gate_lr": None, "alpha": None, "seed": None, "out": None},
        "members": rows,
        "settings": settings,
        "picked_on_validation": picked,
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if len(known) == len(values) else None


def _identity(federations: Sequence[Federation]) -> dict[str, str]:
    """What must match between a sweep's checkpoint and the sweep that loads it: the identities of all members."""
    whole = json.dumps([identity(federation) for federation in federations], sort_keys=True)
    return {"members": hashlib.sha256(whole.encode()).hexdigest()}
