"""`--backend auto` on a GPU that nobody has measured: check the Triton form, time both, take the faster one.

The unit of choice is what a tower runs for a number of rows. Its Triton form is first compared with the torch form,
outputs and every gradient, over memory filled with NaN; one that is off, or does not run, is never used. Then both are
timed as they run in training, replayed as CUDA graphs. What was found is kept in the user's cache.
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

FORMAT = "fastdlp-forms"
FORMS = ("torch", "triton")
BUDGET = 60.0  # seconds; a unit that was begun is finished
REPLAYS = 20  # of a graph, of which the median counts
# Largest difference of two entries, over the largest entry. Rounding in two forms of a block, whose sums have other
# orders: a block of ViT-B/32 in bf16 is off its fp32 by 0.02, on a CPU; one row or rank left out, by 0.3 and more.
TOLERANCE = {torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}

Run = Callable[[str], list[Tensor]]


@dataclass(frozen=True)
class Unit:
    """A piece of a step. `make` builds its operands; the result runs it in a form: outputs, and all gradients."""

    name: str
    rows: int
    make: Callable[[], Run]


@dataclass(frozen=True)
class Meter:
    """ms: milliseconds of a call. clock: seconds. settle: waits for the device; raises where it is lost."""

    ms: Callable[[Callable[[], object]], float]
    clock: Callable[[], float] = time.monotonic
    settle: Callable[[], None] = lambda: None


def select(
    units: Sequence[Unit],
    identity: Mapping[str, str],
    tolerance: float,
    meter: Meter,
    cache: Path | None = None,
    budget: float = BUDGET,
) -> Selection:
    """The faster right form of every unit; torch for what the budget does not reach.

    Args:
        units: the most important first.
        identity: all that the answer depends on; another one's cache is not read.
        tolerance: see `TOLERANCE`.
        meter: see `Meter`.
        cache: folder; `fastdlp.files.cache_root()` if None. One that cannot be written is done without.
        budget: seconds.

    Raises:
        FastdlpError: a kernel has stopped the device.
    """
    begun = meter.clock()
    place = (cache or cache_root()) / f"forms-{_digest(json.dumps(dict(identity), sort_keys=True).encode())}.json"
    known = _read(place, identity)
    before, choices, seconds = dict(known), [], 0.0
    for unit in units:
        key = unit.name, unit.rows
        if key in known:
            choices.append(known[key])
        elif meter.clock() - begun >= budget:
            choices.append(Choice(*key, "torch", f"not measured within {budget:.0f} s"))
        else:
            choice, lasting = _measure(unit, tolerance, meter)
            choices.append(choice)
            known |= {key: choice} if lasting else {}
            seconds = meter.clock() - begun
    if known != before:
        kept = [[c.unit, c.rows, c.form, c.why] for c in known.values()]
        with suppress(FastdlpError):
            write_atomic(place, json.dumps({"format": FORMAT, "identity": dict(identity), "choices": kept}, indent=1))
    return Selection(tuple(choices), seconds)


def _measure(unit: Unit, tolerance: float, meter: Meter) -> tuple[Choice, bool]:
    """The choice for one unit, and whether it is worth keeping: an exception may not come again."""
    form = "torch"
    try:
        run = unit.make()
        right = run(form)
        form = "triton"
        with _nan_filled():
            found = run(form)
        off = max((_off(a, b) for a, b in zip(found, right, strict=True)), key=lambda x: (math.isnan(x), x))
        if not off <= tolerance:
            return Choice(unit.name, unit.rows, "torch", f"Triton's result is off by {off:.1g}"), True
        del found, right
        ms = {}
        for form in FORMS:
            ms[form] = meter.ms(partial(run, form))
    except Exception as error:  # a compiler raises what it likes
        with _lost_device():
            meter.settle()
        reason = " ".join(str(error).split())[:80]
        return Choice(unit.name, unit.rows, "torch", f"{form} failed: {type(error).__name__}: {reason}"), False
    best = min(FORMS, key=ms.__getitem__)
    other = ms[FORMS[best == FORMS[0]]]
    return Choice(unit.name, unit.rows, best, f"{ms[best]:.3g} ms against {other:.3g}"), True


@contextmanager
def _lost_device() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise FastdlpError(f"a Triton kernel has stopped the GPU ({reason}): use --backend torch") from error


def _off(value: Tensor, right: Tensor) -> float:
    """max |value − right| / max |right|."""
    if not right.numel():
        return 0.0
    off, size = (value.float() - right.float()).abs().max().item(), right.abs().max().item()
    return off / size if size else (off and math.inf)


@contextmanager
def _nan_filled() -> Iterator[None]:
    """What is allocated inside holds NaN, so that what a kernel leaves out shows."""
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
    """What was measured before with the same identity; nothing of a file that is not whole."""
    try:
        content = json.loads(path.read_bytes())
        if (content["format"], content["identity"]) != (FORMAT, dict(identity)):
            return {}
        choices = [Choice(*entry) for entry in content["choices"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    fine = all(
        isinstance(c.unit, str) and type(c.rows) is int and c.rows > 0 and c.form in FORMS and isinstance(c.why, str)
        for c in choices
    )
    return {(c.unit, c.rows): c for c in choices} if fine else {}


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def cuda_identity(device: torch.device, dtype: torch.dtype, setting: str) -> dict[str, str]:
    """All that a measurement on this GPU depends on; `setting` says of what."""
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
    """The one of TOLERANCE that is in force: with TF32, fp32 is no more exact than fp16."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return TOLERANCE[torch.float16 if tf32 else dtype]


def cuda_meter(device: torch.device) -> Meter:
    """Times calls as replays of a CUDA graph."""
    recorder = CudaRecorder(device)

    def milliseconds(call: Callable[[], Any]) -> float:
        recorder.run(call)
        replay = recorder.record(call)
        replay()
        marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(REPLAYS)]
        for first, last in marks:
            first.record()
            replay()
            last.record()
        torch.cuda.synchronize(device)
        return statistics.median(first.elapsed_time(last) for first, last in marks)

    return Meter(milliseconds, settle=partial(torch.cuda.synchronize, device))
