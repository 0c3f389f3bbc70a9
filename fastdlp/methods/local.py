"""Local: every client fine-tunes one LoRA alone; nothing is exchanged (the paper's lower baseline)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastdlp.methods.base import Step
from fastdlp.sites import Branch

if TYPE_CHECKING:
    from fastdlp.config import TrainConfig


class Local:
    """One private LoRA of rank 2, cross-entropy only."""

    name = "local"
    shared = ()
    scored = ("local",)

    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    def branches(self) -> tuple[Branch, ...]:
        return (Branch("local", self.config.rank_local or 2, gated=False, lora_alpha=self.config.lora_alpha),)

    def step(self, step: Step) -> dict[str, Any]:
        (out,) = step.forward(self.scored)
        loss = step.task(out)
        step.update(loss, "local")
        return {"ce_local": loss}
