"""Literal loops with one thing wrong each: a replay has to tell every one of them from the run."""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.literal import Client, Federation, copy_tensors, distillation, soft_threshold
from tests.literal_models import AdaptedCLIP, Adapter, AttentionHead, Classifier, Model, TrainedCLIP
from tests.literal_replay import BATCH

# -- any method ---------------------------------------------------------------------------------------------------


class NoGate(Federation):
    """Gates left out of the forward."""

    def adapted(self, adapters: dict[str, tuple[int, bool]]) -> AdaptedCLIP:
        def forward(adapter: Adapter, x: Tensor) -> Tensor:
            return adapter.scale * (x @ adapter.A.T) @ adapter.B.T

        model = super().adapted(adapters)
        for adapter in model.modules():
            if isinstance(adapter, Adapter):
                adapter.forward = functools.partial(forward, adapter)
        return model


class ClippedGates(Federation):
    def clip_gradients(self, model: Model, branch: str) -> None:
        torch.nn.utils.clip_grad_norm_([*model.weights(branch), *model.gates(branch)], self.settings.clip_norm)


class ClippedEach(Federation):
    """Every tensor clipped by its own norm."""

    def clip_gradients(self, model: Model, branch: str) -> None:
        for p in model.weights(branch):
            torch.nn.utils.clip_grad_norm_([p], self.settings.clip_norm)


class BackwardEpoch(Federation):
    def train(self, batches: Any) -> Any:
        return super().train(batches[::-1])


class ForgetfulOptimizer(Federation):
    """Optimizers made anew each round."""

    def train(self, batches: Any) -> Any:
        for client in self.clients:
            client.new_optimizers()
        return super().train(batches)


class Unweighted(Federation):
    def sizes(self) -> list[int]:
        return [int(len(client.train) > 0) for client in self.clients]


class WeightedByBatches(Federation):
    def sizes(self) -> list[int]:
        return [math.ceil(len(client.train) / BATCH) for client in self.clients]


class EveryoneCounts(Federation):
    """The client without training samples is averaged in too."""

    def sizes(self) -> list[int]:
        return [max(len(client.train), 1) for client in self.clients]


class NoDownload(Federation):
    def aggregate(self) -> None:
        shared = [client.models["global"].tensors("global") for client in self.clients]
        kept = [{name: t.detach().clone() for name, t in tensors.items()} for tensors in shared]
        super().aggregate()
        for tensors, before in zip(shared, kept):
            copy_tensors(before, tensors)


