"""Local: every client fine-tunes one LoRA alone; nothing is exchanged (the paper's lower baseline)."""

from __future__ import annotations

from fastdlp.methods.single import SingleLoRA
from fastdlp.sites import Branch


class Local(SingleLoRA):
    """One private LoRA of rank 2."""

    name = "local"
    shared = ()
    scored = ("local",)

    def branches(self) -> tuple[Branch, ...]:
        return (Branch("local", self.config.rank_local or 2, gated=False, lora_alpha=self.config.lora_alpha),)
