"""The operator against its written formula: outputs and every gradient, on awkward shapes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastdlp.kernels.frozen import Norm
from fastdlp.kernels.groups import RowGroups
from tests.awkward import PHI, Draw, dual_lora, dual_lora_reference, in_fp64, operands, values_and_gradients
from tests.pairs import cases

GROUPS = {
    "one": RowGroups((7,)),
    "equal": RowGroups((5, 5, 5)),
    "ragged": RowGroups((63, 5, 5, 1, 0, 31)),
    "views": RowGroups((4, 4, 1, 0, 9), views=2),
    "empty ends": RowGroups((0, 3, 0), views=2),
    "nobody": RowGroups((0, 0)),
}
# Relative to the largest entry of the reference: rounding of operands and products, no more. bf16 rounds B', P, Q
# and the result by up to 2^-9 each, and sums over a handful of rows cancel.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 5e-2}


def problem(
    groups: RowGroups, parts: int, rank: int, width: int, out: int, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Random operands; the adapters are fp32 where x is of lower precision, as in training."""
    g = torch.Generator().manual_seed(0)
    slots = len(groups.sizes)
    adapters = dtype if dtype == torch.float64 else torch.float32

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return {
        "x": rand(groups.rows, width).to(dtype),
        "weight": rand(parts * out, width).to(dtype),
        "bias": rand(parts * out).to(dtype),
        "A": rand(slots, parts, rank, width).to(adapters),
        "B": rand(slots, parts, out, rank).to(adapters),
        "c": rand(slots, groups.views, parts, rank).to(adapters),
    }


