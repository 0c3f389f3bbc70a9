"""What a CUDA graph does, on a CPU: operations are recorded with the tensors they ran on, and run again on those.

What the host put in while recording (a number, a tensor made from a list, a choice of shape or branch) comes back
unchanged at every replay, as in a graph. So a step that replays right on other inputs has taken nothing from the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

T = TypeVar("T")


class _Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            raise AssertionError("the host waits for the device")
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out


class Recorder:
    """A `replay.Recorder` whose recording runs the call as well, which a CUDA graph's does not."""

    def __init__(self) -> None:
        self.replays = 0

    def run(self, call: Callable[[], T]) -> T:
        return call()

    def record(self, call: Callable[[], T]) -> Callable[[], T]:
        with _Calls() as recorded:
            result = call()

        @torch.no_grad()
        def replay() -> T:
            self.replays += 1
            for func, args, kwargs, out in recorded.calls:
                if func.is_view:
                    continue
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    if isinstance(old, Tensor) and old is not new and old.data_ptr() != new.data_ptr():
                        old.detach().copy_(new)
            return result

        return replay
