"""Full fine-tuning: open_clip's own forward with other weights, one copy for all clients, and what it takes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import fastdlp
from fastdlp.adapters import optimizer as optimizer
from fastdlp.adapters.bank import AdapterBank, BranchState
from fastdlp.adapters.branches import Tensors
from fastdlp.adapters.heads import head_shapes
from fastdlp.adapters.layout import flat
from fastdlp.adapters.optimizer import Hyperparameters, update
from fastdlp.clip.load import Clip, class_prompts, load_clip
from fastdlp.engine.full_task import FullTask, trains
from fastdlp.engine.schedule import Inputs, Shape, epoch_order
from fastdlp.methods.losses import Objective
from fastdlp.run import build_task
from fastdlp.run.setup import prepare
from tests.conftest import CLI
from tests.models import tiny_clip
from tests.steps import Images, samples_of

CLASSES = ["apple", "pear", "water melon"]
LABELS = np.array([0, 1, 2, 2, 0])
ENCODERS = ("image", "text", "both")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Clip:
    return load_clip(tiny_clip(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def inputs(clip: Clip) -> tuple[Images, tuple[Tensor, Tensor]]:
    """Pixels, and the token ids of the training and of the scoring prompts."""
    templates = ("a photo of a {}.", "a drawing of the {}")
    ids = tuple(clip.tokenize(class_prompts(CLASSES, template)) for template in templates)
    return Images(len(LABELS), clip.transform.size), ids  # type: ignore[return-value]


@torch.no_grad()
def _full(
    clip: Clip, inputs: tuple[Images, tuple[Tensor, Tensor]], encoder: str, dtype: torch.dtype = torch.float32
) -> FullTask:
    pixels, ids = inputs
    images = F.normalize(clip.net.encode_image(pixels.pixels), dim=-1)
    text = tuple(F.normalize(clip.net.encode_text(prompts), dim=-1) for prompts in ids)
    names = frozenset(name for name, _ in clip.net.named_parameters() if trains(name, encoder))
    return FullTask(clip.net, names, encoder, pixels, ids, images, text, clip.logit_scale, dtype)  # type: ignore[arg-type]


def _moved(clip: Clip, encoder: str) -> nn.Module:
    """A copy of the network whose trained weights are replaced."""
    net = copy.deepcopy(clip.net)
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if trains(name, encoder):
                p.add_(0.05 * torch.randn(p.shape, generator=g))
    return net


def _bank(net: nn.Module, encoder: str, classifier: bool = False) -> AdapterBank:
    """One row that holds the trained weights of `net`, and a random classifier where asked for."""
    weights = {name: p.detach() for name, p in net.named_parameters() if trains(name, encoder)}
    if classifier:
        g = torch.Generator().manual_seed(6)
        shapes = head_shapes("classifier", 16, len(CLASSES))
        weights |= {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    shapes = {name: tuple(p.shape) for name, p in weights.items()}
    modules = ("encoder", "classifier") if classifier else ("encoder",)
    bank = AdapterBank((), [Tensors("global", modules)], 1, shapes={"global": shapes})
    bank.state["global"].weights[0] = flat(weights)
    return bank


SAMPLES = np.array([4, 0, 3])


def _logits(net: nn.Module, inputs: tuple[Images, tuple[Tensor, Tensor]], scoring: bool, scale: float) -> Tensor:
    pixels, ids = inputs
    image = F.normalize(net.encode_image(pixels(SAMPLES)), dim=-1)  # type: ignore[operator]
    text = F.normalize(net.encode_text(ids[scoring]), dim=-1)  # type: ignore[operator]
    return scale * image @ text.T


@pytest.mark.parametrize("scoring", [False, True])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_logits_and_every_gradient(
    encoder: str, scoring: bool, clip: Clip, inputs: tuple[Images, tuple[Tensor, Tensor]]
) -> None:
    """Against a copy of the network that has the weights for its own."""
    net, task = _moved(clip, encoder), _full(clip, inputs, encoder)
    bank = _bank(net, encoder)
    adapters = bank.adapters(torch.tensor([0]), [("global",)], grad=True)
    samples = samples_of([SAMPLES], LABELS, task)
    (out,) = task.forward(samples, 1, adapters, scoring)
    expected = _logits(net, inputs, scoring, clip.logit_scale)
    assert torch.allclose(out.class_logits[0], expected, atol=1e-4)
    (weights, gates) = adapters.gradients(Objective().task(out).sum(), ["global"])["global"]
    assert gates.numel() == 0
    F.cross_entropy(expected, torch.from_numpy(LABELS[SAMPLES])).backward()
    named = bank.named("global", weights=weights[0])
    assert set(named) == {name for name, _ in net.named_parameters() if trains(name, encoder)}
    for name, p in net.named_parameters():
        if name in named:
            assert p.grad is not None
            assert torch.allclose(named[name], p.grad, rtol=1e-4, atol=1e-5), name


def test_with_a_classifier(clip: Clip, inputs: tuple[Images, tuple[Tensor, Tensor]]) -> None:
    net, task = _moved(clip, "image"), _full(clip, inputs, "image")
    bank = _bank(net, "image", classifier=True)
    adapters = bank.adapters(torch.tensor([0]), [("global",)], grad=True)
    (out,) = task.forward(samples_of([SAMPLES], LABELS, task), 1, adapters)
    named = bank.named("global", 0)
    expected = net.encode_image(inputs[0](SAMPLES)) @ named["classifier/weight"].T + named["classifier/bias"]  # type: ignore[operator]
    assert torch.allclose(out.class_logits[0], expected, atol=1e-4)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_in_bf16(encoder: str, clip: Clip, inputs: tuple[Images, tuple[Tensor, Tensor]]) -> None:
    """Weights and activations are rounded; gradients and the weights themselves stay fp32."""
    net, task = _moved(clip, encoder), _full(clip, inputs, encoder, torch.bfloat16)
    bank = _bank(net, encoder)
    adapters = bank.adapters(torch.tensor([0]), [("global",)], grad=True)
    (out,) = task.forward(samples_of([SAMPLES], LABELS, task), 1, adapters)
    expected = _logits(net, inputs, False, clip.logit_scale)
    assert (out.class_logits[0] - expected).abs().max() < 0.03 * clip.logit_scale
    (weights, _) = adapters.gradients(Objective().task(out).sum(), ["global"])["global"]
    assert weights.dtype == torch.float32
    assert weights.isfinite().all()


def test_the_network_itself_is_never_changed(clip: Clip, inputs: tuple[Images, tuple[Tensor, Tensor]]) -> None:
    before = {name: p.clone() for name, p in clip.net.named_parameters()}
    task, bank = _full(clip, inputs, "both"), _bank(_moved(clip, "both"), "both")
    adapters = bank.adapters(torch.tensor([0]), [("global",)], grad=True)
    samples = samples_of([SAMPLES], LABELS, task)
    (out,) = task.forward(samples, 1, adapters)
    adapters.gradients(Objective().task(out).sum(), ["global"])
    for name, p in clip.net.named_parameters():
        assert torch.equal(p, before[name])
        assert p.grad is None
    (frozen,) = task.forward(samples, 1, None)
    assert torch.allclose(frozen.class_logits[0], _logits(clip.net, inputs, False, clip.logit_scale), atol=1e-4)


def test_which_parameters(clip: Clip) -> None:
    names = {name for name, _ in clip.net.named_parameters()}
    image, text, both = ({name for name in names if trains(name, encoder)} for encoder in ENCODERS)
    assert image == {name for name in names if name.startswith("visual.")}
    assert both == image | text == names - {"logit_scale"}
    assert not image & text


def _config(few: Path, out: Path, method: str, encoder: str = "image", **options: Any) -> fastdlp.TrainConfig:
    settings = {"partition": str(few), "batch_size": 4, "rounds": 1} | options
    return fastdlp.TrainConfig(method=method, encoder=encoder, out=str(out), **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(("method", "encoder"), [("fedfft", "image"), ("fedfft", "both"), ("fedvmlc", "image")])
def test_the_server_s_file_is_what_clients_are_scored_with(
    method: str, encoder: str, few: Path, tmp_path: Path
) -> None:
    """Its tensors in a fresh network, by open_clip's own names, predict what the run counted."""
    summary = fastdlp.train(_config(few, tmp_path / "run", method, encoder, lr=1e-3))
    federation = prepare(_config(few, tmp_path / "other", method, encoder))
    tensors = load_file(tmp_path / "run" / "adapters" / "server.safetensors")
    net, task = copy.deepcopy(load_clip("glyph-clip").net), federation.engine.task
    trained = {name.removeprefix("global/"): tensor for name, tensor in tensors.items()}
    head = {name: trained.pop(name) for name in list(trained) if name.startswith("classifier/")}
    assert set(trained) == {name for name, _ in net.named_parameters() if trains(name, encoder)}
    assert bool(head) == (method == "fedvmlc")
    before = net.state_dict()
    assert any(not torch.equal(before[name], tensor) for name, tensor in trained.items())
    net.load_state_dict(trained, strict=False)
    for client, slot in zip(summary["per_client"], federation.slots, strict=True):
        with torch.no_grad():
            features = net.encode_image(task.pixels.normalize(task.pixels(slot.test)))
            if head:
                logits = F.linear(features, head["classifier/weight"], head["classifier/bias"])
            else:
                text = F.normalize(net.encode_text(task.prompts[1]), dim=-1)
                logits = F.normalize(features, dim=-1) @ text.T
        right = logits.argmax(-1).numpy() == federation.pixels.labels[slot.test]
        assert client["correct"] == right.sum()


