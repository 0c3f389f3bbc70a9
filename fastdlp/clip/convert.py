"""Conversion of open_clip's modules to the tensors of towers and stems. Does not import open_clip."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastdlp.clip.stem import ImageStem, TextStem
from fastdlp.clip.tower import Block, Tower
from fastdlp.errors import FastdlpError
from fastdlp.kernels.frozen import FrozenLinear, Norm

SUPPORTED = "supported are open_clip's ViT image towers with its own text transformer, such as ViT-B-32-quickgelu"


def image_tower(visual: Any) -> Tower:
    return Tower(
        blocks=_blocks(visual.transformer),
        ln_post=_norm(visual.ln_post),
        proj=FrozenLinear(visual.proj.detach().T.contiguous()),
        heads=visual.transformer.resblocks[0].attn.num_heads,
        causal=False,
        pool={"tok": "tok", "avg": "avg"}[visual.pool_type],
        norm_after_pool=bool(visual.final_ln_after_pool),
    )


def text_tower(net: Any) -> Tower:
    projection = net.text_projection
    if projection is None:
        raise FastdlpError(f"this text tower has no projection: {SUPPORTED}")
    if isinstance(projection, nn.Linear):
        proj = _linear(projection)
    else:
        proj = FrozenLinear(projection.detach().T.contiguous())
    return Tower(
        blocks=_blocks(net.transformer),
        ln_post=_norm(net.ln_final),
        proj=proj,
        heads=net.transformer.resblocks[0].attn.num_heads,
        causal=net.attn_mask is not None,
        pool="index",
    )


def image_stem(visual: Any) -> ImageStem:
    ln_pre = None if isinstance(visual.ln_pre, nn.Identity) else _norm(visual.ln_pre)
    return ImageStem(
        visual.conv1.weight.detach(),
        visual.class_embedding.detach(),
        visual.positional_embedding.detach(),
        ln_pre,
    )


def text_stem(net: Any) -> TextStem:
    return TextStem(
        net.token_embedding.weight.detach(),
        net.positional_embedding.detach(),
        net.text_pool_type,
        int(net.text_eos_id),
        cut=net.attn_mask is not None,
    )


def _blocks(transformer: Any) -> tuple[Block, ...]:
    def scale(module: Any) -> Tensor | None:
        return None if isinstance(module, nn.Identity) else module.gamma.detach()

    activation = _activation(transformer)
    return tuple(
        Block(
            qkv=FrozenLinear(b.attn.in_proj_weight.detach(), b.attn.in_proj_bias.detach(), _norm(b.ln_1)),
            out=_linear(b.attn.out_proj),
            ls1=scale(b.ls_1),
            fc1=_linear(b.mlp.c_fc, _norm(b.ln_2), activation),
            fc2=_linear(b.mlp.c_proj),
            ls2=scale(b.ls_2),
        )
        for b in transformer.resblocks
    )


def _activation(transformer: Any) -> str:
    module = transformer.resblocks[0].mlp.gelu
    if isinstance(module, nn.GELU):
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    return "quick_gelu"


def _norm(module: Any) -> Norm:
    return Norm(module.weight.detach(), module.bias.detach(), module.eps)


def _linear(module: Any, norm: Norm | None = None, activation: str = "none") -> FrozenLinear:
    bias = None if module.bias is None else module.bias.detach()
    return FrozenLinear(module.weight.detach(), bias, norm, activation)
