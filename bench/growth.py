"""How the time of a FEDDLP round grows with the number of clients, and with uneven clients.

A point is whole rounds, training and averaging, of an engine that is built and cut as a real run's. Expected are:

- equally many samples shared by more clients cost the same a sample, within MARGIN of ten clients' cost;
- a client with most of the samples steps alone once the others have finished, which costs more a sample.

Weights, images and labels are random, which does not change the speed. Sample numbers point into a small pool of
images, so that a thousand clients need memory for their adapters alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from rich.console import Console

from fastdlp.bench import common
from fastdlp.bench.common import Progress
from fastdlp.bench.fastdlp_rounds import configured_method, make_bank, make_engine
from fastdlp.bench.problem import CLASSES, LR
from fastdlp.clip.load import Clip, load_clip
from fastdlp.config import TrainConfig
from fastdlp.data.cache import Pixels
from fastdlp.engine.device import DTYPES, pick_backend
from fastdlp.engine.engine import Engine
from fastdlp.engine.round_losses import RoundLosses
from fastdlp.engine.schedule import Schedule, Slot
from fastdlp.errors import FastdlpError
from fastdlp.methods.base import Method
from fastdlp.report.style import FAINT, GRID, INK, PALETTE, logarithmic, look, panels, png
from fastdlp.run.build_task import Built, build_task

CLIENTS = (1, 10, 100, 1000)
FEW = 10  # clients of the reference and of the uneven point
SKEW = 0.7  # of the samples belong to one client where clients are uneven
MARGIN = 0.15
POOL = 256  # images

Sizes = tuple[int, ...]  # the training samples of every client


@dataclass
class Point:
    """An engine and the seconds of its rounds so far."""

    engine: Engine
    losses: RoundLosses  # of the untimed first round: what was computed
    seconds: list[float] = field(default_factory=list)
    averaging: list[float] = field(default_factory=list)


def settings(samples: int, batch_size: int, clients: Sequence[int] = CLIENTS) -> list[Sizes]:
    """The points in ascending order of clients, the uneven one last.

    Args:
        samples: of all clients together.
        batch_size: samples a client and step; only uneven clients have a batch that is not full.
        clients: how many; ten are always among them, as the reference.

    Raises:
        FastdlpError: samples that do not fill every client's batches.
    """
    numbers = sorted({*clients, FEW})
    if batch_size < 4:
        raise FastdlpError(f"--batch-size is {batch_size}: the smallest of the uneven clients need at least 4")
    unit = math.lcm(*(number * batch_size for number in numbers))
    if samples < 1 or samples % unit:
        raise FastdlpError(
            f"--samples {samples} does not fill the batches of {batch_size} of all clients: use a multiple of {unit}"
        )
    return [*((samples // number,) * number for number in numbers), uneven_sizes(samples)]


def uneven_sizes(samples: int) -> tuple[int, ...]:
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
    backend: str = "auto",
) -> dict[str, Any]:
    """Measure all points, alternating between them, so that a disturbance of the machine affects all of them.

    Args:
        samples, batch_size, clients: see `settings`.
        repeats: timed rounds of a point, after one that is not timed.

    Raises:
        FastdlpError: as `settings`; an unknown model; a backend that cannot run there.
    """
    points: dict[Sizes, Point] = {}
    method = configured_method()
    chosen = settings(samples, batch_size, clients)
    backend = pick_backend(backend, device, DTYPES[precision])
    built = _build(load_clip(model, "none"), backend, batch_size, precision, device)
    for sizes in chosen:
        progress(f"{_name(sizes)}: first round")
        engine = _engine(sizes, method, built, backend, batch_size, device)
        points[sizes] = Point(engine, engine.train_round(1))
        engine.aggregate()
    for repeat in range(repeats):
        for sizes, point in points.items():
            progress(f"{_name(sizes)}: {repeat + 1} of {repeats}")
            training = common.seconds(partial(point.engine.train_round, repeat + 2), device)
            point.averaging.append(common.seconds(point.engine.aggregate, device))
            point.seconds.append(training + point.averaging[-1])
    reference = float(np.median(points[(samples // FEW,) * FEW].seconds))
    return {
        "what": f"rounds of FEDDLP, {model}, image encoder, {precision}, {samples:,} samples in batches of "
        f"{batch_size}, random weights",
        "micro_batch": built.micro_batch,
        "repeats": repeats,
        "backend": backend,
        "rows": [_row(sizes, point, reference) for sizes, point in points.items()],
        **common.facts(device),
    }


def _name(sizes: Sizes) -> str:
    return f"{len(sizes):,}{' uneven' if len(set(sizes)) > 1 else ''} clients"


def _build(clip: Clip, backend: Any, batch_size: int, precision: Any, device: torch.device) -> Built:
    """A run's task on random images, with the number of rows that fit the memory at once."""
    config = TrainConfig(batch_size=batch_size, precision=precision, backend=backend).resolved()
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (POOL, 3, clip.transform.size, clip.transform.size), np.uint8)
    labels = rng.integers(0, CLASSES, POOL)
    names = [f"class {number}" for number in range(CLASSES)]
    pixels = Pixels("random", names, "a photo of a {}.", labels, [str(n) for n in range(POOL)], images, [], "")
    return build_task(config, configured_method(), clip, pixels, clip.transform, device)


