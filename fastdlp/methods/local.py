"""Local: every client fine-tunes one LoRA alone; nothing is exchanged (the paper's lower baseline)."""

from __future__ import annotations

from fastdlp.adapters.branches import Branch
from fastdlp.methods.base import SingleBranch


class Local(SingleBranch):
    """One private LoRA of rank 2."""

    name = "local"
    shared = ()
    scored = ("local",)

    def branches(self) -> tuple[Branch, ...]:
        return (self.lora("local"),)


class LocalSoRA(Local):
    """One private LoRA of rank 2 with a SoRA gate: the ablation of the paper's Figure 2."""

    name = "local-sora"

    def branches(self) -> tuple[Branch, ...]:
        return (self.lora("local", gated=True),)
