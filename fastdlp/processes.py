"""torchrun's environment variables. Standard library only: the command line reads them before torch is loaded."""

from __future__ import annotations

import os

from fastdlp.errors import FastdlpError


def world_size() -> int:
    """Number of processes that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def leads() -> bool:
    """Whether this process is rank 0, or the only one; it alone writes files and prints."""
    return world_size() == 1 or os.environ.get("RANK") == "0"


def refuse_several() -> None:
    """Raise FastdlpError where torchrun started several processes."""
    if world_size() > 1:
        raise FastdlpError("torchrun shards fastdlp train only: run this without it, in one process")
