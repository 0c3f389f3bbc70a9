"""A frozen linear with its norm and activation, and its products x Wᵀ + b and dX = dY W by the faster library.

On a CPU torch computes fp32 matrix products with MKL, which on AMD processors runs at half of oneDNN's speed (205
against 440 GFLOP/s for [1600, 768] by [768, 3072] on two cores of an EPYC with AVX-512, torch 2.15). bf16 uses oneDNN,
but every call reorders the weight to its blocked layout. A frozen weight does not change, so here it is reordered once
for each direction, at its first product, and cached as long as the weight lives: fp32 14.8 ms against 34.5, bf16 7.2
against 7.6, for the weight's bytes once more in each direction. oneDNN sums every entry in one order for any number of
rows and threads, so results do not depend on the batching. On a GPU the products are `F.linear`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

ONEDNN = torch.backends.mkldnn.is_available()  # at import, because torch.compile cannot trace the call
BF16 = ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()
ROWS = 1600  # a hint to choose the layout, which works for any number of rows


@dataclass(frozen=True)
class Norm:
    """Frozen LayerNorm: weight and bias [width]."""

    weight: Tensor
    bias: Tensor
    eps: float


@dataclass(frozen=True)
class FrozenLinear:
    """φ(norm(x) Wᵀ + b), all of it frozen.

    weight: [N, K]; bias: [N] or None; norm: a LayerNorm of width K applied to x, or None; activation: φ, one of
    `activation.ACTIVATIONS`.
    """

    weight: Tensor
    bias: Tensor | None = None
    norm: Norm | None = None
    activation: str = "none"


# Frozen weight → (its version, blocked W, blocked Wᵀ), each reordered at first use.
_blocked: WeakIdKeyDictionary = WeakIdKeyDictionary()


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b: x [M, K], weight [N, K], bias [N] or None → [M, N], contiguous, in the dtype of x."""
    return product(x, _layout(weight, 0), bias) if by_onednn(x) else F.linear(x, weight, bias)


def frozen_linear_backward(dy: Tensor, weight: Tensor) -> Tensor:
    """dX = dY W: dy [M, N], weight [N, K] → [M, K]."""
    return product(dy, _layout(weight, 1)) if by_onednn(dy) else dy @ weight


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b by oneDNN, for a weight [N, K] of any layout; only if `by_onednn`."""
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")


def by_onednn(x: Tensor) -> bool:
    """Whether oneDNN computes the products of x."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or not len(x):  # a compiler selects its own
        return False
    return (x.dtype == torch.float32 and ONEDNN) or (x.dtype == torch.bfloat16 and BF16)


def _layout(weight: Tensor, direction: int) -> Tensor:
    """The weight in oneDNN's blocked layout: direction 0 for x Wᵀ, 1 for dY W."""
    if weight.is_inference():  # has no version counter
        return weight if direction == 0 else weight.T
    cached = _blocked.get(weight)
    if cached is None or cached[0] != weight._version:
        cached = _blocked[weight] = [weight._version, None, None]
    if cached[1 + direction] is None:
        plain = weight.detach() if direction == 0 else weight.detach().T
        cached[1 + direction] = torch.ops.mkldnn._reorder_linear_weight(plain.contiguous(), ROWS)
    return cached[1 + direction]
