"""The classification task of full fine-tuning: a client's encoder weights in open_clip's modules.

A batch belongs to one slot (`fastdlp.engine.sequential`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from fastdlp.adapters.bank import Adapters
from fastdlp.engine.frozen_task import apply_heads
from fastdlp.engine.images import PixelSource, stage
from fastdlp.engine.tasks import Samples
from fastdlp.methods.losses import Outputs


class FullTask:
    """Every weight of one encoder or of both, and a classifier where there is one.

    Args:
        net: a CLIP with `encode_image` and `encode_text`, on the device, fp32; provides the frozen parameters.
        names: of the trained parameters of `net`.
        encoder: "image", "text" or "both".
        pixels: by sample number.
        prompts: token ids [K, context] of the training and of the scoring prompts.
        images: normalized image features [samples, d] of the frozen encoder; where images are encoded, used
            for the frozen model only.
        text: normalized class features [K, d] of the training and of the scoring prompts; likewise.
        scale: exp(logit_scale).
        dtype: of weights and activations in the forward; the trained weights are fp32.
    """

    scoring_batch = 64

    def __init__(
        self,
        net: nn.Module,
        names: frozenset[str],
        encoder: str,
        pixels: PixelSource,
        prompts: tuple[Tensor, Tensor],
        images: Tensor,
        text: tuple[Tensor, Tensor],
        scale: float,
        dtype: torch.dtype,
    ) -> None:
        self.encode, self.names, self.encoder = _Encode(net), names, encoder
        self.pixels, self.prompts, self.images, self.text = pixels, prompts, images, text
        self.scale, self.dtype = scale, dtype
        self._scored: tuple[Any, Tensor | None] = (
            None,
            None,
        )  # weights' version; class features

    def rows(self, samples: int) -> int:
        return samples

    @property
    def stage(self) -> Callable[[np.ndarray], Tensor] | None:
        return None if self.encoder == "text" else partial(stage, self.pixels, self.images.device)

    def forward(self, samples: Samples, views: int, adapters: Adapters | None, scoring: bool = False) -> list[Outputs]:
        if adapters is None:
            return [self._frozen(samples, scoring)] * views
        return [
            self._outputs(samples, adapters.tensors(branch), adapters.leaves[branch][0], scoring)
            for (branch,) in adapters.views
        ]

    def _frozen(self, samples: Samples, scoring: bool) -> Outputs:
        image = self.images[samples.ids]
        return Outputs(image, self.text[scoring], samples.labels, samples.mask, self.scale)

    def _outputs(self, samples: Samples, tensors: dict[str, Tensor], row: Tensor, scoring: bool) -> Outputs:
        weights = {f"net.{name}": tensors[name][0].to(self.dtype) for name in self.names}
        image, text, classified = self.images[samples.ids], self.text[scoring], None
        if samples.staged is not None:
            pixels = self.pixels.normalize(samples.staged).to(self.dtype)
            features = self._encoded("image", pixels, weights)[None]
            features, classified = apply_heads(features, tensors)
            image = F.normalize(features, dim=-1)
        if self.encoder != "image":
            text = self._classes(weights, scoring, (row.data_ptr(), row._version))
        return Outputs(image, text, samples.labels, samples.mask, self.scale, classified)

    def _classes(self, weights: Mapping[str, Tensor], scoring: bool, version: tuple[int, int]) -> Tensor:
        """Normalized class features [1, K, d]; cached while scoring, where all clients hold the same weights."""
        if torch.is_grad_enabled():
            return F.normalize(self._encoded("text", self.prompts[scoring], weights), dim=-1)[None]
        cached, features = self._scored
        if features is None or cached != (scoring, version):
            features = F.normalize(self._encoded("text", self.prompts[scoring], weights), dim=-1)[None]
            self._scored = (scoring, version), features
        return features

    def _encoded(self, encoder: str, inputs: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        return functional_call(self.encode, dict(weights), (encoder, inputs)).float()


class _Encode(nn.Module):
    """Both encoders as one `forward`, which `functional_call` requires."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, encoder: str, inputs: Tensor) -> Tensor:
        return self.net.encode_image(inputs) if encoder == "image" else self.net.encode_text(inputs)  # type: ignore[operator]


def trains(name: str, encoder: str) -> bool:
    """Whether full fine-tuning of `encoder` trains a parameter; the logit scale is always frozen."""
    if name == "logit_scale":
        return False
    return encoder == "both" or name.startswith("visual.") == (encoder == "image")
