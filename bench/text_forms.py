"""The forms of a federated round with adapters in the text tower: fastdlp beside the same without its savings.

`uncached` runs what fastdlp keeps: all tokens of every prompt, the last block for all of them, and the frozen image
tower on the batch in each forward of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdlp.adapters.bank import Adapters
from fastdlp.bench import engine, flops
from fastdlp.bench.problem import Problem
from fastdlp.bench.round_form import Form, References, told
from fastdlp.bench.runner import Runner
from fastdlp.engine.device import DTYPES
from fastdlp.engine.tasks import ClassificationTask, Samples
from fastdlp.methods.losses import Outputs
from fastdlp.run.build_task import moved_stem

GROUP = "FEDDLP, text"


class UncachedTask:
    """A text task whose images go through the frozen image tower, all tokens of it, in every forward.

    Args:
        task: over image features that nobody reads.
        problem: whose images.
        precision: of the image tower.
        device: of everything.
    """

    def __init__(self, task: ClassificationTask, problem: Problem, precision: str, device: torch.device) -> None:
        self.task, self.scoring_batch = task, task.scoring_batch
        self.tower = replace(problem.clip.image.to(device, DTYPES[precision]), pooled_only=False)
        self.stem = moved_stem(problem.clip.image_stem, device)
        self.pixels = problem.pixels.flatten(0, 2).to(device)
        self.stage = None

    def rows(self, samples: int) -> int:
        return self.task.rows(samples)

    def forward(self, samples: Samples, views: int, adapters: Adapters | None, scoring: bool = False) -> list[Outputs]:
        outputs = self.task.forward(samples, views, adapters, scoring)
        return [replace(out, image=self._images(samples)) for out in outputs]

    @torch.no_grad()
    def _images(self, samples: Samples) -> Tensor:
        """[n, S, d]; all clients' batches are full."""
        tokens = self.stem(self.pixels[samples.ids.flatten()]).to(self.tower.proj.weight.dtype)
        return F.normalize(self.tower.features(tokens), dim=-1).view(*samples.ids.shape, -1)


def uncached_rounds(problem: Problem, precision: str, device: torch.device) -> engine.EngineRounds:
    """FEDDLP in the text tower without what is exactly saved."""
    unread = torch.ones(problem.labels.numel(), problem.text.shape[1], device=device)
    plain = engine.text_task(problem, unread, precision, device, "torch", plain=True)
    task = UncachedTask(plain, problem, precision, device)
    return engine.text_rounds_over(problem, task, device, "torch", "feddlp")


def text_forms(problem: Problem, backends: Sequence[str], with_peft: bool) -> list[Form]:
    """The plain form, then fastdlp's in each backend. None of them needs PEFT, given or not."""
    flop, name = flops.text_step(problem, 3, 2), _plain(problem)
    forms = [Form("uncached", name, GROUP, "feddlp", 3, 2, flop, uncached_rounds, is_reference=True)]
    return forms + [_ours(backend, flop) for backend in backends]


def text_references(problem: Problem, device: torch.device, with_peft: bool) -> References:
    """What losses are compared with where the plain form is not in the run."""
    return {"feddlp": (_plain(problem), lambda: uncached_rounds(problem, "fp32", device).first_steps())}


def _plain(problem: Problem) -> str:
    return f"all {problem.ids.shape[1]} tokens, images anew"


def _ours(backend: str, flop: int) -> Form:
    def make(problem: Problem, precision: str, device: torch.device) -> Runner:
        return engine.text_rounds(problem, precision, device, backend)

    return Form("fastdlp", told("fastdlp", backend), GROUP, "feddlp", 3, 2, flop, make, backend=backend)
