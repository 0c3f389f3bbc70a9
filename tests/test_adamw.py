"""Both forms of AdamW over rows against torch's AdamW and clip_grad_norm_ in fp64, one slot at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from fastdlp.kernels import tiles
from fastdlp.kernels.adamw import (
    Settings,
    Stack,
    adamw_reference,
    clip_rows,
)
from fastdlp.kernels.adamw_triton import adamw_fused
from fastdlp.kernels.launch import recording
from fastdlp.kernels.pruning import reference_threshold, soft_threshold

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FORMS = {"reference": adamw_reference, "fused": adamw_fused}
SLOTS = 5
ACTIVE = ((0, 1, 2, 3, 4), (3, 0), (4,), (2, 4, 1, 0, 3))  # the set shrinks, grows and is permuted; step counts differ
LR = (1e-3, 1e-2, 3e-4, 0.5, 1e-5)
GATE_LR = (1e-2, 0.1, 0.5, 1e-3, 1e-4)
XI = (0.0, 1e-3, 0.5, 5e-5, 10.0)  # the last is larger than every gate
SIZE_OF_GRADIENT = (1.0, 1e-3, 0.0, 10.0, 0.1)  # of each slot: rows above the clip norm, below it, and zero
MANY = 2 * tiles.tile_for("row_norms", DEVICE, 4).chunk + 1  # a norm of three shares
WIDTHS = [(1, 0), (7, 3), (1000, 300), (MANY, 1)]
SETTINGS = {
    "plain": Settings(0.0, "soft", 0.0, (0.9, 0.999), 1e-8),
    "decay": Settings(0.0, "reference", 0.1, (0.9, 0.999), 1e-8),
    "clip": Settings(0.5, "soft", 0.0, (0.9, 0.999), 1e-8),
    "all": Settings(1, "reference", 0.1, (0.7, 0.95), 1e-2),
}
TOLERANCE = 1e-6  # relative to the largest entry that the slot's row has had


@dataclass
class Bank:
    """Weights and gates of all slots; the stacks' gradients are filled in step by step."""

    weights: Stack
    gates: Stack
    steps: Tensor
    xi: Tensor

    @classmethod
    def of(cls, D: int, Q: int, device: torch.device = DEVICE) -> Bank:
        g = torch.Generator().manual_seed(0)
        stacks = []
        for width, lr in ((D, LR), (Q, GATE_LR)):
            params = torch.randn(SLOTS, width, generator=g).to(device)
            zeros = torch.zeros_like(params)
            stacks.append(Stack(params, zeros, zeros.clone(), torch.tensor(lr).to(device), params.new_empty(0, width)))
        return cls(*stacks, torch.zeros(SLOTS, dtype=torch.int64, device=device), torch.tensor(XI).to(device))

    def step(
        self, form: Callable[..., None], active: tuple[int, ...], grads: tuple[Tensor, Tensor], settings: Settings
    ) -> None:
        weights, gates = (replace(stack, grads=g) for stack, g in zip((self.weights, self.gates), grads))
        slots = torch.tensor(active).to(self.steps.device)
        form(weights, gates, slots, self.steps, self.xi, settings)

    def state(self) -> dict[str, Tensor]:
        """Everything that a step may change, by name, [slots, ...] each."""
        stacks = {"weights": self.weights, "gates": self.gates}
        tensors = {f"{n}.{field}": getattr(s, field) for n, s in stacks.items() for field in ("params", "m", "v")}
        return tensors | {"steps": self.steps}


def gradients(active: tuple[int, ...], D: int, Q: int, seed: int) -> tuple[Tensor, Tensor]:
    """Gradients of weights [n, D] and gates [n, Q]."""
    g = torch.Generator().manual_seed(seed)
    size = torch.tensor(SIZE_OF_GRADIENT)[list(active), None]
    weights, gates = (size * torch.randn(len(active), width, generator=g) for width in (D, Q))
    return weights.to(DEVICE), gates.to(DEVICE)


class Exact:
    """One slot in fp64, stepped by torch's own optimizer."""

    def __init__(self, bank: Bank, slot: int, settings: Settings) -> None:
        self.settings, self.xi = settings, bank.xi[slot].item()
        self.weights, self.gates = (s.params[slot].double().cpu().requires_grad_() for s in (bank.weights, bank.gates))
        groups = [
            {"params": [self.weights], "lr": bank.weights.lr[slot].item()},
            {"params": [self.gates], "lr": bank.gates.lr[slot].item()},
        ]
        self.optimizer = torch.optim.AdamW(
            groups, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay
        )
        self.largest: dict[str, float] = {}  # by tensor, over all steps: what rounding errors are relative to
        self.record({"weights.params": self.weights, "gates.params": self.gates})

    def step(self, weight_grad: Tensor, gate_grad: Tensor) -> None:
        self.weights.grad, self.gates.grad = weight_grad.double().cpu(), gate_grad.double().cpu()
        if self.settings.clip_norm:
            torch.nn.utils.clip_grad_norm_([self.weights], self.settings.clip_norm)
        self.optimizer.step()
        self.gates.data = torch.tensor([self.thresholded(v) for v in self.gates.tolist()], dtype=torch.float64)
        self.record(self.state())

    def record(self, state: dict[str, Tensor]) -> None:
        for name, tensor in state.items():
            self.largest[name] = max(self.largest.get(name, 0.0), *tensor.abs().tolist(), 0.0)

    def thresholded(self, v: float) -> float:
        if self.settings.threshold == "soft":
            return math.copysign(max(abs(v) - self.xi, 0.0), v)
        if v > self.xi:
            v = v - self.xi
        if v < -self.xi:
            v = v + self.xi
        return 0.0 if abs(v) < self.xi else v

    def state(self) -> dict[str, Tensor]:
        found = {"weights.params": self.weights.detach(), "gates.params": self.gates.detach()}
        for name, param in (("weights", self.weights), ("gates", self.gates)):
            moments = self.optimizer.state[param]
            found |= {f"{name}.m": moments["exp_avg"], f"{name}.v": moments["exp_avg_sq"]}
        return found


