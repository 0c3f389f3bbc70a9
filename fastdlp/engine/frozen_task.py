"""The classification task of methods with frozen encoders: heads on features that are computed once."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastdlp.adapters.bank import Adapters
from fastdlp.adapters.heads import attend, classify
from fastdlp.engine.tasks import Samples
from fastdlp.methods.losses import Outputs


class FrozenTask:
    """Heads on the image features, or on the class prompts' features.

    Args:
        encoder: "image" or "text": the features that the heads transform.
        images: image features [samples, d] of the frozen encoder, not normalized, fp32.
        text: class features [K, d] of the training and of the scoring prompts, not normalized, fp32.
        scale: exp(logit_scale).
    """

    stage = None
    scoring_batch = 1 << 20

    def __init__(self, encoder: str, images: Tensor, text: tuple[Tensor, Tensor], scale: float) -> None:
        self.encoder, self.images, self.text, self.scale = encoder, images, text, scale

    def rows(self, samples: int) -> int:
        return samples

    def forward(self, samples: Samples, views: int, adapters: Adapters | None, scoring: bool = False) -> list[Outputs]:
        image, text = self.images[samples.ids], self.text[scoring]
        if adapters is None:
            return [self._outputs(samples, image, text)] * views
        if self.encoder == "text":
            text = text.expand(len(samples.sizes), -1, -1)
        outputs = []
        for view in adapters.views:
            f, classified = (image, None) if self.encoder == "image" else (text, None)
            for branch in view:
                f, classified = apply_heads(f, adapters.tensors(branch))
            seen = (f, text) if self.encoder == "image" else (image, f)
            outputs.append(self._outputs(samples, *seen, classified))
        return outputs

    def _outputs(self, samples: Samples, image: Tensor, text: Tensor, classified: Tensor | None = None) -> Outputs:
        image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
        return Outputs(image, text, samples.labels, samples.mask, self.scale, classified)


def apply_heads(features: Tensor, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Features [n, S, d] after the attention head, if any, and logits [n, S, K] of the classifier, if any."""
    if "fc1/weight" in tensors:
        features = attend(features, tensors)
    return features, classify(features, tensors) if "classifier/weight" in tensors else None
