"""fastdlp's own forms of a federated round: an engine over the benchmark's clients."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdlp.adapters.bank import AdapterBank
from fastdlp.adapters.branches import tower_sites
from fastdlp.adapters.optimizer import Hyperparameters
from fastdlp.bench.problem import ALPHA, CHECKED, Problem
from fastdlp.bench.products import FrozenProducts
from fastdlp.bench.runner import Losses
from fastdlp.clip.tower import Tower
from fastdlp.config import TrainConfig
from fastdlp.engine.cuda_graph import cuda_graphs
from fastdlp.engine.device import DTYPES
from fastdlp.engine.engine import Engine
from fastdlp.engine.images import TokenSource
from fastdlp.engine.round_losses import RoundLosses
from fastdlp.engine.schedule import Schedule, Slot
from fastdlp.engine.tasks import ClassificationTask, ImageTask, Prompts, TextTask, frozen_image_features
from fastdlp.methods import make_method
from fastdlp.methods.base import Method
from fastdlp.methods.losses import Objective
from fastdlp.run.build_task import moved_stem

XI = 5e-5  # the gates' threshold


class EngineRounds:
    """A federation of the problem's clients in one engine.

    Its timed rounds train gates and threshold them. PEFT has no gate: in `first_steps`, over adapters of its own, gates
    stand at one.
    """

    def __init__(
        self, problem: Problem, task: ClassificationTask, method: Method, bank: AdapterBank, graph: bool = False
    ) -> None:
        self.problem, self.task, self.method, self.graph = problem, task, method, graph
        self.engine = self._engine(bank, range(problem.steps), train_gates=True)

    def first_steps(self) -> Losses:
        # An engine tells the mean of a round: one of one batch, again and again over the same bank, tells each step.
        bank = initial_bank(self.problem, self.method, self.engine.bank.device, self.engine.bank.backend)
        engine = self._engine(bank, range(CHECKED), train_gates=False)
        means = []
        for step in range(CHECKED):
            engine.slots = self._slots(range(step, step + 1))
            means.append(engine.train_round(1).means)
            if step == CHECKED - 2:
                engine.aggregate()
        return {name: np.stack([mean[name] for mean in means]) for name in means[0]}

    def round(self) -> RoundLosses:
        losses = self.engine.train_round(1)
        self.engine.aggregate()
        return losses

    def step(self) -> RoundLosses:
        return self.engine.train_round(1)

    def products(self, forwards: int, backwards: int) -> FrozenProducts:
        """The frozen products of a step of all clients, over the very weights that the step has."""
        task, problem = self.task, self.problem
        assert isinstance(task, ImageTask | TextTask)
        positions = task.prompts[0].tokens[0] if isinstance(task, TextTask) else problem.clip.image_stem.positions
        rows = task.rows(problem.batch) * problem.clients
        return FrozenProducts(task.tower, rows, len(positions), forwards, backwards)

    def _slots(self, steps: range) -> tuple[Slot, ...]:
        """Clients that hold these batches."""
        return tuple(
            Slot(np.array(self.problem.samples(client, steps)), np.arange(0), 0, client, 0)
            for client in range(self.problem.clients)
        )

    def _engine(self, bank: AdapterBank, steps: range, train_gates: bool) -> Engine:
        """An engine whose round is these batches of every client."""
        clients, device, batch, lr = self.problem.clients, bank.device, self.problem.batch, self.problem.lr

        def everywhere(value: float) -> Tensor:
            return torch.full((clients,), value, device=device)

        gate_lr, xi = (lr, XI) if train_gates else (0.0, 0.0)
        hyper = Hyperparameters(everywhere(lr), everywhere(gate_lr), everywhere(xi), everywhere(ALPHA))
        schedule = Schedule(batch, 1, self.task.rows(batch) * clients, padded=self.graph)
        runner = cuda_graphs(device, bank.tensors) if self.graph else None
        labels = self.problem.labels.flatten().numpy()
        slots = self._slots(steps)
        return Engine(self.method, bank, self.task, Objective(), hyper, slots, labels, schedule, runner=runner)


def image_rounds(
    problem: Problem,
    precision: str,
    device: torch.device,
    backend: str = "torch",
    method: str = "feddlp",
    teacher: str = "fresh",
    graph: bool = False,
) -> EngineRounds:
    """Adapters in the image tower; class features cached."""
    clip, text = problem.clip, problem.text.to(device)
    tower = replace(_moved(clip.image, device, DTYPES[precision]), backend=backend)
    stem = moved_stem(clip.image_stem, device)
    tokens = TokenSource(stem, Pixels(problem.pixels), device, DTYPES[precision], 1 << 40)
    task = ImageTask(tower, tokens, (text, text), clip.logit_scale)
    made = _method(method, teacher, "image")
    return EngineRounds(problem, task, made, initial_bank(problem, made, device, backend), graph)


def text_rounds(
    problem: Problem, precision: str, device: torch.device, backend: str = "torch", method: str = "feddlp"
) -> EngineRounds:
    """Adapters in the text tower; prompts cut to the longest, image features cached."""
    clip = problem.clip
    image = _moved(clip.image, device, DTYPES[precision])
    images = frozen_image_features(image, moved_stem(clip.image_stem, device), Pixels(problem.pixels))
    return text_rounds_over(problem, text_task(problem, images, precision, device, backend), device, backend, method)


def text_rounds_over(
    problem: Problem, task: ClassificationTask, device: torch.device, backend: str, method: str
) -> EngineRounds:
    """Adapters in the text tower, with a task of the caller's."""
    made = _method(method, "fresh", "text")
    return EngineRounds(problem, task, made, initial_bank(problem, made, device, backend))


