"""Adapters from elsewhere: PEFT's own and fastdlp's come back, everything else is refused in one line."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

import fastdlp
from fastdlp.adapters.branches import TowerShape, tower_sites
from fastdlp.bench.baselines import hugging_face_clip as clip_model
from fastdlp.clip.load import load_clip
from fastdlp.errors import FastdlpError
from fastdlp.export.adapter import LoRA
from fastdlp.export.api import export_adapter, load_adapter
from fastdlp.export.file_format import write_adapter
from fastdlp.export.open_clip_format import add
from fastdlp.export.peft_format import write_peft
from tests.models import tiny_clip
from tests.pairs import cases

SHAPE = TowerShape(layers=2, width=32, mlp=128, embed=16)  # the image tower of tests.models
ABOUT = {"model": "tiny", "pretrained": ""}


def random_lora(encoder: str = "image", shape: TowerShape = SHAPE, rank: int = 3) -> LoRA:
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, Tensor] = {}
    for site in tower_sites(shape):
        for part in site.parts:
            tensors[f"{part}/A"] = torch.randn(rank, site.in_features, generator=generator)
            tensors[f"{part}/B"] = torch.randn(site.out_features, rank, generator=generator)
    return LoRA(encoder, rank, 16 / 3, tensors, ABOUT)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_peft(tmp_path / "adapter", random_lora(), {"vision_cfg": {}})
    return tmp_path / "adapter"


def assert_equal(found: LoRA, expected: LoRA) -> None:
    assert (found.encoder, found.rank) == (expected.encoder, expected.rank)
    assert found.scale == pytest.approx(expected.scale, rel=1e-12)
    assert found.about == expected.about
    assert found.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(tensor, expected.tensors[name]) for name, tensor in found.tensors.items())


@pytest.mark.parametrize("encoder", ["image", "text"])
def test_both_forms_come_back_exactly(encoder: str, tmp_path: Path) -> None:
    adapter = random_lora(encoder)
    write_peft(tmp_path / "adapter", adapter, {"vision_cfg": {}, "text_cfg": {}})
    assert_equal(load_adapter(tmp_path / "adapter"), adapter)
    write_adapter(tmp_path / "adapter.safetensors", adapter)
    found = load_adapter(tmp_path / "adapter.safetensors")
    assert_equal(LoRA(found.encoder, found.rank, found.scale, found.tensors, ABOUT), adapter)
    assert found.about == ABOUT | {"encoder": encoder}


@pytest.mark.slow
@cases(tower=["vision_model", "text_model"], rslora=[False, True], dtype=[torch.float32, torch.bfloat16])
@torch.no_grad()
def test_what_peft_saved_computes_the_same_here(tower: str, rslora: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    """On some linears of one tower, as users of PEFT do; merged into open_clip's weights here."""
    import open_clip
    from peft import LoraConfig, get_peft_model

    name = tiny_clip(tmp_path / "model")
    clip = load_clip(name)
    targets = rf"{tower}.*\.(q_proj|v_proj|fc2)"
    config = LoraConfig(r=3, lora_alpha=5, use_rslora=rslora, target_modules=targets, init_lora_weights="gaussian")
    model: Any = get_peft_model(clip_model(clip), config)
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    if dtype == torch.bfloat16:  # of values that bf16 holds, so that both sides add the same
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name:
                parameter.copy_(parameter.to(dtype))
    model.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_model.safetensors"
    save_file({k: v.to(dtype) for k, v in load_file(path).items()}, path)
    adapter = load_adapter(tmp_path / "adapter")
    assert adapter.scale == pytest.approx(5 / 3**0.5 if rslora else 5 / 3)
    layers = 2 if tower == "vision_model" else 3
    assert adapter.parts == sorted(f"{i}.{part}" for i in range(layers) for part in ("q", "v", "fc2"))
    net = open_clip.create_model(name).eval()
    frozen = {key: value.clone() for key, value in net.state_dict().items()}
    add(net.state_dict(), adapter)
    pixels, ids = torch.randn(4, 3, 24, 24), clip.tokenize(["a dog", "a photo of a cat"])
    expected = model.eval()(input_ids=ids, pixel_values=pixels)
    for found, features in (
        (net.encode_image(pixels), expected.image_embeds),
        (net.encode_text(ids), expected.text_embeds),
    ):
        torch.testing.assert_close(F.normalize(found, dim=-1), features, rtol=1e-4, atol=1e-5)
    changed = {key for key, value in net.state_dict().items() if not torch.equal(value, frozen[key])}
    assert len(changed) == 2 * layers


def test_linears_without_adapter_are_filled_with_zeros() -> None:
    whole = random_lora()
    some = LoRA("image", 3, 1.0, {k: v for k, v in whole.tensors.items() if k.startswith("1.q/")})
    fitted = some.fitted(tower_sites(SHAPE), "here")
    assert {k: v.shape for k, v in fitted.items()} == {k: v.shape for k, v in whole.tensors.items()}
    assert all(torch.equal(v, some.tensors[k]) if k in some.tensors else not v.any() for k, v in fitted.items())


