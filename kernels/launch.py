"""The single entry point for launches, so that they can be counted, or listed without a GPU."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
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


# A plain global and not a context variable: on a GPU the backward runs in autograd's own threads.
_recorder: tuple[list[Launch], bool] | None = None


def launch(kernel: Any, grid: tuple[int, ...], first: Any, *operands: Any, **options: Any) -> None:
    """Launch on the device of the first operand, a tensor or a tensor descriptor; an empty grid is skipped."""
    if not math.prod(grid):
        return
    if _recorder is not None:
        launches, dry = _recorder
        launches.append(Launch(kernel, grid, (first, *operands), options))
        if dry:
            return
    tensor: Tensor = first if isinstance(first, Tensor) else first.base
    with torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext():
        # Triton 3.10 disables it by default; results and register counts here assume it.
        kernel[grid](first, *operands, enable_fp_fusion=True, **options)


def is_dry() -> bool:
    """Whether launches are only recorded, so that no device is needed for them."""
    return _recorder is not None and _recorder[1]


@contextmanager
def recording(dry: bool = False) -> Iterator[list[Launch]]:
    """Record the launches inside; with `dry` nothing runs, so operands may be on the device "meta"."""
    global _recorder
    before = _recorder
    launches: list[Launch] = []
    _recorder = (launches, dry)
    try:
        yield launches
    finally:
        _recorder = before


def row_stride(tensor: Tensor | None) -> int:
    """Elements between rows, 0 without a tensor."""
    return 0 if tensor is None else tensor.stride(0)


def precision(x: Tensor) -> str:
    """Triton's input_precision for products of x: tf32 for fp32 only where torch allows it for its own."""
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if x.is_cuda and x.dtype == torch.float32 and allowed else "ieee"


def last_contiguous(tensor: Tensor) -> Tensor:
    """The tensor, copied only if its last dimension is not contiguous."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()
