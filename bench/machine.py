"""What a figure is worthless without: the machine, the versions and the commit."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from fastdlp.errors import FastdlpError


def machine(device: torch.device) -> dict[str, Any]:
    """Device, threads and commit."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        name = next(
            (line.split(":")[1].strip() for line in lines if line.startswith("model name")),
            platform.processor(),
        )
    commit = os.environ.get("FASTDLP_COMMIT")  # for a copy of the tree without its history
    if not commit:
        command = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    return {"device": name, "threads": torch.get_num_threads(), "commit": commit or "unknown"}


def peft_versions() -> dict[str, str]:
    """What a result with PEFT's rows names. Raises FastdlpError where it is not installed."""
    try:
        import peft
        import transformers
    except ImportError:
        raise FastdlpError(
            "the PEFT baseline is not installed: pip install '.[bench]' in the checkout, or give --without-peft"
        ) from None
    return {"peft": peft.__version__, "transformers": transformers.__version__}
