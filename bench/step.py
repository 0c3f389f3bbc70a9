"""One FEDDLP step of one or more clients: fastdlp beside the same step written with PEFT, in one run on one machine.

The PEFT form is what its documentation shows: a Hugging Face CLIP image tower with two LoRA adapters
(`local` r = 4, `global` r = 2) over all 73 linears, switched by `set_adapter`; text features cached;
four tower forwards and two backwards a step; torch's AdamW; several clients one after another. PEFT has no gate,
so fastdlp's gates stand at one for the comparison of the losses; its timed steps train and threshold them.

No row is printed before its losses agreed with those of PEFT in fp32 on the same weights, adapters and images.
"""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdlp.bank import AdapterBank
from fastdlp.clip import Clip, load_clip
from fastdlp.config import TrainConfig
from fastdlp.engine import Engine, Schedule, Slot
from fastdlp.errors import FastdlpError
from fastdlp.federation import DTYPES, moved_stem
from fastdlp.methods import make_method
from fastdlp.objective import Objective
from fastdlp.optimiser import Hyperparameters
from fastdlp.sites import tower_sites
from fastdlp.task import ImageTask

CLASSES = 37  # as many as Pets
ALPHA = 0.1
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}  # relative, of each loss against PEFT in fp32
LR = 1e-5


@dataclass(frozen=True)
class Problem:
    """What both sides compute on: images [batch, 3, S, S] and class features [K, d], fp32, and labels [batch]."""

    clip: Clip
    pixels: Tensor
    text: Tensor
    labels: Tensor


def make_problem(model: str, batch: int, seed: int = 0) -> Problem:
    """Random weights, images and class features: none of them changes the speed."""
    clip = load_clip(model, "none", seed)
    generator = torch.Generator().manual_seed(seed)
    size = clip.transform.size
    pixels = torch.randn(batch, 3, size, size, generator=generator)
    text = F.normalize(torch.randn(CLASSES, clip.image.shape.embed, generator=generator), dim=-1)
    return Problem(clip, pixels, text, torch.randint(CLASSES, (batch,), generator=generator))


# -- fastdlp ------------------------------------------------------------------------------------------------


def fastdlp_engine(problem: Problem, precision: str, teacher: str, device: torch.device, clients: int = 1) -> Engine:
    """An engine whose round is one step of `clients` clients with a full batch each."""
    config = TrainConfig(method="feddlp", teacher=teacher).resolved()  # type: ignore[arg-type]
    clip, batch = problem.clip, len(problem.labels)
    method = make_method(config)
    bank = AdapterBank(tower_sites(clip.image.shape), method.branches(), clients, device)
    bank.initialise("gaussian", {"local": [[0, 2]] * clients, "global": [[0, 3]] * clients})
    generator = torch.Generator().manual_seed(1)
    for state in bank.state.values():  # B away from zero, so that every term of the step is live
        state.weights += 0.01 * torch.randn(state.weights.shape[1], generator=generator).to(device)
        state.gates.fill_(1.0)
    stem = moved_stem(clip.image_stem, device)
    text = problem.text.to(device)
    task = ImageTask(
        clip.image.to(device, DTYPES[precision]),
        stem,
        _Pixels(problem.pixels),
        (text, text),
        clip.logit_scale,
        1 << 40,
    )

    def everywhere(value: float) -> Tensor:
        return torch.full((clients,), value, device=device)

    hyper = Hyperparameters(everywhere(LR), everywhere(LR), everywhere(5e-5), everywhere(ALPHA))
    slots = [Slot(np.arange(batch), np.arange(0), 0, client, 0) for client in range(clients)]
    schedule = Schedule(batch, 1, batch * clients)
    return Engine(method, bank, task, Objective(), hyper, slots, problem.labels.numpy(), schedule)


class _Pixels:
    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def __call__(self, samples: np.ndarray) -> Tensor:
        return self.pixels[torch.from_numpy(samples)]


# -- PEFT ---------------------------------------------------------------------------------------------------


