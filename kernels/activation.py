"""The activations of CLIP's MLPs, by the names that open_clip's configurations give them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _QuickGELU(torch.autograd.Function):
    """x · sigmoid(1.702 x), keeping x alone for the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.silu(x * 1.702, inplace=True).div_(1.702)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return _quick_gelu_backward(grads[0], x)


def _quick_gelu_backward(dy: Tensor, u: Tensor) -> Tensor:
    scaled = u * 1.702
    # In place: a fresh buffer of this size costs as much as the arithmetic on a CPU.
    return torch.ops.aten.silu_backward.grad_input(dy, scaled, grad_input=scaled)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "quick_gelu": _QuickGELU.apply,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}

# dY · φ'(u) of each, from dY and u.
BACKWARDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "none": lambda dy, u: dy,
    "quick_gelu": _quick_gelu_backward,
    "gelu": lambda dy, u: torch.ops.aten.gelu_backward(dy, u),
    "gelu_tanh": lambda dy, u: torch.ops.aten.gelu_backward(dy, u, approximate="tanh"),
}
