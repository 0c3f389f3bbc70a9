"""The operator's launchers as work that can be timed: random operands of a linear, and library products to compare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdlp.bench.forms import Case, Operands, make_operands
from fastdlp.kernels.activation import ACTIVATIONS
from fastdlp.kernels.frozen import FrozenLinear, Norm
from fastdlp.kernels.low_rank import FoldedAdapters, SiteAdapters
from fastdlp.kernels.tiles import Tile

ACTIVATION = "quick_gelu"
EPS = 1e-5


@dataclass(frozen=True)
class Work:
    """A kernel on one shape: `run` launches it in a tile, `right` does the same with the library.

    `out` and `width` are what the launcher asks the tile table for.
    """

    out: int
    width: int
    run: Callable[[Tile], list[Tensor]]
    right: Callable[[], list[Tensor]]


def make_work(kernel: str, case: Case, dtype: torch.dtype, device: torch.device) -> Work:
    """The launcher of a kernel on random operands of a linear, and library products for the same.

    Partial sums are added up in `run`: a tile of few rows has many.
    """
    from fastdlp.kernels import norm as norms
    from fastdlp.kernels import product as products
    from fastdlp.kernels.dual_lora_ops import fold_adapters

    o = make_operands(case, dtype, device)
    site = fold_adapters(o.A, o.B, o.c, dtype).site((0, case.parts))
    low = torch.bmm(_by(case.clients, o.x), site.down.mT).flatten(0, 1)
    Q = low.flip(0)  # of the shape and size of dY B'
    columns, width = case.parts * case.out, case.width
    residual = o.dy if case.linear in ("out", "fc2") else None
    linear = FrozenLinear(o.weight, o.bias, None, ACTIVATION if kernel == "product_activated" else "none")
    weight, bias = (torch.randn(2, width, device=device) + 1).to(dtype).unbind()
    norm = Norm(weight, bias, EPS)

    def product(tile: Tile) -> list[Tensor]:
        y, kept = products.forward_product(o.x, linear, low, site, o.groups, residual, save=True, tile=tile)
        return [y] if kept is None else [y, kept]

    def product_backward(tile: Tile) -> list[Tensor]:
        return [products.backward_product(o.dy, o.weight, Q, site, o.groups, tile=tile)]

    def normed() -> list[Tensor]:
        h = F.layer_norm(o.x, (width,), weight, bias, EPS)
        return [h, _stats(o.x), torch.bmm(_by(case.clients, h), site.down.mT).flatten(0, 1)]

    library = Tile(form="torch")
    if kernel in ("product", "product_activated"):
        return Work(columns, width, product, lambda: product(library))
    if kernel == "product_backward":
        return Work(width, columns, product_backward, lambda: product_backward(library))
    if kernel == "product_backward_activated":
        return Work(width, columns, partial(_activated, o, site, Q), partial(_activated_by_library, o, site, Q))
    if kernel == "adapter_gradients":
        run = partial(_adapter_gradients, o, low)
        return Work(columns, width, run, lambda: _gradients_by_library(o, low, site))
    if kernel == "down":
        return Work(0, width, lambda tile: [norms.down_product(o.x, None, site, o.groups, tile)[2]], lambda: [low])
    if kernel == "norm_down":
        return Work(0, width, lambda tile: list(norms.down_product(o.x, norm, site, o.groups, tile)), normed)
    if kernel == "norm_backward":
        dh, stats, x = o.x.flip(0), _stats(o.x), o.x.detach().requires_grad_()
        h = F.layer_norm(x, (width,), weight, bias, EPS)
        return Work(
            0,
            width,
            lambda tile: [norms.norm_backward(dh, o.x, stats, weight, dh, tile)],
            lambda: [torch.autograd.grad(h, x, dh)[0] + dh],
        )
    raise ValueError(f"no work for the kernel {kernel!r}")


def _activated(o: Operands, site: SiteAdapters, Q: Tensor, tile: Tile) -> list[Tensor]:
    """dX behind an activation, and dA; T has one partial sum a group, which is 0."""
    from fastdlp.kernels.dual_lora_ops import fold_adapters
    from fastdlp.kernels.product import backward_product

    rows = len(o.x) if tile.form == "torch" else tile["BLOCK_M"]
    folded = fold_adapters(o.A, o.B, o.c, o.x.dtype)
    T, dA = folded.partial_sums(folded.reserve((0, 1), o.groups, len(o.x), rows))
    T.zero_()
    dx = backward_product(o.dy, o.weight, Q, site, o.groups, o.x, ACTIVATION, dA, tile)
    return [dx, _summed(o, folded)[0]]


def _activated_by_library(o: Operands, site: SiteAdapters, Q: Tensor) -> list[Tensor]:
    """The same in library products."""
    from fastdlp.kernels.product import library_backward

    dx = library_backward(o.dy, o.weight, Q, site, o.groups, o.x, ACTIVATION)
    h, q = ACTIVATIONS[ACTIVATION](o.x.float()), Q[:, : site.rank].float()
    return [dx, torch.bmm(_by(len(o.A), q).mT, _by(len(o.A), h))[:, None]]


def _adapter_gradients(o: Operands, low: Tensor, tile: Tile) -> list[Tensor]:
    """Q, dA, dB and dc, the partial sums added up."""
    from fastdlp.kernels.dual_lora_ops import fold_adapters
    from fastdlp.kernels.gradients import LinearInput, adapter_gradients

    parts = o.A.shape[1]
    folded = fold_adapters(o.A, o.B, o.c, o.x.dtype)
    partials = folded.partial_sums(folded.reserve((0, parts), o.groups, tile["BLOCK_M"]))
    Q = adapter_gradients(o.dy, low, folded.site((0, parts)), o.groups, *partials, LinearInput(o.x), tile)
    return [Q, *_summed(o, folded)]


def _summed(o: Operands, folded: FoldedAdapters) -> list[Tensor]:
    """dA, dB and dc."""
    from fastdlp.kernels.dual_lora_ops import branch_tensors
    from fastdlp.kernels.fold import sum_partials

    dA, dB, dc = (torch.empty_like(t) for t in (o.A, o.B, o.c))
    sum_partials(branch_tensors(o.A, o.B, o.c), folded, dA, dB, dc.flatten(2))
    return [dA, dB, dc]


def _gradients_by_library(o: Operands, low: Tensor, site: SiteAdapters) -> list[Tensor]:
    """The same in library products."""
    slots, parts, out, rank = o.B.shape
    views, padded = o.groups.views, site.padded_rank
    dy = o.dy.float().view(slots * views, -1, parts, out)
    up = site.up.float().view(-1, parts, padded, out)
    P = low.float().view(slots * views, -1, parts, padded)[..., :rank]
    Q = torch.einsum("gmpn,gprn->gmpr", dy, up).reshape(slots, -1, parts, padded).to(o.x.dtype)
    T = torch.einsum("gmpn,gmpr->gpnr", dy, P).view(slots, views, parts, out, rank)
    dA = torch.einsum("smpr,smk->sprk", Q[..., :rank].float(), _by(slots, o.x).float())
    dB = (T * o.c[:, :, :, None]).sum(1)
    dc = (T * o.B[:, None]).sum(3)
    return [Q.flatten(2).flatten(0, 1), dA, dB, dc]


def _stats(x: Tensor) -> Tensor:
    """Mean and 1/σ of every row, [2, M] fp32."""
    x = x.float()
    return torch.stack([x.mean(1), (x.var(1, correction=0) + EPS).rsqrt()])


def _by(slots: int, rows: Tensor) -> Tensor:
    """[M, n] → [slots, M / slots, n]: all slots have as many rows."""
    return rows.view(slots, -1, rows.shape[1])
