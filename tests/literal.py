"""Federated fine-tuning of CLIP written out: one client, one batch, one step at a time, over plain modules.

The yardstick that a run of fastdlp is held against (`test_replay.py`). It is written from the published descriptions
and shares no code with the package: open_clip's own CLIP module (`literal_models.py`), torch's optimizers and gradient
clipping, averaging in a for loop. Slow and obvious.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.literal_models import AdaptedCLIP, AttentionHead, Classifier, Model, TrainedCLIP

PLAIN_CAPTION = "a photo of a {}."


@dataclass(frozen=True)
class Settings:
    """A method and every choice in which the published descriptions differ; `PROTOCOLS` names two sets of them."""

    method: str
    encoder: str
    lr: float
    gate_lr: float
    xi: float
    alpha: float
    task_loss: str
    kd_direction: str
    kd_temperature: float
    kd_logits: str
    clip_norm: float  # 0: gradients are not clipped
    threshold: str
    resize: str | None  # None: the model's own
    caption: str
    rank_local: int = 4
    rank_global: int = 2
    lora_alpha: float = 16.0
    teacher: str = "fresh"
    optimizer: str = "adamw"
    eps: float = 1e-8
    weight_decay: float = 0.0


PROTOCOLS = {
    "paper": {
        "task_loss": "cross-entropy",
        "kd_direction": "student-teacher",
        "kd_temperature": 1.0,
        "kd_logits": "class",
        "clip_norm": 0.0,
        "threshold": "soft",
        "resize": None,
        "caption": "dataset",
    },
    "reference": {
        "task_loss": "contrastive",
        "kd_direction": "teacher-student",
        "kd_temperature": 3.0,
        "kd_logits": "batch",
        "clip_norm": 1.0,
        "threshold": "reference",
        "resize": "squash",
        "caption": "plain",
    },
}

# What a method says by itself where a run says nothing.
DEFAULTS: dict[str, dict[str, Any]] = {"fedaa": {"lr": 5e-5, "optimizer": "adam", "eps": 1e-6, "weight_decay": 0.2}}


# -- losses and the gate's threshold --------------------------------------------------------------------------


def divergence(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(p ‖ q) of the softmax of each row, mean over rows."""
    p, log_p, log_q = p_logits.softmax(1), p_logits.log_softmax(1), q_logits.log_softmax(1)
    return (p * (log_p - log_q)).sum(1).mean()


def distillation(student: Tensor, teacher: Tensor, direction: str, temperature: float) -> Tensor:
    """KL between the rows of two logit matrices, times T²."""
    student, teacher = student / temperature, teacher.detach() / temperature
    kl = divergence(student, teacher) if direction == "student-teacher" else divergence(teacher, student)
    return kl * temperature**2


def soft_threshold(v: Tensor, xi: float) -> Tensor:
    """sign(v) · max(|v| − ξ, 0)."""
    return v.sign() * (v.abs() - xi).clamp(min=0)


def reference_threshold(v: Tensor, xi: float) -> Tensor:
    """The authors' three assignments, one after the other; what ends within ξ is zero, so the dead zone is 2ξ."""
    v = v.clone()
    v[v > xi] -= xi
    v[v < -xi] += xi
    v[v.abs() < xi] = 0
    return v


# -- clients and server -------------------------------------------------------------------------------------


GATED = ("feddlp", "local-sora", "combined")  # the local adapter has gates
STREAMED = ("fedvmlc", "fedfft")  # whole weights: a client is the server's copy for a round, with an optimizer for it
TRAINED: dict[str, Callable[[str], bool]] = {
    "image": lambda name: name.startswith("visual."),
    "text": lambda name: not name.startswith("visual.") and name != "logit_scale",
    "both": lambda name: name != "logit_scale",
}


