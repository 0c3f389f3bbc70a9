"""How the time of a FEDDLP round grows: with clients, with samples, with the adapters' ranks, with uneven clients.

A point is whole rounds, training and averaging, of an engine that is built and cut as a real run's. Expected are:

- clients: equally many samples shared by more clients cost the same a sample, within MARGIN of ten clients' cost;
- samples: twice the samples of ten clients cost twice the time;
- ranks: nearly nothing, because the frozen products dominate;
- ragged: a client with most of the samples steps alone when the others are through, and that costs more a sample.

Weights, images and labels are random: none of them changes the speed. Sample numbers point into a small pool of images,
so that a thousand clients take no memory but their adapters'.
"""

from __future__ import annotations

import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fastdlp.adapters.bank import AdapterBank
from fastdlp.adapters.optimizer import Hyperparameters
from fastdlp.bench.machine import machine
from fastdlp.bench.problem import ALPHA, CLASSES, LR
from fastdlp.clip.load import Clip, load_clip
from fastdlp.config import TrainConfig
from fastdlp.data.cache import Pixels
from fastdlp.engine.device import DTYPES, pick_backend
from fastdlp.engine.engine import Engine
from fastdlp.engine.round_losses import RoundLosses
from fastdlp.engine.schedule import Schedule, Slot
from fastdlp.errors import FastdlpError
from fastdlp.methods.feddlp import FedDLP
from fastdlp.methods.losses import Objective
from fastdlp.report.style import FAINT, GRID, INK, PALETTE, logarithmic, look, pale, panels, png
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
SKEW = 0.7  # of the samples lie with one client where they are uneven
MARGIN = 0.15
POOL = 256  # images

Unit = Callable[[dict[str, Any]], float]  # of a row: what turns seconds a round into what is drawn


@dataclass(frozen=True)
class Setting:
    """What a point measures: the training samples of every client, and the rank of the global adapter."""

    sizes: tuple[int, ...]
    rank: int = TrainConfig.rank_global


@dataclass
class _Point:
    """A setting's engine and the seconds of its rounds so far: of training, and of averaging."""

    setting: Setting
    engine: Engine
    backend: str
    losses: RoundLosses  # of the first round: what was computed
    peak_bytes: int | None = None
    training: list[float] = field(default_factory=list)
    averaging: list[float] = field(default_factory=list)


