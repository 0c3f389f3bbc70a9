"""AdamW over the rows of the bank: every slot with its own learning rate, step count, clip norm and threshold.

One call updates one branch of the active slots: clip the gradient of A and B by the slot's own total norm
(gates are never clipped), AdamW on A, B and gate, then the threshold on the gate. The arithmetic is that of
`torch.optim.AdamW` and `torch.nn.utils.clip_grad_norm_`, row by row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdlp.bank import BranchState


@dataclass(frozen=True)
class Hyperparameters:
    """Per-slot vectors [slots], fp32, and what all slots share. Several federations may differ in the vectors."""

    lr: Tensor
    gate_lr: Tensor
    xi: Tensor  # threshold of the gate, not scaled by the learning rate
    alpha: Tensor  # weight of the distillation loss in the local step
    clip_norm: float = 0.0  # 0: no clipping
    threshold: str = "soft"
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


def update(state: BranchState, slots: Tensor, grads: tuple[Tensor, Tensor], hyper: Hyperparameters) -> None:
    """One optimiser step on the rows `slots` [n] of a branch, in place.

    Args:
        state: the branch in the bank.
        slots: [n] int64 row numbers, each at most once.
        grads: gradients of weights [n, D] and gates [n, Q], fp32.
        hyper: per-slot vectors over all slots of the bank.
    """
    weight_grads, gate_grads = grads
    if hyper.clip_norm > 0:
        weight_grads = clip_rows(weight_grads, hyper.clip_norm)
    steps = state.steps[slots] + 1
    state.steps.index_copy_(0, slots, steps)
    _adamw(state.weights, state.weights_m, state.weights_v, weight_grads, slots, steps, hyper.lr[slots], hyper)
    if gate_grads.shape[1]:
        gates = _adamw(state.gates, state.gates_m, state.gates_v, gate_grads, slots, steps, hyper.gate_lr[slots], hyper)
        state.gates.index_copy_(0, slots, THRESHOLDS[hyper.threshold](gates, hyper.xi[slots, None]))


def clip_rows(grads: Tensor, max_norm: float) -> Tensor:
    """Scale every row [D] whose 2-norm exceeds `max_norm` down to it (clip_grad_norm_, slot by slot)."""
    norms = torch.linalg.vector_norm(grads, dim=1, keepdim=True)
    return grads * (max_norm / (norms + 1e-6)).clamp(max=1.0)


def soft_threshold(v: Tensor, xi: Tensor) -> Tensor:
    """T_ξ(v) = sign(v) · max(|v| − ξ, 0) (SoRA; the paper's section IV)."""
    return v.sign() * (v.abs() - xi).clamp(min=0)


def reference_threshold(v: Tensor, xi: Tensor) -> Tensor:
    """What the authors' code does, in its order: shrink by ξ, then zero all below ξ. Its dead zone is 2ξ wide."""
    v = torch.where(v > xi, v - xi, v)
    v = torch.where(v < -xi, v + xi, v)
    return torch.where(v.abs() < xi, torch.zeros_like(v), v)


THRESHOLDS = {"soft": soft_threshold, "reference": reference_threshold}


def _adamw(
    params: Tensor,
    m: Tensor,
    v: Tensor,
    grads: Tensor,
    slots: Tensor,
    steps: Tensor,
    lr: Tensor,
    hyper: Hyperparameters,
) -> Tensor:
    beta1, beta2 = hyper.betas
    new_m = m.index_select(0, slots).lerp_(grads, 1 - beta1)
    new_v = v.index_select(0, slots).mul_(beta2).addcmul_(grads, grads, value=1 - beta2)
    m.index_copy_(0, slots, new_m)
    v.index_copy_(0, slots, new_v)
    # Bias corrections in fp64: 1 - 0.999^t loses half its digits in fp32 at small t.
    t = steps.double()
    step_size = (lr.double() / (1 - beta1**t)).float()[:, None]
    root_correction = (1 - beta2**t).sqrt().float()[:, None]
    p = params.index_select(0, slots)
    if hyper.weight_decay:
        p.mul_(1 - lr[:, None] * hyper.weight_decay)
    p.sub_(step_size * (new_m / (new_v.sqrt_().div_(root_correction).add_(hyper.eps))))
    params.index_copy_(0, slots, p)
    return p
