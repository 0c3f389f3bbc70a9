"""The classification task with adapters in one tower of CLIP.

`ImageTask` adapts the image tower: rows are images, the class prompts' features are constants.
`TextTask` adapts the text tower: rows are class prompts (every slot runs all of them), the images'
features are constants. Both compute the frozen tower and the frozen stem once per run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fastdlp.adapters.bank import Adapters
from fastdlp.clip.stem import ImageStem
from fastdlp.clip.tower import Tower
from fastdlp.engine.images import FROZEN_BATCH, PixelSource, TokenSource, stage
from fastdlp.engine.schedule import Inputs, Shape
from fastdlp.kernels.groups import RowGroups, device_table
from fastdlp.methods.losses import Outputs


@dataclass(frozen=True)
class Prompts:
    """The class prompts after the text stem: tokens [K, L, width] and pooled positions [K]."""

    tokens: Tensor
    index: Tensor


@dataclass(frozen=True)
class Samples:
    """The samples of a forward; S is the largest number of samples of a slot."""

    ids: Tensor  # [n, S] int64, padded with the slot's first
    labels: Tensor  # [n, S] int64
    mask: Tensor  # [n, S] bool, False for padding
    sizes: tuple[int, ...]  # samples of each slot that go through the tower; the true number, or S for all
    staged: Tensor | None = None  # result of `ClassificationTask.stage` for the ids, padding included

    @staticmethod
    def unpack(buffer: Tensor, shape: Shape, labels: Tensor, staged: Tensor | None) -> tuple[Tensor, Samples]:
        """The bank's rows [n] and the samples of a step of a `StepPlan`; labels [samples] int64 on the same device."""
        inputs = Inputs.unpack(buffer, shape)
        mask = _arange(shape.samples, buffer.device) < inputs.counts[:, None]
        return inputs.slots, Samples(inputs.ids, labels[inputs.ids], mask, shape.sizes, staged)


@device_table
def _arange(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, device=device)


class ClassificationTask(Protocol):
    """The model as the engine runs it."""

    scoring_batch: int  # samples of one slot in one scoring pass

    @property
    def stage(self) -> Callable[[np.ndarray], Tensor] | None:
        """Copies the images of samples [n · S] to the device, called one step ahead; None if all are there."""

    def rows(self, samples: int) -> int:
        """Rows that one slot sends through the tower per view for this many samples."""

    def forward(self, samples: Samples, views: int, adapters: Adapters | None, scoring: bool = False) -> list[Outputs]:
        """One `Outputs` per view. Without adapters: the frozen model. `scoring` takes the scoring prompts."""


class ImageTask:
    """Adapters in the image tower.

    Args:
        tower: frozen image tower on its device and in its dtype.
        tokens: of all samples after the frozen stem, same device and dtype.
        text: normalized class features [K, d] of the training and of the scoring prompts, fp32.
        scale: exp(logit_scale).
    """

    scoring_batch = 128

    def __init__(
        self,
        tower: Tower,
        tokens: TokenSource,
        text: tuple[Tensor, Tensor],
        scale: float,
    ) -> None:
        self.tower, self.tokens, self.text, self.scale = tower, tokens, text, scale

    def rows(self, samples: int) -> int:
        return samples

    @property
    def stage(self) -> Callable[[np.ndarray], Tensor] | None:
        return self.tokens.stage

    def forward(self, samples: Samples, views: int, adapters: Adapters | None, scoring: bool = False) -> list[Outputs]:
        groups = RowGroups(samples.sizes, views)
        n, most = samples.ids.shape
        even = set(samples.sizes) == {most}  # no padding: rows are the samples repeated per view
        taken, placed = (None, []) if even else _places(groups, most, samples.ids.device)
        ids = samples.ids.flatten()
        if samples.staged is None:
            rows = self.tokens(_taken(ids, taken, n, views), None)
        else:
            rows = _taken(self.tokens(ids, samples.staged), taken, n, views)
        features = self.tower.features(rows, groups, adapters, normalize=True)
        by_view = features.view(n, views, most, -1).unbind(1) if even else [features[where] for where in placed]
        return [Outputs(own, self.text[scoring], samples.labels, samples.mask, self.scale) for own in by_view]


