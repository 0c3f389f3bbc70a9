"""Pruning of rank components: the thresholds that SoRA's gates pass after each optimizer step.

In Triton: `adamw_triton._threshold`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def soft_threshold(v: Tensor, xi: Tensor) -> Tensor:
    """T_ξ(v) = sign(v) · max(|v| − ξ, 0) (SoRA; section IV of the FEDDLP paper)."""
    return v.sign() * (v.abs() - xi).clamp(min=0)


def reference_threshold(v: Tensor, xi: Tensor) -> Tensor:
    """As in the authors' code: shrink by ξ, then zero all below ξ. Its dead zone is 2ξ wide."""
    v = torch.where(v > xi, v - xi, v)
    v = torch.where(v < -xi, v + xi, v)
    return torch.where(v.abs() < xi, torch.zeros_like(v), v)


THRESHOLDS = {"soft": soft_threshold, "reference": reference_threshold}
