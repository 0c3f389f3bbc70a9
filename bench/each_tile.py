"""The kernels that take a tile, in the pass through a tower's block that launches them, forward and backward.

Run as a program, it launches every tile of this GPU's table twice, for compute-sanitizer and ncu:

    compute-sanitizer python -m fastdlp.bench.each_tile
    ncu --profile-from-start off --clock-control none python -m fastdlp.bench.each_tile --large 5

The first takes 5,120 rows, N 256 and K 192, of groups of 160 rows, which end within a tile of 64 rows or more; the
second the kernels that take most of a step, in bf16 on ViT-B/32 for ten clients, each on its largest linear.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fastdlp.adapters.branches import TowerShape
from fastdlp.bench.cases import ACTIVATIONS, BRANCHES, VIEWS, Model, empty_tower
from fastdlp.bench.common import synchronize
from fastdlp.bench.kernels import TOWERS
from fastdlp.clip.stem import map_tensors
from fastdlp.engine.autotune import Run
from fastdlp.engine.autotune_units import Pass, pass_run
from fastdlp.engine.device import DTYPES, pick_device
from fastdlp.kernels.tiles import INTERPRETER, Shape, Tile, architecture, assume, forced, table, tile_for, tile_of

PRECISIONS = {torch.finfo(dtype).bits // 8: name for name, dtype in DTYPES.items()}
# The launcher of each kernel that takes a tile, by its name in `half_blocks`; those that take most of a step first.
LAUNCHERS = {
    "product": "forward_product",
    "product_activated": "forward_product",
    "product_backward": "backward_product",
    "product_backward_activated": "backward_product",
    "adapter_gradients": "adapter_gradients",
    "norm_down": "down_product",
    "down": "down_product",
    "norm_backward": "norm_backward",
}


@dataclass(frozen=True)
class Case:
    """The blocks of a tower of this shape, for clients with as many images of `tokens` each in two views."""

    shape: TowerShape
    clients: int
    images: int
    tokens: int

    @property
    def rows(self) -> int:
        """M."""
        return self.clients * self.images * len(VIEWS[0]) * self.tokens

    def run(self, precision: str, device: torch.device, halves: Sequence[str] = ("attention", "mlp")) -> Run:
        """Function of the backend of these halves of a block: outputs and all gradients on random operands.

        With one head, too wide for the fused attention, so that `out` computes its P in a kernel of its own.
        """
        generator = torch.Generator(device).manual_seed(0)

        def random(empty: Tensor) -> Tensor:
            scale = 1 / math.sqrt(empty.shape[1]) if empty.ndim == 2 else 0.5
            return (torch.randn(empty.shape, generator=generator, device=device) * scale).to(empty.dtype)

        model = Model("", self.tokens, heads=1, causal=False, shape=self.shape)
        tower = map_tensors(empty_tower(model, ACTIVATIONS[0], DTYPES[precision]), random)
        one = Pass(self.clients, self.images, VIEWS[0])
        return pass_run(halves, replace(tower, pool="avg"), model.shape, self.tokens, one, BRANCHES)


CASE = Case(TowerShape(1, width=192, mlp=256, embed=64), clients=16, images=32, tokens=5)
SHAPES = {name: replace(TOWERS[name].shape, layers=1) for name in ("ViT-B-32", "ViT-L-14")}
LARGE = Case(SHAPES["ViT-B-32"], clients=10, images=32, tokens=50)


@contextmanager
def tiled(
    kernel: str, tile: Tile | None, run: Callable[[], list[Tensor]]
) -> Iterator[tuple[list[Tensor], dict[Shape, list[Callable[[], Any]]]]]:
    """What `run` returns with a kernel in this tile (None: the table's), and the calls of the kernel's launcher in it.

    The calls are by (rows, N, K) as looked up in the table, and inside they can be repeated in the same tile. Beside a
    given tile the other kernels run in the interpreter's, which fit every GPU, so that an error is the tile's.
    """
    from fastdlp.kernels import half_blocks

    launcher = getattr(half_blocks, LAUNCHERS[kernel])
    calls: dict[Shape, list[Callable[[], Any]]] = {}
    with forced(kernel, tile) as shapes:

        def recorded(*operands: Any) -> Any:
            before = len(shapes)
            result = launcher(*operands)
            if len(shapes) > before:  # other kernels share the launcher
                calls.setdefault(shapes[-1], []).append(partial(launcher, *operands))
            return result

        others = nullcontext() if tile is None else assume(INTERPRETER)
        with mock.patch.object(half_blocks, LAUNCHERS[kernel], recorded), others:
            outputs = run()
        with torch.no_grad():
            yield outputs, calls


def describe(tile: Tile) -> str:
    """A tile in a few characters."""
    if tile.variant == "torch":
        return "library"
    blocks = " ".join(f"{name.removeprefix('BLOCK_')} {size}" for name, size in tile.blocks.items())
    variant = ", descriptors" if tile.variant == "descriptor" else ""
    return f"{blocks}, {tile.warps} warps, {tile.stages} stages{variant}"


def table_rows(device: torch.device) -> list[tuple[str, str, Tile]]:
    """(kernel, precision, tile) of the device's architecture, without rows that take the library's product."""
    return [
        (row["kernel"], PRECISIONS[itemsize], tile_of(row))
        for row in table()[architecture(device)]["rows"]
        if row["kernel"] in LAUNCHERS and tile_of(row).variant != "torch"
        for itemsize in row["itemsize"]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", type=int, metavar="N", help="the N kernels that take most of a step, once each")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    given = parser.parse_args()
    device = pick_device(given.device)
    launches: Sequence[tuple[str, str, Tile | None]] = table_rows(device)
    case, halves = CASE, ["mlp"]  # which launches every kernel
    if given.large is not None:
        launches = [(kernel, "bf16", None) for kernel in list(LAUNCHERS)[: given.large]]
        case, halves = LARGE, ["attention", "mlp"]
    runs = {name: case.run(name, device, halves) for name in dict.fromkeys(name for _, name, _ in launches)}
    for kernel, precision, tile in launches:
        with tiled(kernel, tile, partial(runs[precision], "triton")) as (_, calls):  # compiles
            shape = max(calls)
            tile = tile or tile_for(kernel, device, DTYPES[precision].itemsize, *shape)
            print(f"{kernel}, {precision}, {case.rows} rows: {describe(tile)}")
            synchronize(device)
            if device.type == "cuda":
                torch.cuda.profiler.start()
                calls[shape][0]()
                synchronize(device)
                torch.cuda.profiler.stop()


if __name__ == "__main__":
    main()
