"""CLIP models by open_clip's names, as frozen towers and stems. Only this module imports open_clip.

Supported: open_clip's own ViT image towers with its own text transformer (OpenAI, LAION, DataComp, MetaCLIP,
CLIPA weights; QuickGELU or GELU), by name and tag, by `local-dir:` folder or by a checkpoint file; and the
embedded `glyph-clip`. Weights are read as safetensors or with torch's weights-only loader, never unpickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import socket
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from fastdlp.adapters.branches import TowerShape
from fastdlp.clip.convert import SUPPORTED, image_stem, image_tower, text_stem, text_tower
from fastdlp.clip.stem import ImageStem, TextStem, leaves
from fastdlp.clip.tokenizer import ByteTokenizer
from fastdlp.clip.tower import Tower
from fastdlp.config import EMBEDDED_MODEL
from fastdlp.data.transform import Transform
from fastdlp.errors import FastdlpError

CHECKPOINT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")


@dataclass(frozen=True)
class Clip:
    """A frozen CLIP in fp32 on the CPU; towers and stems are moved to a device separately."""

    image: Tower
    text: Tower
    image_stem: ImageStem
    text_stem: TextStem
    tokenize: Callable[[list[str]], Tensor]
    transform: Transform
    logit_scale: float  # exp(logit_scale), frozen
    net: nn.Module  # open_clip's own module, whose weights the towers share; for full fine-tuning and export

    def tower(self, encoder: str) -> Tower:
        return self.image if encoder == "image" else self.text

    def fingerprint(self) -> str:
        """sha256 over all frozen weights, which identifies those that adapters were trained on."""
        digest = hashlib.sha256(repr(self.logit_scale).encode())
        for leaf in leaves((self.image, self.text, self.image_stem, self.text_stem)):
            digest.update(leaf.contiguous().numpy().tobytes() if isinstance(leaf, Tensor) else repr(leaf).encode())
        return digest.hexdigest()


def known_models() -> list[str]:
    """The names that `--model` accepts, without local-dir: and hf-hub:."""
    import open_clip

    names = [name for name in open_clip.list_models() if not _unsupported(open_clip.get_model_config(name))]
    return [EMBEDDED_MODEL, *names]


def describe(model: str) -> tuple[TowerShape, TowerShape]:
    """Image and text tower sizes from the model's configuration alone; loads no weights.

    Raises:
        FastdlpError: unknown or unsupported model.
    """
    config = model_config(model)
    vision, text, embed = config["vision_cfg"], config["text_cfg"], config["embed_dim"]

    def shape(tower: dict[str, Any], width: int) -> TowerShape:
        w = tower.get("width", width)
        return TowerShape(tower.get("layers", 12), w, int(w * tower.get("mlp_ratio", 4.0)), embed)

    return shape(vision, 768), shape(text, 512)


def parameter_shapes(model: str) -> dict[str, tuple[int, ...]]:
    """Every parameter of a model by open_clip's name, from the model's configuration alone.

    Raises:
        FastdlpError: unknown or unsupported model.
    """
    import open_clip

    config = model_config(model)
    with torch.device("meta"), _quiet():
        net = open_clip.CLIP(**config)
    return {name: tuple(p.shape) for name, p in net.named_parameters()}


def load_clip(model: str, pretrained: str | None = None, seed: int = 0) -> Clip:
    """Load a frozen CLIP.

    Args:
        model: an open_clip name, `local-dir:PATH`, `hf-hub:ORG/REPO` or `glyph-clip`.
        pretrained: a tag of open_clip, a checkpoint file, or `none` for random weights. None means the embedded
            weights (glyph-clip) or OpenAI's.
        seed: of the random weights.

    Raises:
        FastdlpError: unknown or unsupported model, unknown tag, checkpoint that is missing, damaged or of another
            model, weights that cannot be downloaded.
    """
    import open_clip

    config = model_config(model)
    weights, options = _weights(model, pretrained, config)
    remote = model.startswith("hf-hub:") or bool(weights and not Path(weights).is_file())
    with torch.random.fork_rng(devices=[]), _quiet(), _hub() if remote else nullcontext():
        torch.manual_seed(seed)
        try:
            if model == EMBEDDED_MODEL:
                net = open_clip.CLIP(**config)
                net.visual.preprocess_cfg = description(model)["preprocess_cfg"]
                if weights:
                    open_clip.load_checkpoint(net, weights, weights_only=True)
            else:
                net = open_clip.create_model(
                    model, pretrained=weights, precision="fp32", device="cpu", weights_only=True, **options
                )
            if description(model).get("tokenizer") == "bytes":
                tokenize: Any = ByteTokenizer(config["text_cfg"]["context_length"])
            else:
                tokenize = open_clip.get_tokenizer(model)
        except Exception as error:  # open_clip, the hub client, safetensors and torch raise unrelated types
            raise FastdlpError(f"cannot load {model} with weights {weights}: {_load_failure(error)}") from None
    return Clip(
        image=image_tower(net.visual),
        text=text_tower(net),
        image_stem=image_stem(net.visual),
        text_stem=text_stem(net),
        tokenize=tokenize,
        transform=_transform(net.visual.preprocess_cfg),
        logit_scale=float(net.logit_scale.detach().exp()),
        net=net.eval(),
    )


def class_prompts(class_names: Sequence[str], template: str) -> list[str]:
    """The captions of the classes: the template with each name in place of {}."""
    return [template.replace("{}", name) for name in class_names]


# -- loading ------------------------------------------------------------------------------------------------


def model_config(model: str) -> dict[str, Any]:
    """open_clip's configuration of a model: embed_dim, vision_cfg, text_cfg, quick_gelu.

    Raises:
        FastdlpError: unknown or unsupported model.
    """
    import open_clip

    if path := _description_file(model):
        try:
            config = description(model)["model_cfg"]
            if not all(isinstance(config[name], dict) for name in ("vision_cfg", "text_cfg")):
                raise TypeError("vision_cfg and text_cfg must be objects")
            config["embed_dim"]  # describe needs it
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FastdlpError(f"--model {model}: {path} is not an open_clip configuration ({error!r})") from None
    elif model.startswith("hf-hub:"):
        from open_clip.factory import _get_hf_config

        try:
            with _hub():
                config = _get_hf_config(model.removeprefix("hf-hub:"))["model_cfg"]
        except Exception as error:  # the hub client raises unrelated types; each means that it is unavailable
            raise FastdlpError(f"--model {model} cannot be fetched (offline?): {_first_line(error)}") from None
    else:
        config = open_clip.get_model_config(model)
    if config is None:
        raise FastdlpError(
            f"unknown model {model!r}: try {EMBEDDED_MODEL}, ViT-B-32-quickgelu, ViT-B-16 or ViT-L-14 "
            "(fastdlp info --models lists all)"
        )
    if why := _unsupported(config):
        raise FastdlpError(f"model {model!r} has {why}: {SUPPORTED}")
    return config


def _unsupported(config: dict[str, Any]) -> str | None:
    """The part of a model that towers do not implement, if any."""
    vision, text = config.get("vision_cfg", {}), config.get("text_cfg", {})
    if vision.get("timm_model_name"):
        return "a timm image tower"
    if isinstance(vision.get("layers"), list):
        return "a ResNet image tower"
    if text.get("hf_model_name"):
        return "a Hugging Face text tower"
    if "multimodal_cfg" in config or vision.get("attentional_pool"):
        return "an attentional pooler (CoCa)"
    if config.get("custom_text") or text.get("embed_cls") or config.get("init_logit_bias") is not None:
        return "a text tower or loss of another kind"
    special = ("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc")
    if any(tower.get(name) for tower in (vision, text) for name in (*special, "block_type")):
        return "attention blocks of another kind"
    return None


def _description_file(model: str) -> Path | None:
    """The JSON file that describes a model which open_clip does not know by its name."""
    if model == EMBEDDED_MODEL:
        return _asset("glyph-clip.json")
    return Path(model.removeprefix("local-dir:")) / "open_clip_config.json" if model.startswith("local-dir:") else None


def description(model: str) -> dict[str, Any]:
    """The content of that file: model_cfg and preprocess_cfg as in open_clip's folders, tokenizer; {} without one."""
    path = _description_file(model)
    return json.loads(path.read_text()) if path else {}


