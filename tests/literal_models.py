"""CLIP with what a method trains, as plain modules over open_clip's own: the models of the literal loop.

Each has `logits`, and hands out what it trains by branch: `tensors` by name, `weights` and `gates` as the optimizer's
two groups. Every forward starts from pixels and full-length prompts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Protocol

import open_clip
import torch.nn.functional as F
from torch import Tensor, nn


class Model(Protocol):
    """What the literal loop asks of a model."""

    def logits(self, images: Tensor, prompts: Tensor) -> Tensor:
        """[n, 3, H, W] and token ids [K, context length] to [n, K]."""

    def tensors(self, branch: str) -> dict[str, nn.Parameter]:
        """Everything trained of a branch, by name."""

    def weights(self, branch: str) -> list[nn.Parameter]:
        """Everything trained of a branch but its gates."""

    def gates(self, branch: str) -> list[nn.Parameter]:
        """The gates of a branch, none where there is no pruning."""


# -- adapters -------------------------------------------------------------------------------------------------


class Adapter(nn.Module):
    """scale · ((x Aᵀ) ⊙ gate) Bᵀ."""

    def __init__(self, like: Tensor, rank: int, gated: bool, scale: float) -> None:
        outputs, inputs = like.shape
        super().__init__()
        self.A = nn.Parameter(like.new_zeros(rank, inputs))
        self.B = nn.Parameter(like.new_zeros(outputs, rank))
        self.gate = nn.Parameter(like.new_ones(rank)) if gated else None
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        inner = x @ self.A.T
        if self.gate is not None:
            inner = inner * self.gate
        return self.scale * (inner @ self.B.T)


class LoRALinear(nn.Linear):
    """y = x Wᵀ + b + Σ adapter(x) with W and b frozen."""

    def __init__(self, weight: Tensor, bias: Tensor | None, adapters: dict[str, Adapter]) -> None:
        outputs, inputs = weight.shape
        super().__init__(inputs, outputs, bias=bias is not None)
        self.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.adapters = nn.ModuleDict(adapters)

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight.T + (0 if self.bias is None else self.bias)
        for adapter in self.adapters.values():
            y = y + adapter(x)
        return y


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
    """A copy of a CLIP of which one tower carries adapters in each of its linears, summed.

    `adapters`: name → rank and whether it has a gate.
    """

    def __init__(
        self, clip: open_clip.CLIP, encoder: str, adapters: dict[str, tuple[int, bool]], lora_alpha: float
    ) -> None:
        super().__init__()
        self.clip = copy.deepcopy(clip).requires_grad_(False)
        self.encoder = encoder
        self.sites: dict[str, LoRALinear] = {}

        def adapted(name: str, weight: Tensor, bias: Tensor | None) -> LoRALinear:
            here = {a: Adapter(weight, rank, gated, lora_alpha / rank) for a, (rank, gated) in adapters.items()}
            self.sites[name] = LoRALinear(weight, bias, here)
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

    def weights(self, branch: str) -> list[nn.Parameter]:
        """A and B of every site."""
        return [p for name, p in self.tensors(branch).items() if not name.endswith("/gate")]

    def gates(self, branch: str) -> list[nn.Parameter]:
        """The gate of every site, none where there is no pruning."""
        return [p for name, p in self.tensors(branch).items() if name.endswith("/gate")]

    def tensors(self, branch: str) -> dict[str, nn.Parameter]:
        """A, B and gate of every site."""
        adapters = {name: site.adapters[branch] for name, site in self.sites.items()}
        return {
            f"{name}/{part}": p
            for name, adapter in adapters.items()
            for part, p in (("A", adapter.A), ("B", adapter.B), ("gate", adapter.gate))
            if p is not None
        }


# -- heads and whole encoders -----------------------------------------------------------------------------------


class TrainedCLIP(nn.Module):
    """A CLIP of which the parameters that `chosen` names are trained; all of its `heads` are too."""

    def __init__(
        self, clip: open_clip.CLIP, heads: dict[str, nn.Linear], chosen: Callable[[str], bool] | None = None
    ) -> None:
        super().__init__()
        self.clip = copy.deepcopy(clip).requires_grad_(False)
        self.heads = nn.ModuleDict(heads).to(clip.logit_scale.dtype)
        self.trained = {name: p for name, p in self.clip.named_parameters() if chosen is not None and chosen(name)}
        for p in self.trained.values():
            p.requires_grad_(True)

    def logits(self, images: Tensor, prompts: Tensor) -> Tensor:
        """Scaled cosine similarity [images, prompts]."""
        image = F.normalize(self.clip.encode_image(images), dim=1)
        return self.clip.logit_scale.exp() * image @ F.normalize(self.clip.encode_text(prompts), dim=1).T

    def tensors(self, branch: str) -> dict[str, nn.Parameter]:
        """The encoders' parameters by their names in open_clip, then weight and bias of each head."""
        heads = {f"{head}/{kind}": p for head, linear in self.heads.items() for kind, p in linear.named_parameters()}
        return self.trained | heads

    def weights(self, branch: str) -> list[nn.Parameter]:
        return list(self.tensors(branch).values())

    def gates(self, branch: str) -> list[nn.Parameter]:
        return []


class AttentionHead(TrainedCLIP):
    """Frozen CLIP; one side's features are weighed, dimension by dimension, before they are normalized."""

    def __init__(self, clip: open_clip.CLIP, encoder: str, width: int) -> None:
        super().__init__(clip, {"fc1": nn.Linear(width, width), "fc2": nn.Linear(width, width)})
        self.encoder = encoder
        for linear in self.heads.values():
            nn.init.eye_(linear.weight)
            nn.init.zeros_(linear.bias)

    def attend(self, features: Tensor) -> Tensor:
        """[n, d] to [n, d]."""
        return features * self.heads["fc2"](self.heads["fc1"](features).tanh()).softmax(dim=1)

    def logits(self, images: Tensor, prompts: Tensor) -> Tensor:
        image, text = self.clip.encode_image(images), self.clip.encode_text(prompts)
        if self.encoder == "image":
            image = self.attend(image)
        else:
            text = self.attend(text)
        return self.clip.logit_scale.exp() * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T


class Classifier(TrainedCLIP):
    """A linear classifier on the image encoder's features as they are."""

    def __init__(
        self, clip: open_clip.CLIP, width: int, classes: int, chosen: Callable[[str], bool] | None = None
    ) -> None:
        super().__init__(clip, {"classifier": nn.Linear(width, classes)}, chosen)

    def logits(self, images: Tensor, prompts: Tensor) -> Tensor:
        return self.heads["classifier"](self.clip.encode_image(images))
