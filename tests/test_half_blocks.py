"""The halves of a block in Triton kernels against their formula in fp64, over adapters that lie in a bank's rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdlp.adapters.bank import AdapterBank, Adapters
from fastdlp.adapters.branches import Branch, TowerShape, tower_sites
from fastdlp.kernels.dual_lora import dual_lora_reference
from fastdlp.kernels.frozen import FrozenLinear, Norm
from fastdlp.kernels.groups import RowGroups
from fastdlp.kernels.half_blocks import AdaptedLinear, AttentionHalf, MLPHalf, run
from fastdlp.kernels.launch import recording
from tests.awkward import DTYPES, Draw, assert_close, exact, kernel_cases

pytestmark = [pytest.mark.filterwarnings("ignore:overflow encountered in exp"), pytest.mark.usefixtures("guarded")]

# Two linears, a norm and a softmax deep, with adapters at the size of the weights: four times what was measured.
TOLERANCE = {"fp32": (3e-5, 2.4e-5), "fp16": (2e-2, 1.6e-2), "bf16": (0.16, 0.12), "tf32": (4e-2, 3e-2)}
SHAPE, HEADS = TowerShape(layers=1, width=32, mlp=100, embed=20), 2
SITES = tower_sites(SHAPE)
QKV, OUT, FC1, FC2 = range(4)
BRANCHES = (Branch("local", 4, gated=True), Branch("global", 2, gated=False), Branch("wide", 13, gated=True))
VIEWS: dict[str, tuple[tuple[str, ...], ...]] = {
    "local": (("local",),),
    "global": (("global",),),
    "both": (("local",), ("global",)),
    "summed": (("local", "global", "wide"),),
    "three": (("wide",), ("local", "global"), ("global",)),
}
SPLITS = {"one": (5,), "ragged": (0, 2, 1), "nobody": (0, 0)}
Half = Callable[..., Tensor]


class Problem:
    """A block's weights, the adapters of all slots and the rows x [sequences · tokens, width]."""

    def __init__(self, draw: Draw, sizes: tuple[int, ...], views: str, tokens: int, activation: str) -> None:
        d, m = SHAPE.width, SHAPE.mlp
        self.groups, self.tokens = RowGroups(sizes, len(VIEWS[views])), tokens

        def linear(out: int, width: int, norm: bool = False, activation: str = "none") -> FrozenLinear:
            frozen = Norm(draw(width) + 1, draw(width), 1e-5) if norm else None
            return FrozenLinear(draw(out, width, scale=width**-0.5), draw(out), frozen, activation)

        self.qkv, self.out = linear(3 * d, d, norm=True), linear(d, d)
        self.fc1, self.fc2 = linear(m, d, norm=True, activation=activation), linear(d, m)
        self.x = draw(self.groups.rows * tokens, d)
        self.bank = AdapterBank(SITES, BRANCHES, len(sizes) + 1, draw.device)
        for state in self.bank.state.values():
            state.weights.copy_(draw(*state.weights.shape, scale=0.2, dtype=torch.float32))
            state.gates.copy_(draw(*state.gates.shape, scale=0.3, dtype=torch.float32))
        slots = torch.arange(len(sizes), device=draw.device).flip(0) + 1  # not the bank's order
        self.views = VIEWS[views]
        self.slots = slots

    def adapters(self, grad: bool = True) -> Adapters:
        return self.bank.adapters(self.slots, self.views, grad)


def attention_half(p: Problem, adapters: Adapters, x: Tensor, causal: bool, skip: bool) -> Tensor:
    groups = p.groups.times(p.tokens)
    qkv, out = AdaptedLinear(p.qkv, adapters.span(QKV), groups), AdaptedLinear(p.out, adapters.span(OUT), groups)
    return run(x, AttentionHalf(qkv, out, p.groups, HEADS, p.tokens, causal, skip), adapters.folded(x.dtype))


def mlp_half(p: Problem, adapters: Adapters, x: Tensor, causal: bool, skip: bool) -> Tensor:
    groups = p.groups.times(p.tokens)
    fc1, fc2 = AdaptedLinear(p.fc1, adapters.span(FC1), groups), AdaptedLinear(p.fc2, adapters.span(FC2), groups)
    return run(x, MLPHalf(fc1, fc2, skip), adapters.folded(x.dtype))


def two_linears(p: Problem, adapters: Adapters, x: Tensor, causal: bool, skip: bool) -> Tensor:
    """q over all rows, then k and v of one site, and `out` on k with a residual: linears apart, as the last block's."""
    folded, groups = adapters.folded(x.dtype), p.groups.times(p.tokens)
    parts = [_part(p.qkv, 0, 1), _part(p.qkv, 1, 3)]
    q = run(x, AdaptedLinear(parts[0], adapters.span(QKV, slice(0, 1)), groups), folded)
    kv = run(x, AdaptedLinear(parts[1], adapters.span(QKV, slice(1, 3)), groups), folded)
    out = AdaptedLinear(p.out, adapters.span(OUT), groups)
    return run(kv[:, : SHAPE.width], out, folded, q if skip else None)


