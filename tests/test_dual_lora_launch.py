"""Every launcher alone against its docstring's mathematics in fp64, on awkward shapes and with several tiles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastdlp.kernels.dual_lora_launch import (
    adapter_gradients,
    backward_product,
    down_gradient,
    down_product,
    fold,
    forward_product,
    norm_backward,
    norm_down_product,
    sum_chunks,
)
from fastdlp.kernels.groups import RowGroups
from fastdlp.kernels.tiles import Tile
from tests.awkward import DTYPES, GROUPS, PHI, Draw, assert_close, cases, exact

pytestmark = pytest.mark.usefixtures("guarded")

# Largest error over largest entry, RMS error over RMS: about four times what was measured in fp32 and fp16. Those of
# bf16 and TF32 are not measured; they follow from fp16's (bf16 has 3 bits less; TF32 has as many, but may truncate).
TOLERANCE = {"fp32": (2e-6, 1e-6), "fp16": (2e-3, 1.5e-3), "bf16": (1.6e-2, 1.2e-2), "tf32": (4e-3, 3e-3)}
# What is accumulated from exact products and never rounded to the operands' dtype.
SUMS = {name: "tf32" if name == "tf32" else "fp32" for name in TOLERANCE}

RANKS = [(1, 4), (3, 6), (1, 1), (2, 16), (1, 17), (3, 2)]  # parts, R
EPILOGUES: list[tuple[str, bool, bool, bool]] = [  # activation, bias, residual, keep
    ("none", True, False, False),
    ("quick_gelu", True, True, True),
    ("none", False, True, True),
    ("gelu", False, False, True),
    ("gelu_tanh", True, True, False),
    ("gelu_tanh", False, False, True),
]


def tile(chunk: int = 0, **blocks: int) -> Tile:
    return Tile(
        blocks={f"BLOCK_{name}" if len(name) == 1 else name: size for name, size in blocks.items()}, chunk=chunk
    )


PRODUCT_TILES = [
    None,
    tile(M=16, N=16, K=32, GROUP_M=1),
    tile(M=64, N=16, K=16, GROUP_M=8),
    tile(M=32, N=64, K=64, GROUP_M=2),
    tile(M=16, N=32, K=64, GROUP_M=8),
    Tile(form="torch"),
]
ROW_TILES = [None, tile(M=16, K=64), tile(M=64, K=16), tile(M=32, K=128)]


def loose(matrix: Tensor) -> Tensor:
    """The same matrix with NaN between its rows and before them."""
    wide = matrix.new_full((matrix.shape[0], matrix.shape[1] + 5), float("nan"))
    wide[:, 3:-2] = matrix
    return wide[:, 3:-2]


def laid(strided: bool, *matrices: Tensor | None) -> Any:
    out = [loose(matrix) if strided and matrix is not None else matrix for matrix in matrices]
    return out[0] if len(out) == 1 else out


def check(precision: str, **pairs: tuple[Tensor, Tensor]) -> None:
    for what, (ours, reference) in pairs.items():
        assert_close(ours, reference, TOLERANCE[precision], what)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("parts", "rank"), RANKS)
@pytest.mark.parametrize(("width", "out", "views"), [(100, 96, 1), (64, 300, 2), (1, 1, 1)])
def test_fold(
    width: int, out: int, views: int, parts: int, rank: int, dtype: torch.dtype, device: torch.device
) -> None:
    draw = Draw(device, torch.float32)
    # Slices along slots and parts, and scales whose rows are not neighbours.
    A = draw(4, parts + 1, rank, width)[1:, 1:]
    B = draw(4, parts + 2, out, rank)[1:, 1:-1]
    c = draw(3, views, parts, 2 * rank)[..., ::2]
    down, up = fold(A, B, c, dtype)
    assert torch.equal(down, A.to(dtype).reshape(3, parts * rank, width))
    for slot in range(3):
        for view in range(views):
            expected = (B[slot] * c[slot, view][:, None]).to(dtype).transpose(1, 2)
            assert torch.equal(up[slot * views + view], expected.reshape(parts * rank, out))


@cases("ranks width t strided", ranks=RANKS, width=[100, 64, 768], t=ROW_TILES, strided=[False, True])
def test_down_product(
    name: str, ranks: tuple[int, int], width: int, t: Tile | None, strided: bool, precision: str, device: torch.device
) -> None:
    groups, L = GROUPS[name], ranks[0] * ranks[1]
    draw = Draw(device, DTYPES[precision])
    x, down = draw(groups.rows, width), draw(len(groups.sizes), L, width, scale=width**-0.5)
    P = down_product(laid(strided, x), down, groups, t)
    check(precision, P=(P, _down(exact(x), exact(down), groups)))


def _down(x: Tensor, down: Tensor, groups: RowGroups) -> Tensor:
    P = x.new_full((groups.rows, down.shape[1]), float("nan"))
    for slot, _, start, end in groups.groups():
        P[start:end] = x[start:end] @ down[slot].T
    return P


@cases(
    "ranks width eps scale t strided",
    ranks=RANKS,
    width=[100, 64, 768, 1],
    eps=[1e-5, 0.5],
    scale=[1.0, 3e-3],
    t=ROW_TILES,
    strided=[False, True],
)
def test_norm_down_product(
    name: str,
    ranks: tuple[int, int],
    width: int,
    eps: float,
    scale: float,
    t: Tile | None,
    strided: bool,
    precision: str,
    device: torch.device,
) -> None:
    """At a scale of 3e-3 the variance is about eps, so it matters where eps stands."""
    groups, L = GROUPS[name], ranks[0] * ranks[1]
    draw = Draw(device, DTYPES[precision])
    x, weight, bias = draw(groups.rows, width, scale=scale) + scale, draw(width), draw(width)
    down = draw(len(groups.sizes), L, width, scale=width**-0.5)
    h, stats, P = norm_down_product(laid(strided, x), weight, bias, eps, down, groups, t)
    mean, rstd, expected = _normed(exact(x), exact(weight), exact(bias), eps)
    check("fp32", mean=(stats[0], mean), rstd=(stats[1], rstd))
    check(precision, h=(h, expected), P=(P, _down(expected, exact(down), groups)))
    assert stats.dtype == torch.float32


def _normed(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.sum(1) / x.shape[1]
    rstd = (((x - mean[:, None]) ** 2).sum(1) / x.shape[1] + eps) ** -0.5
    return mean, rstd, (x - mean[:, None]) * rstd[:, None] * weight + bias


@pytest.mark.parametrize("width", [100, 768])
def test_a_large_mean_does_not_cancel_the_variance(width: int, device: torch.device) -> None:
    """Mean 300, deviation 1. fp32 holds the mean to 2e-5; E[x²] − E[x]² would lose 5e-3 of the variance."""
    groups = RowGroups((40, 23))
    draw = Draw(device, torch.float32)
    x, weight, bias, dh = draw(63, width) + 300, draw(width), draw(width), draw(63, width)
    down = draw(2, 4, width, scale=width**-0.5)
    h, stats, P = norm_down_product(x, weight, bias, 1e-5, down, groups)
    mean, rstd, expected = _normed(exact(x), exact(weight), exact(bias), 1e-5)
    assert_close(stats[0], mean, (8e-7, 3e-7), "mean")
    assert_close(stats[1], rstd, (1.4e-5, 5e-6), "rstd")
    assert_close(h, expected, (8e-5, 6e-5), "h")
    assert_close(P, _down(expected, exact(down), groups), (1e-4, 6e-5), "P")
    dx = norm_backward(dh, x, stats, weight)
    assert_close(dx, _norm_gradient(exact(dh), exact(x), exact(weight), 1e-5), (1e-5, 1e-5), "dx")


def test_a_row_of_equal_entries_has_the_deviation_of_eps(device: torch.device) -> None:
    draw = Draw(device, torch.float32)
    weight, bias, down = draw(100), draw(100), draw(1, 4, 100)
    h, stats, _ = norm_down_product(torch.full((5, 100), 7.0, device=device), weight, bias, 1e-5, down, RowGroups((5,)))
    assert torch.allclose(stats[0], torch.full_like(stats[0], 7.0), rtol=1e-6)
    assert torch.allclose(stats[1], torch.full_like(stats[1], 1e-5**-0.5), rtol=1e-6)
    assert torch.allclose(h, bias.expand(5, 100), rtol=0, atol=2e-3)  # rounding of the mean, times 1/σ


@cases("width t strided", width=[100, 64, 768, 1], t=[None, tile(M=4), tile(M=1)], strided=[False, True])
def test_norm_backward(
    name: str, width: int, t: Tile | None, strided: bool, precision: str, device: torch.device
) -> None:
    groups = GROUPS[name]
    draw = Draw(device, DTYPES[precision])
    x, dh, weight = draw(groups.rows, width) + 0.5, draw(groups.rows, width), draw(width)
    mean, rstd, _ = _normed(exact(x), exact(weight), exact(weight), 1e-2)
    stats = torch.stack([mean, rstd]).to(device, torch.float32)
    dx = norm_backward(dh, laid(strided, x), stats, weight, t)
    check(precision, dx=(dx, _norm_gradient(exact(dh), exact(x), exact(weight), 1e-2)))


def _norm_gradient(dh: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """By autograd, not by the kernel's formula."""
    x = x.requires_grad_()
    h = _normed(x, weight, torch.zeros_like(weight), eps)[2]
    return torch.autograd.grad(h, x, dh)[0]


