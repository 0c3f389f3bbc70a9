"""What a run exports computes what the run was scored with: in PEFT, in open_clip, and by hand."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import textwrap
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import pytest
import safetensors
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

import fastdlp
from fastdlp.adapters.bank import AdapterBank
from fastdlp.adapters.branches import Branch, tower_sites
from fastdlp.adapters.serialization import load_client, load_tensors, save_tensors
from fastdlp.bench.baselines import hugging_face_clip as clip_model
from fastdlp.clip.load import Clip, load_clip
from fastdlp.errors import FastdlpError
from fastdlp.export import file_format
from fastdlp.export.api import export_adapter, load_adapter
from fastdlp.export.open_clip_format import FILE_PREPROCESSING, name_for_a_file
from fastdlp.export.peft_format import hub_model, write_peft
from fastdlp.kernels.groups import RowGroups
from tests.models import tiny_clip
from tests.sharing import once

PROMPTS = [f"a photo of the number {i}." for i in range(10)]
CLIENT = 1
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}  # of logits of up to 100, fp32, in another order of products
MOVES = 1e-2  # what the adapter must change at the least

Forward = Callable[[Tensor, Tensor], Tensor]  # pixels, token ids → class logits


@pytest.fixture(scope="session")
def runs(shared: Path, few: Path) -> Path:
    """Finished runs by name, on digits; in client 1 of feddlp's every third gate is at zero."""
    return once(shared / "export", partial(_train, few=few))


def _train(place: Path, few: Path) -> None:
    tiny = tiny_clip(place / "model")
    common: dict[str, Any] = {"partition": str(few), "rounds": 2, "batch_size": 4, "lr": 3e-3}
    for name, options in {
        "image": {"method": "feddlp"},
        "text": {"method": "feddlp", "encoder": "text"},
        "tiny-image": {"method": "feddlp", "model": tiny, "lr": 1e-2},
        "tiny-text": {"method": "feddlp", "model": tiny, "encoder": "text", "lr": 1e-2},
        "flora": {"method": "flora"},
        "local": {"method": "local"},
        "feddat": {"method": "feddat", "model": tiny, "lr": 1e-2},
        "combined": {"method": "combined", "model": tiny, "lr": 1e-2},
        "combined-3-5": {"method": "combined", "model": tiny, "lr": 1e-2, "rank_local": 3, "rank_global": 5},
        "fedfft": {"method": "fedfft", "model": tiny, "lr": 1e-3},
        "fedvmlc": {"method": "fedvmlc", "model": tiny, "lr": 1e-3},
        "fedclip": {"method": "fedclip"},
    }.items():
        fastdlp.train(fastdlp.TrainConfig(**(common | options), out=str(place / name)))
        if options["method"] == "feddlp":
            path = place / name / f"adapters/client-{CLIENT:02d}.safetensors"
            tensors, metadata = load_tensors(path)
            gates = [tensor for tensor_name, tensor in tensors.items() if tensor_name.endswith("/gate")]
            for gate in gates[::2]:
                gate[::3] = 0.0
            save_tensors(path, tensors, metadata)


