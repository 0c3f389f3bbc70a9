"""What both sides of a benchmark compute on, so that one setup serves every form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdlp.clip import Clip, load_clip

CLASSES = 37  # as many as Pets
ALPHA = 0.1
LR = 1e-5


@dataclass(frozen=True)
class Problem:
    """What both sides compute on: images [batch, 3, S, S] and class features [K, d], fp32, and labels [batch]."""

    clip: Clip
    pixels: Tensor
    text: Tensor
    labels: Tensor


def make_problem(model: str, batch: int, seed: int = 0) -> Problem:
    """Random weights, images and class features: none of them changes the speed."""
    clip = load_clip(model, "none", seed)
    generator = torch.Generator().manual_seed(seed)
    size = clip.transform.size
    pixels = torch.randn(batch, 3, size, size, generator=generator)
    text = F.normalize(torch.randn(CLASSES, clip.image.shape.embed, generator=generator), dim=-1)
    return Problem(clip, pixels, text, torch.randint(CLASSES, (batch,), generator=generator))
