"""The optimizer of the bank: AdamW or Adam on one branch of the active slots, every slot with its own learning rate.

One call clips the gradient of A and B by the slot's own total norm (gates are never clipped), steps A, B and gate, and
applies the threshold to the gate. The arithmetic is `kernels/adamw.py`, and as Triton kernels `adamw_triton.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from fastdlp.adapters.bank import BranchState
from fastdlp.kernels.adamw import Settings, Stack, adamw_reference, clip_rows

MAX_ENTRIES = 1 << 22  # of a row, stepped at once; temporaries of a whole encoder would double its memory


@dataclass(frozen=True)
class Hyperparameters:
    """Per-slot vectors [slots] fp32, which may differ between federations, and values that all slots share."""

    lr: Tensor
    gate_lr: Tensor
    xi: Tensor  # threshold of the gate, not scaled by the learning rate
    alpha: Tensor  # weight of the distillation loss in the local step
    clip_norm: float = 0.0  # 0: no clipping
    threshold: str = "soft"
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    optimizer: str = "adamw"  # "adam": weight decay is added to the gradient (coupled)


def update(
    state: BranchState,
    slots: Tensor,
    grads: tuple[Tensor, Tensor],
    hyper: Hyperparameters,
    backend: str = "torch",
) -> None:
    """One optimizer step on the rows `slots` [n] of a branch, in place.

    Args:
        state: the branch in the bank.
        slots: [n] int64 row numbers, each at most once.
        grads: gradients of weights [n, D] and gates [n, Q], fp32; large ones are clipped in place.
        hyper: per-slot vectors over all slots of the bank.
        backend: "torch" or "triton", already resolved.
    """
    weights = Stack(state.weights, state.weights_m, state.weights_v, hyper.lr, grads[0])
    gates = Stack(state.gates, state.gates_m, state.gates_v, hyper.gate_lr, grads[1])
    settings = Settings(hyper.clip_norm, hyper.threshold, hyper.weight_decay, hyper.betas, hyper.eps)
    adamw = adamw_reference if backend == "torch" else _fused()
    coupled = hyper.optimizer == "adam" and hyper.weight_decay > 0
    large = grads[0].shape[1] > MAX_ENTRIES and backend == "torch"  # the fused kernels need no temporaries
    if not (coupled or large):
        adamw(weights, gates, slots, state.steps, hyper.xi, settings)
        return
    # Clipped before the decay is added, as in torch; then in blocks of columns.
    if settings.clip_norm:
        weights = replace(weights, grads=clip_rows(weights.grads, settings.clip_norm, in_place=large))
        settings = replace(settings, clip_norm=0.0)
    if coupled:
        settings = replace(settings, weight_decay=0.0)
    width = MAX_ENTRIES if large else grads[0].shape[1]
    before = state.steps.clone()
    for start in range(0, grads[0].shape[1], width):
        last = start + width >= grads[0].shape[1]
        stacks = [_columns(weights, slice(start, start + width)), _columns(gates, slice(None) if last else slice(0))]
        if coupled:
            stacks = [_decayed(stack, slots, hyper.weight_decay) for stack in stacks]
        adamw(stacks[0], stacks[1], slots, state.steps if last else before.clone(), hyper.xi, settings)


def _fused() -> Callable[..., None]:
    """Imported where it is used, so that a machine without Triton works."""
    from fastdlp.kernels.adamw_triton import adamw_fused

    return adamw_fused


def _columns(stack: Stack, cut: slice) -> Stack:
    """Columns of a stack."""
    return Stack(stack.params[:, cut], stack.m[:, cut], stack.v[:, cut], stack.lr, stack.grads[:, cut])


def _decayed(stack: Stack, slots: Tensor, decay: float) -> Stack:
    """Adam's weight decay: added to the gradients."""
    return replace(stack, grads=stack.grads.add(stack.params.index_select(0, slots), alpha=decay))
