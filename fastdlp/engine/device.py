"""Device, dtype and backend of a run, and the memory of the device."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from fastdlp.engine.distributed import SINGLE_PROCESS, ProcessGroup
from fastdlp.errors import FastdlpError
from fastdlp.kernels.backend import choose_backend
from fastdlp.selection import read_backend

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def pick_device(name: str, group: ProcessGroup = SINGLE_PROCESS) -> torch.device:
    """The device that `--device` names; auto uses CUDA if available. Each of several processes gets its own GPU.

    Raises:
        FastdlpError: CUDA is not available, or there are more processes than GPUs.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if group.world_size > 1 and name.startswith("cuda") and torch.cuda.is_available():
        return _own_gpu(name, group.local_rank)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise FastdlpError(f"unknown --device {name!r}: choose from auto, cpu, cuda, cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise FastdlpError(
            f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices here; use --device cpu"
        )
    return device


def _own_gpu(name: str, local_rank: int) -> torch.device:
    """The GPU of one of several processes; becomes torch's current device, which Triton and NCCL use."""
    if name != "cuda":
        raise FastdlpError(f"--device {name} names one GPU for several processes: use --device cuda, one GPU for each")
    if local_rank >= torch.cuda.device_count():
        raise FastdlpError(
            f"more processes than GPUs: torch sees {torch.cuda.device_count()} CUDA devices here; start as many with "
            "--nproc-per-node, or use --device cpu"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def pick_backend(name: str, device: torch.device, dtype: torch.dtype, ranks: int = 0) -> Any:
    """The backend that `--backend` names, "triton" or "torch", or a recorded selection; `ranks` of the widest linear.

    Raises:
        FastdlpError: "triton" where Triton cannot run.
    """
    requested = read_backend(name)
    try:
        backend = choose_backend(requested if isinstance(requested, str) else "triton", device, dtype, ranks)
    except ValueError as error:
        raise FastdlpError(f"--backend {name}: {error}") from None
    return backend if isinstance(requested, str) else requested


def must_measure(name: str, device: torch.device, dtype: torch.dtype, ranks: int) -> bool:
    """Whether `--backend auto` has to measure: Triton can run, and tiles.json has no measured tiles for the device."""
    if name != "auto" or device.type != "cuda" or choose_backend(name, device, dtype, ranks) == "triton":
        return False
    try:
        return choose_backend("triton", device, dtype, ranks) == "triton"
    except ValueError:
        return False


def memory_of(device: torch.device) -> int:
    """Total bytes of the device's memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_memory(device: torch.device) -> int:
    """Free bytes of the device's memory for this process; the total where the system does not report it."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), memory_of(device))