class Client:
    """One client: every branch with the model that it is trained in and an optimizer of its own, and its samples."""

    def __init__(self, models: dict[str, Model], settings: Settings, train: Tensor, test: Tensor) -> None:
        self.models, self.settings, self.train, self.test = models, settings, train, test
        self.new_optimizers()

    def new_optimizers(self) -> None:
        """Optimizers that have seen nothing."""
        self.optimizers = {branch: self.optimizer(branch) for branch in self.models}

    def optimizer(self, branch: str) -> torch.optim.Optimizer:
        s, model = self.settings, self.models[branch]
        groups = [{"params": model.weights(branch), "lr": s.lr}]
        if model.gates(branch):
            groups.append({"params": model.gates(branch), "lr": s.gate_lr})
        kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[s.optimizer]
        return kind(groups, betas=(0.9, 0.999), eps=s.eps, weight_decay=s.weight_decay)


class Federation:
    """All clients and the server of one run. Tests break it on purpose by overriding its methods."""

    def __init__(
        self,
        settings: Settings,
        clip: open_clip.CLIP,
        tokenize: Callable[[list[str]], Tensor],
        class_names: Sequence[str],
        template: str,
        images: Tensor,
        labels: Tensor,
        clients: Sequence[tuple[Sequence[int], Sequence[int]]],
    ) -> None:
        """`images` [n, 3, H, W] and `labels` [n] hold all samples; `clients` the training and test indices of each."""
        self.settings, self.images, self.labels, self.classes = settings, images, labels, len(class_names)
        caption = template if settings.caption == "dataset" else PLAIN_CAPTION
        self.train_prompts = tokenize([caption.replace("{}", name) for name in class_names])
        self.test_prompts = tokenize([template.replace("{}", name) for name in class_names])
        self.clip = copy.deepcopy(clip).eval().requires_grad_(False).to(images.dtype)
        self.clients = [
            Client(
                self.models(),
                settings,
                torch.tensor(train, dtype=torch.long),
                torch.tensor(test, dtype=torch.long),
            )
            for train, test in clients
        ]
        self.server = self.models().get("global")

    def models(self) -> dict[str, Model]:
        """What a client holds, untrained: each branch with the model that it is trained in."""
        s = self.settings
        private, shared = {"local": (s.rank_local, s.method in GATED)}, {"global": (s.rank_global, False)}
        width = self.clip.visual.output_dim
        if s.method in ("local", "local-sora"):
            return {"local": self.adapted(private)}
        if s.method == "flora":
            return {"global": self.adapted(shared)}
        if s.method == "feddlp":
            return {"local": self.adapted(private), "global": self.adapted(shared)}
        if s.method == "feddat":
            return {"local": self.adapted({"frozen": shared["global"], **private}), "global": self.adapted(shared)}
        if s.method == "combined":
            both = self.adapted(private | shared)
            return {"local": both, "global": both}
        if s.method in ("fedclip", "fedaa"):
            return {"global": AttentionHead(self.clip, s.encoder, width)}
        if s.method == "fedlc":
            return {"global": Classifier(self.clip, width, self.classes)}
        if s.method == "fedvmlc":
            return {"global": Classifier(self.clip, width, self.classes, TRAINED["image"])}
        assert s.method == "fedfft"
        return {"global": TrainedCLIP(self.clip, {}, TRAINED[s.encoder])}

    def adapted(self, adapters: dict[str, tuple[int, bool]]) -> AdaptedCLIP:
        return AdaptedCLIP(self.clip, self.settings.encoder, adapters, self.settings.lora_alpha)

    def tensors(self) -> dict[str, Tensor]:
        """Everything trained of every client and of the server, as a trace names it; of sequential clients none."""
        owners: list[tuple[str, str, Model]] = []
        if self.settings.method not in STREAMED:
            owners += [(f"c{i}", branch, m) for i, c in enumerate(self.clients) for branch, m in c.models.items()]
        if self.server is not None:
            owners.append(("server", "global", self.server))
        return {
            f"{owner}/{branch}/{name}": tensor.detach()
            for owner, branch, model in owners
            for name, tensor in model.tensors(branch).items()
        }

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Set everything trained."""
        mine = self.tensors()
        assert mine.keys() == tensors.keys()
        for name, tensor in mine.items():
            assert tensor.shape == tensors[name].shape, name
            tensor.copy_(tensors[name])

    # -- a round

    def train(self, batches: Sequence[tuple[int, Sequence[int]]]) -> list[dict[str, float]]:
        """The clients' part of a round: (client, samples) in order. Mean losses over the samples of each client."""
        for client in self.clients:
            self.start_round(client)
        totals: list[dict[str, float]] = [{} for _ in self.clients]
        counts = [0] * len(self.clients)
        for number, samples in batches:
            index = torch.tensor(samples)
            losses = self.step(self.clients[number], self.images[index], self.labels[index])
            counts[number] += len(samples)
            for name, loss in losses.items():
                totals[number][name] = totals[number].get(name, 0.0) + loss.item() * len(samples)
        return [{name: total / n for name, total in sums.items()} for sums, n in zip(totals, counts)]

    def start_round(self, client: Client) -> None:
        """What a client does before its first batch of a round."""
        if self.settings.method == "feddat":
            self.refresh_copy(client)
        if self.settings.method in STREAMED:
            assert self.server is not None
            copy_tensors(self.server.tensors("global"), client.models["global"].tensors("global"))
            client.new_optimizers()

    def refresh_copy(self, client: Client) -> None:
        """FedDAT: the frozen copy becomes what the global adapter is now."""
        copy_tensors(client.models["global"].tensors("global"), client.models["local"].tensors("frozen"))

    def step(self, client: Client, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """One step of the run's method on one batch; returns its losses."""
        if self.settings.method == "feddlp":
            return self.feddlp_step(client, images, labels)
        if self.settings.method == "feddat":
            return self.feddat_step(client, images, labels)
        (model,) = set(client.models.values())
        ce = self.task_loss(model, images, labels)
        self.update(client, ce, *client.models)
        return {"ce" if self.settings.method == "combined" else f"ce_{next(iter(client.models))}": ce}

    def feddlp_step(self, client: Client, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The local adapter learns with the global one as teacher, then the global one with the local as teacher."""
        local, shared = client.models["local"], client.models["global"]
        before = self.views(local, images, labels)
        ce_local = self.task_loss(local, images, labels)
        kd_local = self.kd(before, self.views(shared, images, labels))
        self.update(client, ce_local + self.settings.alpha * kd_local, "local")

        teacher = self.views(local, images, labels) if self.settings.teacher == "fresh" else before
        ce_global = self.task_loss(shared, images, labels)
        kd_global = self.kd(self.views(shared, images, labels), teacher)
        self.update(client, ce_global + kd_global, "global")
        return {"ce_local": ce_local, "kd_local": kd_local, "ce_global": ce_global, "kd_global": kd_global}

    def feddat_step(self, client: Client, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The global adapter and frozen copy + local teach each other, both as they were before the step."""
        dat, shared = client.models["local"], client.models["global"]
        of_dat, of_shared = self.views(dat, images, labels), self.views(shared, images, labels)
        ce_global, kd_global = self.task_loss(shared, images, labels), self.kd(of_shared, of_dat)
        ce_local, kd_local = self.task_loss(dat, images, labels), self.kd(of_dat, of_shared)
        self.update(client, ce_global + kd_global, "global")
        self.update(client, ce_local + kd_local, "local")
        return {"ce_local": ce_local, "kd_local": kd_local, "ce_global": ce_global, "kd_global": kd_global}

    def task_loss(self, model: Model, images: Tensor, labels: Tensor) -> Tensor:
        if self.settings.task_loss == "cross-entropy" or isinstance(model, Classifier):
            return F.cross_entropy(model.logits(images, self.train_prompts), labels)
        logits = model.logits(images, self.train_prompts[labels])
        own = torch.arange(len(labels))
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2

    def views(self, model: Model, images: Tensor, labels: Tensor) -> list[Tensor]:
        """The logit matrices whose rows distillation compares; their divergences are averaged."""
        if self.settings.kd_logits == "class":
            return [model.logits(images, self.train_prompts)]
        logits = model.logits(images, self.train_prompts[labels])
        return [logits, logits.T]

    def kd(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        """Distillation; no gradient goes to the teacher."""
        s = self.settings
        divergences = [distillation(a, b, s.kd_direction, s.kd_temperature) for a, b in zip(student, teacher)]
        return sum(divergences, torch.zeros(())) / len(divergences)

    def update(self, client: Client, loss: Tensor, *branches: str) -> None:
        """One optimizer step on these branches, each clipped apart, then the threshold on their gates."""
        models = {branch: client.models[branch] for branch in branches}
        for branch in branches:
            client.optimizers[branch].zero_grad()
        trained = [p for branch, model in models.items() for p in (*model.weights(branch), *model.gates(branch))]
        loss.backward(inputs=trained)
        for branch, model in models.items():
            self.clip_gradients(model, branch)
            client.optimizers[branch].step()
            with torch.no_grad():
                for gate in model.gates(branch):
                    gate.copy_(self.threshold(gate))

    def clip_gradients(self, model: Model, branch: str) -> None:
        if self.settings.clip_norm:
            torch.nn.utils.clip_grad_norm_(model.weights(branch), self.settings.clip_norm)

    def threshold(self, gate: Tensor) -> Tensor:
        shrink = soft_threshold if self.settings.threshold == "soft" else reference_threshold
        return shrink(gate, self.settings.xi)

    @torch.no_grad()
    def aggregate(self) -> None:
        """Each of the server's tensors becomes Σ n_k/n of the clients'; every client goes on from it."""
        if self.server is None:
            return
        sizes = self.sizes()
        for name, target in self.server.tensors("global").items():
            target.zero_()
            for client, size in zip(self.clients, sizes):
                target.add_(size / sum(sizes) * client.models["global"].tensors("global")[name])
        for client in self.clients:
            copy_tensors(self.server.tensors("global"), client.models["global"].tensors("global"))

    def sizes(self) -> list[int]:
        return [len(client.train) for client in self.clients]

    # -- scores

    @torch.no_grad()
    def score(self) -> list[int]:
        """Correct predictions on each client's own test samples."""
        return [self._correct(self.scored(client).logits, client.test) for client in self.clients]

    def scored(self, client: Client) -> Model:
        """The model of inference: with the local adapter where there is one, else what was averaged."""
        if self.settings.method == "feddat":
            self.refresh_copy(client)  # the average in the copy's place, beside the local adapter
        return client.models["local" if "local" in client.models else "global"]

    def gates_zero(self) -> list[int]:
        """Gates at zero of each client."""
        return [
            sum(int((gate == 0).sum()) for branch, model in c.models.items() for gate in model.gates(branch))
            for c in self.clients
        ]

    @torch.no_grad()
    def zero_shot(self) -> list[int]:
        """Correct predictions without anything trained."""

        def logits(images: Tensor, prompts: Tensor) -> Tensor:
            return self.clip.get_logits(images, prompts)[0]

        return [self._correct(logits, client.test) for client in self.clients]

    def _correct(self, logits: Callable[[Tensor, Tensor], Tensor], test: Tensor) -> int:
        if not len(test):
            return 0
        predictions = logits(self.images[test], self.test_prompts).argmax(1)
        return int((predictions == self.labels[test]).sum())


@torch.no_grad()
def copy_tensors(source: dict[str, nn.Parameter], target: dict[str, nn.Parameter]) -> None:
    """Set `target` to the values of `source`, name by name."""
    for name, tensor in target.items():
        tensor.copy_(source[name])
