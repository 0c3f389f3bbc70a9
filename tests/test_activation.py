"""CLIP's activations against their formulas."""

from __future__ import annotations

import pytest
import torch

from fastdlp.kernels.activation import ACTIVATIONS, RECOMPUTABLE
from tests.awkward import PHI

POINTS = torch.cat([torch.linspace(-12, 12, 97), torch.tensor([-1000.0, -88.0, 0.0, 88.0, 1000.0])]).double()
TOLERANCE = {torch.float64: 1e-14, torch.float32: 5e-7, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def test_the_names() -> None:
    assert ACTIVATIONS.keys() == PHI.keys()
    assert RECOMPUTABLE.keys() == PHI.keys()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", PHI)
def test_value_and_slope(name: str, dtype: torch.dtype) -> None:
    """To the dtype's rounding of max(1, |u|), from −1000 to 1000."""
    u = POINTS.to(dtype).requires_grad_()
    exact = u.detach().double().requires_grad_()
    y, expected = ACTIVATIONS[name](u), PHI[name](exact)
    (slope,) = torch.autograd.grad(y, u, torch.ones_like(y))
    (expected_slope,) = torch.autograd.grad(expected, exact, torch.ones_like(expected))
    allowed = TOLERANCE[dtype] * exact.detach().abs().clamp(min=1)
    assert y.dtype == slope.dtype == dtype
    assert ((y.double() - expected).abs() <= allowed).all()
    assert ((slope.double() - expected_slope).abs() <= allowed).all()
    phi = RECOMPUTABLE[name]
    saved = phi.saved(u.detach().clone())
    value, slope = phi.value(saved), phi.backward(torch.ones_like(saved), saved)
    assert value.dtype == slope.dtype == dtype
    assert ((value.double() - expected).abs() <= allowed).all()
    assert ((slope.double() - expected_slope).abs() <= allowed).all()


@pytest.mark.parametrize("name", PHI)
def test_by_finite_differences(name: str) -> None:
    u = torch.linspace(-4, 4, 33, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(ACTIVATIONS[name], (u,))


@pytest.mark.parametrize("name", PHI)
def test_leaves_its_argument_alone(name: str) -> None:
    u = POINTS.clone()
    ACTIVATIONS[name](u)
    assert torch.equal(u, POINTS)
