"""A whole federated round, data to aggregation: fastdlp beside what people use today, in one run on one machine.

C clients with S batches each, every client and batch with images of its own; one epoch, then FedAvg of the shared
adapter. `image_forms.py` and `text_forms.py` say which forms there are; here they are checked, timed in turn, and told.

No form is timed before the losses of every client's first steps agreed with an independent form's in fp32 on the same
weights, adapters and images, updates and the average included; a row says which steps were compared. The first timed
round of a form follows its check, so that a run that is killed has told all forms so far; the other rounds are taken in
turn, so that a disturbance of the machine meets every form.
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
from fastdlp.bench.survive import survive
from fastdlp.bench.text_forms import text_forms, text_references
from fastdlp.engine.device import DTYPES
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
    with_launches: bool = True


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
    rounds: int  # timed
    peak_bytes: int | None  # on a GPU
    kernels: int | None  # None: not counted
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
    kernels: int | None = None
    seconds: list[float] = field(default_factory=list)
    products_seconds: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.form.name} in {self.precision}"


def bench_round(
    setting: Setting, tell: Callable[[str], None], save: Callable[[dict[str, Any]], None] = lambda result: None
) -> dict[str, Any]:
    """Check and measure all chosen forms in one run; `save` gets the result so far whenever a form has got further.

    A form that computes other losses, or dies, is not timed: "failed" says of each what happened.

    Raises:
        FastdlpError: PEFT or open_clip is wanted and not installed, or nothing is chosen.
    """
    versions = {"torch": torch.__version__, **(peft_versions() if setting.with_peft else {})}
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
    tell("the peak")
    peaks = {p: peak_flops(DTYPES[p], setting.device, PEAK_MS) for p in dict.fromkeys(p for _, p in chosen)}
    facts = _facts(problem, setting, peaks, versions)
    made: list[_Made] = []
    failed: list[str] = []

    def keep() -> dict[str, Any]:
        timed = [m for m in made if m.seconds]
        result = {
            **facts,
            "rows": [asdict(_row(m, timed, setting, peaks[m.precision])) for m in timed],
            "failed": failed,
        }
        save(result)
        return result

    expected: dict[tuple[str, str], tuple[str, Losses]] = {}
    for form, precision in chosen:
        tell(f"{form.name}, {precision}: first losses")
        with survive(f"{form.name} in {precision}", failed):
            with _fp32_convolutions():
                made.append(_checked(form, precision, problem, setting, expected))
            _time(made[-1], setting.device)
        keep()
    for repeat in range(1, setting.repeats):
        for m in [m for m in made if len(m.seconds) == repeat]:  # those that did not fail before
            tell(f"{m.name}: {repeat + 1} of {setting.repeats}")
            with survive(m.name, failed):
                _time(m, setting.device)
            keep()
    for m in made if setting.with_launches else []:  # on the CPU, so that no GPU waits for it between rounds
        tell(f"{m.name}: kernels")
        m.kernels = _launches(m, problem)
    return keep()


def _facts(problem: Problem, setting: Setting, peaks: dict[str, float], versions: dict[str, str]) -> dict[str, Any]:
    """What a result says beside its rows."""
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
        **machine(setting.device),
        "versions": versions | {"python": platform.python_version()},
    }


def _checked(
    form: Form,
    precision: str,
    problem: Problem,
    setting: Setting,
    expected: dict[tuple[str, str], tuple[str, Losses]],
) -> _Made:
    """The form set up, the losses of its first steps compared with those in fp32 at the same learning rate.

    Args:
        expected: by losses and the precision that is compared with them, whose they are and what; filled when missing.
    """
    before = _start_of_memory(setting.device)
    posed = replace(problem, lr=LR[precision])
    runner = form.make(posed, precision, setting.device)
    m = _Made(form, precision, runner, "itself", 0, {}, *_memory(setting.device, before))
    losses = runner.first_steps()
    key = form.losses, precision
    if form.is_reference and precision == "fp32":
        expected[key] = form.name, losses
    else:
        if key not in expected:
            references = text_references if setting.encoder == "text" else image_references
            name, first_steps = references(posed, setting.device, setting.with_peft)[form.losses]
            expected[key] = name, first_steps()
        m.compared_with, right = expected[key]
        m.errors = compare(m.name, precision, losses, m.compared_with, right)
        m.compared_steps = len(next(iter(right.values())))
    if form.backend is not None and isinstance(runner, EngineRounds):
        m.products = runner.products(form.forwards, form.backwards)
    return m


def _launches(made: _Made, problem: Problem) -> int:
    """Of a step of all clients, counted on the CPU."""
    clients = problem.clients if made.form.in_turn else 1
    small = problem.small(problem.clients // clients)
    return count(made.form.make(small, made.precision, torch.device("cpu")).step).total * clients


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
    low, *_, high = statistics.quantiles(a_step * 2 if len(a_step) == 1 else a_step, n=5, method="inclusive")
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
        len(a_step),
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
