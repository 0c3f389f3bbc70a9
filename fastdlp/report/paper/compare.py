"""Compares finished runs with the paper's results. Accuracies are in percent; std is the population's, over seeds.

A row is a dict of the columns of the CSV file. None stands for a missing run, a result that was not published, and a
difference between results of different data or targets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from fastdlp.config import TrainConfig
from fastdlp.report.paper.plan import Plan
from fastdlp.report.paper.tables import AVERAGE, DATASETS, Cell, paper_mb, published
from fastdlp.report.read import Run, read_finished

Row = dict[str, Any]
Found = Mapping[Cell, Sequence[Run]]
ROUNDS = ("last", "best")


def read_runs(plan: Plan, missing: Sequence[TrainConfig] = ()) -> dict[Cell, list[Run]]:
    """The runs of a table by entry, all of which but the missing ones are finished."""
    return {
        cell: [
            read_finished(Path(str(config.out)))
            for config in (plan.config(cell, seed) for seed in plan.seeds)
            if config not in missing
        ]
        for cell in plan.cells()
    }


def compare(plan: Plan, found: Found) -> list[Row]:
    """The rows of a table; in a smoke run also the published results for the data sets that did not run."""
    kind = plan.table.kind
    datasets = plan.datasets + (DATASETS if plan.smoke and kind != "curve" else ())
    average = kind == "accuracy" and set(DATASETS) <= set(datasets)
    rows: list[Row] = []
    for encoder, beta in product(plan.encoders, plan.betas):
        cells = [Cell(encoder, beta, method, dataset) for dataset in datasets for method in plan.methods]
        part = [_ROWS[kind](plan, cell, found.get(cell, [])) for cell in cells]
        if average:
            part += [_average(plan, Cell(encoder, beta, method, AVERAGE), part) for method in plan.methods]
        rows += part
    return rows


def curve_rows(plan: Plan, found: Found) -> list[Row]:
    """Accuracy by round: a row per entry and round."""
    return [
        _head(cell, runs) | {"round": number} | _spread("accuracy", accuracies)
        for cell, runs in found.items()
        for number, accuracies in enumerate(zip(*(run.accuracy for run in runs)), 1)
    ]


def message_sizes(run: Run, rounds: int) -> tuple[float, int]:
    """What one client sent and received in the first rounds: MiB as the paper counts, and bytes of messages.

    All clients that train exchange the same; a client without training samples sends nothing and is left out.
    """
    return paper_mb(rounds, run.uploaded or 0), int(run.client_bytes[rounds - 1].max())


def _accuracy(plan: Plan, cell: Cell, runs: Sequence[Run]) -> Row:
    row = _head(cell, runs)
    for which in ROUNDS:
        row |= _spread(which, [run.accuracy[_at(run, which)] for run in runs])
    paper = published(plan.table, cell)
    row |= {"paper": paper.get("mean"), "paper_std": paper.get("std")}
    return row | {"difference": _difference(row[plan.report], row["paper"])}


def _average(plan: Plan, cell: Cell, rows: Sequence[Row]) -> Row:
    """Over the data sets, as in the paper: the mean of the means and the mean of the standard deviations."""
    own = [row for row in rows if row["method"] == cell.method and row["dataset"] in DATASETS]
    average = _accuracy(plan, cell, []) | {"seeds": min(row["seeds"] for row in own)}
    for name in (f"{which}{part}" for which in ROUNDS for part in ("", "_std")):
        average[name] = fmean(row[name] for row in own) if average["seeds"] else None
    return average | {"difference": _difference(average[plan.report], average["paper"])}


def _clients(plan: Plan, cell: Cell, runs: Sequence[Run]) -> Row:
    row = _head(cell, runs)
    paper = published(plan.table, cell)
    for name, statistic in (("std", "std"), ("lowest", "min")):
        for which in ROUNDS:
            values = [100 * float(run.over_clients(statistic)[_at(run, which)]) for run in runs]
            row[f"{name}_{which}"] = fmean(values) if values else None
        row[f"{name}_paper"] = paper.get(name)
        row[f"{name}_difference"] = _difference(row[f"{name}_{plan.report}"], row[f"{name}_paper"])
    return row


def _communication(plan: Plan, cell: Cell, runs: Sequence[Run]) -> Row:
    """Rounds of each seed; MB and bytes are means over the seeds that reach the target."""
    paper = published(plan.table, cell)
    target = paper["target"] if plan.target is None else round(100 * plan.target, 6)
    rounds = [run.rounds_to(target / 100) for run in runs]
    reached = [message_sizes(run, number) for run, number in zip(runs, rounds) if number is not None]
    same = target == paper.get("target")
    row = _head(cell, runs) | {
        "target": target if cell.dataset in plan.datasets else None,
        "seeds_reaching": len(reached),
        "rounds": " ".join("never" if number is None else str(number) for number in rounds),
        "mb": fmean(mb for mb, _ in reached) if reached else None,
        "bytes": round(fmean(size for _, size in reached)) if reached else None,
        "paper_target": paper.get("target"),
        "paper_rounds": paper.get("rounds"),
        "paper_mb": paper.get("mb"),
    }
    return row | {"difference": _difference(row["mb"], row["paper_mb"]) if same else None}


_ROWS = {
    "accuracy": _accuracy,
    "ablation": _accuracy,
    "curve": _accuracy,
    "clients": _clients,
    "communication": _communication,
}


def _head(cell: Cell, runs: Sequence[Run]) -> Row:
    return {
        "encoder": cell.encoder,
        "beta": cell.beta,
        "dataset": cell.dataset,
        "method": cell.method,
        "seeds": len(runs),
    }


def _at(run: Run, which: str) -> int:
    """Index of the "last" round, or of the "best" one on test."""
    return -1 if which == "last" else run.best[0] - 1


def _spread(name: str, fractions: Sequence[float]) -> Row:
    """Mean and population standard deviation in percent."""
    percent = [100 * float(value) for value in fractions]
    return {name: fmean(percent) if percent else None, f"{name}_std": pstdev(percent) if percent else None}


def _difference(ours: float | None, paper: float | None) -> float | None:
    return None if ours is None or paper is None else ours - paper
