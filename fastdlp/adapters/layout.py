"""The layout of a branch's named tensors in its flat rows: weights [D], and gates [Q] in a separate row.

LoRA: site by site, A of all its parts before B. Every named tensor is contiguous, so naming is slicing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdlp.adapters.branches import Branch, Site, count_gates, count_parameters
from fastdlp.kernels.low_rank import BranchOffsets, PartOffsets, padded

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Entry:
    """One named tensor: at offset `start` in the row of the gates or of the weights."""

    gate: bool
    start: int
    shape: tuple[int, ...]

    @property
    def where(self) -> slice:
        return slice(self.start, self.start + math.prod(self.shape))


@dataclass(frozen=True)
class Layout:
    """The entries of a branch by name, and the lengths D and Q of its rows."""

    entries: Mapping[str, Entry]
    weights: int
    gates: int

    def named(self, weights: Tensor, gates: Tensor | None) -> dict[str, Tensor]:
        """Views [..., *shape] of rows [..., D] and [..., Q]; without `gates`, the weights only."""
        return {
            name: (gates if entry.gate else weights)[..., entry.where].unflatten(-1, entry.shape)  # type: ignore[index]
            for name, entry in self.entries.items()
            if gates is not None or not entry.gate
        }

    def load(self, tensors: Mapping[str, Tensor], weights: Tensor, gates: Tensor) -> None:
        """Write named tensors into rows [D] and [Q].

        Raises:
            ValueError: names or shapes that are not this layout's.
        """
        if set(self.entries) != set(tensors):
            odd = sorted(set(self.entries) ^ set(tensors))
            raise ValueError(f"adapter of another shape: {odd[0]} and {len(odd) - 1} other names do not match")
        for name, entry in self.entries.items():
            if tuple(tensors[name].shape) != entry.shape:
                raise ValueError(f"{name} is {tuple(tensors[name].shape)}, expected {entry.shape}")
        for name, entry in self.entries.items():
            (gates if entry.gate else weights)[entry.where] = tensors[name].flatten().to(weights)


def lora_offsets(sites: Sequence[Site], rank: int) -> Iterator[tuple[str, Site, int, int, int]]:
    """(name, site, offset of A, of B, of the gate) of every part in a LoRA branch's rows."""
    weights = gates = 0
    for site in sites:
        parts, a, b = len(site.parts), rank * site.in_features, rank * site.out_features
        for i, part in enumerate(site.parts):
            yield part, site, weights + i * a, weights + parts * a + i * b, gates + i * rank
        weights, gates = weights + parts * (a + b), gates + parts * rank


def lora_layout(sites: Sequence[Site], branch: Branch) -> Layout:
    """Names `{site part}/{A|B|gate}`: A [r, K], B [N, r], gate [r]."""
    rank, entries = branch.rank, {}
    for part, site, a, b, gate in lora_offsets(sites, rank):
        entries[f"{part}/A"] = Entry(False, a, (rank, site.in_features))
        entries[f"{part}/B"] = Entry(False, b, (site.out_features, rank))
        if branch.gated:
            entries[f"{part}/gate"] = Entry(True, gate, (rank,))
    return Layout(entries, count_parameters(tuple(sites), rank), count_gates(tuple(sites), rank) * branch.gated)


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
        down = up = 0
        for _, site, a, b, c in lora_offsets(sites, rank):
            parts.append(PartOffsets(site.in_features, site.out_features, a, b, c, down, up))
            down, up = down + padded_rank * site.in_features, up + padded_rank * site.out_features
        branches.append(BranchOffsets(tuple(parts), rank, sum(ranks[:number])))
    return FoldedLayout(tuple(branches), down, up)


def tensor_layout(shapes: Shapes) -> Layout:
    """Tensors concatenated in the order given."""
    entries, start = {}, 0
    for name, shape in shapes.items():
        entries[name] = Entry(False, start, tuple(shape))
        start += math.prod(shape)
    return Layout(entries, start, 0)


def flat(tensors: Mapping[str, Tensor]) -> Tensor:
    """The row [D] of tensors in the order given, fp32 on the CPU."""
    return torch.cat([tensor.detach().flatten().float().cpu() for tensor in tensors.values()])
