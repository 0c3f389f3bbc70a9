"""What the engine asks of a method. A method is what a client trains, one step, and what is exchanged.

A method never touches a kernel, a device or a round: it composes `Step.forward`, `Step.task`, `Step.distil`
and `Step.update`. It imports nothing heavy, so its name is known before torch is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from fastdlp.adapters.branches import AnyBranch, Branch, Tensors
from fastdlp.errors import FastdlpError

if TYPE_CHECKING:
    from torch import Tensor

    from fastdlp.config import TrainConfig
    from fastdlp.methods.losses import Outputs


DISTILLATION = ("kd_direction", "kd_temperature", "kd_logits")


class Step(Protocol):
    """One batch of every active client, as a method sees it. Losses are vectors [n], one entry per client."""

    @property
    def alpha(self) -> Tensor:
        """Distillation weight of each active client, [n]."""

    def forward(self, *views: tuple[str, ...], grad: bool = True) -> list[Outputs]:
        """Run the adapted model; one `Outputs` per view. A view names the branches that are summed in one forward."""

    def task(self, out: Outputs) -> Tensor:
        """Task loss [n]."""

    def distil(self, student: Outputs, teacher: Outputs) -> Tensor:
        """Distillation loss [n]."""

    def update(self, loss: Tensor, *branches: str) -> None:
        """Differentiate Σ loss and step the optimizer (and threshold the gates) of these branches."""


class Method(ABC):
    """A federated method.

    Class attributes:
        shared: the branches that are averaged after each round.
        scored: the view of inference.
        encoders: what `--encoder` may be.
        sequential: clients take turns on one row that starts from the server's each round, optimizer included; for
            what is too large to be held once a client. All branches are shared then.
        own_options: options marked `of_methods` that it reads, besides those of its branches.
        defaults, demonstration: options that a run takes from the method unless they are given: always, and with the
            embedded model.
    """

    name: ClassVar[str]
    shared: ClassVar[tuple[str, ...]]
    scored: ClassVar[tuple[str, ...]]
    encoders: ClassVar[tuple[str, ...]] = ("image", "text")
    sequential: ClassVar[bool] = False
    own_options: ClassVar[tuple[str, ...]] = ()
    defaults: ClassVar[Mapping[str, Any]] = {}
    demonstration: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, config: TrainConfig) -> None:
        """Raises FastdlpError for options that this method does not go with."""
        self.config = config
        if config.encoder not in self.encoders:
            raise FastdlpError(f"--method {self.name} goes with --encoder {' or '.join(self.encoders)} only")
        classifies = any("classifier" in b.modules for b in self.branches() if isinstance(b, Tensors))
        if classifies and config.task_loss == "contrastive":
            raise FastdlpError(f"--method {self.name} has a classifier: --task-loss contrastive does not go with it")

    def reads(self) -> set[str]:
        """The options marked `of_methods` (`fastdlp.config.Option`) that this method reads."""
        found = set(self.own_options) | (set() if self.sequential else {"micro_batch"})
        for branch in self.branches():
            if isinstance(branch, Branch):
                found |= {"lora_alpha", "init", "rank_local" if branch.name == "local" else "rank_global"}
                found |= {"xi", "gate_lr", "threshold"} if branch.gated else set()
        return found

    @abstractmethod
    def branches(self) -> tuple[AnyBranch, ...]:
        """What every client holds."""

    @abstractmethod
    def step(self, step: Step) -> dict[str, Tensor]:
        """One optimisation step of every active client; returns the losses [n] by name."""
