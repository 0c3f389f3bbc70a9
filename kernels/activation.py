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
        return F.silu(x * 1.702).div_(1.702)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grads[0], x * 1.702)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "quick_gelu": _QuickGELU.apply,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}

# φ'(u) [...] of each, for a backward that keeps the slope and not u.
SLOPES: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": lambda u: torch.ops.aten.silu_backward(torch.ones_like(u), u * 1.702),
    "gelu": lambda u: torch.ops.aten.gelu_backward(torch.ones_like(u), u),
    "gelu_tanh": lambda u: torch.ops.aten.gelu_backward(torch.ones_like(u), u, approximate="tanh"),
}