SHAPES = [(96, 64), (100, 100), (64, 70), (33, 768), (1, 1)]  # N of a part, K


@cases(
    "ranks shape epilogue t strided",
    ranks=RANKS,
    shape=SHAPES,
    epilogue=EPILOGUES,
    t=PRODUCT_TILES,
    strided=[False, True],
)
def test_forward_product(
    name: str,
    ranks: tuple[int, int],
    shape: tuple[int, int],
    epilogue: tuple[str, bool, bool, bool],
    t: Tile | None,
    strided: bool,
    precision: str,
    device: torch.device,
) -> None:
    groups, (parts, rank), (out, width) = GROUPS[name], ranks, shape
    activation, has_bias, has_residual, keep = epilogue
    draw = Draw(device, DTYPES[precision])
    x, weight = draw(groups.rows, width), draw(parts * out, width, scale=width**-0.5)
    bias = draw(parts * out) if has_bias else None
    residual = draw(groups.rows, parts * out) if has_residual else None
    P = draw(groups.rows, parts * rank)
    up = draw(len(groups.sizes) * groups.views, parts * rank, out, scale=rank**-0.5)
    x_, weight_, residual_ = laid(strided, x, weight, residual)
    y, slope = forward_product(x_, weight_, bias, P, up, parts, groups, activation, residual_, keep, t)

    u = exact(x) @ exact(weight).T + (0 if bias is None else exact(bias))
    for number, (_, _, start, end) in enumerate(groups.groups()):
        for part in range(parts):
            of_part = slice(part * rank, (part + 1) * rank)
            low = exact(P)[start:end, of_part] @ exact(up)[number, of_part]
            u[start:end, part * out : (part + 1) * out] += low
    expected = PHI[activation](u) + (0 if residual is None else exact(residual))
    check(precision, y=(y, expected))
    assert (slope is not None) == (keep and activation != "none")
    if slope is not None:
        one = torch.ones_like(slope)  # what errors in a slope are measured against, however few there are
        check(precision, slope=(torch.cat([slope, one]), torch.cat([_slope(activation, u), exact(one)])))


