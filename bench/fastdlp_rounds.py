"""fastdlp's own variants of a federated round: an engine over the benchmark's clients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdlp.adapters.bank import AdapterBank, Adapters
from fastdlp.adapters.branches import Site, tower_sites
from fastdlp.adapters.optimizer import Hyperparameters
from fastdlp.bench.problem import ALPHA, CHECKED, Losses, Problem
from fastdlp.clip.tower import Tower
from fastdlp.config import TrainConfig
from fastdlp.engine.cuda_graph import cuda_graphs
from fastdlp.engine.device import DTYPES
from fastdlp.engine.engine import Engine, Schedule, Slot
from fastdlp.engine.images import TokenSource
from fastdlp.engine.tasks import ClassificationTask, ImageTask, Prompts, Samples, TextTask, frozen_image_features
from fastdlp.methods import make_method
from fastdlp.methods.base import Method
from fastdlp.methods.losses import Objective, Outputs
from fastdlp.run.build_task import moved_stem

XI = 5e-5  # the gates' threshold


class EngineRounds:
    """The problem's clients in one engine.

    Timed rounds train the gates and threshold them. PEFT has no gates, so `first_steps` leaves them at one.

    Args:
        graph: record and replay the steps as CUDA graphs.
    """

    def __init__(
        self, problem: Problem, task: ClassificationTask, method: Method, bank: AdapterBank, graph: bool = False
    ) -> None:
        self.problem, self.task, self.method, self.graph = problem, task, method, graph
        self.engine = self._engine(bank, range(problem.steps), train_gates=True)

    def first_steps(self) -> Losses:
        # An engine returns the mean loss of a round, so each step is a round of one batch here.
        bank = initial_bank(self.problem, self.method, self.engine.bank.device, self.engine.bank.backend)
        engine = self._engine(bank, range(CHECKED), train_gates=False)
        means = []
        for step in range(CHECKED):
            engine.slots = self.slots(range(step, step + 1))
            means.append(engine.train_round(1).means)
            if step == CHECKED - 2:
                engine.aggregate()
        return {name: np.stack([mean[name] for mean in means]) for name in means[0]}

    def round(self) -> None:
        self.engine.train_round(1)
        self.engine.aggregate()

    def step(self) -> None:
        self.engine.train_round(1)

    def slots(self, steps: range) -> tuple[Slot, ...]:
        """Clients that hold these batches."""
        return tuple(
            Slot(np.array(self.problem.samples(client, steps)), np.arange(0), 0, client, 0)
            for client in range(self.problem.clients)
        )

    def _engine(self, bank: AdapterBank, steps: range, train_gates: bool) -> Engine:
        """An engine whose round is these batches of every client."""
        problem = self.problem
        schedule = Schedule(problem.batch, 1, self.task.rows(problem.batch) * problem.clients, padded=self.graph)
        runner = cuda_graphs(bank.device, bank.tensors) if self.graph else None
        labels = problem.labels.flatten().numpy()
        return make_engine(
            self.method, bank, self.task, self.slots(steps), labels, schedule, problem.lr, train_gates, runner
        )


def make_engine(
    method: Method,
    bank: AdapterBank,
    task: ClassificationTask,
    slots: Sequence[Slot],
    labels: np.ndarray,
    schedule: Schedule,
    lr: float,
    train_gates: bool = True,
    runner: Any = None,
) -> Engine:
    """An engine whose clients all have the same hyperparameters."""

    def everywhere(value: float) -> Tensor:
        return torch.full((len(slots),), value, device=bank.device)

    gate_lr, xi = (lr, XI) if train_gates else (0.0, 0.0)
    hyper = Hyperparameters(everywhere(lr), everywhere(gate_lr), everywhere(xi), everywhere(ALPHA))
    return Engine(method, bank, task, Objective(), hyper, slots, labels, schedule, runner=runner)


def make_bank(
    sites: Sequence[Site], method: Method, seeds: dict[str, list[list[int]]], device: torch.device | str, backend: str
) -> AdapterBank:
    """Adapters with gates at one; `seeds` has an entry per branch and client.

    With two adapters B is not zero, so that every term of the first step's loss matters. With one adapter B = 0, so
    that the first loss is the frozen model's.
    """
    bank = AdapterBank(sites, method.branches(), len(seeds["global"]), device, backend)
    bank.initialize("gaussian", {name: seeds[name] for name in bank.state})
    generator = torch.Generator().manual_seed(1)
    for state in bank.state.values():
        if len(bank.state) > 1:
            state.weights += 0.01 * torch.randn(state.weights.shape[1], generator=generator).to(device)
        state.gates.fill_(1.0)
    return bank


def initial_bank(
    problem: Problem, method: Method, device: torch.device | str = "cpu", backend: str = "torch"
) -> AdapterBank:
    """The adapters that every variant starts from: each client's own local one, and one global one for all."""
    seeds = {"local": [[0, 2, client] for client in range(problem.clients)], "global": [[0, 3]] * problem.clients}
    sites = tower_sites(problem.clip.tower(method.config.encoder).shape)
    return make_bank(sites, method, seeds, device, backend)