@pytest.fixture
def copy(runs: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a run that a test may change."""
    return lambda name: Path(shutil.copytree(runs / name, tmp_path / name))


def model_of(run: Path) -> Clip:
    config = json.loads((run / "config.json").read_text())
    return load_clip(config["model"], config["pretrained"], config["seed"])


def inputs(clip: Clip) -> tuple[Tensor, Tensor]:
    pixels = torch.randn(6, 3, clip.transform.size, clip.transform.size, generator=torch.Generator().manual_seed(3))
    return pixels, clip.tokenize(PROMPTS)


def logits(clip: Clip, images: Tensor, texts: Tensor) -> Tensor:
    return clip.logit_scale * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T


@torch.no_grad()
def own_logits(run: Path, client: int | None, view: tuple[str, ...] = ()) -> Tensor:
    """fastdlp's own forward with the adapters of a run's files; view () is the frozen model."""
    clip = model_of(run)
    tensors, metadata = load_tensors(run / f"adapters/client-{client or 0:02d}.safetensors")
    branches = [Branch(**branch) for branch in json.loads(metadata["branches"])]
    if client is None:
        tensors, _ = load_tensors(run / "adapters/server.safetensors")
        branches = [branch for branch in branches if branch.name == "global"]
    encoder = metadata["encoder"]
    bank = AdapterBank(tower_sites(clip.tower(encoder).shape), branches, slots=1)
    load_client(bank, 0, tensors, run)

    def adapted(wanted: str, rows: int) -> dict[str, Any]:
        if wanted != encoder or not view:
            return {}
        return {"groups": RowGroups((rows,), 1), "adapters": bank.adapters(torch.tensor([0]), [view], grad=False)}

    pixels, ids = inputs(clip)
    tokens, index = clip.text_stem(ids)
    images = clip.image.features(clip.image_stem(pixels), **adapted("image", len(pixels)))
    texts = clip.text.features(tokens, index=index, **adapted("text", len(ids)))
    return logits(clip, images, texts)


@torch.no_grad()
def peft_logits(run: Path, folder: Path) -> Tensor:
    """The exported folder on transformers' CLIPModel, loaded by PEFT, which must have nothing to complain of."""
    from peft import PeftModel

    clip = model_of(run)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of missing and unexpected names
        model = PeftModel.from_pretrained(clip_model(clip), str(folder))
    pixels, ids = inputs(clip)
    out = model(input_ids=ids, pixel_values=pixels)
    return logits(clip, out.image_embeds, out.text_embeds)


@torch.no_grad()
def open_clip_logits(run: Path, net: Any) -> Tensor:
    clip = model_of(run)
    pixels, ids = inputs(clip)
    net = net.eval()
    return logits(clip, net.encode_image(pixels), net.encode_text(ids))


def assert_same_and_moved(found: Tensor, run: Path, client: int | None, view: tuple[str, ...]) -> None:
    expected = own_logits(run, client, view)
    torch.testing.assert_close(found, expected, **TOLERANCE)
    assert (expected - own_logits(run, client)).abs().max() > MOVES


# -- PEFT ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "client"),
    [
        ("tiny-image", CLIENT),
        ("tiny-text", None),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("image", None), ("text", CLIENT))),
    ],
)
def test_peft_loads_what_a_run_exports(name: str, client: int | None, runs: Path, tmp_path: Path) -> None:
    facts = export_adapter(runs / name, tmp_path / "adapter", "peft", client)
    assert (facts["rank"], facts["lora_alpha"]) == ((4, 16) if client else (2, 16))
    found = peft_logits(runs / name, tmp_path / "adapter")
    assert_same_and_moved(found, runs / name, client, ("local",) if client else ("global",))


def test_a_client_of_a_method_without_private_adapter(runs: Path, tmp_path: Path) -> None:
    """FLoRA's clients are scored with the averaged adapter: all export the server's."""
    for client in (0, 2, None):
        export_adapter(runs / "flora", tmp_path / f"{client}.safetensors", "safetensors", client)
    first, second, server = (load_file(tmp_path / f"{client}.safetensors") for client in (0, 2, None))
    assert first.keys() == second.keys() == server.keys()
    assert all(torch.equal(first[k], server[k]) and torch.equal(second[k], server[k]) for k in server)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "ranks"), [("feddat", (2, 2)), ("combined", (4, 2)), ("combined-3-5", (3, 5))])
def test_branches_that_one_forward_adds_become_one_adapter(
    name: str, ranks: tuple[int, int], runs: Path, tmp_path: Path
) -> None:
    facts = export_adapter(runs / name, tmp_path / "adapter", "peft", CLIENT)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert facts["rank"] == config["r"] == sum(ranks)
    assert config["lora_alpha"] == pytest.approx(16 * sum(ranks) / ranks[0])
    assert_same_and_moved(peft_logits(runs / name, tmp_path / "adapter"), runs / name, CLIENT, ("local", "global"))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "linears"), [("image", 4 * 6 + 1), ("text", 2 * 6 + 1)])