@cases("ranks shape t strided", ranks=RANKS, shape=SHAPES, t=PRODUCT_TILES, strided=[False, True])
def test_backward_product(
    name: str,
    ranks: tuple[int, int],
    shape: tuple[int, int],
    t: Tile | None,
    strided: bool,
    precision: str,
    device: torch.device,
) -> None:
    groups, L, (width, inner) = GROUPS[name], ranks[0] * ranks[1], shape
    draw = Draw(device, DTYPES[precision])
    dy, weight = draw(groups.rows, inner), draw(inner, width, scale=inner**-0.5)
    Q, down = draw(groups.rows, L), draw(len(groups.sizes), L, width, scale=L**-0.5)
    dx = backward_product(*laid(strided, dy, weight), Q, down, groups, t)
    expected = exact(dy) @ exact(weight)
    for slot, _, start, end in groups.groups():
        expected[start:end] += exact(Q)[start:end] @ exact(down)[slot]
    check(precision, dx=(dx, expected))


@cases(
    "ranks out has_slope t strided",
    ranks=RANKS,
    out=[96, 100, 64, 1],
    has_slope=[False, True],
    t=[None, tile(M=16, N=64), tile(M=64, N=16), tile(M=32, N=32)],
    strided=[False, True],
)
def test_adapter_gradients(
    name: str,
    ranks: tuple[int, int],
    out: int,
    has_slope: bool,
    t: Tile | None,
    strided: bool,
    precision: str,
    device: torch.device,
) -> None:
    """B' is drawn apart from B and c, so that each is seen to be used where it belongs."""
    groups, (parts, rank), slots = GROUPS[name], ranks, len(GROUPS[name].sizes)
    views, fp32 = groups.views, torch.float32
    draw = Draw(device, DTYPES[precision])
    dy, slope, P = draw(groups.rows, parts * out), draw(groups.rows, parts * out), draw(groups.rows, parts * rank)
    B = draw(slots, parts + strided, out, rank, dtype=fp32)[:, :parts]
    c = draw(slots, views, parts, rank + strided, dtype=fp32)[..., :rank]
    up = draw(slots * views, parts * rank, out, scale=out**-0.5)
    results = adapter_gradients(laid(strided, dy), slope if has_slope else None, P, B, c, up, groups, t)
    du, Q, dB_shares, dc_shares, of_slot, of_group = results

    dU = exact(dy * slope if has_slope else dy)  # rounded before the sums, as the kernel's
    expected_Q = torch.full((groups.rows, parts * rank), float("nan"), dtype=torch.float64)
    dB = torch.zeros(slots, parts, out, rank, dtype=torch.float64)
    dc = torch.zeros(slots * views, parts, rank, dtype=torch.float64)
    for number, (slot, view, start, end) in enumerate(groups.groups()):
        for part in range(parts):
            of_part = slice(part * rank, (part + 1) * rank)
            g = dU[start:end, part * out : (part + 1) * out]
            expected_Q[start:end, of_part] = g @ exact(up)[number, of_part].T
            T = g.T @ exact(P)[start:end, of_part]
            dB[slot, part] += T * exact(c)[slot, view, part]
            dc[number, part] = (exact(B)[slot, part] * T).sum(0)
    check(precision, du=(du, dU), Q=(Q, expected_Q))
    check(SUMS[precision], dB=(_summed(dB_shares, of_slot), dB), dc=(_summed(dc_shares, of_group), dc))
    assert dB_shares.dtype == dc_shares.dtype == torch.float32


