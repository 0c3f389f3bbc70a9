"""One FEDDLP step of one or more clients: fastdlp beside the same step written with PEFT, in one run on one machine.

The PEFT form is what its documentation shows: a Hugging Face CLIP image tower with two LoRA adapters
(`local` r = 4, `global` r = 2) over all 73 linears, switched by `set_adapter`; text features cached;
four tower forwards and two backwards a step; torch's AdamW; several clients one after another. PEFT has no gate,
so fastdlp's gates stand at one for the comparison of the losses; its timed steps train and threshold them.

No row is printed before its losses up to the first update (both cross-entropies and the local distillation) agreed
with those of PEFT in fp32 on the same weights, adapters and images. What PEFT's form repeats and fastdlp keeps (patch
embedding, first teacher, the last block's other tokens) is part of the comparison.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdlp.bank import AdapterBank
from fastdlp.bench.peft_baseline import PeftStep
from fastdlp.bench.problem import ALPHA, LR, Problem, make_problem
from fastdlp.build_task import moved_stem
from fastdlp.config import TrainConfig
from fastdlp.device import DTYPES
from fastdlp.engine import Engine, Schedule, Slot
from fastdlp.errors import FastdlpError
from fastdlp.methods import make_method
from fastdlp.objective import Objective
from fastdlp.optimiser import Hyperparameters
from fastdlp.resident import TokenSource
from fastdlp.sites import tower_sites
from fastdlp.task import ImageTask

TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}  # relative, of each loss against PEFT in fp32


def fastdlp_engine(
    problem: Problem, precision: str, teacher: str, device: torch.device, clients: int = 1, backend: str = "torch"
) -> Engine:
    """An engine whose round is one step of `clients` clients with a full batch each."""
    config = TrainConfig(method="feddlp", teacher=teacher).resolved()  # type: ignore[arg-type]
    clip, batch = problem.clip, len(problem.labels)
    method = make_method(config)
    bank = AdapterBank(tower_sites(clip.image.shape), method.branches(), clients, device, backend)
    bank.initialise("gaussian", {"local": [[0, 2]] * clients, "global": [[0, 3]] * clients})
    generator = torch.Generator().manual_seed(1)
    for state in bank.state.values():  # B away from zero, so that every term of the step is live
        state.weights += 0.01 * torch.randn(state.weights.shape[1], generator=generator).to(device)
        state.gates.fill_(1.0)
    stem = moved_stem(clip.image_stem, device)
    text = problem.text.to(device)
    tokens = TokenSource(stem, _Pixels(problem.pixels), device, DTYPES[precision], 1 << 40)
    tower = replace(clip.image.to(device, DTYPES[precision]), backend=backend)
    task = ImageTask(tower, tokens, (text, text), clip.logit_scale)

    def everywhere(value: float) -> Tensor:
        return torch.full((clients,), value, device=device)

    hyper = Hyperparameters(everywhere(LR), everywhere(LR), everywhere(5e-5), everywhere(ALPHA))
    slots = [Slot(np.arange(batch), np.arange(0), 0, client, 0) for client in range(clients)]
    schedule = Schedule(batch, 1, batch * clients)
    return Engine(method, bank, task, Objective(), hyper, slots, problem.labels.numpy(), schedule)


class _Pixels:
    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def __call__(self, samples: np.ndarray) -> Tensor:
        return self.pixels[torch.from_numpy(samples)]

    def normalise(self, pixels: Tensor) -> Tensor:
        return pixels


Losses = Callable[[], dict[str, float]]  # one step; returns its losses


@dataclass(frozen=True)
class Form:
    """A way to compute the step: `make(precision)` sets it up; `sequential` forms take one client after another."""

    name: str
    forwards: int
    backwards: int
    make: Callable[[str], Losses]
    sequential: bool = False


@dataclass(frozen=True)
class Row:
    """One line of the table: quantiles in milliseconds a step, and how many times as fast as the two baselines."""

    form: str
    precision: str
    forwards: int
    backwards: int
    ms_20: float
    ms_50: float
    ms_80: float
    times_baseline: float  # the baseline in this dtype
    times_first: float  # the first row
    worst_loss_error: float


def bench_step(
    model: str,
    batch: int,
    precisions: list[str],
    repeats: int,
    device: torch.device,
    tell: Callable[[str], None],
    clients: int = 1,
    backends: Sequence[str] = ("torch",),
    with_peft: bool = True,
) -> dict[str, Any]:
    """Measure all forms in one run, fastdlp's in each backend; checks each form's losses first.

    Without PEFT the first form of fastdlp is the baseline, for the ratios and for the losses.

    Raises:
        FastdlpError: PEFT is wanted and not installed, or a form's losses are not the baseline's in fp32.
    """
    versions = {"torch": torch.__version__, **(peft_versions() if with_peft else {})}
    problem = make_problem(model, batch)
    bank = fastdlp_engine(problem, "fp32", "fresh", device).bank

    def engine_form(name: str, passes: tuple[int, int], teacher: str, backend: str) -> Form:
        def make(precision: str) -> Losses:
            return _engine_step(fastdlp_engine(problem, precision, teacher, device, clients, backend))

        return Form(name + (" --backend triton" if backend == "triton" else ""), *passes, make)

    cast = Form("PEFT, adapters cast", 4, 2, lambda p: PeftStep(problem, p, "cast", device, bank), sequential=True)
    forms: list[Form] = []
    if with_peft:
        forms.append(Form("PEFT", 4, 2, lambda p: PeftStep(problem, p, "default", device, bank), sequential=True))
        forms.append(cast)
    for backend in backends:
        forms.append(engine_form("fastdlp", (3, 2), "fresh", backend))
        forms.append(engine_form("fastdlp --teacher pre-update", (2, 2), "pre-update", backend))
    # In fp32 nothing is cast: that form is PEFT's default.
    chosen = [(f, p) for p in precisions for f in forms if not (f is cast and p == "fp32")]
    expected = forms[0].make("fp32")()
    steps = [_checked(form, precision, expected, tell) for form, precision in chosen]
    times: list[list[float]] = [[] for _ in steps]
    for repeat in range(repeats):  # in turn, so that a disturbance of the machine meets every form
        for (form, precision), (step, _), seconds in zip(chosen, steps, times):
            tell(f"{form.name}, {precision}: {repeat + 1} of {repeats}")
            seconds.append(_timed(step, device, clients if form.sequential else 1))
    rows = []
    for (form, precision), (_, error), seconds in zip(chosen, steps, times):
        q, middle = statistics.quantiles(seconds, n=5, method="inclusive"), statistics.median(seconds)
        baseline = statistics.median(times[chosen.index((forms[0], precision))])
        ratios = baseline / middle, statistics.median(times[0]) / middle
        quantiles = q[0] * 1e3, middle * 1e3, q[3] * 1e3
        rows.append(Row(form.name, precision, form.forwards, form.backwards, *quantiles, *ratios, error))
    return {
        "what": f"one FEDDLP step, {model}, image encoder, {clients} × {batch} images, random weights",
        "baseline": forms[0].name,
        "clients": clients,
        "batch_size": batch,
        "rows": [vars(row) for row in rows],
        "repeats": repeats,
        **machine(device),
        "versions": versions | {"python": platform.python_version()},
    }


def peft_versions() -> dict[str, str]:
    """What a result with PEFT's rows names. Raises FastdlpError where it is not installed."""
    try:
        import peft
        import transformers
    except ImportError:
        raise FastdlpError(
            "the PEFT baseline is not installed: pip install '.[bench]' in the checkout, or give --without-peft"
        ) from None
    return {"peft": peft.__version__, "transformers": transformers.__version__}