def test_peft_adapts_one_tower_only(name: str, linears: int, runs: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from peft.tuners.lora import Linear

    export_adapter(runs / name, tmp_path / "adapter", "peft", CLIENT)
    model = PeftModel.from_pretrained(clip_model(model_of(runs / name)), str(tmp_path / "adapter"))
    adapted = [path for path, module in model.named_modules() if isinstance(module, Linear)]
    other = "text_model" if name == "image" else "vision_model"
    assert len(adapted) == linears
    assert not [path for path in adapted if other in path]
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] is None


@pytest.mark.parametrize(
    ("model", "pretrained", "expected"),
    [
        ("ViT-B-32", "openai", "openai/clip-vit-base-patch32"),
        ("ViT-L-14-336-quickgelu", "openai", "openai/clip-vit-large-patch14-336"),
        ("ViT-B-32", "laion2b_s34b_b79k", None),
        ("ViT-H-14-quickgelu", "openai", None),
        ("glyph-clip", "", None),
    ],
)
def test_known_hub_models(model: str, pretrained: str, expected: str | None) -> None:
    assert hub_model(model, pretrained) == expected


@pytest.mark.parametrize(
    ("name", "tower", "words"),
    [
        ("tiny-image", {"ls_init_value": 0.1}, "LayerScale"),
        ("tiny-image", {"no_ln_pre": True}, "no norm before"),
        ("tiny-image", {"pool_type": "avg"}, "pooling over all patches"),
        ("tiny-text", {"no_causal_mask": True}, "no causal mask"),
        ("tiny-text", {"proj_bias": True}, "a bias in its projection"),
        ("tiny-text", {"pool_type": "last"}, "the last token"),
    ],
)
def test_towers_that_transformers_does_not_have(
    name: str, tower: dict[str, Any], words: str, runs: Path, tmp_path: Path
) -> None:
    export_adapter(runs / name, tmp_path / "a.safetensors", "safetensors", CLIENT)
    key = "vision_cfg" if name.endswith("image") else "text_cfg"
    with pytest.raises(FastdlpError, match=f"{words}.*use --format open_clip or safetensors"):
        write_peft(tmp_path / "adapter", load_adapter(tmp_path / "a.safetensors"), {key: tower})
    assert not (tmp_path / "adapter").exists()


# -- open_clip ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "client"), [("image", CLIENT), ("text", None), ("tiny-image", None), ("tiny-text", CLIENT)]
)
def test_open_clip_loads_the_merged_folder(name: str, client: int | None, runs: Path, tmp_path: Path) -> None:
    export_adapter(runs / name, tmp_path / "model", "open_clip", client)
    net = open_clip.create_model(f"local-dir:{tmp_path / 'model'}")
    view = ("local",) if client else ("global",)
    assert_same_and_moved(open_clip_logits(runs / name, net), runs / name, client, view)


@pytest.mark.parametrize("name", ["image", "tiny-text"])
def test_fastdlp_loads_the_merged_folder(name: str, runs: Path, tmp_path: Path) -> None:
    """As a model of its own: its weights, its images' preparation and its tokenizer."""
    export_adapter(runs / name, tmp_path / "model", "open_clip", CLIENT)
    before, clip = model_of(runs / name), load_clip(f"local-dir:{tmp_path / 'model'}")
    assert clip.transform == before.transform
    assert torch.equal(clip.tokenize(PROMPTS), before.tokenize(PROMPTS))
    pixels, ids = inputs(clip)
    tokens, index = clip.text_stem(ids)
    found = logits(clip, clip.image.features(clip.image_stem(pixels)), clip.text.features(tokens, index=index))
    torch.testing.assert_close(found, own_logits(runs / name, CLIENT, ("local",)), **TOLERANCE)


