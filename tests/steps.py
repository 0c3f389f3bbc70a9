"""Random images, and a step's samples as the engine hands them to a task."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fastdlp.engine.schedule import StepPlan
from fastdlp.engine.tasks import ClassificationTask, Samples


class Images:
    """Random pixels by sample number."""

    def __init__(self, n: int, size: int) -> None:
        self.pixels = torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.pixels)

    def __call__(self, samples: np.ndarray) -> torch.Tensor:
        return self.pixels[torch.from_numpy(samples)]

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels


def samples_of(ids: Sequence[np.ndarray], labels: np.ndarray, task: ClassificationTask) -> Samples:
    """One batch for each of several slots, on the CPU."""
    plan = StepPlan([list(enumerate(ids))], lambda slot: slot, torch.device("cpu"))
    staged = None if task.stage is None else task.stage(plan.ids(0))
    return Samples.unpack(plan.buffers[0], plan.shapes[0], torch.from_numpy(labels), staged)[1]
