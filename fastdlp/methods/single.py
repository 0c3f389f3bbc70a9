"""Base class of methods with one branch, trained with the task loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastdlp.methods.base import Method, Step

if TYPE_CHECKING:
    from torch import Tensor


class SingleBranch(Method):
    """Trains the branch that is scored."""

    def step(self, step: Step) -> dict[str, Tensor]:
        (branch,) = self.scored
        (out,) = step.forward(self.scored)
        loss = step.task(out)
        step.update(loss, branch)
        return {f"ce_{branch}": loss}
