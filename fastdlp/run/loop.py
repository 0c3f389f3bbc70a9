"""The loop over rounds, for one run or for several that share an engine.

With several processes (`fastdlp.engine.distributed`) all execute the same loop and hold the same results after each
round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from fastdlp.engine.engine import Engine
from fastdlp.engine.round_losses import RoundLosses, gather_losses
from fastdlp.errors import FastdlpError
from fastdlp.run.recorder import Recorder, zero_shot_accuracy
from fastdlp.run.setup import Callbacks


class Stopped(Exception):
    """`Callbacks.should_stop` returned True. The run can be resumed."""

    def __init__(self, run: Path, finished: int, rounds: int, command: str = "train") -> None:
        super().__init__(f"stopped after round {finished} of {rounds}; continue with: fastdlp {command} --resume {run}")
        self.run, self.finished, self.rounds = run, finished, rounds


def run_rounds(
    recorders: Sequence[Recorder],
    finished: int,
    callbacks: Callbacks,
    start_time: float,
    checkpoint: Callable[[int], None] | None = None,
    on_failure: Callable[[str, str], None] | None = None,
) -> list[Recorder]:
    """Run the rounds after `finished`; returns the recorders of the runs that completed.

    Args:
        recorders: of runs that share an engine; `callbacks.started` receives the first.
        start_time: `time.perf_counter()` before the preparation.
        checkpoint: saves the state after a round instead of each run's own checkpoint.
        on_failure: called with the folder name of a run that diverged and the reason; it takes no further part.

    Raises:
        FastdlpError: a run diverged and there is no `on_failure`; out of memory; a failed write.
        Stopped: `callbacks.should_stop` returned True.
    """
    running, first = list(recorders), recorders[0]
    engine, config = first.federation.engine, first.federation.config
    rounds = config.rounds or 0

    def save(number: int) -> None:
        if checkpoint is not None:
            checkpoint(number)
        else:
            for recorder in running:
                recorder.checkpoint(number)

    zero_shot = zero_shot_accuracy(first.federation)
    callbacks.started(first.run.path, first.federation, zero_shot, finished)
    for recorder in running:
        recorder.start(zero_shot, (time.perf_counter() - start_time) / len(recorders))
    if not finished:
        save(0)
    for number in range(finished + 1, rounds + 1):
        clock = time.perf_counter()
        losses = _train_round(engine, number)
        for recorder, why in [(r, why) for r in running if (why := r.failure(number, losses))]:
            if on_failure is None:
                raise FastdlpError(f"{why}; {recorder.run.path} keeps its last good checkpoint")
            on_failure(recorder.run.path.name, why)
            running.remove(recorder)
            engine.idle |= set(recorder.federation.rows)
        for recorder in running:
            recorder.before_aggregation()
        engine.aggregate()
        hits, val = engine.hits(), engine.hits("val")
        seconds = (time.perf_counter() - clock) / len(recorders)
        lines = [recorder.round(number, losses, hits, val, seconds) for recorder in running]
        stop = engine.group.any(callbacks.should_stop()) and number < rounds
        if number % config.checkpoint_every == 0 or number == rounds or stop:
            save(number)
        callbacks.finished_round(max(lines, key=lambda line: line["accuracy"]))
        if stop:
            raise Stopped(first.run.path, number, rounds)
    return running


def _train_round(engine: Engine, number: int) -> RoundLosses:
    """A round of training on all ranks, with the losses and divergence of all slots.

    Raises:
        FastdlpError: it does not fit into the device's memory, on any rank.
    """
    with engine.group.sync_errors():
        try:
            losses = engine.train_round(number)
        except torch.OutOfMemoryError:
            raise FastdlpError(
                f"the device's memory does not hold {engine.schedule.micro_batch} rows at once: start the run with a "
                "smaller --micro-batch or --batch-size"
            ) from None
    return gather_losses(replace(losses, diverged=engine.diverged()), engine.owners, engine.group)
