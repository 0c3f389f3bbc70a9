"""One plain LoRA of one CLIP tower, as in other programs: A, B and a scale, without gates and branches."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fastdlp.adapters.branches import Branch, Site
from fastdlp.adapters.layout import lora_layout
from fastdlp.errors import FastdlpError

_NAME = re.compile(r"((\d+)\.(q|k|v|out|fc1|fc2)|proj)/([AB])")


@dataclass(frozen=True)
class LoRA:
    """y = xWᵀ + b + scale · (xAᵀ)Bᵀ at every adapted linear.

    Attributes:
        encoder: the tower, "image" or "text".
        rank: r of every adapted linear.
        scale: lora_alpha / r.
        tensors: `{part}/A` [r, K] and `{part}/B` [N, r], fp32 on the CPU. Parts are named as in
            `fastdlp.adapters.branches`: `0.q`, `0.k`, `0.v`, `0.out`, `0.fc1`, `0.fc2` of block 0 and so on, and
            `proj`, the final projection.
        about: its origin: `model`, `pretrained`, `weights` (fingerprint of the frozen model's weights), `method`,
            `client` (a number, or `global`). Empty for an external adapter.
    """

    encoder: str
    rank: int
    scale: float
    tensors: Mapping[str, Tensor]
    about: Mapping[str, str] = field(default_factory=dict)

    @property
    def lora_alpha(self) -> float:
        return self.scale * self.rank

    @property
    def parts(self) -> list[str]:
        """The adapted linears, in the order of the tensors."""
        return list(dict.fromkeys(name.partition("/")[0] for name in self.tensors))

    def delta(self, part: str) -> Tensor:
        """The update of a part's weight, scale · BA, [N, K] fp64."""
        return self.scale * self.tensors[f"{part}/B"].double() @ self.tensors[f"{part}/A"].double()

    def check(self, origin: Path | str) -> LoRA:
        """Return the adapter if it is one of a CLIP tower.

        Raises:
            FastdlpError: names `origin`, the tensor or value, and what is expected.
        """
        if self.encoder not in ("image", "text"):
            raise FastdlpError(f"{origin}: the encoder is {self.encoder!r}, expected image or text")
        if self.rank < 1 or not (math.isfinite(self.scale) and self.scale > 0):
            raise FastdlpError(
                f"{origin}: rank {self.rank} and scale {self.scale}, expected at least 1 and a number greater than 0"
            )
        if not self.tensors:
            raise FastdlpError(f"{origin} holds no adapter")
        for name, tensor in self.tensors.items():
            match = _NAME.fullmatch(name)
            if match is None:
                raise FastdlpError(f"{origin}: {name!r} is not an adapter of a linear of a CLIP tower")
            part, kind = match[1], match[4]
            if f"{part}/{'B' if kind == 'A' else 'A'}" not in self.tensors:
                raise FastdlpError(f"{origin}: {part} has only one of A and B")
            if tensor.ndim != 2 or tensor.shape[0 if kind == "A" else 1] != self.rank:
                expected = f"[{self.rank}, K]" if kind == "A" else f"[N, {self.rank}]"
                raise FastdlpError(
                    f"{origin}: {name} is {tuple(tensor.shape)}, expected {expected} for rank {self.rank}"
                )
            if not tensor.is_floating_point() or not tensor.isfinite().all():
                raise FastdlpError(f"{origin}: {name} must hold finite floating-point numbers")
        return self

    def fitted(self, sites: Sequence[Site], origin: Path | str) -> dict[str, Tensor]:
        """The tensors for a whole tower, zeros for linears without an adapter.

        Raises:
            FastdlpError: an adapted linear that the tower does not have, or that has another shape there.
        """
        layout = lora_layout(sites, Branch("", self.rank, gated=False))
        tensors = {name: torch.zeros(shape) for name, shape in layout.in_weights.items()}
        for name, tensor in self.tensors.items():
            if name not in tensors:
                raise FastdlpError(f"{origin} adapts {name.partition('/')[0]}, which the model's tower does not have")
            if tensor.shape != tensors[name].shape:
                raise FastdlpError(
                    f"{origin}: {name} is {tuple(tensor.shape)}, this model has {tuple(tensors[name].shape)}"
                )
            tensors[name] = tensor
        return tensors
