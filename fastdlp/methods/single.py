"""Methods of one branch: FLoRA (arXiv 2404.15182) and its baselines, whose branch is averaged, and local training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from fastdlp.adapters.branches import AnyBranch, Tensors
from fastdlp.methods.base import Losses, Method, Step


class SingleBranch(Method):
    """A method of one branch, trained with the task loss: a LoRA, or all tensors of `modules`."""

    modules: ClassVar[tuple[str, ...]] = ()  # as in `Tensors`
    gated: ClassVar[bool] = False  # whether the LoRA is
    shared: ClassVar[tuple[str, ...]] = ("global",)
    scored: ClassVar[tuple[str, ...]] = ("global",)

    def branches(self) -> tuple[AnyBranch, ...]:
        (name,) = self.scored
        return (Tensors(name, self.modules) if self.modules else self.lora(name, gated=self.gated),)

    def step(self, step: Step) -> Losses:
        (branch,) = self.scored
        (out,) = step.forward(self.scored)
        loss = step.task(out)
        step.update(loss, branch)
        return {f"ce_{branch}": loss}


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


class Local(SingleBranch):
    """One private LoRA of rank 2, never exchanged: the paper's lower baseline."""

    name = "local"
    shared = ()
    scored = ("local",)


class LocalSoRA(Local):
    """One private LoRA of rank 2 with a SoRA gate: the ablation of the paper's Figure 2."""

    name = "local-sora"
    gated = True