def run(function, operands: dict[str, Tensor], groups: RowGroups, dy: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    leaves = {name: t.clone().requires_grad_(name in "xABc") for name, t in operands.items()}
    y = function(**leaves, groups=groups)
    wanted = [leaves[name] for name in "xABc"]
    grads = torch.autograd.grad(y, wanted, dy.to(y.dtype), allow_unused=True)
    return y.detach(), {n: torch.zeros_like(w) if g is None else g for n, w, g in zip("xABc", wanted, grads)}


def assert_close(ours: Tensor, reference: Tensor, tolerance: float, what: str) -> None:
    assert ours.shape == reference.shape, what
    if reference.numel():
        scale = reference.double().abs().max().clamp(min=1e-30)
        worst = (ours.double() - reference.double()).abs().max() / scale
        assert worst <= tolerance, f"{what}: {worst:.2e} > {tolerance:.0e}"


@cases(name=GROUPS, shape=[(1, 2, 8, 16), (3, 6, 10, 7), (2, 16, 33, 5), (1, 1, 1, 1)], dtype=TOLERANCE)
def test_equals_the_formula(name: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """shape: parts, R, K and N of a part."""
    groups, (parts, rank, width, out) = GROUPS[name], shape
    operands = problem(groups, parts, rank, width, out, dtype)
    dy = torch.randn(groups.rows, parts * out, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y, grads = run(dual_lora, operands, groups, dy)
    in_fp64 = {n: t.double() for n, t in operands.items()}
    y_ref, grads_ref = run(dual_lora_reference, in_fp64, groups, dy)
    assert_close(y, y_ref, TOLERANCE[dtype], "y")
    for operand, grad in grads.items():
        assert grad.dtype == operands[operand].dtype
        assert_close(grad, grads_ref[operand], TOLERANCE[dtype], f"d{operand}")


def test_reference_is_the_written_formula() -> None:
    groups = RowGroups((2, 3), views=2)
    o = problem(groups, 2, 3, 5, 4)
    y = dual_lora_reference(**o, groups=groups)
    row = 0
    for slot, size in enumerate(groups.sizes):
        for view in range(2):
            for _ in range(size):
                x = o["x"][row]
                for part in range(2):
                    W, b = o["weight"][part * 4 : part * 4 + 4], o["bias"][part * 4 : part * 4 + 4]
                    A, B, c = o["A"][slot, part], o["B"][slot, part], o["c"][slot, view, part]
                    expected = W @ x + b + B @ (c * (A @ x))
                    assert torch.allclose(y[row, part * 4 : part * 4 + 4], expected, rtol=0, atol=1e-12)
                row += 1
    assert row == groups.rows


def test_reference_normalizes_activates_and_adds_as_written() -> None:
    groups = RowGroups((2, 3), views=2)
    o = problem(groups, 2, 3, 5, 4)
    g = torch.Generator().manual_seed(1)
    gain, shift, residual = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((5,), (5,), (10, 8)))
    normed = []
    for x in o["x"]:
        mean = sum(x) / 5
        variance = sum((entry - mean) ** 2 for entry in x) / 5
        normed.append((x - mean) / (variance + 0.3) ** 0.5 * gain + shift)
    plain = dual_lora_reference(**o | {"x": torch.stack(normed)}, groups=groups)
    for activation, phi in PHI.items():
        y = dual_lora_reference(
            **o, groups=groups, norm=Norm(gain, shift, 0.3), activation=activation, residual=residual
        )
        assert torch.allclose(y, phi(plain) + residual, rtol=0, atol=1e-12)


@cases(
    name=["ragged", "views", "empty ends", "nobody"],
    norm=[True, False],
    residual=[True, False],
    bias=[True, False],
    activation=PHI,
    dtype=TOLERANCE,
)
def test_equals_the_formula_with_norm_activation_and_residual(
    name: str, norm: bool, residual: bool, bias: bool, activation: str, dtype: torch.dtype
) -> None:
    groups, draw = GROUPS[name], Draw(torch.device("cpu"), dtype)
    arguments = operands(draw, groups, 2, 3, 10, 7, bias, norm, residual)
    if dtype == torch.float64:
        arguments = in_fp64(arguments)
    dy = draw(groups.rows, 14)
    ours = values_and_gradients(dual_lora, arguments, dy, activation=activation)
    reference = values_and_gradients(dual_lora_reference, in_fp64(arguments), dy.double(), activation=activation)
    assert ours.keys() == reference.keys()
    for what, tensor in ours.items():
        assert tensor.dtype == (arguments[what[1:]] if what != "y" else arguments["x"]).dtype
        assert_close(tensor, reference[what], TOLERANCE[dtype], what)


@pytest.mark.parametrize("function", [dual_lora, dual_lora_reference])
@pytest.mark.parametrize("activation", PHI)
def test_gradients_by_finite_differences(activation: str, function: Callable[..., Tensor]) -> None:
    """With and without a norm and a residual, which is a leaf too."""
    groups = RowGroups((2, 0, 1), views=2)
    o = problem(groups, 2, 2, 3, 2)
    leaves = [o[name].requires_grad_() for name in "xABc"]
    norm = Norm(o["weight"][0], o["weight"][1], 0.1)
    residual = torch.ones(6, 4, dtype=torch.float64, requires_grad=True)

    def plain(x: Tensor, A: Tensor, B: Tensor, c: Tensor) -> Tensor:
        return function(x, o["weight"], o["bias"], A, B, c, groups, activation=activation)

    def all_in(x: Tensor, A: Tensor, B: Tensor, c: Tensor, residual: Tensor) -> Tensor:
        options = {"norm": norm, "activation": activation, "residual": residual}
        return function(x, o["weight"], None, A, B, c, groups, **options)

    assert torch.autograd.gradcheck(plain, leaves)
    assert torch.autograd.gradcheck(all_in, [*leaves, residual])


def test_masked_branch_gets_exact_zeros_and_a_zero_gate_a_gradient() -> None:
    groups = RowGroups((5, 2), views=2)
    o = problem(groups, 1, 6, 8, 9)
    o["c"][:, :, :, 4:] = 0  # a branch that no view sees
    o["c"][:, :, :, 0] = 0  # a gate at zero
    dy = torch.randn(groups.rows, 9, dtype=torch.float64)
    _, grads = run(dual_lora, o, groups, dy)
    assert (grads["A"][:, :, 4:] == 0).all()
    assert (grads["B"][:, :, :, 4:] == 0).all()
    assert (grads["c"][:, :, :, 0] != 0).all()


def test_slots_do_not_see_each_other() -> None:
    groups = RowGroups((4, 4, 3))
    o = problem(groups, 3, 4, 8, 6)
    dy = torch.randn(groups.rows, 18, dtype=torch.float64)
    y, grads = run(dual_lora, o, groups, dy)
    o["A"][1], o["B"][1], o["x"][4:8] = float("nan"), float("nan"), float("nan")
    y_nan, grads_nan = run(dual_lora, o, groups, dy)
    others = [0, 1, 2, 3, 8, 9, 10]
    assert torch.equal(y[others], y_nan[others])
    for name in "ABc":
        assert torch.equal(grads[name][[0, 2]], grads_nan[name][[0, 2]])


def test_skips_the_gradient_of_x_and_of_fixed_adapters() -> None:
    groups = RowGroups((3,))
    o = problem(groups, 1, 2, 4, 5)
    y = dual_lora(o["x"], o["weight"], None, o["A"].requires_grad_(), o["B"], o["c"], groups)
    (grad,) = torch.autograd.grad(y.sum(), o["A"])
    expected = dual_lora_reference(o["x"], o["weight"], None, o["A"], o["B"], o["c"], groups)
    assert_close(grad, torch.autograd.grad(expected.sum(), o["A"])[0], 1e-12, "dA")


@pytest.mark.parametrize(
    ("name", "shape"),
    [("x", (8, 4)), ("weight", (5, 3)), ("bias", (4,)), ("B", (1, 1, 5, 3)), ("c", (1, 2, 1, 2)), ("A", (2, 4))],
)
def test_refuses_shapes_that_do_not_fit(name: str, shape: tuple[int, ...]) -> None:
    o = problem(RowGroups((7,)), 1, 2, 4, 5)
    o[name] = torch.zeros(shape, dtype=torch.float64)
    for function in (dual_lora, dual_lora_reference):
        with pytest.raises(ValueError, match=f"{name} is|x must be"):
            function(**o, groups=RowGroups((7,)))


def test_runs_join_neighbors_of_one_size() -> None:
    assert RowGroups((5, 5, 0, 2), views=2).runs == ((0, 2, 0, 20, 5), (3, 4, 20, 24, 2))
    assert RowGroups((5, 5), 1).times(3) == RowGroups((15, 15), 1)
