"""Every launcher of a linear alone against its docstring's mathematics in fp64, on awkward shapes and several tiles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastdlp.kernels.dual_lora_ops import branch_tensors, fold_adapters
from fastdlp.kernels.fold import sum_partials
from fastdlp.kernels.frozen import FrozenLinear, Norm
from fastdlp.kernels.gradients import LinearInput, adapter_gradients
from fastdlp.kernels.groups import RowGroups
from fastdlp.kernels.low_rank import PartialSums, SiteAdapters, padded
from fastdlp.kernels.norm import down_product, norm_backward
from fastdlp.kernels.normalize import normalize
from fastdlp.kernels.product import backward_product, forward_product
from fastdlp.kernels.tiles import Tile, forced
from tests.awkward import DTYPES, GROUPS, PHI, Draw, assert_close, exact, kernel_cases
from tests.pairs import cases

pytestmark = pytest.mark.usefixtures("guarded")

# Largest error over largest entry, RMS error over RMS: about four times what was measured in fp32 and fp16. Those of
# bf16 and TF32 are not measured; they follow from fp16's (bf16 has 3 bits less; TF32 has as many, but may truncate).
TOLERANCE = {"fp32": (2e-6, 1e-6), "fp16": (2e-3, 1.5e-3), "bf16": (1.6e-2, 1.2e-2), "tf32": (4e-3, 3e-3)}
# What is accumulated from exact products and never rounded to the operands' dtype.
SUMS = {name: "tf32" if name == "tf32" else "fp32" for name in TOLERANCE}

RANKS = [(1, 1), (3, 6), (2, 16), (1, 17)]  # parts, R
EPILOGUES: list[tuple[str, bool, bool, bool]] = [  # activation, bias, residual, keep
    ("none", True, False, False),
    ("quick_gelu", True, True, True),
    ("none", False, True, True),
    ("gelu", False, False, True),
    ("gelu_tanh", True, True, False),
    ("gelu_tanh", False, False, True),
]


def tile(variant: str = "triton", **blocks: int) -> Tile:
    return Tile(variant, {f"BLOCK_{name}" if len(name) == 1 else name: size for name, size in blocks.items()})


PRODUCT_TILES = [
    None,
    tile(M=16, N=16, K=32, GROUP_M=1),
    tile(M=64, N=16, K=16, GROUP_M=8),
    tile("descriptor", M=32, N=64, K=64, GROUP_M=2),
    tile("descriptor", M=16, N=32, K=16, GROUP_M=8),
    Tile(variant="torch"),
]
ROW_TILES = [None, tile(M=16, K=64), tile(M=64, K=16), tile(M=32, K=128)]


def loose(matrix: Tensor) -> Tensor:
    """The same matrix with NaN between its rows and before them."""
    wide = matrix.new_full((matrix.shape[0], matrix.shape[1] + 8), float("nan"))
    wide[:, 4:-4] = matrix
    return wide[:, 4:-4]


def laid(strided: bool, *matrices: Tensor | None) -> Any:
    out = [loose(matrix) if strided and matrix is not None else matrix for matrix in matrices]
    return out[0] if len(out) == 1 else out


def check(precision: str, **pairs: tuple[Tensor, Tensor]) -> None:
    for what, (ours, reference) in pairs.items():
        assert_close(ours, reference, TOLERANCE[precision], what)


def site_of(draw: Draw, groups: RowGroups, parts: int, rank: int, width: int, out: int) -> SiteAdapters:
    """Folded adapters with entries of their own in A and B', zero where the rank is padded."""
    slots, RP = len(groups.sizes), padded(rank)

    def drawn(owners: int, columns: int, scale: float) -> Tensor:
        full = draw(owners, parts, RP, columns, scale=scale)
        full[:, :, rank:] = 0
        return full.flatten(1, 2)

    down, up = drawn(slots, width, width**-0.5), drawn(slots * groups.views, out, rank**-0.5)
    nan_flag = torch.zeros(slots, parts, device=draw.device)
    return SiteAdapters(down, up, nan_flag, parts, rank)


