"""Choice of the backend: the Triton kernels, or torch's library calls. Does not import Triton."""

from __future__ import annotations

import importlib.util
import os

import torch

from fastdlp.kernels import tiles
from fastdlp.kernels.launch import is_dry

BACKENDS = ("auto", "triton", "torch")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_RANK = 64  # of all parts and branches of one linear together; tiles were not compiled for more and may spill


def interpreted() -> bool:
    """Whether Triton runs in its interpreter (TRITON_INTERPRET=1 before its import): slow, on any CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")  # as Triton reads it


def choose_backend(backend: str, device: torch.device, dtype: torch.dtype, rank: int = 0) -> str:
    """ "triton" or "torch" for tensors of this device and dtype, and a rank over all parts and branches of a linear.

    "auto" is Triton on a GPU whose architecture has measured tiles in tiles.json, and torch otherwise.

    Raises:
        ValueError: an unknown backend, or "triton" where it cannot run; the message says why.
    """
    if backend == "torch":
        return backend
    if backend == "auto":
        fits = device.type == "cuda" and dtype in DTYPES and rank <= MAX_RANK and _installed()
        return "triton" if fits and tiles.measured(device, dtype.itemsize) else "torch"
    if backend != "triton":
        raise ValueError(f"unknown backend {backend!r}: choose from {', '.join(BACKENDS)}")
    if not _installed():
        raise ValueError("the package triton is not installed: pip install triton, or use the backend torch")
    if dtype not in DTYPES:
        raise ValueError(f"Triton's kernels take fp32, fp16 and bf16, not {dtype}: use the backend torch")
    if rank > MAX_RANK:
        raise ValueError(
            f"Triton's kernels take {MAX_RANK} ranks a linear over all parts and branches, not {rank}: "
            "use the backend torch"
        )
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        raise ValueError("Triton's kernels need a GPU of compute capability 8.0 (A100) or later: use the backend torch")
    if device.type == "cuda" or is_dry():
        return backend
    if not interpreted():
        raise ValueError(
            f"Triton needs a CUDA GPU, not {device.type} (TRITON_INTERPRET=1 runs it there, slowly, for tests)"
        )
    if dtype == torch.bfloat16:
        raise ValueError("Triton's interpreter computes bf16 products wrongly: use fp32 or fp16 there")
    return backend


# Set by torch.compiler.assume_constant_result, whose import would load all of Dynamo. The result is constant for a
# device and dtype, so a compiled graph may inline it.
choose_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None
