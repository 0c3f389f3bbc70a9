"""A few cases that stand for the product of several axes: any two values of two axes meet in one of them."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations
from typing import Any

import pytest
import torch

from fastdlp.kernels.tiles import Tile


def pairwise(**factors: Iterable[Any]) -> list[tuple[Any, ...]]:
    """A few combinations of the factors' values in which any two values of two factors meet at least once."""
    values = [list(factor) for factor in factors.values()]
    pairs = {
        ((i, a), (j, b))
        for i, j in combinations(range(len(values)), 2)
        for a in range(len(values[i]))
        for b in range(len(values[j]))
    }
    rows: list[dict[int, int]] = []
    while pairs:
        row = dict(min(pairs))
        for i in range(len(values)):
            if i not in row:  # the value that makes most new pairs, of those the least used
                new = [sum(_pair(i, v, j, w) in pairs for j, w in row.items()) for v in range(len(values[i]))]
                used = [sum(other[i] == v for other in rows) for v in range(len(values[i]))]
                row[i] = max(range(len(values[i])), key=lambda v: (new[v], -used[v]))
        pairs -= {_pair(*one, *other) for one, other in combinations(row.items(), 2)}
        rows.append(row)
    return [tuple(values[i][row[i]] for i in range(len(values))) for row in rows]


def cases(**factors: Iterable[Any]) -> pytest.MarkDecorator:
    """Pairwise cases of the arguments that a test takes by the factors' names."""
    indirect = ["precision"] if "precision" in factors else []
    return pytest.mark.parametrize(tuple(factors), pairwise(**factors), indirect=indirect, ids=_label)


def _label(value: Any) -> str | None:
    if isinstance(value, Tile):
        return "x".join(map(str, value.blocks.values())) or value.variant
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if isinstance(value, torch.dtype):
        return str(value)
    return "table" if value is None else None


def _pair(i: int, v: int, j: int, w: int) -> tuple[tuple[int, int], tuple[int, int]]:
    return ((i, v), (j, w)) if i < j else ((j, w), (i, v))
