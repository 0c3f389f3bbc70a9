"""The activations of CLIP's MLPs, by the names that open_clip's configurations give them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class _QuickGELU(torch.autograd.Function):
    """x · sigmoid(1.702 x), keeping 1.702 x alone for the backward."""

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


class Kept(NamedTuple):
    """An activation by what a hand-written backward keeps of its argument u: one tensor, in u's own memory."""

    keep: Callable[[Tensor], Tensor]  # u, which is written over → what is kept
    value: Callable[[Tensor], Tensor]  # kept → φ(u)
    backward: Callable[[Tensor, Tensor], Tensor]  # dY, kept → dY · φ'(u)


KEPT: dict[str, Kept] = {
    "none": Kept(lambda u: u, lambda u: u, lambda dy, u: dy),
    "quick_gelu": Kept(lambda u: u.mul_(1.702), _quick_gelu, torch.ops.aten.silu_backward),
    "gelu": Kept(lambda u: u, F.gelu, torch.ops.aten.gelu_backward),
    "gelu_tanh": Kept(lambda u: u, ACTIVATIONS["gelu_tanh"], partial(torch.ops.aten.gelu_backward, approximate="tanh")),
}
