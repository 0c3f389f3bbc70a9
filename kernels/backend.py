"""Which of the two forms runs: Triton's kernels, or the libraries that torch calls. Does not import Triton."""

from __future__ import annotations

import importlib.util
import os

import torch

from fastdlp.kernels import tiles

BACKENDS = ("auto", "triton", "torch")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def interpreted() -> bool:
    """Whether Triton runs in its interpreter (TRITON_INTERPRET=1 before its import): slow, on any CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def choose_backend(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """ "triton" or "torch" for tensors of this device and dtype.

    "auto" takes Triton on a GPU whose architecture has measured tiles in tiles.json, and torch otherwise.

    Raises:
        ValueError: an unknown backend, or "triton" where it cannot run; the message says why.
    """
    if backend == "torch":
        return backend
    if backend == "auto":
        fits = device.type == "cuda" and dtype in DTYPES and _installed() and tiles.measured(device)
        return "triton" if fits else "torch"
    if backend != "triton":
        raise ValueError(f"unknown backend {backend!r}: choose from {', '.join(BACKENDS)}")
    if not _installed():
        raise ValueError("backend triton: the package triton is not installed (pip install triton)")
    if dtype not in DTYPES:
        raise ValueError(f"backend triton takes fp32, fp16 and bf16, not {dtype}: use the backend torch")
    if device.type != "cuda" and not interpreted():
        raise ValueError(
            f"backend triton needs a CUDA GPU, not {device.type} (TRITON_INTERPRET=1 runs it there, slowly, for tests)"
        )
    if device.type != "cuda" and dtype == torch.bfloat16:
        raise ValueError("backend triton: the interpreter computes bf16 products wrongly; use fp32 or fp16 there")
    return backend


def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None
