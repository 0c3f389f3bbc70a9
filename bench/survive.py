"""What one form dies of is written down, and the others are still measured."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from fastdlp.errors import FastdlpError


@contextmanager
def survive(what: str, failed: list[str]) -> Iterator[None]:
    """Whatever is raised inside becomes a line in `failed`; of a defect the traceback goes to stderr too.

    An hour on a GPU is not repeated for one kernel that does not compile there. Who measures fails in the end, with
    `failed` as the reason.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, FastdlpError):
            traceback.print_exc()
        line = " ".join(str(error).split())[:400]
        line = line if isinstance(error, FastdlpError) else f"{type(error).__name__} {line}"
        failed.append(line if line.startswith(what) else f"{what}: {line}")