# -- scoring a run ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["image", pytest.param("text", marks=pytest.mark.slow)])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three clients with adapters far apart."""
    path = tmp_path_factory.mktemp("import") / "run"
    options: dict[str, Any] = {"clients": 3, "beta": 0.05, "rounds": 1, "lr": 3e-3, "encoder": request.param}
    fastdlp.train(fastdlp.TrainConfig(**options, out=str(path)))
    return path


def correct(scores: dict[str, Any]) -> list[int]:
    return [client["correct"] for client in scores["per_client"]]


@pytest.mark.parametrize("out", ["adapter", "adapter.safetensors"])
def test_evaluate_with_an_adapter(out: str, run: Path, tmp_path: Path, cli: Any) -> None:
    """With client 1's own adapter for all: client 1 scores as ever, the others otherwise."""
    export_adapter(run, tmp_path / out, "safetensors" if "." in out else "peft", client=1)
    own, given = fastdlp.evaluate(run), fastdlp.evaluate(run, adapter=tmp_path / out)
    assert correct(given)[1] == correct(own)[1]
    assert correct(given) != correct(own)
    assert given["zero_shot"] == own["zero_shot"]
    code, printed, err = cli("evaluate", run, "--adapter", tmp_path / out, "--json")
    assert (code, err) == (0, "")
    assert json.loads(printed) == given


def test_adapters_that_do_not_fit_the_run(run: Path, tmp_path: Path, cli: Any) -> None:
    write_adapter(tmp_path / "tiny.safetensors", random_lora())
    code, out, err = cli("evaluate", run, "--adapter", tmp_path / "tiny.safetensors")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "0.fc1/A is (3, 32), this model has (3, 128)" in err
    deep = TowerShape(layers=5, width=128, mlp=512, embed=128)
    write_adapter(tmp_path / "deep.safetensors", random_lora(shape=deep))
    with pytest.raises(FastdlpError, match=r"adapts 4\.fc1, which the model's tower does not have"):
        fastdlp.evaluate(run, adapter=tmp_path / "deep.safetensors")
    glyph = random_lora(shape=TowerShape(layers=4, width=128, mlp=512, embed=128))
    other = LoRA("image", glyph.rank, glyph.scale, glyph.tensors, {"weights": "0" * 64})
    write_adapter(tmp_path / "other.safetensors", other)
    with pytest.raises(FastdlpError, match="other weights than glyph-clip has now"):
        fastdlp.evaluate(run, adapter=tmp_path / "other.safetensors")


# -- what is refused ----------------------------------------------------------------------------------------------

CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "use_dora is True, only a plain LoRA"),
    "bias": ({"bias": "lora_only"}, "bias is 'lora_only'"),
    "modules_to_save": ({"modules_to_save": ["visual_projection"]}, "modules_to_save is"),
    "rank_pattern": ({"rank_pattern": {"q_proj": 8}}, "rank_pattern is {'q_proj': 8}, only a plain LoRA of one rank"),
    "alpha_pattern": ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern is"),
    "a field of a later PEFT": ({"use_wonder": True}, "use_wonder is True"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the frozen weights"),
    "another kind": ({"peft_type": "IA3"}, "peft_type is 'IA3', only LORA is read"),
    "a rank that the tensors do not have": ({"r": 4}, "0.fc1/A is (3, 32), expected [4, K] for rank 4"),
    "no rank": ({"r": None}, "r is None"),
    "a scale of nothing": ({"lora_alpha": 0}, "scale 0.0, expected"),
}


@pytest.mark.parametrize("what", CONFIGS)
def test_peft_configurations(what: str, folder: Path) -> None:
    changes, words = CONFIGS[what]
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert_one_line(folder, words)


def test_all_defaults_of_peft_are_plain(folder: Path) -> None:
    from peft import LoraConfig

    own = json.loads((folder / "adapter_config.json").read_text())
    config: Any = LoraConfig(r=3, lora_alpha=16, target_modules=own["target_modules"])
    config.save_pretrained(folder)
    assert_equal(load_adapter(folder), random_lora())


