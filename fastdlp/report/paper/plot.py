"""A comparison as a picture: bars, ours beside the paper's, or accuracy by round."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fastdlp.files import atomic_path
from fastdlp.report.paper.compare import Row
from fastdlp.report.paper.plan import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK = "#333b45"
_COLOURS = {
    "local": "#8a949e",
    "fedclip": "#d9a441",
    "flora": "#5aa469",
    "feddat": "#b65fa0",
    "combined": "#d9a441",
    "feddlp": "#15609a",
    "local-sora": "#c0392b",
}
# What a panel of bars shows, by kind of table: label, our figure (with the reported round in place of {}), its error
# bar, the paper's figure, its error bar.
_BARS = {
    "accuracy": [("accuracy, {} round, %", "{}", "{}_std", "paper", "paper_std")],
    "ablation": [("accuracy, {} round, %", "{}", "{}_std", "paper", "")],
    "clients": [
        ("std over clients, {} round, %", "std_{}", "", "std_paper", ""),
        ("lowest client, {} round, %", "lowest_{}", "", "lowest_paper", ""),
    ],
    "communication": [("MB to target", "mb", "", "paper_mb", "")],
}


def draw_bars(path: str | os.PathLike[str], plan: Plan, rows: Sequence[Row]) -> None:
    """Draw a table to a .png: a panel for each encoder, β and figure, a group of bars for each data set.

    Raises:
        FastdlpError: the file cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    panels = [
        (encoder, beta, figure) for encoder in plan.encoders for beta in plan.betas for figure in _BARS[plan.table.kind]
    ]
    datasets = list(dict.fromkeys(row["dataset"] for row in rows))
    width = max(6.0, 0.36 * len(datasets) * (len(plan.methods) + 1) + 1.5)
    figure = Figure(figsize=(width, 2.7 * len(panels) + 0.8), dpi=150, layout="constrained")
    for axes, (encoder, beta, (label, *names)) in zip(figure.subplots(len(panels), 1, squeeze=False).flat, panels):
        mine = {
            (row["dataset"], row["method"]): row for row in rows if (row["encoder"], row["beta"]) == (encoder, beta)
        }
        mean, std, paper, paper_std = (name.format(plan.report) for name in names)
        for number, method in enumerate(plan.methods):
            every = [mine[dataset, method] for dataset in datasets]
            at = np.arange(len(datasets)) + (number - (len(plan.methods) - 1) / 2) * 0.84 / len(plan.methods)
            _bars(axes, at, every, (mean, std), (paper, paper_std), _COLOURS[method], 0.38 / len(plan.methods))
        _dress(axes, f"{encoder} encoder, β {beta:g}", label.format(plan.report))
        axes.set_xticks(range(len(datasets)), datasets)
        axes.tick_params(axis="x", length=0)
    keys = [Patch(facecolor=_COLOURS[method], label=method) for method in plan.methods]
    keys.append(Patch(facecolor=_INK, label="solid: ours"))
    keys.append(Patch(facecolor="white", edgecolor=_INK, hatch="/////", label="hatched: paper"))
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), frameon=False, fontsize=8, labelcolor=_INK)
    figure.suptitle(_title(plan), fontsize=11, color=_INK)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, facecolor="white")


def draw_curves(path: str | os.PathLike[str], plan: Plan, rows: Sequence[Row]) -> None:
    """Draw accuracy by round to a .png: the mean over seeds in a band of ± one standard deviation.

    Raises:
        FastdlpError: the file cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    lines = [(encoder, beta) for encoder in plan.encoders for beta in plan.betas]
    figure = Figure(figsize=(max(5.0, 3.2 * len(plan.datasets)), 2.6 * len(lines) + 0.7), dpi=150, layout="constrained")
    grid = figure.subplots(len(lines), len(plan.datasets), squeeze=False)
    for axes, (encoder, beta, dataset) in zip(grid.flat, [(e, b, d) for e, b in lines for d in plan.datasets]):
        for method in plan.methods:
            head = {"encoder": encoder, "beta": beta, "dataset": dataset, "method": method}
            mine = [row for row in rows if head.items() <= row.items()]
            rounds = [row["round"] for row in mine]
            mean, std = (np.array([row[name] for row in mine]) for name in ("accuracy", "accuracy_std"))
            axes.plot(rounds, mean, color=_COLOURS[method], linewidth=1.4, label=method)
            axes.fill_between(rounds, mean - std, mean + std, color=_COLOURS[method], alpha=0.18, linewidth=0)
        _dress(axes, f"{dataset}, {encoder} encoder, β {beta:g}", "accuracy, %")
        axes.set_xlabel("round", fontsize=8, color=_INK)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8, labelcolor=_INK)
    figure.suptitle(_title(plan), fontsize=11, color=_INK)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, facecolor="white")


def _title(plan: Plan) -> str:
    rehearsal = "\na rehearsal: digits is no data set of the paper's" if plan.rehearsal else ""
    return f"{plan.name}: {plan.table.title}{rehearsal}"


def _bars(
    axes: Axes,
    at: np.ndarray,
    rows: Sequence[Row],
    ours: tuple[str, str],
    paper: tuple[str, str],
    colour: str,
    width: float,
) -> None:
    """One method's bars over all data sets, centred on `at` [data sets]: ours left, the paper's right.

    Where nothing ran, or nothing was published, the other takes the whole width.
    """
    both = np.array([row["seeds"] > 0 and row[paper[0]] is not None for row in rows])
    for side, (mean, std), hatched in ((-0.5, ours, False), (0.5, paper, True)):
        there = [number for number, row in enumerate(rows) if row[mean] is not None]
        axes.bar(
            (at + side * width * both)[there],
            [rows[number][mean] for number in there],
            (width * (2 - both))[there],
            yerr=[rows[number][std] or 0.0 for number in there] if std else None,
            facecolor="white" if hatched else colour,
            edgecolor=colour,
            hatch="/////" if hatched else None,
            error_kw={"elinewidth": 0.9, "capsize": 1.5, "ecolor": _INK},
        )


def _dress(axes: Axes, title: str, label: str) -> None:
    axes.set_title(title, loc="left", fontsize=9, color=_INK)
    axes.set_ylabel(label, fontsize=8, color=_INK)
    axes.tick_params(labelsize=8, labelcolor=_INK, color=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_INK)
