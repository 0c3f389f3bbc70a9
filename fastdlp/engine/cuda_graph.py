"""A step as a CUDA graph: recorded once for each shape, then one launch in place of thousands.

A graph repeats what was launched while it was recorded, on the same memory: a step may take nothing from the host but
its inputs, which are copied to where the graph reads them, and may not wait for the device.

No graph is trusted unseen: its first replay is compared with the eager step from the same state.
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

# Of the losses' norm, and of the norm of what the step changes. A replay launches the same kernels on the same numbers,
# so as a rule it has the same bits; a library may add in another order while it is recorded. That is rounding, 2⁻⁸ in
# bf16, which AdamW enlarges where a gradient is nearly zero: 0.02 of an update's norm (tests/test_backends.py). A graph
# that reads other inputs, or leaves a tensor out, is off by about 1.
TOLERANCE = 0.05


class Recorder(Protocol):
    """Runs a call eagerly or records it."""

    def run(self, call: Callable[[], T]) -> T:
        """The call as it is, where it would be recorded."""

    def record(self, call: Callable[[], T]) -> Callable[[], T]:
        """What repeats the call; it returns the same memory every time. Raises RuntimeError where that cannot be."""


class CudaRecorder:
    """Records on a stream of its own. All graphs draw on one pool of memory, since they never run at the same time."""

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
            # A thread that stages the next batch pins memory meanwhile, which the default mode forbids all threads.
            with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
                result = call()
        finally:
            torch.cuda.set_stream(current)  # torch leaves the recording stream in place where a recording fails

        def replay() -> T:
            graph.replay()
            return result

        return replay


@dataclass
class _Held:
    """Where a shape's steps find their inputs, and its graph once there is one."""

    buffer: Tensor
    staged: Tensor | None
    replay: Callable[[], Tensor] | None = None

    def take(self, buffer: Tensor, staged: Tensor | None) -> None:
        self.buffer.copy_(buffer)
        if self.staged is not None and staged is not None:
            self.staged.copy_(staged)


class GraphedSteps:
    """Runs a step through graphs, one for each shape.

    The first step of a shape runs as it is: it compiles kernels, fills caches and takes the memory of libraries, none
    of which may happen while recording. The second one runs as it is too, is recorded, and is run again from the same
    state as the graph's first replay. Where the two differ by more than TOLERANCE, or recording fails, this step's
    result is the eager one, and so is every later step.

    Of several processes each decides for its own GPU; the decision need not be the same, since steps are cut, padded
    and computed alike, and no step waits for another process.

    Args:
        step: what is run.
        recorder: see `Recorder`.
        state: the tensors [slots, …] that a step changes, in the rows of its slots.
        notice: told in a line why graphs are off; None: that is an error, because they were asked for.
    """

    def __init__(
        self,
        step: StepFn,
        recorder: Recorder,
        state: Callable[[], Sequence[Tensor]],
        notice: Callable[[str], None] | None = None,
    ) -> None:
        self.step, self.recorder, self.state, self.notice = step, recorder, state, notice
        self.held: dict[Shape, _Held] = {}
        self.off = False

    def __call__(self, buffer: Tensor, shape: Shape, staged: Tensor | None) -> Tensor:
        """The losses of a step, in memory of their own.

        Raises:
            FastdlpError: graphs were asked for, and the step cannot be recorded or is not repeated right.
        """
        if self.off:
            return self.step(buffer, shape, staged)
        if shape not in self.held:
            self.held[shape] = _Held(buffer.clone(), None if staged is None else staged.clone())
            return self.recorder.run(lambda: self.step(buffer, shape, staged))
        held = self.held[shape]
        held.take(buffer, staged)
        return self._first_replay(held, shape) if held.replay is None else held.replay().clone()

    def _first_replay(self, held: _Held, shape: Shape) -> Tensor:
        """The losses of a step that is run, recorded, and run again from where it began."""
        slots, tensors = Inputs.unpack(held.buffer, shape).slots, self.state()

        def rows() -> list[Tensor]:
            return [tensor.index_select(0, slots) for tensor in tensors]

        def restore(kept: Sequence[Tensor]) -> None:
            for tensor, own in zip(tensors, kept):
                tensor.index_copy_(0, slots, own)

        def call() -> Tensor:
            return self.step(held.buffer, shape, held.staged)

        before = rows()
        losses = self.recorder.run(call)
        after = rows()
        try:
            replay = self.recorder.record(call)
            restore(before)
            replayed = replay().clone()
            pairs = [(replayed, losses, torch.zeros_like(losses)), *zip(rows(), after, before)]
            wrong = [off for off in (_off(*pair) for pair in pairs) if not off <= TOLERANCE]
            why = f"a replayed step is off by {wrong[0]:.1g} of what the eager one changes" if wrong else ""
        except RuntimeError as error:  # also where memory does not hold the graph beside the eager steps
            why = " ".join(str(error.__context__ or error).splitlines()[:1])
        if not why:
            held.replay = replay
            return replayed
        restore(after)
        self._give_up(why)
        return losses

    def _give_up(self, why: str) -> None:
        if self.notice is None:
            raise FastdlpError(f"a step cannot be a CUDA graph ({why}): leave out --cuda-graph")
        self.off = True
        self.held.clear()  # and with the graphs their memory
        self.notice(f"without CUDA graphs: {why}")


def _off(value: Tensor, right: Tensor, start: Tensor) -> float:
    """‖value − right‖ / ‖right − start‖: the error as a share of the change; no number where one is not finite."""
    error, change = ((a - b).float().norm().item() for a, b in ((value, right), (right, start)))
    return error / change if change else (error and float("inf"))


def cuda_graphs(
    device: torch.device, state: Callable[[], Sequence[Tensor]], notice: Callable[[str], None] | None = None
) -> Callable[[StepFn], StepFn]:
    """What an engine takes as its `runner`: its steps as graphs on a CUDA device; see `GraphedSteps`."""

    def runner(step: StepFn) -> Any:
        return GraphedSteps(step, CudaRecorder(device), state, notice)

    return runner
