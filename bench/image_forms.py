"""The forms of a federated round with adapters in the image tower, and what their losses are compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fastdlp.bench import engine, flops
from fastdlp.bench.full_baseline import FullRounds, frozen_cross_entropy
from fastdlp.bench.paper_baseline import PaperRounds
from fastdlp.bench.peft_baseline import PeftPreUpdateRounds, PeftRounds
from fastdlp.bench.problem import Problem
from fastdlp.bench.round_form import BOTH, Form, References, told
from fastdlp.bench.runner import Losses, Runner
from fastdlp.bench.strongest_baseline import StrongestRounds


def image_forms(problem: Problem, backends: Sequence[str], with_peft: bool, graphs: bool = False) -> list[Form]:
    """All forms, baselines first; full fine-tuning needs no PEFT but is a baseline too.

    graphs: fastdlp's also with its steps recorded.
    """
    step, pre_update = flops.image_step(problem, 3, 2), flops.image_step(problem, 2, 2)
    forms = []
    if with_peft:
        forms += [
            _in_turn("peft", "PEFT", 4, step, PeftRounds, is_reference=True),
            _in_turn("autocast", "PEFT, autocast", 4, step, _autocast, precisions=("bf16",)),
            _in_turn("strongest", "PEFT, strongest", 4, step, StrongestRounds),
            _in_turn("paper", "paper's way, 8 forwards", 8, step, PaperRounds),
        ]
    for backend in backends:
        first = not with_peft and backend == "torch"
        forms += [
            _ours("fastdlp", "fastdlp", backend, (3, 2), step, is_reference=first),
            _ours("pre-update", "fastdlp pre-update", backend, (2, 2), pre_update, teacher="pre-update"),
        ]
        if graphs:
            forms += [
                _ours("fastdlp", "fastdlp --cuda-graph", backend, (3, 2), step, graph=True),
                _ours(
                    "pre-update",
                    "fastdlp pre-update --cuda-graph",
                    backend,
                    (2, 2),
                    pre_update,
                    teacher="pre-update",
                    graph=True,
                ),
            ]
    full = flops.full_step(problem)
    forms.append(Form("full", "full fine-tuning", "FLoRA", "flora", 2, 2, full, FullRounds, in_turn=True))
    for backend in backends:
        for encoder, flop in (("image", flops.image_step(problem, 1, 1)), ("text", flops.text_step(problem, 1, 1))):
            forms.append(_flora(encoder, backend, flop))
    return forms


def image_references(problem: Problem, device: torch.device, with_peft: bool) -> References:
    """What losses are compared with where no form of the run has them."""
    found: References = {"flora": ("open_clip's frozen model", lambda: frozen_cross_entropy(problem, device))}
    if with_peft:
        found["feddlp"] = "PEFT", lambda: PeftRounds(problem, "fp32", device).first_steps()
        found["pre-update"] = (
            "PEFT, both losses from one pair of forwards",
            lambda: PeftPreUpdateRounds(problem, "fp32", device).first_steps(),
        )
    else:
        found["feddlp"] = "fastdlp", lambda: engine.image_rounds(problem, "fp32", device).first_steps()
        found["pre-update"] = "fastdlp before its first update", lambda: _before_update(problem, device)
    return found


def _before_update(problem: Problem, device: torch.device) -> Losses:
    """Of the first step, where nothing is updated yet, the losses of both teachers are the same."""
    losses = engine.image_rounds(problem, "fp32", device).first_steps()
    return {name: losses[name][:1] for name in ("ce_local", "kd_local", "ce_global")}


def _autocast(problem: Problem, precision: str, device: torch.device) -> Runner:
    return PeftRounds(problem, precision, device, autocast=True)


def _in_turn(
    key: str,
    name: str,
    forwards: int,
    flop: int,
    make: Callable[[Problem, str, torch.device], Runner],
    precisions: tuple[str, ...] = BOTH,
    is_reference: bool = False,
) -> Form:
    return Form(
        key, name, "FEDDLP", "feddlp", forwards, 2, flop, make, precisions, in_turn=True, is_reference=is_reference
    )


def _ours(
    key: str,
    name: str,
    backend: str,
    passes: tuple[int, int],
    flop: int,
    teacher: str = "fresh",
    is_reference: bool = False,
    graph: bool = False,
) -> Form:
    def make(problem: Problem, precision: str, device: torch.device) -> Runner:
        on_gpu = device.type == "cuda"  # operations are counted on a CPU
        return engine.image_rounds(problem, precision, device, backend, teacher=teacher, graph=graph and on_gpu)

    losses = "feddlp" if teacher == "fresh" else "pre-update"
    return Form(
        key, told(name, backend), "FEDDLP", losses, *passes, flop, make, backend=backend, is_reference=is_reference
    )


def _flora(encoder: str, backend: str, flop: int) -> Form:
    def make(problem: Problem, precision: str, device: torch.device) -> Runner:
        rounds = engine.image_rounds if encoder == "image" else engine.text_rounds
        return rounds(problem, precision, device, backend, "flora")

    name = told(f"fastdlp flora, {encoder}", backend)
    return Form("flora", name, "FLoRA", "flora", 1, 1, flop, make, backend=backend)
