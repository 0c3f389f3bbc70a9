"""The optimiser of the bank: AdamW on one branch of the active slots, every slot with hyperparameters of its own.

One call clips the gradient of A and B by the slot's own total norm (gates are never clipped), steps A, B and gate, and
puts the gate through its threshold. The arithmetic, in two forms, is `kernels/adamw.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fastdlp.bank import BranchState
from fastdlp.kernels.adamw import Settings, Stack, adamw_fused, adamw_reference


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


def update(
    state: BranchState,
    slots: Tensor,
    grads: tuple[Tensor, Tensor],
    hyper: Hyperparameters,
    backend: str = "torch",
) -> None:
    """One optimiser step on the rows `slots` [n] of a branch, in place.

    Args:
        state: the branch in the bank.
        slots: [n] int64 row numbers, each at most once.
        grads: gradients of weights [n, D] and gates [n, Q], fp32.
        hyper: per-slot vectors over all slots of the bank.
        backend: "torch" or "triton", already resolved.
    """
    weights = Stack(state.weights, state.weights_m, state.weights_v, hyper.lr, grads[0])
    gates = Stack(state.gates, state.gates_m, state.gates_v, hyper.gate_lr, grads[1])
    settings = Settings(hyper.clip_norm, hyper.threshold, hyper.weight_decay, hyper.betas, hyper.eps)
    adamw = {"torch": adamw_reference, "triton": adamw_fused}[backend]
    adamw(weights, gates, slots, state.steps, hyper.xi, settings)
