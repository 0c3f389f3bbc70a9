"""The engine: a client's result is its own, whoever shares its batch, and FedAvg is the written mean."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastdlp.adapters.bank import AdapterBank
from fastdlp.adapters.branches import tower_sites
from fastdlp.adapters.optimizer import Hyperparameters
from fastdlp.clip.load import Clip, class_prompts, load_clip
from fastdlp.config import PROTOCOLS, TrainConfig
from fastdlp.engine.cuda_graph import GraphedSteps
from fastdlp.engine.engine import Engine
from fastdlp.engine.images import TokenSource
from fastdlp.engine.schedule import Schedule, Slot, epoch_order
from fastdlp.engine.tasks import ImageTask, Prompts, TextTask, frozen_image_features, frozen_text_features
from fastdlp.methods import make_method
from fastdlp.methods.losses import Objective
from tests.models import tiny_clip
from tests.recording import Recorder
from tests.steps import Images

SIZES = (1, 31, 32, 33, 100)
TESTS = (0, 3, 150, 2, 9)
CLASSES = ["apple", "pear", "water melon"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Clip:
    return load_clip(tiny_clip(tmp_path_factory.mktemp("model"), quick_gelu=True))


def slots(sizes: tuple[int, ...] = SIZES, tests: tuple[int, ...] = TESTS) -> list[Slot]:
    found, at = [], 0
    for client, (n, m) in enumerate(zip(sizes, tests)):
        found.append(Slot(np.arange(at, at + n), np.arange(at + n, at + n + m), 0, client, seed=4))
        at += n + m
    return found


def task_of(clip: Clip, encoder: str, samples: int, resident: int = 1 << 40) -> Any:
    tokens, index = clip.text_stem(clip.tokenize(class_prompts(CLASSES, "a photo of a {}.")))
    prompts, images = Prompts(tokens, index), Images(samples, clip.transform.size)
    if encoder == "text":
        return TextTask(
            clip.text,
            (prompts, prompts),
            F.normalize(frozen_image_features(clip.image, clip.image_stem, images), dim=-1),
            clip.logit_scale,
        )
    text = F.normalize(frozen_text_features(clip.text, prompts), dim=-1)
    tokens = TokenSource(clip.image_stem, images, torch.device("cpu"), torch.float32, resident)
    return ImageTask(clip.image, tokens, (text, text), clip.logit_scale)


def engine(
    clip: Clip,
    chosen: list[Slot],
    encoder: str = "image",
    method: str = "feddlp",
    resident: int = 1 << 40,
    **options: Any,
) -> Engine:
    """An engine over `chosen`, whose numbers depend on the client, not on the row it sits in."""
    config = TrainConfig(method=method, teacher=options.pop("teacher", "fresh"))
    schedule = Schedule(
        options.pop("batch_size", 32),
        options.pop("local_epochs", 1),
        options.pop("micro_batch", 10_000),
        padded=options.pop("padded", False),
    )
    recorder = options.pop("recorder", None)
    m = make_method(config)
    bank = AdapterBank(tower_sites(clip.tower(encoder).shape), m.branches(), len(chosen))
    words = {"local": [[s.client] for s in chosen], "global": [[99]] * len(chosen), "frozen": [[99]] * len(chosen)}
    bank.initialize("gaussian", words)
    lr = torch.tensor([1e-3 * (1 + s.client) for s in chosen])  # every slot its own
    hyper = Hyperparameters(
        lr, lr / 2, torch.full_like(lr, 1e-4), 0.1 * (1 + lr * 1e3), clip_norm=options.pop("clip_norm", 0.0)
    )
    total = max(sum(SIZES) + sum(TESTS), sum(len(s.train) + len(s.test) for s in chosen))
    labels = np.arange(total) % len(CLASSES)
    task = task_of(clip, encoder, total, resident)
    runner = partial(GraphedSteps, recorder=recorder, state=bank.tensors) if recorder else None
    return Engine(m, bank, task, Objective(**options), hyper, chosen, labels, schedule, runner=runner)


def rows(e: Engine) -> dict[int, dict[str, torch.Tensor]]:
    """Every client's adapters and moments by client number."""
    return {
        slot.client: {
            f"{branch}/{name}": getattr(state, name)[row].clone()
            for branch, state in e.bank.state.items()
            for name in state.FIELDS
        }
        for row, slot in enumerate(e.slots)
    }


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], lr: float) -> None:
    """Equal up to rounding. AdamW divides a gradient by its own size, so rounding in a gradient near zero can move an
    entry by a share of the learning rate: nearly all agree to 1e-3 of it, and none is off by more than a step."""
    for name, value in theirs.items():
        if value.dtype == torch.int64 or not value.numel():
            assert torch.equal(ours[name], value), name
        elif name.endswith(("weights", "gates")):
            off = (ours[name] - value).abs() / lr
            assert off.quantile(0.999) <= 2e-2, f"{name}: {off.quantile(0.999):.1e}"
            assert off.max() <= 1.0, f"{name}: {off.max():.1e}"
        else:
            assert torch.allclose(ours[name], value, rtol=1e-2, atol=1e-4 * float(value.abs().max()) + 1e-12), name


