"""The layout of a branch's named tensors in its flat rows: weights [D], and gates [Q] in a separate row.

LoRA: site by site, A of all its parts before B. Every named tensor is contiguous, so naming is splitting.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastdlp.adapters.branches import Branch, Site
from fastdlp.kernels.low_rank import BranchOffsets, PartOffsets, padded

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Layout:
    """The shapes of a branch's tensors by name, in the order in which they follow each other in the two rows."""

    in_weights: Shapes
    in_gates: Shapes = field(default_factory=dict)

    @property
    def weights(self) -> int:
        """D, the length of the row of weights."""
        return sum(map(math.prod, self.in_weights.values()))

    @property
    def gates(self) -> int:
        """Q, the length of the row of gates."""
        return sum(map(math.prod, self.in_gates.values()))

    def named(self, weights: Tensor, gates: Tensor | None) -> dict[str, Tensor]:
        """Views [..., *shape] of rows [..., D] and [..., Q]; without `gates`, the weights only."""
        return split(weights, self.in_weights) | ({} if gates is None else split(gates, self.in_gates))

    def load(self, tensors: Mapping[str, Tensor], weights: Tensor, gates: Tensor) -> None:
        """Write named tensors into rows [D] and [Q].

        Raises:
            ValueError: names or shapes that are not this layout's.
        """
        views = self.named(weights, gates)
        if odd := sorted(views.keys() ^ tensors.keys()):
            raise ValueError(f"adapter of another shape: {odd[0]} and {len(odd) - 1} other names do not match")
        for name, view in views.items():
            if tensors[name].shape != view.shape:
                raise ValueError(f"{name} is {tuple(tensors[name].shape)}, expected {tuple(view.shape)}")
        for name, view in views.items():
            view.copy_(tensors[name])


def split(rows: Tensor, shapes: Shapes) -> dict[str, Tensor]:
    """Views [..., *shape] of rows [..., length]; the backward of all of them is one concatenation."""
    pieces = rows.split([math.prod(shape) for shape in shapes.values()], dim=-1)
    return {name: piece.unflatten(-1, shape) for (name, shape), piece in zip(shapes.items(), pieces)}


def flat(tensors: Mapping[str, Tensor]) -> Tensor:
    """The row [D] of tensors in the order given, fp32 on the CPU."""
    return torch.cat([tensor.detach().flatten().float().cpu() for tensor in tensors.values()])


def lora_layout(sites: Sequence[Site], branch: Branch) -> Layout:
    """Names `{site part}/{A|B|gate}`: A [r, K], B [N, r], gate [r]."""
    rank = branch.rank
    weights: dict[str, tuple[int, ...]] = {}
    for site in sites:
        weights |= {f"{part}/A": (rank, site.in_features) for part in site.parts}
        weights |= {f"{part}/B": (site.out_features, rank) for part in site.parts}
    return Layout(weights, {f"{part}/gate": (rank,) for site in sites for part in site.parts if branch.gated})


@dataclass(frozen=True)
class FoldedLayout:
    """LoRA branches as the kernels fold them, concatenated along the rank; the length of a slot's folded row of A
    (`down`) and of a group's row of B' (`up`)."""

    branches: tuple[BranchOffsets, ...]
    down: int
    up: int


def folded_layout(sites: Sequence[Site], ranks: Sequence[int]) -> FoldedLayout:
    """Every part of every site, in order, for branches of these ranks."""
    padded_rank, branches = padded(sum(ranks)), []
    down = up = 0
    for number, rank in enumerate(ranks):
        parts: list[PartOffsets] = []
        a = gate = down = up = 0
        for site in sites:
            b = a + len(site.parts) * rank * site.in_features
            for _ in site.parts:
                parts.append(PartOffsets(site.in_features, site.out_features, a, b, gate, down, up))
                a, b, gate = a + rank * site.in_features, b + rank * site.out_features, gate + rank
                down, up = down + padded_rank * site.in_features, up + padded_rank * site.out_features
            a = b  # the next site begins where the last B ends
        branches.append(BranchOffsets(tuple(parts), rank, sum(ranks[:number])))
    return FoldedLayout(tuple(branches), down, up)
