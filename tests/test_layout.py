"""Named tensors in flat rows, the message that is made of them, and how many numbers each method trains and sends."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import numpy as np
import open_clip
import pytest
import torch

from fastdlp.adapters.bank import AdapterBank
from fastdlp.adapters.branches import Branch, Site, Tensors, TowerShape, tower_sites
from fastdlp.adapters.layout import Layout, flat, folded_layout, lora_layout
from fastdlp.adapters.serialization import message_bytes, pack
from fastdlp.clip.load import describe, parameter_shapes
from fastdlp.config import TrainConfig
from fastdlp.methods import METHODS, make_method, resolve
from fastdlp.run.build_task import branch_shapes
from tests.conftest import CLI

SITES = tower_sites(TowerShape(2, 6, 10, 4))
LORA = lora_layout(SITES, Branch("local", 3, gated=True))
SHAPES = {"w": (2, 3), "b": (3,), "one": (1,), "deep": (2, 1, 2)}


def _rows(layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows in which every entry is a number of its own."""
    return torch.arange(layout.weights).float(), torch.arange(layout.gates).float() + 1e6


@pytest.mark.parametrize(
    "layout",
    [LORA, lora_layout(SITES, Branch("global", 1, gated=False)), Layout(SHAPES)],
    ids=["gated", "plain", "tensors"],
)
def test_entries_cover_their_rows_once(layout: Layout) -> None:
    named = layout.named(*_rows(layout))
    for row, names in zip(_rows(layout), (layout.in_weights, layout.in_gates)):
        assert sorted(number for name in names for number in named[name].flatten().tolist()) == row.tolist()
    assert named.keys() == layout.in_weights.keys() | layout.in_gates.keys()


def test_lora_names_and_shapes() -> None:
    """q, k and v of a block have adapters of their own; A [r, K], B [N, r], gate [r]."""
    parts = [f"{i}.{part}" for i in range(2) for part in ("q", "k", "v", "out", "fc1", "fc2")] + ["proj"]
    shapes = {**LORA.in_weights, **LORA.in_gates}
    assert set(shapes) == {f"{part}/{name}" for part in parts for name in ("A", "B", "gate")}
    assert (shapes["0.k/A"], shapes["0.k/B"], shapes["0.k/gate"]) == ((3, 6), (6, 3), (3,))
    assert (shapes["1.fc1/A"], shapes["1.fc1/B"]) == ((3, 6), (10, 3))
    assert (shapes["1.fc2/A"], shapes["1.fc2/B"]) == ((3, 10), (6, 3))
    assert (shapes["proj/A"], shapes["proj/B"]) == ((3, 6), (4, 3))
    assert LORA.weights == 3 * (2 * (4 * (6 + 6) + (6 + 10) + (10 + 6)) + (6 + 4))
    assert LORA.gates == 3 * 13


def test_without_gate_there_is_no_row_of_gates() -> None:
    layout = lora_layout(SITES, Branch("global", 3, gated=False))
    assert layout.gates == 0
    assert layout.in_gates == {}
    assert not any(name.endswith("gate") for name in layout.in_weights)
    assert layout.weights == LORA.weights


def test_the_forward_uses_the_named_tensors() -> None:
    """A, B and c of every site are those that the names select from a slot's rows, and so are the kernels' offsets."""
    branch = Branch("local", 3, gated=True)
    bank = AdapterBank(SITES, [branch], 2)
    state, (weights, gates) = bank.state["local"], _rows(LORA)
    state.weights[1], state.gates[1] = weights, gates
    adapters, named = bank.adapters(torch.tensor([1]), [("local",)], grad=False), LORA.named(weights, gates)
    offsets = iter(folded_layout(SITES, [3]).branches[0].parts)
    for index, site in enumerate(SITES):
        A, B, c = adapters.site(index)
        for i, part in enumerate(site.parts):
            assert torch.equal(named[f"{part}/A"], A[0, i])
            assert torch.equal(named[f"{part}/B"], B[0, i])
            assert torch.equal(named[f"{part}/gate"] * branch.scale, c[0, 0, i])
            at = next(offsets)
            assert (at.width, at.out) == (site.in_features, site.out_features)
            for name, row, start in (("A", weights, at.a), ("B", weights, at.b), ("gate", gates, at.c)):
                tensor = named[f"{part}/{name}"].flatten()
                assert torch.equal(row[start : start + len(tensor)], tensor)


