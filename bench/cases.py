"""The kernels that CLIP's towers launch, found by running towers on torch's device "meta".

A tower of two blocks (one over all tokens, and the last one, which computes the pooled token alone) runs forward and
backward with adapters from a bank, then the bank's branches through the optimizer, and one linear through the operator;
`recording` lists what would be launched.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastdlp.adapters.bank import AdapterBank, View
from fastdlp.adapters.branches import Branch, TowerShape, tower_sites
from fastdlp.adapters.optimizer import Hyperparameters, update
from fastdlp.clip.tower import Block, Tower
from fastdlp.kernels.frozen import FrozenLinear, Norm
from fastdlp.kernels.groups import RowGroups
from fastdlp.kernels.launch import Launch, recording
from fastdlp.kernels.pruning import THRESHOLDS


@dataclass(frozen=True)
class Model:
    """A CLIP tower by its sizes: tokens a sample, heads, and whether a token sees only those before it."""

    name: str
    tokens: int
    heads: int
    causal: bool
    shape: TowerShape


MODELS = (
    Model("ViT-B/32 image", 50, 12, False, TowerShape(2, 768, 3072, 512)),
    Model("ViT-B/32 text", 77, 8, True, TowerShape(2, 512, 2048, 512)),
    Model("ViT-B/32 text, cut", 20, 8, True, TowerShape(2, 512, 2048, 512)),  # at the longest prompt
    Model("ViT-L/14 image", 257, 16, False, TowerShape(2, 1024, 4096, 768)),
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
        small: bf16 and fp32, both views together and QuickGELU alone, in batches of equal clients: what takes every
            tile.
    """
    dtypes = ("bf16", "fp32") if small else tuple(DTYPES)
    for model, (batch, sizes) in itertools.product(MODELS, BATCHES.items()):
        if small and len(set(sizes)) > 1:
            continue
        bank = AdapterBank(tower_sites(model.shape), BRANCHES, len(sizes), "meta")
        yield from ((f"{model.name}, {batch}, {name}", launch) for name, launch in _optimizer(bank))
        activations = ACTIVATIONS[:1] if small else ACTIVATIONS
        for views, activation, dtype in itertools.product(VIEWS[:1] if small else VIEWS, activations, dtypes):
            case = f"{model.name}, {batch}, {' + '.join(view[0] for view in views)}"
            yield from ((case, launch) for launch in _passes(model, activation, bank, views, sizes, dtype))
    for dtype in dtypes:
        yield from (("100 × 100, ragged", launch) for launch in _operator(dtype))


def _passes(
    model: Model, activation: str, bank: AdapterBank, views: Sequence[View], sizes: Sequence[int], dtype: str
) -> list[Launch]:
    """A forward with its backward, and the forward of a teacher, which keeps nothing."""
    tower, groups = empty_tower(model, activation, DTYPES[dtype]), RowGroups(tuple(sizes), len(views))
    x = _empty(groups.rows, model.tokens, model.shape.width, dtype=DTYPES[dtype])
    index = torch.empty(groups.rows, dtype=torch.int64, device="meta") if model.causal else None
    slots = torch.arange(len(sizes), device="meta")
    with recording(dry=True) as launches:
        adapters = bank.adapters(slots, views, grad=True)
        loss = tower.features(x, groups, adapters, index, normalize=True).sum()
        adapters.gradients(loss, list(adapters.leaves))
        with torch.no_grad():
            tower.features(x, groups, bank.adapters(slots, views, grad=False), index, normalize=True)
    return _in_tf32(launches) if dtype == "tf32" else launches


def _in_tf32(launches: Sequence[Launch]) -> list[Launch]:
    """A launcher asks torch whether a GPU may round fp32 products to tf32, and "meta" is no GPU."""
    return [
        replace(launch, options=launch.options | {"PRECISION": "tf32"})
        for launch in launches
        if "PRECISION" in launch.options
    ]


def empty_tower(model: Model, activation: str, dtype: torch.dtype) -> Tower:
    """Frozen weights without content, on torch's device "meta"."""

    def linear(out: int, width: int, norm: bool = False, activation: str = "none", bias: bool = True) -> FrozenLinear:
        frozen = Norm(_empty(width, dtype=dtype), _empty(width, dtype=dtype), 1e-5) if norm else None
        return FrozenLinear(
            _empty(out, width, dtype=dtype), _empty(out, dtype=dtype) if bias else None, frozen, activation
        )

    d, mlp = model.shape.width, model.shape.mlp
    block = Block(
        linear(3 * d, d, norm=True),
        linear(d, d),
        None,
        linear(mlp, d, norm=True, activation=activation),
        linear(d, mlp),
        None,
    )
    ln_post = Norm(_empty(d, dtype=dtype), _empty(d, dtype=dtype), 1e-5)
    proj = linear(model.shape.embed, d, bias=False)
    pool = "index" if model.causal else "tok"
    blocks = (block,) * model.shape.layers
    return Tower(blocks, ln_post, proj, model.heads, model.causal, pool, backend="triton")


def _operator(dtype: str) -> list[Launch]:
    """The public operator with everything that it takes, forward and backward."""
    from fastdlp.kernels.dual_lora_ops import backward_pass, forward_pass

    slots, rows, of_x = len(AWKWARD), sum(AWKWARD), DTYPES[dtype]
    x, weight, y = (_empty(n, 100, dtype=of_x) for n in (rows, 100, rows))
    bias, norm_weight, norm_bias = (_empty(100, dtype=of_x) for _ in range(3))
    A, B, c = _empty(slots, 1, 5, 100), _empty(slots, 1, 100, 5), _empty(slots, 1, 1, 5)
    norm, split = (norm_weight, norm_bias, 1e-5), (AWKWARD, 1)
    with recording(dry=True) as launches:
        _, *kept = forward_pass(x, weight, bias, *norm, "quick_gelu", A, B, c, *split, y, True)
        backward_pass(y, x, *kept, weight, *norm, "quick_gelu", A, B, c, *split, True, True)
    return _in_tf32(launches) if dtype == "tf32" else launches


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _optimizer(bank: AdapterBank) -> Iterator[tuple[str, Launch]]:
    """A step of every branch, with every threshold, with and without clipping."""
    slots, everywhere = torch.arange(bank.slots, device="meta"), torch.empty(bank.slots, device="meta")
    for clip_norm, threshold, (branch, state) in itertools.product((0.0, 1.0), THRESHOLDS, bank.state.items()):
        hyper = Hyperparameters(everywhere, everywhere, everywhere, everywhere, clip_norm, threshold)
        with recording(dry=True) as launches:
            update(state, slots, (state.weights, state.gates), hyper, "triton")
        yield from ((f"AdamW of {branch}", launch) for launch in launches)
