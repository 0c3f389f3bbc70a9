"""How the time of a FEDDLP round grows: with clients, with samples, with the adapters' ranks, with uneven clients.

A point is whole rounds, training and averaging, of an engine that is built and cut as a real run's. Expected are:

- clients: equally many samples shared by more clients cost the same a sample, within MARGIN of ten clients' cost;
- samples: twice the samples of ten clients cost twice the time;
- ranks: nearly nothing, because the frozen products dominate;
- uneven: a client with most of the samples steps alone once the others have finished, which costs more a sample.

Weights, images and labels are random, which does not change the speed. Sample numbers point into a small pool of
images, so that a thousand clients need memory for their adapters alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console

from fastdlp.bench import common
from fastdlp.bench.common import Progress
from fastdlp.bench.fastdlp_rounds import make_bank, make_engine
from fastdlp.bench.problem import CLASSES, LR
from fastdlp.clip.load import Clip, load_clip
from fastdlp.config import TrainConfig
from fastdlp.data.cache import Pixels
from fastdlp.engine.device import DTYPES, pick_backend
from fastdlp.engine.engine import Engine
from fastdlp.engine.round_losses import RoundLosses
from fastdlp.engine.schedule import Schedule, Slot
from fastdlp.errors import FastdlpError
from fastdlp.methods.feddlp import FedDLP
from fastdlp.report.style import FAINT, GRID, INK, PALETTE, logarithmic, look, panels, png
from fastdlp.run.build_engine import PACKED
from fastdlp.run.build_task import Built, build_task

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AXES = {
    "clients": "the same samples, more clients",
    "samples": "more samples, ten clients",
    "ranks": "higher ranks, ten clients",
    "ragged": "uneven clients, the same samples",
}
CLIENTS = (1, 10, 100, 1000)
RANKS = (2, 4, 8, 16)  # of the global adapter; the local one has twice the rank
FEW = 10  # clients of all axes but the first, and of its reference
TIMES = (1, 2, 4)  # a quarter, a half and all of the samples
SKEW = 0.7  # of the samples belong to one client where clients are uneven
MARGIN = 0.15
POOL = 256  # images


@dataclass(frozen=True)
class Setting:
    """What a point measures: the training samples of every client, and the rank of the global adapter."""

    sizes: tuple[int, ...]
    rank: int = TrainConfig.rank_global

    def __str__(self) -> str:
        uneven = "" if len(set(self.sizes)) == 1 else " uneven"
        return f"{len(self.sizes):,}{uneven} clients, {sum(self.sizes):,} samples, rank {self.rank}"


@dataclass
class Point:
    """A setting's engine and the seconds of its rounds so far."""

    setting: Setting
    engine: Engine
    losses: RoundLosses  # of the untimed first round: what was computed
    seconds: list[float] = field(default_factory=list)
    averaging: list[float] = field(default_factory=list)


