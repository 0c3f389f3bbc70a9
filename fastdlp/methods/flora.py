"""FLoRA and the methods of its comparison (arXiv 2404.15182): one branch, which is averaged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from fastdlp.methods.single import SingleBranch


class FLoRA(SingleBranch):
    """One LoRA of rank 2; clients are scored with the averaged adapter."""

    name = "flora"


class FedCLIP(SingleBranch):
    """f ⊙ softmax(Linear(tanh(Linear(f)))) on the frozen encoder's output f, 525,312 parameters at d = 512."""

    name = "fedclip"
    modules = ("attention",)
    defaults: ClassVar[Mapping[str, Any]] = {"lr": 1e-3}


class FedAA(FedCLIP):
    """FedCLIP's module with the hyperparameters of FLoRA's comparison."""

    name = "fedaa"
    defaults: ClassVar[Mapping[str, Any]] = {
        "lr": 5e-5,
        "optimizer": "adam",
        "eps": 1e-6,
        "weight_decay": 0.2,
        "rounds": 50,
    }
    demonstration: ClassVar[Mapping[str, Any]] = {"lr": 5e-5}


class FedLC(SingleBranch):
    """A linear classifier on the output of the frozen image encoder."""

    name = "fedlc"
    modules: ClassVar[tuple[str, ...]] = ("classifier",)
    encoders = ("image",)
    defaults: ClassVar[Mapping[str, Any]] = {"lr": 1e-3, "task_loss": "cross-entropy"}


class FedVMLC(FedLC):
    """The image encoder and a linear classifier on its output."""

    name = "fedvmlc"
    modules = ("encoder", "classifier")
    sequential = True
    defaults: ClassVar[Mapping[str, Any]] = {"lr": 1e-5, "task_loss": "cross-entropy"}
    demonstration: ClassVar[Mapping[str, Any]] = {"lr": 1e-4}


class FedFFT(SingleBranch):
    """Full fine-tuning: all weights of the image encoder, the text encoder, or both; the logit scale stays frozen."""

    name = "fedfft"
    modules = ("encoder",)
    encoders = ("image", "text", "both")
    sequential = True
    demonstration: ClassVar[Mapping[str, Any]] = {"lr": 1e-4}
