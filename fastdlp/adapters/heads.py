"""Trained modules on the encoder's output f [.., d] (joint space, before the L2 norm), one per slot.

attention   FedCLIP's adapter: f ⊙ softmax(fc2(tanh(fc1(f)))), both linears d × d, initialized to the identity.
classifier  FLoRA's FedLC and FedVM-LC: logits = f Wᵀ + b instead of similarities with prompts.

Tensors: fc1/weight [d, d], fc1/bias [d], fc2/weight [d, d], fc2/bias [d]; classifier/weight [K, d] and /bias [K].
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

HEADS = ("attention", "classifier")


def head_shapes(head: str, embed: int, classes: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a head's tensors; for d = 512 an attention has 525,312 entries (the papers' 0.525 M)."""
    outputs = {"fc1": embed, "fc2": embed} if head == "attention" else {"classifier": classes}
    shapes: dict[str, tuple[int, ...]] = {}
    for linear, width in outputs.items():
        shapes |= {f"{linear}/weight": (width, embed), f"{linear}/bias": (width,)}
    return shapes


def init_head(head: str, embed: int, classes: int, rng: np.random.Generator) -> dict[str, Tensor]:
    """Initial tensors: identities for attention; as torch's Linear, uniform in ±1/sqrt(d), for a classifier."""
    shapes = head_shapes(head, embed, classes)
    if head == "attention":
        return {name: torch.eye(embed) if len(shape) == 2 else torch.zeros(shape) for name, shape in shapes.items()}
    bound = 1 / math.sqrt(embed)
    return {name: torch.from_numpy(rng.uniform(-bound, bound, shape)).float() for name, shape in shapes.items()}


def attend(features: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """[n, S, d] → [n, S, d]: features weighted elementwise by each slot's attention."""
    inner = _linear(features, tensors["fc1/weight"], tensors["fc1/bias"]).tanh()
    return features * _linear(inner, tensors["fc2/weight"], tensors["fc2/bias"]).softmax(dim=-1)


def classify(features: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """[n, S, d] → logits [n, S, K] of each slot's classifier."""
    return _linear(features, tensors["classifier/weight"], tensors["classifier/bias"])


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))
