"""The table of tiles: complete for every architecture, read from the top, and never silent about a gap."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fastdlp.kernels import tiles
from fastdlp.kernels.tiles import Tile, architecture, assume, measured, table, tile_for, tile_of

CPU, GPU = torch.device("cpu"), torch.device("cuda")
PRODUCTS = ("product", "product_activated", "product_backward", "product_backward_activated")
ATTENTION = ("attention", "attention_backward")
COUNTS = {"GROUP_M", "HEADS"}  # no sizes of a tile; HEADS may be 0, for all
BLOCKS = {  # what a kernel's constexprs are called
    "fold": {"BLOCK"},
    "down": {"BLOCK_M", "BLOCK_K"},
    "norm_down": {"BLOCK_M", "BLOCK_K"},
    "norm_backward": {"BLOCK_M"},
    **{kernel: {"BLOCK_Q", "HEADS"} for kernel in ATTENTION},
    **{kernel: {"BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP_M"} for kernel in PRODUCTS},
    "normalize": {"BLOCK_M"},
    "adapter_gradients": {"BLOCK_M", "BLOCK_N", "BLOCK_K"},
    "sum_partials": {"BLOCK"},
}
ROWS = (0, 1, 512, 513, 4096, 4097, 50_000, 10**7)
SHAPES = [
    (0, 0),
    (1, 1),
    (100, 100),
    (768, 768),
    (2304, 768),
    (3072, 768),
    (768, 3072),
    (512, 768),
    (16, 64),
    (64, 64),
    (128, 16),
]  # N, K


def lookups(kernel: str) -> Iterator[tuple[int, int, int, int]]:
    for itemsize in (4,) if kernel == "sum_partials" else (2, 4):
        for rows in ROWS:
            for out, width in SHAPES:
                yield itemsize, rows, out, width


@pytest.fixture
def of_table(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Replace the table's architectures."""

    def replace(**architectures: Any) -> None:
        monkeypatch.setattr(tiles, "table", lambda: architectures)
        tiles._lookup.cache_clear()

    yield replace
    tiles._lookup.cache_clear()


@pytest.mark.parametrize("arch", table())
@pytest.mark.parametrize("kernel", BLOCKS)
def test_every_kernel_has_a_tile_for_every_shape(kernel: str, arch: str) -> None:
    with assume(arch):
        for at in lookups(kernel):
            tile = tile_for(kernel, GPU, *at)
            if tile.variant == "torch":
                assert kernel in PRODUCTS
                continue
            assert set(tile.blocks) == BLOCKS[kernel]
            assert tile.warps in (1, 2, 4, 8, 16)
            assert tile.stages >= 1
            for name, size in tile.blocks.items():
                dot = name not in COUNTS and kernel not in ("norm_backward", "normalize")
                assert size >= (16 if dot else name != "HEADS")
                assert size & (size - 1) == 0 or name in COUNTS
            assert tile.chunk == 0


def test_architectures_name_the_same_kernels() -> None:
    names = {arch: {row["kernel"] for row in rows["rows"]} for arch, rows in table().items()}
    assert {"80", "90", tiles.INTERPRETER} <= names.keys()
    for kernels in names.values():
        assert kernels == names["80"]
        assert kernels >= BLOCKS.keys()


def test_the_first_row_that_fits(of_table: Callable[..., None]) -> None:
    def row(warps: int, kernel: str = "product", **limits: Any) -> dict[str, Any]:
        return {"kernel": kernel, "itemsize": [2], "blocks": {"BLOCK_M": 16}, "warps": warps} | limits

    rows = [
        row(0, "down"),
        row(1, rows_to=64),
        row(2, out=96),
        row(3, out=100, width=768),
        row(4, itemsize=[4]),
        row(5),
    ]
    of_table(**{tiles.INTERPRETER: {"measured": None, "rows": [*rows, row(6)]}})
    found = {
        at: tile_for("product", CPU, *at).warps
        for at in [(2, 64, 96, 768), (2, 65, 96, 1), (2, 65, 100, 768), (2, 65, 100, 64), (4, 65, 100, 64)]
    }
    assert list(found.values()) == [1, 2, 3, 5, 4]
    with pytest.raises(KeyError, match=r"tiles\.json has no tile for product, 8 bytes, 65 rows on interpreter"):
        tile_for("product", CPU, 8, 65)


def test_tile_of_a_row() -> None:
    row = {"kernel": "product", "itemsize": [2], "rows_to": 8, "blocks": {"BLOCK_M": 16}, "warps": 8, "stages": 3}
    tile = tile_of(row)
    assert tile == Tile(blocks={"BLOCK_M": 16}, warps=8, stages=3)
    assert tile.launch == {"BLOCK_M": 16, "num_warps": 8, "num_stages": 3}
    assert tile_of({"kernel": "product", "itemsize": [2], "variant": "torch"}).variant == "torch"


@pytest.mark.parametrize(
    ("capability", "arch"), [((8, 0), "80"), ((9, 0), "90"), ((8, 9), "80"), ((10, 0), "80"), ((12, 0), "80")]
)
def test_an_unknown_architecture_takes_the_tiles_of_the_80(
    capability: tuple[int, int], arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert architecture(GPU) == arch
    with assume(arch):
        expected = tile_for("product", GPU, 2, 50_000, 768, 768)
    assert tile_for("product", GPU, 2, 50_000, 768, 768) == expected


def test_assume_holds_inside_and_no_longer() -> None:
    assert architecture(CPU) == tiles.INTERPRETER
    with assume("80"):
        with assume("90"):
            assert architecture(CPU) == "90"
        assert architecture(CPU) == "80"
    with pytest.raises(KeyError), assume("80"):
        tile_for("nothing", CPU, 2)
    assert architecture(CPU) == tiles.INTERPRETER


@pytest.mark.parametrize(("capability", "expected"), [((8, 0), False), ((9, 0), True), ((12, 0), False)])
def test_measured_is_said_of_the_own_architecture_only(
    capability: tuple[int, int], expected: bool, of_table: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    of_table(**{"80": {"measured": None, "rows": []}, "90": {"measured": {"itemsize": [2]}, "rows": []}})
    assert measured(GPU, 2) is expected
    assert not measured(GPU, 4)