def _engine(sizes: Sizes, method: Method, built: Built, backend: str, batch_size: int, device: torch.device) -> Engine:
    """An engine of these clients, whose adapters all start alike, so that one draw serves all of them."""
    clients = len(sizes)
    bank = make_bank(built.sites, method, {"local": [[0, 2]] * clients, "global": [[0, 3]] * clients}, device, backend)
    slots = [
        Slot(np.arange(end - size, end) % POOL, np.arange(0), 0, client, 0)
        for client, (size, end) in enumerate(zip(sizes, accumulate(sizes)))
    ]
    labels = np.random.default_rng(1).integers(0, CLASSES, POOL)
    schedule = Schedule(batch_size, 1, built.micro_batch, mixed=device.type != "cpu")  # as in run/setup.py
    return make_engine(method, bank, built.task, slots, labels, schedule, LR["fp32"])


def _row(sizes: Sizes, point: Point, reference: float) -> dict[str, Any]:
    """A point as a row of the result; `reference`: seconds of a round of ten equal clients."""
    losses, seconds = point.losses, float(np.median(point.seconds))
    return {
        "clients": len(sizes),
        "uneven": len(set(sizes)) > 1,
        "samples": sum(sizes),
        "largest_client": max(sizes),
        "smallest_client": min(sizes),
        "steps_of_largest_client": int(losses.steps.max()),
        "steps": losses.batches,
        "samples_a_step": losses.samples / losses.batches,
        "seconds": seconds,
        "seconds_least": min(point.seconds),
        "seconds_most": max(point.seconds),
        "seconds_averaging": float(np.median(point.averaging)),
        "ms_a_sample": seconds / sum(sizes) * 1e3,
        "times_reference": seconds / reference,
    }


def print_growth(result: dict[str, Any], console: Console) -> None:
    lines = [
        {
            "clients": f"{row['clients']:,}{' uneven' if row['uneven'] else ''}",
            "largest": f"{row['largest_client']:,}",
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
        f"largest: samples of the largest client; ×: time relative to ten equal clients; medians of "
        f"{result['repeats']} rounds; steps of at most {result['micro_batch']:,} rows; --backend {result['backend']}"
    )
    common.print_facts(console, result, explanation)


def growth_figure(result: dict[str, Any]) -> bytes:
    """Milliseconds a sample over the number of clients as a PNG, with what is expected in grey."""
    equal = [row for row in result["rows"] if not row["uneven"]]
    level = next(row["ms_a_sample"] for row in equal if row["clients"] == FEW)
    with look():
        figure, [panel] = panels(1, 1, 4.2)
        where = f"{result['device']}, torch {result['versions']['torch']}, {result['threads']} threads"
        whiskers = f"whiskers: fastest and slowest of {result['repeats']} rounds"
        panel.set_title(f"{result['what']}\n{where}; {whiskers}", fontsize=7.5, color=FAINT)
        panel.axhspan(level * (1 - MARGIN), level * (1 + MARGIN), color=GRID, lw=0, label=f"expected, ±{MARGIN:.0%}")
        logarithmic(panel, "x")
        label = f"{FEW} clients, one with {SKEW:.0%} of the samples"
        for rows, name, color in (
            (equal, "equal clients", PALETTE[0]),
            ([row for row in result["rows"] if row["uneven"]], label, PALETTE[1]),
        ):
            x = [row["clients"] for row in rows]
            middle, least, most = (
                [1e3 * row[quantity] / row["samples"] for row in rows]
                for quantity in ("seconds", "seconds_least", "seconds_most")
            )
            panel.plot(x, middle, color=color, marker="o", ms=4, label=name, zorder=3)
            panel.vlines(x, least, most, color=INK, lw=1, zorder=4)
        panel.set_xticks([row["clients"] for row in equal], [f"{row['clients']:,}" for row in equal])
        panel.set(xlabel="clients", ylabel="ms a sample")
        panel.set_ylim(0)
        panel.legend()
        return png(figure)
