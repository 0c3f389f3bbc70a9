"""The activations of CLIP's MLPs, by their names in open_clip's configurations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class _QuickGELU(torch.autograd.Function):
    """x · sigmoid(1.702 x), saving only 1.702 x for the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        scaled = x * 1.702
        ctx.save_for_backward(scaled)
        return _quick_gelu(scaled)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return torch.ops.aten.silu_backward(grads[0], *ctx.saved_tensors)


def _quick_gelu(scaled: Tensor) -> Tensor:
    return F.silu(scaled).div_(1.702)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "quick_gelu": _QuickGELU.apply,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


class Recomputable(NamedTuple):
    """An activation for a hand-written backward, which saves one tensor in the memory of its argument u."""

    saved: Callable[[Tensor], Tensor]  # u → what is saved, in place
    value: Callable[[Tensor], Tensor]  # saved → φ(u)
    backward: Callable[[Tensor, Tensor], Tensor]  # dY, saved → dY · φ'(u)


RECOMPUTABLE: dict[str, Recomputable] = {
    "none": Recomputable(lambda u: u, lambda u: u, lambda dy, u: dy),
    "quick_gelu": Recomputable(lambda u: u.mul_(1.702), _quick_gelu, torch.ops.aten.silu_backward),
    "gelu": Recomputable(lambda u: u, F.gelu, torch.ops.aten.gelu_backward),
    "gelu_tanh": Recomputable(
        lambda u: u, ACTIVATIONS["gelu_tanh"], partial(torch.ops.aten.gelu_backward, approximate="tanh")
    ),
}
