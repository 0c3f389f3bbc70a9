"""Losses: task loss and distillation over the logits of many clients at once.

Tensors are padded to the largest batch: [n, S, ...] for n slots and S samples, with a mask. A loss is a vector [n], one
mean per slot, so that the gradient of its sum with respect to a slot's parameters is that of the slot's own loss.

The published descriptions of FEDDLP differ in task loss, distillation direction, temperature and the logits
that are distilled; each is a field here (`fastdlp.config.PROTOCOLS` holds the two presets).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch.nn.functional as F
from torch import Tensor

# Logit of a padded column. Finite, so that 0 · (log p − log q) stays 0 and its gradient too.
PADDED = -1e9


@dataclass(frozen=True)
class Outputs:
    """Normalized image and text features of one view of the active slots, with labels.

    Shapes: image [n, S, d]; text [K, d], shared by all slots, or [n, K, d]; labels [n, S] int64 (any class
    where padded); mask [n, S] bool; scale = exp(logit_scale). `classified` [n, S, K]: the logits of a classifier, which
    replace similarities with the prompts.
    """

    image: Tensor
    text: Tensor
    labels: Tensor
    mask: Tensor
    scale: float
    classified: Tensor | None = None
    constant_of: Outputs | None = None  # the outputs that these are a detached copy of

    @cached_property
    def counts(self) -> Tensor:
        """Samples of every slot without padding, [n] int64."""
        return self.mask.sum(1)

    @cached_property
    def class_logits(self) -> Tensor:
        """[n, S, K]: scaled cosine similarity of every sample with every class prompt, or the classifier's."""
        if self.classified is not None:
            return self.classified
        if self.constant_of is not None:
            return self.constant_of.class_logits.detach()
        return self.scale * (self.image @ self.text.transpose(-1, -2))

    @cached_property
    def pair_logits(self) -> Tensor:
        """[n, S, S]: every sample (row) with the caption of every sample of its batch (column)."""
        text = self.text.expand(len(self.labels), -1, -1)
        captions = text.gather(1, self.labels[:, :, None].expand(-1, -1, text.shape[2]))
        return self.scale * (self.image @ captions.transpose(1, 2))

    def detach(self) -> Outputs:
        """A detached copy, for use as a teacher."""
        classified = None if self.classified is None else self.classified.detach()
        constants = {"image": self.image.detach(), "text": self.text.detach(), "classified": classified}
        return replace(self, **constants, constant_of=self)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Objective:
    """The options of a protocol that concern losses; see the table in the README."""

    task_loss: str = "cross-entropy"  # or "contrastive": symmetric, in the batch, targets 0..S−1
    kd_direction: str = "student-teacher"  # D_KL(student ‖ teacher), or "teacher-student"
    kd_temperature: float = 1.0  # the loss is scaled by T²
    kd_logits: str = "class"  # mean over samples of [S, K], or "batch": both axes of [S, S], averaged

    def task(self, out: Outputs) -> Tensor:
        """The task loss of every slot, [n]."""
        if self.task_loss == "cross-entropy":
            log_p = F.log_softmax(out.class_logits, dim=-1).flatten(0, 1)
            losses = F.nll_loss(log_p, out.labels.flatten(), reduction="none")
            return _mean(losses.view(out.labels.shape), out)
        by_image, by_text = (-F.log_softmax(logits, dim=-1).diagonal(dim1=1, dim2=2) for logits in _axes(out))
        return _mean((by_image + by_text) / 2, out)

    def distil(self, student: Outputs, teacher: Outputs) -> Tensor:
        """The distillation loss of every slot, [n]. Gradients flow to the outputs that are not detached."""
        if self.kd_logits == "class":
            return _mean(self._kl(student.class_logits, teacher.class_logits), student)
        by_image, by_text = (self._kl(s, t) for s, t in zip(_axes(student), _axes(teacher)))
        return _mean((by_image + by_text) / 2, student)

    def _kl(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Kullback-Leibler divergence over the last axis, times T²: [..., C] → [...]."""
        T = self.kd_temperature
        scaled = (student, teacher) if T == 1 else (student / T, teacher / T)
        log_s, log_t = (F.log_softmax(logits, dim=-1) for logits in scaled)
        log_p, log_q = (log_s, log_t) if self.kd_direction == "student-teacher" else (log_t, log_s)
        divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
        return divergence if T == 1 else divergence * T**2


def _axes(out: Outputs) -> tuple[Tensor, Tensor]:
    """In-batch logits by image and by text, padded columns out of the softmax."""
    by_image = out.pair_logits
    hidden = ~out.mask[:, None, :]
    return by_image.masked_fill(hidden, PADDED), by_image.transpose(1, 2).masked_fill(hidden, PADDED)


def _mean(values: Tensor, out: Outputs) -> Tensor:
    """Mean over the unpadded samples of a slot: [n, S] → [n]. Padding repeats a sample and so adds no nan."""
    return (values * out.mask).sum(1) / out.counts