def error(ours: Tensor, other: Tensor, scale: float) -> float:
    """Largest difference of two rows, relative to `scale`; equal rows have none."""
    difference = (ours.double().cpu() - other.double().cpu()).abs()
    return difference.max().item() / (scale or 1e-30) if len(difference) else 0.0


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(("D", "Q"), WIDTHS)
def test_equals_torch_for_every_slot(settings: str, D: int, Q: int) -> None:
    fused, reference = Bank.of(D, Q), Bank.of(D, Q)
    exact = [Exact(fused, slot, SETTINGS[settings]) for slot in range(SLOTS)]
    for seed, active in enumerate(ACTIVE):
        grads = gradients(active, D, Q, seed)
        fused.step(adamw_fused, active, grads, SETTINGS[settings])
        reference.step(adamw_reference, active, grads, SETTINGS[settings])
        for row, slot in enumerate(active):
            exact[slot].step(grads[0][row], grads[1][row])
        for slot in range(SLOTS):
            for name, expected in exact[slot].state().items():
                one, other, scale = fused.state()[name][slot], reference.state()[name][slot], exact[slot].largest[name]
                errors = error(one, expected, scale), error(other, expected, scale), error(one, other, scale)
                assert all(e <= TOLERANCE for e in errors), f"step {seed}, slot {slot}, {name}: {errors}"
            assert torch.equal(fused.gates.params[slot].cpu() == 0, exact[slot].gates == 0)
    assert fused.steps.tolist() == reference.steps.tolist() == [3, 2, 2, 3, 3]


def test_the_problem_clips_zeroes_and_spares() -> None:
    """What the tests above rest on: gradients on both sides of the clip norm, and gates on both sides of ξ."""
    norms = gradients(ACTIVE[0], MANY, 1, 0)[0].norm(dim=1).tolist()
    assert min(norms[0], norms[3]) > 1
    assert 0 < norms[1] < 0.5
    assert norms[2] == 0
    bank = Bank.of(1000, 300)
    bank.step(adamw_reference, ACTIVE[0], gradients(ACTIVE[0], 1000, 300, 0), SETTINGS["plain"])
    zeros = (bank.gates.params == 0).sum(1).tolist()
    assert zeros[0] == 0
    assert 50 < zeros[2] < 250
    assert zeros[4] == 300


@pytest.mark.parametrize("form", FORMS)
def test_other_slots_keep_their_bits(form: str) -> None:
    bank = Bank.of(37, 5)
    bank.step(FORMS[form], ACTIVE[0], gradients(ACTIVE[0], 37, 5, 0), SETTINGS["all"])
    before = {name: tensor.clone() for name, tensor in bank.state().items()}
    bank.step(FORMS[form], (3, 1), gradients((3, 1), 37, 5, 1), SETTINGS["all"])
    for name, tensor in bank.state().items():
        assert torch.equal(tensor[[0, 2, 4]], before[name][[0, 2, 4]]), name
        for slot in (1, 3):
            assert not torch.equal(tensor[slot], before[name][slot]), name


def test_same_bits_whoever_shares_the_launch() -> None:
    """All slots at once, again, and one after another."""
    runs = [Bank.of(MANY, 7) for _ in range(3)]
    for seed in range(2):
        weights, gates = gradients(ACTIVE[3], MANY, 7, seed)
        for bank in runs[:2]:
            bank.step(adamw_fused, ACTIVE[3], (weights, gates), SETTINGS["all"])
        for row, slot in enumerate(ACTIVE[3]):
            runs[2].step(adamw_fused, (slot,), (weights[row : row + 1], gates[row : row + 1]), SETTINGS["all"])
    for name, tensor in runs[0].state().items():
        assert torch.equal(tensor, runs[1].state()[name]), name
        assert torch.equal(tensor, runs[2].state()[name]), name


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("settings", SETTINGS)
def test_what_is_not_a_number_stays_so(settings: str, value: float) -> None:
    """A gradient that is not finite is not clipped or thresholded away: the bank is searched for it after a round."""
    fused, reference = Bank.of(300, 5), Bank.of(300, 5)
    grads = gradients((0, 1), 300, 5, 0)
    grads[0][0, 270] = grads[1][1, 2] = value
    fused.step(adamw_fused, (0, 1), grads, SETTINGS[settings])
    reference.step(adamw_reference, (0, 1), grads, SETTINGS[settings])
    assert reference.weights.params[0].isnan().any()
    assert reference.gates.params[1].isnan().any()
    for name, expected in reference.state().items():
        assert torch.equal(fused.state()[name].isnan(), expected.isnan()), name


