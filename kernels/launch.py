"""The one door through which every kernel is launched, so that launches can be counted, or listed without a GPU."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """One launch: the jit function, its positional operands, and its constexprs with num_warps and num_stages."""

    kernel: Any
    grid: tuple[int, ...]
    operands: tuple[Any, ...]
    options: dict[str, Any]


_recorder: ContextVar[tuple[list[Launch], bool] | None] = ContextVar("recorder", default=None)


def launch(kernel: Any, grid: tuple[int, ...], first: Tensor, *operands: Any, **options: Any) -> None:
    """Launch on the device of the first operand; nothing to do for an empty grid."""
    if not math.prod(grid):
        return
    recorder = _recorder.get()
    if recorder is not None:
        launches, dry = recorder
        launches.append(Launch(kernel, grid, (first, *operands), options))
        if dry:
            return
    with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
        kernel[grid](first, *operands, **options)


def is_dry() -> bool:
    """Whether launches are only listed here, so that no device is needed for them."""
    recorder = _recorder.get()
    return recorder is not None and recorder[1]


@contextmanager
def recording(dry: bool = False) -> Iterator[list[Launch]]:
    """List what is launched inside; with `dry` nothing is, so operands may be on the device "meta"."""
    launches: list[Launch] = []
    token = _recorder.set((launches, dry))
    try:
        yield launches
    finally:
        _recorder.reset(token)
