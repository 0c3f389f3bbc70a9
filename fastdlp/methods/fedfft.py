"""Federated full fine-tuning: every weight of the encoder is trained and averaged (FLoRA's most expensive baseline)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from fastdlp.adapters.branches import Tensors
from fastdlp.methods.single import SingleBranch


class FedFFT(SingleBranch):
    """All weights of the image encoder, the text encoder, or both; the logit scale stays frozen."""

    name = "fedfft"
    shared = ("global",)
    scored = ("global",)
    encoders = ("image", "text", "both")
    sequential = True
    demonstration: ClassVar[Mapping[str, Any]] = {"lr": 1e-4}

    def branches(self) -> tuple[Tensors, ...]:
        return (Tensors("global", ("encoder",)),)
