"""How the time of a FEDDLP round grows with the number of clients, and with uneven clients.

A point is whole rounds, training and averaging, of an engine that is built and cut as a real run's. Expected are:

- equally many samples shared by more clients cost the same a sample, within 15 % of ten clients' cost;
- a client with most of the samples steps alone once the others have finished, which costs more a sample.

Weights, images and labels are random, which does not change the speed. Sample numbers point into a small pool of
images, so that a thousand clients need memory for their adapters alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.console import Console

from fastdlp.bench import common
from fastdlp.bench.common import Progress
from fastdlp.bench.fastdlp_rounds import make_engine
from fastdlp.bench.problem import LR, random_images
from fastdlp.clip.load import load_clip
from fastdlp.config import TrainConfig
from fastdlp.engine.device import DTYPES, pick_backend
from fastdlp.engine.engine import Engine
from fastdlp.engine.round_losses import RoundLosses
from fastdlp.errors import FastdlpError
from fastdlp.methods import make_method
from fastdlp.run.build_task import build_task

CLIENTS = (1, 10, 100, 1000)
FEW = 10  # clients of the reference and of the uneven point
SKEW = 0.7  # of the samples belong to one client where clients are uneven
POOL = 256  # images

Sizes = tuple[int, ...]  # the training samples of every client


@dataclass
class Point:
    """An engine and the seconds of its rounds so far."""

    engine: Engine
    losses: RoundLosses  # of the untimed first round: what was computed
    seconds: list[float] = field(default_factory=list)
    averaging: list[float] = field(default_factory=list)


def settings(samples: int, batch_size: int, clients: Sequence[int]) -> list[Sizes]:
    """The points in ascending order of clients, the uneven one last.

    Args:
        samples: of all clients together.
        batch_size: samples a client and step, at least 4; only uneven clients have a batch that is not full.
        clients: how many; ten are always among them, as the reference.

    Raises:
        FastdlpError: samples that do not fill every client's batches.
    """
    numbers = sorted({*clients, FEW})
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
    precision: Any,
    repeats: int,
    device: torch.device,
    clients: Sequence[int],
    backend: str,
    progress: Progress,
) -> dict[str, Any]:
    """Measure all points, alternating between them, so that a disturbance of the machine affects all of them.

    Args:
        samples, batch_size, clients: see `settings`.
        repeats: timed rounds of a point, after one that is not timed.

    Raises:
        FastdlpError: as `settings`; an unknown model; a backend that cannot run there.
    """
    chosen = settings(samples, batch_size, clients)
    backend = pick_backend(backend, device, DTYPES[precision])
    clip = load_clip(model, "none")
    pool = random_images(POOL, clip.transform.size)
    config = TrainConfig(batch_size=batch_size, precision=precision, backend=backend, lr=LR["fp32"], cuda_graph=False)
    config = config.resolved()
    built = build_task(config, make_method(config), clip, pool, clip.transform, device)
    points: dict[Sizes, Point] = {}
    for sizes in chosen:
        progress(f"{_name(sizes)}: first round")
        train = np.split(np.arange(samples) % POOL, np.cumsum(sizes)[:-1])
        engine = make_engine(config, built, pool.labels, train, device)
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


def _row(sizes: Sizes, point: Point, reference: float) -> dict[str, Any]:
    """A point as a row of the result; `reference`: seconds of a round of ten equal clients."""
    losses, seconds = point.losses, float(np.median(point.seconds))
    return {
        "clients": len(sizes),
        "uneven": len(set(sizes)) > 1,
        "samples": sum(sizes),
        "largest_client": max(sizes),
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
