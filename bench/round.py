"""A whole federated round, data to aggregation: fastdlp beside what people use today, in one run on one machine.

C clients with S batches each, every client and batch with images of its own; one epoch, then FedAvg of the shared
adapter. `image_forms.py` and `text_forms.py` say which forms there are; here they are checked, timed in turn, and told.

No form is timed before the losses of every client's first steps agreed with an independent form's in fp32 on the same
weights, adapters and images, updates and the average included; a row says which steps were compared.
"""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch

from fastdlp.bench.engine import EngineRounds
from fastdlp.bench.image_forms import image_forms, image_references
from fastdlp.bench.kernels import peak_flops
from fastdlp.bench.launches import count
from fastdlp.bench.machine import machine, peft_versions
from fastdlp.bench.problem import CLASSES, LR, TEMPLATE, Problem, make_problem
from fastdlp.bench.products import FrozenProducts
from fastdlp.bench.round_check import TOLERANCE, compare
from fastdlp.bench.round_form import BASELINES, Form
from fastdlp.bench.runner import Losses, Runner
from fastdlp.bench.text_forms import text_forms, text_references
from fastdlp.device import DTYPES
from fastdlp.errors import FastdlpError

PEAK_MS = 200.0  # of measuring the peak of a dtype


@dataclass(frozen=True)
class Setting:
    """What is measured. only: keys of forms, none for all."""

    model: str
    encoder: str
    clients: int
    steps: int
    batch: int
    precisions: tuple[str, ...]
    repeats: int
    device: torch.device
    backends: tuple[str, ...] = ("torch",)
    with_peft: bool = True
    only: tuple[str, ...] = ()
    template: str = TEMPLATE


@dataclass(frozen=True)
class Row:
    """A form in a dtype. Milliseconds are of a step of all clients: the round's over its steps."""

    key: str
    form: str
    backend: str | None
    group: str
    precision: str
    forwards: int
    backwards: int
    ms_20: float
    ms_50: float
    ms_80: float
    images_per_s: float
    times: dict[str, float]  # how many times as fast, by baseline
    peak_bytes: int | None  # on a GPU
    kernels: int
    flop: int
    peak_share: float
    ms_products: float | None  # of the step's frozen products alone, the median; of fastdlp's forms
    times_products: float | None  # the step's time over theirs
    compared_with: str  # "itself" for the form that the others are compared with
    compared_steps: list[int]
    loss_errors: dict[str, list[float]]  # by loss and step, the worst client's; see round_check


@dataclass
class _Made:
    """A form that was set up and found right, and the seconds of its rounds so far."""

    form: Form
    precision: str
    runner: Runner
    compared_with: str
    compared_steps: int
    errors: dict[str, np.ndarray]  # by loss, [steps, clients]; see round_check
    own_bytes: int
    peak_bytes: int
    products: FrozenProducts | None = None
    kernels: int = 0
    seconds: list[float] = field(default_factory=list)
    products_seconds: list[float] = field(default_factory=list)


def bench_round(setting: Setting, tell: Callable[[str], None]) -> dict[str, Any]:
    """Check and measure all chosen forms in one run.

    Raises:
        FastdlpError: PEFT is wanted and not installed, nothing is chosen, or a form computes other losses.
    """
    versions = {"torch": torch.__version__, **(peft_versions() if setting.with_peft else {})}
    tell("weights and images")
    problem = make_problem(setting.model, setting.batch, setting.clients, setting.steps, template=setting.template)
    if setting.encoder == "text":
        forms = text_forms(problem, setting.backends, setting.with_peft)
    else:
        forms = image_forms(problem, setting.backends, setting.with_peft, setting.device.type == "cuda")
    chosen = [
        (form, precision)
        for precision in DTYPES  # fp32 first: with it the reference
        if precision in setting.precisions
        for form in forms
        if precision in form.precisions and (not setting.only or form.key in setting.only)
    ]
    if not chosen:
        raise FastdlpError("no form is left: --only, --precision and --without-peft exclude them all")
    with _fp32_convolutions():
        made = _checked(problem, chosen, setting, tell)
    for m in made:
        tell(f"{m.form.name}, {m.precision}: kernels")
        small = problem.small(1 if m.form.in_turn else problem.clients)
        operations, kernels = count(m.form.make(small, m.precision, torch.device("cpu")).step)
        m.kernels = (operations.total() + kernels.total()) * (problem.clients if m.form.in_turn else 1)
    for repeat in range(setting.repeats):  # in turn, so that a disturbance of the machine meets every form
        for m in made:
            tell(f"{m.form.name}, {m.precision}: {repeat + 1} of {setting.repeats}")
            _time(m, setting.device)
    tell("the peak")
    peaks = {p: peak_flops(DTYPES[p], setting.device, PEAK_MS) for p in dict.fromkeys(m.precision for m in made)}
    longest = int(problem.clip.text_stem.pooled(problem.ids).max()) + 1
    samples = "images" if setting.encoder == "image" else f"images, {CLASSES} prompts of up to {longest} tokens"
    return {
        "what": f"one federated round, {setting.model}, {setting.encoder} encoder, "
        f"{_many(setting.clients, 'client')} × {_many(setting.steps, 'batch', 'es')} × {setting.batch} {samples}, "
        "random weights",
        "command": " ".join(["fastdlp", *sys.argv[1:]]),
        "on_cpu": setting.device.type == "cpu",
        "encoder": setting.encoder,
        "template": setting.template,
        "longest_prompt": longest,
        "clients": setting.clients,
        "steps": setting.steps,
        "batch_size": setting.batch,
        "repeats": setting.repeats,
        "learning_rate": LR,
        "tolerance": TOLERANCE,
        "peak_tflops": {precision: peak / 1e12 for precision, peak in peaks.items()},
        "rows": [asdict(_row(m, made, setting, peaks[m.precision])) for m in made],
        **machine(setting.device),
        "versions": versions | {"python": platform.python_version()},
    }


