"""From a config to an engine: weights, data, partition, frozen features, adapters."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from fastdlp.bank import AdapterBank
from fastdlp.clip import Clip, class_prompts, load_clip
from fastdlp.config import TrainConfig
from fastdlp.data.cache import Pixels, load_pixels
from fastdlp.data.names import check_name
from fastdlp.data.partition import SCHEMES, Partition, load_partition, make_partition
from fastdlp.data.sources import load_source
from fastdlp.data.transform import Transform
from fastdlp.engine import Engine, Schedule, Slot
from fastdlp.errors import FastdlpError
from fastdlp.kernels.backend import choose_backend
from fastdlp.methods import make_method
from fastdlp.objective import Objective
from fastdlp.optimiser import Hyperparameters
from fastdlp.sites import tower_sites
from fastdlp.stem import ImageStem, TextStem
from fastdlp.task import (
    ClassificationTask,
    ImageTask,
    Prompts,
    TextTask,
    frozen_image_features,
    frozen_text_features,
)
from fastdlp.tower import Norm, Tower

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PLAIN_TEMPLATE = "a photo of a {}."
# Share of the machine's memory that activations and the resident stem tokens may each take.
ACTIVATION_SHARE = {"cpu": 0.25, "cuda": 0.6}
RESIDENT_SHARE = {"cpu": 0.15, "cuda": 0.15}
# Kept for backward per token, block and unit of width: two norms' inputs and outputs, q, k, v, attention's output,
# and four widths each of fc1's output and the activation's.
ACTIVATIONS_PER_WIDTH = 16
PACKED = 3  # adapters on the widest linear: q, k and v
GRAPHS = 2  # autograd graphs that a step holds at once (local and global)

# Which stream of random numbers a seed's draw belongs to; the engine's batches are stream 1.
_INIT_LOCAL, _INIT_GLOBAL = 2, 3

Stem = TypeVar("Stem", ImageStem, TextStem)


@dataclass(frozen=True)
class Federation:
    """A prepared run: everything that a round needs, and what a record tells."""

    config: TrainConfig  # resolved, micro_batch filled in
    engine: Engine
    pixels: Pixels
    partition: Partition
    weights_fingerprint: str


class _PixelBatches:
    """Normalised pixels by sample number, off the memory map."""

    def __init__(self, pixels: Pixels, transform: Transform) -> None:
        self.pixels, self.transform = pixels, transform

    def __len__(self) -> int:
        return len(self.pixels.labels)

    def __call__(self, samples: np.ndarray) -> Tensor:
        return self.transform.normalise(torch.from_numpy(np.ascontiguousarray(self.pixels.data[samples])))


def prepare(
    config: TrainConfig,
    tell: Callable[[str], None] = lambda text: None,
    partition_file: Path | None = None,
) -> Federation:
    """Build a run from a config.

    Args:
        config: any config; it is resolved here.
        tell: told in a line what is being done.
        partition_file: take the partition from this file instead of from the config (a run's own record).

    Raises:
        FastdlpError: anything in the config that does not fit the machine, the data or the model.
    """
    config = config.resolved()
    method = make_method(config)
    check_name(config.dataset)
    device = pick_device(config.device)

    tell(f"weights of {config.model}")
    clip = load_clip(config.model, config.pretrained, config.seed)
    transform = clip.transform if config.transform == "model" else replace(clip.transform, resize_mode="squash")
    tell(f"images of {config.dataset}")
    pixels = read_pixels(config, transform)
    partition = read_partition(config, pixels, partition_file)
    _check_partition(partition, config.empty_clients)
    config = replace(config, clients=partition.clients)

    dtype = DTYPES[config.precision]
    ranks = PACKED * sum(branch.rank for branch in method.branches())
    config = replace(config, backend=pick_backend(config.backend, device, dtype, ranks))
    sites = tower_sites(clip.tower(config.encoder).shape)
    tell("frozen features")
    task, rows, tokens = _make_task(config, clip, pixels, transform, device, dtype)
    if config.micro_batch is None:
        config = replace(config, micro_batch=_micro_batch(clip.tower(config.encoder), tokens, dtype, device, rows))

    try:
        bank = AdapterBank(sites, method.branches(), partition.clients, device, config.backend)
    except RuntimeError:  # torch's for memory that it does not get
        raise FastdlpError(
            f"the adapters of {partition.clients} clients do not fit the memory: use a smaller "
            "--rank-local and --rank-global, or fewer --clients"
        ) from None
    bank.initialise(config.init, {name: init_words(config.seed, name, partition.clients) for name in bank.branches})
    slots = [
        Slot(train, test, federation=0, client=client, seed=config.seed)
        for client, (train, test) in enumerate(zip(partition.train, partition.test))
    ]
    objective = Objective(config.task_loss, config.kd_direction, config.kd_temperature, config.kd_logits)  # type: ignore[arg-type]
    schedule = Schedule(config.batch_size, config.local_epochs, config.micro_batch or 1)
    engine = Engine(
        method,
        bank,
        task,
        objective,
        _hyperparameters(config, bank),
        slots,
        pixels.labels,
        schedule,
    )
    return Federation(config, engine, pixels, partition, clip.fingerprint())


def init_words(seed: int, branch: str, clients: int) -> list[list[int]]:
    """What seeds each client's first draw of a branch: the global adapter starts equal everywhere, local ones apart."""
    if branch == "global":
        return [[seed, _INIT_GLOBAL]] * clients
    return [[seed, _INIT_LOCAL, client] for client in range(clients)]


def pick_device(name: str) -> torch.device:
    """The device that `--device` names; auto takes CUDA where there is one.

    Raises:
        FastdlpError: CUDA asked for where none is.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise FastdlpError(f"unknown --device {name!r}: choose from auto, cpu, cuda, cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise FastdlpError(
            f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices here; use --device cpu"
        )
    return device


def pick_backend(name: str, device: torch.device, dtype: torch.dtype, ranks: int = 0) -> Any:
    """The form of the kernels that `--backend` names, "triton" or "torch"; `ranks` of the widest linear.

    Raises:
        FastdlpError: Triton asked for where it cannot run.
    """
    try:
        return choose_backend(name, device, dtype, ranks)
    except ValueError as error:
        raise FastdlpError(f"--backend {name}: {error}") from None


def read_pixels(
    config: TrainConfig, transform: Transform, progress: Callable[[int, int], None] | None = None
) -> Pixels:
    """The data set of a config, preprocessed or from the cache. Raises FastdlpError for data that is not there."""
    source = load_source(config.dataset, config.data_dir, config.download)
    return load_pixels(source, transform, on_bad=config.bad_images, progress=progress)


def read_partition(config: TrainConfig, pixels: Pixels, file: Path | None = None) -> Partition:
    """The partition of a config: drawn by scheme and seed, or read from a file."""
    if file is None and config.partition not in SCHEMES:
        file = Path(config.partition)
        if not file.is_file():
            raise FastdlpError(f"--partition {config.partition!r} is neither {', '.join(SCHEMES)} nor a partition file")
    if file is not None:
        return load_partition(file, pixels.ids, pixels.name)
    return make_partition(
        pixels.labels,
        clients=config.clients,
        scheme=config.partition,
        beta=config.beta,
        classes_per_client=config.classes_per_client,
        seed=config.partition_seed,
        test_fraction=config.test_fraction,
        on_empty=config.empty_clients,
        dataset=pixels.name,
        fingerprint=pixels.fingerprint,
    )


def _check_partition(partition: Partition, empty_clients: str) -> None:
    if partition.empty and empty_clients != "keep":  # a file's partition cannot be drawn again
        raise FastdlpError(
            f"clients {', '.join(map(str, partition.empty))} have no training sample: take another or "
            "--empty-clients keep"
        )
    if not any(len(train) for train in partition.train):
        raise FastdlpError("no client of this partition has a training sample")
    if not any(len(test) for test in partition.test):
        raise FastdlpError(
            "no client of this partition has a test sample: use fewer clients or a larger --test-fraction"
        )


def _make_task(
    config: TrainConfig,
    clip: Clip,
    pixels: Pixels,
    transform: Transform,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[ClassificationTask, int, int]:
    """The task, the rows that a slot's full batch sends through the tower, and the tokens of a row."""
    template = config.template or pixels.template
    captions = template if config.caption == "dataset" else PLAIN_TEMPLATE
    batches = _PixelBatches(pixels, transform)
    image_stem, text_stem = moved_stem(clip.image_stem, device), moved_stem(clip.text_stem, device)
    prompts = tuple(
        _prompts(clip, text_stem, class_prompts(pixels.class_names, t), device, dtype) for t in (captions, template)
    )
    image, text = (replace(tower.to(device, dtype), backend=config.backend) for tower in (clip.image, clip.text))
    if config.encoder == "text":
        features = frozen_image_features(image, image_stem, batches)
        task = TextTask(text, (prompts[0], prompts[1]), features, clip.logit_scale)
        return task, len(pixels.class_names), prompts[0].tokens.shape[1]
    classes = (frozen_text_features(text, prompts[0]), frozen_text_features(text, prompts[1]))
    resident = int(_memory(device) * RESIDENT_SHARE[device.type])
    return (
        ImageTask(image, image_stem, batches, classes, clip.logit_scale, resident),
        config.batch_size,
        len(clip.image_stem.positions),
    )


def _prompts(clip: Clip, stem: TextStem, captions: list[str], device: torch.device, dtype: torch.dtype) -> Prompts:
    with torch.no_grad():
        tokens, index = stem(clip.tokenize(captions).to(device))
    return Prompts(tokens.to(dtype), index)


def moved_stem(stem: Stem, device: torch.device) -> Stem:
    """The same stem on another device."""
    moved: dict[str, Any] = {}
    for name, value in vars(stem).items():
        if isinstance(value, Tensor):
            moved[name] = value.to(device)
        elif isinstance(value, Norm):
            moved[name] = Norm(value.weight.to(device), value.bias.to(device), value.eps)
    return replace(stem, **moved)


def _hyperparameters(config: TrainConfig, bank: AdapterBank) -> Hyperparameters:
    def everywhere(value: float | None) -> Tensor:
        return torch.full((bank.slots,), float(value or 0.0), device=bank.device)

    return Hyperparameters(
        lr=everywhere(config.lr),
        gate_lr=everywhere(config.gate_lr),
        xi=everywhere(config.xi),
        alpha=everywhere(config.alpha),
        clip_norm=config.clip_norm or 0.0,
        threshold=config.threshold or "soft",
        weight_decay=config.weight_decay,
    )


def _micro_batch(tower: Tower, tokens: int, dtype: torch.dtype, device: torch.device, least: int) -> int:
    """Rows a view that fit the share of memory meant for activations; at least one slot's."""
    shape = tower.shape
    row = ACTIVATIONS_PER_WIDTH * GRAPHS * shape.layers * shape.width * tokens * dtype.itemsize
    return max(least, int(_memory(device) * ACTIVATION_SHARE[device.type]) // row)


def _memory(device: torch.device) -> int:
    """Bytes of the device's memory, whole; not what is free now, so that a continued run is cut as it was."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
