"""Runs what is missing of a table: finished runs are kept, others are resumed or started."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from fastdlp.config import OPTIONS, TrainConfig, differences
from fastdlp.errors import FastdlpError
from fastdlp.files import check_free
from fastdlp.methods import resolve
from fastdlp.report.compare import MACHINE_OPTIONS
from fastdlp.report.read import read_finished
from fastdlp.run.folder import CONFIG, RunFolder

_POLL = 0.2  # seconds


class Interrupted(Exception):
    """`should_stop` returned True. Every run that was started can be resumed."""


@dataclass
class PlanCallbacks:
    """Called while the runs of a plan are executed, with the name of a run."""

    status: Callable[[str, str], None] = lambda name, text: None  # "started"; with one job also what it is doing
    finished: Callable[[str], None] = lambda name: None
    should_stop: Callable[[], bool] = lambda: False


def missing(configs: Sequence[TrainConfig]) -> list[TrainConfig]:
    """The runs that are not finished, in order.

    Raises:
        FastdlpError: a run's folder holds something else, a run with other options or a damaged one.
    """
    return [config for config in configs if not _finished(config)]


def complete(configs: Sequence[TrainConfig], jobs: int, devices: Sequence[str], callbacks: PlanCallbacks) -> None:
    """Start or resume all of these runs, none of which is finished (see `missing`).

    When a run fails, the others stop after their current round.

    Args:
        jobs: concurrent runs; if more than one, each is a process, and they share this machine's threads.
        devices: the runs are distributed over them; empty: each config's own.

    Raises:
        FastdlpError: bad input; names the run.
        Interrupted: `callbacks.should_stop` returned True.
    """
    if jobs == 1:
        _run_here([replace(c, device=devices[0]) if devices else c for c in configs], callbacks)
    else:
        _run_processes(configs, jobs, devices, callbacks)


def _finished(config: TrainConfig) -> bool:
    path = _folder(config)
    try:
        check_free(path, CONFIG, "run", overwrite=True)
    except FastdlpError as error:
        raise FastdlpError(str(error).replace("--out", "--runs")) from None
    if not _has_started(path):
        return False
    folder = RunFolder(path)
    found = folder.config()
    expected = replace(resolve(config), **{name: getattr(found, name) for name in MACHINE_OPTIONS})
    if other := differences(found, expected):
        raise FastdlpError(f"{path} was run with {', '.join(other)}: give the same options, or name another --runs")
    if folder.summary() is None:
        return False
    read_finished(path)
    return True


def _run_here(configs: Sequence[TrainConfig], callbacks: PlanCallbacks) -> None:
    """In this process: runs to resume one by one, new ones in batches that differ in their seed and share one bank."""
    from fastdlp.run.train import batched_by_seed

    started = [config for config in configs if _has_started(_folder(config))]
    new = batched_by_seed([config for config in configs if config not in started])
    for batch in [[config] for config in started] + new:
        if callbacks.should_stop():
            raise Interrupted
        _run_batch(batch, batch[0] in started, callbacks)
        for config in batch:
            callbacks.finished(_folder(config).name)


def _run_batch(batch: list[TrainConfig], started: bool, callbacks: PlanCallbacks) -> None:
    from fastdlp.run.train import Callbacks, Stopped, resume, train_together

    path = _folder(batch[0])
    status = functools.partial(
        callbacks.status, path.name if len(batch) == 1 else f"{path.name} and {len(batch) - 1} other seeds"
    )
    status("started")
    train_callbacks = Callbacks(
        preparing=status,
        finished_round=lambda line: status(f"round {line['round']}, accuracy {line['accuracy']:.3f}"),
        should_stop=callbacks.should_stop,
    )
    try:
        if started:
            resume(path, given=_data(batch[0]), callbacks=train_callbacks)
        else:
            train_together(batch, callbacks=train_callbacks)
    except Stopped:
        raise Interrupted from None
    except FastdlpError as error:
        raise FastdlpError(f"{path}: {error}") from None


@dataclass
class _Job:
    path: Path
    process: subprocess.Popen[bytes]
    errors: IO[bytes]
    device: str | None

    def message(self) -> str:
        """The last line that the process wrote to stderr."""
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines() or [f"exit code {self.process.poll()}"]
        return lines[-1].removeprefix("fastdlp: ")


def _run_processes(configs: Sequence[TrainConfig], jobs: int, devices: Sequence[str], callbacks: PlanCallbacks) -> None:
    """As processes, at most `jobs` at a time, over which the devices are distributed."""
    from fastdlp.data.registry import load_source

    for dataset, folder in dict.fromkeys((config.dataset, config.data_dir) for config in configs if config.download):
        load_source(dataset, folder, download=True)  # not by several processes at once
    threads = max(1, int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1) // jobs)
    free = [devices[job % len(devices)] if devices else None for job in range(jobs)]
    waiting, running = list(configs), list[_Job]()
    stopping, failed = False, None
    try:
        while running or (waiting and not stopping):
            while waiting and free and not stopping:
                running.append(_start(waiting.pop(0), threads, free.pop(0)))
                callbacks.status(running[-1].path.name, "started")
            time.sleep(_POLL)
            for job in [job for job in running if job.process.poll() is not None]:
                running.remove(job)
                free.append(job.device)
                with job.errors:
                    if job.process.returncode == 0:
                        callbacks.finished(job.path.name)
                    elif not stopping:
                        failed = failed or f"{job.path}: {job.message()}"
            if not stopping and (failed or callbacks.should_stop()):
                stopping = True
                for job in running:
                    job.process.send_signal(signal.SIGINT)  # fastdlp train stops after the current round
    finally:
        for job in running:  # after an exception, such as a second Ctrl-C
            job.process.terminate()
            job.process.wait()
            job.errors.close()
    if failed:
        raise FastdlpError(failed)
    if stopping:
        raise Interrupted


def _start(config: TrainConfig, threads: int, device: str | None) -> _Job:
    """Start `fastdlp train` in a process group of its own, so that this process alone handles Ctrl-C."""
    path = _folder(config)
    options = _options(replace(config, device=device or config.device))
    if _has_started(path):
        options = ["--resume", str(path), *_options(TrainConfig(**_data(config)))]
    errors = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the process)
    process = subprocess.Popen(
        [sys.executable, "-m", "fastdlp", "train", "--quiet", *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=errors,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        process_group=0,
    )
    return _Job(path, process, errors, device)


def _data(config: TrainConfig) -> dict[str, Any]:
    """The location of the data set: the only options that are passed to a resumed run."""
    return {name: value for name in ("data_dir", "download") if (value := getattr(config, name))}


def _options(config: TrainConfig) -> list[str]:
    """The arguments of `fastdlp train` for this config."""
    arguments: list[str] = []
    for name, option in OPTIONS.items():
        value = getattr(config, name)
        if value != option.default:
            arguments += [option.flag] if value is True else [option.flag, str(value)]
    return arguments


def _folder(config: TrainConfig) -> Path:
    return Path(str(config.out))


def _has_started(path: Path) -> bool:
    return path.is_dir() and any(path.iterdir())
