"""Heads on frozen features against torch's own modules, one slot at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdlp.adapters.bank import AdapterBank
from fastdlp.adapters.branches import Tensors
from fastdlp.adapters.heads import HEADS, attend, classify, head_shapes, init_head
from fastdlp.adapters.layout import flat
from fastdlp.engine.frozen_task import FrozenTask
from fastdlp.methods.losses import Objective
from tests.steps import samples_of

D, K, SLOTS = 6, 4, 3
SCALE = 20.0


def _attention(tensors: dict[str, Tensor], slot: int) -> nn.Module:
    """FedCLIP's adapter as it is published: Linear, Tanh, Linear, Softmax."""
    module = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D), nn.Softmax(dim=-1))
    for place, name in ((0, "fc1"), (2, "fc2")):
        for part in ("weight", "bias"):
            setattr(module[place], part, nn.Parameter(tensors[f"{name}/{part}"][slot].detach().clone()))
    return module


def _tensors(head: str) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    shapes = head_shapes(head, D, K)
    return {name: torch.randn(SLOTS, *shape, generator=g).requires_grad_() for name, shape in shapes.items()}


@pytest.fixture
def features() -> Tensor:
    return torch.randn(SLOTS, 5, D, generator=torch.Generator().manual_seed(0))


def test_attention(features: Tensor) -> None:
    tensors = _tensors("attention")
    found = attend(features, tensors)
    modules = [_attention(tensors, slot) for slot in range(SLOTS)]
    expected = torch.stack([f * module(f) for f, module in zip(features, modules)])
    assert torch.allclose(found, expected, atol=1e-6)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    for slot, module in enumerate(modules):
        for place, name in ((0, "fc1"), (2, "fc2")):
            for part in ("weight", "bias"):
                gradient = getattr(module[place], part).grad  # type: ignore[index]
                assert torch.allclose(tensors[f"{name}/{part}"].grad[slot], gradient, atol=1e-6)  # type: ignore[index]


def test_classifier(features: Tensor) -> None:
    tensors = _tensors("classifier")
    found = classify(features, tensors)
    assert found.shape == (SLOTS, 5, K)
    for slot in range(SLOTS):
        expected = F.linear(features[slot], tensors["classifier/weight"][slot], tensors["classifier/bias"][slot])
        assert torch.allclose(found[slot], expected, atol=1e-6)


def test_a_slot_s_loss_reaches_no_other_slot(features: Tensor) -> None:
    for head, apply in (("attention", attend), ("classifier", classify)):
        tensors = _tensors(head)
        apply(features, tensors)[1].square().sum().backward()
        for tensor in tensors.values():
            assert tensor.grad is not None
            assert tensor.grad[1].any()
            assert not tensor.grad[[0, 2]].any()


def test_shapes_and_counts() -> None:
    assert HEADS == ("attention", "classifier")
    assert sum(math.prod(shape) for shape in head_shapes("attention", 512, 37).values()) == 525_312
    assert sum(math.prod(shape) for shape in head_shapes("classifier", 512, 37).values()) == 37 * 512 + 37


def test_an_attention_starts_as_two_identities(features: Tensor) -> None:
    start = init_head("attention", D, K, np.random.default_rng(0))
    assert {name: tuple(t.shape) for name, t in start.items()} == head_shapes("attention", D, K)
    tensors = {name: tensor.expand(SLOTS, *tensor.shape) for name, tensor in start.items()}
    assert torch.allclose(attend(features, tensors), features * features.tanh().softmax(dim=-1))


def test_a_classifier_starts_as_torch_s_linear_does() -> None:
    """Uniform in ±1/√d, weight and bias."""
    start = init_head("classifier", 100, 50, np.random.default_rng(0))
    assert {name: tuple(t.shape) for name, t in start.items()} == head_shapes("classifier", 100, 50)
    for tensor in start.values():
        assert tensor.dtype == torch.float32
        assert 0.08 < tensor.abs().max() <= 0.1
        assert abs(tensor.mean()) < 0.03
        assert tensor.std() == pytest.approx(0.1 / math.sqrt(3), rel=0.2)
    again, other = (init_head("classifier", 100, 50, np.random.default_rng(seed)) for seed in (0, 1))
    assert torch.equal(again["classifier/weight"], start["classifier/weight"])
    assert not torch.equal(other["classifier/weight"], start["classifier/weight"])


