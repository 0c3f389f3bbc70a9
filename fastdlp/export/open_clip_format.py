"""open_clip's own model with the trained part of a run in its weights: a folder, or one checkpoint file.

    open_clip.create_model("local-dir:PATH")                             # a folder
    open_clip.create_model("ViT-B-32-quickgelu", pretrained="FILE")      # FILE ends in .safetensors

fastdlp reads both: `--model local-dir:PATH`, or `--model NAME --pretrained FILE`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fastdlp.adapters.serialization import save_tensors
from fastdlp.clip.load import known_models, load_clip, model_config
from fastdlp.clip.tokenizer import ByteTokenizer
from fastdlp.config import EMBEDDED_MODEL
from fastdlp.data.transform import OPENAI_MEAN, OPENAI_STD
from fastdlp.errors import FastdlpError
from fastdlp.export.adapter import LoRA
from fastdlp.export.trained import Trained
from fastdlp.files import atomic_folder, write_atomic

LINEARS = {"out": "attn.out_proj.weight", "fc1": "mlp.c_fc.weight", "fc2": "mlp.c_proj.weight"}
# The preprocessing that open_clip assumes for a checkpoint file.
FILE_PREPROCESSING: dict[str, Any] = {
    "mean": OPENAI_MEAN,
    "std": OPENAI_STD,
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}


def export_merged(path: Path, trained: Trained) -> str:
    """Write the model of a run with the trained part in its weights, so that a LoRA has no cost at inference.

    Args:
        path: a folder, or a checkpoint file if it ends in .safetensors.
        trained: an adapter, or weights that open_clip's model has.

    Returns:
        How to load it.

    Raises:
        FastdlpError: the model is unavailable or has other weights than the run's; weights that it does not have; a
            file for a model that open_clip cannot create from a name and a file; the operating system refuses.
    """
    config = trained.config
    if foreign := [name for name in trained.weights if "/" in name]:
        head = "a classifier" if foreign[0].startswith("classifier") else "an attention on the features"
        raise FastdlpError(
            f"{config.method} trains {head}, which is no part of an open_clip model: use --format safetensors"
        )
    clip = load_clip(config.model, config.pretrained, config.seed)
    if clip.fingerprint() != trained.about["weights"]:
        raise FastdlpError(f"the run was trained on other weights than {config.model} has now")
    architecture = dict(model_config(config.model))
    if clip.image.activation == "quick_gelu":  # a tag may ask for it where the model's name does not
        architecture["quick_gelu"] = True
    net: Any = clip.net
    state = {name: tensor.detach().clone().contiguous() for name, tensor in net.state_dict().items()}
    if trained.adapter is not None:
        add(state, trained.adapter)
    else:
        replace(state, trained.weights)
    if path.suffix == ".safetensors":
        name = name_for_a_file(config.model, architecture, net.visual.preprocess_cfg)
        save_tensors(path, state, trained.about)
        ours = f"--model {name} --pretrained {path}"
        return ours if name == EMBEDDED_MODEL else f'open_clip.create_model("{name}", pretrained="{path}"), or {ours}'
    with atomic_folder(path) as folder:
        description: dict[str, Any] = {"model_cfg": architecture, "preprocess_cfg": net.visual.preprocess_cfg}
        tokenize: Any = clip.tokenize
        if isinstance(tokenize, ByteTokenizer):
            description["tokenizer"] = "bytes"
        elif hasattr(tokenize, "save_pretrained"):  # open_clip looks for a Hugging Face tokenizer in the folder itself
            tokenize.save_pretrained(folder)
        write_atomic(folder / "open_clip_config.json", json.dumps(description, indent=2) + "\n")
        save_tensors(folder / "open_clip_model.safetensors", state, trained.about)
    return f'open_clip.create_model("local-dir:{path}"), or fastdlp\'s --model local-dir:{path}'


def add(state: Mapping[str, Tensor], adapter: LoRA) -> None:
    """Add an adapter to open_clip's weights, in place.

    Args:
        state: open_clip's parameters by name, fp32.
        adapter: of one of its towers.
    """
    tower = "visual." if adapter.encoder == "image" else ""
    for part in adapter.parts:
        block, _, linear = part.rpartition(".")
        at = f"{tower}transformer.resblocks.{block}."
        if block and linear in LINEARS:
            weight = state[at + LINEARS[linear]]
        elif block:
            weight = state[at + "attn.in_proj_weight"].chunk(3)["qkv".index(linear)]
        elif adapter.encoder == "image":
            weight = state["visual.proj"].T
        elif "text_projection" in state:
            weight = state["text_projection"].T
        else:
            weight = state["text_projection.weight"]
        weight.copy_(weight.double() + adapter.delta(part))


def replace(state: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Replace weights by those of the same names, in place.

    Raises:
        FastdlpError: a name or shape that the model does not have.
    """
    for name, tensor in weights.items():
        if name not in state:
            raise FastdlpError(f"the run trained {name}, which the model does not have: use --format safetensors")
        if state[name].shape != tensor.shape:
            raise FastdlpError(f"{name} is {tuple(tensor.shape)}, the model has {tuple(state[name].shape)}")
        state[name].copy_(tensor)


def name_for_a_file(model: str, architecture: Mapping[str, Any], preprocess: Mapping[str, Any]) -> str:
    """The name with which open_clip (fastdlp, for the embedded model) restores the model from a checkpoint file.

    Raises:
        FastdlpError: there is none, because a file holds neither architecture nor preprocessing.
    """
    images = {name: tuple(v) if isinstance(v := preprocess.get(name), list) else v for name in FILE_PREPROCESSING}
    why = None
    if ":" in model:
        why = "has its own architecture"
    elif images != FILE_PREPROCESSING:
        why = "has another preprocessing than open_clip uses with a checkpoint file"
    elif architecture.get("quick_gelu") and not model_config(model).get("quick_gelu"):
        if f"{model}-quickgelu" in known_models():
            return f"{model}-quickgelu"
        why = "has QuickGELU by its tag alone"
    if why:
        raise FastdlpError(f"{model} {why}, which a file does not hold: pass a folder as --out (without .safetensors)")
    return model
