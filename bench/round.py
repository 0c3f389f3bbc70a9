"""A whole federated round, data to aggregation: fastdlp beside what people use today, in one run on one machine.

C clients with S batches each, every client and batch with images of its own; one epoch, then FedAvg of the shared
adapter.

No variant is timed before the losses of every client's first steps agreed with an independent variant's in fp32 on the
same weights, adapters and images, updates and the average included. The first timed round of a variant follows its
check, so that a killed run has results of all variants so far. The other rounds alternate between the variants, so that
a disturbance of the machine affects all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.console import Console

from fastdlp.bench import baselines, common
from fastdlp.bench.common import Progress, survive
from fastdlp.bench.fastdlp_rounds import image_rounds, text_rounds
from fastdlp.bench.problem import CLASSES, LR, TEMPLATE, Losses, Problem, Rounds, make_problem
from fastdlp.clip.tower import Tower
from fastdlp.engine.device import DTYPES
from fastdlp.errors import FastdlpError

KEYS = {
    "image": ("peft", "autocast", "strongest", "paper", "fastdlp", "pre-update", "full", "flora"),
    "text": ("uncached", "fastdlp"),
}
# Variants that others are compared with: label, key and precision, None for the same dtype.
BASELINES: tuple[tuple[str, str, str | None], ...] = (
    ("PEFT", "peft", None),
    ("PEFT fp32", "peft", "fp32"),
    ("strongest", "strongest", None),
    ("paper fp32", "paper", "fp32"),
    ("full", "full", None),
    ("full fp32", "full", "fp32"),
    ("uncached", "uncached", None),
    ("uncached fp32", "uncached", "fp32"),
)
# Of each loss of each client and step, by the first letters of its name, relative to the loss's largest. Correct
# variants of ViT-B/32 differ by 4e-5 and 3e-4 in fp32, 7e-3 and 1e-1 in bf16, at the learning rates of `problem.LR`. A
# missing update makes 7e-4 to 6e-3 and 3e-2 to 4e-2 in fp32; in bf16 2e-3 to 2e-2 and 1e-1 to 2e-1, too close to
# rounding, so that after the first step only gross errors are found there.
TOLERANCE = {"fp32": {"ce": 3e-4, "kd": 3e-3}, "bf16": {"ce": 3e-2, "kd": 3e-1}}
COMPARED = ("ce_local", "kd_local", "ce_global")
PEAK_MS = 200.0  # of measuring the peak of a dtype


@dataclass(frozen=True)
class Setting:
    """What is measured. only: keys of variants, empty for all."""

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
class Variant:
    """One implementation of the round.

    losses: whose losses its own have to equal, see `reference`. flop: of the frozen products that a step of all clients
    needs, the same for all variants of an algorithm. is_reference: in fp32, the others are compared with it.
    """

    key: str
    name: str
    group: str
    losses: str
    flop: int
    make: Callable[[Problem, str, torch.device], Rounds]
    is_reference: bool = False


def variants(problem: Problem, setting: Setting) -> list[Variant]:
    """All variants for an encoder, baselines first."""
    clip = problem.clip
    image = partial(frozen_flops, clip.image, problem.clients * problem.batch, len(clip.image_stem.positions))
    text = partial(frozen_flops, clip.text, problem.clients * CLASSES, longest_prompt(problem))
    suffix = {name: f" --backend {name}" if name != "torch" else "" for name in setting.backends}
    if setting.encoder == "text":
        make = partial(Variant, group="FEDDLP, text", losses="feddlp", flop=text(3, 2))
        plain = make("uncached", _uncached(problem), make=partial(text_rounds, cached=False), is_reference=True)
        ours = [make("fastdlp", "fastdlp" + suffix[b], make=partial(text_rounds, backend=b)) for b in setting.backends]
        return [plain, *ours]
    found: list[Variant] = []
    if setting.with_peft:
        make = partial(Variant, group="FEDDLP", losses="feddlp", flop=image(3, 2))
        found += [
            make("peft", "PEFT", make=baselines.PeftRounds, is_reference=True),
            make("autocast", "PEFT, autocast", make=partial(baselines.PeftRounds, autocast=True)),
            make("strongest", "PEFT, strongest", make=baselines.StrongestRounds),
            make("paper", "paper's way, 8 forwards", make=baselines.PaperRounds),
        ]
    for backend in setting.backends:
        for graph in (False, True) if setting.device.type == "cuda" else (False,):
            end = " --cuda-graph" * graph + suffix[backend]
            rounds = partial(image_rounds, backend=backend, graph=graph)
            pre_update = partial(rounds, teacher="pre-update")
            first = not setting.with_peft and backend == "torch" and not graph
            found += [
                Variant("fastdlp", "fastdlp" + end, "FEDDLP", "feddlp", image(3, 2), rounds, first),
                Variant("pre-update", "fastdlp pre-update" + end, "FEDDLP", "pre-update", image(2, 2), pre_update),
            ]
    embedding = 2 * clip.image_stem.patches.numel() * (len(clip.image_stem.positions) - 1)
    flop = 3 * image(1, 0) + 2 * embedding * problem.clients * problem.batch + 3 * text(1, 0)
    found.append(Variant("full", "full fine-tuning", "FLoRA", "flora", flop, baselines.FullRounds))
    for backend in setting.backends:
        for encoder, adapted, flop in (("image", image_rounds, image(1, 1)), ("text", text_rounds, text(1, 1))):
            name, flora = (
                f"fastdlp flora, {encoder}{suffix[backend]}",
                partial(adapted, backend=backend, method="flora"),
            )
            found.append(Variant("flora", name, "FLoRA", "flora", flop, flora))
    return found


def reference(key: str, problem: Problem, setting: Setting) -> tuple[str, Losses]:
    """A reference's name and losses in fp32, where no variant of the run is the reference."""
    device = setting.device
    if key == "flora":
        return "open_clip's frozen model", baselines.frozen_cross_entropy(problem, device)
    if setting.encoder == "text":
        return _uncached(problem), text_rounds(problem, "fp32", device, cached=False).first_steps()
    if setting.with_peft and key == "pre-update":
        pre_update = baselines.PeftPreUpdateRounds(problem, "fp32", device)
        return "PEFT, both losses from one pair of forwards", pre_update.first_steps()
    if setting.with_peft:
        return "PEFT", baselines.PeftRounds(problem, "fp32", device).first_steps()
    losses = image_rounds(problem, "fp32", device).first_steps()
    if key == "feddlp":
        return "fastdlp", losses
    # In the first step nothing is updated yet, so the losses of both teachers are the same.
    return "fastdlp before its first update", {name: losses[name][:1] for name in COMPARED}


