"""PEFT's folder: adapter_config.json and adapter_model.safetensors, for transformers' CLIPModel. Imports neither.

    from peft import PeftModel
    from transformers import CLIPModel
    model = PeftModel.from_pretrained(CLIPModel.from_pretrained("openai/clip-vit-base-patch32"), "PATH")

The names are those of `PeftModel.save_pretrained` over a CLIPModel, or over the
CLIPVisionModelWithProjection or CLIPTextModelWithProjection of the adapted tower. A folder that PEFT wrote is read
back where it holds a plain LoRA of one tower, on any part of its linears.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fastdlp.adapters.serialization import load_tensors, save_tensors
from fastdlp.clip.load import model_config
from fastdlp.errors import FastdlpError
from fastdlp.export.adapter import LoRA
from fastdlp.export.trained import Trained
from fastdlp.files import atomic_folder, read_json, write_atomic

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"

LINEARS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "out": "self_attn.out_proj",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}
TOWERS = {"image": ("vision_model", "visual_projection"), "text": ("text_model", "text_projection")}
# OpenAI's weights under their names at open_clip (without -quickgelu) and at Hugging Face.
HUB_MODELS = {
    "ViT-B-32": "openai/clip-vit-base-patch32",
    "ViT-B-16": "openai/clip-vit-base-patch16",
    "ViT-L-14": "openai/clip-vit-large-patch14",
    "ViT-L-14-336": "openai/clip-vit-large-patch14-336",
}

# Fields of LoraConfig that do not change the output of a saved plain LoRA. Any other field must be empty.
_HARMLESS = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "lora_dropout", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_core",
    "qalora_group_size", "runtime_config",
}  # fmt: skip
# Without those that change the base weights (pissa, olora, corda, loftq, ...).
_INITIALIZATIONS = (True, False, None, "gaussian", "eva", "orthogonal")

_TENSOR = re.compile(
    r"base_model\.model\.(?:(vision|text)_model\.encoder\.layers\.(\d+)\.([a-z_]+\.[a-z0-9_]+)|(visual|text)_projection)"
    r"\.lora_([AB])\.weight"
)


def export_peft(path: Path, trained: Trained) -> str:
    """Write a folder; returns how to load it.

    Raises:
        FastdlpError: a method without LoRA, a path for a file, and as `write_peft`.
    """
    if trained.adapter is None:
        heads = any("/" in name for name in trained.weights)
        alternative = "--format safetensors" if heads else "--format open_clip or safetensors"
        raise FastdlpError(
            f"{trained.config.method} trains no LoRA, and PEFT's folder holds nothing else: use {alternative}"
        )
    if path.suffix == ".safetensors":
        raise FastdlpError(f"--format peft writes a folder: pass an --out without {path.suffix}")
    write_peft(path, trained.adapter, model_config(trained.config.model))
    if base := hub_model(trained.about["model"], trained.about["pretrained"]):
        return f'PeftModel.from_pretrained(CLIPModel.from_pretrained("{base}"), "{path}")'
    return (
        f'PeftModel.from_pretrained(model, "{path}"), where model is a transformers CLIPModel with the weights of '
        f"{trained.about['model']}: none is known on the hub; --format open_clip needs none"
    )


def write_peft(path: Path, adapter: LoRA, architecture: Mapping[str, Any]) -> None:
    """Write the adapter of a run to a folder that must not exist. `architecture`: open_clip's configuration.

    Raises:
        FastdlpError: a tower that transformers' CLIPModel cannot express, or the operating system refuses.
    """
    if why := _not_in_transformers(architecture, adapter.encoder):
        raise FastdlpError(
            f"the {adapter.encoder} tower of {adapter.about['model']} has {why}, which transformers' CLIPModel "
            "cannot express: use --format open_clip or safetensors"
        )
    with atomic_folder(path) as folder:
        write_atomic(folder / CONFIG, json.dumps(_config(adapter), indent=2) + "\n")
        tensors = {tensor_name(adapter.encoder, name): tensor for name, tensor in adapter.tensors.items()}
        save_tensors(folder / WEIGHTS, tensors, dict(adapter.about))


def read_peft(path: Path) -> LoRA:
    """A folder that PEFT or `write_peft` wrote.

    Raises:
        FastdlpError: missing or damaged files, a pickle, or not a plain LoRA of linears of one tower of a CLIPModel.
    """
    config = read_json(path / CONFIG, "adapter's configuration")
    if not isinstance(config, dict):
        raise FastdlpError(f"{path / CONFIG} is not the configuration of an adapter")
    rank, scale = _plain_lora(config, path / CONFIG)
    if not (path / WEIGHTS).is_file() and (path / PICKLE).is_file():
        raise FastdlpError(f"{path / PICKLE} is a pickle and is not read: save the adapter as {WEIGHTS}")
    tensors, about = load_tensors(path / WEIGHTS)
    named: dict[str, Tensor] = {}
    encoders = set()
    for name, tensor in tensors.items():
        encoder, own = _own_name(name, path / WEIGHTS)
        encoders.add(encoder)
        named[own] = tensor.float() if tensor.is_floating_point() else tensor
    if len(encoders) > 1:
        raise FastdlpError(f"{path / WEIGHTS} adapts both towers: fastdlp reads an adapter of one")
    if not encoders:
        raise FastdlpError(f"{path / WEIGHTS} holds no adapter")
    return LoRA(encoders.pop(), rank, scale, named, about).check(path / WEIGHTS)


def hub_model(model: str, pretrained: str) -> str | None:
    """The Hugging Face repository with the same weights, if one is known."""
    return HUB_MODELS.get(model.removesuffix("-quickgelu")) if pretrained == "openai" else None


def _config(adapter: LoRA) -> dict[str, Any]:
    tower, projection = TOWERS[adapter.encoder]
    linears = "|".join(re.escape(name) for name in LINEARS.values())
    alpha = adapter.lora_alpha
    return {
        "peft_type": "LORA",
        "task_type": None,  # a plain PeftModel, which passes on whatever a CLIPModel takes
        "auto_mapping": None,
        "base_model_name_or_path": hub_model(adapter.about["model"], adapter.about["pretrained"]),
        "revision": None,
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        # A string is matched against a module's whole name; a list would also find the other tower's q_proj.
        "target_modules": rf"{tower}\.encoder\.layers\.\d+\.({linears})|{projection}",
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def tensor_name(encoder: str, name: str) -> str:
    """`0.q/A` → `base_model.model.vision_model.encoder.layers.0.self_attn.q_proj.lora_A.weight`."""
    tower, projection = TOWERS[encoder]
    part, _, kind = name.partition("/")
    block, _, linear = part.rpartition(".")
    module = f"{tower}.encoder.layers.{block}.{LINEARS[linear]}" if block else projection
    return f"base_model.model.{module}.lora_{kind}.weight"


def _own_name(name: str, path: Path) -> tuple[str, str]:
    """The inverse of `tensor_name`: encoder and name."""
    match = _TENSOR.fullmatch(name)
    parts = {module: part for part, module in LINEARS.items()}
    if match is None or (match[3] is not None and match[3] not in parts):
        raise FastdlpError(
            f"{path}: {name} is no plain LoRA of q_proj, k_proj, v_proj, out_proj, fc1, fc2 or the projection of a "
            "CLIPModel's tower"
        )
    tower, block, module, projection, kind = match.groups()
    encoder = "text" if "text" in (tower, projection) else "image"
    return encoder, f"{block}.{parts[module]}/{kind}" if module else f"proj/{kind}"


def _plain_lora(config: dict[str, Any], path: Path) -> tuple[int, float]:
    """Rank and scale of a configuration. Raises FastdlpError unless it describes a plain LoRA."""
    if config.get("peft_type") != "LORA":
        raise FastdlpError(f"{path}: peft_type is {config.get('peft_type')!r}, only LORA is read")
    if config.get("bias", "none") != "none":
        raise FastdlpError(f"{path}: bias is {config['bias']!r}, only adapters without trained biases are read")
    if config.get("init_lora_weights", True) not in _INITIALIZATIONS:
        raise FastdlpError(
            f"{path}: init_lora_weights is {config['init_lora_weights']!r}, which changes the frozen weights; convert "
            "the adapter to a plain LoRA with PEFT first"
        )
    for name, value in config.items():
        if name not in _HARMLESS | {"bias", "init_lora_weights"} and value not in (None, False, {}, []):
            raise FastdlpError(f"{path}: {name} is {value!r}, only a plain LoRA of one rank and scale is read")
    rank, alpha = config.get("r"), config.get("lora_alpha", 8)
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, (int, float)):
        raise FastdlpError(f"{path}: r is {rank!r} and lora_alpha {alpha!r}, expected numbers greater than 0")
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _not_in_transformers(architecture: Mapping[str, Any], encoder: str) -> str | None:
    """The property of a tower of open_clip that CLIPModel cannot express, if any."""
    tower = architecture["vision_cfg" if encoder == "image" else "text_cfg"]
    if tower.get("ls_init_value") is not None:
        return "LayerScale"
    if encoder == "image":
        if tower.get("no_ln_pre"):
            return "no norm before its blocks"
        return None if tower.get("pool_type", "tok") == "tok" else "pooling over all patches"
    if tower.get("no_causal_mask"):
        return "no causal mask"
    if tower.get("proj_bias"):
        return "a bias in its projection"
    pool = tower.get("pool_type", "argmax")
    return None if pool in ("argmax", "eos") else f"its text feature at the {pool} token"
