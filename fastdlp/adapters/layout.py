"""How a branch's named tensors lie in its flat rows: weights [D], and gates [Q] in a row of their own.

LoRA: site after site, A of all its parts before B. Every named tensor is one contiguous stretch, so naming is slicing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdlp.adapters.branches import Branch, Site
from fastdlp.kernels import low_rank

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Entry:
    """One named tensor: in the row of the gates or of the weights, from `start` on."""

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
        """Views [..., *shape] of rows [..., D] and [..., Q]; without gates, the entries that are none."""
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


@dataclass(frozen=True)
class Span:
    """Where a LoRA site's A, B and gate lie in the rows."""

    a: slice
    b: slice
    gate: slice


def spans(sites: Sequence[Site], rank: int) -> list[Span]:
    """The sites' stretches in a LoRA branch's rows."""
    found: list[Span] = []
    at = gate = 0
    for site in sites:
        parts = len(site.parts)
        a, b = parts * rank * site.in_features, parts * rank * site.out_features
        found.append(Span(slice(at, at + a), slice(at + a, at + a + b), slice(gate, gate + parts * rank)))
        at, gate = at + a + b, gate + parts * rank
    return found


def lora_layout(sites: Sequence[Site], branch: Branch) -> Layout:
    """Names `{site part}/{A|B|gate}`: A [r, K], B [N, r], gate [r]."""
    rank, entries = branch.rank, {}
    weights = gates = 0
    for site, span in zip(sites, spans(sites, rank)):
        for i, part in enumerate(site.parts):
            a, b = rank * site.in_features, rank * site.out_features
            entries[f"{part}/A"] = Entry(False, span.a.start + i * a, (rank, site.in_features))
            entries[f"{part}/B"] = Entry(False, span.b.start + i * b, (site.out_features, rank))
            if branch.gated:
                entries[f"{part}/gate"] = Entry(True, span.gate.start + i * rank, (rank,))
        weights, gates = span.b.stop, span.gate.stop if branch.gated else 0
    return Layout(entries, weights, gates)


@dataclass(frozen=True)
class Fold:
    """LoRA branches as the kernels fold them, side by side along the rank, and the entries of a slot's row of A (down)
    and of a group's row of B' (up)."""

    branches: tuple[low_rank.Branch, ...]
    down: int
    up: int


def lora_fold(sites: Sequence[Site], ranks: Sequence[int]) -> Fold:
    """Every part of every site, in their order, for branches of these ranks."""
    padded, branches = low_rank.padded(sum(ranks)), []
    down = up = 0
    for number, rank in enumerate(ranks):
        parts: list[low_rank.Part] = []
        down = up = 0
        for site, span in zip(sites, spans(sites, rank)):
            k, n = site.in_features, site.out_features
            for i in range(len(site.parts)):
                a, b, c = span.a.start + i * rank * k, span.b.start + i * n * rank, span.gate.start + i * rank
                parts.append(low_rank.Part(k, n, a, b, c, down, up))
                down, up = down + padded * k, up + padded * n
        branches.append(low_rank.Branch(tuple(parts), rank, sum(ranks[:number])))
    return Fold(tuple(branches), down, up)


def tensor_layout(shapes: Shapes) -> Layout:
    """Tensors one after another, in the order given."""
    entries, at = {}, 0
    for name, shape in shapes.items():
        entries[name] = Entry(False, at, tuple(shape))
        at += math.prod(shape)
    return Layout(entries, at, 0)


def flat(tensors: Mapping[str, Tensor]) -> Tensor:
    """The row [D] of tensors in the order given, fp32 on the CPU."""
    return torch.cat([tensor.detach().flatten().float().cpu() for tensor in tensors.values()])