def test_the_merged_file_of_the_embedded_model(runs: Path, tmp_path: Path) -> None:
    facts = export_adapter(runs / "text", tmp_path / "model.safetensors", "open_clip", CLIENT)
    assert facts["load"] == f"--model glyph-clip --pretrained {tmp_path / 'model.safetensors'}"
    clip = load_clip("glyph-clip", str(tmp_path / "model.safetensors"))
    pixels, ids = inputs(clip)
    tokens, index = clip.text_stem(ids)
    found = logits(clip, clip.image.features(clip.image_stem(pixels)), clip.text.features(tokens, index=index))
    torch.testing.assert_close(found, own_logits(runs / "text", CLIENT, ("local",)), **TOLERANCE)


@pytest.mark.parametrize(("pretrained", "name"), [("none", "tiny"), ("tag", "tiny-quickgelu")])
def test_open_clip_loads_the_merged_file(
    pretrained: str, name: str, runs: Path, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a model that open_clip knows by name. Its tag brings QuickGELU, as OpenAI's does on ViT-B-32."""
    config = json.loads((runs / "model/open_clip_config.json").read_text())["model_cfg"]
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", config)
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-quickgelu", config | {"quick_gelu": True})
    tag = {"file": str(runs / "model/open_clip_model.safetensors"), "quick_gelu": True}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny", {"tag": tag})
    run, file = tmp_path / "run", tmp_path / "model.safetensors"
    options: dict[str, Any] = {"model": "tiny", "pretrained": pretrained, "partition": str(few), "rounds": 2}
    fastdlp.train(fastdlp.TrainConfig(**options, lr=1e-2, out=str(run)))
    facts = export_adapter(run, file, "open_clip", CLIENT)
    assert facts["load"].startswith(f'open_clip.create_model("{name}", pretrained="{file}")')
    export_adapter(run, tmp_path / "model", "open_clip", CLIENT)
    for net in (
        open_clip.create_model(name, pretrained=str(file)),
        open_clip.create_model(f"local-dir:{tmp_path / 'model'}"),
    ):
        assert_same_and_moved(open_clip_logits(run, net), run, CLIENT, ("local",))


def test_a_file_that_would_lose_the_models_preparation(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(FastdlpError, match="has its own architecture, which a file does not hold: pass a folder"):
        export_adapter(runs / "tiny-image", tmp_path / "model.safetensors", "open_clip", CLIENT)
    assert list(tmp_path.iterdir()) == []


def test_the_name_that_goes_with_a_file() -> None:
    """A tag may bring QuickGELU and another preparation of images; a name and a file must bring the same."""
    quick = {"quick_gelu": True}
    assert name_for_a_file("ViT-B-32", {}, FILE_PREPROCESSING) == "ViT-B-32"
    assert name_for_a_file("ViT-B-32", quick, FILE_PREPROCESSING) == "ViT-B-32-quickgelu"
    assert name_for_a_file("ViT-B-32-quickgelu", quick, FILE_PREPROCESSING) == "ViT-B-32-quickgelu"
    with pytest.raises(FastdlpError, match="ViT-S-32 has QuickGELU by its tag alone, which a file does not hold"):
        name_for_a_file("ViT-S-32", quick, FILE_PREPROCESSING)
    with pytest.raises(FastdlpError, match="has another preprocessing"):
        name_for_a_file("ViT-B-32", {}, FILE_PREPROCESSING | {"mean": [0.5, 0.5, 0.5]})


def test_weights_that_have_changed_since(copy: Callable[[str], Path], tmp_path: Path) -> None:
    run = copy("image")
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"weights": "0" * 64}))
    with pytest.raises(FastdlpError, match="other weights than glyph-clip has now"):
        export_adapter(run, tmp_path / "model", "open_clip", CLIENT)
    assert not (tmp_path / "model").exists()


# -- methods that train no LoRA -----------------------------------------------------------------------------------


