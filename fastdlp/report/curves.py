"""Pictures over the rounds: accuracy, spread of the clients, bytes, losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastdlp.report.compare import Series
from fastdlp.report.read import Run
from fastdlp.report.style import FAINT, INK, MARKS, WIDTH, logarithmic, panels, png, rounds_axis

MIB = 2**20
_LOG_RATIO = 30  # of the largest to the smallest value, from which an axis is logarithmic


def accuracy_figure(series: Sequence[Series]) -> bytes:
    """Accuracy by round of all runs; below it, a panel per series with the spread of its clients."""
    rows = -(-len(series) // 4) if len(series) > 1 else 0
    columns = -(-len(series) // max(rows, 1))
    legend = 0.2 * -(-(len(series) + 4) // 3)
    figure = Figure(figsize=(WIDTH, 3.4 + legend + 1.55 * rows), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[3.4 + legend, 1.55 * rows]) if rows else (figure, None)
    above, below = parts
    axes = above.subplots()
    _all_runs(axes, series)
    if not rows:
        _spread(axes, series[0], mean=False)
    axes.set_ylabel("accuracy, Σ correct / Σ n")
    above.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=3)
    if below is not None:
        below.suptitle("spread of the clients: lowest to highest, and their mean", x=0.01, ha="left", fontsize=8.5)
        grid = below.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        most = max(run.rounds for one in series for run in one.runs)
        for panel in grid.flat[len(series) :]:
            panel.set_axis_off()
        for index, (panel, one) in enumerate(zip(grid.flat, series)):
            _spread(panel, one, mean=True)
            panel.set_title(one.label, fontsize=7.5, color=INK, wrap=True)
            rounds_axis(panel, most)
            panel.set_xlabel("round" if index + columns >= len(series) else "")
            panel.tick_params(labelbottom=index + columns >= len(series))
    return png(figure)


def exchange_figure(series: Sequence[Series]) -> bytes:
    """Accuracy against bytes exchanged so far; a method that exchanges nothing is a horizontal line."""
    figure, (axes,) = panels(1, 1, 3.3 + 0.2 * -(-len(series) // 3))
    exchanging = [run.exchanged for one in series for run in one.runs if run.exchanged[-1]]
    for one in series:
        if any(run.exchanged[-1] for run in one.runs):
            _curves(axes, one, lambda run: run.accuracy, lambda run: run.exchanged / MIB)
        else:
            level = float(np.mean([run.accuracy[-1] for run in one.runs]))
            label = f"{one.label} (nothing; last round)"
            axes.axhline(level, color=one.color, linestyle=one.dash, lw=1.1, label=label)
    ends = [bytes_[-1] for bytes_ in exchanging]
    if not ends:
        axes.set_xlim(0, 1)
    elif max(ends) > _LOG_RATIO * max(min(bytes_[bytes_ > 0][0] for bytes_ in exchanging), min(ends)):
        logarithmic(axes, "x")
    else:
        axes.set_xlim(left=0)
    axes.set_xlabel("exchanged so far, MiB: up and down, all clients")
    axes.set_ylabel("accuracy, Σ correct / Σ n")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=3)
    return png(figure)


def losses_figure(series: Sequence[Series]) -> bytes:
    """A panel per loss with the series that have it; losses are means over clients, weighted by their samples."""
    names = list(dict.fromkeys(name for one in series for name in one.runs[0].losses))
    figure, grid = panels(len(names), 2, 2.1)
    most = max(run.rounds for one in series for run in one.runs)
    for name, axes in zip(names, grid):
        drawn: list[np.ndarray] = []
        for one in series:
            if name in one.runs[0].losses:
                _curves(axes, one, lambda run: run.losses[name])  # noqa: B023 (called at once)
                drawn += [run.losses[name] for run in one.runs]
        values = np.concatenate(drawn)
        values = values[np.isfinite(values)]
        if len(values) and values.min() > 0 and values.max() > _LOG_RATIO * values.min():
            logarithmic(axes, "y")
        axes.set_title(loss_title(name))
        rounds_axis(axes, most)
    handles = {label: handle for axes in grid for handle, label in zip(*axes.get_legend_handles_labels())}
    named = [name for one in series if (name := _name(one)) in handles]
    figure.legend([handles[name] for name in named], named, loc="outside upper left", ncols=3)
    return png(figure)


def zero_shot_levels(series: Sequence[Series]) -> list[float]:
    """The distinct accuracies before training, to four digits; several where the runs' prompts or precision differ."""
    runs = [run for one in series for run in one.runs]
    return sorted({round(run.zero_shot, 4) for run in runs if run.zero_shot is not None})


