"""FEDDLP (arXiv 2503.07552): a private gated LoRA and a shared LoRA, updated alternately with mutual distillation."""

from __future__ import annotations

from typing import ClassVar

from fastdlp.adapters.branches import Branch
from fastdlp.methods.base import DISTILLATION, Losses, Method, Step

LOCAL, GLOBAL = ("local",), ("global",)


class FedDLP(Method):
    """Two models over the same frozen weights: frozen + local, frozen + global.

    1. The local adapter and its gate learn with L = CE + α · KD from the global model (frozen).
    2. The global adapter learns with L = CE + KD from the local model after step 1 (frozen).

    The global adapter does not change in step 1, so its one forward is teacher there and student in step 2.
    `--teacher pre-update` also takes step 2's teacher from before step 1's update: one forward less, one
    backward for both, and another algorithm.
    """

    name = "feddlp"
    shared = GLOBAL
    scored: ClassVar[tuple[str, ...]] = LOCAL
    own_options: ClassVar[tuple[str, ...]] = ("alpha", "teacher", *DISTILLATION)

    def branches(self) -> tuple[Branch, ...]:
        return self.lora("local", rank=4, gated=True), self.lora("global")

    def step(self, step: Step) -> Losses:
        if self.config.teacher == "pre-update":
            return self._pre_update(step)
        (local,) = step.forward(LOCAL)
        (shared,) = step.forward(GLOBAL)
        ce_local, kd_local = step.task(local), step.distil(local, shared.detach())
        step.update(ce_local + step.alpha * kd_local, "local")

        (teacher,) = step.forward(LOCAL, grad=False)
        ce_global, kd_global = step.task(shared), step.distil(shared, teacher)
        step.update(ce_global + kd_global, "global")
        return {"ce_local": ce_local, "kd_local": kd_local, "ce_global": ce_global, "kd_global": kd_global}

    def _pre_update(self, step: Step) -> Losses:
        local, shared = step.forward(LOCAL, GLOBAL)
        ce_local, kd_local = step.task(local), step.distil(local, shared.detach())
        ce_global, kd_global = step.task(shared), step.distil(shared, local.detach())
        step.update(ce_local + step.alpha * kd_local + ce_global + kd_global, "local", "global")
        return {"ce_local": ce_local, "kd_local": kd_local, "ce_global": ce_global, "kd_global": kd_global}