class PeftStep:
    """The same step with PEFT on a Hugging Face CLIP image tower holding the same weights and adapters.

    Args:
        adapters: "default" keeps the adapters in fp32 beside bf16 weights, as PEFT does by itself; "cast" holds
            them in the dtype of the weights (autocast_adapter_dtype=False), which is faster.
    """

    def __init__(
        self, problem: Problem, precision: str, adapters: str, device: torch.device, bank: AdapterBank
    ) -> None:
        from peft import LoraConfig, get_peft_model

        dtype = DTYPES[precision]
        self.scale, self.text, self.labels = (
            problem.clip.logit_scale,
            problem.text.to(device),
            problem.labels.to(device),
        )
        self.pixels = problem.pixels.to(device, dtype)
        tower = hugging_face_tower(problem.clip).to(device, dtype)
        targets = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "visual_projection"]
        self.ranks = {name: branch.rank for name, branch in bank.branches.items()}

        def config(rank: int) -> Any:
            return LoraConfig(r=rank, lora_alpha=16, lora_dropout=0.0, target_modules=targets)

        cast = {"autocast_adapter_dtype": adapters == "default"}
        self.model = get_peft_model(tower, config(self.ranks["local"]), adapter_name="local", **cast)
        self.model.add_adapter("global", config(self.ranks["global"]), **cast)
        self._load(bank)
        self.optimisers = {
            name: torch.optim.AdamW(
                [p for n, p in self.model.named_parameters() if f".{name}." in n], lr=LR, weight_decay=0.0
            )
            for name in self.ranks
        }

    def __call__(self) -> dict[str, float]:
        """One step, as the paper describes it; returns the losses."""
        local = self._logits("local")
        with torch.no_grad():
            teacher = self._logits("global")
        self.model.set_adapter("local")  # the backward needs the adapter's gradients switched on again
        ce_local, kd_local = F.cross_entropy(local, self.labels), _kl(local, teacher)
        self._update("local", ce_local + ALPHA * kd_local)
        shared = self._logits("global")
        with torch.no_grad():
            teacher = self._logits("local")
        self.model.set_adapter("global")
        ce_global, kd_global = F.cross_entropy(shared, self.labels), _kl(shared, teacher)
        self._update("global", ce_global + kd_global)
        return {"ce_local": ce_local.item(), "kd_local": kd_local.item(), "ce_global": ce_global.item()}

    def _logits(self, adapter: str) -> Tensor:
        self.model.set_adapter(adapter)
        features = self.model(pixel_values=self.pixels).image_embeds.float()
        return self.scale * F.normalize(features, dim=-1) @ self.text.T

    def _update(self, adapter: str, loss: Tensor) -> None:
        self.optimisers[adapter].zero_grad()
        loss.backward()
        self.optimisers[adapter].step()

    def _load(self, bank: AdapterBank) -> None:
        """Copy slot 0 of the bank into PEFT's adapters."""
        state = dict(self.model.named_parameters())
        for adapter in self.ranks:
            for name, tensor in bank.named(adapter, 0).items():
                part, kind = name.split("/")
                if kind == "gate":
                    continue
                block, _, linear = part.rpartition(".")
                module = f"layers.{block}.{HF_NAMES[linear]}" if block else HF_NAMES[linear]
                ends = f"{module}.lora_{kind}.{adapter}.weight"
                (found,) = [p for n, p in state.items() if n.endswith(ends)]
                found.data.copy_(tensor)


def hugging_face_tower(clip: Clip) -> nn.Module:
    """The image tower as transformers' CLIPVisionModelWithProjection with the same weights."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    tower, stem = clip.image, clip.image_stem
    shape = tower.shape
    config = CLIPVisionConfig(
        hidden_size=shape.width,
        intermediate_size=shape.mlp,
        projection_dim=shape.embed,
        num_hidden_layers=shape.layers,
        num_attention_heads=tower.heads,
        image_size=clip.transform.size,
        patch_size=stem.patches.shape[-1],
        hidden_act=tower.activation,
        layer_norm_eps=tower.ln_post.eps,
        attn_implementation="sdpa",
    )
    model = CLIPVisionModelWithProjection(config).eval()
    assert stem.ln_pre is not None
    state = {
        "embeddings.class_embedding": stem.class_token,
        "embeddings.patch_embedding.weight": stem.patches,
        "embeddings.position_embedding.weight": stem.positions,
        "pre_layrnorm.weight": stem.ln_pre.weight,
        "pre_layrnorm.bias": stem.ln_pre.bias,
        "post_layernorm.weight": tower.ln_post.weight,
        "post_layernorm.bias": tower.ln_post.bias,
    }
    for i, block in enumerate(tower.blocks):
        at = f"encoder.layers.{i}."
        assert block.qkv.bias is not None
        for name, weight, bias in zip("qkv", block.qkv.weight.chunk(3), block.qkv.bias.chunk(3)):
            state |= {f"{at}self_attn.{name}_proj.weight": weight, f"{at}self_attn.{name}_proj.bias": bias}
        for name, part in (
            ("self_attn.out_proj", block.out),
            ("mlp.fc1", block.fc1),
            ("mlp.fc2", block.fc2),
            ("layer_norm1", block.ln1),
            ("layer_norm2", block.ln2),
        ):
            state |= {f"{at}{name}.weight": part.weight, f"{at}{name}.bias": part.bias}  # type: ignore[dict-item]
    own = model.state_dict()
    full = {}
    for name in own:
        if name == "visual_projection.weight":
            full[name] = tower.proj.weight
        elif "position_ids" in name:
            full[name] = own[name]
        else:
            full[name] = state[name.removeprefix("vision_model.")]
    model.load_state_dict(full)
    return model


HF_NAMES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "out": "self_attn.out_proj",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
    "proj": "visual_projection",
}


def _kl(student: Tensor, teacher: Tensor) -> Tensor:
    """D_KL(student ‖ teacher), mean over rows."""
    log_p, log_q = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


# -- the measurement ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One line of the table: quantiles in milliseconds a step, and how many times as fast as PEFT in this dtype."""

    form: str
    precision: str
    forwards: int
    backwards: int
    ms_20: float
    ms_50: float
    ms_80: float
    times_peft: float
    times_peft_fp32: float
    worst_loss_error: float


