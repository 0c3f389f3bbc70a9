"""How long a call takes, the same way on a GPU and on a CPU.

Every timed call finds the cache cold: a buffer larger than it is overwritten before. On a GPU the call lies between
two events on the stream, and the host runs ahead while the buffer is written, so a form of a few launches shows its
kernels alone and a form of many shows the gaps between its launches, as in training.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FLUSH = {"cuda": 512 << 20, "cpu": 64 << 20}  # bytes, more than the last level of cache
LEAST, MOST = 4, 1000  # timed calls


@dataclass(frozen=True)
class Times:
    """Quantiles of a call in milliseconds, over `calls` calls."""

    ms_20: float
    ms_50: float
    ms_80: float
    calls: int


def measure(call: Callable[[], Any], device: torch.device, milliseconds: float) -> Times:
    """Time `call` again and again for about `milliseconds`; compilation and warm-up come before and do not count."""
    flush = torch.empty(FLUSH[device.type], dtype=torch.uint8, device=device)
    _timed(call, device, flush, 1)
    start = time.perf_counter()
    _timed(call, device, flush, 3)
    each = (time.perf_counter() - start) * 1e3 / 3
    count = min(max(int(milliseconds / each), LEAST), MOST)
    ms = _timed(call, device, flush, count + count // 4)[count // 4 :]
    low, *_, high = statistics.quantiles(ms, n=5, method="inclusive")
    return Times(low, statistics.median(ms), high, count)


def _timed(call: Callable[[], Any], device: torch.device, flush: Tensor, count: int) -> list[float]:
    """Milliseconds of each of `count` calls."""
    marks = []
    for _ in range(count):
        flush.zero_()
        before = _mark(device)
        call()
        marks.append((before, _mark(device)))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return [before.elapsed_time(after) for before, after in marks]
    return [(after - before) * 1e3 for before, after in marks]


def _mark(device: torch.device) -> Any:
    """Now: an event on the current stream, or the host's clock."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event
