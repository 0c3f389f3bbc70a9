"""The frozen part of a CLIP tower before its first adapted linear, computed once per image or prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdlp.kernels.frozen import Norm

T = TypeVar("T")


def map_tensors(tree: T, change: Callable[[Tensor], Tensor]) -> T:
    """A tree of dataclasses and tuples with `change` applied to every tensor."""
    if isinstance(tree, Tensor):
        return change(tree)  # type: ignore[return-value]
    if isinstance(tree, tuple):
        return tuple(map_tensors(item, change) for item in tree)  # type: ignore[return-value]
    if is_dataclass(tree):
        return replace(tree, **{f.name: map_tensors(getattr(tree, f.name), change) for f in fields(tree)})  # type: ignore
    return tree


def leaves(tree: Any) -> Iterator[Any]:
    """Tensors and other values of a tree of dataclasses and tuples, in the order of the fields."""
    if is_dataclass(tree):
        tree = tuple(getattr(tree, f.name) for f in fields(tree))
    if isinstance(tree, tuple):
        for item in tree:
            yield from leaves(item)
    else:
        yield tree


@dataclass(frozen=True)
class ImageStem:
    """Patch embedding, class token, positions and ln_pre, fp32."""

    patches: Tensor  # [width, 3, patch, patch]
    class_token: Tensor  # [width]
    positions: Tensor  # [T, width]
    ln_pre: Norm | None

    def __call__(self, pixels: Tensor) -> Tensor:
        """[n, 3, S, S] normalized fp32 pixels → tokens [n, T, width] fp32, the class token first."""
        x = self._patches(pixels) @ self.patches.flatten(1).T
        x = torch.cat([self.class_token.expand(len(x), 1, -1), x], dim=1) + self.positions
        norm = self.ln_pre
        return x if norm is None else F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)

    def _patches(self, pixels: Tensor) -> Tensor:
        """[n, 3, S, S] → [n, patches, 3 · patch²], the rows of the patch embedding as a matrix product.

        Not a convolution, because cuDNN rounds the operands of fp32 convolutions to TF32 by default.
        """
        n, channels, size = *pixels.shape[:2], self.patches.shape[-1]
        rows, columns = pixels.shape[2] // size, pixels.shape[3] // size
        cut = pixels[:, :, : rows * size, : columns * size].reshape(n, channels, rows, size, columns, size)
        return cut.permute(0, 2, 4, 1, 3, 5).reshape(n, rows * columns, -1)


@dataclass(frozen=True)
class TextStem:
    """Token embedding and positions, fp32.

    pool: the position of a prompt's feature: "argmax" (the highest id is the end token), "eos" (first `eos_id`),
    "first" or "last". cut: drop the positions after the last pooled one, which is exact under a causal mask.
    """

    embedding: Tensor  # [vocabulary, width]
    positions: Tensor  # [context, width]
    pool: str
    eos_id: int
    cut: bool

    def __call__(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """[n, context] int64 token ids → tokens [n, L, width] fp32 and pooled positions [n] int64."""
        index = self.pooled(ids)
        length = int(index.max()) + 1 if self.cut else ids.shape[1]
        return F.embedding(ids[:, :length], self.embedding) + self.positions[:length], index

    def pooled(self, ids: Tensor) -> Tensor:
        """The position of each prompt's feature, [n] int64."""
        if self.pool == "argmax":
            return ids.argmax(dim=-1)
        if self.pool == "eos":
            return (ids == self.eos_id).int().argmax(dim=-1)
        return torch.full((len(ids),), 0 if self.pool == "first" else ids.shape[1] - 1, device=ids.device)