def settings(
    samples: int, batch_size: int, clients: Sequence[int] = CLIENTS, ranks: Sequence[int] = RANKS
) -> dict[str, list[Setting]]:
    """The points of every axis in ascending order. Some stand on two axes and are measured once.

    Args:
        samples: in all, of the axis of clients; the others begin with a quarter of them.
        batch_size: samples a client and step; only uneven clients have a batch that is not full.
        clients: how many; ten is always among them, as the reference.
        ranks: of the global adapter.

    Raises:
        FastdlpError: samples that do not fill every client's batches.
    """
    together = sorted({*clients, FEW})
    if batch_size < 4:
        raise FastdlpError(f"--batch-size is {batch_size}: the smallest of the uneven clients need at least 4")
    unit = math.lcm(TIMES[-1] * FEW * batch_size, *(number * batch_size for number in together))
    if samples < 1 or samples % unit:
        raise FastdlpError(
            f"--samples {samples} does not fill the batches of {batch_size} of all clients: use a multiple of {unit}"
        )
    few = samples // TIMES[-1]
    equal = (few // FEW,) * FEW
    return {
        "clients": [Setting((samples // number,) * number) for number in together],
        "samples": [Setting((few * times // FEW,) * FEW) for times in TIMES],
        "ranks": [Setting(equal, rank) for rank in sorted(set(ranks))],
        "ragged": [Setting(equal), Setting(ragged_sizes(few))],
    }


def ragged_sizes(samples: int) -> tuple[int, ...]:
    """Most of the samples with one client, the rest with nine, each about half of the one before: odd sizes, tails."""
    large = round(SKEW * samples)
    rest = samples - large - (FEW - 1)  # everyone has one
    shares = np.cumsum(0.5 ** np.arange(FEW - 1))
    return (large, *(1 + np.diff(np.rint(rest * shares / shares[-1]), prepend=0).astype(int)).tolist())


def bench_growth(
    model: str,
    samples: int,
    batch_size: int,
    precision: str,
    repeats: int,
    device: torch.device,
    tell: Callable[[str], None],
    clients: Sequence[int] = CLIENTS,
    ranks: Sequence[int] = RANKS,
    backend: str = "auto",
) -> dict[str, Any]:
    """Measure all points, one round of each in turn, so that a disturbance of the machine meets all of them.

    Args:
        model: an open_clip model; its weights are random here.
        samples, batch_size, clients, ranks: see `settings`.
        precision: "fp32" or "bf16".
        repeats: timed rounds of a point, after one that is not timed.
        device: where to.
        tell: told what is being measured.
        backend: "auto", "torch" or "triton".

    Raises:
        FastdlpError: as `settings`; an unknown model; a backend that cannot run there or with these ranks.
    """
    axes = settings(samples, batch_size, clients, ranks)
    distinct = list(dict.fromkeys(setting for along in axes.values() for setting in along))
    backends = {setting: _backend(setting, backend, device, precision) for setting in distinct}
    clip = load_clip(model, "none")
    built = {name: _build(clip, name, batch_size, precision, device) for name in dict.fromkeys(backends.values())}
    points: dict[Setting, _Point] = {}
    for setting in distinct:
        tell(f"{_words(setting)}: first round")
        points[setting] = _first(setting, built[backends[setting]], backends[setting], batch_size, device)
    for repeat in range(repeats):
        for setting, point in points.items():
            tell(f"{_words(setting)}: {repeat + 1} of {repeats}")
            training, averaging, _ = _round(point.engine, repeat + 2, device)
            point.training.append(training)
            point.averaging.append(averaging)
    return {
        "what": f"rounds of FEDDLP, {model}, image encoder, {precision}, batches of {batch_size}, random weights",
        "command": " ".join(["fastdlp", *sys.argv[1:]]),
        "model": model,
        "precision": precision,
        "batch_size": batch_size,
        "micro_batch": next(iter(built.values())).micro_batch,
        "repeats": repeats,
        "rows": [row for axis, along in axes.items() for row in _rows(axis, [points[setting] for setting in along])],
        **machine(device),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }


def _words(setting: Setting) -> str:
    even = "" if len(set(setting.sizes)) == 1 else " uneven"
    return f"{len(setting.sizes):,}{even} clients, {sum(setting.sizes):,} samples, rank {setting.rank}"


def _config(setting: Setting) -> TrainConfig:
    return TrainConfig(rank_local=2 * setting.rank, rank_global=setting.rank).resolved()


def _backend(setting: Setting, backend: str, device: torch.device, precision: str) -> str:
    ranks = PACKED * sum(branch.rank for branch in FedDLP(_config(setting)).branches())
    return pick_backend(backend, device, DTYPES[precision], ranks)


def _build(clip: Clip, backend: Any, batch_size: int, precision: Any, device: torch.device) -> Built:
    """The task of a run on random images, and the rows a view that its steps are cut into."""
    config = TrainConfig(batch_size=batch_size, precision=precision, backend=backend).resolved()
    rng = np.random.default_rng(0)
    size = clip.transform.size
    pixels = Pixels(
        data=rng.integers(0, 256, (POOL, 3, size, size), np.uint8),
        labels=rng.integers(0, CLASSES, POOL),
        ids=[str(number) for number in range(POOL)],
        class_names=[f"class {number}" for number in range(CLASSES)],
        template="a photo of a {}.",
        name="random",
        bad=[],
        fingerprint="",
    )
    return build_task(config, FedDLP(config), clip, pixels, clip.transform, device)


def _first(setting: Setting, built: Built, backend: str, batch_size: int, device: torch.device) -> _Point:
    """A point after its first round, which counts the steps and, on a GPU, the memory."""
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    engine = _engine(setting, built, FedDLP(_config(setting)), backend, batch_size, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    _, _, losses = _round(engine, 1, device)
    peak = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None
    return _Point(setting, engine, backend, losses, peak)


def _engine(
    setting: Setting, built: Built, method: FedDLP, backend: str, batch_size: int, device: torch.device
) -> Engine:
    """An engine of these clients, whose adapters all begin alike: one draw, however many they are."""
    clients = len(setting.sizes)
    bank = AdapterBank(built.sites, method.branches(), clients, device, backend)
    bank.initialize("gaussian", {"local": [[0, 2]] * clients, "global": [[0, 3]] * clients})
    generator = torch.Generator().manual_seed(1)
    for state in bank.state.values():  # B away from zero, so that every term of the step is live
        state.weights += 0.01 * torch.randn(state.weights.shape[1], generator=generator).to(device)

    def everywhere(value: float) -> Tensor:
        return torch.full((clients,), value, device=device)

    hyper = Hyperparameters(everywhere(LR["fp32"]), everywhere(LR["fp32"]), everywhere(5e-5), everywhere(ALPHA))
    ends = accumulate(setting.sizes)
    slots = [
        Slot(np.arange(end - size, end) % POOL, np.arange(0), 0, client, 0)
        for client, (size, end) in enumerate(zip(setting.sizes, ends))
    ]
    labels = np.random.default_rng(1).integers(0, CLASSES, POOL)
    schedule = Schedule(batch_size, 1, built.micro_batch, mixed=device.type != "cpu")  # as federation.py's
    return Engine(method, bank, built.task, Objective(), hyper, slots, labels, schedule)


def _round(engine: Engine, number: int, device: torch.device) -> tuple[float, float, RoundLosses]:
    """Seconds of a round's training, seconds of its averaging, and what was computed."""
    start = _now(device)
    losses = engine.train_round(number)
    trained = _now(device)
    engine.aggregate()
    return trained - start, _now(device) - trained, losses


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _rows(axis: str, points: Sequence[_Point]) -> list[dict[str, Any]]:
    """An axis as rows of the result, each beside the axis' reference: ten clients, or what stands first."""
    reference = next(p for p in points if axis != "clients" or len(p.setting.sizes) == FEW)
    base = _seconds(reference) / sum(reference.setting.sizes)
    rows = []
    for point in points:
        sizes, seconds = point.setting.sizes, _seconds(point)
        rounds = [training + averaging for training, averaging in zip(point.training, point.averaging)]
        rows.append(
            {
                "axis": axis,
                "clients": len(sizes),
                "samples": sum(sizes),
                "largest_client": max(sizes),
                "smallest_client": min(sizes),
                "rank_global": point.setting.rank,
                "rank_local": 2 * point.setting.rank,
                "backend": point.backend,
                "steps_of_largest_client": int(point.losses.steps.max()),
                "steps": point.losses.batches,
                "samples_a_step": point.losses.samples / point.losses.batches,
                "utilisation": point.losses.samples / point.losses.computed,
                "seconds": seconds,
                "seconds_least": min(rounds),
                "seconds_most": max(rounds),
                "seconds_averaging": statistics.median(point.averaging),
                "ms_a_sample": seconds / sum(sizes) * 1e3,
                "times_reference": seconds / sum(sizes) / base,
                "is_reference": point is reference,
                "peak_bytes": point.peak_bytes,
            }
        )
    return rows


def _seconds(point: _Point) -> float:
    return statistics.median(training + averaging for training, averaging in zip(point.training, point.averaging))


def print_growth(result: dict[str, Any], console: Console) -> None:
    """The table, an axis after the other, and what it was measured on."""
    table = Table(title=result["what"], title_justify="left", title_style="bold", box=SIMPLE)
    table.show_edge, table.pad_edge, table.collapse_padding = False, False, True
    memory = any(row["peak_bytes"] is not None for row in result["rows"])
    columns = (
        "clients",
        "samples",
        "ranks",
        "steps",
        "samples\na step",
        "utili-\nsation",
        "s\na round",
        "s of\nFedAvg",
    )
    for column in (*columns, "ms a\nsample", "×", *(["peak\nGB"] if memory else [])):
        table.add_column(column, justify="right", no_wrap=True)
    for axis, rows in groupby(result["rows"], key=lambda row: row["axis"]):
        table.add_section()
        table.add_row(f"[bold]{axis}[/]")
        for row in rows:
            even = row["largest_client"] == row["smallest_client"]
            table.add_row(
                f"{row['clients']:,}" if even else f"{row['clients']:,} uneven",
                f"{row['samples']:,}",
                f"{row['rank_local']}+{row['rank_global']}",
                f"{row['steps']:,}",
                f"{row['samples_a_step']:,.0f}",
                f"{row['utilisation']:.0%}",
                f"{row['seconds']:.3f}",
                f"{row['seconds_averaging']:.3f}",
                f"{row['ms_a_sample']:.3g}",
                "1" if row["is_reference"] else f"{row['times_reference']:.2f}",
                *([f"{row['peak_bytes'] / 1e9:.2f}"] if memory else []),
            )
    console.print(table)
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    backends = ", ".join(dict.fromkeys(row["backend"] for row in result["rows"]))
    console.print(
        f"×: time a sample beside the axis' reference, which has 1; medians of {result['repeats']} rounds; "
        f"steps of at most {result['micro_batch']:,} rows; --backend {backends}",
        highlight=False,
    )
    console.print(
        f"{result['device']}, {result['threads']} threads; {versions}; commit {result['commit']}", highlight=False
    )


def growth_figure(result: dict[str, Any]) -> bytes:
    """The four axes as a PNG; grey is what should come out."""
    along = {axis: list(rows) for axis, rows in groupby(result["rows"], key=lambda row: row["axis"])}
    with look():
        figure, (clients, samples, ranks, ragged) = panels(4, 2, 2.6)
        figure.set_layout_engine("constrained", wspace=0.06, hspace=0.06)
        _draw_level(clients, along["clients"], "clients", MARGIN)
        clients.set_xlabel(f"clients, {along['clients'][0]['samples']:,} samples in all")
        _draw_samples(samples, along["samples"])
        _draw_level(ranks, along["ranks"], "rank_global", 0.0)
        ranks.set_xlabel("rank of the global adapter; the local one has twice the rank")
        _draw_ragged(ragged, along["ragged"])
        for letter, axes, axis in zip("abcd", (clients, samples, ranks, ragged), AXES):
            axes.set_title(f"{letter}   {AXES[axis]}", fontweight="bold")
        versions = f"torch {result['versions']['torch']}, {result['threads']} threads"
        whiskers = f"whiskers: fastest and slowest of {result['repeats']} rounds"
        figure.suptitle(
            f"{result['what']}\n{result['device']}, {versions}; {whiskers}",
            x=0.01,
            ha="left",
            fontsize=7.5,
            color=FAINT,
        )
        return png(figure)


def _draw_level(axes: Axes, rows: Sequence[dict[str, Any]], across: str, margin: float) -> None:
    """Time a sample over a quantity that should not matter, beside the reference's level."""
    level = next(row["ms_a_sample"] for row in rows if row["is_reference"])
    if margin:
        axes.axhspan(level * (1 - margin), level * (1 + margin), color=GRID, lw=0, label=f"flat, ±{margin:.0%}")
    axes.axhline(level, color=FAINT, lw=1, label=None if margin else "flat")
    _draw_points(axes, [row[across] for row in rows], rows, _a_sample)
    logarithmic(axes, "x")
    axes.set_xticks([row[across] for row in rows], [f"{row[across]:,}" for row in rows])
    axes.minorticks_off()
    room = 1.1 * (rows[-1][across] / rows[0][across]) ** 0.07
    axes.set_xlim(rows[0][across] / room, rows[-1][across] * room)
    axes.set_ylabel("ms a sample")
    axes.legend(loc="lower left")


def _draw_samples(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    """Seconds a round over samples, beside the line through nothing and the first point."""
    most = 1.15 * rows[-1]["samples"]
    axes.plot([0, most], [0, most * rows[0]["ms_a_sample"] / 1e3], color=FAINT, lw=1, label="linear")
    _draw_points(axes, [row["samples"] for row in rows], rows, _a_round)
    axes.set_xticks([row["samples"] for row in rows], [f"{row['samples']:,}" for row in rows])
    axes.set_xlim(0, most)
    axes.set(xlabel="training samples, shared equally", ylabel="seconds a round")
    axes.legend(loc="lower right")


def _draw_ragged(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    """Time a sample of equal and of uneven clients as bars, beside the level of equal ones."""
    equal, uneven = rows
    axes.bar(range(2), [row["ms_a_sample"] for row in rows], width=0.45, color=[pale(PALETTE[i]) for i in range(2)])
    axes.axhline(equal["ms_a_sample"], color=FAINT, lw=1)
    _whiskers(axes, range(2), rows, _a_sample)
    names = [
        f"{equal['clients']} equal clients\n{equal['samples_a_step']:,.0f} samples a step",
        f"one client has {uneven['largest_client'] / uneven['samples']:.0%}\n"
        f"{uneven['samples_a_step']:,.0f} samples a step",
    ]
    axes.set_xticks(range(2), names)
    axes.set_xlim(-0.6, 1.6)
    axes.grid(visible=False, axis="x")
    axes.set_ylabel("ms a sample")


def _a_sample(row: dict[str, Any]) -> float:
    """From seconds a round to milliseconds a sample."""
    return 1e3 / row["samples"]


def _a_round(row: dict[str, Any]) -> float:
    return 1.0


def _draw_points(axes: Axes, across: Sequence[float], rows: Sequence[dict[str, Any]], unit: Unit) -> None:
    axes.plot(across, [row["seconds"] * unit(row) for row in rows], color=PALETTE[0], marker="o", ms=4, zorder=3)
    _whiskers(axes, across, rows, unit)


def _whiskers(axes: Axes, across: Sequence[float], rows: Sequence[dict[str, Any]], unit: Unit) -> None:
    """The fastest and the slowest round, and above them the time a sample as a multiple of the reference's."""
    least, most = ([row[name] * unit(row) for row in rows] for name in ("seconds_least", "seconds_most"))
    axes.vlines(across, least, most, color=INK, lw=1, zorder=4)
    axes.set_ylim(0, 1.25 * max(most))
    for x, y, row in zip(across, most, rows):
        text = "1" if row["is_reference"] else f"{row['times_reference']:.2f}×"
        axes.annotate(text, (x, y), (0, 5), textcoords="offset points", ha="center", fontsize=7, color=INK)
