"""Build the task of a method's branches, with their shapes, initial values and the rows of a step.

LoRA in a tower: `ImageTask` or `TextTask`. Heads on frozen features: `FrozenTask`. A whole encoder: `FullTask`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdlp.adapters.branches import AnyBranch, Site, Tensors, tower_sites
from fastdlp.adapters.heads import HEADS, head_shapes, init_head
from fastdlp.adapters.layout import Shapes
from fastdlp.clip.load import Clip, class_prompts
from fastdlp.clip.stem import ImageStem, TextStem, map_tensors
from fastdlp.config import TrainConfig
from fastdlp.data.cache import Pixels
from fastdlp.data.transform import Transform
from fastdlp.engine.device import DTYPES, memory_of
from fastdlp.engine.frozen_task import FrozenTask
from fastdlp.engine.full_task import FullTask, trains
from fastdlp.engine.images import TokenSource
from fastdlp.engine.memory import rows_at_once
from fastdlp.engine.tasks import (
    ClassificationTask,
    ImageTask,
    Prompts,
    TextTask,
    frozen_image_features,
    frozen_text_features,
)
from fastdlp.errors import FastdlpError
from fastdlp.methods.base import Method
from fastdlp.selection import read_backend

PLAIN_TEMPLATE = "a photo of a {}."
# Fraction of the device's memory for resident stem tokens or pixels.
RESIDENT_FRACTION = 0.15
# fp32 copies of all trained weights in full fine-tuning: the server's, the client's, its two moments, the running
# average, the model's own; then the gradient per tensor and as a row, or a clone and its bytes while a file is written.
# Measured with ViT-B/32: 9.1 to 9.6 in fp32 and bf16.
FULL_COPIES = 10

Stem = TypeVar("Stem", ImageStem, TextStem)
Init = Callable[[np.random.Generator], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Built:
    """A task, and what the bank and the schedule derive from it."""

    task: ClassificationTask
    sites: tuple[Site, ...]  # adapted linears of LoRA branches
    shapes: dict[str, Shapes]  # of the tensors of the other branches, by branch
    inits: dict[str, Init]  # functions that draw those tensors
    micro_batch: int  # rows per view that fit the memory
    weight_bytes: int = 0  # weights, moments and gradients of full fine-tuning; 0 otherwise
    tokens: int = 0  # per row that goes through a tower with LoRA


class _PixelBatches:
    """Pixels by sample number, from the memory map."""

    def __init__(self, pixels: Pixels, transform: Transform) -> None:
        self.pixels, self.transform = pixels, transform

    def __len__(self) -> int:
        return len(self.pixels.labels)

    def __call__(self, samples: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(self.pixels.data[samples]))

    def normalize(self, pixels: Tensor) -> Tensor:
        return self.transform.normalize(pixels)


class _Frozen:
    """The frozen CLIP on its device, the data, and the prompts for training and for scoring."""

    def __init__(
        self, config: TrainConfig, clip: Clip, pixels: Pixels, transform: Transform, device: torch.device
    ) -> None:
        dtype, backend = DTYPES[config.precision], read_backend(config.backend)
        template = config.template or pixels.template
        training = template if config.caption == "dataset" else PLAIN_TEMPLATE
        captions = (class_prompts(pixels.class_names, text) for text in (training, template))
        self.ids = tuple(clip.tokenize(texts).to(device) for texts in captions)  # [K, context] each
        stem = moved_stem(clip.text_stem, device)
        with torch.no_grad():
            embedded = [stem(ids) for ids in self.ids]
        training_prompts, scoring_prompts = (Prompts(tokens.to(dtype), index) for tokens, index in embedded)
        self.prompts = training_prompts, scoring_prompts
        self.image = replace(clip.image.to(device, dtype), backend=backend)
        self.text = replace(clip.text.to(device, dtype), backend=backend)
        self.image_stem = moved_stem(clip.image_stem, device)
        self.pixels = _PixelBatches(pixels, transform)

    def images(self) -> Tensor:
        """Features [samples, d] of the frozen encoder, not normalized."""
        return frozen_image_features(self.image, self.image_stem, self.pixels)

    def classes(self) -> tuple[Tensor, Tensor]:
        """Features [K, d] of the training and of the scoring prompts, not normalized."""
        return frozen_text_features(self.text, self.prompts[0]), frozen_text_features(self.text, self.prompts[1])


def build_task(
    config: TrainConfig, method: Method, clip: Clip, pixels: Pixels, transform: Transform, device: torch.device
) -> Built:
    """The task of a resolved config.

    Raises:
        FastdlpError: full fine-tuning does not fit into the device's memory.
    """
    dtype = DTYPES[config.precision]
    frozen = _Frozen(config, clip, pixels, transform, device)
    branches = method.branches()
    modules = {module for branch in branches if isinstance(branch, Tensors) for module in branch.modules}
    classes, embed = len(pixels.class_names), clip.image.shape.embed
    parameters = {name: tuple(p.shape) for name, p in clip.net.named_parameters()}
    shapes = branch_shapes(branches, config.encoder, parameters, embed, classes)
    inits = {b.name: _init(b.modules, shapes[b.name], clip, classes) for b in branches if isinstance(b, Tensors)}
    if "encoder" in modules:
        weight_bytes = _check_memory(shapes, device)
        names = frozenset(name for name in parameters if trains(name, config.encoder))
        task: ClassificationTask = FullTask(
            clip.net.to(device),
            names,
            config.encoder,
            frozen.pixels,
            frozen.ids,  # type: ignore[arg-type]
            F.normalize(frozen.images(), dim=-1),
            _normalized(frozen.classes()),
            clip.logit_scale,
            dtype,
        )
        return Built(task, (), shapes, inits, config.batch_size, weight_bytes)
    if modules:
        task = FrozenTask(config.encoder, frozen.images(), frozen.classes(), clip.logit_scale)
        return Built(task, (), shapes, inits, len(pixels.labels))
    tower = clip.tower(config.encoder)
    if config.encoder == "text":
        task = TextTask(frozen.text, frozen.prompts, F.normalize(frozen.images(), dim=-1), clip.logit_scale)
        rows, tokens = classes, frozen.prompts[0].tokens.shape[1]
    else:
        resident = int(memory_of(device) * RESIDENT_FRACTION)
        source = TokenSource(frozen.image_stem, frozen.pixels, device, dtype, resident)
        task = ImageTask(frozen.image, source, _normalized(frozen.classes()), clip.logit_scale)
        rows, tokens = config.batch_size, len(clip.image_stem.positions)
    backend = "torch" if config.backend == "torch" else "triton"  # the larger one for a selection of both
    pools = 2 if config.cuda_graph else 1
    at_once = rows_at_once(tower.shape, tokens, tower.heads, dtype.itemsize, backend, device, rows, pools)
    return Built(task, tower_sites(tower.shape), shapes, inits, at_once, tokens=tokens)


def _normalized(classes: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return F.normalize(classes[0], dim=-1), F.normalize(classes[1], dim=-1)


def branch_shapes(
    branches: Sequence[AnyBranch], encoder: str, parameters: Shapes, embed: int, classes: int
) -> dict[str, Shapes]:
    """Shapes of the tensors of every branch that is not a LoRA.

    `parameters` are the shapes of all of the model's, `embed` is d of the joint space.
    """
    found: dict[str, Shapes] = {}
    for branch in branches:
        if isinstance(branch, Tensors):
            own = {n: s for n, s in parameters.items() if trains(n, encoder)} if "encoder" in branch.modules else {}
            for module in branch.modules:
                if module in HEADS:
                    own |= head_shapes(module, embed, classes)
            found[branch.name] = own
    return found


def _init(modules: Sequence[str], shapes: Shapes, clip: Clip, classes: int) -> Init:
    """A function that returns a branch's initial tensors: the encoder's weights, and heads drawn at random."""

    def draw(rng: np.random.Generator) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {n: p for n, p in clip.net.named_parameters() if n in shapes}
        for module in modules:
            if module in HEADS:
                found |= init_head(module, clip.image.shape.embed, classes, rng)
        return found

    return draw


def _check_memory(shapes: Mapping[str, Shapes], device: torch.device) -> int:
    """Bytes of full fine-tuning without activations. Raises FastdlpError if the device has less memory."""
    entries = sum(int(np.prod(shape)) for tensors in shapes.values() for shape in tensors.values())
    need, have = FULL_COPIES * 4 * entries, memory_of(device)
    if need > have:
        raise FastdlpError(
            f"full fine-tuning of {entries:,} parameters needs about {need / 1e9:.1f} GB beside the activations and "
            f"{device} has {have / 1e9:.1f} GB: use a smaller --model, or an adapter (--method flora)"
        )
    return need


def moved_stem(stem: Stem, device: torch.device) -> Stem:
    """The same stem on another device."""
    return map_tensors(stem, lambda tensor: tensor.to(device))
