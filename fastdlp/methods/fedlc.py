"""FLoRA's baselines with a linear classifier (arXiv 2404.15182): on a frozen image encoder, and on a trained one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from fastdlp.adapters.branches import Tensors
from fastdlp.methods.single import SingleBranch


class FedLC(SingleBranch):
    """Frozen image encoder; a trained linear classifier on its output is averaged."""

    name = "fedlc"
    shared = ("global",)
    scored = ("global",)
    encoders = ("image",)
    defaults: ClassVar[Mapping[str, Any]] = {"lr": 1e-3, "task_loss": "cross-entropy"}

    def branches(self) -> tuple[Tensors, ...]:
        return (Tensors("global", ("classifier",)),)


class FedVMLC(FedLC):
    """The image encoder and a linear classifier on its output are trained and averaged."""

    name = "fedvmlc"
    sequential = True
    defaults: ClassVar[Mapping[str, Any]] = {"lr": 1e-5, "task_loss": "cross-entropy"}
    demonstration: ClassVar[Mapping[str, Any]] = {"lr": 1e-4}

    def branches(self) -> tuple[Tensors, ...]:
        return (Tensors("global", ("encoder", "classifier")),)