def _uncached(problem: Problem) -> str:
    return f"all {problem.ids.shape[1]} tokens, images recomputed"


def frozen_flops(tower: Tower, rows: int, tokens: int, forwards: int, backwards: int) -> int:
    """FLOP of the frozen products that these passes over `rows` images or prompts of `tokens` need.

    The last block is for the pooled token alone; a backward is dX, which the first q, k and v do not need.
    """
    shape, pooled = tower.shape, 1 if tower.pool != "avg" else tokens
    square, mlp = shape.width**2, shape.width * shape.mlp
    last = tokens * 2 * square + pooled * (2 * square + 2 * mlp)
    forward = (shape.layers - 1) * tokens * (4 * square + 2 * mlp) + last + shape.width * shape.embed
    first = tokens * 3 if shape.layers > 1 else tokens * 2 + pooled
    return 2 * rows * (forwards * forward + backwards * (forward - first * square))


def longest_prompt(problem: Problem) -> int:
    """Tokens."""
    return int(problem.clip.text_stem.pooled(problem.ids).max()) + 1


def compare(name: str, precision: str, losses: Losses, other: str, right: Losses) -> dict[str, list[float]]:
    """By loss and step of `right`, the largest error of a client, relative to the loss's largest.

    Raises:
        FastdlpError: a loss is wrong; the message names the first.
    """
    shared = {loss: value for loss, value in right.items() if loss in COMPARED}
    errors = {loss: np.abs(losses[loss][: len(value)] - value) / np.abs(value).max() for loss, value in shared.items()}
    for step in range(len(next(iter(shared.values())))):
        for loss, error in errors.items():
            allowed = TOLERANCE[precision][loss[:2]]
            client = int(np.nan_to_num(error[step], nan=np.inf).argmax())
            if not error[step, client] <= allowed:
                raise FastdlpError(
                    f"{name} does not compute the losses of {other}: {loss} of client {client} in step {step + 1} is "
                    f"{losses[loss][step, client]:.6g}, expected {shared[loss][step, client]:.6g} (allowed "
                    f"±{allowed:.0e} of its largest); it was not timed"
                )
    return {loss: error.max(axis=1).tolist() for loss, error in errors.items()}


