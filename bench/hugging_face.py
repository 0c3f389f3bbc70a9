"""transformers' CLIP towers with the weights of ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastdlp.clip.load import Clip
from fastdlp.clip.tower import Tower
from fastdlp.export.peft_format import LINEARS


def hugging_face_tower(clip: Clip) -> nn.Module:
    """The image tower as transformers' CLIPVisionModelWithProjection."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    tower, stem = clip.image, clip.image_stem
    patch = stem.patches.shape[-1]
    config: Any = CLIPVisionConfig(**_options(tower), image_size=clip.transform.size, patch_size=patch)
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
    return _loaded(CLIPVisionModelWithProjection(config), "vision_model", "visual_projection", state, tower)


def hugging_face_text_tower(clip: Clip) -> nn.Module:
    """The text tower as transformers' CLIPTextModelWithProjection."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    tower, stem = clip.text, clip.text_stem
    config: Any = CLIPTextConfig(
        **_options(tower),
        vocab_size=len(stem.embedding),
        max_position_embeddings=len(stem.positions),
        eos_token_id=2,  # the feature is taken at the highest token id
        bos_token_id=None,
        pad_token_id=None,
    )
    state = {
        "embeddings.token_embedding.weight": stem.embedding,
        "embeddings.position_embedding.weight": stem.positions,
        "final_layer_norm.weight": tower.ln_post.weight,
        "final_layer_norm.bias": tower.ln_post.bias,
    }
    return _loaded(CLIPTextModelWithProjection(config), "text_model", "text_projection", state, tower)


def _options(tower: Tower) -> dict[str, Any]:
    shape = tower.shape
    return {
        "hidden_size": shape.width,
        "intermediate_size": shape.mlp,
        "projection_dim": shape.embed,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": tower.heads,
        "hidden_act": tower.activation,
        "layer_norm_eps": tower.ln_post.eps,
        "attn_implementation": "sdpa",
    }


def _loaded(model: nn.Module, body: str, projection: str, state: dict[str, Tensor], tower: Tower) -> nn.Module:
    """The model with these weights, under the names that this version of transformers gives them."""
    state = state | _blocks(tower)
    full = {}
    for name, own in model.state_dict().items():
        if name == f"{projection}.weight":
            full[name] = tower.proj.weight
        elif "position_ids" in name:
            full[name] = own
        else:
            full[name] = state[name.removeprefix(f"{body}.")]
    model.load_state_dict(full)
    return model.eval()


def _blocks(tower: Tower) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for i, block in enumerate(tower.blocks):
        at = f"encoder.layers.{i}."
        assert block.qkv.bias is not None
        for part, weight, bias in zip("qkv", block.qkv.weight.chunk(3), block.qkv.bias.chunk(3)):
            state |= {f"{at}{LINEARS[part]}.weight": weight, f"{at}{LINEARS[part]}.bias": bias}
        parts: dict[str, Any] = {LINEARS["out"]: block.out, LINEARS["fc1"]: block.fc1, LINEARS["fc2"]: block.fc2}
        for name, part in (parts | {"layer_norm1": block.qkv.norm, "layer_norm2": block.fc1.norm}).items():
            state |= {f"{at}{name}.weight": part.weight, f"{at}{name}.bias": part.bias}
    return {name: torch.as_tensor(value) for name, value in state.items()}
