"""Small CLIP models on disk, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file

VISION = {"image_size": 24, "layers": 2, "width": 32, "patch_size": 8, "head_width": 8}
TEXT = {"context_length": 20, "vocab_size": 49408, "width": 24, "heads": 3, "layers": 3}


def tiny_clip(
    folder: Path, vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None, **top: Any
) -> str:
    """Write a random CLIP in open_clip's folder form; returns its `local-dir:` name."""
    config = {"embed_dim": 16, "vision_cfg": VISION | (vision or {}), "text_cfg": TEXT | (text or {}), **top}
    with torch.random.fork_rng():
        torch.manual_seed(7)
        net = open_clip.CLIP(**config)
        with torch.no_grad():
            for name, p in net.named_parameters():  # norms, biases and LayerScale away from their neutral start
                if p.ndim == 1 and "class_embedding" not in name:
                    p.add_(0.1 * torch.randn_like(p))
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, folder / "open_clip_model.safetensors")
    preprocess = {
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    return f"local-dir:{folder}"
