"""Federated LoRA fine-tuning of CLIP written out: one client, one batch, one adapter at a time, over plain modules.

The yardstick that a run of fastdlp is held against (`test_replay.py`). It is written from the published description
and shares no code with the package: open_clip's own CLIP module with its linears replaced, every model run from
pixels and full-length prompts, torch's AdamW and gradient clipping, averaging in a for loop. Slow and obvious.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


# -- the model ----------------------------------------------------------------------------------------------


class LoRALinear(nn.Linear):
    """y = x Wᵀ + b + scale · ((x Aᵀ) ⊙ gate) Bᵀ with W and b frozen."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rank: int, gated: bool, scale: float) -> None:
        outputs, inputs = weight.shape
        super().__init__(inputs, outputs, bias=bias is not None)
        self.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.A = nn.Parameter(weight.new_zeros(rank, inputs))
        self.B = nn.Parameter(weight.new_zeros(outputs, rank))
        self.gate = nn.Parameter(weight.new_ones(rank)) if gated else None
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        inner = x @ self.A.T
        if self.gate is not None:
            inner = inner * self.gate
        return x @ self.weight.T + (0 if self.bias is None else self.bias) + self.scale * (inner @ self.B.T)


class PlainAttention(nn.Module):
    """Multi-head attention with q, k, v and out as four linears, called as open_clip calls its packed one."""

    def __init__(self, q: nn.Linear, k: nn.Linear, v: nn.Linear, out: nn.Linear, heads: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out, self.heads = q, k, v, out, heads

    def forward(
        self, q_x: Tensor, k_x: Tensor, v_x: Tensor, need_weights: bool = False, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        n, tokens, width = q_x.shape
        q, k, v = (
            linear(x).reshape(n, tokens, self.heads, width // self.heads).transpose(1, 2)
            for linear, x in ((self.q, q_x), (self.k, k_x), (self.v, v_x))
        )
        scores = q @ k.transpose(2, 3) / (width // self.heads) ** 0.5
        if attn_mask is not None:
            scores = scores + attn_mask
        mixed = scores.softmax(dim=3) @ v
        return self.out(mixed.transpose(1, 2).reshape(n, tokens, width)), None


class AdaptedCLIP(nn.Module):
    """A copy of a CLIP of which one tower carries one adapter in each of its linears."""

    def __init__(self, clip: open_clip.CLIP, encoder: str, rank: int, gated: bool, lora_alpha: float) -> None:
        super().__init__()
        self.clip = copy.deepcopy(clip).requires_grad_(False)
        self.encoder = encoder
        self.sites: dict[str, LoRALinear] = {}

        def adapted(name: str, weight: Tensor, bias: Tensor | None) -> LoRALinear:
            self.sites[name] = LoRALinear(weight, bias, rank, gated, lora_alpha / rank)
            return self.sites[name]

        transformer = self.clip.visual.transformer if encoder == "image" else self.clip.transformer
        assert transformer.batch_first
        for i, block in enumerate(transformer.resblocks):
            weights, biases = block.attn.in_proj_weight.chunk(3), block.attn.in_proj_bias.chunk(3)
            q, k, v = (adapted(f"{i}.{part}", w, b) for part, w, b in zip("qkv", weights, biases))
            out = adapted(f"{i}.out", block.attn.out_proj.weight, block.attn.out_proj.bias)
            block.attn = PlainAttention(q, k, v, out, block.attn.num_heads)
            block.mlp.c_fc = adapted(f"{i}.fc1", block.mlp.c_fc.weight, block.mlp.c_fc.bias)
            block.mlp.c_proj = adapted(f"{i}.fc2", block.mlp.c_proj.weight, block.mlp.c_proj.bias)
        if encoder == "image":
            self.proj = adapted("proj", self.clip.visual.proj.T, None)
            self.clip.visual.proj = None
        elif isinstance(self.clip.text_projection, nn.Linear):
            self.proj = adapted("proj", self.clip.text_projection.weight, self.clip.text_projection.bias)
            self.clip.text_projection = None
        else:
            self.proj = adapted("proj", self.clip.text_projection.T, None)
            self.clip.text_projection = None

    def image_features(self, images: Tensor) -> Tensor:
        """[n, 3, H, W] to unit vectors [n, d]."""
        features = self.clip.visual(images)
        return F.normalize(self.proj(features) if self.encoder == "image" else features, dim=1)

    def text_features(self, prompts: Tensor) -> Tensor:
        """Token ids [n, context length] to unit vectors [n, d]."""
        features = self.clip.encode_text(prompts)
        return F.normalize(self.proj(features) if self.encoder == "text" else features, dim=1)

    def logits(self, images: Tensor, prompts: Tensor) -> Tensor:
        """Scaled cosine similarity [images, prompts]."""
        return self.clip.logit_scale.exp() * self.image_features(images) @ self.text_features(prompts).T

    def matrices(self) -> list[nn.Parameter]:
        """A and B of every site."""
        return [p for site in self.sites.values() for p in (site.A, site.B)]

    def gates(self) -> list[nn.Parameter]:
        """The gate of every site, none where there is no pruning."""
        return [site.gate for site in self.sites.values() if site.gate is not None]

    def tensors(self) -> dict[str, nn.Parameter]:
        """Everything trained, by name."""
        return {
            f"{name}/{part}": p
            for name, site in self.sites.items()
            for part, p in (("A", site.A), ("B", site.B), ("gate", site.gate))
            if p is not None
        }


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


class Client:
    """One client: a model for each of its adapters with an optimiser of its own, and its samples."""

    def __init__(self, models: dict[str, AdaptedCLIP], settings: Settings, train: Tensor, test: Tensor) -> None:
        self.models, self.train, self.test = models, train, test
        self.optimisers = {branch: self.optimiser(model, settings) for branch, model in models.items()}

    @staticmethod
    def optimiser(model: AdaptedCLIP, settings: Settings) -> torch.optim.AdamW:
        groups = [{"params": model.matrices(), "lr": settings.lr}]
        if model.gates():
            groups.append({"params": model.gates(), "lr": settings.gate_lr})
        return torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, weight_decay=settings.weight_decay)


# method → its adapters, and the one that clients are scored with; "global" is the one that is exchanged
METHODS = {"feddlp": (("local", "global"), "local"), "local": (("local",), "local"), "flora": (("global",), "global")}


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
        self.settings, self.images, self.labels = settings, images, labels
        self.branches, self.scored = METHODS[settings.method]
        caption = template if settings.caption == "dataset" else PLAIN_CAPTION
        self.train_prompts = tokenize([caption.replace("{}", name) for name in class_names])
        self.test_prompts = tokenize([template.replace("{}", name) for name in class_names])
        self.clip = copy.deepcopy(clip).eval().requires_grad_(False).to(images.dtype)
        self.clients = [
            Client(
                {branch: self.adapted(branch) for branch in self.branches},
                settings,
                torch.tensor(train, dtype=torch.long),
                torch.tensor(test, dtype=torch.long),
            )
            for train, test in clients
        ]
        self.server = self.adapted("global") if "global" in self.branches else None

    def adapted(self, branch: str) -> AdaptedCLIP:
        """A copy of CLIP with one untrained adapter; the local one has gates where the method prunes."""
        s = self.settings
        rank = s.rank_local if branch == "local" else s.rank_global
        gated = branch == "local" and s.method == "feddlp"
        return AdaptedCLIP(self.clip, s.encoder, rank, gated, s.lora_alpha)

    def tensors(self) -> dict[str, Tensor]:
        """Every adapter of every client and the server's, named as a trace names them."""
        owners = [(f"c{i}", branch, model) for i, c in enumerate(self.clients) for branch, model in c.models.items()]
        if self.server is not None:
            owners.append(("server", "global", self.server))
        return {
            f"{owner}/{branch}/{name}": tensor.detach()
            for owner, branch, model in owners
            for name, tensor in model.tensors().items()
        }

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Set every adapter."""
        mine = self.tensors()
        assert mine.keys() == tensors.keys()
        for name, tensor in mine.items():
            assert tensor.shape == tensors[name].shape, name
            tensor.copy_(tensors[name])

    # -- a round

    def train(self, batches: Sequence[tuple[int, Sequence[int]]]) -> list[dict[str, float]]:
        """The clients' part of a round: (client, samples) in order. Mean losses over the samples of each client."""
        totals: list[dict[str, float]] = [{} for _ in self.clients]
        counts = [0] * len(self.clients)
        for client, samples in batches:
            index = torch.tensor(samples)
            losses = self.step(self.clients[client], self.images[index], self.labels[index])
            counts[client] += len(samples)
            for name, loss in losses.items():
                totals[client][name] = totals[client].get(name, 0.0) + loss.item() * len(samples)
        return [{name: total / n for name, total in sums.items()} for sums, n in zip(totals, counts)]

    def step(self, client: Client, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """One step of the run's method on one batch; returns its losses."""
        if self.settings.method == "feddlp":
            return self.feddlp_step(client, images, labels)
        (branch,) = self.branches
        ce = self.task_loss(client.models[branch], images, labels)
        self.update(client, branch, ce)
        return {f"ce_{branch}": ce}

    def feddlp_step(self, client: Client, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The local adapter learns with the global one as teacher, then the global one with the local as teacher."""
        local, shared = client.models["local"], client.models["global"]
        before = self.views(local, images, labels)
        ce_local = self.task_loss(local, images, labels)
        kd_local = self.kd(before, self.views(shared, images, labels))
        self.update(client, "local", ce_local + self.settings.alpha * kd_local)

        teacher = self.views(local, images, labels) if self.settings.teacher == "fresh" else before
        ce_global = self.task_loss(shared, images, labels)
        kd_global = self.kd(self.views(shared, images, labels), teacher)
        self.update(client, "global", ce_global + kd_global)
        return {"ce_local": ce_local, "kd_local": kd_local, "ce_global": ce_global, "kd_global": kd_global}

    def task_loss(self, model: AdaptedCLIP, images: Tensor, labels: Tensor) -> Tensor:
        if self.settings.task_loss == "cross-entropy":
            return F.cross_entropy(model.logits(images, self.train_prompts), labels)
        logits = model.logits(images, self.train_prompts[labels])
        own = torch.arange(len(labels))
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2

    def views(self, model: AdaptedCLIP, images: Tensor, labels: Tensor) -> list[Tensor]:
        """The logit matrices whose rows distillation compares; their divergences are averaged."""
        if self.settings.kd_logits == "class":
            return [model.logits(images, self.train_prompts)]
        logits = model.logits(images, self.train_prompts[labels])
        return [logits, logits.T]

    def kd(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        s = self.settings
        divergences = [distillation(a, b, s.kd_direction, s.kd_temperature) for a, b in zip(student, teacher)]
        return sum(divergences, torch.zeros(())) / len(divergences)

    def update(self, client: Client, branch: str, loss: Tensor) -> None:
        """One optimiser step on one adapter, then the threshold on its gates."""
        model, optimiser = client.models[branch], client.optimisers[branch]
        optimiser.zero_grad()
        loss.backward(inputs=[*model.matrices(), *model.gates()])
        self.clip_gradients(model)
        optimiser.step()
        with torch.no_grad():
            for gate in model.gates():
                gate.copy_(self.threshold(gate))

    def clip_gradients(self, model: AdaptedCLIP) -> None:
        if self.settings.clip_norm:
            torch.nn.utils.clip_grad_norm_(model.matrices(), self.settings.clip_norm)

    def threshold(self, gate: Tensor) -> Tensor:
        shrink = soft_threshold if self.settings.threshold == "soft" else reference_threshold
        return shrink(gate, self.settings.xi)

    @torch.no_grad()
    def aggregate(self) -> None:
        """The server's adapter becomes Σ n_k/n of the clients', A and B apart; every client goes on from it."""
        if self.server is None:
            return
        sizes = self.sizes()
        for name, target in self.server.tensors().items():
            target.zero_()
            for client, size in zip(self.clients, sizes):
                target.add_(size / sum(sizes) * client.models["global"].tensors()[name])
        for client in self.clients:
            for name, tensor in client.models["global"].tensors().items():
                tensor.copy_(self.server.tensors()[name])

    def sizes(self) -> list[int]:
        return [len(client.train) for client in self.clients]

    # -- scores

    @torch.no_grad()
    def score(self) -> list[int]:
        """Correct predictions on each client's own test samples."""
        return [self._correct(client.models[self.scored].logits, client.test) for client in self.clients]

    @torch.no_grad()
    def zero_shot(self) -> list[int]:
        """The same without adapters."""

        def logits(images: Tensor, prompts: Tensor) -> Tensor:
            return self.clip.get_logits(images, prompts)[0]

        return [self._correct(logits, client.test) for client in self.clients]

    def _correct(self, logits: Callable[[Tensor, Tensor], Tensor], test: Tensor) -> int:
        if not len(test):
            return 0
        predictions = logits(self.images[test], self.test_prompts).argmax(1)
        return int((predictions == self.labels[test]).sum())
