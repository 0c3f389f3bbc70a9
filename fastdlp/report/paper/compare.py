"""Our figures beside the paper's: finished runs in, rows out. Accuracies in percent, spreads over seeds population std.

A row is a dict that goes into the CSV file as it is. None stands for what is not there: a run that is missing, a
figure that was not published, a difference to other data or to another target.
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
    """Every finished run of a table by its entry; `missing` holds the folders to leave out."""
    return {
        cell: [
            read_ledger(Path(str(config.out)))
            for config in (plan.config(cell, seed) for seed in plan.seeds)
            if config.out not in missing
        ]
        for cell in plan.cells()
    }


def compare(plan: Plan, found: Found) -> list[Row]:
    """The rows of a table: each entry, then what was published of data sets that did not run."""
    rows = [_ROWS[plan.table.kind](plan, cell, ledgers) for cell, ledgers in found.items()]
    others = DATASETS if plan.rehearsal and plan.table.kind != "curve" else ()
    rows += [
        _ROWS[plan.table.kind](plan, Cell(encoder, beta, method, dataset), [])
        for encoder in plan.encoders
        for beta in plan.betas
        for dataset in others
        for method in plan.methods
    ]
    if plan.table.kind == "accuracy" and (plan.rehearsal or set(plan.datasets) == set(DATASETS)):
        rows += [
            _average(plan, Cell(encoder, beta, method, AVERAGE), rows)
            for encoder in plan.encoders
            for beta in plan.betas
            for method in plan.methods
        ]
    datasets = (*plan.datasets, *others, AVERAGE)
    order = [(e, b, d, m) for e in plan.encoders for b in plan.betas for d in datasets for m in plan.methods]
    return sorted(rows, key=lambda row: order.index((row["encoder"], row["beta"], row["dataset"], row["method"])))


def curve_rows(plan: Plan, found: Found) -> list[Row]:
    """Accuracy by round, a row per entry and round."""
    return [
        _head(cell, ledgers) | {"round": lines[0]["round"]} | _spread("accuracy", [line["accuracy"] for line in lines])
        for cell, ledgers in found.items()
        for lines in zip(*(ledger.lines for ledger in ledgers))
    ]


def _accuracy(plan: Plan, cell: Cell, ledgers: Sequence[Ledger]) -> Row:
    row = _head(cell, ledgers)
    for which in ROUNDS:
        row |= _spread(which, [ledger.at(which)["accuracy"] for ledger in ledgers])
    figures = published(plan.table, cell)
    row |= {"paper": figures.get("mean"), "paper_std": figures.get("std")}
    return row | {"difference": _difference(row[plan.report], row["paper"])}


def _average(plan: Plan, cell: Cell, rows: Sequence[Row]) -> Row:
    """Over the data sets, as the paper takes it: mean of the means and mean of the spreads."""
    mine = [
        row
        for row in rows
        if (row["encoder"], row["beta"], row["method"]) == (cell.encoder, cell.beta, cell.method)
        and row["dataset"] in DATASETS
    ]
    average = _accuracy(plan, cell, []) | {"seeds": min(row["seeds"] for row in mine)}
    for name in (f"{which}{part}" for which in ROUNDS for part in ("", "_std")):
        average[name] = fmean(row[name] for row in mine) if average["seeds"] else None
    return average | {"difference": _difference(average[plan.report], average["paper"])}


def _clients(plan: Plan, cell: Cell, ledgers: Sequence[Ledger]) -> Row:
    row = _head(cell, ledgers)
    figures = published(plan.table, cell)
    for name in ("std", "lowest"):
        for which in ROUNDS:
            values = [100 * ledger.at(which)[f"clients_{name}"] for ledger in ledgers]
            row[f"{name}_{which}"] = fmean(values) if values else None
        row[f"{name}_paper"] = figures.get(name)
        row[f"{name}_difference"] = _difference(row[f"{name}_{plan.report}"], row[f"{name}_paper"])
    return row


def _communication(plan: Plan, cell: Cell, ledgers: Sequence[Ledger]) -> Row:
    """Every seed by itself; MB and bytes are means over the seeds that reach the target."""
    figures = published(plan.table, cell)
    target = figures["target"] if plan.target is None else round(100 * plan.target, 6)
    rounds = [ledger.rounds_to(target / 100) for ledger in ledgers]
    reached = [(ledger, number) for ledger, number in zip(ledgers, rounds) if number is not None]
    same = target == figures.get("target")
    row = _head(cell, ledgers) | {
        "target": target if cell.dataset in plan.datasets else None,
        "seeds_reaching": len(reached),
        "rounds": " ".join("never" if number is None else str(number) for number in rounds),
        "mb": fmean(ledger.paper_mb(number) for ledger, number in reached) if reached else None,
        "bytes": round(fmean(ledger.true_bytes(number) for ledger, number in reached)) if reached else None,
        "paper_target": figures.get("target"),
        "paper_rounds": figures.get("rounds"),
        "paper_mb": figures.get("mb"),
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
