"""Awkward operands for the kernels' tests, and how close to fp64 a result has to be."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdlp.kernels import dual_lora as operator
from fastdlp.kernels.frozen import FrozenLinear, Norm
from fastdlp.kernels.groups import RowGroups
from tests.pairs import cases

GROUPS = {
    "long": RowGroups((150,)),
    "ragged": RowGroups((0, 0, 5, 1, 0, 0, 0, 33, 0, 61, 0)),
    "views": RowGroups((20, 0, 1, 30), views=2),
    "single rows": RowGroups((1,) * 4 + (0,) * 2 + (1,) * 3),
    "more slots than rows": RowGroups((0, 0, 0, 1, 0, 0), views=2),
    "nobody": RowGroups((0, 0), views=2),
}
# For one launcher; "more slots than rows" joins what "views" and "single rows" have, and is for the whole operator.
LAUNCHED = [name for name in GROUPS if name != "more slots than rows"]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32}
# Triton's interpreter has no bf16 products and no TF32.
PRECISIONS = tuple(DTYPES) if torch.cuda.is_available() else ("fp32", "fp16")

PHI: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda u: u,
    "quick_gelu": lambda u: u * (1 + torch.tanh(0.851 * u)) / 2,  # σ(z) = (1 + tanh(z / 2)) / 2
    "gelu": lambda u: u * (1 + torch.erf(u / math.sqrt(2))) / 2,
    "gelu_tanh": lambda u: u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3))) / 2,
}


def kernel_cases(groups: Iterable[str] = LAUNCHED, **factors: Iterable[Any]) -> pytest.MarkDecorator:
    """Pairwise cases over precision and row groups (a `name`), which every kernel has, and the factors."""
    return cases(precision=PRECISIONS, name=groups, **factors)


class Draw:
    """Normal numbers from a seed, rounded to a dtype, on a device."""

    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        numbers = torch.randn(*shape, generator=self.generator, dtype=torch.float64) * scale
        return numbers.to(self.device, dtype or self.dtype)


def _by_parts(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The operator with the parts of its frozen linear as arguments of their own, for tests that vary one of them."""

    def call(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        c: Tensor,
        groups: RowGroups,
        *,
        norm: Norm | None = None,
        activation: str = "none",
        **options: Any,
    ) -> Tensor:
        return function(x, FrozenLinear(weight, bias, norm, activation), A, B, c, groups, **options)

    return call


dual_lora = _by_parts(operator.dual_lora)
dual_lora_reference = _by_parts(operator.dual_lora_reference)


def operands(
    draw: Draw,
    groups: RowGroups,
    parts: int,
    rank: int,
    width: int,
    out: int,
    bias: bool = True,
    norm: bool = False,
    residual: bool = False,
    **others: Any,
) -> dict[str, Any]:
    """Keyword arguments of `dual_lora`; every term of the sum is of the size of one, and adapters are fp32."""
    slots, fp32 = len(groups.sizes), torch.float32
    return {
        "x": draw(groups.rows, width),
        "weight": draw(parts * out, width, scale=width**-0.5),
        "bias": draw(parts * out) if bias else None,
        "A": draw(slots, parts, rank, width, scale=width**-0.5, dtype=fp32),
        "B": draw(slots, parts, out, rank, scale=rank**-0.5, dtype=fp32),
        "c": draw(slots, groups.views, parts, rank, dtype=fp32),
        "groups": groups,
        "norm": Norm(draw(width), draw(width), 1e-5) if norm else None,
        "residual": draw(groups.rows, parts * out) if residual else None,
        **others,
    }


def in_fp64(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same numbers in fp64 on the CPU."""
    return {name: _exact(value) for name, value in arguments.items()}


def _exact(value: Any) -> Any:
    if isinstance(value, Norm):
        return Norm(exact(value.weight), exact(value.bias), value.eps)
    return exact(value) if isinstance(value, Tensor) else value


def exact(tensor: Tensor) -> Tensor:
    return tensor.detach().double().cpu()


def values_and_gradients(
    function: Callable[..., Tensor], arguments: dict[str, Any], dy: Tensor, **options: Any
) -> dict[str, Tensor]:
    """y and the gradient of everything that has one, by name."""
    names = [n for n in ("x", "A", "B", "c", "residual") if arguments.get(n) is not None]
    leaves = {n: arguments[n].detach().requires_grad_() for n in names}
    y = function(**arguments | leaves, **options)
    gradients = torch.autograd.grad(y, list(leaves.values()), dy, allow_unused=True)
    found = {"y": y.detach()}
    for (name, leaf), gradient in zip(leaves.items(), gradients):  # autograd has none where a slot has no rows
        found[f"d{name}"] = torch.zeros_like(leaf) if gradient is None else gradient
    return found


def assert_close(ours: Tensor, reference: Tensor, tolerance: tuple[float, float], what: str) -> None:
    """Largest error over largest entry, and RMS error over RMS."""
    assert ours.shape == reference.shape, f"{what}: {tuple(ours.shape)}, expected {tuple(reference.shape)}"
    if not reference.numel():
        return
    error, reference = exact(ours) - exact(reference), exact(reference)
    largest = float(error.abs().max() / reference.abs().max().clamp(min=1e-30))
    rms = float(error.square().mean().sqrt() / reference.square().mean().sqrt().clamp(min=1e-30))
    assert largest <= tolerance[0], f"{what}: largest error {largest:.1e} > {tolerance[0]:.1e}"
    if reference.numel() > 1:  # of one entry the RMS is its largest error
        assert rms <= tolerance[1], f"{what}: RMS error {rms:.1e} > {tolerance[1]:.1e}"