@pytest.mark.parametrize("layout", [LORA, Layout(SHAPES)], ids=["lora", "tensors"])
def test_named_are_views_and_load_is_the_inverse(layout: Layout) -> None:
    weights, gates = _rows(layout)
    named = layout.named(weights, gates)
    empty, no_gates = torch.zeros(layout.weights), torch.zeros(layout.gates)
    layout.load({name: tensor.clone() for name, tensor in named.items()}, empty, no_gates)
    assert torch.equal(empty, weights)
    assert torch.equal(no_gates, gates)
    for tensor in named.values():
        tensor.zero_()
    assert not weights.any()
    assert not gates.any()


def test_rows_of_many_slots_and_without_gates() -> None:
    weights, gates = _rows(LORA)
    many = LORA.named(torch.stack([weights, weights + 0.5]), torch.stack([gates, -gates]))
    one = LORA.named(weights, gates)
    for name, tensor in many.items():
        assert torch.equal(tensor[0], one[name])
    assert many["0.q/gate"].shape == (2, 3)
    assert torch.equal(many["proj/gate"][1], -one["proj/gate"])
    assert set(LORA.named(weights, None)) == {name for name in one if not name.endswith("/gate")}


def test_tensors_lie_in_the_order_given() -> None:
    layout = Layout(SHAPES)
    tensors = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    row = flat(tensors)
    assert torch.equal(row, torch.cat([tensor.flatten() for tensor in tensors.values()]))
    assert row.shape == (layout.weights,) == (6 + 3 + 1 + 4,)
    for name, tensor in layout.named(row, None).items():
        assert torch.equal(tensor, tensors[name])
    assert flat({"a": torch.ones(2, dtype=torch.bfloat16, requires_grad=True)}).dtype == torch.float32
    assert not flat({"a": torch.ones(2, requires_grad=True)}).requires_grad


@pytest.mark.parametrize("change", ["missing", "more", "transposed"])
def test_what_does_not_fit_changes_nothing(change: str) -> None:
    weights, gates = _rows(LORA)
    tensors: dict[str, Any] = {name: torch.zeros(shape) for name, shape in {**LORA.in_weights, **LORA.in_gates}.items()}
    if change == "missing":
        del tensors["proj/B"]
    elif change == "more":
        tensors["2.q/A"] = torch.zeros(3, 6)
    else:
        tensors["proj/B"] = tensors["proj/B"].T
    with pytest.raises(ValueError, match=r"proj/B|2\.q/A"):
        LORA.load(tensors, weights, gates)
    for row, expected in zip((weights, gates), _rows(LORA)):
        assert torch.equal(row, expected)


@cache
def _bank(method: str, encoder: str, **options: Any) -> tuple[AdapterBank, tuple[str, ...]]:
    """One slot of a method on the embedded model, K = 10."""
    config = resolve(TrainConfig(method=method, encoder=encoder, **options))
    chosen = make_method(config)
    image, text = describe(config.model)
    sites = tower_sites(image if encoder == "image" else text) if encoder != "both" else ()
    shapes = branch_shapes(chosen.branches(), encoder, parameter_shapes(config.model), image.embed, 10)
    return AdapterBank(sites, chosen.branches(), 1, shapes=shapes), chosen.shared


ALLOWED = [(name, encoder) for name, method in METHODS.items() for encoder in method.encoders]


@pytest.mark.parametrize(("method", "encoder"), ALLOWED)
def test_a_message_is_as_long_as_it_is_counted(method: str, encoder: str) -> None:
    bank, shared = _bank(method, encoder)
    tensors = {f"{b}/{name}": t for b in shared for name, t in bank.named(b, weights=bank.state[b].weights[0]).items()}
    message = pack(tensors)
    assert message_bytes(bank, shared) == len(message)
    if shared:
        length = int.from_bytes(message[:8], "little")
        header = json.loads(message[8 : 8 + length])
        numbers = sum(int(np.prod(entry["shape"])) for entry in header.values())
        assert len(message) == 8 + length + 4 * numbers
        assert numbers == sum(bank.layouts[branch].weights for branch in shared)
    else:
        assert message == b""


@pytest.mark.parametrize("rank", range(1, 12))
def test_at_every_length_of_the_header(rank: int) -> None:
    """The header is filled up to whole words of eight bytes."""
    bank = AdapterBank([Site("a" * rank, ("a" * rank,), 3, 5)], [Branch("global", rank, gated=False)], 1)
    tensors = {f"global/{name}": t for name, t in bank.named("global", weights=bank.state["global"].weights[0]).items()}
    assert message_bytes(bank, ("global",)) == len(pack(tensors))


