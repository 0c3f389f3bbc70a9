"""A federated FEDDLP round as one would write it with PEFT.

A Hugging Face CLIP image tower with two LoRA adapters (`local` r = 4, `global` r = 2) over all its linears, switched
by `set_adapter`; text features cached; four tower forwards and two backwards; torch's AdamW; images on the device in
the compute dtype; clients one after another.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdlp.bench.engine import feddlp, initial_bank
from fastdlp.bench.hugging_face import hugging_face_tower
from fastdlp.bench.problem import ALPHA, Problem
from fastdlp.bench.turns import TurnsRounds
from fastdlp.engine.device import DTYPES
from fastdlp.export.peft_format import LINEARS

HF_NAMES = LINEARS | {"proj": "visual_projection"}


class PeftRounds(TurnsRounds):
    """PEFT on the image tower, with the weights and adapters that fastdlp starts from.

    Args:
        cast: hold the adapters in the dtype of the weights (autocast_adapter_dtype=False); by itself PEFT keeps them in
            fp32 beside bf16 weights.
        autocast: weights and adapters in fp32, the forward under torch.autocast in the precision's dtype.
        adamw: more arguments of torch's AdamW, by itself in the form that is its default on a GPU.
    """

    def __init__(
        self,
        problem: Problem,
        precision: str,
        device: torch.device,
        cast: bool = False,
        autocast: bool = False,
        adamw: Mapping[str, Any] | None = None,
    ) -> None:
        from peft import LoraConfig, get_peft_model

        self.problem, self.device, self.autocast = problem, device, autocast
        options = {"foreach": True} if adamw is None else adamw
        dtype = torch.float32 if autocast else DTYPES[precision]
        self.dtype = DTYPES[precision]
        self.scale, self.text = problem.clip.logit_scale, problem.text.to(device)
        self.pixels, self.labels = problem.pixels.to(device, dtype), problem.labels.to(device)
        targets = [name.rpartition(".")[2] for name in HF_NAMES.values()]
        bank = initial_bank(problem, feddlp())

        def config(adapter: str) -> Any:
            return LoraConfig(r=bank.lora[adapter].rank, lora_alpha=16, lora_dropout=0.0, target_modules=targets)

        tower: Any = hugging_face_tower(problem.clip).to(device, dtype)
        model: Any = get_peft_model(tower, config("local"), adapter_name="local", autocast_adapter_dtype=not cast)
        model.add_adapter("global", config("global"), autocast_adapter_dtype=not cast)
        self.model = model
        self.adapters = {adapter: self._parameters(adapter, bank.named(adapter, 0)) for adapter in bank.lora}
        self.optimizers = {
            adapter: torch.optim.AdamW(list(parameters.values()), lr=problem.lr, weight_decay=0.0, **options)
            for adapter, parameters in self.adapters.items()
        }
        starts = []
        for client in range(problem.clients):
            named = {adapter: bank.named(adapter, client) for adapter in self.adapters}
            starts.append({a: [named[a][name] for name in parameters] for a, parameters in self.adapters.items()})
        self.begin({a: list(p.values()) for a, p in self.adapters.items()}, self.optimizers, starts, "global")

    def train(self, client: int, step: int) -> dict[str, Tensor]:
        return self._step(self.pixels[client, step], self.labels[client, step])

    def _step(self, pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """One step on pixels [batch, 3, S, S] and labels [batch], as the paper describes it."""
        local = self._logits("local", pixels)
        with torch.no_grad():
            teacher = self._logits("global", pixels)
        self.model.set_adapter("local")  # the backward needs the adapter's gradients switched on again
        ce_local, kd_local = F.cross_entropy(local, labels), kl(local, teacher)
        self._update("local", ce_local + ALPHA * kd_local)
        shared = self._logits("global", pixels)
        with torch.no_grad():
            teacher = self._logits("local", pixels)
        self.model.set_adapter("global")
        ce_global, kd_global = F.cross_entropy(shared, labels), kl(shared, teacher)
        self._update("global", ce_global + kd_global)
        return {"ce_local": ce_local.detach(), "kd_local": kd_local.detach(), "ce_global": ce_global.detach()}

    def _logits(self, adapter: str, pixels: Tensor) -> Tensor:
        """[batch, K] fp32."""
        self.model.set_adapter(adapter)
        with self._casting():
            features = self.model(pixel_values=pixels).image_embeds.float()
        return self.scale * F.normalize(features, dim=-1) @ self._class_features().T

    def _class_features(self) -> Tensor:
        """[K, d] fp32, normalized."""
        return self.text

    def _casting(self) -> Any:
        return torch.autocast(self.device.type, self.dtype) if self.autocast else nullcontext()

    def _update(self, adapter: str, loss: Tensor) -> None:
        self.optimizers[adapter].zero_grad()
        loss.backward()
        self.optimizers[adapter].step()

    def _parameters(self, adapter: str, named: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
        """PEFT's parameters of an adapter by the bank's names, without gates."""
        state = dict(self.model.named_parameters())
        parameters = {}
        for name in named:
            part, kind = name.split("/")
            if kind == "gate":
                continue
            block, _, linear = part.rpartition(".")
            module = f"layers.{block}.{HF_NAMES[linear]}" if block else HF_NAMES[linear]
            (parameters[name],) = [p for n, p in state.items() if n.endswith(f"{module}.lora_{kind}.{adapter}.weight")]
        return parameters


class PeftPreUpdateRounds(PeftRounds):
    """Both losses from one pair of forwards, each the other's teacher: what `--teacher pre-update` is checked with."""

    def _step(self, pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:
        local, shared = self._logits("local", pixels), self._logits("global", pixels)
        ce_local, kd_local = F.cross_entropy(local, labels), kl(local, shared.detach())
        ce_global, kd_global = F.cross_entropy(shared, labels), kl(shared, local.detach())
        for adapter, loss in (("local", ce_local + ALPHA * kd_local), ("global", ce_global + kd_global)):
            self.model.set_adapter(adapter)
            self._update(adapter, loss)
        return {"ce_local": ce_local.detach(), "kd_local": kd_local.detach(), "ce_global": ce_global.detach()}


def kl(student: Tensor, teacher: Tensor) -> Tensor:
    """D_KL(student ‖ teacher), mean over rows."""
    log_p, log_q = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()