class GlobalFirst(Federation):
    def feddlp_step(self, client: Client, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        for branch, other, weight in (("global", "local", 1.0), ("local", "global", self.settings.alpha)):
            model = client.models[branch]
            kd = self.kd(self.views(model, images, labels), self.views(client.models[other], images, labels))
            self.update(client, self.task_loss(model, images, labels) + weight * kd, branch)
        return {}


class AlphaTwice(Federation):
    """The global step weighs distillation with alpha too."""

    def kd(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        self.turn = not getattr(self, "turn", False)
        return super().kd(student, teacher) * (1.0 if self.turn else self.settings.alpha)


class NoTSquared(Federation):
    def kd(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        return super().kd(student, teacher) / self.settings.kd_temperature**2


class OneAxisKD(Federation):
    def kd(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        s = self.settings
        return distillation(student[0], teacher[0], s.kd_direction, s.kd_temperature)


class OneAxisTask(Federation):
    def task_loss(self, model: Model, images: Tensor, labels: Tensor) -> Tensor:
        logits = model.logits(images, self.train_prompts[labels])
        return torch.nn.functional.cross_entropy(logits, torch.arange(len(labels)))


class ScaledThreshold(Federation):
    def threshold(self, gate: Tensor) -> Tensor:
        return soft_threshold(gate, self.settings.xi * self.settings.gate_lr)


class ThresholdEachRound(Federation):
    def threshold(self, gate: Tensor) -> Tensor:
        return gate

    def aggregate(self) -> None:
        super().aggregate()
        for client in self.clients:
            for gate in client.models["local"].gates("local"):
                gate.data = soft_threshold(gate.data, self.settings.xi)


# -- feddat -------------------------------------------------------------------------------------------------------


class NoCopy(Federation):
    """DAT is the local adapter alone: the copy stays untrained, so nothing is added."""

    def refresh_copy(self, client: Client) -> None:
        return


class CopyOfFirstRound(Federation):
    """The copy is taken once, when the first average has arrived, and kept."""

    def refresh_copy(self, client: Client) -> None:
        if not any(p.any() for name, p in client.models["local"].tensors("frozen").items() if name.endswith("/B")):
            super().refresh_copy(client)


class LiveCopy(Federation):
    """DAT is the global adapter as it is now, and the local one."""

    def step(self, client: Client, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self.refresh_copy(client)
        return super().step(client, images, labels)


class AlphaInFedDAT(Federation):
    """α weighs what the local adapter distils."""

    def feddat_step(self, client: Client, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        dat, shared = client.models["local"], client.models["global"]
        of_dat, of_shared = self.views(dat, images, labels), self.views(shared, images, labels)
        local = self.task_loss(dat, images, labels) + self.settings.alpha * self.kd(of_dat, of_shared)
        self.update(client, self.task_loss(shared, images, labels) + self.kd(of_shared, of_dat), "global")
        self.update(client, local, "local")
        return {}


class FreshTeacher(Federation):
    """The local adapter learns from the global one as it is after its update."""

    def feddat_step(self, client: Client, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        for branch, other in (("global", "local"), ("local", "global")):
            model = client.models[branch]
            kd = self.kd(self.views(model, images, labels), self.views(client.models[other], images, labels))
            self.update(client, self.task_loss(model, images, labels) + kd, branch)
        return {}


class LocalTeacher(Federation):
    """The global adapter learns from the local one after its update."""

    def feddat_step(self, client: Client, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        for branch, other in (("local", "global"), ("global", "local")):
            model = client.models[branch]
            kd = self.kd(self.views(model, images, labels), self.views(client.models[other], images, labels))
            self.update(client, self.task_loss(model, images, labels) + kd, branch)
        return {}


class TrainedCopy(Federation):
    """The copy is trained beside the local adapter, as long as the round lasts."""

    def feddat_step(self, client: Client, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        dat = client.models["local"]
        copy = dat.weights("frozen")
        losses = super().feddat_step(client, images, labels)
        grads = torch.autograd.grad(self.task_loss(dat, images, labels), copy)
        with torch.no_grad():
            for p, grad in zip(copy, grads):
                p -= self.settings.lr * grad.sign()
        return losses


class NoDistillation(Federation):
    def kd(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        return super().kd(student, teacher) * 0


class ScoredAsTrained(Federation):
    """Clients are scored with the copy that they trained beside, not with the new average."""

    def scored(self, client: Client) -> Model:
        return client.models["local"]


class ScoredWithout(Federation):
    """Clients are scored without the adapters in `left_out`."""

    left_out: tuple[str, ...]

    def scored(self, client: Client) -> Model:
        model = copy.deepcopy(super().scored(client))
        assert isinstance(model, AdaptedCLIP)
        for site in model.sites.values():
            for branch in self.left_out:
                if branch in site.adapters:
                    site.adapters[branch].B.zero_()
        return model


class ScoredWithoutGlobal(ScoredWithout):
    left_out = ("frozen", "global")


class ScoredWithoutLocal(ScoredWithout):
    left_out = ("local",)


# -- combined -------------------------------------------------------------------------------------------------------


class Apart(Federation):
    """Each adapter learns by itself, in a model of its own, as in FEDDLP without distillation."""

    def models(self) -> dict[str, Model]:
        private = {"local": (self.settings.rank_local, True)}
        return {"local": self.adapted(private), "global": self.adapted({"global": (self.settings.rank_global, False)})}

    def step(self, client: Client, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        for branch, model in client.models.items():
            self.update(client, self.task_loss(model, images, labels), branch)
        return {}


class OneAfterTheOther(Federation):
    """The global adapter's gradient is of after the local one's update."""

    def step(self, client: Client, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        for branch, model in client.models.items():
            self.update(client, self.task_loss(model, images, labels), branch)
        return {}


class ClippedTogether(Federation):
    """One norm for the local and the global adapter."""

    def update(self, client: Client, loss: Tensor, *branches: str) -> None:
        self.together = [p for branch in branches for p in client.models[branch].weights(branch)]
        super().update(client, loss, *branches)

    def clip_gradients(self, model: Model, branch: str) -> None:
        torch.nn.utils.clip_grad_norm_(self.together, self.settings.clip_norm)


# -- heads ------------------------------------------------------------------------------------------------------------


class OtherHead(Federation):
    """The attention head with its forward replaced by `attend`."""

    def models(self) -> dict[str, Model]:
        models = super().models()
        head = models["global"]
        assert isinstance(head, AttentionHead)
        head.attend = functools.partial(self.attend, head)
        return models

    @staticmethod
    def attend(head: AttentionHead, features: Tensor) -> Tensor:
        raise NotImplementedError


class NoSoftmax(OtherHead):
    @staticmethod
    def attend(head: AttentionHead, features: Tensor) -> Tensor:
        return features * head.heads["fc2"](head.heads["fc1"](features).tanh())


class SoftmaxOverSamples(OtherHead):
    @staticmethod
    def attend(head: AttentionHead, features: Tensor) -> Tensor:
        return features * head.heads["fc2"](head.heads["fc1"](features).tanh()).softmax(dim=0)


class NoTanh(OtherHead):
    @staticmethod
    def attend(head: AttentionHead, features: Tensor) -> Tensor:
        return features * head.heads["fc2"](head.heads["fc1"](features)).softmax(dim=1)


class NormalizedFirst(OtherHead):
    """The head sees unit vectors."""

    @staticmethod
    def attend(head: AttentionHead, features: Tensor) -> Tensor:
        features = F.normalize(features, dim=1)
        return features * head.heads["fc2"](head.heads["fc1"](features).tanh()).softmax(dim=1)


class WeightsAlone(OtherHead):
    """The weights in the features' place."""

    @staticmethod
    def attend(head: AttentionHead, features: Tensor) -> Tensor:
        return head.heads["fc2"](head.heads["fc1"](features).tanh()).softmax(dim=1)


class NormalizedFeatures(Federation):
    """The classifier sees unit vectors."""

    def models(self) -> dict[str, Model]:
        def logits(images: Tensor, prompts: Tensor) -> Tensor:
            return model.heads["classifier"](F.normalize(model.clip.encode_image(images), dim=1))

        models = super().models()
        model = models["global"]
        assert isinstance(model, Classifier)
        model.logits = logits
        return models


class FrozenBias(Federation):
    """Biases get no gradient."""

    def clip_gradients(self, model: Model, branch: str) -> None:
        super().clip_gradients(model, branch)
        for name, p in model.tensors(branch).items():
            if name.endswith("bias") and p.grad is not None:
                p.grad.zero_()


class ScoredAtStart(Federation):
    """Clients are scored with what they started the run with."""

    def load(self, tensors: dict[str, Tensor]) -> None:
        super().load(tensors)
        assert self.server is not None
        self.start = copy.deepcopy(self.server)

    def scored(self, client: Client) -> Model:
        return self.start


class ScoredAlone(Federation):
    """Every client is scored with its own weights of before the average."""

    def aggregate(self) -> None:
        self.own = {id(client): copy.deepcopy(client.models["global"]) for client in self.clients}
        super().aggregate()

    def scored(self, client: Client) -> Model:
        return self.own[id(client)]


# -- whole encoders ---------------------------------------------------------------------------------------------------


class KeptMoments(Federation):
    """Optimizers live from round to round."""

    def start_round(self, client: Client) -> None:
        kept = client.optimizers
        super().start_round(client)
        client.optimizers = kept


class MatricesDecay(Federation):
    """Weight decay on matrices alone, as is usual elsewhere."""

    def start_round(self, client: Client) -> None:
        super().start_round(client)
        ((group,),) = (optimizer.param_groups for optimizer in client.optimizers.values())
        vectors = [p for p in group["params"] if p.ndim < 2]
        group["params"] = [p for p in group["params"] if p.ndim >= 2]
        client.optimizers["global"].add_param_group({"params": vectors, "weight_decay": 0.0})


class TrainedTemperature(Federation):
    """logit_scale is trained too."""

    def temperature(self, client: Client) -> nn.Parameter:
        model = client.models["global"]
        assert isinstance(model, TrainedCLIP)
        return model.clip.logit_scale

    def start_round(self, client: Client) -> None:
        super().start_round(client)
        temperature = self.temperature(client).requires_grad_(True)
        client.optimizers["global"].add_param_group({"params": [temperature]})

    def update(self, client: Client, loss: Tensor, *branches: str) -> None:
        (self.gradient,) = torch.autograd.grad(loss, [self.temperature(client)], retain_graph=True)
        self.client = client
        super().update(client, loss, *branches)

    def clip_gradients(self, model: Model, branch: str) -> None:
        super().clip_gradients(model, branch)
        self.temperature(self.client).grad = self.gradient

    def aggregate(self) -> None:
        super().aggregate()
        sizes = self.sizes()
        mean = sum(n / sum(sizes) * self.temperature(c).item() for n, c in zip(sizes, self.clients))
        for client in self.clients:
            self.temperature(client).data.fill_(mean)


class FrozenParameters(Federation):
    """Parameters whose name holds `frozen` are left alone."""

    frozen: str

    def clip_gradients(self, model: Model, branch: str) -> None:
        super().clip_gradients(model, branch)
        for name, p in model.tensors(branch).items():
            if self.frozen in name:
                p.grad = None


class FrozenEncoder(FrozenParameters):
    frozen = "visual."


class FrozenEmbedding(FrozenParameters):
    frozen = "token_embedding"


class FrozenNorms(FrozenParameters):
    frozen = "ln_"


class LastClient(Federation):
    """The server takes over the last client's weights."""

    def sizes(self) -> list[int]:
        last = max(i for i, client in enumerate(self.clients) if len(client.train))
        return [int(i == last) for i in range(len(self.clients))]


class GoesOn(Federation):
    """A client starts where the one before it ended, not from the server."""

    def step(self, client: Client, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        before = getattr(self, "before", client)
        if client is not before:
            copy_tensors(before.models["global"].tensors("global"), client.models["global"].tensors("global"))
        self.before = client
        return super().step(client, images, labels)
