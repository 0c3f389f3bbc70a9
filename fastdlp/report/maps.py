"""Pictures of clients and layers: accuracy by client, accuracy by client and class, gates by layer and round."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize

from fastdlp.report.compare import Series
from fastdlp.report.heatmap import cell_size, heat_map
from fastdlp.report.style import AMOUNT, FAINT, INK, pale, panels, png

_MAX_WIDTH = 10.6  # inches of a map, which is the width of the page


def clients_figure(series: Sequence[Series]) -> bytes:
    """The last round's accuracy of every client, a panel per run, and a panel of their test samples."""
    first = series[0].runs[0]
    clients = len(first.clients)
    columns = 3 if clients <= 12 else 2 if clients <= 40 else 1
    runs = [(one, run) for one in series for run in one.runs]
    figure, grid = panels(len(runs) + 1, columns, 1.65)
    for axes, (one, run) in zip(grid, runs):
        values = run.per_client[-1]
        lowest = float(np.nanmin(values))
        bars = _bars(axes, values, run.clients, one.color)
        for at in np.flatnonzero(values == lowest):
            bars[at].set(facecolor=one.color, hatch="/////", edgecolor="white", linewidth=0)
            axes.plot(at, lowest + 0.06, "v", color=INK, ms=3.5, clip_on=False)
        axes.axhline(float(np.nanmean(values)), color=INK, lw=0.8, ls=(0, (3, 2)))
        axes.set_ylim(0, 1.1)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "", "0.5", "", "1"])
        names = ", ".join(str(run.clients[at]) for at in np.flatnonzero(values == lowest)[:4])
        axes.set_title(f"{one.name(run)}\nlowest {lowest:.3f} (client {names})", fontsize=7.5)
    _bars(grid[-1], first.n, first.clients, FAINT)
    grid[-1].set_title("test samples of each client\n", fontsize=7.5)
    for axes in grid[-columns:]:
        axes.set_xlabel("client")
    return png(figure)


def classes_figure(series: Series) -> bytes | None:
    """Accuracy by client and class, the mean over seeds; None where no run of the series records it.

    A cell shows its number of test samples; where numbers do not fit, the filled area is proportional to it.
    """
    recorded = [run.per_class for run in series.runs if run.per_class is not None]
    if not recorded:
        return None
    names, n = recorded[0].names, recorded[0].n
    with np.errstate(invalid="ignore"):
        accuracy = np.mean([entry.correct / entry.n for entry in recorded], axis=0)  # NaN without samples
    clients, classes = n.shape
    width, height, numbered = cell_size(clients, classes, _MAX_WIDTH)
    figure, axes = heat_map(
        accuracy,
        (width, height) if numbered else (min(width, height),) * 2,
        ([str(client) for client in series.runs[0].clients], names),
        "viridis",  # its ends differ from the background, and its lightness increases
        Normalize(0, 1),
        "accuracy on test",
        present=n > 0,
        numbers=n if numbered else None,
        areas=None if numbered else n / n.max(),
        edges=1.0 if numbered else 0.0,
    )
    for row, total in enumerate(n.sum(1)):
        axes.text(classes, row + 0.5, f" {total:,}", va="center", fontsize=6.5, color=FAINT)
    axes.text(classes, -0.15, " n", va="bottom", fontsize=6.5, color=FAINT)
    axes.set_ylabel("client")
    axes.set_title(_heading(series) + ("" if numbered else f" · largest square {n.max()} samples"), pad=12)
    return png(figure, tight=True)


def gates_figure(series: Series, most: float) -> bytes | None:
    """Gates at zero by linear and round, the mean over seeds, on a scale to `most`; None for a method without gates."""
    parts = list(series.runs[0].gates)
    if not parts:
        return None
    rounds = min(run.rounds for run in series.runs)
    zero = np.mean([[run.gates[part][:rounds] for part in parts] for run in series.runs], axis=0)  # [parts, rounds]
    cell = min(6.4, max(1.8, 0.3 * rounds)) / rounds, 0.135
    figure, axes = heat_map(zero, cell, (parts, ()), AMOUNT, Normalize(0, most), "fraction at zero", gap=0.15)
    blocks = [part.partition(".")[0] for part in parts]
    for row in range(1, len(parts)):
        if blocks[row] != blocks[row - 1]:
            axes.axhline(row, color="white", lw=1.8)
    step = -(-rounds // 20)
    ticks = range(step, rounds + 1, step)
    axes.set_xticks([tick - 0.5 for tick in ticks], [str(tick) for tick in ticks])
    axes.set_xlabel("round")
    axes.set_ylabel("block.linear")
    axes.set_title(_heading(series), pad=12)
    return png(figure, tight=True)


def _bars(axes: Axes, values: np.ndarray, clients: Sequence[int], color: str) -> Any:
    bars = axes.bar(np.arange(len(values)), np.nan_to_num(values), width=0.78, color=pale(color))
    axes.set_xlim(-0.7, len(values) - 0.3)
    step = 1 if len(values) <= 12 else -(-len(values) // 15)
    axes.set_xticks(range(0, len(values), step), [str(client) for client in clients[::step]])
    axes.tick_params(axis="x", length=0)
    axes.grid(False, axis="x")
    return bars


def _heading(series: Series) -> str:
    seeds = [str(run.config.seed) for run in series.runs]
    return f"{series.label} · " + (f"seed {seeds[0]}" if len(seeds) == 1 else f"mean of seeds {', '.join(seeds)}")
