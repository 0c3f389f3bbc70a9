"""A comparison as a picture: bars, ours beside the paper's, or accuracy by round."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from fastdlp.report.paper.compare import Row
from fastdlp.report.paper.plan import Plan
from fastdlp.report.style import FAINT, INK, PALETTE, look, panels, png, rounds_axis

_COLOURS = dict(zip(("feddlp", "local-sora", "flora", "feddat", "fedclip", "combined"), PALETTE)) | {"local": FAINT}
# The panels of bars by kind of table: label, our result (with the reported round in place of {}) and its error bar, the
# paper's result and its error bar.
_BARS = {
    "accuracy": [("accuracy, {} round, %", "{}", "{}_std", "paper", "paper_std")],
    "ablation": [("accuracy, {} round, %", "{}", "{}_std", "paper", "")],
    "clients": [
        ("std over clients, {} round, %", "std_{}", "", "std_paper", ""),
        ("lowest client, {} round, %", "lowest_{}", "", "lowest_paper", ""),
    ],
    "communication": [("MB to target", "mb", "", "paper_mb", "")],
}


def draw_bars(plan: Plan, rows: Sequence[Row]) -> bytes:
    """A PNG of a table: a panel for each encoder, β and metric, a group of bars for each data set."""
    shown = list(product(plan.encoders, plan.betas, _BARS[plan.table.kind]))
    datasets = list(dict.fromkeys(row["dataset"] for row in rows))
    methods = len(plan.methods)
    with look():
        figure, grid = panels(len(shown), 1, 2.8, max(6.0, 0.36 * len(datasets) * (methods + 1) + 1.5))
        for axes, (encoder, beta, (label, *names)) in zip(grid, shown):
            part = {(r["dataset"], r["method"]): r for r in rows if (r["encoder"], r["beta"]) == (encoder, beta)}
            mean, std, paper, paper_std = (name.format(plan.report) for name in names)
            for number, method in enumerate(plan.methods):
                own = [part[dataset, method] for dataset in datasets]
                at = np.arange(len(datasets)) + (number - (methods - 1) / 2) * 0.84 / methods
                _bars(axes, at, own, (mean, std), (paper, paper_std), _COLOURS[method], 0.38 / methods)
            axes.set_title(f"{encoder} encoder, β {beta:g}")
            axes.set_ylabel(label.format(plan.report))
            axes.set_xticks(range(len(datasets)), datasets)
            axes.tick_params(axis="x", length=0)
            axes.grid(False, axis="x")
        keys = [Patch(facecolor=_COLOURS[method], label=method) for method in plan.methods]
        keys.append(Patch(facecolor=INK, label="solid: ours"))
        keys.append(Patch(facecolor="white", edgecolor=INK, hatch="/////", label="hatched: paper"))
        figure.legend(handles=keys, loc="outside lower center", ncols=len(keys))
        figure.suptitle(_title(plan), fontsize=10)
        return png(figure)


def draw_curves(plan: Plan, rows: Sequence[Row]) -> bytes:
    """A PNG of accuracy by round: the mean over seeds in a band of ± one standard deviation."""
    shown = list(product(plan.encoders, plan.betas, plan.datasets))
    columns = len(plan.datasets)
    with look():
        figure, grid = panels(len(shown), columns, 2.6, max(5.0, 3.2 * columns))
        for axes, (encoder, beta, dataset) in zip(grid, shown):
            for method in plan.methods:
                entry = {"encoder": encoder, "beta": beta, "dataset": dataset, "method": method}
                own = [row for row in rows if entry.items() <= row.items()]
                rounds = [row["round"] for row in own]
                mean, std = (np.array([row[name] for row in own]) for name in ("accuracy", "accuracy_std"))
                axes.plot(rounds, mean, color=_COLOURS[method], label=method)
                axes.fill_between(rounds, mean - std, mean + std, color=_COLOURS[method], alpha=0.18, lw=0)
            axes.set_title(f"{dataset}, {encoder} encoder, β {beta:g}")
            axes.set_ylabel("accuracy, %")
            rounds_axis(axes, max((row["round"] for row in rows), default=1))
        figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
        figure.suptitle(_title(plan), fontsize=10)
        return png(figure)


def _title(plan: Plan) -> str:
    return f"{plan.name}: {plan.table.title}" + ("\nsmoke run: digits is not in the paper" if plan.smoke else "")


def _bars(
    axes: Axes,
    at: np.ndarray,
    rows: Sequence[Row],
    ours: tuple[str, str],
    paper: tuple[str, str],
    color: str,
    width: float,
) -> None:
    """One method's bars for all data sets, centred on `at` [data sets]: ours left, the paper's right.

    Where nothing ran, or nothing was published, the other bar has twice the width.
    """
    both = np.array([row["seeds"] > 0 and row[paper[0]] is not None for row in rows])
    for side, (mean, std), hatched in ((-0.5, ours, False), (0.5, paper, True)):
        present = [number for number, row in enumerate(rows) if row[mean] is not None]
        axes.bar(
            (at + side * width * both)[present],
            [rows[number][mean] for number in present],
            (width * (2 - both))[present],
            yerr=[rows[number][std] or 0.0 for number in present] if std else None,
            facecolor="white" if hatched else color,
            edgecolor=color,
            hatch="/////" if hatched else None,
            error_kw={"elinewidth": 0.9, "capsize": 1.5, "ecolor": INK},
        )
