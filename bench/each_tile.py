"""The launchers of the tiled kernels on random operands of a linear, beside library products for the same.

Run as a program, it launches every tile of this GPU's table once, for compute-sanitizer and ncu:

    compute-sanitizer python -m fastdlp.bench.each_tile
    ncu --profile-from-start off --clock-control none python -m fastdlp.bench.each_tile --large 5

The first takes 5,120 rows, N 256 and K 192, of groups of 160 rows, which end within a tile of 64 rows or more; the
second the kernels that take most of a step, in bf16 on ViT-B/32 for ten clients.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdlp.bench.common import synchronize
from fastdlp.bench.kernels import TOWERS, Case, Operands, cases, make_operands
from fastdlp.engine.device import DTYPES, pick_device
from fastdlp.kernels.activation import ACTIVATIONS
from fastdlp.kernels.frozen import FrozenLinear, Norm
from fastdlp.kernels.tiles import Tile, architecture, table, tile_for, tile_of

ACTIVATION = "quick_gelu"
EPS = 1e-5
PRECISIONS = {torch.finfo(dtype).bits // 8: name for name, dtype in DTYPES.items()}
CASE = Case("tile", "fc2", clients=16, rows=160, parts=1, out=256, width=192, bias=True)  # fc2 has a residual

# The linears that run through a kernel; those that take most of a step first.
LINEARS = {
    "product": ("qkv", "out", "fc2"),
    "product_activated": ("fc1",),
    "product_backward": ("qkv", "out", "fc1"),
    "product_backward_activated": ("fc2",),
    "adapter_gradients": ("qkv", "out", "fc1", "fc2"),
    "norm_down": ("qkv", "fc1"),
    "down": ("out", "fc2"),
    "norm_backward": ("qkv",),
}


@dataclass(frozen=True)
class Work:
    """A kernel on one shape: `run` launches it in a tile, `right` computes the same with the library.

    `out` and `width` are what the launcher looks up in the tile table.
    """

    out: int
    width: int
    run: Callable[[Tile], list[Tensor]]
    right: Callable[[], list[Tensor]]


def make_work(kernel: str, case: Case, dtype: torch.dtype, device: torch.device) -> Work:
    """A kernel of LINEARS. Partial sums are added up in `run`: a tile of few rows has many."""
    from fastdlp.kernels import norm as norms
    from fastdlp.kernels import product as products
    from fastdlp.kernels.dual_lora_ops import fold_adapters
    from fastdlp.kernels.gradients import LinearInput, adapter_gradients

    o = make_operands(case, dtype, device)
    folded = fold_adapters(o.A, o.B, o.c, dtype)
    site = folded.site((0, case.parts))
    low = torch.bmm(_by_slot(o, o.x), site.down.mT).flatten(0, 1)
    Q = low.flip(0)  # of the shape and magnitude of dY B'
    columns, width = case.parts * case.out, case.width
    residual = o.dy if case.linear in ("out", "fc2") else None
    linear = FrozenLinear(o.weight, o.bias, None, ACTIVATION if kernel == "product_activated" else "none")
    weight, bias = (torch.randn(2, width, device=device) + 1).to(dtype).unbind()
    norm, library = Norm(weight, bias, EPS), Tile(form="torch")
    dh, stats = o.x.flip(0), _stats(o.x)

    def product(tile: Tile) -> list[Tensor]:
        y, kept = products.forward_product(o.x, linear, low, site, o.groups, residual, save=True, tile=tile)
        return [y] if kept is None else [y, kept]

    def product_backward(tile: Tile) -> list[Tensor]:
        return [products.backward_product(o.dy, o.weight, Q, site, o.groups, tile=tile)]

    def activated(tile: Tile) -> list[Tensor]:
        """dX before an activation, and dA; the partial sums of T are 0."""
        rows = len(o.x) if tile.form == "torch" else tile["BLOCK_M"]
        own = fold_adapters(o.A, o.B, o.c, dtype)
        T, sums = own.partial_sums(own.reserve((0, 1), o.groups, len(o.x), rows))
        T.zero_()
        dx = products.backward_product(o.dy, o.weight, Q, site, o.groups, o.x, ACTIVATION, sums, tile)
        return [dx, _summed(o, own)[0]]

    def activated_by_library() -> list[Tensor]:
        dx = products.library_backward(o.dy, o.weight, Q, site, o.groups, o.x, ACTIVATION)
        h, q = ACTIVATIONS[ACTIVATION](o.x.float()), Q[:, : site.rank].float()
        return [dx, torch.bmm(_by_slot(o, q).mT, _by_slot(o, h))[:, None]]

    def gradients(tile: Tile) -> list[Tensor]:
        """Q, dA, dB and dc."""
        own = fold_adapters(o.A, o.B, o.c, dtype)
        sums = own.partial_sums(own.reserve((0, case.parts), o.groups, tile["BLOCK_M"]))
        q = adapter_gradients(o.dy, low, own.site((0, case.parts)), o.groups, *sums, LinearInput(o.x), tile)
        return [q, *_summed(o, own)]

    def normed() -> list[Tensor]:
        h = F.layer_norm(o.x, (width,), weight, bias, EPS)
        return [h, _stats(o.x), torch.bmm(_by_slot(o, h), site.down.mT).flatten(0, 1)]

    def norm_backward(tile: Tile) -> list[Tensor]:
        return [norms.norm_backward(dh, o.x, stats, weight, dh, tile)]

    def norm_backward_by_library() -> list[Tensor]:
        x = o.x.detach().requires_grad_()
        return [torch.autograd.grad(F.layer_norm(x, (width,), weight, bias, EPS), x, dh)[0] + dh]

    works: dict[str, Work] = {
        "product": Work(columns, width, product, partial(product, library)),
        "product_activated": Work(columns, width, product, partial(product, library)),
        "product_backward": Work(width, columns, product_backward, partial(product_backward, library)),
        "product_backward_activated": Work(width, columns, activated, activated_by_library),
        "adapter_gradients": Work(columns, width, gradients, partial(_gradients_by_library, o, low, site)),
        "down": Work(0, width, lambda tile: [norms.down_product(o.x, None, site, o.groups, tile)[2]], lambda: [low]),
        "norm_down": Work(0, width, lambda tile: list(norms.down_product(o.x, norm, site, o.groups, tile)), normed),
        "norm_backward": Work(0, width, norm_backward, norm_backward_by_library),
    }
    return works[kernel]


def _summed(o: Operands, folded: Any) -> list[Tensor]:
    """dA, dB and dc."""
    from fastdlp.kernels.dual_lora_ops import branch_tensors
    from fastdlp.kernels.fold import sum_partials

    dA, dB, dc = (torch.empty_like(t) for t in (o.A, o.B, o.c))
    sum_partials(branch_tensors(o.A, o.B, o.c), folded, dA, dB, dc.flatten(2))
    return [dA, dB, dc]


def _gradients_by_library(o: Operands, low: Tensor, site: Any) -> list[Tensor]:
    """Q, dA, dB and dc in library products."""
    slots, parts, out, rank = o.B.shape
    views, padded = o.groups.views, site.padded_rank
    dy = o.dy.float().view(slots * views, -1, parts, out)
    up = site.up.float().view(-1, parts, padded, out)
    P = low.float().view(slots * views, -1, parts, padded)[..., :rank]
    Q = torch.einsum("gmpn,gprn->gmpr", dy, up).reshape(slots, -1, parts, padded).to(o.x.dtype)
    T = torch.einsum("gmpn,gmpr->gpnr", dy, P).view(slots, views, parts, out, rank)
    dA = torch.einsum("smpr,smk->sprk", Q[..., :rank].float(), _by_slot(o, o.x).float())
    dB = (T * o.c[:, :, :, None]).sum(1)
    dc = (T * o.B[:, None]).sum(3)
    return [Q.flatten(2).flatten(0, 1), dA, dB, dc]


def _stats(x: Tensor) -> Tensor:
    """Mean and 1/σ of every row, [2, M] fp32."""
    x = x.float()
    return torch.stack([x.mean(1), (x.var(1, correction=0) + EPS).rsqrt()])


def _by_slot(o: Operands, rows: Tensor) -> Tensor:
    """[M, n] → [slots, M / slots, n]: all slots have as many rows."""
    return rows.view(len(o.A), -1, rows.shape[1])


# -- the program --------------------------------------------------------------------------------------------


def describe(tile: Tile) -> str:
    """A tile in a few characters."""
    if tile.form == "torch":
        return "library"
    blocks = " ".join(f"{name.removeprefix('BLOCK_')} {size}" for name, size in tile.blocks.items())
    chunk = f", chunk {tile.chunk}" if tile.chunk else ""
    form = ", descriptors" if tile.form == "descriptor" else ""
    return f"{blocks}, {tile.warps} warps, {tile.stages} stages{chunk}{form}"


@dataclass(frozen=True)
class TableRow:
    """A row of the table for one precision."""

    kernel: str
    precision: str
    tile: Tile

    def __str__(self) -> str:
        return f"{self.kernel}, {self.precision}, {describe(self.tile)}"


def table_rows(device: torch.device) -> list[TableRow]:
    """Of the device's architecture and of LINEARS' kernels, without rows that take the library's product."""
    return [
        TableRow(row["kernel"], PRECISIONS[itemsize], tile_of(row))
        for row in table()[architecture(device)]["rows"]
        if row["kernel"] in LINEARS and tile_of(row).form != "torch"
        for itemsize in row["itemsize"]
    ]


def large(count: int) -> Iterator[tuple[str, Case]]:
    """The first `count` kernels of LINEARS, each on its first linear."""
    for kernel in list(LINEARS)[:count]:
        yield kernel, cases("ViT-B-32", TOWERS["ViT-B-32"], 10, 32, LINEARS[kernel][:1])[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", type=int, metavar="N", help="the N kernels that take most of a step, once each")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    given = parser.parse_args()
    device = pick_device(given.device)
    launches = [(row.kernel, CASE, row.precision, row.tile) for row in table_rows(device)]
    if given.large is not None:
        launches = [(kernel, case, "bf16", None) for kernel, case in large(given.large)]
    for kernel, case, precision, tile in launches:
        work = make_work(kernel, case, DTYPES[precision], device)
        tile = tile or tile_for(kernel, device, 2, case.all_rows, work.out, work.width)
        print(f"{kernel}, {precision}, {case.all_rows} rows: {describe(tile)}")
        work.run(tile)  # compiles
        synchronize(device)
        if device.type == "cuda":
            torch.cuda.profiler.start()
            work.run(tile)
            synchronize(device)
            torch.cuda.profiler.stop()


if __name__ == "__main__":
    main()
