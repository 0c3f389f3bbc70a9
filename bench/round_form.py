"""What a form of a federated round is to `bench round`, and which baselines its rows are told as times of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastdlp.bench.problem import Problem
from fastdlp.bench.runner import Losses, Runner

BOTH = ("fp32", "bf16")
KEYS = {
    "image": ("peft", "autocast", "strongest", "paper", "fastdlp", "pre-update", "full", "flora"),
    "text": ("uncached", "fastdlp"),
}


@dataclass(frozen=True)
class Form:
    """A way to compute the round.

    group: whose table and baselines. losses: which reference's losses are its own. flop: of the frozen products that a
    step of all clients needs, the same for all forms of an algorithm. in_turn: clients one after another.
    is_reference: in fp32, what the others are compared with.
    """

    key: str
    name: str
    group: str
    losses: str
    forwards: int
    backwards: int
    flop: int
    make: Callable[[Problem, str, torch.device], Runner]
    precisions: tuple[str, ...] = BOTH
    backend: str | None = None
    in_turn: bool = False
    is_reference: bool = False


@dataclass(frozen=True)
class Baseline:
    """A form that others are told as times of; precision None: in their own dtype."""

    label: str
    key: str
    precision: str | None = None


BASELINES = {
    "FEDDLP": (
        Baseline("PEFT", "peft"),
        Baseline("PEFT fp32", "peft", "fp32"),
        Baseline("strongest", "strongest"),
        Baseline("paper fp32", "paper", "fp32"),
    ),
    "FLoRA": (Baseline("full", "full"), Baseline("full fp32", "full", "fp32")),
    "FEDDLP, text": (Baseline("uncached", "uncached"), Baseline("uncached fp32", "uncached", "fp32")),
}
References = dict[str, tuple[str, Callable[[], Losses]]]  # of whose name, and how they are had


def told(name: str, backend: str) -> str:
    """A form's name with its backend, where that is not torch."""
    return name + (f" --backend {backend}" if backend != "torch" else "")