def bench_step(
    model: str,
    batch: int,
    precisions: list[str],
    repeats: int,
    device: torch.device,
    tell: Callable[[str], None],
    clients: int = 1,
) -> dict[str, Any]:
    """Measure all forms in one run; checks each form's losses first.

    Raises:
        FastdlpError: PEFT is not installed, or a form's losses are not those of PEFT in fp32.
    """
    try:
        import peft
        import transformers
    except ImportError:
        raise FastdlpError("the PEFT baseline is not installed: pip install 'fastdlp[bench]'") from None
    problem = make_problem(model, batch)
    bank = fastdlp_engine(problem, "fp32", "fresh", device).bank
    expected = PeftStep(problem, "fp32", "default", device, bank)()
    forms = {
        "PEFT": lambda p: PeftStep(problem, p, "default", device, bank),
        "PEFT, adapters cast": lambda p: PeftStep(problem, p, "cast", device, bank),
        "fastdlp": lambda p: _engine_step(fastdlp_engine(problem, p, "fresh", device, clients)),
        "fastdlp --teacher pre-update": lambda p: _engine_step(
            fastdlp_engine(problem, p, "pre-update", device, clients)
        ),
    }
    passes = {
        "PEFT": (4, 2),
        "PEFT, adapters cast": (4, 2),
        "fastdlp": (3, 2),
        "fastdlp --teacher pre-update": (2, 2),
    }
    steps: dict[tuple[str, str], Callable[[], dict[str, float]]] = {}
    errors: dict[tuple[str, str], float] = {}
    for precision in precisions:
        for form, make in forms.items():
            if form == "PEFT, adapters cast" and precision == "fp32":
                continue  # the same program as PEFT in fp32
            tell(f"{form}, {precision}: losses against PEFT fp32")
            step = make(precision)
            losses = step()
            errors[form, precision] = max(abs(losses[k] - v) / abs(v) for k, v in expected.items())
            if not errors[form, precision] <= TOLERANCE[precision]:
                raise FastdlpError(
                    f"{form} in {precision} does not compute the losses of PEFT: {losses}, expected {expected}"
                )
            steps[form, precision] = step
    times: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    for repeat in range(repeats):  # in turn, so that a disturbance of the machine meets every form
        for key, step in steps.items():
            tell(f"{key[0]}, {key[1]}: {repeat + 1} of {repeats}")
            times[key].append(_timed(step, device, clients if isinstance(step, PeftStep) else 1))
    rows = []
    for (form, precision), seconds in times.items():
        q = statistics.quantiles(seconds, n=5, method="inclusive")
        middle = statistics.median(seconds)
        rows.append(
            Row(
                form,
                precision,
                *passes[form],
                q[0] * 1e3,
                middle * 1e3,
                q[3] * 1e3,
                statistics.median(times["PEFT", precision]) / middle,
                statistics.median(times["PEFT", precisions[0]]) / middle,
                errors[form, precision],
            )
        )
    return {
        "what": f"one FEDDLP step, {model}, image encoder, {clients} × {batch} images, random weights",
        "clients": clients,
        "batch_size": batch,
        "rows": [vars(row) for row in rows],
        "repeats": repeats,
        **machine(device),
        "versions": {
            "torch": torch.__version__,
            "peft": peft.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def machine(device: torch.device) -> dict[str, Any]:
    """What a figure is worthless without: device, threads and commit."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        name = next(
            (line.split(":")[1].strip() for line in lines if line.startswith("model name")),
            platform.processor(),
        )
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True
    ).stdout.strip()
    return {"device": name, "threads": torch.get_num_threads(), "commit": commit or "unknown"}


def _engine_step(engine: Engine) -> Callable[[], dict[str, float]]:
    numbers = iter(range(1, 1 << 30))

    def step() -> dict[str, float]:
        means = engine.train_round(next(numbers)).means
        return {name: float(mean[0]) for name, mean in means.items() if name != "kd_global"}

    return step


def _timed(step: Callable[[], dict[str, float]], device: torch.device, times: int) -> float:
    """Seconds of one step of all clients: `times` calls for a form that takes them one after another."""
    start = time.perf_counter()
    for _ in range(times):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