def loss_title(name: str) -> str:
    """A heading for a loss: "task loss, local adapter (ce_local)"."""
    kind, _, branch = name.partition("_")
    kind = {"ce": "task loss", "kd": "distillation"}.get(kind, kind)
    return f"{kind}, {branch} adapter ({name})" if branch in ("local", "global") else f"{kind} ({name})"


def _all_runs(axes: Axes, series: Sequence[Series]) -> None:
    """Accuracy of every run, the mean of seeds, zero-shot accuracy, and marks at the reported rounds."""
    runs = [run for one in series for run in one.runs]
    for level in zero_shot_levels(series):
        axes.axhline(level, color=FAINT, lw=1, ls=(0, (2, 2)), label=f"zero-shot {level:.4f}")
    for one in series:
        _curves(axes, one, lambda run: run.accuracy)
        for run in one.runs:
            points = {"last": (run.rounds, float(run.accuracy[-1])), "best": run.best, "chosen": run.chosen}
            for mark, point in points.items():
                if point is not None:
                    _mark(axes, mark, one.color, point)
    for mark, (name, _, _) in MARKS.items():
        if mark != "chosen" or any(run.chosen for run in runs):
            _mark(axes, mark, FAINT, ([], []), label=name)
    rounds_axis(axes, max(run.rounds for run in runs))


def _mark(axes: Axes, mark: str, color: str, point: tuple[Any, Any], **options: Any) -> None:
    _, shape, size = MARKS[mark]
    inside = color if mark == "last" else "none"
    axes.plot(*point, shape, color=color, mfc=inside, ms=size, mew=1.1, zorder=4, **options)


def _curves(
    axes: Axes,
    series: Series,
    y: Callable[[Run], np.ndarray],
    x: Callable[[Run], np.ndarray] = lambda run: np.arange(1, run.rounds + 1),
) -> None:
    """A thin line per seed and a thick one for their mean; a single run is thick."""
    if len(series.runs) > 1:
        for run in series.runs:
            axes.plot(x(run), y(run), color=series.color, lw=0.7, alpha=0.45)
    means = _seeds_mean(series, x), _seeds_mean(series, y)
    point = "." if len(means[0]) == 1 else None  # a line of one round would be invisible
    axes.plot(*means, color=series.color, linestyle=series.dash, marker=point, label=_name(series), zorder=3)


def _name(series: Series) -> str:
    return series.label + (f" (mean of {len(series.runs)} seeds)" if len(series.runs) > 1 else "")


def _seeds_mean(series: Series, of: Callable[[Run], np.ndarray]) -> np.ndarray:
    """The mean over the seeds for the rounds that all of them have, [R]."""
    rounds = min(run.rounds for run in series.runs)
    return np.mean([of(run)[:rounds] for run in series.runs], axis=0)


def _spread(axes: Axes, series: Series, mean: bool) -> None:
    """The band from the lowest to the highest client, and their mean; averaged over seeds."""
    lowest = _seeds_mean(series, lambda run: run.over_clients("min"))
    highest = _seeds_mean(series, lambda run: run.over_clients("max"))
    middle = _seeds_mean(series, lambda run: run.over_clients("mean"))
    rounds = np.arange(1, len(middle) + 1)
    label = "clients, lowest to highest"
    if len(rounds) == 1:  # the band would have no width
        axes.vlines(rounds, lowest, highest, color=series.color, alpha=0.3, lw=8, label=label)
    else:
        axes.fill_between(rounds, lowest, highest, color=series.color, alpha=0.16, lw=0, label=label)
        axes.plot(rounds, lowest, color=series.color, lw=0.8)
    if mean:
        axes.plot(rounds, middle, color=series.color, linestyle=series.dash, marker="." if len(rounds) == 1 else None)
    else:
        axes.plot(rounds, middle, color=INK, lw=0.9, ls=(0, (1, 1.5)), label="mean of the clients")
