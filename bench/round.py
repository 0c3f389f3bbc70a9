"""A whole federated round, data to aggregation: fastdlp beside what people use today, in one run on one machine.

C clients with S batches each, every client and batch with images of its own; one epoch, then FedAvg of the shared
adapter.

No variant is timed before the losses of every client's first steps agreed with those of its reference, another variant,
in fp32 on the same weights, adapters and images, updates and the average included. The first timed round of a variant
follows its check, so that a killed run has results of all variants so far. The other rounds alternate between the
variants, so that a disturbance of the machine affects all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.console import Console

from fastdlp.bench import baselines, common
from fastdlp.bench.common import Progress, survive
from fastdlp.bench.fastdlp_rounds import EngineRounds
from fastdlp.bench.problem import CLASSES, LR, TEMPLATE, Losses, Problem, Rounds, make_problem
from fastdlp.clip.tower import Tower
from fastdlp.engine.device import DTYPES
from fastdlp.errors import FastdlpError

KEYS = {
    "image": ("peft", "autocast", "strongest", "paper", "fastdlp", "pre-update", "full", "flora"),
    "text": ("uncached", "fastdlp"),
}
# Variants that others of their group are compared with: the key, and the precision if it is not the variant's own.
BASELINES = ("PEFT", "PEFT fp32", "strongest", "paper fp32", "full", "full fp32", "uncached", "uncached fp32")
# Of each loss of each client and step, by the first letters of its name, relative to the loss's largest. Correct
# variants of ViT-B/32 differ by 4e-5 and 3e-4 in fp32, 1e-2 and 2e-1 in bf16, at the learning rates of `problem.LR`. A
# missing update makes 7e-4 to 6e-3 and 3e-2 to 4e-2 in fp32; in bf16 2e-3 to 2e-2 and 1e-1 to 2e-1, too close to
# rounding, so that after the first step only gross errors are found there.
TOLERANCE = {"fp32": {"ce": 3e-4, "kd": 3e-3}, "bf16": {"ce": 3e-2, "kd": 3e-1}}
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


Make = Callable[[Problem, str, torch.device], Rounds]


@dataclass
class Variant:
    """One implementation of the round in one dtype, and what was measured of it so far.

    flop: of the frozen products that a step of all clients needs, the same for all variants of an algorithm.
    reference: name and implementation whose losses in fp32 its own have to equal.
    """

    key: str
    name: str
    group: str
    precision: str
    make: Make
    flop: int
    reference: tuple[str, Make]
    rounds: Rounds | None = None  # once `check` passed
    errors: dict[str, list[float]] = field(default_factory=dict)  # see `compare`; none of the reference itself
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None

    def __str__(self) -> str:
        return f"{self.name} in {self.precision}"

    @property
    def is_reference(self) -> bool:
        return (self.name, self.precision) == (self.reference[0], "fp32")

    def check(self, problem: Problem, device: torch.device, expected: dict[tuple[str, str], Losses]) -> None:
        """Set up, and compare the losses of the first steps with the reference's at the same learning rate.

        Args:
            expected: losses of the references by name and by the variant's precision; filled when missing.

        Raises:
            FastdlpError: a loss is wrong.
        """
        problem = replace(problem, lr=LR[self.precision])
        rounds = self.make(problem, self.precision, device)
        losses, (name, make) = rounds.first_steps(), self.reference
        if self.is_reference:
            expected[name, self.precision] = losses
        else:
            if (name, self.precision) not in expected:
                expected[name, self.precision] = make(problem, "fp32", device).first_steps()
            self.errors = compare(str(self), self.precision, losses, name, expected[name, self.precision])
        self.rounds = rounds

    def time(self, device: torch.device) -> None:
        """One round, after an untimed one that fills the caches."""
        assert self.rounds is not None
        self.rounds.round()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        self.seconds.append(common.seconds(self.rounds.round, device))
        if device.type == "cuda":
            self.peak_bytes = max(self.peak_bytes or 0, torch.cuda.max_memory_allocated(device) - before)


def variants(problem: Problem, setting: Setting, precision: str) -> list[Variant]:
    """All variants for an encoder, baselines first."""
    clip, rows = problem.clip, problem.clients * problem.batch
    image = partial(frozen_flops, clip.image, rows, len(clip.image_stem.positions))
    text = partial(frozen_flops, clip.text, problem.clients * CLASSES, longest_prompt(problem))
    found: list[Variant] = []

    def add(key: str, name: str, make: Make, flop: int, right: tuple[str, Make], group: str = "FEDDLP") -> None:
        found.append(Variant(key, name, group, precision, make, flop, right))

    suffix = {name: f" --backend {name}" if name != "torch" else "" for name in setting.backends}
    right: tuple[str, Make]
    if setting.encoder == "text":
        uncached = partial(EngineRounds, encoder="text", cached=False)
        right = f"all {problem.ids.shape[1]} tokens, images recomputed", uncached
        add("uncached", *right, text(3, 2), right, "FEDDLP, text")
        for backend, end in suffix.items():
            ours = partial(EngineRounds, encoder="text", backend=backend)
            add("fastdlp", "fastdlp" + end, ours, text(3, 2), right, "FEDDLP, text")
        return found
    if setting.with_peft:
        right = "PEFT", baselines.PeftRounds
        right_pre_update: tuple[str, Make] = (
            "PEFT, both losses from one pair of forwards",
            baselines.PeftPreUpdateRounds,
        )
        add("peft", *right, image(3, 2), right)
        if precision != "fp32":
            add("autocast", "PEFT, autocast", partial(baselines.PeftRounds, autocast=True), image(3, 2), right)
        add("strongest", "PEFT, strongest", baselines.StrongestRounds, image(3, 2), right)
        add("paper", "paper's way, 8 forwards", baselines.PaperRounds, image(3, 2), right)
    else:
        right = "fastdlp", EngineRounds
        right_pre_update = "fastdlp pre-update", partial(EngineRounds, teacher="pre-update")
    for backend, end in suffix.items():
        for graph in (False, True) if setting.device.type == "cuda" else (False,):
            ours, options = partial(EngineRounds, backend=backend, graph=graph), " --cuda-graph" * graph + end
            add("fastdlp", "fastdlp" + options, ours, image(3, 2), right)
            pre_update = partial(ours, teacher="pre-update")
            add("pre-update", "fastdlp pre-update" + options, pre_update, image(2, 2), right_pre_update)
    right = "full fine-tuning", baselines.FullRounds
    embedding = 2 * clip.image_stem.patches.numel() * (len(clip.image_stem.positions) - 1)
    add("full", *right, 3 * image(1, 0) + 2 * embedding * rows + 3 * text(1, 0), right, "FLoRA")
    for backend, end in suffix.items():
        for encoder, flop in (("image", image(1, 1)), ("text", text(1, 1))):
            ours = partial(EngineRounds, backend=backend, encoder=encoder, method="flora")
            add("flora", f"fastdlp flora, {encoder}{end}", ours, flop, right, "FLoRA")
    return found


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
    errors = {loss: np.abs(losses[loss][: len(value)] - value) / np.abs(value).max() for loss, value in right.items()}
    for step in range(len(next(iter(right.values())))):
        for loss, error in errors.items():
            allowed = TOLERANCE[precision][loss[:2]]
            client = int(np.nan_to_num(error[step], nan=np.inf).argmax())
            if not error[step, client] <= allowed:
                raise FastdlpError(
                    f"{name} does not compute the losses of {other}: {loss} of client {client} in step {step + 1} is "
                    f"{losses[loss][step, client]:.6g}, expected {right[loss][step, client]:.6g} (allowed "
                    f"±{allowed:.0e} of its largest); it was not timed"
                )
    return {loss: error.max(axis=1).tolist() for loss, error in errors.items()}


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
        variant
        for precision in DTYPES  # fp32 first: with it the reference
        if precision in setting.precisions
        for variant in variants(problem, setting, precision)
        if not setting.only or variant.key in setting.only
    ]
    if not chosen:
        raise FastdlpError("no variant is left: --only, --precision and --without-peft exclude them all")
    progress("the peak")
    peaks = {
        p: common.peak_flops(DTYPES[p], setting.device, PEAK_MS) for p in dict.fromkeys(v.precision for v in chosen)
    }
    failed: list[str] = []
    facts = _facts(problem, setting, peaks)

    def result() -> dict[str, Any]:
        timed = [variant for variant in chosen if variant.seconds]
        save(found := {**facts, "rows": [_row(v, timed, setting, peaks) for v in timed], "failed": failed})
        return found

    expected: dict[tuple[str, str], Losses] = {}
    for repeat in range(setting.repeats):
        for variant in [variant for variant in chosen if len(variant.seconds) == repeat]:  # those that have not failed
            progress(f"{variant}: {repeat + 1} of {setting.repeats}" if repeat else f"{variant}: first losses")
            with survive(str(variant), failed):
                if repeat == 0:
                    # cuDNN computes fp32 convolutions in TF32 by default, and transformers' patch embedding is one.
                    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                        variant.check(problem, setting.device, expected)
                variant.time(setting.device)
            result()
    return result()


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


def _row(variant: Variant, timed: Sequence[Variant], setting: Setting, peaks: dict[str, float]) -> dict[str, Any]:
    """A variant's row of the result. Milliseconds are of a step of all clients: the round's over its steps."""
    low, middle, high = (ms / setting.steps for ms in common.quantiles(variant.seconds))
    times = {}  # how many times as fast
    for label in BASELINES:
        key, _, precision = label.lower().partition(" ")
        for other in timed:
            if (other.group, other.key, other.precision) == (variant.group, key, precision or variant.precision):
                times[label] = float(np.median(other.seconds) / np.median(variant.seconds))
    return {
        "key": variant.key,
        "variant": variant.name,
        "group": variant.group,
        "precision": variant.precision,
        "ms_20": low,
        "ms_50": middle,
        "ms_80": high,
        "times": times,
        "rounds": len(variant.seconds),
        "peak_bytes": variant.peak_bytes,
        "flop": variant.flop,
        "peak_share": variant.flop / middle * 1e3 / peaks[variant.precision],
        "compared_with": "itself" if variant.is_reference else variant.reference[0],
        "loss_errors": variant.errors,
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
