"""The frozen products of a step and nothing else: the floor of every form that computes them with the same library."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastdlp.clip.tower import Tower
from fastdlp.kernels.frozen import FrozenLinear, frozen_linear, frozen_linear_backward


@dataclass(frozen=True)
class Product:
    """One linear over a number of rows; `first` has no adapter in front, so that nobody needs its dX."""

    linear: FrozenLinear
    rows: int
    first: bool

    @property
    def flop(self) -> int:
        """Of either direction."""
        return 2 * self.rows * self.linear.weight.numel()


class FrozenProducts:
    """x Wᵀ + b of every linear that a step runs through, and dY W of those that need it.

    Args:
        tower: on its device and in its dtype.
        rows: images or prompts in one view.
        tokens: of each.
        forwards, backwards: passes of a step.
    """

    def __init__(self, tower: Tower, rows: int, tokens: int, forwards: int, backwards: int) -> None:
        self.forwards, self.backwards = forwards, backwards
        self.products = _products(tower, rows, tokens)
        weight = tower.proj.weight
        widths = {(p.rows, width) for p in self.products for width in p.linear.weight.shape}
        self._given = {
            (m, width): torch.randn(m, width, device=weight.device, dtype=weight.dtype) for m, width in widths
        }

    @property
    def flop(self) -> int:
        """Of a step."""
        forward = sum(p.flop for p in self.products)
        return self.forwards * forward + self.backwards * sum(p.flop for p in self.products if not p.first)

    @torch.no_grad()
    def step(self) -> None:
        for _ in range(self.forwards):
            for p in self.products:
                frozen_linear(self._given[p.rows, p.linear.weight.shape[1]], p.linear.weight, p.linear.bias)
        for _ in range(self.backwards):
            for p in reversed(self.products):
                if not p.first:
                    frozen_linear_backward(self._given[p.rows, p.linear.weight.shape[0]], p.linear.weight)


def _products(tower: Tower, rows: int, tokens: int) -> list[Product]:
    """In the order of a forward; the last block's as `Tower` computes them, for the pooled token where it can."""
    found = []
    pooled = tower.pooled_only and tower.pool != "avg"
    for number, block in enumerate(tower.blocks):
        cut = pooled and number == len(tower.blocks) - 1
        behind = rows if cut else rows * tokens
        if cut:
            attention = [Product(block.q, rows, number == 0), Product(block.kv, rows * tokens, number == 0)]
        else:
            attention = [Product(block.qkv, rows * tokens, number == 0)]
        found += attention + [Product(linear, behind, False) for linear in (block.out, block.fc1, block.fc2)]
    return [*found, Product(tower.proj, rows, False)]
