"""FedDAT: a shared adapter distilled from a teacher of its own frozen copy and a local adapter."""

from __future__ import annotations

from fastdlp.adapters.branches import Branch
from fastdlp.methods.base import DISTILLATION, Losses, Method, Step

TEACHER, SHARED = ("frozen", "local"), ("global",)


class FedDAT(Method):
    """Two models over the same frozen weights: frozen + copy + local (the teacher), frozen + global.

    The copy is the global adapter as the round found it. Each model learns with CE + KD from the other; the local
    adapter's teacher is the shared model from before its update, so one forward of both serves both losses.

    Clients are scored with frozen + new average + local, the teacher that the next round begins with. The local adapter
    has learned beside the old copy; where the average moves far in a round, that costs accuracy.
    """

    name = "feddat"
    shared = SHARED
    scored = ("local", "global")  # between rounds the copy would equal the global adapter
    own_options = DISTILLATION

    def branches(self) -> tuple[Branch, ...]:
        return self.lora("local"), self.lora("global"), self.lora("frozen", copy_of="global")

    def step(self, step: Step) -> Losses:
        local, shared = step.forward(TEACHER, SHARED)
        ce_global, kd_global = step.task(shared), step.distil(shared, local.detach())
        ce_local, kd_local = step.task(local), step.distil(local, shared.detach())
        step.update(ce_global + kd_global + ce_local + kd_local, "global", "local")
        return {"ce_local": ce_local, "kd_local": kd_local, "ce_global": ce_global, "kd_global": kd_global}
