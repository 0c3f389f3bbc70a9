"""The configuration of a run: one frozen dataclass whose fields declare everything about an option.

The command line, the checks, the presets and the records derive from the fields through `OPTIONS`. Standard library
only.

A field left at None takes its value from the protocol (`--protocol paper|reference`), the preset of the embedded model
or the method. `resolved()` fills them in; only resolved configs reach the engine and the run folder, so a record never
depends on a later default.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from fastdlp.errors import FastdlpError

EMBEDDED_MODEL = "glyph-clip"
# What `--backend` may be: a choice for all units, or the choice per unit that `fastdlp.selection` writes.
BACKENDS = ("auto", "triton", "torch")
_SELECTION = re.compile(r"\w+@[1-9]\d{0,9}=(triton|torch)(,\w+@[1-9]\d{0,9}=(triton|torch))*", re.ASCII)
_FP32_MAX = 3e38  # rounded down


@dataclass(frozen=True)
class Range:
    """The numbers that an option may be, and how a message describes them."""

    contains: Callable[[float], bool]
    description: str


COUNT = Range(lambda value: value >= 1, "at least 1")
POSITIVE = Range(lambda value: 0 < value < _FP32_MAX, "a finite number greater than 0")
NOT_NEGATIVE = Range(lambda value: 0 <= value < _FP32_MAX, "a finite number, 0 or greater")
SEED = Range(lambda value: 0 <= value < 2**63, "0 or greater, below 2^63")
FRACTION = Range(lambda value: 0 < value < 1, "between 0 and 1")
FRACTION_OR_0 = Range(lambda value: 0 <= value < 1, "0 or greater, below 1")


@dataclass(frozen=True)
class Option:
    """One field of `TrainConfig`. What is marked "for None" replaces None in `TrainConfig.resolved`."""

    name: str
    default: Any
    kind: type  # bool, int, float or str
    optional: bool  # whether None is a value
    choices: tuple[str, ...]  # the strings that it may be; empty for any
    group: str  # heading in --help
    help: str  # {datasets} stands for the names of the data sets
    range: Range | None = None
    protocols: tuple[Any, Any] | None = None  # for None under --protocol paper and reference
    fallback: Any = None  # for None under both
    demonstration: Any = None  # for None with the embedded model, before all others
    in_numbers: bool = True  # whether a run's numbers depend on it; if not, a resumed run may change it
    of_methods: bool = False  # whether only some methods read it
    of_partition: bool = False  # whether it decides which client holds which samples
    in_partition_file: bool = False  # whether a partition file determines it

    @property
    def flag(self) -> str:
        """The option on the command line: --rank-local."""
        return "--" + self.name.replace("_", "-")

    def check(self, value: Any) -> None:
        """Raise FastdlpError unless `value` has the type and lies in the range. An integer passes for a float."""
        accepted: Any = {float: (int, float), str: (str, Path)}.get(self.kind, self.kind)
        if value is None and self.optional:
            return
        if not isinstance(value, accepted) or isinstance(value, bool) != (self.kind is bool):
            raise FastdlpError(f"{self.flag} is {value!r}, expected a value of type {self.kind.__name__}")
        if self.choices and value not in self.choices:
            raise FastdlpError(f"unknown {self.flag} {value!r}: choose from {', '.join(self.choices)}")
        if self.range and not self.range.contains(value):
            raise FastdlpError(f"{self.flag} is {value}: it must be {self.range.description}")


def _option(group: str, default: Any, help: str, range: Range | None = None, **more: Any) -> Any:
    """A field of `TrainConfig`; `more` are attributes of `Option`."""
    return field(default=default, metadata={"group": group, "help": help, "range": range, **more})


_what = partial(_option, "What to train")
_federation = partial(_option, "Federation")
_partition = partial(_federation, of_partition=True)
_in_file = partial(_partition, in_partition_file=True)
_optimizer = partial(_option, "Optimizer and adapters")
_adapter = partial(_optimizer, of_methods=True)
_switch = partial(_option, "Paper or authors' code (each switch of --protocol alone)")
_method_switch = partial(_switch, None, of_methods=True)
_machine = partial(_option, "Machine")
_record = partial(_option, "Record")


@dataclass(frozen=True)
class TrainConfig:
    """Every option of a run: what decides its numbers, and where they are written.

    None means "from the protocol, the method or the model", see the module's docstring.
    """

    method: str = _what(
        "feddlp",
        "feddlp: private gated LoRA and shared LoRA, distilled from each other. flora: one LoRA, averaged. feddat: "
        "shared LoRA, distilled from its frozen copy and a local one. combined: feddlp's two adapters in one forward. "
        "fedclip: attention on the features. local, local-sora: one LoRA, without and with gate, never exchanged. "
        "FLoRA's baselines: fedfft, fedvmlc, fedlc, fedaa.",
    )
    encoder: Literal["image", "text", "both"] = _what(
        "image", "Adapted tower of CLIP: image or text; fedfft also both."
    )
    model: str = _what(
        EMBEDDED_MODEL,
        "glyph-clip (embedded, a demonstration) or an open_clip model with a ViT image tower, such as "
        "ViT-B-32-quickgelu; also local-dir:PATH.",
    )
    pretrained: str | None = _what(
        None,
        "A tag of open_clip, a checkpoint file (safetensors, or nothing but tensors), or none for random weights. "
        "Default: the embedded weights, or OpenAI's.",
    )
    dataset: str = _what("digits", "{datasets}, or folder:PATH, one folder of images a class.")
    data_dir: str | None = _what(None, "Folder that holds the data set, or that it is downloaded to.", in_numbers=False)
    download: bool = _what(False, "Download the data set when it is not in --data-dir.", in_numbers=False)
    bad_images: Literal["refuse", "skip"] = _what("refuse", "Unreadable files: refuse the data set, or skip them.")
    template: str | None = _what(None, "Prompt with one {} for the class name. Default: the data set's own.")

    clients: int = _in_file(10, "Number of clients.", COUNT)
    partition: str = _partition("dirichlet", "dirichlet, iid, pathological, or a partition.json of an earlier run.")
    beta: float = _in_file(0.1, "Dirichlet concentration: 0.01 gives most clients one or two classes.", POSITIVE)
    classes_per_client: int = _in_file(2, "Classes a client, for --partition pathological.", COUNT)
    partition_seed: int = _in_file(0, "Seed of the partition, independent of --seed.", SEED)
    test_fraction: float = _in_file(0.25, "Fraction of each client's samples that it is tested on.", FRACTION)
    val_fraction: float = _partition(
        0.0, "Fraction of each client's training samples that is held out for validation.", FRACTION_OR_0
    )
    shots: int | None = _partition(
        None,
        "Few-shot: training samples of each class, of all clients together, those held out for validation included. "
        "Default: all.",
        COUNT,
    )
    empty_clients: Literal["keep", "refuse", "redraw"] = _partition(
        "keep", "Clients without a training sample: keep them out of training, refuse, or redraw."
    )
    rounds: int | None = _federation(
        None, "Rounds, each ended by FedAvg of what is shared.", COUNT, protocols=(100, 101), demonstration=20
    )
    local_epochs: int = _federation(1, "Passes over a client's samples in a round.", COUNT)
    batch_size: int = _federation(32, "Samples in a client's batch.", COUNT)
    seed: int = _federation(0, "Seed of adapters and batches.", SEED)

    lr: float | None = _optimizer(  # fallback: the authors' code
        None, "Learning rate of everything but the gate.", POSITIVE, fallback=1e-5, demonstration=1e-3
    )
    gate_lr: float | None = _adapter(None, "Learning rate of the gate. Default: --lr.", NOT_NEGATIVE)
    optimizer: Literal["adamw", "adam"] | None = _optimizer(
        None, "adamw, or adam, which adds weight decay to the gradient.", fallback="adamw"
    )
    eps: float | None = _optimizer(None, "Adam's ε.", POSITIVE, fallback=1e-8)
    weight_decay: float | None = _optimizer(None, "Weight decay.", NOT_NEGATIVE, fallback=0.0)
    xi: float = _adapter(
        5e-5, "ξ, the threshold that prunes the gate after each step; not scaled by the learning rate.", NOT_NEGATIVE
    )
    alpha: float = _adapter(0.1, "α, weight of the distillation loss in the local step.", NOT_NEGATIVE)
    rank_local: int | None = _adapter(None, "Rank of the local adapter. Default: feddlp 4, else 2.", COUNT)
    rank_global: int = _adapter(2, "Rank of the global adapter.", COUNT)
    lora_alpha: float = _adapter(16.0, "LoRA's alpha: an adapter is scaled by alpha / rank.", POSITIVE)
    init: Literal["gaussian", "peft-gaussian", "kaiming"] = _adapter(
        "gaussian", "Initialization of A: gaussian (variance 1/r), peft-gaussian (deviation 1/r) or kaiming."
    )

    protocol: Literal["paper", "reference"] = _switch(
        "paper", "paper: as arXiv 2503.07552 writes it. reference: as its authors' code computes it."
    )
    teacher: Literal["fresh", "pre-update"] = _switch(
        "fresh",
        "Teacher of the global step: fresh (after the local update) or pre-update (faster, another algorithm).",
        of_methods=True,
    )
    task_loss: Literal["cross-entropy", "contrastive"] | None = _switch(
        None, "cross-entropy over classes, or contrastive within the batch.", protocols=("cross-entropy", "contrastive")
    )
    kd_direction: Literal["student-teacher", "teacher-student"] | None = _method_switch(
        "student-teacher: KL(student ‖ teacher); or teacher-student.", protocols=("student-teacher", "teacher-student")
    )
    kd_temperature: float | None = _method_switch(
        "Temperature T of the distillation; its loss is scaled by T².", POSITIVE, protocols=(1.0, 3.0)
    )
    kd_logits: Literal["class", "batch"] | None = _method_switch(
        "Distil class logits, or the batch's image-text logits on both axes.", protocols=("class", "batch")
    )
    clip_norm: float | None = _switch(
        None, "Clip the gradient of A and B to this norm; 0: off.", NOT_NEGATIVE, protocols=(0.0, 1.0)
    )
    threshold: Literal["soft", "reference"] | None = _method_switch(
        "soft: T_ξ; reference: the code's own, with a dead zone of 2ξ.", protocols=("soft", "reference")
    )
    transform: Literal["model", "squash"] | None = _switch(
        None, "model: the model's own (resize, crop); squash: to a square.", protocols=("model", "squash")
    )
    caption: Literal["dataset", "plain"] | None = _switch(
        None, "Training captions: the dataset's template, or plain 'a photo of a {}.'.", protocols=("dataset", "plain")
    )
    report: Literal["last", "best", "validation"] | None = _switch(
        None,
        "Which round's accuracy is the run's: last, best on test, or chosen on validation.",
        protocols=("last", "best"),
    )

    precision: Literal["fp32", "bf16"] = _machine(
        "fp32", "fp32 or bf16 for weights and activations; adapters, gates and moments are always fp32."
    )
    device: str = _machine("auto", "auto, cpu, cuda or cuda:N.")
    backend: str = _machine(
        "auto",
        "How the adapted linears run: triton (fused kernels, CUDA), torch (library products), or auto: on a GPU "
        "without measured tiles each part of the tower is checked and timed with both before the first round, once; "
        "torch on a CPU.",
    )
    micro_batch: int | None = _machine(
        None, "Rows that go through the tower at once. Default: what fits the memory.", COUNT, of_methods=True
    )
    cuda_graph: bool | None = _machine(
        None,
        "Record a step as a CUDA graph and replay it; all batches are padded to full ones. By default: on a CUDA GPU, "
        "as long as the first replay of each shape equals the eager step.",
    )

    out: str | None = _record(None, "Run folder. Default: a new one under runs/.", in_numbers=False)
    checkpoint_every: int = _record(1, "Rounds between checkpoints.", COUNT, in_numbers=False)
    trace: bool = _record(False, "Also write every client's adapters each round and every batch, for a replay.")

    def resolved(
        self, method: Mapping[str, Any] | None = None, demonstration: Mapping[str, Any] | None = None
    ) -> TrainConfig:
        """The same config with every None filled that has a default (rank_local is the method's).

        Args:
            method: the method's own defaults, before the protocol's (`fastdlp.methods.resolve` passes them).
            demonstration: the method's defaults with the embedded model, before all others.

        Raises:
            FastdlpError: an invalid value; see `check`.
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
        """Refuse values that no run can have.

        Raises:
            FastdlpError: names the option, the value and what is allowed.
        """
        for option in OPTIONS.values():
            option.check(getattr(self, option.name))
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


def _options() -> dict[str, Option]:
    hints = get_type_hints(TrainConfig)
    found = {}
    for f in dataclasses.fields(TrainConfig):
        arguments = get_args(hints[f.name])
        optional = type(None) in arguments
        hint = arguments[0] if optional else hints[f.name]
        choices = get_args(hint)  # of a Literal
        kind = str if choices else hint
        found[f.name] = Option(f.name, f.default, kind, optional, choices, **f.metadata)
    return found


OPTIONS = _options()
# The two published descriptions of FEDDLP disagree (paper arXiv 2503.07552; the authors' code).
PROTOCOLS: dict[str, dict[str, Any]] = {
    protocol: {option.name: option.protocols[i] for option in OPTIONS.values() if option.protocols}
    for i, protocol in enumerate(("paper", "reference"))
}
DEFAULTS = {option.name: option.fallback for option in OPTIONS.values() if option.fallback is not None}
# With the embedded model and digits: 20 rounds, within two minutes on two cores.
DEMONSTRATION = {o.name: o.demonstration for o in OPTIONS.values() if o.demonstration is not None}
# Options that may differ between a run and its continuation without changing a number.
NOT_IN_NUMBERS = frozenset(option.name for option in OPTIONS.values() if not option.in_numbers)
PARTITION_OPTIONS = tuple(option.name for option in OPTIONS.values() if option.of_partition)


def differences(old: TrainConfig, new: TrainConfig) -> list[str]:
    """The options, as flags, in which two resolved configs differ and which decide numbers."""
    return [
        f"{option.flag} {getattr(old, name)} (now {getattr(new, name)})"
        for name, option in OPTIONS.items()
        if option.in_numbers and getattr(old, name) != getattr(new, name)
    ]


def _absolute_paths(config: TrainConfig) -> dict[str, Any]:
    """The options that are paths as absolute paths, so that a run can be continued from another folder."""
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
