"""FedCLIP: a frozen CLIP whose features pass through a small trained attention that is averaged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from fastdlp.adapters.branches import Tensors
from fastdlp.methods.single import SingleBranch


class FedCLIP(SingleBranch):
    """f ⊙ softmax(Linear(tanh(Linear(f)))) on the chosen encoder's output, 525,312 parameters at d = 512."""

    name = "fedclip"
    shared = ("global",)
    scored = ("global",)
    defaults: ClassVar[Mapping[str, Any]] = {"lr": 1e-3}

    def branches(self) -> tuple[Tensors, ...]:
        return (Tensors("global", ("attention",)),)


class FedAA(FedCLIP):
    """The same module with the hyperparameters of FLoRA's comparison (arXiv 2404.15182)."""

    name = "fedaa"
    defaults: ClassVar[Mapping[str, Any]] = {
        "lr": 5e-5,
        "optimizer": "adam",
        "eps": 1e-6,
        "weight_decay": 0.2,
        "rounds": 50,
    }
    demonstration: ClassVar[Mapping[str, Any]] = {"lr": 5e-5}