def test_clients_train_one_after_another_from_the_server_s_weights(few: Path, tmp_path: Path) -> None:
    """One row, restarted for each client, moments and step count too; the average is weighted by their samples."""
    federation = prepare(_config(few, tmp_path, "fedfft", local_epochs=2))
    engine = federation.engine
    state, held = engine.bank.state["global"], engine.bank.state["global"].weights.shape
    assert held[0] == 1
    seen: dict[int, tuple[Tensor, int]] = {}
    order: list[int] = []

    step = engine.run

    def run(buffer: Tensor, shape: Shape, staged: Tensor | None) -> Tensor:
        losses, first = step(buffer, shape, staged), int(Inputs.unpack(buffer, shape).ids[0, 0])
        order.append(next(i for i, slot in enumerate(engine.slots) if first in slot.train))
        seen[order[-1]] = state.weights[0].clone(), int(state.steps[0])
        return losses

    engine.run = run
    start = engine.server["global"].clone()
    engine.train_round(1)
    assert order == sorted(order)
    assert [steps for _, steps in seen.values()] == [6, 4, 4]  # 12, 7 and 5 samples by 4, twice
    expected = sum(n / 24 * weights.double() for n, (weights, _) in zip((12, 7, 5), seen.values()))
    engine.aggregate()
    assert torch.allclose(engine.server["global"][0].double(), expected, rtol=0, atol=1e-6)  # type: ignore[arg-type]
    assert torch.equal(state.weights, engine.server["global"])
    assert not torch.equal(start, engine.server["global"])

    for slot in (1, 2):  # alone from the same start, it ends where it ended among the others
        alone = prepare(_config(few, tmp_path, "fedfft", local_epochs=2)).engine
        for epoch in range(2):
            samples = epoch_order(federation.slots[slot], 1, epoch)
            for at in range(0, len(samples), 4):
                batch = samples_of([samples[at : at + 4]], federation.pixels.labels, alone.task)
                adapters = alone.bank.adapters(torch.tensor([0]), [("global",)], grad=True)
                (out,) = alone.task.forward(batch, 1, adapters)
                grads = adapters.gradients(Objective().task(out).sum(), ["global"])["global"]
                update(alone.bank.state["global"], torch.tensor([0]), grads, alone.hyper)
        assert torch.equal(alone.bank.state["global"].weights[0], seen[slot][0])


