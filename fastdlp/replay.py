"""A step as a CUDA graph: recorded once for each shape, then one launch in place of thousands.

A graph repeats what was launched while it was recorded, on the same memory: a step may take nothing from the host but
its inputs, which are copied to where the graph reads them, and may not wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdlp.errors import FastdlpError
from fastdlp.plan import Shape

# (words, shape, staged) → losses [names, n]; see `fastdlp.plan.Inputs` and `ClassificationTask.stage`.
Step = Callable[[Tensor, Shape, Tensor | None], Tensor]


@dataclass(frozen=True)
class _Recorded:
    graph: torch.cuda.CUDAGraph
    words: Tensor
    staged: Tensor | None
    losses: Tensor


class CudaGraphs:
    """Runs a step through graphs, one for each shape.

    The first step of a shape runs as it is, on the stream that records: it compiles kernels, fills caches and takes the
    memory of libraries, none of which may happen while recording. The second one is recorded. All graphs draw on one
    pool of memory, since they never run at the same time and what they return is copied out.

    Args:
        step: what is run.
        device: a CUDA device.
    """

    def __init__(self, step: Step, device: torch.device) -> None:
        self.step, self.device = step, device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self.recorded: dict[Shape, _Recorded | None] = {}

    def __call__(self, words: Tensor, shape: Shape, staged: Tensor | None) -> Tensor:
        """The losses of a step, in memory of their own.

        Raises:
            FastdlpError: the step cannot be recorded.
        """
        if shape not in self.recorded:
            self.recorded[shape] = None
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.stream):
                losses = self.step(words, shape, staged)
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
            return losses
        held = self.recorded[shape]
        if held is None:
            held = self.recorded[shape] = self._record(words, shape, staged)
        held.words.copy_(words)
        if held.staged is not None and staged is not None:
            held.staged.copy_(staged)
        held.graph.replay()
        return held.losses.clone()

    def _record(self, words: Tensor, shape: Shape, staged: Tensor | None) -> _Recorded:
        words, staged = words.clone(), None if staged is None else staged.clone()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                losses = self.step(words, shape, staged)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise FastdlpError(
                f"a step cannot be recorded as a CUDA graph ({reason}): leave out --cuda-graph"
            ) from error
        return _Recorded(graph, words, staged, losses)