@dataclass
class Measured:
    """A variant that passed its check, and the seconds of its rounds so far."""

    variant: Variant
    precision: str
    rounds: Rounds
    compared_with: str = "itself"
    errors: dict[str, list[float]] = field(default_factory=dict)  # see `compare`
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None

    @property
    def name(self) -> str:
        return f"{self.variant.name} in {self.precision}"

    def time(self, device: torch.device) -> None:
        """One round, after an untimed one that fills the caches."""
        self.rounds.round()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        self.seconds.append(common.seconds(self.rounds.round, device))
        if device.type == "cuda":
            self.peak_bytes = max(self.peak_bytes or 0, torch.cuda.max_memory_allocated(device) - before)


def bench_round(
    setting: Setting, progress: Progress, save: Callable[[dict[str, Any]], None] = lambda result: None
) -> dict[str, Any]:
    """Check and measure all chosen variants in one run; `save` gets the result so far after each measurement.

    A variant that computes other losses, or raises, is not timed: "failed" has a line for each.

    Raises:
        FastdlpError: PEFT is wanted and not installed, or nothing is chosen.
    """
    if setting.with_peft:
        common.require_peft()
    problem = make_problem(setting.model, setting.batch, setting.clients, setting.steps, template=setting.template)
    chosen = [
        (variant, precision)
        for precision in DTYPES  # fp32 first: with it the reference
        if precision in setting.precisions
        for variant in variants(problem, setting)
        if (variant.key != "autocast" or precision != "fp32") and (not setting.only or variant.key in setting.only)
    ]
    if not chosen:
        raise FastdlpError("no variant is left: --only, --precision and --without-peft exclude them all")
    progress("the peak")
    peaks = {p: common.peak_flops(DTYPES[p], setting.device, PEAK_MS) for p in dict.fromkeys(p for _, p in chosen)}
    measured: list[Measured] = []
    failed: list[str] = []
    facts = _facts(problem, setting, peaks)

    def result() -> dict[str, Any]:
        timed = [m for m in measured if m.seconds]
        save(found := {**facts, "rows": [_row(m, timed, setting, peaks) for m in timed], "failed": failed})
        return found

    expected: dict[tuple[str, str], tuple[str, Losses]] = {}
    for variant, precision in chosen:
        progress(f"{variant.name}, {precision}: first losses")
        with survive(f"{variant.name} in {precision}", failed):
            with _fp32_convolutions():
                measured.append(check(variant, precision, problem, setting, expected))
            measured[-1].time(setting.device)
        result()
    for repeat in range(1, setting.repeats):
        for m in [m for m in measured if len(m.seconds) == repeat]:  # those that have not failed
            progress(f"{m.name}: {repeat + 1} of {setting.repeats}")
            with survive(m.name, failed):
                m.time(setting.device)
            result()
    return result()


def check(
    variant: Variant,
    precision: str,
    problem: Problem,
    setting: Setting,
    expected: dict[tuple[str, str], tuple[str, Losses]],
) -> Measured:
    """The variant set up, the losses of its first steps compared with those in fp32 at the same learning rate.

    Args:
        expected: name and losses of the references by kind of losses and precision; filled when missing.
    """
    problem = replace(problem, lr=LR[precision])
    m = Measured(variant, precision, variant.make(problem, precision, setting.device))
    losses, key = m.rounds.first_steps(), (variant.losses, precision)
    if variant.is_reference and precision == "fp32":
        expected[key] = variant.name, losses
        return m
    if key not in expected:
        expected[key] = reference(variant.losses, problem, setting)
    m.compared_with, right = expected[key]
    m.errors = compare(m.name, precision, losses, m.compared_with, right)
    return m