def low_of(draw: Draw, groups: RowGroups, site: SiteAdapters) -> Tensor:
    """P or Q [M, L]; NaN in no column, so what is padded must be met by zeros of the adapters."""
    return draw(groups.rows, site.down.shape[1])


@cases(
    shape=[(100, 96), (64, 300), (1, 1)],  # K, N
    ranks=RANKS,
    views=[1, 2],
    dtype=[torch.float32, torch.float16],
)
def test_fold(
    shape: tuple[int, int], ranks: tuple[int, int], views: int, dtype: torch.dtype, device: torch.device
) -> None:
    (width, out), (parts, rank) = shape, ranks
    draw, RP = Draw(device, torch.float32), padded(rank)
    # Slices along slots and parts, and scales whose rows are not neighbors.
    A = draw(4, parts + 1, rank, width)[1:, 1:]
    B = draw(4, parts + 2, out, rank)[1:, 1:-1]
    c = draw(3, views, parts, 2 * rank)[..., ::2]
    site = fold_adapters(A, B, c, dtype).site((0, parts))
    down, up = site.down.view(3, parts, RP, width), site.up.view(3, views, parts, RP, out)
    assert torch.equal(down[:, :, :rank], A.to(dtype))
    assert torch.equal(up[:, :, :, :rank], (B[:, None] * c[:, :, :, None]).to(dtype).mT)
    assert (down[:, :, rank:] == 0).all()
    assert (up[:, :, :, rank:] == 0).all()
    assert (site.nan_flag == 0).all()


@pytest.mark.parametrize(
    ("what", "value"), [("A", float("nan")), ("A", 1e30), ("B", float("inf")), ("B", 1e30), ("c", float("nan"))]
)
def test_fold_keeps_what_is_not_finite_apart(what: str, value: float, device: torch.device) -> None:
    """1e30 is finite in fp32 and none of fp16's numbers."""
    draw = Draw(device, torch.float32)
    adapters = {"A": draw(3, 2, 4, 40), "B": draw(3, 2, 50, 4), "c": draw(3, 2, 2, 4)}
    clean = fold_adapters(**adapters, dtype=torch.float16).site((0, 2))
    adapters[what][1, 1, 0, 0] = value
    site = fold_adapters(**adapters, dtype=torch.float16).site((0, 2))
    assert site.nan_flag.sum(1).isnan().tolist() == [False, True, False]
    assert site.down.isfinite().all()
    assert site.up.isfinite().all()
    for slot in (0, 2):
        assert torch.equal(site.down[slot], clean.down[slot])
        assert torch.equal(site.up.view(3, -1)[slot], clean.up.view(3, -1)[slot])


@kernel_cases(ranks=RANKS, width=[100, 64, 768], t=ROW_TILES, strided=[False, True])
def test_down_product(
    name: str, ranks: tuple[int, int], width: int, t: Tile | None, strided: bool, precision: str, device: torch.device
) -> None:
    groups, draw = GROUPS[name], Draw(device, DTYPES[precision])
    x, site = draw(groups.rows, width), site_of(draw, groups, *ranks, width, 8)
    with forced("down", t):
        h, stats, P = down_product(laid(strided, x), None, site, groups)
    assert torch.equal(h, x)
    assert stats is None
    check(precision, P=(P, _down(exact(x), site, groups)))


def _down(x: Tensor, site: SiteAdapters, groups: RowGroups) -> Tensor:
    P = x.new_full((groups.rows, site.down.shape[1]), float("nan"))
    for slot, _, start, end in groups.groups():
        P[start:end] = x[start:end] @ exact(site.down)[slot].T
    return P


def test_a_nan_flag_affects_the_rows_of_its_slot(device: torch.device) -> None:
    groups, draw = RowGroups((5, 9, 3), views=2), Draw(device, torch.float32)
    site, x = site_of(draw, groups, 2, 4, 40, 48), draw(34, 40)
    norm = Norm(draw(40), draw(40), 1e-5)
    clean = [down_product(x, n, site, groups)[2] for n in (None, norm)]
    site.nan_flag[1, 1] = float("nan")
    own, others = slice(10, 28), [*range(10), *range(28, 34)]
    for P, before in zip([down_product(x, n, site, groups)[2] for n in (None, norm)], clean):
        assert P[own].isnan().all()
        assert torch.equal(P[others], before[others])