def _checked(
    problem: Problem, chosen: Sequence[tuple[Form, str]], setting: Setting, tell: Callable[[str], None]
) -> list[_Made]:
    """Every form set up, the losses of its first steps compared with those in fp32 at the same learning rate."""
    references = text_references if setting.encoder == "text" else image_references
    expected: dict[tuple[str, str], tuple[str, Losses]] = {}  # by losses and the precision that is compared with them
    made = []
    for form, precision in chosen:
        tell(f"{form.name}, {precision}: first losses")
        before = _start_of_memory(setting.device)
        posed = replace(problem, lr=LR[precision])
        runner = form.make(posed, precision, setting.device)
        m = _Made(form, precision, runner, "itself", 0, {}, *_memory(setting.device, before))
        losses = runner.first_steps()
        if form.is_reference and precision == "fp32":
            expected[form.losses, precision] = form.name, losses
        else:
            if (form.losses, precision) not in expected:
                name, first_steps = references(posed, setting.device, setting.with_peft)[form.losses]
                expected[form.losses, precision] = name, first_steps()
            m.compared_with, right = expected[form.losses, precision]
            m.errors = compare(f"{form.name} in {precision}", precision, losses, m.compared_with, right)
            m.compared_steps = len(next(iter(right.values())))
        if form.backend is not None and isinstance(runner, EngineRounds):
            m.products = runner.products(form.forwards, form.backwards)
        made.append(m)
    return made


@contextmanager
def _fp32_convolutions() -> Iterator[None]:
    """cuDNN takes TF32 for fp32 convolutions by itself, and transformers' patch embedding is one: no reference."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _time(made: _Made, device: torch.device) -> None:
    """One round, and one step of its products. One goes before each: nobody pays for what another left in caches."""
    made.runner.round()
    before = _start_of_memory(device)
    made.seconds.append(_seconds(made.runner.round, device))
    made.peak_bytes = max(made.peak_bytes, made.own_bytes + _memory(device, before)[1])
    if made.products is not None:
        made.products.step()
        made.products_seconds.append(_seconds(made.products.step, device))


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Until the device is done with it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _start_of_memory(device: torch.device) -> int:
    """Bytes held now; the peak counts from here. On a CPU 0."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _memory(device: torch.device, before: int) -> tuple[int, int]:
    """Bytes held beyond `before`: now, and at the peak."""
    if device.type != "cuda":
        return 0, 0
    return torch.cuda.memory_allocated(device) - before, torch.cuda.max_memory_allocated(device) - before


def _row(made: _Made, all_made: Sequence[_Made], setting: Setting, peak: float) -> Row:
    form, a_step = made.form, [seconds / setting.steps for seconds in made.seconds]
    low, *_, high = statistics.quantiles(a_step, n=5, method="inclusive")
    middle = statistics.median(a_step)
    products = statistics.median(made.products_seconds) if made.products_seconds else None
    times = {}
    for baseline in BASELINES[form.group]:
        for other in all_made:
            if other.form.key == baseline.key and other.precision == (baseline.precision or made.precision):
                times[baseline.label] = statistics.median(other.seconds) / statistics.median(made.seconds)
    return Row(
        form.key,
        form.name,
        form.backend,
        form.group,
        made.precision,
        form.forwards,
        form.backwards,
        low * 1e3,
        middle * 1e3,
        high * 1e3,
        setting.clients * setting.batch / middle,
        times,
        made.peak_bytes if setting.device.type == "cuda" else None,
        made.kernels,
        form.flop,
        form.flop / middle / peak,
        None if products is None else products * 1e3,
        None if products is None else middle / products,
        made.compared_with,
        list(range(1, made.compared_steps + 1)),
        {name: errors.max(axis=1).tolist() for name, errors in made.errors.items()},
    )


def _many(number: int, thing: str, ending: str = "s") -> str:
    return f"{number} {thing}{ending * (number > 1)}"
