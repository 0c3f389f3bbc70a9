"""Steps as CUDA graphs: captured once per shape, then replayed with one launch.

A graph repeats the captured launches on the same memory. A step may therefore read nothing from the host but its
inputs, which are copied to the graph's buffers, and may not synchronize with the device.

The first replay of every graph is compared with the eager step from the same state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from fastdlp.engine.schedule import Inputs, Shape
from fastdlp.errors import FastdlpError

# (input buffer, shape, staged images) → losses [names, n]; see `schedule.Inputs` and `ClassificationTask.stage`.
StepFn = Callable[[Tensor, Shape, Tensor | None], Tensor]
T = TypeVar("T")

# Relative to the norm of the losses, and of the change of each tensor. A replay launches the same kernels on the same
# operands and is normally bit-identical, but a library may sum in another order during capture. The rounding, 2⁻⁸ in
# bf16, is amplified by AdamW where a gradient is nearly zero: 0.02 of an update's norm (tests/test_backends.py). A
# graph that reads other inputs or omits a tensor deviates by about 1.
TOLERANCE = 0.05


class Recorder(Protocol):
    """Runs a function eagerly or captures it."""

    def run(self, call: Callable[[], T]) -> T:
        """Run the function eagerly on the capture stream."""

    def record(self, call: Callable[[], T]) -> Callable[[], T]:
        """Capture the function; the result replays it and returns the same memory each time. Raises RuntimeError."""


class CudaRecorder:
    """Captures on its own stream. All graphs share a memory pool, since they never run concurrently."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def run(self, call: Callable[[], T]) -> T:
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = call()
        current.wait_stream(self.stream)
        return result

    def record(self, call: Callable[[], T]) -> Callable[[], T]:
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        try:
            # The prefetching thread pins memory meanwhile, which the default mode forbids in all threads.
            with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
                result = call()
        finally:
            torch.cuda.set_stream(current)  # torch does not restore the stream if a capture fails

        def replay() -> T:
            graph.replay()
            return result

        return replay


@dataclass
class _Captured:
    """The input buffers of a shape's steps, and its graph once it is captured."""

    buffer: Tensor
    staged: Tensor | None
    replay: Callable[[], Tensor] | None = None

    def copy_inputs(self, buffer: Tensor, staged: Tensor | None) -> None:
        self.buffer.copy_(buffer)
        if self.staged is not None and staged is not None:
            self.staged.copy_(staged)


class GraphedSteps:
    """Runs steps through graphs, one per shape.

    The first step of a shape runs eagerly: it compiles kernels, fills caches and allocates library workspaces, none of
    which may happen during capture. The second also runs eagerly, is captured, and is repeated from the same state by
    the graph's first replay. If the two differ by more than TOLERANCE, or the capture fails, the eager result of this
    step is used and all later steps run eagerly.

    With several processes each decides for its own GPU; the decisions may differ, since steps have the same batches and
    padding either way and no step waits for another process.

    Args:
        step: the step function.
        recorder: see `Recorder`.
        state: the tensors [slots, …] that a step modifies, in the rows of its slots.
        notice: called with the reason if graphs are disabled; None: raise an error instead (`--cuda-graph`).
    """

    def __init__(
        self,
        step: StepFn,
        recorder: Recorder,
        state: Callable[[], Sequence[Tensor]],
        notice: Callable[[str], None] | None = None,
    ) -> None:
        self.step, self.recorder, self.state, self.notice = step, recorder, state, notice
        self.captured: dict[Shape, _Captured] = {}
        self.off = False

    def __call__(self, buffer: Tensor, shape: Shape, staged: Tensor | None) -> Tensor:
        """The losses of a step, in newly allocated memory.

        Raises:
            FastdlpError: `notice` is None and the step cannot be captured or its replay deviates.
        """
        if self.off:
            return self.step(buffer, shape, staged)
        if shape not in self.captured:
            self.captured[shape] = _Captured(buffer.clone(), None if staged is None else staged.clone())
            return self.recorder.run(lambda: self.step(buffer, shape, staged))
        captured = self.captured[shape]
        captured.copy_inputs(buffer, staged)
        return self._first_replay(captured, shape) if captured.replay is None else captured.replay().clone()

    def _first_replay(self, captured: _Captured, shape: Shape) -> Tensor:
        """Run a step eagerly, capture it, and verify the replay from the same state; its losses."""
        slots, tensors = Inputs.unpack(captured.buffer, shape).slots, self.state()

        def rows() -> list[Tensor]:
            return [tensor.index_select(0, slots) for tensor in tensors]

        def restore(kept: Sequence[Tensor]) -> None:
            for tensor, own in zip(tensors, kept):
                tensor.index_copy_(0, slots, own)

        def call() -> Tensor:
            return self.step(captured.buffer, shape, captured.staged)

        before = rows()
        losses = self.recorder.run(call)
        after = rows()
        try:
            replay = self.recorder.record(call)
            restore(before)
            replayed = replay().clone()
            pairs = [(replayed, losses, torch.zeros_like(losses)), *zip(rows(), after, before)]
            errors = [error for error in (_relative_error(*pair) for pair in pairs) if not error <= TOLERANCE]
            reason = f"a replayed step differs by {errors[0]:.1g} of the eager step's change" if errors else ""
        except RuntimeError as error:  # includes out of memory
            reason = " ".join(str(error.__context__ or error).splitlines()[:1])
        if not reason:
            captured.replay = replay
            return replayed
        restore(after)
        self._disable(reason)
        return losses

    def _disable(self, reason: str) -> None:
        if self.notice is None:
            raise FastdlpError(f"a step cannot be captured as a CUDA graph ({reason}): leave out --cuda-graph")
        self.off = True
        self.captured.clear()  # frees the graphs' memory
        self.notice(f"without CUDA graphs: {reason}")


def _relative_error(actual: Tensor, expected: Tensor, start: Tensor) -> float:
    """‖actual − expected‖ / ‖expected − start‖; nan where one is not finite."""
    error, change = ((a - b).float().norm().item() for a, b in ((actual, expected), (expected, start)))
    return error / change if change else (error and float("inf"))


def cuda_graphs(
    device: torch.device, state: Callable[[], Sequence[Tensor]], notice: Callable[[str], None] | None = None
) -> Callable[[StepFn], StepFn]:
    """A `runner` for `Engine` that runs its steps as graphs on a CUDA device; see `GraphedSteps`."""

    def runner(step: StepFn) -> Any:
        return GraphedSteps(step, CudaRecorder(device), state, notice)

    return runner
