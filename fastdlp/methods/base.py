"""The interface of a federated method: the branches that a client trains, one step, and what is exchanged.

A method composes `Step.forward`, `Step.task`, `Step.distil` and `Step.update`; it does not depend on kernels, devices
or rounds. Method modules do not import torch at run time.
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
Losses = dict[str, "Tensor"]  # [n] each, by name


class Step(Protocol):
    """One batch of every active client. Losses are vectors [n], one entry per client."""

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
        encoders: supported values of `--encoder`.
        sequential: clients train one after another in one copy of the weights, each from the server's weights with a
            new optimizer; for branches too large to be held once per client. All branches must be shared.
        own_options: options marked `of_methods` that it uses beside those of its branches.
        defaults, demonstration: default options of the method; `demonstration` with the embedded model.
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
        """Raises FastdlpError for options that this method does not support."""
        self.config = config
        if config.encoder not in self.encoders:
            raise FastdlpError(f"--method {self.name} supports --encoder {' or '.join(self.encoders)} only")
        classifies = any("classifier" in b.modules for b in self.branches() if isinstance(b, Tensors))
        if classifies and config.task_loss == "contrastive":
            raise FastdlpError(f"--method {self.name} has a classifier and does not support --task-loss contrastive")

    def reads(self) -> set[str]:
        """The options marked `of_methods` (`fastdlp.config.Option`) that this method uses."""
        found = set(self.own_options) | (set() if self.sequential else {"micro_batch"})
        for branch in self.branches():
            if isinstance(branch, Branch):
                found |= {"lora_alpha", "init", "rank_local" if branch.name == "local" else "rank_global"}
                found |= {"xi", "gate_lr", "threshold"} if branch.gated else set()
        return found

    @abstractmethod
    def branches(self) -> tuple[AnyBranch, ...]:
        """The branches of every client."""

    @abstractmethod
    def step(self, step: Step) -> Losses:
        """One optimization step of every active client; returns the losses [n] by name."""

    def lora(self, name: str, rank: int = 2, gated: bool = False, copy_of: str | None = None) -> Branch:
        """A LoRA as the options describe it; `rank` is that of a local one without --rank-local."""
        config = self.config
        rank = config.rank_local or rank if name == "local" else config.rank_global
        return Branch(name, rank, gated, config.lora_alpha, copy_of)