AT = "base_model.model.vision_model.encoder.layers.0."
Change = Callable[[dict[str, Tensor]], Any]
TENSORS: dict[str, tuple[Change, str]] = {
    "an unknown target": (
        lambda t: t.update(
            {"base_model.model.vision_model.embeddings.patch_embedding.lora_A.weight": torch.ones(3, 9)}
        ),
        "patch_embedding.lora_A.weight is no plain LoRA of q_proj",
    ),
    "another linear": (
        lambda t: t.update({AT + "self_attn.o_proj.lora_A.weight": torch.ones(3, 32)}),
        "o_proj.lora_A.weight is no plain LoRA",
    ),
    "a magnitude of DoRA": (
        lambda t: t.update({AT + "mlp.fc1.lora_magnitude_vector": torch.ones(128)}),
        "lora_magnitude_vector is no plain LoRA",
    ),
    "both towers": (
        lambda t: t.update({f"base_model.model.text_projection.lora_{k}.weight": torch.ones(3, 3) for k in "AB"}),
        "adapts both towers",
    ),
    "A without B": (lambda t: t.pop(AT + "mlp.fc1.lora_B.weight"), "0.fc1 has only one of A and B"),
    "A of three sizes": (
        lambda t: t.update({AT + "mlp.fc1.lora_A.weight": torch.ones(3, 32, 1)}),
        "0.fc1/A is (3, 32, 1), expected [3, K] for rank 3",
    ),
    "B the wrong way round": (
        lambda t: t.update({AT + "mlp.fc1.lora_B.weight": torch.ones(3, 128)}),
        "0.fc1/B is (3, 128), expected [N, 3] for rank 3",
    ),
    "not a number": (
        lambda t: t.update({AT + "mlp.fc1.lora_B.weight": torch.full((128, 3), float("nan"))}),
        "0.fc1/B must hold finite",
    ),
    "integers": (
        lambda t: t.update({AT + "mlp.fc1.lora_B.weight": torch.ones(128, 3, dtype=torch.int8)}),
        "0.fc1/B must hold finite",
    ),
    "nothing": (lambda t: t.clear(), "holds no adapter"),
}


@pytest.mark.parametrize("what", TENSORS)
def test_peft_tensors(what: str, folder: Path) -> None:
    change, words = TENSORS[what]
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    assert_one_line(folder, words)


class Bomb:
    """Unpickling it makes the file `executed`."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch executed",)


def test_pickles(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bomb = pickle.dumps(Bomb())
    (tmp_path / "a.safetensors").write_bytes(bomb)
    assert_one_line(tmp_path / "a.safetensors", "damaged or not a safetensors file")
    (tmp_path / "a.bin").write_bytes(bomb)
    assert_one_line(tmp_path / "a.bin", "does not end in .safetensors: no other file is read")
    (folder / "adapter_model.safetensors").write_bytes(bomb)
    assert_one_line(folder, "damaged or not a safetensors file")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert_one_line(folder, "adapter_model.bin is a pickle and is not read: save the adapter as")
    (folder / "adapter_config.json").unlink()
    assert_one_line(folder, "holds no adapter_config.json but a pickle, adapter_model.bin")
    assert not (tmp_path / "executed").exists()


def test_places_without_an_adapter(folder: Path, tmp_path: Path) -> None:
    assert_one_line(tmp_path / "nowhere", "does not exist")
    assert_one_line(tmp_path, "holds no adapter_config.json: name")
    tiny_clip(tmp_path / "model")
    assert_one_line(tmp_path / "model", "is a whole model: use it as --model local-dir:")
    (folder / "adapter_config.json").write_text("[]")
    assert_one_line(folder, "is not the configuration of an adapter")
    (folder / "adapter_config.json").write_text("{")
    assert_one_line(folder, "is not JSON")
    save_file({"0.q/A": torch.ones(2, 3)}, tmp_path / "a.safetensors")
    assert_one_line(tmp_path / "a.safetensors", "is not an adapter of fastdlp export")
    about = {"format": "fastdlp-lora", "version": "1", "encoder": "image", "rank": "2", "scale": "4.0"}
    for change, words in (
        ({"version": "2"}, "is of version 2, this fastdlp reads version 1"),
        ({"rank": "two"}, "rank and scale in its metadata are not numbers"),
        ({"scale": "nan"}, "scale nan, expected"),
        ({"encoder": "sound"}, "the encoder is 'sound', expected image or text"),
        ({"rank": "3"}, "0.q/A is (2, 3), expected [3, K]"),
        ({}, "'global/0.q/A' is not an adapter of a linear"),
    ):
        name = "0.q" if change else "global/0.q"
        tensors = {f"{name}/A": torch.ones(2, 3), f"{name}/B": torch.ones(3, 2)}
        save_file(tensors, tmp_path / "a.safetensors", {"fastdlp": json.dumps(about | change)})
        assert_one_line(tmp_path / "a.safetensors", words)
    save_file(tensors, tmp_path / "a.safetensors", {"fastdlp": "[]"})
    assert_one_line(tmp_path / "a.safetensors", "its metadata is not an object")


def assert_one_line(path: Path, words: str) -> None:
    with pytest.raises(FastdlpError) as caught:
        load_adapter(path)
    message = str(caught.value)
    assert words in message
    assert str(path) in message
    assert "\n" not in message


def test_features_are_moved_by_the_random_adapter(tmp_path: Path) -> None:
    """The adapters above are large enough for a comparison to mean something."""
    import open_clip

    net = open_clip.create_model(tiny_clip(tmp_path / "model")).eval()
    pixels = torch.randn(4, 3, 24, 24)
    with torch.no_grad():
        before = F.normalize(net.encode_image(pixels), dim=-1)
        add(net.state_dict(), random_lora())
        assert (F.normalize(net.encode_image(pixels), dim=-1) - before).abs().max() > 0.1
