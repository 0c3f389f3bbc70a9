"""Tables on a device that follow from a split of rows: kept, so that a step copies none, but not without bound."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")

RECENT = 1024  # tables of each kind; at 32,000 rows the largest kind takes 128 KB each


def device_table(make: Callable[P, T]) -> Callable[P, T]:
    """Keep what `make` returned for its latest RECENT arguments, and for good what a CUDA graph was captured with.

    A graph reads a table by its address, so that one may never be freed. Making one copies from the host, which a
    capture does not allow: the same step has to run once before it is captured.
    """
    recent = lru_cache(RECENT)(make)
    captured: dict[object, T] = {}

    @wraps(make)
    def table(*args: P.args, **kwargs: P.kwargs) -> T:
        key = args, *kwargs.items()
        if captured and key in captured:
            return captured[key]
        found = recent(*args, **kwargs)  # type: ignore[arg-type]
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            captured[key] = found
        return found

    return table