def configured_method(name: str = "feddlp", teacher: str = "fresh", encoder: str = "image") -> Method:
    return make_method(TrainConfig(method=name, teacher=teacher, encoder=encoder).resolved())  # type: ignore[arg-type]


def image_rounds(
    problem: Problem,
    precision: str,
    device: torch.device,
    backend: str = "torch",
    method: str = "feddlp",
    teacher: str = "fresh",
    graph: bool = False,
) -> EngineRounds:
    """Adapters in the image tower; class features are computed once."""
    clip, text = problem.clip, problem.text.to(device)
    tower = replace(_moved(clip.image, device, DTYPES[precision]), backend=backend)
    stem = moved_stem(clip.image_stem, device)
    tokens = TokenSource(stem, Pixels(problem.pixels), device, DTYPES[precision], 1 << 40)
    task, configured = ImageTask(tower, tokens, (text, text), clip.logit_scale), configured_method(method, teacher)
    return EngineRounds(problem, task, configured, initial_bank(problem, configured, device, backend), graph)


def text_rounds(
    problem: Problem,
    precision: str,
    device: torch.device,
    backend: str = "torch",
    method: str = "feddlp",
    cached: bool = True,
) -> EngineRounds:
    """Adapters in the text tower; image features are computed once and prompts are cut to the longest.

    Args:
        cached: without it nothing is saved: all tokens of every prompt, the last block for all of them, and the frozen
            image tower on the batch in each forward of a step.
    """
    clip, dtype = problem.clip, DTYPES[precision]
    image, image_stem = _moved(clip.image, device, dtype), moved_stem(clip.image_stem, device)
    tower, stem = replace(_moved(clip.text, device, dtype), backend=backend), moved_stem(clip.text_stem, device)
    if not cached:
        stem, tower = replace(stem, cut=False), replace(tower, pooled_only=False)
    tokens, index = stem(problem.ids.to(device))
    prompts = Prompts(tokens.to(dtype), index)
    if cached:
        images = F.normalize(frozen_image_features(image, image_stem, Pixels(problem.pixels)), dim=-1)
    else:  # not read
        images = torch.ones(problem.labels.numel(), problem.text.shape[1], device=device)
    task: Any = TextTask(tower, (prompts, prompts), images, clip.logit_scale)
    if not cached:
        task = UncachedTask(
            task, replace(image, pooled_only=False), image_stem, problem.pixels.flatten(0, 2).to(device)
        )
    configured = configured_method(method, encoder="text")
    return EngineRounds(problem, task, configured, initial_bank(problem, configured, device, backend))


class UncachedTask:
    """A text task whose images go through the frozen image tower in every forward.

    Args:
        task: over image features that are not read.
        tower, stem: of images.
        pixels: [samples, 3, S, S] normalized.
    """

    def __init__(
        self, task: ClassificationTask, tower: Tower, stem: Callable[[Tensor], Tensor], pixels: Tensor
    ) -> None:
        self.task, self.tower, self.stem, self.pixels = task, tower, stem, pixels
        self.rows, self.scoring_batch, self.stage = task.rows, task.scoring_batch, None

    def forward(self, samples: Samples, views: int, adapters: Adapters | None, scoring: bool = False) -> list[Outputs]:
        outputs = self.task.forward(samples, views, adapters, scoring)
        return [replace(out, image=self._images(samples)) for out in outputs]

    @torch.no_grad()
    def _images(self, samples: Samples) -> Tensor:
        """[n, S, d]; the batches of all clients are full."""
        tokens = self.stem(self.pixels[samples.ids.flatten()]).to(self.tower.proj.weight.dtype)
        return F.normalize(self.tower.features(tokens), dim=-1).view(*samples.ids.shape, -1)


class Pixels:
    """The problem's images by sample number."""

    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels.flatten(0, 2)

    def __len__(self) -> int:
        return len(self.pixels)

    def __call__(self, samples: np.ndarray) -> Tensor:
        return self.pixels[torch.from_numpy(samples)]

    def normalize(self, pixels: Tensor) -> Tensor:
        return pixels


_towers: dict[tuple[int, torch.device, torch.dtype], tuple[Tower, Tower]] = {}


def _moved(tower: Tower, device: torch.device, dtype: torch.dtype) -> Tower:
    """One copy for all variants of a benchmark, and on a CPU one layout of its weights."""
    key = id(tower), device, dtype
    if key not in _towers:
        _towers[key] = tower, tower.to(device, dtype)  # keeping the tower keeps its id unique
    return _towers[key][1]
