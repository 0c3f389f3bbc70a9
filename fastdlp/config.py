"""What a run is told: one frozen dataclass, its defaults, presets and checks. Standard library only.

A field left at None takes its value from the protocol (`--protocol paper|reference`), the demonstration
budget (embedded model) or the method. `resolved()` fills them in; only resolved configs reach the engine
and the run folder, so a record never depends on a later default.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from fastdlp.errors import FastdlpError

Encoder = Literal["image", "text", "both"]
EMBEDDED_MODEL = "glyph-clip"

# The two published descriptions of FEDDLP disagree (paper arXiv 2503.07552; the authors' code).
PROTOCOLS: dict[str, dict[str, Any]] = {
    "paper": {
        "task_loss": "cross-entropy",
        "kd_direction": "student-teacher",
        "kd_temperature": 1.0,
        "kd_logits": "class",
        "clip_norm": 0.0,
        "threshold": "soft",
        "transform": "model",
        "caption": "dataset",
        "report": "last",
        "rounds": 100,
    },
    "reference": {
        "task_loss": "contrastive",
        "kd_direction": "teacher-student",
        "kd_temperature": 3.0,
        "kd_logits": "batch",
        "clip_norm": 1.0,
        "threshold": "reference",
        "transform": "squash",
        "caption": "plain",
        "report": "best",
        "rounds": 101,
    },
}

# The embedded model and digits are a demonstration: a budget that ends within two minutes on two cores.
DEMONSTRATION: dict[str, Any] = {"rounds": 20, "lr": 1e-3}
# FEDDLP's learning rate in its authors' code, and torch's AdamW.
DEFAULTS: dict[str, Any] = {"lr": 1e-5, "optimizer": "adamw", "eps": 1e-8, "weight_decay": 0.0}
_MOST = 3e38  # what fp32 holds, nearly
# What is asked for, or what `--backend auto` measured, as `fastdlp.selection` writes it.
BACKENDS = ("auto", "triton", "torch")
_SELECTION = re.compile(r"\w+@[1-9]\d{0,9}=(triton|torch)(,\w+@[1-9]\d{0,9}=(triton|torch))*", re.ASCII)


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the numbers of a run, and where they go.

    Symbols of the paper in brackets. `None` means "from the protocol, the method or the model", see the
    module's docstring.
    """

    # what
    method: str = "feddlp"
    encoder: Encoder = "image"
    model: str = EMBEDDED_MODEL
    pretrained: str | None = None
    dataset: str = "digits"
    data_dir: str | None = None
    download: bool = False
    bad_images: Literal["refuse", "skip"] = "refuse"
    template: str | None = None

    # federation
    clients: int = 10
    partition: str = "dirichlet"
    beta: float = 0.1
    classes_per_client: int = 2
    partition_seed: int = 0
    test_fraction: float = 0.25
    val_fraction: float = 0.0
    shots: int | None = None
    empty_clients: Literal["keep", "refuse", "redraw"] = "keep"
    rounds: int | None = None
    local_epochs: int = 1
    batch_size: int = 32
    seed: int = 0

    # optimizer
    lr: float | None = None
    gate_lr: float | None = None
    optimizer: Literal["adamw", "adam"] | None = None
    eps: float | None = None
    weight_decay: float | None = None
    xi: float = 5e-5
    alpha: float = 0.1

    # adapters
    rank_local: int | None = None
    rank_global: int = 2
    lora_alpha: float = 16.0
    init: Literal["gaussian", "peft-gaussian", "kaiming"] = "gaussian"

    # the paper and the authors' code
    protocol: Literal["paper", "reference"] = "paper"
    teacher: Literal["fresh", "pre-update"] = "fresh"
    task_loss: Literal["cross-entropy", "contrastive"] | None = None
    kd_direction: Literal["student-teacher", "teacher-student"] | None = None
    kd_temperature: float | None = None
    kd_logits: Literal["class", "batch"] | None = None
    clip_norm: float | None = None
    threshold: Literal["soft", "reference"] | None = None
    transform: Literal["model", "squash"] | None = None
    caption: Literal["dataset", "plain"] | None = None
    report: Literal["last", "best", "validation"] | None = None

    # machine
    precision: Literal["fp32", "bf16"] = "fp32"
    device: str = "auto"
    backend: str = "auto"
    micro_batch: int | None = None
    cuda_graph: bool | None = None  # None: on a CUDA GPU, where the first replays are right

    # record
    out: str | None = None
    checkpoint_every: int = 1
    trace: bool = False

    def resolved(
        self, method: Mapping[str, Any] | None = None, demonstration: Mapping[str, Any] | None = None
    ) -> TrainConfig:
        """The same config with every None filled that has a default (rank_local is the method's).

        Args:
            method: the method's own defaults, before the protocol's (`fastdlp.methods.resolve` knows them).
            demonstration: and those with the embedded model, before all others.

        Raises:
            FastdlpError: a value that cannot be; see `check`.
        """
        self.check()
        known: dict[str, Any] = DEFAULTS | PROTOCOLS[self.protocol] | dict(method or {})
        if self.model == EMBEDDED_MODEL:
            known |= DEMONSTRATION | dict(demonstration or {})
        fill = {name: value for name, value in known.items() if getattr(self, name) is None}
        config = dataclasses.replace(self, **fill)
        if config.gate_lr is None:
            config = dataclasses.replace(config, gate_lr=config.lr)
        return dataclasses.replace(config, **_absolute_paths(config))

    def check(self) -> None:
        """Refuse what cannot be, one line each.

        Raises:
            FastdlpError: names the option, the value and what is allowed.
        """
        hints = get_type_hints(TrainConfig)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            choices = _choices(hints[field.name])
            if not _fits(value, hints[field.name]):
                raise FastdlpError(f"{_flag(field.name)} is {value!r}, which is no value for it")
            if choices and value is not None and value not in choices:
                raise FastdlpError(f"unknown {_flag(field.name)} {value!r}: choose from {', '.join(choices)}")
        for name in (
            "clients",
            "rounds",
            "local_epochs",
            "batch_size",
            "rank_local",
            "rank_global",
            "micro_batch",
            "checkpoint_every",
            "classes_per_client",
            "shots",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise FastdlpError(f"{_flag(name)} is {value}: it must be at least 1")
        for name in ("beta", "lr", "eps", "lora_alpha", "kd_temperature"):
            value = getattr(self, name)
            if value is not None and not 0 < value < _MOST:
                raise FastdlpError(f"{_flag(name)} is {value}: it must be a finite number greater than 0")
        for name in ("gate_lr", "xi", "alpha", "clip_norm", "weight_decay"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < _MOST:
                raise FastdlpError(f"{_flag(name)} is {value}: it must be a finite number, 0 or greater")
        for name in ("seed", "partition_seed"):
            if not 0 <= getattr(self, name) < 2**63:
                raise FastdlpError(f"{_flag(name)} is {getattr(self, name)}: it must be 0 or greater, below 2^63")
        if not 0 < self.test_fraction < 1:
            raise FastdlpError(f"--test-fraction is {self.test_fraction}: it must lie between 0 and 1")
        if not 0 <= self.val_fraction < 1:
            raise FastdlpError(f"--val-fraction is {self.val_fraction}: it must be 0 or more, below 1")
        if self.report == "validation" and not self.val_fraction and not os.path.isfile(self.partition):
            raise FastdlpError("--report validation needs validation samples: pass --val-fraction, for example 0.1")
        if self.device not in ("auto", "cpu", "cuda") and not self.device.startswith("cuda:"):
            raise FastdlpError(f"unknown --device {self.device!r}: choose from auto, cpu, cuda, cuda:N")
        if self.backend not in BACKENDS and not _SELECTION.fullmatch(self.backend):
            raise FastdlpError(f"unknown --backend {self.backend!r}: choose from {', '.join(BACKENDS)}")
        if self.template is not None and self.template.count("{}") != 1:
            raise FastdlpError(f"--template {self.template!r} must hold one {{}} where the class name goes")

    def to_json(self) -> str:
        """Readable JSON, one option a line."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @staticmethod
    def from_json(text: str) -> TrainConfig:
        """Read what `to_json` wrote.

        Raises:
            FastdlpError: not JSON, or an option that this version does not know.
        """
        try:
            values = json.loads(text)
            if not isinstance(values, dict):
                raise ValueError("not an object")
            return TrainConfig(**values)
        except (ValueError, TypeError) as error:
            raise FastdlpError(f"this config was not written by this version of fastdlp: {error}") from None


# What may differ between a run and its continuation without changing a number.
NOT_IN_NUMBERS = frozenset({"out", "data_dir", "download", "checkpoint_every"})


def differences(old: TrainConfig, new: TrainConfig) -> list[str]:
    """The options, as flags, in which two resolved configs differ and which decide numbers."""
    return [
        f"{_flag(f.name)} {getattr(old, f.name)} (now {getattr(new, f.name)})"
        for f in dataclasses.fields(TrainConfig)
        if f.name not in NOT_IN_NUMBERS and getattr(old, f.name) != getattr(new, f.name)
    ]


def _absolute_paths(config: TrainConfig) -> dict[str, Any]:
    """The options that are paths, whole, so that a run can be continued from another folder."""
    found: dict[str, Any] = {}
    for name, prefix in (("dataset", "folder:"), ("model", "local-dir:")):
        value = getattr(config, name)
        if value.startswith(prefix) and value != prefix:
            found[name] = prefix + os.path.abspath(os.path.expanduser(value.removeprefix(prefix)))
    for name in ("data_dir", "partition", "pretrained"):
        value = getattr(config, name)
        if value is not None and (name == "data_dir" or os.path.isfile(value)):
            found[name] = os.path.abspath(os.path.expanduser(value))
    return found


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a field's type. An integer passes for a float, a path for a string."""
    kinds = get_args(hint) or (hint,)
    if value is None:
        return type(None) in kinds
    kind = next((kind for kind in (bool, int, float) if kind in kinds), str)
    wider: dict[type, tuple[type, ...]] = {float: (int, float), str: (str, Path)}
    return isinstance(value, wider.get(kind, (kind,))) and isinstance(value, bool) == (kind is bool)


def _choices(hint: Any) -> tuple[str, ...]:
    """The strings of a Literal, also inside `Literal[...] | None`."""
    found = [arg for arg in get_args(hint) if isinstance(arg, str)]
    for arg in get_args(hint):
        found += [inner for inner in get_args(arg) if isinstance(inner, str)]
    return tuple(found)
