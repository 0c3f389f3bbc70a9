"""The operator's launchers as work that can be timed: random operands of a linear, and library products to compare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdlp.bench.forms import Case, Operands, make_operands
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

    What a tile leaves to be summed is summed in `run`: a tile of few rows makes many shares.
    """
    from fastdlp.kernels import dual_lora_launch as launchers

    o = make_operands(case, dtype, device)
    down, up = launchers.fold(o.A, o.B, o.c, dtype)
    low = torch.bmm(_by(case.clients, o.x), down.mT).flatten(0, 1)
    Q = low.flip(0)  # of the shape and size of dY B'
    parts, columns, width = case.parts, case.parts * case.out, case.width
    activation = ACTIVATION if kernel.endswith("activated") else "none"
    residual = o.dy if case.linear in ("out", "fc2") else None
    slope = None if activation == "none" else o.dy.flip(0)
    weight, bias = (torch.randn(2, width, device=device) + 1).to(dtype).unbind()

    def product(tile: Tile) -> list[Tensor]:
        y, kept = launchers.forward_product(
            o.x, o.weight, o.bias, low, up, parts, o.groups, activation, residual, keep=True, tile=tile
        )
        return [y] if kept is None else [y, kept]

    def product_backward(tile: Tile) -> list[Tensor]:
        return [launchers.backward_product(o.dy, o.weight, Q, down, o.groups, tile)]

    def adapter_gradients(tile: Tile) -> list[Tensor]:
        du, q, dB, dc, of_slot, of_group = launchers.adapter_gradients(o.dy, slope, low, o.B, o.c, up, o.groups, tile)
        _, dB, dc = launchers.sum_chunks(_one_share(case.clients, dB), (dB, of_slot), (dc, of_group))
        return [du, q, dB, dc]

    def down_gradient(tile: Tile) -> list[Tensor]:
        shares = launchers.down_gradient(o.x, Q, o.groups, tile)
        others = [_one_share(count, shares[0]) for count in (case.clients, len(up))]
        return [launchers.sum_chunks(shares, *others)[0]]

    def norm_down(tile: Tile) -> list[Tensor]:
        return list(launchers.norm_down_product(o.x, weight, bias, EPS, down, o.groups, tile))

    def normed() -> list[Tensor]:
        h = F.layer_norm(o.x, (width,), weight, bias, EPS)
        return [h, _stats(o.x), torch.bmm(_by(case.clients, h), down.mT).flatten(0, 1)]

    library = Tile(form="torch")
    if kernel in ("product", "product_activated"):
        return Work(columns, width, product, lambda: product(library))
    if kernel == "product_backward":
        return Work(width, columns, product_backward, lambda: product_backward(library))
    if kernel in ("adapter_gradients", "adapter_gradients_activated"):
        return Work(columns, 0, adapter_gradients, lambda: _adapter_gradients(o, slope, low, up))
    if kernel == "down_gradient":
        dA = torch.bmm(_by(case.clients, Q).mT.float(), _by(case.clients, o.x).float())
        return Work(0, width, down_gradient, lambda: [dA])
    if kernel == "down":
        return Work(0, width, lambda tile: [launchers.down_product(o.x, down, o.groups, tile)], lambda: [low])
    if kernel == "norm_down":
        return Work(0, width, norm_down, normed)
    if kernel == "norm_backward":
        dh, stats, x = o.x.flip(0), _stats(o.x), o.x.detach().requires_grad_()
        h = F.layer_norm(x, (width,), weight, bias, EPS)
        return Work(
            0,
            width,
            lambda tile: [launchers.norm_backward(dh, o.x, stats, weight, tile)],
            lambda: list(torch.autograd.grad(h, x, dh)),
        )
    raise ValueError(f"no work for the kernel {kernel!r}")


def _adapter_gradients(o: Operands, slope: Tensor | None, low: Tensor, up: Tensor) -> list[Tensor]:
    """dU, Q, dB and dc in library products."""
    slots, parts, out, rank = o.B.shape
    views = o.groups.views
    du = o.dy if slope is None else o.dy * slope
    by_group = du.float().view(slots * views, -1, parts, out)
    P = low.float().view(slots * views, -1, parts, rank)
    Q = torch.einsum("gmpn,gprn->gmpr", by_group, up.float().view(-1, parts, rank, out))
    T = torch.einsum("gmpn,gmpr->gpnr", by_group, P).view(slots, views, parts, out, rank)
    dB = (T * o.c[:, :, :, None]).sum(1)
    dc = (T * o.B[:, None]).sum(3)
    return [du, Q.reshape(len(du), -1), dB, dc.flatten(0, 1)]


def _stats(x: Tensor) -> Tensor:
    """Mean and 1/σ of every row, [2, M] fp32."""
    x = x.float()
    return torch.stack([x.mean(1), (x.var(1, correction=0) + EPS).rsqrt()])


def _by(slots: int, rows: Tensor) -> Tensor:
    """[M, n] → [slots, M / slots, n]: all slots have as many rows."""
    return rows.view(slots, -1, rows.shape[1])


def _one_share(owners: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """A share of one entry for every owner: what `sum_chunks` is given in the place of a sum that is not wanted."""
    return like.new_zeros(owners, 1), torch.arange(owners + 1, dtype=torch.int32, device=like.device)
