"""FLoRA (arXiv 2404.15182): one LoRA on every client, averaged after every round."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastdlp.methods.base import Step
from fastdlp.sites import Branch

if TYPE_CHECKING:
    from fastdlp.config import TrainConfig


class FLoRA:
    """One shared LoRA of rank 2, cross-entropy only; clients are scored with the averaged adapter."""

    name = "flora"
    shared = ("global",)
    scored = ("global",)

    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    def branches(self) -> tuple[Branch, ...]:
        return (Branch("global", self.config.rank_global, gated=False, lora_alpha=self.config.lora_alpha),)

    def step(self, step: Step) -> dict[str, Any]:
        (out,) = step.forward(self.scored)
        loss = step.task(out)
        step.update(loss, "global")
        return {"ce_global": loss}
