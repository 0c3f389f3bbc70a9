"""The optimizer over slots against torch's AdamW and clip_grad_norm_, one slot at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastdlp.adapters import optimizer as module
from fastdlp.adapters.bank import BranchState
from fastdlp.adapters.optimizer import Hyperparameters, update
from fastdlp.kernels.adamw import adamw_reference
from fastdlp.kernels.pruning import reference_threshold, soft_threshold
from tests.pairs import cases

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKENDS = ("torch", "triton")
SLOTS, D, Q = 4, 37, 5


def state() -> BranchState:
    g = torch.Generator().manual_seed(0)
    w, gates = torch.randn(SLOTS, D, generator=g).to(DEVICE), torch.randn(SLOTS, Q, generator=g).to(DEVICE)
    zeros = [torch.zeros_like(t) for t in (w, w, gates, gates)]
    return BranchState(w, gates, *zeros, torch.zeros(SLOTS, dtype=torch.int64, device=DEVICE))


def hyper(**options: object) -> Hyperparameters:
    lr = torch.tensor([1e-3, 1e-2, 3e-4, 0.1], device=DEVICE)
    xi = torch.tensor([0.0, 1e-3, 0.1, 5e-5], device=DEVICE)
    return Hyperparameters(lr, lr * 0.5, xi, torch.ones(SLOTS, device=DEVICE), **options)  # type: ignore[arg-type]


@cases(
    optimizer=["adamw", "adam"],
    threshold=["soft", "reference"],
    eps=[1e-8, 1e-2],
    weight_decay=[0.0, 0.1],
    clip_norm=[0.0, 0.5],
    backend=BACKENDS,
)
def test_equals_torch_for_every_slot(
    optimizer: str, threshold: str, eps: float, weight_decay: float, clip_norm: float, backend: str
) -> None:
    """Every slot with its own learning rates and step count; gradients are clipped before a decay is added to them."""
    h = hyper(clip_norm=clip_norm, weight_decay=weight_decay, eps=eps, optimizer=optimizer, threshold=threshold)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[optimizer]
    thresholded = {"soft": soft_threshold, "reference": reference_threshold}[threshold]
    ours, theirs = state(), []
    for slot in range(SLOTS):
        w, gate = ours.weights[slot].clone().requires_grad_(), ours.gates[slot].clone().requires_grad_()
        groups = [{"params": [w], "lr": h.lr[slot].item()}, {"params": [gate], "lr": h.gate_lr[slot].item()}]
        theirs.append((w, gate, kind(groups, eps=eps, weight_decay=weight_decay)))
    g = torch.Generator().manual_seed(1)
    for active in ([0, 1, 2, 3], [2, 0], [3], [0, 1, 2, 3]):  # the set shrinks and grows; step counts differ
        weight_grads = torch.randn(len(active), D, generator=g).to(DEVICE)
        gate_grads = (torch.randn(len(active), Q, generator=g) * 1e-3).to(DEVICE)
        given = weight_grads.clone(), gate_grads.clone()
        update(ours, torch.tensor(active, device=DEVICE), (weight_grads, gate_grads), h, backend)
        assert torch.equal(weight_grads, given[0])  # a caller's gradients stay as they are
        assert torch.equal(gate_grads, given[1])
        for row, slot in enumerate(active):
            w, gate, steps = theirs[slot]
            w.grad, gate.grad = weight_grads[row].clone(), gate_grads[row].clone()
            if clip_norm:
                torch.nn.utils.clip_grad_norm_([w], clip_norm)
            steps.step()
            gate.data = thresholded(gate.data, h.xi[slot])
        for slot, (w, gate, steps) in enumerate(theirs):
            assert torch.allclose(ours.weights[slot], w, rtol=1e-6, atol=1e-7)
            assert torch.allclose(ours.gates[slot], gate, rtol=1e-6, atol=1e-7)
            for param, m, v in ((w, ours.weights_m, ours.weights_v), (gate, ours.gates_m, ours.gates_v)):
                assert torch.allclose(m[slot], steps.state[param]["exp_avg"], rtol=1e-6, atol=1e-7)
                assert torch.allclose(v[slot], steps.state[param]["exp_avg_sq"], rtol=1e-6, atol=1e-10)
    assert ours.steps.tolist() == [3, 2, 3, 3]


@pytest.mark.parametrize("backend", BACKENDS)
def test_inactive_slots_keep_their_bits(backend: str) -> None:
    ours = state()
    before = ours.weights.clone(), ours.gates.clone()
    grads = torch.ones(1, D, device=DEVICE), torch.ones(1, Q, device=DEVICE)
    update(ours, torch.tensor([1], device=DEVICE), grads, hyper(), backend)
    for slot in (0, 2, 3):
        assert torch.equal(ours.weights[slot], before[0][slot])
        assert torch.equal(ours.gates[slot], before[1][slot])
    assert not torch.equal(ours.weights[1], before[0][1])


def test_backend_decides_the_form(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    for place in ("fastdlp.adapters.optimizer.adamw_reference", "fastdlp.kernels.adamw_triton.adamw_fused"):
        monkeypatch.setattr(place, lambda *_, name=place: called.append(name.rpartition(".")[2]))
    grads = torch.ones(1, D, device=DEVICE), torch.ones(1, Q, device=DEVICE)
    for backend in BACKENDS:
        update(state(), torch.tensor([1], device=DEVICE), grads, hyper(), backend)
    assert called == ["adamw_reference", "adamw_fused"]


def test_many_slots_step_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a long row is cut into columns: however many clients step, LoRA is stepped by one call."""
    calls: list[int] = []

    def counting(*arguments: Any) -> None:
        calls.append(arguments[0].grads.shape[1])
        adamw_reference(*arguments)

    monkeypatch.setattr(module, "adamw_reference", counting)
    grads = torch.ones(SLOTS, D, device=DEVICE), torch.ones(SLOTS, Q, device=DEVICE)
    for whole, expected in ((D, [D]), (D - 1, [D - 1, 1])):
        monkeypatch.setattr(module, "MAX_ENTRIES", whole)
        update(state(), torch.arange(SLOTS, device=DEVICE), grads, hyper())
        assert calls == expected
        calls.clear()
