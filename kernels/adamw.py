"""AdamW over rows of stacked parameters: every row with its own learning rate, step count, clip norm and threshold.

Two stacks are stepped together: the weights, whose gradients are clipped by each row's own 2-norm, and their gates,
which are not clipped but thresholded after the step. For row i of the gradients, which belongs to slot s = slots[i]:

    g ← g · min(1, clip_norm / (‖g‖ + 1e-6))                      weights only, and only with a clip norm
    m ← m + (1 − β₁)(g − m),   v ← β₂ v + (1 − β₂) g²
    p ← p (1 − lr_s · decay) − lr_s / (1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + eps)      t = steps[s], this one included
    p ← T_ξ(p)                                                    gates only

`adamw_reference` is the arithmetic of `torch.optim.AdamW` and `torch.nn.utils.clip_grad_norm_` as torch operations over
whole rows. `adamw_triton.adamw_fused`, with the same signature, is one launch for weights and gates after a small one
that counts the steps and computes the bias corrections in fp64; clipping takes another for the norms. Counting in the
launch that reads the steps would be a race, and atomics for the norms would not be deterministic.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdlp.kernels.pruning import THRESHOLDS


@dataclass(frozen=True)
class Stack:
    """Parameters of all slots with their moments, and the gradients of the rows to be stepped; fp32."""

    params: Tensor  # [slots, D]
    m: Tensor  # [slots, D]
    v: Tensor  # [slots, D]
    lr: Tensor  # [slots]
    grads: Tensor  # [n, D]


@dataclass(frozen=True)
class Settings:
    """Hyperparameters common to all rows."""

    clip_norm: float  # 0: no clipping
    threshold: str  # "soft" or "reference"
    weight_decay: float
    betas: tuple[float, float]
    eps: float


def adamw_reference(weights: Stack, gates: Stack, slots: Tensor, steps: Tensor, xi: Tensor, settings: Settings) -> None:
    """One step on the rows `slots` of both stacks, in place.

    Args:
        weights: the stack that is clipped, [slots, D].
        gates: the stack that is thresholded, [slots, Q]; Q may be 0.
        slots: [n] int64 row numbers, each at most once.
        steps: [slots] int64, steps done; incremented in place.
        xi: [slots] fp32 thresholds, not scaled by the learning rate.
    """
    weight_grads = weights.grads
    if settings.clip_norm > 0:
        weight_grads = clip_rows(weight_grads, settings.clip_norm)
    t = steps[slots] + 1
    steps.index_copy_(0, slots, t)
    _adamw(weights, weight_grads, slots, t, settings)
    if gates.grads.shape[1]:
        p = _adamw(gates, gates.grads, slots, t, settings)
        gates.params.index_copy_(0, slots, THRESHOLDS[settings.threshold](p, xi[slots, None]))


def clip_rows(grads: Tensor, max_norm: float, in_place: bool = False) -> Tensor:
    """Scale every row [D] whose 2-norm exceeds `max_norm` down to it (clip_grad_norm_, row by row)."""
    norms = torch.linalg.vector_norm(grads, dim=1, keepdim=True)
    scale = (max_norm / (norms + 1e-6)).clamp(max=1.0)
    return grads.mul_(scale) if in_place else grads * scale


def _adamw(stack: Stack, grads: Tensor, slots: Tensor, steps: Tensor, settings: Settings) -> Tensor:
    """The rows' new parameters [n, D], written to the stack as well; `steps` [n] of the rows."""
    beta1, beta2 = settings.betas
    new_m = stack.m.index_select(0, slots).lerp_(grads, 1 - beta1)
    new_v = stack.v.index_select(0, slots).mul_(beta2).addcmul_(grads, grads, value=1 - beta2)
    stack.m.index_copy_(0, slots, new_m)
    stack.v.index_copy_(0, slots, new_v)
    # Bias corrections in fp64: 1 - 0.999^t loses half its digits in fp32 at small t.
    t, lr = steps.double(), stack.lr[slots]
    step_size = (lr.double() / (1 - beta1**t)).float()[:, None]
    root_correction = (1 - beta2**t).sqrt().float()[:, None]
    p = stack.params.index_select(0, slots)
    if settings.weight_decay:
        p.mul_(1 - lr[:, None] * settings.weight_decay)
    p.sub_(step_size * (new_m / (new_v.sqrt_().div_(root_correction).add_(settings.eps))))
    stack.params.index_copy_(0, slots, p)
    return p
