"""Combined: FEDDLP's two adapters summed in one forward, without distillation (the paper's Tables VII and VIII)."""

from __future__ import annotations

from fastdlp.methods.base import Losses, Step
from fastdlp.methods.feddlp import FedDLP

BOTH = ("local", "global")


class Combined(FedDLP):
    """One model, frozen + local + global, and one task loss for both adapters; the global one is averaged."""

    name = "combined"
    scored = BOTH
    own_options = ()

    def step(self, step: Step) -> Losses:
        (out,) = step.forward(BOTH)
        loss = step.task(out)
        step.update(loss, *BOTH)
        return {"ce": loss}