def settings(
    samples: int, batch_size: int, clients: Sequence[int] = CLIENTS, ranks: Sequence[int] = RANKS
) -> dict[str, list[Setting]]:
    """The points of every axis in ascending order. Some are on two axes and are measured once.

    Args:
        samples: of all clients together on the axis of clients; the others begin with a quarter of them.
        batch_size: samples a client and step; only uneven clients have a batch that is not full.
        clients: how many; ten are always among them, as the reference.
        ranks: of the global adapter.

    Raises:
        FastdlpError: samples that do not fill every client's batches.
    """
    numbers = sorted({*clients, FEW})
    if batch_size < 4:
        raise FastdlpError(f"--batch-size is {batch_size}: the smallest of the uneven clients need at least 4")
    unit = math.lcm(TIMES[-1] * FEW * batch_size, *(number * batch_size for number in numbers))
    if samples < 1 or samples % unit:
        raise FastdlpError(
            f"--samples {samples} does not fill the batches of {batch_size} of all clients: use a multiple of {unit}"
        )
    few = samples // TIMES[-1]
    equal = (few // FEW,) * FEW
    return {
        "clients": [Setting((samples // number,) * number) for number in numbers],
        "samples": [Setting((few * times // FEW,) * FEW) for times in TIMES],
        "ranks": [Setting(equal, rank) for rank in sorted(set(ranks))],
        "ragged": [Setting(equal), Setting(ragged_sizes(few))],
    }


def ragged_sizes(samples: int) -> tuple[int, ...]:
    """Most samples for one client, the rest for nine, each about half of the one before: not all batches are full."""
    large = round(SKEW * samples)
    rest = samples - large - (FEW - 1)  # each client has one
    ends = np.cumsum(0.5 ** np.arange(FEW - 1))
    return (large, *(1 + np.diff(np.rint(rest * ends / ends[-1]), prepend=0).astype(int)).tolist())


def bench_growth(
    model: str,
    samples: int,
    batch_size: int,
    precision: str,
    repeats: int,
    device: torch.device,
    progress: Progress,
    clients: Sequence[int] = CLIENTS,
    ranks: Sequence[int] = RANKS,
    backend: str = "auto",
) -> dict[str, Any]:
    """Measure all points, alternating between them, so that a disturbance of the machine affects all of them.

    Args:
        samples, batch_size, clients, ranks: see `settings`.
        repeats: timed rounds of a point, after one that is not timed.

    Raises:
        FastdlpError: as `settings`; an unknown model; a backend that cannot run there or with these ranks.
    """
    axes = settings(samples, batch_size, clients, ranks)
    distinct = list(dict.fromkeys(setting for along in axes.values() for setting in along))
    most = PACKED * sum(branch.rank for branch in _method(max(setting.rank for setting in distinct)).branches())
    backend = pick_backend(backend, device, DTYPES[precision], most)
    built = _build(load_clip(model, "none"), backend, batch_size, precision, device)
    points: dict[Setting, Point] = {}
    for setting in distinct:
        progress(f"{setting}: first round")
        engine = _engine(setting, built, backend, batch_size, device)
        points[setting] = Point(setting, engine, engine.train_round(1))
        engine.aggregate()
    for repeat in range(repeats):
        for setting, point in points.items():
            progress(f"{setting}: {repeat + 1} of {repeats}")
            training = common.seconds(partial(point.engine.train_round, repeat + 2), device)
            point.averaging.append(common.seconds(point.engine.aggregate, device))
            point.seconds.append(training + point.averaging[-1])
    return {
        "what": f"rounds of FEDDLP, {model}, image encoder, {precision}, batches of {batch_size}, random weights",
        "model": model,
        "precision": precision,
        "batch_size": batch_size,
        "micro_batch": built.micro_batch,
        "repeats": repeats,
        "backend": backend,
        "rows": [row for axis, along in axes.items() for row in _rows(axis, [points[setting] for setting in along])],
        **common.facts(device),
    }


def _method(rank: int) -> FedDLP:
    return FedDLP(TrainConfig(rank_local=2 * rank, rank_global=rank).resolved())


def _build(clip: Clip, backend: Any, batch_size: int, precision: Any, device: torch.device) -> Built:
    """A run's task on random images, with the number of rows that fit the memory at once."""
    config = TrainConfig(batch_size=batch_size, precision=precision, backend=backend).resolved()
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (POOL, 3, clip.transform.size, clip.transform.size), np.uint8)
    labels = rng.integers(0, CLASSES, POOL)
    names = [f"class {number}" for number in range(CLASSES)]
    pixels = Pixels(images, labels, [str(n) for n in range(POOL)], names, "a photo of a {}.", "random", [], "")
    return build_task(config, FedDLP(config), clip, pixels, clip.transform, device)


def _engine(setting: Setting, built: Built, backend: str, batch_size: int, device: torch.device) -> Engine:
    """An engine of these clients, whose adapters all start alike, so that one draw serves all of them."""
    method, clients = _method(setting.rank), len(setting.sizes)
    bank = make_bank(built.sites, method, {"local": [[0, 2]] * clients, "global": [[0, 3]] * clients}, device, backend)
    slots = [
        Slot(np.arange(end - size, end) % POOL, np.arange(0), 0, client, 0)
        for client, (size, end) in enumerate(zip(setting.sizes, accumulate(setting.sizes)))
    ]
    labels = np.random.default_rng(1).integers(0, CLASSES, POOL)
    schedule = Schedule(batch_size, 1, built.micro_batch, mixed=device.type != "cpu")  # as in run/setup.py
    return make_engine(method, bank, built.task, slots, labels, schedule, LR["fp32"])


def _rows(axis: str, points: Sequence[Point]) -> list[dict[str, Any]]:
    """An axis as rows of the result, each beside the axis' reference: ten clients, or the first point."""
    reference = next(p for p in points if axis != "clients" or len(p.setting.sizes) == FEW)
    base = float(np.median(reference.seconds)) / sum(reference.setting.sizes)
    rows = []
    for point in points:
        sizes, losses, seconds = point.setting.sizes, point.losses, float(np.median(point.seconds))
        rows.append(
            {
                "axis": axis,
                "clients": len(sizes),
                "samples": sum(sizes),
                "largest_client": max(sizes),
                "smallest_client": min(sizes),
                "rank_global": point.setting.rank,
                "rank_local": 2 * point.setting.rank,
                "steps_of_largest_client": int(losses.steps.max()),
                "steps": losses.batches,
                "samples_a_step": losses.samples / losses.batches,
                "seconds": seconds,
                "seconds_least": min(point.seconds),
                "seconds_most": max(point.seconds),
                "seconds_averaging": float(np.median(point.averaging)),
                "ms_a_sample": seconds / sum(sizes) * 1e3,
                "times_reference": seconds / sum(sizes) / base,
                "is_reference": point is reference,
            }
        )
    return rows


def print_growth(result: dict[str, Any], console: Console) -> None:
    """A table with all axes."""
    lines = [
        {
            "axis": AXES[row["axis"]],
            "clients": f"{row['clients']:,}",
            "samples": f"{row['samples']:,}",
            "ranks": f"{row['rank_local']}, {row['rank_global']}",
            "steps": f"{row['steps']:,}",
            "samples a_step": f"{row['samples_a_step']:,.0f}",
            "s a_round": f"{row['seconds']:.3f}",
            "s averaging": f"{row['seconds_averaging']:.3f}",
            "ms a_sample": f"{row['ms_a_sample']:.3g}",
            "×": f"{row['times_reference']:.2f}",
        }
        for row in result["rows"]
    ]
    common.print_table(console, result["what"], lines)
    explanation = (
        f"×: time a sample relative to the axis' reference; medians of {result['repeats']} rounds; steps of at most "
        f"{result['micro_batch']:,} rows; --backend {result['backend']}"
    )
    common.print_facts(console, result, explanation)


def growth_figure(result: dict[str, Any]) -> bytes:
    """The four axes as a PNG, with what is expected in grey."""
    along = {axis: [row for row in result["rows"] if row["axis"] == axis] for axis in AXES}
    with look():
        figure, axes = panels(4, 2, 2.6)
        for letter, panel, (axis, rows) in zip("abcd", axes, along.items()):
            panel.set_title(f"{letter}   {AXES[axis]}", fontweight="bold")
            _draw(panel, axis, rows)
        where = f"{result['device']}, torch {result['versions']['torch']}, {result['threads']} threads"
        whiskers = f"whiskers: fastest and slowest of {result['repeats']} rounds"
        title = f"{result['what']}\n{where}; {whiskers}"
        figure.suptitle(title, x=0.01, ha="left", fontsize=7.5, color=FAINT)
        return png(figure)


def _draw(panel: Axes, axis: str, rows: Sequence[dict[str, Any]]) -> None:
    """Time over an axis: seconds a round over samples, milliseconds a sample over the others."""
    of_round = axis == "samples"
    scale = [1.0 if of_round else 1e3 / row["samples"] for row in rows]
    middle, least, most = (
        [row[name] * each for row, each in zip(rows, scale)] for name in ("seconds", "seconds_least", "seconds_most")
    )
    level = next(value for value, row in zip(middle, rows) if row["is_reference"])
    quantity = {"clients": "clients", "samples": "samples", "ranks": "rank_global"}.get(axis)
    x = [row[quantity] for row in rows] if quantity else list(range(len(rows)))
    labels = [f"{value:,}" for value in x]
    if axis == "samples":
        panel.plot([0, x[-1]], [0, x[-1] * rows[0]["ms_a_sample"] / 1e3], color=FAINT, lw=1, label="linear")
        panel.set(xlabel="training samples, shared equally", ylabel="seconds a round")
    else:
        panel.axhline(level, color=FAINT, lw=1, label="flat")
        panel.set_ylabel("ms a sample")
    if axis == "clients":
        panel.axhspan(level * (1 - MARGIN), level * (1 + MARGIN), color=GRID, lw=0, label=f"±{MARGIN:.0%}")
        panel.set_xlabel(f"clients, {rows[0]['samples']:,} samples in all")
    elif axis == "ranks":
        panel.set_xlabel("rank of the global adapter; the local one has twice the rank")
    elif axis == "ragged":
        uneven = f"one client has {rows[1]['largest_client'] / rows[1]['samples']:.0%}"
        names = (f"{rows[0]['clients']} equal clients", uneven)
        labels = [f"{name}\n{row['samples_a_step']:,.0f} samples a step" for name, row in zip(names, rows)]
    if axis in ("clients", "ranks"):
        logarithmic(panel, "x")
    panel.plot(x, middle, color=PALETTE[0], marker="o", ms=4, lw=0 if axis == "ragged" else None, zorder=3)
    panel.vlines(x, least, most, color=INK, lw=1, zorder=4)
    for position, top, row in zip(x, most, rows):
        text = "1" if row["is_reference"] else f"{row['times_reference']:.2f}×"
        panel.annotate(text, (position, top), (0, 5), textcoords="offset points", ha="center", fontsize=7, color=INK)
    panel.set_xticks(x, labels)
    panel.minorticks_off()
    panel.margins(x=0.3 if axis == "ragged" else 0.1)
    panel.set_ylim(0, 1.25 * max(most))
    if of_round:
        panel.set_xlim(0)
    if axis != "ragged":
        panel.legend(loc="lower right" if of_round else "lower left")