def test_a_gate_is_never_part_of_a_message() -> None:
    bank, _ = _bank("feddlp", "image")
    named = bank.named("local", 0)
    assert any(name.endswith("/gate") for name in named)
    without = {f"local/{name}": tensor for name, tensor in named.items() if not name.endswith("/gate")}
    assert message_bytes(bank, ("local",)) == len(pack(without))


@pytest.fixture
def info(cli: CLI) -> Any:
    def call(*arguments: object) -> dict[str, Any]:
        code, out, err = cli("info", "--json", "--model", "ViT-B-32", *arguments)
        assert code == 0, err
        found: dict[str, Any] = json.loads(out)
        return found

    return call


@pytest.mark.parametrize(("encoder", "count", "linears"), [("image", 334_336, 73), ("text", 223_232, 73)])
def test_the_paper_s_parameters(encoder: str, count: int, linears: int, info: Any) -> None:
    """0.334 M and 0.223 M; FEDDLP trains twice as many more at rank 4, and a gate of four a linear."""
    trained = {
        "flora": count,
        "feddat": 2 * count,
        "feddlp": 3 * count + 4 * linears,
        "combined": 3 * count + 4 * linears,
        "local": count,
        "local-sora": count + 2 * linears,
    }
    for method, expected in trained.items():
        facts = info("--method", method, "--encoder", encoder)
        assert facts["trainable_parameters"] == expected
        assert facts["uploaded_parameters"] == (0 if method.startswith("local") else count)
        assert facts["adapted_linears"] == linears


@pytest.mark.parametrize("method", ["fedclip", "fedaa"])
@pytest.mark.parametrize("encoder", ["image", "text"])
def test_an_attention_s_parameters(method: str, encoder: str, info: Any) -> None:
    facts = info("--method", method, "--encoder", encoder)
    assert facts["trainable_parameters"] == facts["uploaded_parameters"] == 525_312  # 0.525 M


def _parameters(encoder: str) -> int:
    """Of open_clip's own module."""
    with torch.device("meta"):
        net = open_clip.CLIP(**open_clip.get_model_config("ViT-B-32"))
    counts = {name: p.numel() for name, p in net.named_parameters()}
    image = sum(n for name, n in counts.items() if name.startswith("visual."))
    both = sum(counts.values()) - counts["logit_scale"]
    return {"image": image, "text": both - image, "both": both}[encoder]


@pytest.mark.parametrize(("encoder", "count"), [("image", 87_849_216), ("text", 63_428_096), ("both", 151_277_312)])
def test_full_fine_tuning_s_parameters(encoder: str, count: int, info: Any) -> None:
    assert count == _parameters(encoder)
    facts = info("--method", "fedfft", "--encoder", encoder)
    assert facts["trainable_parameters"] == facts["uploaded_parameters"] == count
    assert facts["uploaded_bytes_per_client_round"] > 4 * count


@pytest.mark.parametrize("classes", [10, 37])
def test_a_classifier_s_parameters(classes: int, info: Any) -> None:
    head = classes * 512 + classes
    assert info("--method", "fedlc", "--classes", classes)["uploaded_parameters"] == head
    assert info("--method", "fedvmlc", "--classes", classes)["uploaded_parameters"] == head + _parameters("image")


def test_a_classifier_needs_its_classes(cli: CLI) -> None:
    for method in ("fedlc", "fedvmlc"):
        code, out, err = cli("info", "--model", "ViT-B-32", "--method", method)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert "pass --classes" in err


def test_the_modules_of_every_method() -> None:
    """Which branches are LoRA, and which are whole tensors."""
    kinds = {}
    for name, method in METHODS.items():
        branches = make_method(resolve(TrainConfig(method=name))).branches()
        kinds[name] = [b.modules if isinstance(b, Tensors) else (b.rank, b.gated, b.copy_of) for b in branches]
        assert set(method.shared) <= {branch.name for branch in branches}
    assert kinds == {
        "feddlp": [(4, True, None), (2, False, None)],
        "combined": [(4, True, None), (2, False, None)],
        "feddat": [(2, False, None), (2, False, None), (2, False, "global")],
        "flora": [(2, False, None)],
        "local": [(2, False, None)],
        "local-sora": [(2, True, None)],
        "fedclip": [("attention",)],
        "fedaa": [("attention",)],
        "fedlc": [("classifier",)],
        "fedvmlc": [("encoder", "classifier")],
        "fedfft": [("encoder",)],
    }
