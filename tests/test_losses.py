"""Losses of padded slots against torch's own, one slot at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdlp.methods.losses import Objective, Outputs

SIZES, CLASSES, WIDTH, SCALE = (5, 1, 3), 4, 6, 10.0


def outputs(seed: int, own_text: bool) -> Outputs:
    """Slots of 5, 1 and 3 samples; padding repeats the slot's first sample, as the tasks do."""
    g = torch.Generator().manual_seed(seed)
    longest = max(SIZES)
    image = F.normalize(torch.randn(len(SIZES), longest, WIDTH, generator=g, dtype=torch.float64), dim=-1)
    shape = (len(SIZES), CLASSES, WIDTH) if own_text else (CLASSES, WIDTH)
    text = F.normalize(torch.randn(shape, generator=g, dtype=torch.float64), dim=-1)
    labels = torch.randint(CLASSES, (len(SIZES), longest), generator=torch.Generator().manual_seed(5))
    mask = torch.arange(longest) < torch.tensor(SIZES)[:, None]
    image = torch.where(mask[:, :, None], image, image[:, :1])
    return Outputs(image.requires_grad_(), text.requires_grad_(), labels, mask, SCALE)


def one(out: Outputs, slot: int) -> tuple[Tensor, Tensor, Tensor]:
    """Class logits, pair logits and labels of one slot, unpadded and plain."""
    image, labels = out.image[slot, : SIZES[slot]], out.labels[slot, : SIZES[slot]]
    text = out.text[slot] if out.text.ndim == 3 else out.text
    return SCALE * image @ text.T, SCALE * image @ text[labels].T, labels


def assert_same(objective_loss: Tensor, plain: list[Tensor], out: Outputs) -> None:
    """Values per slot, and the gradients of their sum."""
    assert torch.allclose(objective_loss, torch.stack(plain), rtol=0, atol=1e-12)
    leaves = (out.image, out.text)
    ours = torch.autograd.grad(objective_loss.sum(), leaves, retain_graph=True)
    theirs = torch.autograd.grad(torch.stack(plain).sum(), leaves)
    for a, b in zip(ours, theirs):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)
        assert torch.isfinite(a).all()


@pytest.mark.parametrize("own_text", [False, True])
def test_cross_entropy(own_text: bool) -> None:
    out = outputs(0, own_text)
    plain = [F.cross_entropy(one(out, s)[0], one(out, s)[2]) for s in range(len(SIZES))]
    assert_same(Objective("cross-entropy").task(out), plain, out)


@pytest.mark.parametrize("own_text", [False, True])
def test_contrastive(own_text: bool) -> None:
    out = outputs(0, own_text)
    plain = []
    for s, size in enumerate(SIZES):
        pairs, targets = one(out, s)[1], torch.arange(size)
        plain.append((F.cross_entropy(pairs, targets) + F.cross_entropy(pairs.T, targets)) / 2)
    assert_same(Objective("contrastive").task(out), plain, out)


@pytest.mark.parametrize("own_text", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("direction", ["student-teacher", "teacher-student"])
@pytest.mark.parametrize("logits", ["class", "batch"])
def test_distillation(logits: str, direction: str, temperature: float, own_text: bool) -> None:
    student, teacher = outputs(0, own_text), outputs(1, own_text).detach()

    def kl(s: Tensor, t: Tensor) -> Tensor:
        log_s, log_t = F.log_softmax(s / temperature, 1), F.log_softmax(t / temperature, 1)
        # F.kl_div(input, target) is D_KL(target ‖ input).
        pair = (log_t, log_s) if direction == "student-teacher" else (log_s, log_t)
        return F.kl_div(*pair, reduction="batchmean", log_target=True) * temperature**2

    plain = []
    for s in range(len(SIZES)):
        if logits == "class":
            plain.append(kl(one(student, s)[0], one(teacher, s)[0]))
        else:
            mine, theirs = one(student, s)[1], one(teacher, s)[1]
            plain.append((kl(mine, theirs) + kl(mine.T, theirs.T)) / 2)
    assert_same(
        Objective(kd_direction=direction, kd_temperature=temperature, kd_logits=logits).distil(student, teacher),
        plain,
        student,
    )


def test_a_slot_that_is_not_finite_leaves_the_others_alone() -> None:
    """A client whose loss explodes must be found by its own number."""
    good, bad = outputs(0, False), outputs(0, False)
    with torch.no_grad():
        bad.image[1] = float("nan")
    for objective in (Objective("cross-entropy"), Objective("contrastive")):
        before, after = objective.task(good), objective.task(bad)
        assert torch.isnan(after[1])
        assert torch.equal(before[[0, 2]], after[[0, 2]])
        (grad,) = torch.autograd.grad(after.sum(), bad.image)
        assert torch.isfinite(grad[[0, 2]]).all()
