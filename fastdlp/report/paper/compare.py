"""Compares finished runs with the paper's results. Accuracies are in percent; std is the population's, over seeds.

A row is a dict of the columns of the CSV file. None stands for a missing run, a result that was not published, and a
difference between results of different data or targets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from fastdlp.report.paper.ledger import Ledger, read_ledger
from fastdlp.report.paper.plan import Plan
from fastdlp.report.paper.tables import AVERAGE, DATASETS, Cell, published

Row = dict[str, Any]
Found = Mapping[Cell, Sequence[Ledger]]
ROUNDS = ("last", "best")


def read_runs(plan: Plan, missing: Sequence[str | None] = ()) -> dict[Cell, list[Ledger]]:
    """The finished runs of a table by entry; `missing` are the folders to leave out."""
    return {
        cell: [
            read_ledger(Path(str(config.out)))
            for config in (plan.config(cell, seed) for seed in plan.seeds)
            if config.out not in missing
        ]
        for cell in plan.cells()
    }


def compare(plan: Plan, found: Found) -> list[Row]:
    """The rows of a table; in a smoke run also the published results for the data sets that did not run."""
    kind = plan.table.kind
    datasets = plan.datasets + (DATASETS if plan.smoke and kind != "curve" else ())
    average = kind == "accuracy" and set(DATASETS) <= set(datasets)
    rows: list[Row] = []
    for encoder in plan.encoders:
        for beta in plan.betas:
            cells = [Cell(encoder, beta, method, dataset) for dataset in datasets for method in plan.methods]
            part = [_ROWS[kind](plan, cell, found.get(cell, [])) for cell in cells]
            if average:
                part += [_average(plan, Cell(encoder, beta, method, AVERAGE), part) for method in plan.methods]
            rows += part
    return rows


def curve_rows(plan: Plan, found: Found) -> list[Row]:
    """Accuracy by round: a row per entry and round."""
    return [
        _head(cell, ledgers) | {"round": lines[0]["round"]} | _spread("accuracy", [line["accuracy"] for line in lines])
        for cell, ledgers in found.items()
        for lines in zip(*(ledger.lines for ledger in ledgers))
    ]


def _accuracy(plan: Plan, cell: Cell, ledgers: Sequence[Ledger]) -> Row:
    row = _head(cell, ledgers)
    for which in ROUNDS:
        row |= _spread(which, [ledger.at(which)["accuracy"] for ledger in ledgers])
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


def _clients(plan: Plan, cell: Cell, ledgers: Sequence[Ledger]) -> Row:
    row = _head(cell, ledgers)
    paper = published(plan.table, cell)
    for name in ("std", "lowest"):
        for which in ROUNDS:
            values = [100 * ledger.at(which)[f"clients_{name}"] for ledger in ledgers]
            row[f"{name}_{which}"] = fmean(values) if values else None
        row[f"{name}_paper"] = paper.get(name)
        row[f"{name}_difference"] = _difference(row[f"{name}_{plan.report}"], row[f"{name}_paper"])
    return row


def _communication(plan: Plan, cell: Cell, ledgers: Sequence[Ledger]) -> Row:
    """Rounds of each seed; MB and bytes are means over the seeds that reach the target."""
    paper = published(plan.table, cell)
    target = paper["target"] if plan.target is None else round(100 * plan.target, 6)
    rounds = [ledger.rounds_to(target / 100) for ledger in ledgers]
    reached = [(ledger, number) for ledger, number in zip(ledgers, rounds) if number is not None]
    same = target == paper.get("target")
    row = _head(cell, ledgers) | {
        "target": target if cell.dataset in plan.datasets else None,
        "seeds_reaching": len(reached),
        "rounds": " ".join("never" if number is None else str(number) for number in rounds),
        "mb": fmean(ledger.paper_mb(number) for ledger, number in reached) if reached else None,
        "bytes": round(fmean(ledger.true_bytes(number) for ledger, number in reached)) if reached else None,
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


def _head(cell: Cell, ledgers: Sequence[Ledger]) -> Row:
    return {
        "encoder": cell.encoder,
        "beta": cell.beta,
        "dataset": cell.dataset,
        "method": cell.method,
        "seeds": len(ledgers),
    }


def _spread(name: str, fractions: Sequence[float]) -> Row:
    """Mean and population standard deviation in percent."""
    percent = [100 * value for value in fractions]
    return {name: fmean(percent) if percent else None, f"{name}_std": pstdev(percent) if percent else None}


def _difference(ours: float | None, paper: float | None) -> float | None:
    return None if ours is None or paper is None else ours - paper
