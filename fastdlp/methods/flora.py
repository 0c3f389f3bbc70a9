"""FLoRA (arXiv 2404.15182): one LoRA on every client, averaged after every round."""

from __future__ import annotations

from fastdlp.adapters.branches import Branch
from fastdlp.methods.single import SingleBranch


class FLoRA(SingleBranch):
    """One shared LoRA of rank 2; clients are scored with the averaged adapter."""

    name = "flora"
    shared = ("global",)
    scored = ("global",)

    def branches(self) -> tuple[Branch, ...]:
        return (Branch("global", self.config.rank_global, gated=False, lora_alpha=self.config.lora_alpha),)