def text_task(
    problem: Problem, images: Tensor, precision: str, device: torch.device, backend: str, plain: bool = False
) -> TextTask:
    """The task over image features [samples, d] fp32, not normalized.

    Args:
        plain: the prompts at their full length, and the last block for all of their tokens.
    """
    clip, dtype = problem.clip, DTYPES[precision]
    stem = moved_stem(clip.text_stem, device)
    tower = replace(_moved(clip.text, device, dtype), backend=backend)
    if plain:
        stem, tower = replace(stem, cut=False), replace(tower, pooled_only=False)
    tokens, index = stem(problem.ids.to(device))
    prompts = Prompts(tokens.to(dtype), index)
    return TextTask(tower, (prompts, prompts), F.normalize(images, dim=-1), clip.logit_scale)


_towers: dict[tuple[int, torch.device, torch.dtype], tuple[Tower, Tower]] = {}


def _moved(tower: Tower, device: torch.device, dtype: torch.dtype) -> Tower:
    """One copy for all forms of a benchmark, and on a CPU one layout of its weights."""
    key = id(tower), device, dtype
    if key not in _towers:
        _towers[key] = tower, tower.to(device, dtype)  # the tower is held, so its id stays its own
    return _towers[key][1]


def initial_bank(
    problem: Problem, method: Method, device: torch.device | str = "cpu", backend: str = "torch"
) -> AdapterBank:
    """Adapters at the start of every form: a local one of each client's own, the same global one, gates at one.

    B is not zero where there are two adapters, so that every term of the first step is live. Where there is one, B = 0
    and the first loss is the frozen model's.
    """
    clients = problem.clients
    sites = tower_sites(problem.clip.tower(method.config.encoder).shape)
    bank = AdapterBank(sites, method.branches(), clients, device, backend)
    seeds = {"local": [[0, 2, client] for client in range(clients)], "global": [[0, 3]] * clients}
    bank.initialize("gaussian", {name: seeds[name] for name in bank.state})
    generator = torch.Generator().manual_seed(1)
    for state in bank.state.values():
        if len(bank.state) > 1:
            state.weights += 0.01 * torch.randn(state.weights.shape[1], generator=generator).to(device)
        state.gates.fill_(1.0)
    return bank


def feddlp() -> Method:
    """The method whose adapters the baselines share."""
    return _method("feddlp", "fresh", "image")


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


def _method(name: str, teacher: str, encoder: str) -> Method:
    return make_method(TrainConfig(method=name, teacher=teacher, encoder=encoder).resolved())  # type: ignore[arg-type]