LOSS_SWITCHES = ("task_loss", "kd_direction", "kd_temperature", "kd_logits", "clip_norm")
VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "pre-update": {"teacher": "pre-update"},
    "reference": {name: PROTOCOLS["reference"][name] for name in LOSS_SWITCHES},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("encoder", ["image", "text"])
def test_lockstep_equals_one_client_at_a_time(clip: Clip, encoder: str, variant: str) -> None:
    together = engine(clip, slots(), encoder, **VARIANTS[variant])
    losses = together.train_round(1)
    scores = together.score()
    for row, slot in enumerate(slots()):
        alone = engine(clip, [slot], encoder, **VARIANTS[variant])
        own = alone.train_round(1)
        assert_same(rows(together)[slot.client], rows(alone)[slot.client], lr=1e-3 * (1 + slot.client))
        assert losses.steps[row] == own.steps[0] == -(-len(slot.train) // 32)
        for name in own.means:
            assert losses.means[name][row] == pytest.approx(own.means[name][0], rel=1e-4, abs=1e-6)
        assert [part[row] for part in scores] == [part[0] for part in alone.score()]


@pytest.mark.parametrize("encoder", ["image", "text"])
def test_chunks_and_row_order_decide_nothing(clip: Clip, encoder: str) -> None:
    whole = engine(clip, slots(), encoder, local_epochs=2)
    whole.train_round(3)
    for other in (
        engine(clip, slots(), encoder, local_epochs=2, micro_batch=1),
        engine(clip, slots()[::-1], encoder, local_epochs=2, micro_batch=40),
        engine(clip, slots(), encoder, local_epochs=2, resident=0),  # stem run again for every batch
    ):
        other.train_round(3)
        for slot in slots():
            assert_same(rows(other)[slot.client], rows(whole)[slot.client], lr=1e-3 * (1 + slot.client))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("encoder", ["image", "text"])
def test_padding_decides_nothing(clip: Clip, encoder: str, variant: str) -> None:
    """Full shapes for all batches, as a CUDA graph wants them, against every batch in its own."""
    own, padded = (engine(clip, slots(), encoder, padded=padded, **VARIANTS[variant]) for padded in (False, True))
    for number in (1, 2):
        losses, theirs = padded.train_round(number), own.train_round(number)
        assert np.array_equal(losses.steps, theirs.steps)
        assert losses.samples == theirs.samples == theirs.computed == sum(SIZES)
        assert losses.computed == 32 * losses.steps.sum()
        for name, mean in theirs.means.items():
            assert losses.means[name] == pytest.approx(mean, rel=1e-4, abs=1e-6)
    for slot in slots():
        assert_same(rows(padded)[slot.client], rows(own)[slot.client], lr=1e-3 * (1 + slot.client))


@pytest.mark.parametrize(
    ("encoder", "method", "variant", "resident"),
    [("image", "feddlp", v, 1 << 40) for v in VARIANTS]
    + [("text", "feddlp", v, 1 << 40) for v in VARIANTS]
    + [("image", m, "paper", 1 << 40) for m in ("flora", "feddat", "combined", "local-sora")]
    + [("image", "feddlp", "reference", 0), ("image", "feddlp", "pre-update", 0), ("image", "feddat", "paper", 0)],
)
def test_a_recorded_step_takes_nothing_from_the_host(
    clip: Clip, encoder: str, method: str, variant: str, resident: int
) -> None:
    """Replayed with other clients' inputs it computes what it computes when it runs anew, to the bit."""
    options = VARIANTS[variant] | {"padded": True, "micro_batch": 64, "local_epochs": 2, "resident": resident}
    recorder = Recorder()
    plain, recorded = (engine(clip, slots(), encoder, method, recorder=r, **options) for r in (None, recorder))
    for number in (1, 2):
        losses, theirs = recorded.train_round(number), plain.train_round(number)
        for name, mean in theirs.means.items():
            assert np.array_equal(losses.means[name], mean), name
        recorded.aggregate(), plain.aggregate()
    assert recorder.replays >= 8
    for slot in slots():
        for name, value in rows(plain)[slot.client].items():
            assert torch.equal(rows(recorded)[slot.client][name], value), name


def test_a_client_with_most_of_the_data_costs_its_samples(clip: Clip) -> None:
    """β = 0.01: nothing is computed for clients that are done, and the last batches go through together."""
    sizes = (700, *range(30, 39))
    skewed = engine(clip, slots(sizes, (0,) * 10))
    losses = skewed.train_round(1)
    assert losses.samples == losses.computed == sum(sizes)
    assert losses.batches == 22  # the large client's


def test_same_run_same_bits(clip: Clip) -> None:
    first, second = engine(clip, slots()), engine(clip, slots())
    for e in (first, second):
        e.train_round(1)
        e.aggregate()
        e.train_round(2)
    for client, tensors in rows(first).items():
        for name, value in tensors.items():
            assert torch.equal(value, rows(second)[client][name]), name


def test_fedavg_is_the_weighted_mean_per_federation(clip: Clip) -> None:
    chosen = [replace(s, federation=s.client % 2) for s in slots()]
    e = engine(clip, chosen)
    e.train_round(1)
    before = e.bank.state["global"].weights.clone()
    local = e.bank.state["local"].weights.clone()
    moments = e.bank.state["global"].weights_m.clone()
    e.aggregate()
    for federation in (0, 1):
        members = [i for i, s in enumerate(chosen) if s.federation == federation]
        total = sum(len(chosen[i].train) for i in members)
        mean = torch.zeros_like(before[0])
        for i in members:
            mean += len(chosen[i].train) / total * before[i]
        assert torch.allclose(e.server["global"][federation], mean, rtol=0, atol=1e-6)
        for i in members:
            assert torch.equal(e.bank.state["global"].weights[i], e.server["global"][federation])
    assert torch.equal(e.bank.state["local"].weights, local)
    assert torch.equal(e.bank.state["global"].weights_m, moments)


def test_a_client_without_samples_takes_no_part(clip: Clip) -> None:
    e = engine(clip, slots((5, 0, 7), (1, 2, 0)))
    before = rows(e)[1]["local/weights"]
    losses = e.train_round(1)
    assert losses.steps.tolist() == [1, 0, 1]
    assert np.isnan(losses.means["ce_local"][1])
    assert torch.equal(rows(e)[1]["local/weights"], before)
    assert e.score()[1].tolist() == [1, 2, 0]


def test_first_loss_that_is_not_finite_is_named(clip: Clip) -> None:
    e = engine(clip, slots())
    e.hyper.lr[3] = float(
        "inf"
    )  # its first update leaves a local model, the teacher of the global step, without numbers
    losses = e.train_round(1)
    assert losses.not_finite == {3: (0, "kd_global")}
    assert np.isfinite(losses.means["ce_local"][[0, 1, 2, 4]]).all()


def test_order_depends_on_seed_client_round_and_epoch_alone() -> None:
    slot = slots()[4]
    same = epoch_order(replace(slot, test=slot.test[:1], federation=1), 2, 0)
    assert np.array_equal(epoch_order(slot, 2, 0), same)
    assert sorted(same) == sorted(slot.train)
    for other in (epoch_order(slot, 3, 0), epoch_order(slot, 2, 1), epoch_order(replace(slot, seed=5), 2, 0)):
        assert not np.array_equal(same, other)


def test_frozen_model_scores_alike_for_every_encoder(clip: Clip) -> None:
    """Zero-shot does not depend on which tower would be trained."""
    image, text = (engine(clip, slots(), encoder).score(adapted=False)[0] for encoder in ("image", "text"))
    assert image.tolist() == text.tolist()
