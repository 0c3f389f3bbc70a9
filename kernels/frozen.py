"""What is frozen: a linear with its norm and activation, and its product x Wᵀ + b and dX = dY W by the faster library.

On a CPU torch gives fp32 matrix products to MKL, which on AMD processors runs at half of oneDNN's speed (205 against
440 GFLOP/s for [1600, 768] by [768, 3072] on two cores of an EPYC with AVX-512, torch 2.15). bf16 goes to oneDNN, but
its blocked layout of the weight is made anew by every call. A frozen weight does not change, so here it is laid out
once for each direction, at its first product, and kept as long as the weight lives: fp32 14.8 ms against 34.5, bf16 7.2
against 7.6. It costs the weight's bytes once more for each direction. oneDNN sums every entry in one order whatever the
number of rows and threads, so a batch cut otherwise gives the same bits. A GPU's products are `F.linear`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

ONEDNN = torch.backends.mkldnn.is_available()  # asked here, because torch.compile cannot trace the question
BF16 = ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()
ROWS = 1600  # what the layout is chosen for; it serves any number of rows


@dataclass(frozen=True)
class Norm:
    """Frozen LayerNorm: weight and bias [width]."""

    weight: Tensor
    bias: Tensor
    eps: float


@dataclass(frozen=True)
class FrozenLinear:
    """φ(norm(x) Wᵀ + b), all of it frozen.

    weight: [N, K]; bias: [N] or None; norm: a LayerNorm of width K that x passes first, or None; activation: φ, one of
    `activation.ACTIVATIONS`.
    """

    weight: Tensor
    bias: Tensor | None = None
    norm: Norm | None = None
    activation: str = "none"


# Frozen weight → (its version, blocked W, blocked Wᵀ); either is None until it is asked for.
_blocked: WeakIdKeyDictionary = WeakIdKeyDictionary()


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b: x [M, K], weight [N, K], bias [N] or None → [M, N], contiguous, in the dtype of x."""
    return product(x, _layout(weight, 0), bias) if by_onednn(x) else F.linear(x, weight, bias)


def frozen_linear_backward(dy: Tensor, weight: Tensor) -> Tensor:
    """dX = dY W: dy [M, N], weight [N, K] → [M, K]."""
    return product(dy, _layout(weight, 1)) if by_onednn(dy) else dy @ weight


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b by oneDNN, whatever the layout of the weight [N, K]; only where `by_onednn` says so."""
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")


def by_onednn(x: Tensor) -> bool:
    """Whether products of x are oneDNN's."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or not len(x):  # a compiler picks its own
        return False
    return (x.dtype == torch.float32 and ONEDNN) or (x.dtype == torch.bfloat16 and BF16)


def _layout(weight: Tensor, direction: int) -> Tensor:
    """The weight in oneDNN's blocked layout: direction 0 for x Wᵀ, 1 for dY W."""
    if weight.is_inference():  # nobody counts what is written to it
        return weight if direction == 0 else weight.T
    kept = _blocked.get(weight)
    if kept is None or kept[0] != weight._version:
        kept = _blocked[weight] = [weight._version, None, None]
    if kept[1 + direction] is None:
        plain = weight.detach() if direction == 0 else weight.detach().T.contiguous()
        kept[1 + direction] = torch.ops.mkldnn._reorder_linear_weight(plain.contiguous(), ROWS)
    return kept[1 + direction]
