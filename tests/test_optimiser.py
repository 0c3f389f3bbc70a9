"""The optimiser over slots against torch's AdamW and clip_grad_norm_, one slot at a time."""

from __future__ import annotations

import pytest
import torch

from fastdlp.bank import BranchState
from fastdlp.optimiser import Hyperparameters, clip_rows, reference_threshold, soft_threshold, update

SLOTS, D, Q = 4, 37, 5


def state() -> BranchState:
    g = torch.Generator().manual_seed(0)
    w, gates = torch.randn(SLOTS, D, generator=g), torch.randn(SLOTS, Q, generator=g)
    zeros = [torch.zeros_like(t) for t in (w, w, gates, gates)]
    return BranchState(w, gates, *zeros, torch.zeros(SLOTS, dtype=torch.int64))


def hyper(**options: object) -> Hyperparameters:
    lr = torch.tensor([1e-3, 1e-2, 3e-4, 0.1])
    return Hyperparameters(lr, lr * 0.5, torch.tensor([0.0, 1e-3, 0.1, 5e-5]), torch.ones(SLOTS), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("threshold", ["soft", "reference"])
def test_equals_torch_for_every_slot(clip_norm: float, weight_decay: float, threshold: str) -> None:
    h = hyper(clip_norm=clip_norm, weight_decay=weight_decay, threshold=threshold)
    ours = state()
    theirs = []
    for slot in range(SLOTS):
        w, gate = ours.weights[slot].clone().requires_grad_(), ours.gates[slot].clone().requires_grad_()
        groups = [{"params": [w], "lr": h.lr[slot].item()}, {"params": [gate], "lr": h.gate_lr[slot].item()}]
        theirs.append((w, gate, torch.optim.AdamW(groups, weight_decay=weight_decay)))
    g = torch.Generator().manual_seed(1)
    for active in ([0, 1, 2, 3], [2, 0], [3], [0, 1, 2, 3]):  # the set shrinks and grows; step counts differ
        grads = (torch.randn(len(active), D, generator=g), torch.randn(len(active), Q, generator=g) * 1e-3)
        update(ours, torch.tensor(active), grads, h)
        for row, slot in enumerate(active):
            w, gate, optimiser = theirs[slot]
            w.grad, gate.grad = grads[0][row].clone(), grads[1][row].clone()
            if clip_norm:
                torch.nn.utils.clip_grad_norm_([w], clip_norm)
            optimiser.step()
            thresholded = {"soft": soft_threshold, "reference": reference_threshold}[threshold]
            gate.data = thresholded(gate.data, h.xi[slot])
        for slot, (w, gate, _) in enumerate(theirs):
            assert torch.allclose(ours.weights[slot], w, rtol=1e-6, atol=1e-7)
            assert torch.allclose(ours.gates[slot], gate, rtol=1e-6, atol=1e-7)
    assert ours.steps.tolist() == [3, 2, 3, 3]


def test_inactive_slots_keep_their_bits() -> None:
    ours = state()
    before = ours.weights.clone(), ours.gates.clone()
    update(ours, torch.tensor([1]), (torch.ones(1, D), torch.ones(1, Q)), hyper())
    for slot in (0, 2, 3):
        assert torch.equal(ours.weights[slot], before[0][slot])
        assert torch.equal(ours.gates[slot], before[1][slot])
    assert not torch.equal(ours.weights[1], before[0][1])


def test_clip_leaves_short_rows_alone() -> None:
    rows = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
    assert torch.allclose(clip_rows(rows, 1.0), torch.tensor([[0.6, 0.8], [0.3, 0.4]]), atol=1e-6)


def test_thresholds_by_hand() -> None:
    v = torch.tensor([3.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -1.5, -3.0])
    assert soft_threshold(v, torch.tensor(1.0)).tolist() == [2, 0.5, 0, 0, 0, 0, 0, -0.5, -2]
    # The code's dead zone is twice as wide: what is left below ξ after shrinking goes as well.
    assert reference_threshold(v, torch.tensor(1.0)).tolist() == [2, 0, 1, 0, 0, 0, -1, 0, -2]
