"""transformers' CLIPModel with the weights of one of our CLIPs, for tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from fastdlp.clip.load import Clip
from fastdlp.clip.tower import Tower


def clip_model(clip: Clip) -> CLIPModel:
    """The same CLIP. Its towers must be such that transformers has them: class token, causal text, no LayerScale."""
    vision = _shape(clip.image) | {
        "image_size": clip.transform.size,
        "patch_size": clip.image_stem.patches.shape[-1],
    }
    text = _shape(clip.text) | {
        "vocab_size": len(clip.text_stem.embedding),
        "max_position_embeddings": len(clip.text_stem.positions),
        "eos_token_id": 2,  # the feature is taken at the highest token id
        "bos_token_id": None,
        "pad_token_id": None,
    }
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=clip.image.shape.embed)
    state = {
        "logit_scale": torch.tensor(clip.logit_scale).log(),
        "vision_model.embeddings.class_embedding": clip.image_stem.class_token,
        "vision_model.embeddings.patch_embedding.weight": clip.image_stem.patches,
        "vision_model.embeddings.position_embedding.weight": clip.image_stem.positions,
        "text_model.embeddings.token_embedding.weight": clip.text_stem.embedding,
        "text_model.embeddings.position_embedding.weight": clip.text_stem.positions,
        "visual_projection.weight": clip.image.proj.weight,
        "text_projection.weight": clip.text.proj.weight,
    }
    norms: list[tuple[str, Any]] = [
        ("vision_model.pre_layrnorm", clip.image_stem.ln_pre),
        ("vision_model.post_layernorm", clip.image.ln_post),
        ("text_model.final_layer_norm", clip.text.ln_post),
    ]
    for name, norm in norms:
        state |= {f"{name}.weight": norm.weight, f"{name}.bias": norm.bias}
    state |= _blocks(clip.image, "vision_model") | _blocks(clip.text, "text_model")
    model = CLIPModel(config).eval()
    model.load_state_dict(state | {k: v for k, v in model.state_dict().items() if k.endswith("position_ids")})
    return model


def _shape(tower: Tower) -> dict[str, Any]:
    return {
        "hidden_size": tower.shape.width,
        "intermediate_size": tower.shape.mlp,
        "num_hidden_layers": tower.shape.layers,
        "num_attention_heads": tower.heads,
        "hidden_act": tower.activation,
        "layer_norm_eps": tower.ln_post.eps,
    }


def _blocks(tower: Tower, name: str) -> dict[str, Tensor]:
    state = {}
    for i, block in enumerate(tower.blocks):
        at = f"{name}.encoder.layers.{i}"
        assert block.qkv.bias is not None
        for part, weight, bias in zip("qkv", block.qkv.weight.chunk(3), block.qkv.bias.chunk(3)):
            state |= {f"{at}.self_attn.{part}_proj.weight": weight, f"{at}.self_attn.{part}_proj.bias": bias}
        parts: dict[str, Any] = {"self_attn.out_proj": block.out, "mlp.fc1": block.fc1, "mlp.fc2": block.fc2}
        parts |= {"layer_norm1": block.qkv.norm, "layer_norm2": block.fc1.norm}
        for part, module in parts.items():
            state |= {f"{at}.{part}.weight": module.weight, f"{at}.{part}.bias": module.bias}
    return state
