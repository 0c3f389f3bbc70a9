"""How long a call takes, the same way on a GPU and on a CPU.

Every timed call finds the cache cold: a buffer larger than it is overwritten before. On a GPU the call lies between
two events on the stream, and the host runs ahead while the buffer is written. Where the host is slower than that, the
gaps between launches are measured too; a call that was recorded as a CUDA graph shows its kernels alone.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

FLUSH = {"cuda": 512 << 20, "cpu": 64 << 20}  # bytes, more than the last level of cache
LEAST, MOST = 4, 1000  # timed calls


@dataclass(frozen=True)
class Times:
    """Quantiles of a call in milliseconds, over `calls` calls. timed: "calls", or "graph" for replays of its graph."""

    ms_20: float
    ms_50: float
    ms_80: float
    calls: int
    timed: str = "calls"


def measure(call: Callable[[], Any], device: torch.device, milliseconds: float, graph: bool = False) -> Times:
    """Time `call` again and again for about `milliseconds`; compilation and warm-up come before and do not count.

    Args:
        graph: record the call and time its replays; only inside `graph_stream`. A call that cannot be recorded is timed
            as it is, and a CPU has no graphs: `Times.timed` says what was done.
    """
    timed = "calls"
    if graph and device.type == "cuda":
        try:
            call, timed = _recorded(call, device), "graph"
        except RuntimeError:  # it waits for the device, or copies from the host
            torch.cuda.synchronize(device)
    flush = torch.empty(FLUSH[device.type], dtype=torch.uint8, device=device)
    _timed(call, device, flush, 1)
    start = time.perf_counter()
    _timed(call, device, flush, 3)
    each = (time.perf_counter() - start) * 1e3 / 3
    count = min(max(int(milliseconds / each), LEAST), MOST)
    ms = _timed(call, device, flush, count + count // 4)[count // 4 :]
    low, *_, high = statistics.quantiles(ms, n=5, method="inclusive")
    return Times(low, statistics.median(ms), high, count, timed)


@contextmanager
def graph_stream(device: torch.device) -> Iterator[None]:
    """Work inside goes to a stream that can be recorded. On a CPU nothing.

    A backward runs on the stream of its forward, so a forward whose backward is to be recorded has to run in here too.
    """
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize(device)
    with torch.cuda.stream(_stream(device)):
        yield
        torch.cuda.synchronize(device)


@lru_cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all calls: cuBLAS keeps a workspace for every stream that it has seen."""
    return torch.cuda.Stream(device)


def _recorded(call: Callable[[], Any], device: torch.device) -> Callable[[], None]:
    """The replay of a graph of `call`, which runs before as it is: it may compile, and copy tables from the host."""
    for _ in range(2):
        call()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        call()
    return graph.replay


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
