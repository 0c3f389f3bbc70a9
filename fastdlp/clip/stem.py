"""The frozen part of a CLIP tower in front of its first adapted linear, computed once per image or prompt."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdlp.kernels.frozen import Norm


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
        return (
            x
            if self.ln_pre is None
            else F.layer_norm(x, (x.shape[-1],), self.ln_pre.weight, self.ln_pre.bias, self.ln_pre.eps)
        )

    def _patches(self, pixels: Tensor) -> Tensor:
        """[n, 3, S, S] → [n, patches, 3 · patch²], as a convolution with its kernel's stride sees them.

        A product and not a convolution: cuDNN rounds the operands of fp32 convolutions to TF32 unless told otherwise.
        """
        n, channels, size = *pixels.shape[:2], self.patches.shape[-1]
        rows, columns = pixels.shape[2] // size, pixels.shape[3] // size
        cut = pixels[:, :, : rows * size, : columns * size].reshape(n, channels, rows, size, columns, size)
        return cut.permute(0, 2, 4, 1, 3, 5).reshape(n, rows * columns, -1)


@dataclass(frozen=True)
class TextStem:
    """Token embedding and positions, fp32.

    pool: where a prompt's feature is taken: "argmax" (the highest id is the end token), "eos" (first
    `eos_id`), "first" or "last". `cut` drops the positions behind the last pooled one, which is exact
    under a causal mask and off otherwise.
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
        """The position whose feature stands for the prompt, [n] int64."""
        if self.pool == "argmax":
            return ids.argmax(dim=-1)
        if self.pool == "eos":
            return (ids == self.eos_id).int().argmax(dim=-1)
        return torch.full((len(ids),), 0 if self.pool == "first" else ids.shape[1] - 1, device=ids.device)
