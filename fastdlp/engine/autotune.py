"""`--backend auto` on a GPU without measured tiles: verify Triton's kernels against torch, time both, use the faster.

The choice is made per unit of a step and number of rows. The outputs and every gradient of the Triton implementation
are first compared with torch's, with uninitialized memory filled with NaN; an implementation that deviates or fails is
never used. Both are then timed as in training, replayed as CUDA graphs. The result is stored in the user's cache.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdlp import __version__
from fastdlp.engine.cuda_graph import CudaRecorder
from fastdlp.errors import FastdlpError
from fastdlp.files import cache_root, write_atomic
from fastdlp.selection import Choice, Selection

FORMAT = "fastdlp-backends"
BACKENDS = ("torch", "triton")
BUDGET = 60.0  # seconds; a unit whose measurement has started is completed
REPLAYS = 20  # of a graph; the median is used
# Largest absolute difference over the largest absolute entry, due to different orders of summation: a block of ViT-B/32
# in bf16 differs from fp32 by 0.02 on a CPU; an omitted row or rank, by 0.3 and more.
TOLERANCE = {torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}

Run = Callable[[str], list[Tensor]]


@dataclass(frozen=True)
class Unit:
    """A part of a step. `make` builds its operands and returns a function of the backend: outputs and all gradients."""

    name: str
    rows: int
    make: Callable[[], Run]


@dataclass(frozen=True)
class Meter:
    """ms: milliseconds of a call. clock: seconds. synchronize: waits for the device; raises after a device error."""

    ms: Callable[[Callable[[], object]], float]
    clock: Callable[[], float] = time.monotonic
    synchronize: Callable[[], None] = lambda: None


def select(
    units: Sequence[Unit],
    identity: Mapping[str, str],
    tolerance: float,
    meter: Meter,
    cache: Path | None = None,
    budget: float = BUDGET,
) -> Selection:
    """The faster correct backend of every unit; torch for units that the budget does not reach.

    Args:
        units: in order of importance.
        identity: everything that the result depends on; a cached result must match it.
        tolerance: see `TOLERANCE`.
        meter: see `Meter`.
        cache: folder; default `fastdlp.files.cache_root()`. Failure to write it is ignored.
        budget: seconds.

    Raises:
        FastdlpError: a kernel caused a device error.
    """
    start = meter.clock()
    path = (cache or cache_root()) / f"backends-{_digest(json.dumps(dict(identity), sort_keys=True).encode())}.json"
    known = _read(path, identity)
    before, choices, seconds = dict(known), [], 0.0
    for unit in units:
        key = unit.name, unit.rows
        if key in known:
            choices.append(known[key])
        elif meter.clock() - start >= budget:
            choices.append(Choice(*key, "torch", f"not measured within {budget:.0f} s"))
        else:
            choice, cacheable = _measure(unit, tolerance, meter)
            choices.append(choice)
            known |= {key: choice} if cacheable else {}
            seconds = meter.clock() - start
    if known != before:
        kept = [[c.unit, c.rows, c.backend, c.why] for c in known.values()]
        with suppress(FastdlpError):
            write_atomic(path, json.dumps({"format": FORMAT, "identity": dict(identity), "choices": kept}, indent=1))
    return Selection(tuple(choices), seconds)


def _measure(unit: Unit, tolerance: float, meter: Meter) -> tuple[Choice, bool]:
    """The choice for one unit, and whether to cache it: an exception may not occur again."""
    backend = "torch"
    try:
        run = unit.make()
        expected = run(backend)
        backend = "triton"
        with nan_filled():
            actual = run(backend)
        error = largest_error(actual, expected)
        if not error <= tolerance:
            return Choice(unit.name, unit.rows, "torch", f"Triton's result is off by {error:.1g}"), True
        del actual, expected
        ms = {}
        for backend in BACKENDS:
            ms[backend] = meter.ms(partial(run, backend))
    except Exception as exception:  # compilers raise various exceptions
        with _device_error():
            meter.synchronize()
        reason = " ".join(str(exception).split())[:80]
        return Choice(unit.name, unit.rows, "torch", f"{backend} failed: {type(exception).__name__}: {reason}"), False
    best = min(BACKENDS, key=ms.__getitem__)
    other = ms[BACKENDS[best == BACKENDS[0]]]
    return Choice(unit.name, unit.rows, best, f"{ms[best]:.3g} ms against {other:.3g}"), True


@contextmanager
def _device_error() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise FastdlpError(f"a Triton kernel has stopped the GPU ({reason}): use --backend torch") from error


def largest_error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest `_relative_error` of a tensor; NaN if one is."""
    errors = [_relative_error(a, b) for a, b in zip(actual, expected, strict=True)]
    return max(errors, key=lambda error: (math.isnan(error), error))


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    """max |actual − expected| / max |expected|."""
    if not expected.numel():
        return 0.0
    error, size = (actual.float() - expected.float()).abs().max().item(), expected.abs().max().item()
    return error / size if size else (error and math.inf)


@contextmanager
def nan_filled() -> Iterator[None]:
    """Fill newly allocated memory with NaN, so that elements a kernel does not write are detected."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = filled


def _read(path: Path, identity: Mapping[str, str]) -> dict[tuple[str, int], Choice]:
    """Cached choices of the same identity; none from an invalid file."""
    try:
        content = json.loads(path.read_bytes())
        if (content["format"], content["identity"]) != (FORMAT, dict(identity)):
            return {}
        choices = [Choice(*entry) for entry in content["choices"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    valid = all(
        isinstance(c.unit, str)
        and type(c.rows) is int
        and c.rows > 0
        and c.backend in BACKENDS
        and isinstance(c.why, str)
        for c in choices
    )
    return {(c.unit, c.rows): c for c in choices} if valid else {}


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def cuda_identity(device: torch.device, dtype: torch.dtype, setting: str) -> dict[str, str]:
    """Everything that a measurement on this GPU depends on; `setting` describes the units."""
    driver = Path("/proc/driver/nvidia/version")
    sources = sorted((f for f in files("fastdlp.kernels").iterdir() if f.is_file()), key=lambda f: f.name)
    return {
        "device": torch.cuda.get_device_name(device),
        "driver": driver.read_text().splitlines()[0] if driver.exists() else str(torch.version.cuda),
        "torch": torch.__version__,
        "triton": version("triton"),
        "fastdlp": __version__,
        "kernels": _digest(b"".join(f.read_bytes() for f in sources)),
        "dtype": f"{dtype}, fp32 products in {torch.backends.cuda.matmul.fp32_precision}",
        "setting": setting,
    }


def tolerance_of(dtype: torch.dtype) -> float:
    """TOLERANCE of a dtype; with TF32, fp32 products are as accurate as fp16."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return TOLERANCE[torch.float16 if tf32 else dtype]


def cuda_meter(device: torch.device) -> Meter:
    """Times calls as replays of a CUDA graph."""
    recorder = CudaRecorder(device)

    def milliseconds(call: Callable[[], Any]) -> float:
        recorder.run(call)
        replay = recorder.record(call)
        replay()
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(REPLAYS)]
        for first, last in events:
            first.record()
            replay()
            last.record()
        torch.cuda.synchronize(device)
        return statistics.median(first.elapsed_time(last) for first, last in events)

    return Meter(milliseconds, synchronize=partial(torch.cuda.synchronize, device))
