"""Methods of one branch that is trained with the task loss."""

from __future__ import annotations

from typing import ClassVar

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
