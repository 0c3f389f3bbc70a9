"""What torchrun tells a process about itself. Standard library only: the command line asks before torch is loaded."""

from __future__ import annotations

import os

from fastdlp.errors import FastdlpError


def world_size() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def leads() -> bool:
    """Whether this process is the one that writes and shows: torchrun's first, or the only one."""
    return world_size() == 1 or os.environ.get("RANK") == "0"


def refuse_several() -> None:
    """Raises FastdlpError where torchrun started several processes."""
    if world_size() > 1:
        raise FastdlpError("torchrun shards fastdlp train only: run this without it, in one process")
