"""Towers against open_clip: frozen, with adapters, and each exact saving on against off."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor

from fastdlp.adapters.bank import AdapterBank
from fastdlp.adapters.branches import Branch, tower_sites
from fastdlp.adapters.layout import lora_layout
from fastdlp.clip.load import Clip, describe, load_clip
from fastdlp.clip.tower import Tower
from fastdlp.kernels.groups import RowGroups
from tests.models import tiny_clip

# What a model may have besides CLIP's own, two things at once where they do not touch each other.
TANH, EPS = {"act_kwargs": {"approximate": "tanh"}}, {"norm_kwargs": {"eps": 1e-2}}
VARIANTS: dict[str, dict[str, Any]] = {
    "gelu": {},
    "quick_gelu, layer scale": {"quick_gelu": True, "vision": {"ls_init_value": 0.1}, "text": {"ls_init_value": 0.1}},
    "tanh gelu, norm eps": {"vision": TANH | EPS, "text": TANH | EPS},
    "clipa": {
        "vision": {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True},
        "text": {"no_causal_mask": True, "pool_type": "last"},
    },
    "eos, projection with bias": {"text": {"pool_type": "eos", "eos_id": 49407, "proj_bias": True}},
}
ADAPTED: list[tuple[str, tuple[str, ...]]] = [  # variant, view
    ("gelu", ("local",)),
    ("gelu", ("global",)),
    ("gelu", ("local", "global")),
    ("quick_gelu, layer scale", ("local", "global")),
    ("tanh gelu, norm eps", ("local",)),
    ("clipa", ("local", "global")),
    ("eos, projection with bias", ("local",)),
]
TEXTS = ["a photo of a cat", "dog", "a photo of a red delicious apple, a type of fruit"]
BRANCHES = (Branch("local", 4, gated=True), Branch("global", 2, gated=False))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Clip, Any]]:
    """The same random model of a variant here and in open_clip."""

    @cache
    def load(variant: str) -> tuple[Clip, Any]:
        name = tiny_clip(tmp_path_factory.mktemp("model"), **VARIANTS[variant])
        return load_clip(name), open_clip.create_model(name).eval()

    return load


@pytest.fixture(params=VARIANTS)
def pair(request: pytest.FixtureRequest, pairs: Callable[[str], tuple[Clip, Any]]) -> tuple[Clip, Any]:
    return pairs(request.param)


def images(n: int, clip: Clip) -> Tensor:
    return torch.randn(n, 3, clip.transform.size, clip.transform.size, generator=torch.Generator().manual_seed(0))


def image_features(clip: Clip, n: int, groups: RowGroups | None = None, adapters: Any = None) -> Tensor:
    return clip.image.features(clip.image_stem(images(n, clip)), groups, adapters)


def text_features(clip: Clip, groups: RowGroups | None = None, adapters: Any = None, repeat: int = 1) -> Tensor:
    tokens, index = clip.text_stem(clip.tokenize(TEXTS))
    return clip.text.features(tokens.repeat(repeat, 1, 1), groups, adapters, index.repeat(repeat))


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float = 2e-6) -> None:
    assert ours.shape == theirs.shape
    if not theirs.numel():  # the gates of a branch without gate
        return
    assert (ours - theirs).abs().max() <= tolerance * max(1.0, float(theirs.detach().abs().max()))


def bank_of(tower: Tower, slots: int, b_scale: float) -> AdapterBank:
    bank = AdapterBank(tower_sites(tower.shape), BRANCHES, slots)
    bank.initialize("gaussian", {"local": [[i] for i in range(slots)], "global": [[99]] * slots})
    g = torch.Generator().manual_seed(3)
    for state in bank.state.values():
        state.weights += b_scale * torch.randn(state.weights.shape, generator=g)
    return bank


def test_frozen_features_equal_open_clip(pair: tuple[Clip, Any]) -> None:
    clip, net = pair
    with torch.no_grad():
        assert_close(image_features(clip, 5), net.encode_image(images(5, clip)))
        assert_close(text_features(clip), net.encode_text(clip.tokenize(TEXTS)))
    assert clip.logit_scale == pytest.approx(net.logit_scale.exp().item())


@pytest.mark.parametrize("pair", ["gelu", "clipa"], indirect=True)
def test_adapters_at_zero_change_nothing(pair: tuple[Clip, Any]) -> None:
    clip, net = pair
    bank = AdapterBank(tower_sites(clip.image.shape), BRANCHES, 2)
    bank.initialize("gaussian", {"local": [[0], [1]], "global": [[2], [2]]})
    adapters = bank.adapters(torch.tensor([0, 1]), [("local",), ("global",)], grad=False)
    with torch.no_grad():
        assert_close(image_features(clip, 8, RowGroups((3, 1), views=2), adapters), net.encode_image(images(8, clip)))


@pytest.mark.parametrize(("pair", "view"), ADAPTED, indirect=["pair"])
def test_adapters_equal_weights_merged_into_open_clip(
    pair: tuple[Clip, Any], view: tuple[str, ...], tmp_path: Path
) -> None:
    clip, net = pair
    for tower, module in ((clip.image, net.visual), (clip.text, net)):
        bank = bank_of(tower, 2, 0.05)
        merged = merge(net, module, bank, slot=1, view=view)
        groups = RowGroups((0, 4 if module is not net else len(TEXTS)))
        adapters = bank.adapters(torch.tensor([0, 1]), [view], grad=False)
        with torch.no_grad():
            if module is net:
                assert_close(text_features(clip, groups, adapters), merged.encode_text(clip.tokenize(TEXTS)), 1e-5)
            else:
                assert_close(image_features(clip, 4, groups, adapters), merged.encode_image(images(4, clip)), 1e-5)


def merge(net: Any, module: Any, bank: AdapterBank, slot: int, view: tuple[str, ...]) -> Any:
    """open_clip's model with scale · B diag(gate) A added to the weights of one tower."""
    import copy

    merged = copy.deepcopy(net)
    target = merged if module is net else merged.visual
    deltas: dict[str, Tensor] = {}
    for name in view:
        tensors, scale = bank.named(name, slot), bank.branches[name].scale
        for part in {key.rpartition("/")[0] for key in tensors}:
            gate = tensors.get(f"{part}/gate", torch.ones(len(tensors[f"{part}/A"])))
            delta = scale * tensors[f"{part}/B"] @ (gate[:, None] * tensors[f"{part}/A"])
            deltas[part] = deltas.get(part, 0) + delta
    with torch.no_grad():
        for i, block in enumerate(target.transformer.resblocks):
            block.attn.in_proj_weight += torch.cat([deltas[f"{i}.{p}"] for p in "qkv"])
            block.attn.out_proj.weight += deltas[f"{i}.out"]
            block.mlp.c_fc.weight += deltas[f"{i}.fc1"]
            block.mlp.c_proj.weight += deltas[f"{i}.fc2"]
        if module is not net:
            target.proj += deltas["proj"].T
        elif isinstance(target.text_projection, torch.nn.Linear):
            target.text_projection.weight += deltas["proj"]
        else:
            target.text_projection += deltas["proj"].T
    return merged