def _taken(places: Tensor, taken: Tensor | None, slots: int, views: int) -> Tensor:
    """[n · S, ...] → [rows, ...]: the rows that `taken` indexes, or without padding all, repeated per view."""
    if taken is not None:
        return places.index_select(0, taken)
    if views == 1:
        return places
    return places.unflatten(0, (slots, 1, -1)).expand(slots, views, *[-1] * places.ndim).flatten(0, 2)


@device_table
def _places(groups: RowGroups, samples: int, device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """Index maps between samples padded to [n, S] and rows sorted by group.

    Returns:
        [rows] the padded position of every row, and per view the row of every padded position, [n, S]; padding refers
        to the slot's own first row.
    """
    sizes, views = np.array(groups.sizes), groups.views
    within = np.arange(samples)
    taken = [slot * samples + within[:size] for slot, size in enumerate(sizes) for _ in range(views)]
    first = views * (np.cumsum(sizes) - sizes)[:, None] + np.where(within < sizes[:, None], within, 0)
    placed = [torch.from_numpy(first + view * sizes[:, None]).to(device) for view in range(views)]
    return torch.from_numpy(np.concatenate(taken)).to(device), placed


class TextTask:
    """Adapters in the text tower.

    Args:
        tower: frozen text tower on its device and in its dtype.
        prompts: the class prompts after the stem, for training and for scoring.
        images: normalized image features [samples, d] of the frozen image tower, fp32.
        scale: exp(logit_scale).
    """

    stage = None
    scoring_batch = 1 << 20  # the tower runs once per slot, whatever the number of samples

    def __init__(self, tower: Tower, prompts: tuple[Prompts, Prompts], images: Tensor, scale: float) -> None:
        self.tower, self.prompts, self.images, self.scale = tower, prompts, images, scale

    def rows(self, samples: int) -> int:
        return len(self.prompts[0].tokens)

    def forward(self, samples: Samples, views: int, adapters: Adapters | None, scoring: bool = False) -> list[Outputs]:
        prompts = self.prompts[scoring]
        n, classes = len(samples.sizes), len(prompts.tokens)
        if adapters is None:  # the frozen model is the same for every slot
            text = self.tower.features(prompts.tokens, index=prompts.index, normalize=True)
            text = text[None, None].expand(n, views, -1, -1)
        else:
            tokens, groups = prompts.tokens.repeat(n * views, 1, 1), RowGroups((classes,) * n, views)
            index = prompts.index.repeat(n * views)
            features = self.tower.features(tokens, groups, adapters, index, normalize=True)
            text = features.view(n, views, classes, -1)
        image = self.images[samples.ids]
        return [Outputs(image, text[:, v], samples.labels, samples.mask, self.scale) for v in range(views)]


@torch.no_grad()
def frozen_image_features(
    tower: Tower, stem: ImageStem, pixels: PixelSource, progress: Callable[[int], None] | None = None
) -> Tensor:
    """Features [samples, d] fp32 of the frozen image tower, not normalized, on the tower's device."""
    weight = tower.proj.weight
    features = []
    for part in np.array_split(np.arange(len(pixels)), max(1, -(-len(pixels) // FROZEN_BATCH))):
        tokens = stem(pixels.normalize(stage(pixels, weight.device, part))).to(weight.dtype)
        features.append(tower.features(tokens))
        if progress:
            progress(len(part))
    return torch.cat(features)


@torch.no_grad()
def frozen_text_features(tower: Tower, prompts: Prompts) -> Tensor:
    """Class features [K, d] fp32 of the frozen text tower, not normalized."""
    return tower.features(prompts.tokens, index=prompts.index)
