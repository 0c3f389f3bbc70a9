"""The losses of a round: means per client, and the first that is not finite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fastdlp.engine.distributed import ProcessGroup
from fastdlp.engine.schedule import StepPlan


@dataclass
class RoundLosses:
    """Losses of one round: per name and slot the mean over the samples of the round (nan: no step)."""

    means: dict[str, np.ndarray] = field(default_factory=dict)
    steps: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    not_finite: dict[int, tuple[int, str]] = field(default_factory=dict)  # slot → (step, loss) of its first such loss
    diverged: list[int] = field(default_factory=list)  # slots whose weights are not finite
    batches: int = 0  # steps, as they were computed for several clients together
    samples: int = 0  # of all clients' steps
    computed: int = 0  # samples that were computed, padding included


def mean_losses(
    plans: Sequence[tuple[StepPlan, Sequence[Tensor]]], names: Sequence[str], steps: Mapping[int, int], slots: int
) -> RoundLosses:
    """Means over a round; all losses are copied to the CPU at once.

    Args:
        plans: plans with the losses of their steps, [names, n] each.
        names: of the losses.
        steps: number of steps of each active slot, of all processes.
        slots: number of slots.
    """
    result = RoundLosses(steps=np.zeros(slots, np.int64))
    for slot, count in steps.items():
        result.steps[slot] = count
    losses = [loss for _, of_plan in plans for loss in of_plan]
    if not losses:
        return result
    losses_cpu = torch.cat([loss.flatten() for loss in losses]).double().cpu().numpy()
    step_of = np.zeros(slots, np.int64)
    weight = np.zeros(slots)
    totals = np.zeros((len(names), slots))
    for plan, _ in plans:
        result.batches += len(plan)
        result.samples += plan.samples
        result.computed += plan.computed
        for step in plan.steps:
            active, sizes = [slot for slot, _ in step], np.array([len(samples) for _, samples in step])
            values, losses_cpu = np.split(losses_cpu, [len(names) * len(step)])
            values = values.reshape(-1, len(step))
            for name, column in np.argwhere(~np.isfinite(values)):
                result.not_finite.setdefault(active[column], (int(step_of[active[column]]), names[name]))
            totals[:, active] += values * sizes
            weight[active] += sizes
            step_of[active] += 1
    with np.errstate(invalid="ignore"):
        result.means = dict(zip(names, totals / weight))
    return result


def gather_losses(own: RoundLosses, owners: Sequence[int], group: ProcessGroup) -> RoundLosses:
    """The losses of all slots, each from the rank that trained it; slots that diverged on any rank."""
    if group.world_size == 1:
        return own
    parts = group.all_gather(
        {
            "means": {name: mean.tolist() for name, mean in own.means.items()},
            "not_finite": [(step, slot, name) for slot, (step, name) in own.not_finite.items()],
            "diverged": own.diverged,
            "counts": [own.batches, own.samples, own.computed],
        }
    )
    names = dict.fromkeys(name for part in parts for name in part["means"])
    missing = [float("nan")] * len(owners)  # of a rank without training samples
    means = {
        name: np.array([parts[owner]["means"].get(name, missing)[slot] for slot, owner in enumerate(owners)])
        for name in names
    }
    not_finite = sorted(entry for part in parts for entry in part["not_finite"])
    diverged = sorted({slot for part in parts for slot in part["diverged"]})
    batches, samples, computed = zip(*(part["counts"] for part in parts))
    first = {slot: (step, name) for step, slot, name in not_finite}
    return RoundLosses(means, own.steps, first, diverged, max(batches), sum(samples), sum(computed))