@pytest.mark.parametrize("client", [CLIENT, None])
def test_whole_weights(client: int | None, runs: Path, tmp_path: Path) -> None:
    """Every client of full fine-tuning is scored with the server's weights, which take the model's place."""
    trained = load_file(runs / "fedfft/adapters/server.safetensors")
    trained = {name.removeprefix("global/"): tensor for name, tensor in trained.items()}
    state = open_clip.create_model(f"local-dir:{runs / 'model'}").state_dict()
    export_adapter(runs / "fedfft", tmp_path / "model", "open_clip", client)
    found = open_clip.create_model(f"local-dir:{tmp_path / 'model'}").state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], trained.get(name, tensor)) for name, tensor in state.items())
    assert not torch.equal(found["visual.conv1.weight"], state["visual.conv1.weight"])
    export_adapter(runs / "fedfft", tmp_path / "plain.safetensors", "safetensors", client)
    plain = load_file(tmp_path / "plain.safetensors")
    assert plain.keys() == trained.keys()
    assert all(torch.equal(plain[name], tensor) for name, tensor in trained.items())
    with pytest.raises(FastdlpError, match=r"trains no LoRA.*use --format open_clip or safetensors"):
        export_adapter(runs / "fedfft", tmp_path / "adapter", "peft", client)
    with pytest.raises(FastdlpError, match="holds what fedfft trains, which is no LoRA"):
        load_adapter(tmp_path / "plain.safetensors")


@pytest.mark.parametrize(("name", "head"), [("fedvmlc", "a classifier"), ("fedclip", "an attention")])
def test_a_head_is_no_part_of_open_clip(name: str, head: str, runs: Path, tmp_path: Path) -> None:
    with pytest.raises(FastdlpError, match=rf"trains {head}.*no part.*use --format safetensors"):
        export_adapter(runs / name, tmp_path / "model", "open_clip")
    with pytest.raises(FastdlpError, match=r"trains no LoRA.*use --format safetensors"):
        export_adapter(runs / name, tmp_path / "adapter", "peft")
    export_adapter(runs / name, tmp_path / "head.safetensors", "safetensors", CLIENT)
    server = load_file(runs / name / "adapters/server.safetensors")
    assert load_file(tmp_path / "head.safetensors").keys() == {key.removeprefix("global/") for key in server}


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("visual.conv1.weight", (4, 4), r"visual.conv1.weight is \(4, 4\), the model has"),
        ("visual.head", (1,), r"visual\.head, which the model does not have"),
    ],
)
def test_weights_that_the_model_does_not_have(
    name: str, shape: tuple[int, ...], words: str, copy: Callable[[str], Path], tmp_path: Path
) -> None:
    run = copy("fedfft")
    tensors, metadata = load_tensors(run / "adapters/server.safetensors")
    save_tensors(run / "adapters/server.safetensors", tensors | {f"global/{name}": torch.zeros(shape)}, metadata)
    with pytest.raises(FastdlpError, match=words):
        export_adapter(run, tmp_path / "model", "open_clip")


# -- the plain file -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("client", [CLIENT, None])
def test_the_file_comes_back_exactly(client: int | None, runs: Path, tmp_path: Path) -> None:
    run = runs / "text"
    export_adapter(run, tmp_path / "a.safetensors", "safetensors", client)
    adapter = load_adapter(tmp_path / "a.safetensors")
    path = run / "adapters" / (f"client-{client:02d}.safetensors" if client else "server.safetensors")
    trained, _ = load_tensors(path)
    branch = "local" if client else "global"
    assert (adapter.encoder, adapter.rank, adapter.scale) == ("text", 4 if client else 2, 4.0 if client else 8.0)
    assert adapter.about["model"] == "glyph-clip"
    assert adapter.about["client"] == (str(client) if client else "global")
    parts = adapter.parts
    assert len(parts) == 2 * 6 + 1
    for part in parts:
        gate = trained.get(f"{branch}/{part}/gate", torch.ones(adapter.rank))
        assert torch.equal(adapter.tensors[f"{part}/A"], trained[f"{branch}/{part}/A"])
        assert torch.equal(adapter.tensors[f"{part}/B"], trained[f"{branch}/{part}/B"] * gate)
    assert any((trained.get(f"{branch}/{part}/gate", torch.ones(1)) == 0).any() for part in parts) == bool(client)
    export_adapter(run, tmp_path / "again.safetensors", "safetensors", client)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "again.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["tiny-image", "tiny-text"])