@contextmanager
def _fp32_convolutions() -> Iterator[None]:
    """cuDNN computes fp32 convolutions in TF32 by default, and transformers' patch embedding is one."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _facts(problem: Problem, setting: Setting, peaks: dict[str, float]) -> dict[str, Any]:
    """What a result has beside its rows."""
    prompts = f", {CLASSES} prompts of up to {longest_prompt(problem)} tokens" if setting.encoder == "text" else ""
    return {
        "what": f"one federated round, {setting.model}, {setting.encoder} encoder, {setting.clients} clients × "
        f"{setting.steps} batches × {setting.batch} images{prompts}, random weights",
        "template": setting.template,
        "repeats": setting.repeats,
        "learning_rate": LR,
        "tolerance": TOLERANCE,
        "peak_tflops": {precision: peak / 1e12 for precision, peak in peaks.items()},
        **common.facts(setting.device, *(("peft", "transformers") if setting.with_peft else ())),
    }


def _row(m: Measured, timed: Sequence[Measured], setting: Setting, peaks: dict[str, float]) -> dict[str, Any]:
    """A variant in a dtype. Milliseconds are of a step of all clients: the round's over its steps."""
    low, middle, high = (ms / setting.steps for ms in common.quantiles(m.seconds))
    times = {  # how many times as fast
        label: float(np.median(other.seconds) / np.median(m.seconds))
        for label, key, precision in BASELINES
        for other in timed
        if (other.variant.group, other.variant.key, other.precision) == (m.variant.group, key, precision or m.precision)
    }
    return {
        "key": m.variant.key,
        "variant": m.variant.name,
        "group": m.variant.group,
        "precision": m.precision,
        "ms_20": low,
        "ms_50": middle,
        "ms_80": high,
        "times": times,
        "rounds": len(m.seconds),
        "peak_bytes": m.peak_bytes,
        "flop": m.variant.flop,
        "peak_share": m.variant.flop / middle * 1e3 / peaks[m.precision],
        "compared_with": m.compared_with,
        "loss_errors": m.errors,
    }


def print_round(result: dict[str, Any], console: Console) -> None:
    """A table for each group of variants, medians with their 20 and 80 % quantiles."""
    console.print(result["what"], style="bold", highlight=False)
    for group in dict.fromkeys(row["group"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["group"] == group]
        labels = dict.fromkeys(label for row in rows for label in row["times"])
        common.print_table(console, group, [_cells(row, [*labels]) for row in rows])
    notes = [
        f"compared with {name}, fp32: "
        + ", ".join(
            dict.fromkeys(r["variant"] for r in result["rows"] if r["loss_errors"] and r["compared_with"] == name)
        )
        for name in dict.fromkeys(row["compared_with"] for row in result["rows"] if row["loss_errors"])
    ]
    peaks = ", ".join(f"{precision} {peak:.3g}" for precision, peak in result["peak_tflops"].items())
    explanation = (
        "ms: of a step of all clients, the round's time over its steps; of peak: operations of the frozen products "
        f"that the algorithm needs, over the measured peak (TFLOP/s: {peaks}); loss error: the largest of the steps "
        "that were compared before the timing, relative to the loss's largest"
    )
    common.print_facts(console, result | {"notes": notes}, explanation)


def _cells(row: dict[str, Any], labels: Sequence[str]) -> dict[str, str]:
    errors = [error for by_step in row["loss_errors"].values() for error in by_step]
    return {
        "variant": row["variant"],
        "dtype": row["precision"],
        "ms": f"{row['ms_50']:,.0f}",
        "20–80%": f"{row['ms_20']:,.0f}–{row['ms_80']:,.0f}",
        **{f"× {label}": f"{row['times'][label]:.2f}" if label in row["times"] else "-" for label in labels},
        **({"peak GB": f"{row['peak_bytes'] / 1e9:.2f}"} if row["peak_bytes"] is not None else {}),
        "of peak": f"{row['peak_share']:.0%}",
        "loss error": f"{max(errors):.0e}" if errors else "-",
    }
