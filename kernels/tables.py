"""Device tensors that depend only on how rows are grouped: cached, so that a step copies none, with bounded memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")

CACHED_TABLES = 1024  # of each kind; at 32,000 rows the largest kind takes 128 KB each


def device_table(build: Callable[P, T]) -> Callable[P, T]:
    """Cache what `build` returned for its latest CACHED_TABLES arguments, permanently if a CUDA graph captured it.

    A graph reads a table by its address, so the table must never be freed. Building one copies from the host, which is
    not allowed during capture: the same step has to run once before it is captured.
    """
    recent = lru_cache(CACHED_TABLES)(build)
    captured: dict[object, T] = {}

    @wraps(build)
    def table(*args: P.args, **kwargs: P.kwargs) -> T:
        key = args, *kwargs.items()
        if captured and key in captured:
            return captured[key]
        result = recent(*args, **kwargs)  # type: ignore[arg-type]
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            captured[key] = result
        return result

    return table
