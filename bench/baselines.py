"""What people use today for a federated FEDDLP round: PEFT in several variants, the authors' way, full fine-tuning.

Clients train one after another through one model. PEFT adapts a Hugging Face CLIP image tower with two LoRA adapters
(`local` r = 4, `global` r = 2) on all its linears, switched by `set_adapter`; four tower forwards and two backwards a
step, torch's AdamW, images on the device in the compute dtype.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdlp.adapters.bank import AdapterBank
from fastdlp.adapters.branches import tower_sites
from fastdlp.bench.fastdlp_rounds import start
from fastdlp.bench.problem import CHECKED, Losses, Problem
from fastdlp.clip.load import Clip
from fastdlp.clip.tower import Tower
from fastdlp.config import TrainConfig
from fastdlp.engine.device import DTYPES
from fastdlp.engine.tasks import Prompts, frozen_text_features
from fastdlp.export.peft_format import LINEARS, tensor_name
from fastdlp.methods import make_method

WARM_UP = 3  # steps on a side stream before a capture, as PyTorch's documentation recommends


class PeftRounds:
    """PEFT on the image tower, with the weights and adapters that fastdlp starts from; class features computed once.

    A client's adapters and Adam's moments are copied into the model before its epoch, and out of it after.

    Args:
        cast: hold the adapters in the dtype of the weights; PEFT's default is fp32 adapters beside bf16 weights.
        autocast: weights and adapters in fp32, the forward under torch.autocast in the precision's dtype.
        adamw: options of torch's AdamW; `foreach` is its default on a GPU.
    """

    def __init__(
        self,
        problem: Problem,
        precision: str,
        device: torch.device,
        cast: bool = False,
        autocast: bool = False,
        adamw: Mapping[str, Any] = {"foreach": True},
    ) -> None:
        from peft import LoraConfig, get_peft_model

        self.problem, self.device, self.dtype, self.autocast = problem, device, DTYPES[precision], autocast
        dtype, clip = torch.float32 if autocast else self.dtype, problem.clip
        self.pixels, self.labels = problem.pixels.to(device, dtype), problem.labels.to(device)
        text = frozen_text_features(clip.text, Prompts(*clip.text_stem(problem.ids)))
        self.scale, self.text = clip.logit_scale, F.normalize(text, dim=-1).to(device)
        method = make_method(TrainConfig().resolved())
        bank = start(AdapterBank(tower_sites(clip.image.shape), method.branches(), problem.clients), method.shared)
        configs = {
            name: LoraConfig(r=branch.rank, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear")
            for name, branch in bank.lora.items()
        }
        tower: Any = hugging_face_towers(clip)[0].to(device, dtype)
        self.model: Any = get_peft_model(tower, configs["local"], "local", autocast_adapter_dtype=not cast)
        self.model.add_adapter("global", configs["global"], autocast_adapter_dtype=not cast)
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        # Adapters and moments, those that are averaged first: of the client in the model, and of each client.
        self._live: list[Tensor] = []
        self._held: list[list[Tensor]] = [[] for _ in range(problem.clients)]
        self._averaged = 0  # how many
        for adapter in ("global", "local"):
            starts = [bank.named(adapter, weights=row) for row in bank.state[adapter].weights]
            parameters = [self._parameter(adapter, name) for name in starts[0]]
            self.optimizers[adapter] = torch.optim.AdamW(parameters, lr=problem.lr, weight_decay=0.0, **adamw)
            moments = _moments(self.optimizers[adapter])
            self._live += [*(parameter.detach() for parameter in parameters), *moments]
            self._averaged = self._averaged or len(parameters)
            for held, own in zip(self._held, starts):
                held += [value.to(parameter) for value, parameter in zip(own.values(), parameters)]
                held += [torch.zeros_like(moment) for moment in moments]

    def round(self) -> None:
        self._epoch(range(self.problem.steps))
        self._average()

    def step(self) -> None:
        for client in range(self.problem.clients):
            self.train(client, 0)

    def first_steps(self) -> Losses:
        first = self._epoch(range(CHECKED - 1))
        self._average()
        last = self._epoch(range(CHECKED - 1, CHECKED))
        return stacked([one + other for one, other in zip(first, last)])

    def train(self, client: int, step: int) -> dict[str, Tensor]:
        """One step on a batch; returns its losses, each a scalar on the device."""
        return self._step(self.pixels[client, step], self.labels[client, step])

    def _epoch(self, steps: range) -> list[list[dict[str, Tensor]]]:
        """Losses by client and step."""
        losses = []
        for client, held in enumerate(self._held):
            torch._foreach_copy_(self._live, held)
            losses.append([self.train(client, step) for step in steps])
            torch._foreach_copy_(held, self._live)
        return losses

    def _average(self) -> None:
        """FedAvg of clients with equally many samples."""
        clients = [held[: self._averaged] for held in self._held]
        mean = [torch.stack(tensors).mean(0) for tensors in zip(*clients)]
        for tensors in clients:
            torch._foreach_copy_(tensors, mean)

    def _step(self, pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """One step on pixels [batch, 3, S, S] and labels [batch], as the paper describes it."""
        losses: dict[str, Tensor] = {}
        for adapter, other, weight in (("local", "global", TrainConfig.alpha), ("global", "local", None)):
            student = self._logits(adapter, pixels)
            with torch.no_grad():
                teacher = self._logits(other, pixels)
            losses |= self._update(adapter, student, teacher, labels, weight)
        return losses

    def _logits(self, adapter: str, pixels: Tensor) -> Tensor:
        """[batch, K] fp32."""
        self.model.set_adapter(adapter)
        with torch.autocast(self.device.type, self.dtype) if self.autocast else nullcontext():
            features = self.model(pixel_values=pixels).image_embeds.float()
        return self.scale * F.normalize(features, dim=-1) @ self._class_features().T

    def _class_features(self) -> Tensor:
        """[K, d] fp32, normalized."""
        return self.text

    def _update(
        self, adapter: str, student: Tensor, teacher: Tensor, labels: Tensor, weight: float | None
    ) -> dict[str, Tensor]:
        """Train an adapter, the divergence weighted or not; returns its cross-entropy and divergence."""
        self.model.set_adapter(adapter)  # switches the adapter's gradients on again
        ce, kd = F.cross_entropy(student, labels), kl(student, teacher)
        self.optimizers[adapter].zero_grad()
        (ce + (kd if weight is None else weight * kd)).backward()
        self.optimizers[adapter].step()
        return {f"ce_{adapter}": ce.detach(), f"kd_{adapter}": kd.detach()}

    def _parameter(self, adapter: str, name: str) -> nn.Parameter:
        """PEFT's parameter of an adapter by the bank's name."""
        return self.model.get_parameter(tensor_name("image", name).removesuffix("weight") + f"{adapter}.weight")


class PeftPreUpdateRounds(PeftRounds):
    """Both losses from one pair of forwards, each the other's teacher: the reference for `--teacher pre-update`."""

    def _step(self, pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:
        local, shared = self._logits("local", pixels), self._logits("global", pixels)
        losses = self._update("local", local, shared.detach(), labels, TrainConfig.alpha)
        return losses | self._update("global", shared, local.detach(), labels, None)


class StrongestRounds(PeftRounds):
    """PEFT with adapters in the weights' dtype, fused AdamW and, on a GPU, the step captured once as a CUDA graph."""

    def __init__(self, problem: Problem, precision: str, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        super().__init__(problem, precision, device, cast=True, adamw={"fused": True, "capturable": on_gpu})
        if on_gpu:
            self._capture()

    def train(self, client: int, step: int) -> dict[str, Tensor]:
        if self.device.type != "cuda":
            return super().train(client, step)
        self._batch[0].copy_(self.pixels[client, step])
        self._batch[1].copy_(self.labels[client, step])
        self._graph.replay()
        return {name: loss.clone() for name, loss in self._losses.items()}

    def _capture(self) -> None:
        """Whole-network capture. It changes adapters and moments, which are copied in before each client's epoch."""
        self._batch = self.pixels[0, 0].clone(), self.labels[0, 0].clone()
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self._step(*self._batch)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):  # zero_grad within it, so that gradients are in the graph's memory pool
            self._losses = self._step(*self._batch)


class PaperRounds(PeftRounds):
    """The authors' way: the class prompts too go through the frozen text tower, all tokens, in each forward."""

    def __init__(self, problem: Problem, precision: str, device: torch.device) -> None:
        super().__init__(problem, precision, device)
        self.ids = problem.ids.to(device)
        self.text_tower = hugging_face_towers(problem.clip)[1].to(device, DTYPES[precision]).requires_grad_(False)

    def _class_features(self) -> Tensor:
        return F.normalize(self.text_tower(input_ids=self.ids).text_embeds.float(), dim=-1)


class FullRounds:
    """Full fine-tuning of both towers, the baseline of FLoRA (arXiv 2404.15182), on open_clip's own model.

    All weights but the logit scale are trained in fp32, in bf16 with the forward under autocast. Clients start from the
    server's weights with a new AdamW. A batch is one forward of both towers, the prompts at their full length.
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

    def first_steps(self) -> Losses:
        """The first step alone, before which nothing is updated: the loss of the frozen model."""
        return stacked([self._epoch(client, range(1)) for client in range(self.problem.clients)])

    def _epoch(self, client: int, steps: range) -> list[dict[str, Tensor]]:
        with torch.no_grad():
            torch._foreach_copy_([p.detach() for p in self.parameters], self.server)
        optimizer = torch.optim.AdamW(self.parameters, lr=self.problem.lr, weight_decay=0.0, foreach=True)
        losses = []
        for pixels, labels in zip(self.pixels[client, steps.start : steps.stop], self.labels[client, steps.start :]):
            with torch.autocast(self.device.type, self.dtype) if self.dtype != torch.float32 else nullcontext():
                image, text = self.net.encode_image(pixels), self.net.encode_text(self.ids)
            image, text = F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)
            loss = F.cross_entropy(self.problem.clip.logit_scale * image @ text.T, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append({"ce_global": loss.detach()})
        return losses


def kl(student: Tensor, teacher: Tensor) -> Tensor:
    """D_KL(student ‖ teacher), mean over rows."""
    log_p, log_q = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def stacked(losses: Sequence[Sequence[Mapping[str, Tensor]]]) -> Losses:
    """Scalars by client and step → [steps, clients] by name."""
    return {name: np.array([[float(step[name]) for step in client] for client in losses]).T for name in losses[0][0]}


def _moments(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The optimizer's state, all zero. torch creates it in the first step, so one step is taken with zero gradients."""
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    found = [tensor for state in optimizer.state.values() for tensor in state.values()]
    for tensor in found:
        tensor.zero_()
    return found


# -- transformers' CLIP with our weights --------------------------------------------------------------------


def hugging_face_towers(clip: Clip) -> tuple[nn.Module, nn.Module]:
    """The image and the text tower, each with its projection."""
    from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection

    model = hugging_face_clip(clip)
    vision = CLIPVisionModelWithProjection(model.config.vision_config)
    text = CLIPTextModelWithProjection(model.config.text_config)
    vision.vision_model, vision.visual_projection = model.vision_model, model.visual_projection
    text.text_model, text.text_projection = model.text_model, model.text_projection
    return vision.eval(), text.eval()


def hugging_face_clip(clip: Clip) -> Any:
    """transformers' CLIPModel. The towers must be of its kind: class token, causal text, no LayerScale."""
    from transformers import CLIPConfig, CLIPModel

    image, text = clip.image_stem, clip.text_stem
    vision_config = _shape(clip.image) | {"image_size": clip.transform.size, "patch_size": image.patches.shape[-1]}
    text_config = _shape(clip.text) | {
        "vocab_size": len(text.embedding),
        "max_position_embeddings": len(text.positions),
        "eos_token_id": 2,  # the feature is taken at the highest token id
        "bos_token_id": None,
        "pad_token_id": None,
    }
    state: dict[str, Any] = {
        "logit_scale": torch.tensor(clip.logit_scale).log(),
        "vision_model.embeddings.class_embedding": image.class_token,
        "vision_model.embeddings.patch_embedding.weight": image.patches,
        "vision_model.embeddings.position_embedding.weight": image.positions,
        "text_model.embeddings.token_embedding.weight": text.embedding,
        "text_model.embeddings.position_embedding.weight": text.positions,
        "visual_projection.weight": clip.image.proj.weight,
        "text_projection.weight": clip.text.proj.weight,
    }
    modules: dict[str, Any] = {
        "vision_model.pre_layrnorm": image.ln_pre,
        "vision_model.post_layernorm": clip.image.ln_post,
        "text_model.final_layer_norm": clip.text.ln_post,
    }
    for name, tower in (("vision_model", clip.image), ("text_model", clip.text)):
        for i, block in enumerate(tower.blocks):
            at = f"{name}.encoder.layers.{i}"
            assert block.qkv.bias is not None
            for part, weight, bias in zip("qkv", block.qkv.weight.chunk(3), block.qkv.bias.chunk(3)):
                state |= {f"{at}.{LINEARS[part]}.weight": weight, f"{at}.{LINEARS[part]}.bias": bias}
            modules |= {f"{at}.{LINEARS[part]}": getattr(block, part) for part in ("out", "fc1", "fc2")}
            modules |= {f"{at}.layer_norm1": block.qkv.norm, f"{at}.layer_norm2": block.fc1.norm}
    for name, module in modules.items():
        state |= {f"{name}.weight": module.weight, f"{name}.bias": module.bias}
    embed = clip.image.shape.embed
    model = CLIPModel(CLIPConfig(text_config=text_config, vision_config=vision_config, projection_dim=embed)).eval()
    model.load_state_dict(state)
    return model


def _shape(tower: Tower) -> dict[str, Any]:
    return {
        "hidden_size": tower.shape.width,
        "intermediate_size": tower.shape.mlp,
        "projection_dim": tower.shape.embed,
        "num_hidden_layers": tower.shape.layers,
        "num_attention_heads": tower.heads,
        "hidden_act": tower.activation,
        "layer_norm_eps": tower.ln_post.eps,
        "attn_implementation": "sdpa",
    }
