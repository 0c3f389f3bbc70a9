"""Local training without exchange."""

from __future__ import annotations

from fastdlp.methods.single import SingleBranch


class Local(SingleBranch):
    """One private LoRA of rank 2, never exchanged: the paper's lower baseline."""

    name = "local"
    shared = ()
    scored = ("local",)


class LocalSoRA(Local):
    """One private LoRA of rank 2 with a SoRA gate: the ablation of the paper's Figure 2."""

    name = "local-sora"
    gated = True