def test_the_checkpoint_holds_the_weights_alone(few: Path, tmp_path: Path) -> None:
    """Every client's optimizer begins anew in each round."""
    fastdlp.train(_config(few, tmp_path / "run", "fedfft"))
    state = load_file(tmp_path / "run" / "checkpoint.safetensors")
    assert set(state) == {"global/weights"}
    assert state["global/weights"].shape[0] == 1
    server = load_file(tmp_path / "run" / "adapters" / "server.safetensors")
    assert state["global/weights"].numel() == sum(tensor.numel() for tensor in server.values())


def test_what_it_takes_is_printed(few: Path, tmp_path: Path, cli: CLI) -> None:
    options = ("--partition", few, "--rounds", 1, "--batch-size", 4)
    code, out, err = cli("train", *options, "--method", "fedfft", "--out", tmp_path / "run")
    assert code == 0, err
    count = json.loads((tmp_path / "run" / "summary.json").read_text())["trainable_parameters"]
    text = " ".join((out + err).split())
    assert f"full fine-tuning of {count:,} parameters: one copy for all clients, which train one after another" in text
    code, out, err = cli("train", *options, "--method", "flora", "--out", tmp_path / "other")
    assert "full fine-tuning" not in out + err


@pytest.mark.parametrize("method", ["fedfft", "fedvmlc"])
def test_too_large_for_the_memory(
    method: str, few: Path, tmp_path: Path, cli: CLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_task, "memory_of", lambda device: 10**7)
    code, out, err = cli("train", "--partition", few, "--method", method, "--out", tmp_path / "run", "--quiet")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "full fine-tuning of" in err
    assert "--method flora" in err
    assert list(tmp_path.iterdir()) == []


