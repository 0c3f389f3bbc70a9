"""The tile, or the variant, of a kernel for a shape: read from `tiles.json`, with no search at run time.

The table is by architecture, kernel, element size and shape; `fastdlp bench tune` measures it on a GPU and writes it.
For an architecture whose `measured` is null, tiles were chosen from registers, shared memory and waves only; there
`choose_backend` selects torch for "auto", because Triton has not been measured to be faster.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files
from typing import Any

import torch

INTERPRETER = "interpreter"
FALLBACK = "80"  # for every architecture after it that has no table of its own


@dataclass(frozen=True)
class Tile:
    """Block sizes of a kernel: `blocks` are its constexprs by name, `chunk` the entries of one partial sum.

    variant: of a product: "triton" (pointers), "descriptor" (persistent, with Hopper's tensor descriptors) or
    "torch" (library calls).
    """

    variant: str = "triton"
    blocks: dict[str, int] = field(default_factory=dict)
    warps: int = 4
    stages: int = 2
    chunk: int = 0

    def __getitem__(self, block: str) -> int:
        return self.blocks[block]

    @property
    def launch(self) -> dict[str, int]:
        """Keyword arguments of a launch."""
        return {**self.blocks, "num_warps": self.warps, "num_stages": self.stages}


@lru_cache(maxsize=1)
def table() -> dict[str, Any]:
    """The checked-in table."""
    return json.loads((files("fastdlp.kernels") / "tiles.json").read_text())


_assumed: str | None = None  # a plain global: on a GPU the backward runs in autograd's own threads


@contextmanager
def assume(architecture: str) -> Iterator[None]:
    """Use the tiles of this architecture on any device, to compile without a GPU."""
    global _assumed
    before, _assumed = _assumed, architecture
    try:
        yield
    finally:
        _assumed = before


Shape = tuple[int, int, int]  # rows, out, width as `tile_for` takes them
_forced: tuple[str, Tile | None, list[Shape]] | None = None


@contextmanager
def forced(kernel: str, tile: Tile | None) -> Iterator[list[Shape]]:
    """Use one tile for all shapes of a kernel, None: the table's; lists the shapes that are looked up inside."""
    global _forced
    shapes: list[Shape] = []
    before, _forced = _forced, (kernel, tile, shapes)
    try:
        yield shapes
    finally:
        _forced = before


def architecture(device: torch.device) -> str:
    """The table's key for a device: "80", "90", or the interpreter's for a CPU."""
    if _assumed is not None:
        return _assumed
    if device.type == "cpu":
        return INTERPRETER
    major, minor = torch.cuda.get_device_capability(device)
    key = f"{major}{minor}"
    return key if key in table() else FALLBACK


MULTIPROCESSORS = {"80": 108, "90": 132, INTERPRETER: 3}  # of an A100, an H100 or H200, and for tests


def multiprocessors(device: torch.device) -> int:
    """The number of programs of a persistent kernel."""
    if device.type != "cuda":
        return MULTIPROCESSORS[architecture(device)]
    return torch.cuda.get_device_properties(device).multi_processor_count


def measured(device: torch.device, itemsize: int) -> bool:
    """Whether the table of this GPU's own architecture was measured on one, for elements of this size."""
    major, minor = torch.cuda.get_device_capability(device)
    measurement = table().get(f"{major}{minor}", {}).get("measured")
    return measurement is not None and itemsize in measurement["itemsize"]


def tile_for(kernel: str, device: torch.device, itemsize: int, rows: int = 0, out: int = 0, width: int = 0) -> Tile:
    """The tile of a kernel for M = rows, N = out, K = width: the first row of the table that fits.

    Args:
        kernel: name without `_kernel`; "product" has the variants "product", "product_activated", "product_backward"
            and "product_backward_activated", and "down" with a norm is "norm_down".
        itemsize: bytes of an element of the large operands, 2 or 4.

    Raises:
        KeyError: the table has no row for it.
    """
    if _forced is not None and _forced[0] == kernel:
        _, tile, shapes = _forced
        shapes.append((rows, out, width))
        if tile is not None:
            return tile
    return _lookup(architecture(device), kernel, itemsize, rows, out, width)


@lru_cache(maxsize=4096)
def _lookup(arch: str, kernel: str, itemsize: int, rows: int, out: int, width: int) -> Tile:
    for row in table()[arch]["rows"]:
        same_shape = row.get("out", out) == out and row.get("width", width) == width
        if row["kernel"] == kernel and itemsize in row["itemsize"] and rows <= row.get("rows_to", rows) and same_shape:
            return tile_of(row)
    raise KeyError(f"tiles.json has no tile for {kernel}, {itemsize} bytes, {rows} rows on {arch}")


def tile_of(row: dict[str, Any]) -> Tile:
    """A row of the table as a tile."""
    fields = ("variant", "blocks", "warps", "stages", "chunk")
    return Tile(**{name: value for name, value in row.items() if name in fields})
