"""Federated full fine-tuning of both towers: the baseline that FLoRA (arXiv 2404.15182) is measured against."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdlp.bench.problem import Problem
from fastdlp.bench.runner import Losses
from fastdlp.bench.turns import stacked
from fastdlp.engine.device import DTYPES


class FullRounds:
    """open_clip's own model, every weight but the logit scale trained in fp32, in bf16 with the forward under autocast.

    Clients take turns from the server's weights with a fresh AdamW. A batch is one forward of both towers, the prompts
    at their full length, one backward and one step.
    """

    def __init__(self, problem: Problem, precision: str, device: torch.device) -> None:
        self.problem, self.device, self.dtype = problem, device, DTYPES[precision]
        self.net: Any = copy.deepcopy(problem.clip.net).to(device)
        self.net.logit_scale.requires_grad_(False)
        self.pixels, self.labels, self.ids = (t.to(device) for t in (problem.pixels, problem.labels, problem.ids))
        self.parameters = [p for p in self.net.parameters() if p.requires_grad]
        self.server = [p.detach().clone() for p in self.parameters]

    def round(self) -> None:
        mean = [torch.zeros_like(p) for p in self.server]
        for client in range(self.problem.clients):
            self._epoch(client, range(self.problem.steps))
            torch._foreach_add_(mean, [p.detach() for p in self.parameters], alpha=1 / self.problem.clients)
        self.server = mean

    def step(self) -> None:
        for client in range(self.problem.clients):
            self._epoch(client, range(1))

    def first_steps(self) -> Losses:
        """The first step alone."""
        return stacked([self._epoch(client, range(1)) for client in range(self.problem.clients)])

    def _epoch(self, client: int, steps: range) -> list[dict[str, Tensor]]:
        with torch.no_grad():
            torch._foreach_copy_([p.detach() for p in self.parameters], self.server)
        optimizer = torch.optim.AdamW(
            self.parameters, lr=self.problem.lr, weight_decay=0.0, foreach=True
        )  # a GPU's default
        return [self._train(optimizer, self.pixels[client, step], self.labels[client, step]) for step in steps]

    def _train(self, optimizer: torch.optim.Optimizer, pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:
        mixed = torch.autocast(self.device.type, self.dtype) if self.dtype != torch.float32 else nullcontext()
        with mixed:
            image, text = self.net.encode_image(pixels), self.net.encode_text(self.ids)
        loss = _cross_entropy(image, text, labels, self.problem.clip.logit_scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return {"ce_global": loss.detach()}


@torch.no_grad()
def frozen_cross_entropy(problem: Problem, device: torch.device) -> Losses:
    """The first batch of each client through open_clip's own frozen model in fp32, [1, clients]."""
    net: nn.Module = copy.deepcopy(problem.clip.net).to(device)
    text = net.encode_text(problem.ids.to(device))  # type: ignore[operator]
    losses = []
    for pixels, labels in zip(problem.pixels[:, 0], problem.labels[:, 0]):
        image = net.encode_image(pixels.to(device))  # type: ignore[operator]
        losses.append([{"ce_global": _cross_entropy(image, text, labels.to(device), problem.clip.logit_scale)}])
    return stacked(losses)


def _cross_entropy(image: Tensor, text: Tensor, labels: Tensor, scale: float) -> Tensor:
    """Of features [batch, d] with [K, d], neither normalized, in fp32."""
    image, text = F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)
    return F.cross_entropy(scale * image @ text.T, labels)