def _asset(name: str) -> Path:
    return Path(str(resources.files("fastdlp") / "assets" / name))


def _weights(model: str, pretrained: str | None, config: dict[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """The tag or checkpoint file to load, None for the model's own or random weights; options of `create_model`."""
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg

    if ":" in model:  # local-dir: and hf-hub: bring their own weights
        if pretrained not in (None, "none"):
            raise FastdlpError(f"--model {model} has its own weights: leave out --pretrained {pretrained}")
        return None, {"load_weights": pretrained is None, "require_pretrained": pretrained is None}
    if pretrained == "none":
        return None, {"load_weights": False}
    if pretrained is None and model == EMBEDDED_MODEL:
        return str(_asset("glyph-clip.safetensors")), {}
    tags = open_clip.list_pretrained_tags_by_model(model)
    weights = pretrained or ("openai" if "openai" in tags else None)
    if weights is None:
        raise FastdlpError(
            f"--pretrained is needed for {model}: one of {', '.join(tags) or 'no tag is known'}, "
            "a checkpoint file, or none for random weights"
        )
    if weights in tags:
        trained = bool(get_pretrained_cfg(model, weights).get("quick_gelu"))
        if config.get("quick_gelu") and not trained:  # open_clip only warns
            raise FastdlpError(
                f"weights {weights!r} were trained with GELU, {model} has QuickGELU: use --model "
                f"{model.removesuffix('-quickgelu')}"
            )
        return weights, {"force_quick_gelu": trained}
    if not Path(weights).is_file():
        names = ", ".join(tags) or "it has none"
        raise FastdlpError(
            f"--pretrained {weights!r} is neither a file nor a tag of {model} ({names}) or none for random weights"
        )
    if Path(weights).suffix not in CHECKPOINT_SUFFIXES:
        raise FastdlpError(f"--pretrained {weights}: expected a checkpoint ending in {', '.join(CHECKPOINT_SUFFIXES)}")
    return weights, {}


def _load_failure(error: Exception) -> str:
    text = str(error)
    if isinstance(error, SafetensorError):
        return f"the file is damaged or not a safetensors file ({_first_line(error)})"
    if isinstance(error, RuntimeError) and (
        "size mismatch" in text or "Missing key" in text or "Unexpected key" in text
    ):
        return "the checkpoint is of another model"
    if "weights_only" in text or "UnpicklingError" in type(error).__name__ or "TorchScript" in text:
        return "the file holds more than tensors and will not be unpickled; convert it to safetensors"
    if "download" in text.lower() or "connect" in text.lower() or "resolve" in text.lower():
        return f"the weights cannot be downloaded (offline?); pass --pretrained FILE ({_first_line(error)})"
    return _first_line(error)


def _first_line(error: Exception) -> str:
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) <= 160 else line[:157] + "..."


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress warnings and log lines, with which open_clip reports random weights; its errors still raise."""
    level = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(level)


@contextmanager
def _hub() -> Iterator[None]:
    """Set the hub's client offline where the hub is unreachable: it reads its cache at once instead of retrying."""
    from huggingface_hub import constants

    before, url = constants.HF_HUB_OFFLINE, urlsplit(constants.ENDPOINT)
    if not getproxies():  # a proxy may reach the hub
        try:
            socket.create_connection((url.hostname, url.port or (80 if url.scheme == "http" else 443)), 5).close()
        except OSError:
            constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _transform(preprocess: dict[str, Any]) -> Transform:
    size = preprocess["size"]
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise FastdlpError(f"the model's input is {height}×{width} pixels; only square inputs are supported")
    return Transform(
        size=height,
        resize_mode=preprocess.get("resize_mode", "shortest"),
        interpolation=preprocess.get("interpolation", "bicubic"),
        mean=tuple(preprocess["mean"]),
        std=tuple(preprocess["std"]),
    )