SAMPLES = (np.array([0, 4, 2]), np.array([5]), np.array([1, 3]))
LABELS = np.array([0, 1, 2, 3, 1, 2])


def _task(encoder: str, modules: tuple[str, ...]) -> tuple[FrozenTask, AdapterBank, dict[str, Tensor]]:
    """A task on random features, and a bank whose slots hold random heads."""
    g = torch.Generator().manual_seed(3)
    images, text = torch.randn(6, D, generator=g), tuple(torch.randn(K, D, generator=g) for _ in range(2))
    shapes = {name: shape for head in modules for name, shape in head_shapes(head, D, K).items()}
    bank = AdapterBank((), [Tensors("global", modules)], SLOTS, shapes={"global": shapes})
    tensors = {name: torch.randn(SLOTS, *shape, generator=g) for name, shape in shapes.items()}
    for slot in range(SLOTS):
        bank.state["global"].weights[slot] = flat({name: tensor[slot] for name, tensor in tensors.items()})
    return FrozenTask(encoder, images, text, SCALE), bank, tensors  # type: ignore[arg-type]


def _forward(task: FrozenTask, bank: AdapterBank, scoring: bool, grad: bool = False) -> Any:
    samples = samples_of(SAMPLES, LABELS, task)
    adapters = bank.adapters(torch.arange(SLOTS), [("global",)], grad)
    (out,) = task.forward(samples, 1, adapters, scoring)
    return out, adapters


@pytest.mark.parametrize("scoring", [False, True])
@pytest.mark.parametrize("encoder", ["image", "text"])
def test_an_attention_on_either_side(encoder: str, scoring: bool) -> None:
    """Training prompts in training, scoring prompts in scoring; the other side stays as it is."""
    task, bank, tensors = _task(encoder, ("attention",))
    out, _ = _forward(task, bank, scoring)
    for slot, samples in enumerate(SAMPLES):
        image, text = task.images[samples], task.text[scoring]
        attention = _attention(tensors, slot)
        if encoder == "image":
            image = image * attention(image)
        else:
            text = text * attention(text)
        expected = SCALE * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
        assert torch.allclose(out.class_logits[slot, : len(samples)], expected, atol=1e-5)
        assert out.labels[slot, : len(samples)].tolist() == LABELS[samples].tolist()
        assert out.mask[slot].tolist() == [True] * len(samples) + [False] * (3 - len(samples))


def test_a_classifier_in_the_place_of_prompts() -> None:
    task, bank, tensors = _task("image", ("classifier",))
    out, _ = _forward(task, bank, scoring=False)
    for slot, samples in enumerate(SAMPLES):
        expected = F.linear(task.images[samples], tensors["classifier/weight"][slot], tensors["classifier/bias"][slot])
        assert torch.allclose(out.class_logits[slot, : len(samples)], expected, atol=1e-5)


@pytest.mark.parametrize("encoder", ["image", "text"])
def test_gradients_of_padded_batches(encoder: str) -> None:
    """Each slot's gradient is that of its own samples alone, whatever the padding."""
    task, bank, tensors = _task(encoder, ("attention",))
    out, adapters = _forward(task, bank, scoring=False, grad=True)
    (weights, _) = adapters.gradients(Objective().task(out).sum(), ["global"])["global"]
    for slot, samples in enumerate(SAMPLES):
        attention = _attention(tensors, slot)
        image, text = task.images[samples], task.text[0]
        image, text = (image * attention(image), text) if encoder == "image" else (image, text * attention(text))
        logits = SCALE * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
        F.cross_entropy(logits, torch.from_numpy(LABELS[samples])).backward()
        expected = torch.cat([p.grad.flatten() for p in attention.parameters() if p.grad is not None])
        assert torch.allclose(weights[slot], expected, atol=1e-5)


def test_the_frozen_model_has_no_head() -> None:
    task, _, _ = _task("image", ("attention",))
    samples = samples_of(SAMPLES, LABELS, task)
    (out,) = task.forward(samples, 1, None, scoring=True)
    expected = SCALE * F.normalize(task.images[SAMPLES[0]], dim=-1) @ F.normalize(task.text[1], dim=-1).T
    assert torch.allclose(out.class_logits[0], expected, atol=1e-5)