@cases(
    "ranks width t strided",
    ranks=RANKS,
    width=[100, 64, 768, 1],
    t=[None, tile(M=16, K=64, chunk=16), tile(M=32, K=16, chunk=40), tile(M=64, K=32, chunk=512)],
    strided=[False, True],
)
def test_down_gradient(
    name: str, ranks: tuple[int, int], width: int, t: Tile | None, strided: bool, precision: str, device: torch.device
) -> None:
    groups, L = GROUPS[name], ranks[0] * ranks[1]
    draw = Draw(device, DTYPES[precision])
    x, Q = draw(groups.rows, width), draw(groups.rows, L)
    shares, bounds = down_gradient(laid(strided, x), Q, groups, t)
    expected = torch.zeros(len(groups.sizes), L, width, dtype=torch.float64)
    for slot, _, start, end in groups.groups():
        expected[slot] += exact(Q)[start:end].T @ exact(x)[start:end]
    check(SUMS[precision], dA=(_summed(shares, bounds), expected))
    assert shares.dtype == torch.float32


def _summed(shares: Tensor, bounds: Tensor) -> Tensor:
    """Shares by owner, added first to last in fp32 on the CPU."""
    shares, edges = shares.cpu(), bounds.tolist()
    out = shares.new_zeros(len(edges) - 1, *shares.shape[1:])
    for owner in range(len(out)):
        for share in shares[edges[owner] : edges[owner + 1]]:
            out[owner] += share
    return out


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("sizes", [(300, 256, 7), (5, 600, 1), (1, 1, 1)])
@pytest.mark.parametrize("counts", [(1, 0, 0, 5, 2), (0, 0), (3,), ()])
def test_sum_chunks_adds_in_order(
    counts: tuple[int, ...], sizes: tuple[int, int, int], views: int, device: torch.device
) -> None:
    """To the bit, and zeros for an owner without a chunk. dc has `views` owners to every one of dA and dB."""
    draw = Draw(device, torch.float32)
    owners = [counts, counts, [count for count in counts for _ in range(views)]]
    shares = []
    for size, each in zip(sizes, owners):
        bounds = torch.tensor([0, *each]).cumsum(0).int().to(device)
        shares.append((draw(sum(each), size, dtype=torch.float32), bounds))
    for ours, (share, bounds) in zip(sum_chunks(*shares), shares):
        assert torch.equal(ours.cpu(), _summed(share, bounds))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # the interpreter's; the sigmoid is 0 there
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu", "gelu_tanh"])
def test_activation_and_slope_point_by_point(activation: str, device: torch.device) -> None:
    """φ and φ' through the epilogue, from −1000 to 1000, to 1e-6 of max(1, |u|)."""
    u = torch.cat([torch.linspace(-8, 8, 157), torch.tensor([-1000.0, -88.0, -20.0, 20.0, 88.0, 1000.0, 0.0])])
    u, zero, groups = u.to(device), torch.zeros(len(u), 1, device=device), RowGroups((1,))
    y, slope = forward_product(
        zero[:1], zero, u, zero[:1], zero.view(1, 1, -1), 1, groups, activation, None, True, PRODUCT_TILES[1]
    )
    x = exact(u)
    for ours, value in ((y, PHI[activation](x)), (slope, _slope(activation, x))):
        assert ((exact(ours)[0] - value).abs() <= 1e-6 * x.abs().clamp(min=1)).all()


def _slope(activation: str, u: Tensor) -> Tensor:
    """φ'(u) by autograd."""
    u = u.detach().requires_grad_()
    return torch.autograd.grad(PHI[activation](u).sum(), u)[0]


@pytest.mark.parametrize("groups", [RowGroups((50,) * 5), RowGroups((1, 200, 49), views=1)], ids=str)
def test_same_bits_whatever_the_neighbours(groups: RowGroups, device: torch.device) -> None:
    """The rows of a slot come out the same when every other slot holds other numbers."""
    outputs = []
    for seed in (1, 2):
        draw, own = Draw(device, torch.float32, seed), Draw(device, torch.float32)
        x, weight, P = draw(groups.rows, 64), own(96, 64), draw(groups.rows, 4)
        up = draw(len(groups.sizes), 4, 96)
        _, _, start, end = list(groups.groups())[1]
        x[start:end], P[start:end], up[1] = own(end - start, 64), own(end - start, 4), own(4, 96)
        y, _ = forward_product(x, weight, None, P, up, 1, groups)
        outputs.append(y[start:end])
    assert torch.equal(*outputs)