@pytest.mark.parametrize("arch", ["80", "90"])
@pytest.mark.parametrize(
    ("settings", "kernels"),
    [
        ("plain", ["count_steps_kernel", "adamw_kernel"]),
        ("clip", ["count_steps_kernel", "row_norms_kernel", "adamw_kernel"]),
    ],
)
def test_launches(settings: str, kernels: list[str], arch: str) -> None:
    """Two launches, three with clipping; listed without a GPU."""
    meta = torch.device("meta")
    bank = Bank.of(1000, 3, meta)
    grads = torch.empty(2, 1000, device=meta), torch.empty(2, 3, device=meta)
    with tiles.assume(arch), recording(dry=True) as launches:
        bank.step(adamw_fused, (0, 1), grads, SETTINGS[settings])
    assert [launch.kernel.fn.__name__ for launch in launches] == kernels


@pytest.mark.parametrize("form", FORMS)
def test_nobody(form: str) -> None:
    bank = Bank.of(7, 3)
    before = {name: tensor.clone() for name, tensor in bank.state().items()}
    slots = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    FORMS[form](bank.weights, bank.gates, slots, bank.steps, bank.xi, SETTINGS["all"])
    for name, tensor in bank.state().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grads": torch.zeros(2, 6)}, r"weights\.grads is \(2, 6\) torch\.float32, expected \(2, 7\)"),
        ({"grads": torch.zeros(2, 7).double()}, r"weights\.grads is \(2, 7\) torch\.float64, expected .*float32"),
        ({"grads": torch.zeros(7, 2).T}, r"weights\.grads must be contiguous"),
        ({"m": torch.zeros(4, 7)}, r"weights\.m is \(4, 7\)"),
        ({"lr": torch.zeros(2)}, r"weights\.lr is \(2,\)"),
        ({"v": torch.zeros(5, 7, device="meta")}, r"weights\.v must be contiguous and on"),
    ],
)
def test_fused_refuses_what_it_would_read_wrongly(change: dict[str, Tensor], message: str) -> None:
    bank = Bank.of(7, 3)
    moved = {name: t if t.is_meta else t.to(DEVICE) for name, t in change.items()}
    weights = replace(bank.weights, **({"grads": torch.zeros(2, 7, device=DEVICE)} | moved))
    gates = replace(bank.gates, grads=torch.zeros(2, 3, device=DEVICE))
    slots = torch.tensor([0, 1], device=DEVICE)
    with pytest.raises(ValueError, match=message):
        adamw_fused(weights, gates, slots, bank.steps, bank.xi, SETTINGS["plain"])
    assert bank.steps.tolist() == [0] * SLOTS


def test_fused_refuses_an_unknown_threshold() -> None:
    bank = Bank.of(7, 3)
    with pytest.raises(ValueError, match="unknown threshold 'hard': choose from soft, reference"):
        bank.step(adamw_fused, (0,), gradients((0,), 7, 3, 0), replace(SETTINGS["plain"], threshold="hard"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("settings", SETTINGS)
def test_in_a_cuda_graph(settings: str) -> None:
    """A captured step counts on with every replay, to the bits of as many eager steps."""
    eager, captured = Bank.of(MANY, 7), Bank.of(MANY, 7)
    slots = torch.tensor(ACTIVE[3], device=DEVICE)
    grads = gradients(ACTIVE[3], MANY, 7, 0)
    weights, gates = (replace(s, grads=g) for s, g in zip((captured.weights, captured.gates), grads))
    for _ in range(3):
        eager.step(adamw_fused, ACTIVE[3], grads, SETTINGS[settings])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        adamw_fused(weights, gates, slots, captured.steps, captured.xi, SETTINGS[settings])
    for _ in range(3):
        graph.replay()
    for name, tensor in eager.state().items():
        assert torch.equal(tensor, captured.state()[name]), name


def test_clip_leaves_short_rows_alone() -> None:
    rows = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
    assert torch.allclose(clip_rows(rows, 1.0), torch.tensor([[0.6, 0.8], [0.3, 0.4]]), atol=1e-6)


def test_thresholds_by_hand() -> None:
    v = torch.tensor([3.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -1.5, -3.0])
    assert soft_threshold(v, torch.tensor(1.0)).tolist() == [2, 0.5, 0, 0, 0, 0, 0, -0.5, -2]
    # The code's dead zone is twice as wide: what is left below ξ after shrinking goes as well.
    assert reference_threshold(v, torch.tensor(1.0)).tolist() == [2, 0, 1, 0, 0, 0, -1, 0, -2]