def test_the_lines_in_the_documentation(name: str, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program that a stranger copies out of the module's docstring."""
    text = inspect.getdoc(file_format) or ""
    (program,) = re.findall(r"model:\n\n((?:    .*\n)+)", text)
    export_adapter(runs / name, tmp_path / "adapter.safetensors", "safetensors", CLIENT)
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {}
    exec(textwrap.dedent(program), space)
    assert_same_and_moved(open_clip_logits(runs / name, space["net"]), runs / name, CLIENT, ("local",))


def test_what_the_metadata_says(runs: Path, tmp_path: Path) -> None:
    export_adapter(runs / "image", tmp_path / "a.safetensors", "safetensors", CLIENT)
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        about = json.loads(file.metadata()["fastdlp"])
    documented = re.findall(r"^ {4}([a-z]+) {2,}", file_format.__doc__ or "", re.M)
    assert sorted(documented) == sorted(about)
    assert about["gate"] == "folded"


# -- the command --------------------------------------------------------------------------------------------------


def test_command(runs: Path, tmp_path: Path, cli: Any) -> None:
    code, out, err = cli("export", runs / "image", "--client", CLIENT, "--format", "peft", "--out", tmp_path / "deep/a")
    assert (code, err) == (0, "")
    assert "client 1" in out
    assert "rank 4, lora_alpha 16" in out
    assert "PeftModel.from_pretrained" in out
    code, out, err = cli(
        "export", runs / "image", "--global", "--format", "safetensors", "--out", tmp_path / "b.safetensors", "--json"
    )
    assert (code, err) == (0, "")
    assert json.loads(out)["client"] is None
    assert {path.name for path in tmp_path.rglob("*")} == {
        "deep", "a", "adapter_config.json", "adapter_model.safetensors", "b.safetensors"
    }  # fmt: skip


REFUSED = {
    "image --format peft --out new": "name one of --client N and --global",
    "image --client 1 --global --format peft --out new": "name one of --client N and --global",
    "image --client 3 --format peft --out new": "has no client 3: its clients are 0 to 2",
    "image --client -1 --format peft --out new": "has no client -1",
    "local --global --format peft --out new": "no global adapter: local exchanges nothing",
    "image --client 1 --format onnx --out new": "unknown --format 'onnx': choose from peft, open_clip, safetensors",
    "image --client 1 --format peft --out taken": "taken exists: name another --out",
    "image --client 1 --format safetensors --out taken.safetensors": "exists: name another --out",
    "image --client 1 --format safetensors --out new": "ends in .safetensors",
    "image --client 1 --format peft --out new.safetensors": "writes a folder",
    "image --client 1 --format peft --out taken.safetensors/new": "cannot write",
    "nowhere --client 1 --format peft --out new": "does not exist",
    "unfinished --client 1 --format peft --out new": "has not ended: finish it with fastdlp train --resume",
    "damaged --client 1 --format peft --out new": "client-01.safetensors is damaged",
    "swapped --client 1 --format peft --out new": "holds the adapters of client 0",
    "serverless --global --format peft --out new": "server.safetensors is missing",
    "image --client 1 --out new": "--format",
    "image --client 1 --format peft": "--out",
}


@pytest.mark.parametrize("command", REFUSED)
def test_refused_in_one_line(
    command: str, copy: Callable[[str], Path], tmp_path: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    copy("image")
    copy("local")
    for name in ("unfinished", "damaged", "swapped", "serverless"):
        shutil.copytree("image", name)
    Path("unfinished/summary.json").unlink()
    Path("damaged/adapters/client-01.safetensors").write_bytes(b"no tensors")
    shutil.copy("image/adapters/client-00.safetensors", "swapped/adapters/client-01.safetensors")
    Path("serverless/adapters/server.safetensors").unlink()
    Path("taken").mkdir()
    Path("taken.safetensors").write_bytes(b"mine")
    before = {path: path.read_bytes() if path.is_file() else None for path in tmp_path.rglob("*")}
    code, out, err = cli("export", *command.split())
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert REFUSED[command] in err
    assert {path: path.read_bytes() if path.is_file() else None for path in tmp_path.rglob("*")} == before