def _part(linear: FrozenLinear, first: int, end: int) -> FrozenLinear:
    rows = slice(first * SHAPE.width, end * SHAPE.width)
    assert linear.bias is not None
    return FrozenLinear(linear.weight[rows], linear.bias[rows], linear.norm, linear.activation)


HALVES: dict[str, Half] = {"attention": attention_half, "mlp": mlp_half, "linears": two_linears}


def formula(half: str, p: Problem, adapters: Adapters, x: Tensor, causal: bool, skip: bool) -> Tensor:
    """The same, linear by linear, in fp64 by `dual_lora_reference` and autograd."""
    groups = p.groups.times(p.tokens)

    def linear(frozen: FrozenLinear, h: Tensor, site: int, parts: slice = slice(None)) -> Tensor:
        norm = frozen.norm and Norm(exact(frozen.norm.weight), exact(frozen.norm.bias), frozen.norm.eps)
        weights = FrozenLinear(exact(frozen.weight), exact(frozen.bias), norm, frozen.activation)  # type: ignore
        return dual_lora_reference(h, weights, *adapters.site(site, parts), groups)

    if half == "mlp":
        y = linear(p.fc2, linear(p.fc1, x, FC1), FC2)
    elif half == "linears":
        q = linear(_part(p.qkv, 0, 1), x, QKV, slice(0, 1))
        k = linear(_part(p.qkv, 1, 3), x, QKV, slice(1, 3))[:, : SHAPE.width]
        return linear(p.out, k, OUT) + (q if skip else 0)
    else:
        packed = linear(p.qkv, x, QKV).view(p.groups.rows, p.tokens, 3, HEADS, SHAPE.width // HEADS)
        q, k, v = packed.permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
        if causal:
            scores = scores.masked_fill(torch.ones(p.tokens, p.tokens).triu(1).bool(), float("-inf"))
        a = (scores.softmax(-1) @ v).transpose(1, 2).reshape(len(x), SHAPE.width)
        y = linear(p.out, a, OUT)
    return y + x if skip else y


def in_fp64(p: Problem) -> Adapters:
    """The adapters with fp64 copies of the same rows as leaves."""
    bank = AdapterBank(SITES, BRANCHES, p.bank.slots)
    for name, state in bank.state.items():
        state.weights, state.gates = (exact(t) for t in (p.bank.state[name].weights, p.bank.state[name].gates))
    return bank.adapters(p.slots.cpu(), p.views, grad=True)


def gradients_of(loss: Tensor, x: Tensor, adapters: Adapters) -> dict[str, Tensor]:
    leaves = {f"{n} {what}": t for n, pair in adapters.leaves.items() for what, t in zip(("weights", "gates"), pair)}
    leaves = {"x": x} | {name: leaf for name, leaf in leaves.items() if leaf.numel()}
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {n: torch.zeros_like(leaf) if g is None else g for (n, leaf), g in zip(leaves.items(), found)}


@kernel_cases(
    SPLITS,
    half=HALVES,
    views=VIEWS,
    tokens=[1, 7],
    activation=["quick_gelu", "gelu", "gelu_tanh"],
    causal=[False, True],
    skip=[True, False],
)
def test_equals_the_formula(
    name: str,
    half: str,
    views: str,
    tokens: int,
    activation: str,
    causal: bool,
    skip: bool,
    precision: str,
    device: torch.device,
) -> None:
    """The values, and the gradients of x and of the whole rows of every branch, other linears' zeros included."""
    draw = Draw(device, DTYPES[precision])
    p = Problem(draw, SPLITS[name], views, tokens, activation)
    dy, adapters, right = draw(len(p.x), SHAPE.width), p.adapters(), in_fp64(p)
    x, exact_x = p.x.detach().requires_grad_(), exact(p.x).requires_grad_()
    y = HALVES[half](p, adapters, x, causal, skip)
    expected = formula(half, p, right, exact_x, causal, skip)
    assert_close(y, expected, TOLERANCE[precision], "y")
    ours = gradients_of((y * dy).sum(), x, adapters)
    for what, reference in gradients_of((expected * exact(dy)).sum(), exact_x, right).items():
        if reference.any():
            assert_close(ours[what], reference, TOLERANCE[precision], what)
        else:
            assert not ours[what].any(), what


def small(device: torch.device, **options: Any) -> tuple[Problem, Tensor]:
    p = Problem(Draw(device, torch.float32), (1, 0, 2), "both", 3, "quick_gelu")
    return p, p.x.detach().requires_grad_(options.get("grad", True))


@pytest.mark.parametrize("half", HALVES)
def test_same_bits_every_run(half: str, device: torch.device) -> None:
    results = []
    for _ in range(2):
        p, x = small(device)
        adapters = p.adapters()
        y = HALVES[half](p, adapters, x, False, True)
        results.append([y, *gradients_of(y.square().sum(), x, adapters).values()])
    for one, other in zip(*results):
        assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("what", ["weights", "gates"])
def test_a_slot_that_has_diverged_stays_alone(half: str, what: str, device: torch.device) -> None:
    """The second client of three, all of whose rows lie in one tile."""
    results = []
    for value in (0.5, float("nan")):
        p = Problem(Draw(device, torch.float32), (2, 1, 3), "local", 5, "gelu")
        getattr(p.bank.state["local"], what)[p.slots[1]] = value
        adapters, x = p.adapters(), p.x.detach().requires_grad_()
        y = HALVES[half](p, adapters, x, False, True)
        results.append([y, *gradients_of(y.square().sum(), x, adapters).values()])
    rows = [*range(10), *range(15, 30)]
    for before, after in zip(*results):
        kept = rows if len(before) == 30 else [0, 2]
        assert torch.equal(before[kept], after[kept])
    assert not results[1][0][10:15].isfinite().any()


def test_only_what_is_used_is_summed(device: torch.device) -> None:
    """A half whose output the loss leaves out adds nothing, and a second backward gives what the first gave."""
    gradients = []
    for unused in (True, False):
        p, x = small(device)
        adapters = p.adapters()
        y = mlp_half(p, adapters, x, False, True)
        if unused:
            assert attention_half(p, adapters, x, False, True).requires_grad
        leaves = [leaf for pair in adapters.leaves.values() for leaf in pair if leaf.numel()]
        gradients += [torch.autograd.grad(y.square().sum(), leaves, retain_graph=True) for _ in range(2)]
    for ours in gradients[1:]:
        for one, other in zip(ours, gradients[0]):
            assert torch.equal(one, other)


def test_a_backward_that_asks_for_x_alone_leaves_nothing_behind(device: torch.device) -> None:
    """Its partial sums are not added up, so the next backward, which reaches the other half, must not find them."""
    gradients = []
    for before in (True, False):
        p, x = small(device)
        adapters = p.adapters()
        y, z = mlp_half(p, adapters, x, False, True), attention_half(p, adapters, x, False, True)
        if before:
            torch.autograd.grad(y.square().sum(), x, retain_graph=True)
        leaves = [leaf for pair in adapters.leaves.values() for leaf in pair if leaf.numel()]
        gradients.append(torch.autograd.grad(z.square().sum(), leaves))
    for one, other in zip(*gradients):
        assert torch.equal(one, other)


@pytest.mark.parametrize("half", HALVES)
def test_a_second_derivative_is_refused(half: str, device: torch.device) -> None:
    """The kernels' gradients have none."""
    p, x = small(device)
    y = HALVES[half](p, p.adapters(), x.requires_grad_(), False, True)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_a_site_runs_once_a_forward(device: torch.device) -> None:
    p, x = small(device)
    adapters = p.adapters()
    mlp_half(p, adapters, x, False, True)
    with pytest.raises(ValueError, match="runs once a forward"):
        mlp_half(p, adapters, x, False, True)


def test_launches(device: torch.device) -> None:
    """One fold a branch, then 4 launches a half; 5 and 6 backward, 2 fewer for rows without gradient; then the sums."""
    for grad, fewer in ((True, 0), (False, 2)):
        p, x = small(device, grad=grad)
        adapters = p.adapters()
        with recording() as forward:
            y = mlp_half(p, adapters, x, False, True)
        with recording() as attention:
            z = attention_half(p, adapters, x, False, True)
        assert [launch.kernel.__name__ for launch in forward[:2]] == ["fold_kernel"] * 2
        assert (len(forward), len(attention)) == (6, 4)
        with recording() as backward:
            torch.autograd.grad((y + z).sum(), [adapters.leaves["local"][0], adapters.leaves["global"][0]])
        assert len(backward) == 5 + 6 - 2 * fewer + 2


def test_nothing_is_kept_for_a_teacher(device: torch.device) -> None:
    p, _ = small(device)
    adapters = p.adapters(grad=False)
    with torch.no_grad(), recording() as launches:
        y = mlp_half(p, adapters, p.x, False, True)
    assert y.grad_fn is None
    assert adapters.folded(p.x.dtype).folded.reserved == []
    assert {launch.options.get("PREACTIVATION", "none") for launch in launches} == {"none"}


def test_against_the_torch_form(device: torch.device) -> None:
    """F.scaled_dot_product_attention between two single linears gives what the attention half gives."""
    p, x = small(device)
    heads = p.qkv.weight.shape[0] // 3 // HEADS
    y = attention_half(p, p.adapters(), x, True, True)
    adapters = p.adapters()
    folded, groups = adapters.folded(x.dtype), p.groups.times(p.tokens)
    packed = run(x, AdaptedLinear(p.qkv, adapters.span(QKV), groups), folded)
    q, k, v = packed.view(p.groups.rows, p.tokens, 3, HEADS, heads).permute(2, 0, 3, 1, 4)
    a = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(len(x), -1)
    apart = run(a, AdaptedLinear(p.out, adapters.span(OUT), groups), folded, x)
    assert torch.allclose(y, apart, atol=1e-5)