ROWS, D, Q = 3, 101, 7


def _stepped(whole: int, monkeypatch: pytest.MonkeyPatch, **options: Any) -> BranchState:
    """A branch after four updates of some of its rows, cut into columns where `whole` entries are too few."""
    monkeypatch.setattr(optimizer, "MAX_ENTRIES", whole)
    g = torch.Generator().manual_seed(0)

    def rows(width: int) -> Tensor:
        return torch.randn(ROWS, width, generator=g)

    state = BranchState(
        *(rows(D), rows(Q), torch.zeros(ROWS, D), torch.zeros(ROWS, D), torch.zeros(ROWS, Q), torch.zeros(ROWS, Q)),
        torch.zeros(ROWS, dtype=torch.int64),
    )
    lr = torch.tensor([1e-3, 1e-1, 1e-2])
    hyper = Hyperparameters(lr, 2 * lr, 1e-2 * lr, lr, **options)
    for slots in ([0, 1, 2], [2], [1, 0], [0, 1, 2]):
        grads = torch.randn(len(slots), D, generator=g), torch.randn(len(slots), Q, generator=g)
        update(state, torch.tensor(slots), grads, hyper)
    return state


@pytest.mark.parametrize("whole", [4, 30, 101, 302])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clip_norm": 0.5},
        {"clip_norm": 0.5, "weight_decay": 0.1},
        {"clip_norm": 0.5, "weight_decay": 0.1, "optimizer": "adam"},
        {"threshold": "reference", "eps": 1e-3},
    ],
)
def test_by_columns_to_the_bit(whole: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, gates, moments and step counts; the norm that clips is the whole row's."""
    expected, found = _stepped(1 << 25, monkeypatch, **options), _stepped(whole, monkeypatch, **options)
    for name in BranchState.FIELDS:
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert expected.steps.tolist() == [3, 3, 3]


def test_a_whole_run_by_columns(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same_run: Callable[[Path, Path], None]
) -> None:
    options = {"clip_norm": 0.5, "method": "fedfft"}
    fastdlp.train(_config(few, tmp_path / "whole", **options))
    monkeypatch.setattr(optimizer, "MAX_ENTRIES", 100_000)
    fastdlp.train(_config(few, tmp_path / "columns", **options))
    same_run(tmp_path / "whole", tmp_path / "columns")
