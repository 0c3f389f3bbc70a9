"""The adapter bank: every client's adapters, moments and hyperparameters, stacked over slots.

A slot is one client of one federation. Per branch there are two flat buffers, `weights` [slots, D] (A and B
of all sites) and `gates` [slots, Q], so that the optimiser, clipping, FedAvg and the checkpoint are each a
few operations over whole rows, whatever the model. The forward sees shaped copies of the active rows
(`Adapters`); their gradients come back as flat rows again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fastdlp.sites import Branch, Site, count_gates, count_parameters

View = tuple[str, ...]  # the branches that one row of the batch sees


@dataclass
class BranchState:
    """One branch of all slots: parameters and AdamW moments, fp32. D = A and B entries, Q = gate entries."""

    weights: Tensor  # [slots, D]
    gates: Tensor  # [slots, Q]; Q = 0 for a branch without gate
    weights_m: Tensor
    weights_v: Tensor
    gates_m: Tensor
    gates_v: Tensor
    steps: Tensor  # [slots] int64, updates done

    FIELDS = ("weights", "gates", "weights_m", "weights_v", "gates_m", "gates_v", "steps")


class AdapterBank:
    """Adapters of all slots.

    Args:
        sites: the adapted linears, in forward order.
        branches: the branches that every slot holds.
        slots: how many clients.
        device: where the buffers live.
        backend: form of the optimiser's update, "torch" or "triton".
    """

    def __init__(
        self,
        sites: Sequence[Site],
        branches: Sequence[Branch],
        slots: int,
        device: torch.device | str = "cpu",
        backend: str = "torch",
    ) -> None:
        self.sites = tuple(sites)
        self.branches = {branch.name: branch for branch in branches}
        self.slots = slots
        self.device, self.backend = torch.device(device), backend
        self.state: dict[str, BranchState] = {}
        self._seen: dict[tuple[str, tuple[View, ...]], Tensor] = {}
        for branch in branches:
            size = count_parameters(self.sites, branch.rank)
            gates = count_gates(self.sites, branch.rank) if branch.gated else 0
            w, g = torch.zeros(slots, size, device=device), torch.zeros(slots, gates, device=device)
            self.state[branch.name] = BranchState(
                w,
                g,
                w.clone(),
                w.clone(),
                g.clone(),
                g.clone(),
                torch.zeros(slots, dtype=torch.int64, device=device),
            )

    def initialise(self, init: str, seeds: Mapping[str, Sequence[Sequence[int]]]) -> None:
        """Draw A and gate and set B = 0, on the CPU, so that a seed means the same on every device.

        Args:
            init: "gaussian": A ~ N(0, 1/r), variance 1/r (the paper's notation); "peft-gaussian": standard
                deviation 1/r; "kaiming": uniform in ±1/sqrt(K), PEFT's default. Gates ~ N(0, 1) always.
            seeds: per branch and slot, the words that seed its draw; slots with equal words start equal.
        """
        for name, branch in self.branches.items():
            rows: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
            for slot, words in enumerate(seeds[name]):
                key = tuple(words)
                if key not in rows:
                    rows[key] = self._draw(branch, init, key)
                weights, gates = rows[key]
                self.state[name].weights[slot] = weights.to(self.device)
                self.state[name].gates[slot] = gates.to(self.device)

    def _draw(self, branch: Branch, init: str, words: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(words)))
        pieces: list[np.ndarray] = []
        for site in self.sites:
            shape = len(site.parts) * branch.rank * site.in_features
            if init == "kaiming":
                bound = 1 / math.sqrt(site.in_features)
                a = rng.uniform(-bound, bound, shape)
            else:
                std = 1 / branch.rank if init == "peft-gaussian" else 1 / math.sqrt(branch.rank)
                a = rng.normal(0, std, shape)
            pieces += [a, np.zeros(len(site.parts) * site.out_features * branch.rank)]
        gates = rng.normal(0, 1, count_gates(self.sites, branch.rank) if branch.gated else 0)
        return torch.from_numpy(np.concatenate(pieces)).float(), torch.from_numpy(gates).float()

    def adapters(self, slots: Tensor, views: Sequence[View], grad: bool) -> Adapters:
        """Shaped copies of the rows `slots` [n] for a batch whose rows see `views` (n · len(views) groups)."""
        return Adapters(self, slots, tuple(views), grad)

    def seen(self, branch: str, views: tuple[View, ...]) -> Tensor:
        """[views] fp32: the branch's scale for the views that see it, 0 for the others. Made once and kept."""
        if (branch, views) not in self._seen:
            scales = [self.branches[branch].scale if branch in view else 0.0 for view in views]
            self._seen[branch, views] = torch.tensor(scales, device=self.device)
        return self._seen[branch, views]

    def named(self, branch: str, slot: int | None = None, weights: Tensor | None = None) -> dict[str, Tensor]:
        """One slot's branch (or a flat row of weights without gates) as fp32 CPU tensors by name.

        Names are `{site part}/{A|B|gate}`: A [r, K], B [N, r], gate [r].
        """
        state, rank = self.state[branch], self.branches[branch].rank
        row = state.weights[slot] if weights is None else weights
        gate = state.gates[slot] if weights is None and self.branches[branch].gated else None
        tensors: dict[str, Tensor] = {}
        for site, span in zip(self.sites, spans(self.sites, rank)):
            a = row[span.a].view(len(site.parts), rank, site.in_features)
            b = row[span.b].view(len(site.parts), site.out_features, rank)
            for i, part in enumerate(site.parts):
                tensors[f"{part}/A"] = a[i].float().cpu().clone()
                tensors[f"{part}/B"] = b[i].float().cpu().clone()
                if gate is not None:
                    g = gate[span.gate].view(len(site.parts), rank)
                    tensors[f"{part}/gate"] = g[i].float().cpu().clone()
        return tensors

    def load_named(self, branch: str, slot: int, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `named` for one slot.

        Raises:
            ValueError: names or shapes that are not this branch's.
        """
        expected = self.named(branch, slot)
        if set(expected) != set(tensors):
            odd = sorted(set(expected) ^ set(tensors))
            raise ValueError(f"adapter of another shape: {odd[0]} and {len(odd) - 1} other names do not match")
        state, rank = self.state[branch], self.branches[branch].rank
        for name, tensor in tensors.items():
            if tensor.shape != expected[name].shape:
                raise ValueError(f"{name} is {tuple(tensor.shape)}, expected {tuple(expected[name].shape)}")
        for site, span in zip(self.sites, spans(self.sites, rank)):
            for kind, where in (("A", span.a), ("B", span.b)):
                state.weights[slot, where] = torch.cat([tensors[f"{p}/{kind}"].flatten() for p in site.parts]).to(
                    state.weights
                )
            if self.branches[branch].gated:
                state.gates[slot, span.gate] = torch.cat([tensors[f"{p}/gate"] for p in site.parts]).to(state.gates)

    def not_finite(self) -> list[int]:
        """Slots with a weight or gate that is not finite. A loss tells of it a step later, or never."""
        fine = [t.isfinite().all(1) for state in self.state.values() for t in (state.weights, state.gates)]
        return (~torch.stack(fine).all(0)).nonzero().flatten().tolist()


@dataclass(frozen=True)
class Span:
    """Where a site's A, B and gate lie in a flat row."""

    a: slice
    b: slice
    gate: slice


def spans(sites: Sequence[Site], rank: int) -> list[Span]:
    """The layout of a branch's flat rows: site after site, A before B; gates in a row of their own."""
    found: list[Span] = []
    at = gate = 0
    for site in sites:
        parts = len(site.parts)
        a, b = parts * rank * site.in_features, parts * rank * site.out_features
        found.append(Span(slice(at, at + a), slice(at + a, at + a + b), slice(gate, gate + parts * rank)))
        at, gate = at + a + b, gate + parts * rank
    return found


@dataclass
class Adapters:
    """The active slots' adapters of the branches that `views` name.

    The leaves of the autograd graph are flat rows, weights [n, D] and gates [n, Q] a branch; the sites see views of
    them, so one backward of one split gathers all gradients.
    """

    bank: AdapterBank
    slots: Tensor
    views: tuple[View, ...]
    grad: bool
    leaves: dict[str, tuple[Tensor, Tensor]] = field(init=False)
    _stacked: list[tuple[Tensor, Tensor, Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        self.leaves = {}
        shaped = []
        for name in dict.fromkeys(branch for view in self.views for branch in view):
            state = self.bank.state[name]
            rows = (flat.index_select(0, self.slots).requires_grad_(self.grad) for flat in (state.weights, state.gates))
            self.leaves[name] = (next(rows), next(rows))
            shaped.append(self._shaped(name))
        self._stacked = [_stack(site) for site in zip(*shaped)]

    def site(self, index: int, parts: slice = slice(None)) -> tuple[Tensor, Tensor, Tensor]:
        """A [n, parts, R, K], B [n, parts, N, R] and c [n, views, parts, R] of a site, branches stacked along R."""
        A, B, c = self._stacked[index]
        return A[:, parts], B[:, parts], c[:, :, parts]

    def gradients(self, loss: Tensor, branches: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
        """d loss / d (weights [n, D], gates [n, Q]) of each branch, as flat fp32 rows."""
        chosen = {name: self.leaves[name] for name in branches}
        wanted = [leaf for leaves in chosen.values() for leaf in leaves if leaf.numel()]
        grads = iter(torch.autograd.grad(loss, wanted))
        return {name: (next(grads), next(grads) if gates.numel() else gates) for name, (_, gates) in chosen.items()}

    def _shaped(self, name: str) -> list[tuple[Tensor, Tensor, Tensor]]:
        """A, B and c of one branch, site by site."""
        sites, rank = self.bank.sites, self.bank.branches[name].rank
        weights, gates = self.leaves[name]
        n, counts = len(self.slots), [len(site.parts) * rank for site in sites]
        lengths = [(count * site.in_features, count * site.out_features) for site, count in zip(sites, counts)]
        pieces = iter(weights.split([length for pair in lengths for length in pair], dim=1))
        seen = self.bank.seen(name, self.views)[None, :, None]
        scales = gates[:, None] * seen if gates.shape[1] else seen.repeat(n, 1, sum(counts))
        shaped = []
        for site, c in zip(sites, scales.split(counts, dim=2)):
            parts = len(site.parts)
            a = next(pieces).view(n, parts, rank, site.in_features)
            b = next(pieces).view(n, parts, site.out_features, rank)
            shaped.append((a, b, c.view(n, len(self.views), parts, rank)))
        return shaped


def _stack(branches: Sequence[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """A, B and c of a site with the branches side by side along the rank."""
    if len(branches) == 1:
        return branches[0]
    A, B, c = zip(*branches)
    return torch.cat(A, dim=2), torch.cat(B, dim=3), torch.cat(c, dim=3)