def test_last_block_for_the_pooled_token_only(pair: tuple[Clip, Any]) -> None:
    clip, _ = pair
    for encoder in ("image", "text"):
        bank = bank_of(clip.tower(encoder), 2, 0.05)
        results = []
        for pooled_only in (True, False):
            some = replace(clip, **{encoder: replace(clip.tower(encoder), pooled_only=pooled_only)})
            adapters = bank.adapters(torch.tensor([0, 1]), [("local",), ("global",)], grad=True)
            if encoder == "image":
                features = image_features(some, 10, RowGroups((3, 2), views=2), adapters)
            else:
                features = text_features(some, RowGroups((3, 3), views=2), adapters, repeat=4)
            loss = (features * torch.linspace(-1, 1, features.numel()).view_as(features)).sum()
            results.append((features, adapters.gradients(loss, ["local", "global"])))
        (fast, fast_grads), (plain, plain_grads) = results
        assert_close(fast, plain)
        for branch in ("local", "global"):
            for mine, theirs in zip(fast_grads[branch], plain_grads[branch]):
                assert_close(mine, theirs, 1e-5)


def test_text_cut_at_the_longest_prompt(pair: tuple[Clip, Any]) -> None:
    clip, _ = pair
    ids = clip.tokenize(TEXTS)
    whole = replace(clip.text_stem, cut=False)
    tokens, index = clip.text_stem(ids)
    assert whole(ids)[0].shape[1] == ids.shape[1]
    if clip.text.causal:
        assert tokens.shape[1] == int(index.max()) + 1 < ids.shape[1]
    bank = bank_of(clip.text, 1, 0.05)
    results = []
    for stem in (clip.text_stem, whole):
        adapters = bank.adapters(torch.tensor([0]), [("local",)], grad=True)
        tokens, index = stem(ids)
        features = clip.text.features(tokens, RowGroups((3,)), adapters, index)
        results.append((features, *adapters.gradients(features.square().sum(), ["local"])["local"]))
    for cut, full in zip(*results):
        assert_close(cut, full, 1e-5)


@pytest.mark.parametrize("pair", ["gelu", "quick_gelu, layer scale"], indirect=True)
def test_bf16_stays_near_fp32(pair: tuple[Clip, Any]) -> None:
    clip, _ = pair
    with torch.no_grad():
        exact = image_features(clip, 6)
        rounded = clip.image.to("cpu", torch.bfloat16).features(clip.image_stem(images(6, clip)).bfloat16())
    assert rounded.dtype == torch.float32
    assert (rounded - exact).norm() <= 0.03 * exact.norm()


@pytest.mark.parametrize(
    ("model", "uploaded"), [("ViT-B-32", (334_336, 223_232)), ("ViT-B-32-quickgelu", (334_336, 223_232))]
)
def test_parameter_counts_of_the_paper(model: str, uploaded: tuple[int, int]) -> None:
    branch = Branch("global", 2, gated=False)
    assert tuple(lora_layout(tower_sites(shape), branch).weights for shape in describe(model)) == uploaded


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-L-14", "ViT-H-14", "ViT-bigG-14-CLIPA", "ViT-S-16-alt", "ViT-e-14"])
def test_describe_equals_the_built_model(name: str) -> None:
    with torch.device("meta"):
        net = open_clip.CLIP(**{k: v for k, v in open_clip.get_model_config(name).items() if k != "custom_text"})
    image, text = describe(name)
    for shape, transformer, embed in (
        (image, net.visual.transformer, net.visual.proj.shape[1]),
        (text, net.transformer, image.embed),
    ):
        block = transformer.resblocks[0].mlp.c_fc.weight
        assert (shape.layers, shape.width, shape.mlp, shape.embed) == (
            len(transformer.resblocks),
            block.shape[1],
            block.shape[0],
            embed,
        )