def _checked(
    form: Form, precision: str, expected: dict[str, float], tell: Callable[[str], None]
) -> tuple[Losses, float]:
    """A form set up, and the largest relative error of its first step's losses."""
    tell(f"{form.name}, {precision}: losses against the baseline in fp32")
    step = form.make(precision)
    losses = step()
    error = max(abs(losses[name] - value) / abs(value) for name, value in expected.items())
    if not error <= TOLERANCE[precision]:
        raise FastdlpError(
            f"{form.name} in {precision} does not compute the baseline's losses: {losses}, expected {expected}"
        )
    return step, error


def machine(device: torch.device) -> dict[str, Any]:
    """What a figure is worthless without: device, threads and commit."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        name = next(
            (line.split(":")[1].strip() for line in lines if line.startswith("model name")),
            platform.processor(),
        )
    commit = os.environ.get("FASTDLP_COMMIT")  # for a copy of the tree without its history
    if not commit:
        command = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    return {"device": name, "threads": torch.get_num_threads(), "commit": commit or "unknown"}


def _engine_step(engine: Engine) -> Losses:
    numbers = iter(range(1, 1 << 30))

    def step() -> dict[str, float]:
        means = engine.train_round(next(numbers)).means
        return {name: float(mean[0]) for name, mean in means.items() if name != "kd_global"}

    return step


def _timed(step: Losses, device: torch.device, times: int) -> float:
    """Seconds of one step of all clients: `times` calls for a form that takes them one after another.

    One call goes before, so that no form pays for the memory and caches that the form before it left behind.
    """
    step()
    start = time.perf_counter()
    for _ in range(times):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
