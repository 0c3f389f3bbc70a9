"""Which kernels CLIP's towers launch: the launchers run on tensors without content, and nothing is computed.

Nothing here describes a kernel. Every adapted linear of a tower goes through the operator's forward and backward, with
adapters from a bank, on torch's device "meta", and every branch of that bank through the optimiser; `recording` lists
what would be launched.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastdlp.bank import AdapterBank, Adapters, View
from fastdlp.kernels.adamw import THRESHOLDS
from fastdlp.kernels.groups import RowGroups
from fastdlp.kernels.launch import Launch, recording
from fastdlp.optimiser import Hyperparameters, update
from fastdlp.sites import Branch, Site, TowerShape, tower_sites


@dataclass(frozen=True)
class Tower:
    """A CLIP tower as its linears see it: tokens a sample, and sizes."""

    name: str
    tokens: int
    shape: TowerShape


@dataclass(frozen=True)
class Linear:
    """One adapted linear: parts first..end of a site, over `tokens` rows a sample, and what is fused into it."""

    site: int  # its number in the tower
    tokens: int
    first: int = 0
    end: int = 1
    norm: bool = False
    activation: str = "none"
    residual: bool = False
    bias: bool = True


TOWERS = (
    Tower("ViT-B/32 image", 50, TowerShape(12, 768, 3072, 512)),
    Tower("ViT-B/32 text", 77, TowerShape(12, 512, 2048, 512)),
    Tower("ViT-L/14 image", 257, TowerShape(24, 1024, 4096, 768)),
)
ACTIVATIONS = ("quick_gelu", "gelu", "gelu_tanh")
BATCHES = {"1 client": (32,), "10 clients": (32,) * 10, "100 clients": (32,) * 100, "10 uneven": (32,) * 9 + (17,)}
LOCAL, GLOBAL = ("local",), ("global",)
BRANCHES = (Branch("local", 4, gated=True), Branch("global", 2, gated=False))
VIEWS: tuple[tuple[View, ...], ...] = ((LOCAL, GLOBAL), (LOCAL,), (GLOBAL,))  # with rank 6, 4 and 2
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
AWKWARD = (100, 0, 50, 107)  # rows of four clients at a linear of 100 × 100, which no tile divides


def launches_of(small: bool) -> Iterator[tuple[str, Launch]]:
    """All launches of all cases, each with the name of its case, for the architecture that `assume` names.

    Args:
        small: bf16 and fp32 and both views together, in batches of equal clients: what takes every tile.
    """
    dtypes = ("bf16", "fp32") if small else tuple(DTYPES)
    for tower, (batch, sizes) in itertools.product(TOWERS, BATCHES.items()):
        if small and len(set(sizes)) > 1:
            continue
        bank = AdapterBank(tower_sites(tower.shape), BRANCHES, len(sizes), "meta")
        for name, launch in _optimiser(bank):
            yield f"{tower.name}, {batch}, {name}", launch
        for views in VIEWS[:1] if small else VIEWS:
            adapters = bank.adapters(torch.arange(len(sizes), device="meta"), views, grad=False)
            for linear, dtype in itertools.product(_linears(tower), dtypes):
                site = bank.sites[linear.site].name.rpartition(".")[2]
                case = f"{tower.name} {site}, {batch}, {' + '.join(view[0] for view in views)}"
                yield from ((case, launch) for launch in _operator(adapters, linear, sizes, dtype))
    bank = AdapterBank([Site("odd", ("odd",), 100, 100)], [Branch("local", 5, gated=True)], len(AWKWARD), "meta")
    adapters = bank.adapters(torch.arange(len(AWKWARD), device="meta"), (LOCAL,), grad=False)
    linear = Linear(0, 1, norm=True, activation="quick_gelu", residual=True)
    for dtype in dtypes:
        yield from (("100 × 100, ragged", launch) for launch in _operator(adapters, linear, AWKWARD, dtype))


def _linears(tower: Tower) -> Iterator[Linear]:
    """What a tower runs: a block over all tokens, and the last block and the projection for one token a sample."""
    last, proj = 4 * (tower.shape.layers - 1), 4 * tower.shape.layers
    yield Linear(0, tower.tokens, end=3, norm=True)
    yield Linear(last, 1, norm=True)
    yield Linear(last, tower.tokens, first=1, end=3, norm=True)
    for block, tokens in ((0, tower.tokens), (last, 1)):
        yield Linear(block + 1, tokens, residual=True)
        yield from (Linear(block + 2, tokens, norm=True, activation=name) for name in ACTIVATIONS)
        yield Linear(block + 3, tokens, residual=True)
    yield Linear(proj, 1, norm=True, bias=False)


def _operator(adapters: Adapters, linear: Linear, sizes: Sequence[int], dtype: str) -> list[Launch]:
    """A forward with its backward, and the forward of a teacher, which keeps nothing."""
    A, B, c = adapters.site(linear.site, slice(linear.first, linear.end))
    groups = RowGroups(tuple(sizes), len(adapters.views)).times(linear.tokens)
    with recording(dry=True) as launches:
        for keep in (True, False):
            _run(linear, A, B, c, groups, DTYPES[dtype], keep)
    if dtype != "tf32":
        return launches
    # A launcher asks torch whether a GPU may round fp32 products to tf32, and "meta" is no GPU.
    return [
        replace(launch, options=launch.options | {"PRECISION": "tf32"})
        for launch in launches
        if "PRECISION" in launch.options
    ]


def _run(linear: Linear, A: Tensor, B: Tensor, c: Tensor, groups: RowGroups, dtype: torch.dtype, keep: bool) -> None:
    from fastdlp.kernels.dual_lora_ops import backward_pass, forward_pass

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    K, out = A.shape[3], B.shape[1] * B.shape[2]
    weight, x, bias = empty(out, K), empty(groups.rows, K), empty(out) if linear.bias else None
    norm = (empty(K), empty(K)) if linear.norm else (None, None)
    residual = empty(groups.rows, out) if linear.residual else None
    split = (groups.sizes, groups.views)
    y, *kept = forward_pass(x, weight, bias, A, B, c, *split, *norm, 1e-5, linear.activation, residual, keep)
    if keep:
        backward_pass(y, x, *kept, weight, B, c, *split, norm[0], linear.activation, True, True)


def _optimiser(bank: AdapterBank) -> Iterator[tuple[str, Launch]]:
    """A step of every branch, with every threshold, with and without clipping."""
    slots, everywhere = torch.arange(bank.slots, device="meta"), torch.empty(bank.slots, device="meta")
    for clip_norm, threshold, (branch, state) in itertools.product((0.0, 1.0), THRESHOLDS, bank.state.items()):
        hyper = Hyperparameters(everywhere, everywhere, everywhere, everywhere, clip_norm, threshold)
        with recording(dry=True) as launches:
            update(state, slots, (state.weights, state.gates), hyper, "triton")
        yield from ((f"AdamW of {branch}", launch) for launch in launches)