@kernel_cases(
    ranks=RANKS,
    width=[100, 64, 768, 1],
    eps=[1e-5, 0.5],
    scale=[1.0, 3e-3],
    t=ROW_TILES,
    strided=[False, True],
)
def test_down_product_with_norm(
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
    groups, draw = GROUPS[name], Draw(device, DTYPES[precision])
    x, weight, bias = draw(groups.rows, width, scale=scale) + scale, draw(width), draw(width)
    site = site_of(draw, groups, *ranks, width, 8)
    with forced("norm_down", t):
        h, stats, P = down_product(laid(strided, x), Norm(weight, bias, eps), site, groups)
    assert stats is not None
    mean, rstd, expected = _normed(exact(x), exact(weight), exact(bias), eps)
    check("fp32", mean=(stats[0], mean), rstd=(stats[1], rstd))
    check(precision, h=(h, expected), P=(P, _down(expected, site, groups)))
    assert stats.dtype == torch.float32


def _normed(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.sum(1) / x.shape[1]
    rstd = (((x - mean[:, None]) ** 2).sum(1) / x.shape[1] + eps) ** -0.5
    return mean, rstd, (x - mean[:, None]) * rstd[:, None] * weight + bias


@pytest.mark.parametrize("width", [100, 768])
def test_a_large_mean_does_not_cancel_the_variance(width: int, device: torch.device) -> None:
    """Mean 300, deviation 1. fp32 holds the mean to 2e-5; E[x²] − E[x]² would lose 5e-3 of the variance."""
    groups, draw = RowGroups((40, 23)), Draw(device, torch.float32)
    x, weight, bias, dh = draw(63, width) + 300, draw(width), draw(width), draw(63, width)
    site = site_of(draw, groups, 1, 4, width, 8)
    h, stats, P = down_product(x, Norm(weight, bias, 1e-5), site, groups)
    assert stats is not None
    mean, rstd, expected = _normed(exact(x), exact(weight), exact(bias), 1e-5)
    assert_close(stats[0], mean, (8e-7, 3e-7), "mean")
    assert_close(stats[1], rstd, (1.4e-5, 5e-6), "rstd")
    assert_close(h, expected, (8e-5, 6e-5), "h")
    assert_close(P, _down(expected, site, groups), (1e-4, 6e-5), "P")
    dx = norm_backward(dh, x, stats, weight)
    assert_close(dx, _norm_gradient(exact(dh), exact(x), exact(weight), 1e-5), (1e-5, 1e-5), "dx")


def test_a_row_of_equal_entries_has_the_deviation_of_eps(device: torch.device) -> None:
    groups, draw = RowGroups((5,)), Draw(device, torch.float32)
    weight, bias, site = draw(100), draw(100), site_of(draw, groups, 1, 4, 100, 8)
    rows = torch.full((5, 100), 7.0, device=device)
    h, stats, _ = down_product(rows, Norm(weight, bias, 1e-5), site, groups)
    assert stats is not None
    assert torch.allclose(stats[0], torch.full_like(stats[0], 7.0), rtol=1e-6)
    assert torch.allclose(stats[1], torch.full_like(stats[1], 1e-5**-0.5), rtol=1e-6)
    assert torch.allclose(h, bias.expand(5, 100), rtol=0, atol=2e-3)  # rounding of the mean, times 1/σ


@kernel_cases(
    width=[100, 64, 768, 1],
    t=[None, tile(M=4), tile(M=1)],
    strided=[False, True],
    residual=[False, True],
)
def test_norm_backward(
    name: str, width: int, t: Tile | None, strided: bool, residual: bool, precision: str, device: torch.device
) -> None:
    groups, draw = GROUPS[name], Draw(device, DTYPES[precision])
    x, dh, weight = draw(groups.rows, width) + 0.5, draw(groups.rows, width), draw(width)
    beside = draw(groups.rows, width) if residual else None
    mean, rstd, _ = _normed(exact(x), exact(weight), exact(weight), 1e-2)
    stats = torch.stack([mean, rstd]).to(device, torch.float32)
    x_, beside_ = laid(strided, x), laid(not strided, beside)  # their row strides differ
    with forced("norm_backward", t):
        dx = norm_backward(dh, x_, stats, weight, beside_)
    expected = _norm_gradient(exact(dh), exact(x), exact(weight), 1e-2)
    check(precision, dx=(dx, expected if beside is None else expected + exact(beside)))


def _norm_gradient(dh: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """By autograd, not by the kernel's formula."""
    x = x.requires_grad_()
    h = _normed(x, weight, torch.zeros_like(weight), eps)[2]
    return torch.autograd.grad(h, x, dh)[0]


SHAPES = [(96, 64), (100, 100), (64, 70), (33, 256), (1, 1)]  # N of a part, K


@kernel_cases(
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
    site = site_of(draw, groups, parts, rank, width, out)
    P, RP = low_of(draw, groups, site), site.padded_rank
    x_, weight_, residual_ = laid(strided, x, weight, residual)
    linear = FrozenLinear(weight_, bias, None, activation)
    with forced("product" if activation == "none" else "product_activated", t):
        y, kept = forward_product(x_, linear, P, site, groups, residual_, keep)

    u = exact(x) @ exact(weight).T + (0 if bias is None else exact(bias))
    for number, (_, _, start, end) in enumerate(groups.groups()):
        for part in range(parts):
            of_part = slice(part * RP, (part + 1) * RP)
            low = exact(P)[start:end, of_part] @ exact(site.up)[number, of_part]
            u[start:end, part * out : (part + 1) * out] += low
    expected = PHI[activation](u) + (0 if residual is None else exact(residual))
    check(precision, y=(y, expected))
    assert (kept is not None) == (keep and activation != "none")
    if kept is not None:
        check(precision, u=(kept, u))


@kernel_cases(
    ranks=RANKS,
    shape=SHAPES,
    activation=PHI,
    t=PRODUCT_TILES,
    strided=[False, True],
)
def test_backward_product(
    name: str,
    ranks: tuple[int, int],
    shape: tuple[int, int],
    activation: str,
    t: Tile | None,
    strided: bool,
    precision: str,
    device: torch.device,
) -> None:
    groups, (width, inner) = GROUPS[name], shape
    draw = Draw(device, DTYPES[precision])
    dy, weight = draw(groups.rows, inner), draw(inner, width, scale=inner**-0.5)
    site = site_of(draw, groups, *ranks, width, 8)
    Q, u = low_of(draw, groups, site), None if activation == "none" else draw(groups.rows, width)
    sums, dA = None, None
    if u is not None and site.parts == 1:
        tile_rows = max(groups.rows, 1) if t == Tile(variant="torch") else (t or tile(M=32))["BLOCK_M"]
        sums = PartialSums((0, 1), groups, block=1, tile=tile_rows)
        dA = torch.full((sums.counts[1], 1, site.rank, width), float("nan"), device=device)
    with forced("product_backward" if u is None else "product_backward_activated", t):
        dx = backward_product(*laid(strided, dy, weight), Q, site, groups, u, activation, dA)
    expected = exact(dy) @ exact(weight)
    for slot, _, start, end in groups.groups():
        expected[start:end] += exact(Q)[start:end] @ exact(site.down)[slot]
    check(precision, dx=(dx, expected if u is None else expected * _slope(activation, exact(u))))
    if sums is not None and dA is not None and u is not None:
        q, h, (bounds, _) = exact(Q)[:, : site.rank], PHI[activation](exact(u)), sums.bounds()
        right = torch.zeros(len(groups.sizes), site.rank, width, dtype=torch.float64)
        for slot, _, start, end in groups.groups():
            right[slot] += q[start:end].T @ h[start:end]
        summed = [dA[first:end, 0].sum(0) for first, end in bounds.tolist()]
        check(precision, dA=(torch.stack(summed) if summed else right, right))
        assert dA[bounds.max() if summed else 0 :].isnan().all()  # nothing is written after the last partial sum


@kernel_cases(
    ranks=RANKS,
    shape=SHAPES,
    normed=[False, True],
    t=[None, tile(M=16, N=64, K=16), tile(M=64, N=16, K=64), tile(M=32, N=32, K=32)],
    strided=[False, True],
)
def test_adapter_gradients(
    name: str,
    ranks: tuple[int, int],
    shape: tuple[int, int],
    normed: bool,
    t: Tile | None,
    strided: bool,
    precision: str,
    device: torch.device,
) -> None:
    """Q, and from the partial sums dA, dB and dc. P and the input are drawn apart from the adapters."""
    groups, (parts, rank), (out, width), slots = GROUPS[name], ranks, shape, len(GROUPS[name].sizes)
    views, fp32 = groups.views, torch.float32
    draw = Draw(device, DTYPES[precision])
    dy, rows = draw(groups.rows, parts * out), draw(groups.rows, width)
    A = draw(slots, parts + strided, rank, width, dtype=fp32)[:, :parts]
    B = draw(slots, parts + strided, out, rank, scale=out**-0.5, dtype=fp32)[:, :parts]
    c = draw(slots, views, parts, rank + strided, dtype=fp32)[..., :rank]
    folded = fold_adapters(A, B, c, DTYPES[precision])
    site, RP = folded.site((0, parts)), padded(rank)
    P, x = low_of(draw, groups, site), exact(rows)
    if normed:
        weight, bias = draw(width), draw(width)
        mean, rstd, x = _normed(x, exact(weight), exact(bias), 1e-2)
        stats = torch.stack([mean, rstd]).to(device, fp32)
        given = LinearInput(laid(strided, rows), Norm(weight, bias, 1e-2), stats)
    else:
        given = LinearInput(laid(strided, rows))
    block = (t or tile(M=32))["BLOCK_M"]
    partials = folded.partial_sums(folded.reserve((0, parts), groups, block))
    with forced("adapter_gradients", t):
        Q = adapter_gradients(laid(strided, dy), P, site, groups, *partials, given)
    dA, dB, dc = (torch.empty_like(grad, memory_format=torch.contiguous_format) for grad in (A, B, c))
    sum_partials(branch_tensors(A, B, c), folded, dA, dB, dc.flatten(2))

    expected_Q = torch.full((groups.rows, parts * RP), float("nan"), dtype=torch.float64)
    right = [torch.zeros(grad.shape, dtype=torch.float64) for grad in (A, B, c)]
    for number, (slot, view, start, end) in enumerate(groups.groups()):
        for part in range(parts):
            of_part, ranks_of = slice(part * RP, (part + 1) * RP), slice(part * RP, part * RP + rank)
            g = exact(dy)[start:end, part * out : (part + 1) * out]
            expected_Q[start:end, of_part] = g @ exact(site.up)[number, of_part].T
            right[0][slot, part] += exact(Q)[start:end, ranks_of].T @ x[start:end]  # Q as it was rounded
            T = g.T @ exact(P)[start:end, ranks_of]
            right[1][slot, part] += T * exact(c)[slot, view, part]
            right[2][slot, view, part] = (exact(B)[slot, part] * T).sum(0)
    check(precision, Q=(Q, expected_Q))
    check(precision if normed else SUMS[precision], dA=(dA, right[0]))  # a norm's output is rounded
    check(SUMS[precision], dB=(dB, right[1]), dc=(dc, right[2]))


def test_without_partial_sums_q_is_the_same(device: torch.device) -> None:
    groups, draw = RowGroups((20, 13), views=2), Draw(device, torch.float32)
    site, dy, x = site_of(draw, groups, 2, 4, 40, 48), draw(66, 96), draw(66, 40)
    P, T, dA = low_of(draw, groups, site), *(torch.empty(9, 2, 4, n, device=device) for n in (48, 40))
    with_sums = adapter_gradients(dy, P, site, groups, T, dA, LinearInput(x))
    assert torch.equal(adapter_gradients(dy, P, site, groups), with_sums)
    assert torch.equal(adapter_gradients(dy, P, site, groups, T), with_sums)


@cases(width=[1, 64, 100], rows=[0, 1, 37])
def test_normalize(rows: int, width: int, device: torch.device) -> None:
    draw = Draw(device, torch.float32)
    x, dy = draw(rows, width).requires_grad_(), draw(rows, width)
    ours = normalize(x)
    right = torch.nn.functional.normalize(exact(x).requires_grad_(), dim=-1)
    assert_close(ours, right, (1e-6, 1e-6), "y")
    (dx,) = torch.autograd.grad(ours, x, dy)
    of = exact(x).requires_grad_()
    (expected,) = torch.autograd.grad(torch.nn.functional.normalize(of, dim=-1), of, exact(dy))
    if width > 1:  # of one column the gradient is rounding alone
        assert_close(dx, expected, (2e-6, 2e-6), "dx")


@pytest.mark.parametrize("activation", [name for name in PHI if name != "none"])
def test_activations_far_out(activation: str, device: torch.device) -> None:
    """φ and φ' where exponentials overflow, with an absolute error in units of max(1, |u|)."""
    u = torch.cat([torch.linspace(-8, 8, 157), torch.tensor([-1000.0, -88.0, -20.0, 20.0, 88.0, 1000.0, 0.0])])
    u, groups, n = u.to(device), RowGroups((1,)), len(u)
    site = SiteAdapters(torch.zeros(1, 16, n), torch.zeros(1, 16, n), torch.zeros(1, 1), 1, 1)
    site = SiteAdapters(*(t.to(device) for t in (site.down, site.up, site.nan_flag)), 1, 1)
    x, low, small = torch.zeros(1, 1, device=device), torch.zeros(1, 16, device=device), PRODUCT_TILES[1]
    linear = FrozenLinear(torch.zeros(n, 1, device=device), u, None, activation)
    one, ones = torch.ones(1, 1, device=device), torch.ones(1, n, device=device)
    with forced("product_activated", small):
        y, _ = forward_product(x, linear, low, site, groups, None, True)
    with forced("product_backward_activated", small):
        slope = backward_product(one, ones, low, site, groups, u[None], activation)
    v = exact(u)
    for ours, value in ((y, PHI[activation](v)), (slope, _slope(activation, v))):
        assert ((exact(ours)[0] - value).abs() <= 1e-6 * v.abs().clamp(min=1)).all()


def _slope(activation: str, u: Tensor) -> Tensor:
    """φ'(u) by autograd."""
    u = u.detach().requires_grad_()
    return torch.autograd.grad(PHI[activation](u).sum(), u)[0]


@pytest.mark.parametrize("t", [PRODUCT_TILES[0], PRODUCT_TILES[3]], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("groups", [RowGroups((50,) * 5), RowGroups((1, 200, 49), views=1)], ids=str)
def test_same_bits_whatever_the_neighbors(groups: RowGroups, t: Tile | None, device: torch.device) -> None:
    """The rows of a slot come out the same when every other slot holds other numbers."""
    outputs = []
    for seed in (1, 2):
        draw, own = Draw(device, torch.float32, seed), Draw(device, torch.float32)
        x, weight, site = draw(groups.rows, 64), own(96, 64), site_of(draw, groups, 1, 4, 64, 96)
        P = low_of(draw, groups, site)
        _, _, start, end = list(groups.groups())[1]
        x[start:end], P[start:end] = own(end - start, 64), own(end - start, 16)
        site.up[1] = own(16, 96)
        with forced("product", t):
            y, _ = forward_product(x, FrozenLinear(weight), P, site, groups)
        outputs.append(y[start:end])
    assert torch.equal(*outputs)
