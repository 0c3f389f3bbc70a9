"""What is computed once in a session, by whichever worker needs it first."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable
from pathlib import Path


def once(folder: Path, fill: Callable[[Path], object]) -> Path:
    """`folder`, which `fill` creates and writes to; other workers wait until it is complete."""
    done = folder.with_name(f".{folder.name}.done")
    with open(folder.with_name(f".{folder.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed
            fill(folder)
            done.touch()
    return folder
