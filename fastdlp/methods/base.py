"""What the engine asks of a method. A method is which adapters exist, one step, and what is exchanged.

A method never touches a kernel, a device or a round: it composes `Step.forward`, `Step.task`, `Step.distil`
and `Step.update`. It imports nothing heavy, so its name is known before torch is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Protocol

from fastdlp.sites import Branch

if TYPE_CHECKING:
    from torch import Tensor

    from fastdlp.config import TrainConfig
    from fastdlp.objective import Outputs


class Step(Protocol):
    """One batch of every active client, as a method sees it. Losses are vectors [n], one entry per client."""

    @property
    def alpha(self) -> Tensor:
        """Distillation weight of each active client, [n]."""

    def forward(self, *views: tuple[str, ...], grad: bool = True) -> list[Outputs]:
        """Run the adapted tower; one `Outputs` per view. A view names the branches added to the frozen weights."""

    def task(self, out: Outputs) -> Tensor:
        """Task loss [n]."""

    def distil(self, student: Outputs, teacher: Outputs) -> Tensor:
        """Distillation loss [n]."""

    def update(self, loss: Tensor, *branches: str) -> None:
        """Differentiate Σ loss and step the optimiser (and threshold the gates) of these branches."""


class Method(ABC):
    """A federated method. `shared` branches are averaged after each round; `scored` is the view of inference."""

    name: ClassVar[str]
    shared: ClassVar[tuple[str, ...]]
    scored: ClassVar[tuple[str, ...]]

    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    @abstractmethod
    def branches(self) -> tuple[Branch, ...]:
        """The adapters that every client holds."""

    @abstractmethod
    def step(self, step: Step) -> dict[str, Tensor]:
        """One optimisation step of every active client; returns the losses [n] by name."""
