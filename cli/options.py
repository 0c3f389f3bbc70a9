"""The options of `fastdlp train`, made from `TrainConfig` so that command line and Python never differ.

Every option is None when it is not given, which tells an explicit choice from a default.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from fastdlp.config import DEFAULTS, DEMONSTRATION, PROTOCOLS, TrainConfig
from fastdlp.data.registry import DATASETS
from fastdlp.errors import FastdlpError
from fastdlp.methods import make_method, resolve
from fastdlp.methods.base import METHOD_OPTIONS

WHAT, FEDERATION, OPTIMISER = "What to train", "Federation", "Optimizer and adapters"
SWITCHES, MACHINE, RECORD = "Paper or authors' code (each switch of --protocol alone)", "Machine", "Record"

# name: (panel, help). The order is the order in --help.
HELP: dict[str, tuple[str, str]] = {
    "method": (WHAT, "feddlp: private gated LoRA and shared LoRA that teach each other. flora: one LoRA, averaged. "
                     "feddat: shared LoRA, taught by its frozen copy and a local one. combined: feddlp's two adapters "
                     "in one forward. fedclip: attention on the features. local, local-sora: one LoRA, without and "
                     "with gate, never exchanged. FLoRA's baselines: fedfft, fedvmlc, fedlc, fedaa."),
    "encoder": (WHAT, "Which tower of CLIP is adapted: image or text; of fedfft also both."),
    "dataset": (WHAT, f"{', '.join(DATASETS)}, or folder:PATH, one folder of images a class."),
    "model": (WHAT, "glyph-clip (embedded, a demonstration) or an open_clip model with a ViT image tower, such as "
                    "ViT-B-32-quickgelu; also local-dir:PATH."),
    "pretrained": (WHAT, "A tag of open_clip, a checkpoint file (safetensors, or nothing but tensors), or the word "
                         "none for random weights. Default: the embedded weights, or OpenAI's."),
    "data_dir": (WHAT, "Where the data set lies, or is downloaded to."),
    "download": (WHAT, "Fetch the data set through torchvision when it is not in --data-dir."),
    "bad_images": (WHAT, "Files that cannot be decoded: refuse the data set, or skip them."),
    "template": (WHAT, "Prompt with one {} for the class name. Default: the data set's own."),
    "clients": (FEDERATION, "Number of clients."),
    "partition": (FEDERATION, "dirichlet, iid, pathological, or a partition.json of an earlier run."),
    "beta": (FEDERATION, "Dirichlet concentration: 0.1 is uneven, 0.01 gives most clients one or two classes."),
    "classes_per_client": (FEDERATION, "Classes a client, for --partition pathological."),
    "partition_seed": (FEDERATION, "Seed of the partition, apart from --seed."),
    "test_fraction": (FEDERATION, "Share of each client's samples that it is tested on."),
    "val_fraction": (FEDERATION, "Share of each client's training samples that is held out for validation."),
    "shots": (FEDERATION, "Few-shot: training samples of each class, of all clients together, those held out for "
                          "validation included. Default: all."),
    "empty_clients": (FEDERATION, "Clients without a training sample: keep them out of training, refuse, or redraw."),
    "rounds": (FEDERATION, "Rounds, each ended by FedAvg of what is shared. Default: the method's, else"),
    "local_epochs": (FEDERATION, "Passes over a client's samples in a round."),
    "batch_size": (FEDERATION, "Samples in a client's batch."),
    "seed": (FEDERATION, "Seed of adapters and batches."),
    "lr": (OPTIMISER, "Learning rate of everything but the gate. Default: the method's, else"),
    "gate_lr": (OPTIMISER, "Learning rate of the gate. Default: --lr."),
    "optimizer": (OPTIMISER, "adamw, or adam, which adds weight decay to the gradient. Default: the method's, else"),
    "eps": (OPTIMISER, "Adam's ε. Default: the method's, else"),
    "weight_decay": (OPTIMISER, "Weight decay. Default: the method's, else"),
    "xi": (OPTIMISER, "ξ, the threshold that prunes the gate after each step; not scaled by the learning rate."),
    "alpha": (OPTIMISER, "α, weight of the distillation loss in the local step."),
    "rank_local": (OPTIMISER, "Rank of the local adapter. Default: the method's (feddlp 4, local 2)."),
    "rank_global": (OPTIMISER, "Rank of the global adapter."),
    "lora_alpha": (OPTIMISER, "LoRA's alpha: an adapter is scaled by alpha / rank."),
    "init": (OPTIMISER, "How A starts: gaussian (variance 1/r), peft-gaussian (deviation 1/r) or kaiming."),
    "protocol": (SWITCHES, "paper: as arXiv 2503.07552 writes it. reference: as its authors' code computes it."),
    "teacher": (SWITCHES, "Teacher of the global step: fresh (after the local update) or pre-update (faster, another "
                          "algorithm)."),
    "task_loss": (SWITCHES, "cross-entropy over classes, or contrastive within the batch."),
    "kd_direction": (SWITCHES, "student-teacher: KL(student ‖ teacher); or teacher-student."),
    "kd_temperature": (SWITCHES, "Temperature T of the distillation; its loss is scaled by T²."),
    "kd_logits": (SWITCHES, "Distil class logits, or the batch's image-text logits on both axes."),
    "clip_norm": (SWITCHES, "Clip the gradient of A and B to this norm; 0: off."),
    "threshold": (SWITCHES, "soft: T_ξ; reference: the code's own, with a dead zone of 2ξ."),
    "transform": (SWITCHES, "model: the model's own (resize, crop); squash: to a square."),
    "caption": (SWITCHES, "Training captions: the dataset's template, or plain 'a photo of a {}.'."),
    "report": (SWITCHES, "Which round's accuracy is the run's: last, best on test, or chosen on validation."),
    "precision": (MACHINE, "fp32 or bf16 for weights and activations; adapters, gates and moments are always fp32."),
    "device": (MACHINE, "auto, cpu, cuda or cuda:N."),
    "backend": (MACHINE, "How the adapted linears run: triton (fused kernels, CUDA), torch (library products), or "
                         "auto: on a GPU without measured tiles each part of the tower is checked and timed in both "
                         "forms before the first round, once; torch on a CPU."),
    "micro_batch": (MACHINE, "Rows that go through the tower at once. Default: what fits the memory."),
    "cuda_graph": (MACHINE, "Record a step as a CUDA graph and replay it; all batches are padded to full ones. By "
                            "default: on a CUDA GPU, as long as the first replay of each shape equals the eager step."),
    "out": (RECORD, "Run folder. Default: a new one under runs/."),
    "checkpoint_every": (RECORD, "Rounds between checkpoints."),
    "trace": (RECORD, "Also write every client's adapters each round and every batch, for a replay."),
}  # fmt: skip


def config_options(command: Callable[..., None], without: Sequence[str] = ()) -> Callable[..., None]:
    """Give a Typer command an option for every field of `TrainConfig`; it gets the given ones as a dict, first."""
    hints = get_type_hints(TrainConfig)
    parameters: list[inspect.Parameter] = []
    annotations: dict[str, Any] = {}
    names = [name for name in HELP if name not in without]
    for name in names:
        panel, text = HELP[name]
        kind: Any = Annotated[_plain(hints[name]) | None, _option(name, text, panel)]
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind))
        annotations[name] = kind

    def wrapped(**values: Any) -> None:
        given = {name: values.pop(name) for name in names}
        command({name: value for name, value in given.items() if value is not None}, **values)

    own = [p.replace(kind=p.KEYWORD_ONLY) for p in inspect.signature(command, eval_str=True).parameters.values()][1:]
    wrapped.__signature__ = inspect.Signature(parameters + own)  # type: ignore[attr-defined]
    wrapped.__annotations__ = annotations | {p.name: p.annotation for p in own}
    wrapped.__doc__, wrapped.__name__ = command.__doc__, command.__name__
    return wrapped


def check_method_options(given: dict[str, Any]) -> None:
    """Refuse options that do nothing for the chosen method. Raises FastdlpError."""
    method = make_method(resolve(TrainConfig(**given)))
    for name in given:
        if name in METHOD_OPTIONS and name not in method.reads():
            flag = "--" + name.replace("_", "-")
            raise FastdlpError(f"{flag} does nothing for --method {method.name}: leave it out")


def check_partition_options(given: dict[str, Any]) -> None:
    """Refuse options that a partition file has settled. Raises FastdlpError."""
    settled = ("clients", "beta", "classes_per_client", "partition_seed", "test_fraction")
    if Path(given.get("partition", "")).is_file() and (both := [name for name in settled if name in given]):
        flags = ", ".join("--" + name.replace("_", "-") for name in both)
        raise FastdlpError(f"--partition {given['partition']} settles who holds what: leave out {flags}")


def _option(name: str, text: str, panel: str) -> Any:
    flag = "--" + name.replace("_", "-")
    flag += "/--no-cuda-graph" if name == "cuda_graph" else ""  # the one switch that is on by itself
    return typer.Option(flag, help=text, rich_help_panel=panel, show_default=_default(name))


def _default(name: str) -> str | bool:
    """What --help shows as the default: the config's, or how it follows from protocol and model."""
    value = next(f.default for f in dataclasses.fields(TrainConfig) if f.name == name)
    if value is not None:
        return False if isinstance(value, bool) else str(value)
    by_protocol = [preset[name] for preset in PROTOCOLS.values() if name in preset]
    parts = [f"{v} ({protocol})" for protocol, v in zip(PROTOCOLS, by_protocol)]
    if name in DEFAULTS:
        value = DEFAULTS[name]
        parts = [value if isinstance(value, str) else f"{value:g}"]
    if name in DEMONSTRATION:
        parts.append(f"{DEMONSTRATION[name]} (glyph-clip)")
    return ", ".join(parts) or False


def _plain(hint: Any) -> type:
    """The type that the command line parses: Literals are strings, checked by the config with its own message."""
    kinds = [arg for arg in get_args(hint) if arg is not type(None)] or [hint]
    kind = kinds[0]
    return kind if kind in (int, float, bool, str) else str
