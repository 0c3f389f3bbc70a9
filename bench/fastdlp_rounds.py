"""fastdlp's own variants of a federated round: a run's task and engine over the benchmark's clients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdlp.adapters.bank import AdapterBank
from fastdlp.bench.problem import CHECKED, Losses, Problem
from fastdlp.clip.stem import ImageStem
from fastdlp.clip.tower import Tower
from fastdlp.config import TrainConfig
from fastdlp.data.partition import Partition
from fastdlp.engine.device import DTYPES
from fastdlp.engine.distributed import SINGLE_PROCESS
from fastdlp.engine.engine import Engine, Slot
from fastdlp.methods import make_method
from fastdlp.run.build_engine import Execution, build_engine, init_seeds
from fastdlp.run.build_task import Built, build_task, moved_stem

moved = cache(Tower.to)  # one copy for all variants of a benchmark, and on a CPU one layout of its weights


class EngineRounds:
    """The problem's clients in one engine, all of them in one step.

    Timed rounds train the gates and threshold them. PEFT has no gates, so `first_steps` leaves them at one.

    Args:
        encoder: the adapted tower, "image" or "text".
        graph: record and replay the steps as CUDA graphs.
        cached: without it nothing is saved for the text encoder: all tokens of every prompt, the last block for all of
            them, and the frozen image tower on the batch in each forward of a step.
    """

    def __init__(
        self,
        problem: Problem,
        precision: Any,
        device: torch.device,
        backend: str = "torch",
        encoder: Any = "image",
        method: str = "feddlp",
        teacher: Any = "fresh",
        graph: bool = False,
        cached: bool = True,
    ) -> None:
        self.problem, dtype, clip = problem, DTYPES[precision], problem.clip
        config = TrainConfig(
            method, encoder, precision=precision, backend=backend, teacher=teacher, lr=problem.lr,
            batch_size=problem.batch, cuda_graph=graph,
        ).resolved()  # fmt: skip
        if not cached:
            image, text = (replace(tower, pooled_only=False) for tower in (clip.image, clip.text))
            clip = replace(clip, image=image, text=text, text_stem=replace(clip.text_stem, cut=False))
        clip = replace(clip, image=moved(clip.image, device, dtype), text=moved(clip.text, device, dtype))
        built = build_task(config, make_method(config), clip, problem.data, clip.transform, device)
        if not cached:
            task: Any = built.task
            task.images = RecomputedImages(clip.image, moved_stem(clip.image_stem, device), problem.pixels.to(device))
        config = replace(config, micro_batch=built.task.rows(problem.batch) * problem.clients)
        samples = [problem.samples(client, range(problem.steps)) for client in range(problem.clients)]
        self.engine = make_engine(config, built, problem.data.labels, samples, device)
        start(self.engine.bank, self.engine.method.shared)

    def first_steps(self) -> Losses:
        # An engine returns the mean loss of a round, so each step is a round of one batch here.
        settings = self.engine.hyper.gate_lr, self.engine.hyper.xi  # changed in place, since a graph reads them there
        values = [tensor.clone() for tensor in settings]
        torch._foreach_zero_(settings)
        means = []
        for step in range(CHECKED):
            self.engine.slots = self.slots(range(step, step + 1))
            means.append(self.engine.train_round(1).means)
            if step == CHECKED - 2:
                self.engine.aggregate()
        self.engine.slots = self.slots(range(self.problem.steps))
        torch._foreach_copy_(settings, values)
        return {name: np.stack([mean[name] for mean in means]) for name in means[0]}

    def round(self) -> None:
        self.engine.train_round(1)
        self.engine.aggregate()

    def step(self) -> None:
        """One batch of every client, where a round has no more."""
        self.engine.train_round(1)

    def slots(self, steps: range) -> tuple[Slot, ...]:
        """Clients that hold these batches."""
        return tuple(
            replace(slot, train=self.problem.samples(client, steps)) for client, slot in enumerate(self.engine.slots)
        )


def make_engine(
    config: TrainConfig, built: Built, labels: np.ndarray, train: Sequence[np.ndarray], device: torch.device
) -> Engine:
    """A run's engine of clients with these training samples.

    Args:
        config: resolved, with the backend to use.
        built: the task, see `build_task`.
        labels: [samples] int64 class numbers.
        train: each client's sample numbers.
    """
    config = replace(config, clients=len(train))
    partition = Partition([*train], [np.arange(0)] * len(train), "iid", None, None, 0, 0.0)
    execution = Execution(device, SINGLE_PROCESS, config.backend, measure=False, graphs=bool(config.cuda_graph))
    engine, _ = build_engine([config], make_method(config), built, partition, labels, execution, print, print)
    return engine


def start(bank: AdapterBank, shared: Sequence[str]) -> AdapterBank:
    """The adapters that every variant starts from: each client's own private one, and one shared one, gates at one.

    With two adapters B is not zero, so that every term of the first step's loss matters. With one adapter B = 0, so
    that the first loss is the frozen model's.
    """
    bank.initialize("gaussian", {name: init_seeds(0, name in shared, bank.slots) for name in bank.state})
    generator = torch.Generator().manual_seed(1)
    for state in bank.state.values():
        if len(bank.state) > 1:
            state.weights += 0.01 * torch.randn(state.weights.shape[1], generator=generator).to(bank.device)
        state.gates.fill_(1.0)
    return bank


class RecomputedImages:
    """In place of `TextTask.images`: features by sample numbers, which run the frozen tower again in every forward.

    Args:
        tower, stem: of images.
        pixels: [clients, batches, batch, 3, S, S] normalized.
    """

    def __init__(self, tower: Tower, stem: ImageStem, pixels: Tensor) -> None:
        self.tower, self.stem, self.pixels = tower, stem, pixels.flatten(0, 2)

    @torch.no_grad()
    def __getitem__(self, samples: Tensor) -> Tensor:
        """[n, S] → [n, S, d] normalized."""
        tokens = self.stem(self.pixels[samples.flatten()]).to(self.tower.proj.weight.dtype)
        return F.normalize(self.tower.features(tokens), dim=-1).view(*samples.shape, -1)
