"""Bringing a table's runs to their end: what is finished is taken as it is, the rest is resumed or started."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from fastdlp.config import TrainConfig, differences
from fastdlp.errors import FastdlpError
from fastdlp.methods import resolve
from fastdlp.report.paper.ledger import read_ledger
from fastdlp.run.folder import RunFolder

if TYPE_CHECKING:
    from fastdlp.run.train import Callbacks

# Where and how a run is computed, which is the machine's affair, and what else it writes down.
_MACHINE = ("device", "backend", "micro_batch", "cuda_graph", "trace")
_POLL = 0.2  # seconds


class Interrupted(Exception):
    """Ctrl-C. Every run that was begun can be resumed."""


@dataclass
class Watch:
    """What a caller may be told while runs go on, and ask of them."""

    begun: Callable[[str], None] = lambda name: None
    preparing: Callable[[str, str], None] = lambda name, text: None
    finished_round: Callable[[str, dict[str, Any]], None] = lambda name, line: None  # one run at a time only
    ended: Callable[[str], None] = lambda name: None
    should_stop: Callable[[], bool] = lambda: False


def missing(configs: Sequence[TrainConfig]) -> list[TrainConfig]:
    """The runs that are not finished, in their order.

    Raises:
        FastdlpError: a run's place holds something else, a run of other options or a damaged one.
    """
    return [config for config in configs if not _finished(config)]


def complete(configs: Sequence[TrainConfig], jobs: int, devices: Sequence[str], watch: Watch) -> None:
    """Start or resume every one of these runs, none of which is finished (see `missing`).

    The first run that fails stops the others after their running round.

    Args:
        configs: with `out`.
        jobs: runs at once; more than one are processes of their own that share this machine's threads.
        devices: given to the runs in turn; empty: each config's own.
        watch: see `Watch`.

    Raises:
        FastdlpError: bad input; names the run.
        Interrupted: `watch.should_stop` said so.
    """
    for config in configs:
        resolve(config)
    if jobs == 1:
        _in_process([replace(c, device=devices[0]) if devices else c for c in configs], watch)
    else:
        _at_once(configs, jobs, devices, watch)


def _finished(config: TrainConfig) -> bool:
    path = _place(config)
    try:
        RunFolder.check_free(path, overwrite=True)
    except FastdlpError as error:
        raise FastdlpError(str(error).replace("--out", "--runs")) from None
    if not _begun(path):
        return False
    folder = RunFolder(path)
    found = folder.config()
    asked = replace(resolve(config), **{name: getattr(found, name) for name in _MACHINE})
    if other := differences(found, asked):
        raise FastdlpError(f"{path} was run with {', '.join(other)}: ask for the same, or name another --runs")
    if folder.summary() is None:
        return False
    read_ledger(path)
    return True


def _in_process(configs: Sequence[TrainConfig], watch: Watch) -> None:
    """In this process: what was begun alone, and the seeds of everything else at once in one bank."""
    from fastdlp.run.train import Stopped, batched_by_seed, resume, train_together

    begun = [config for config in configs if _begun(_place(config))]
    fresh = batched_by_seed([config for config in configs if config not in begun])
    for batch in [[config] for config in begun] + fresh:
        path = _place(batch[0])
        name = path.name if len(batch) == 1 else f"{path.name} and {len(batch) - 1} other seeds"
        if watch.should_stop():
            raise Interrupted
        watch.begun(name)
        callbacks = _callbacks(name, watch)
        try:
            if batch[0] in begun:
                resume(path, given=_data(batch[0]), callbacks=callbacks)
            else:
                train_together(batch, callbacks=callbacks)
        except Stopped:
            raise Interrupted from None
        except FastdlpError as error:
            raise FastdlpError(f"{path}: {error}") from None
        for config in batch:
            watch.ended(_place(config).name)


def _callbacks(name: str, watch: Watch) -> Callbacks:
    from fastdlp.run.train import Callbacks

    return Callbacks(
        preparing=lambda text: watch.preparing(name, text),
        finished_round=lambda line: watch.finished_round(name, line),
        should_stop=watch.should_stop,
    )


@dataclass
class _Job:
    path: Path
    process: subprocess.Popen[bytes]
    errors: IO[bytes]
    device: int

    def message(self) -> str:
        """The last line that the process wrote to stderr."""
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines() or [f"exit code {self.process.poll()}"]
        return lines[-1].removeprefix("fastdlp: ")


def _at_once(configs: Sequence[TrainConfig], jobs: int, devices: Sequence[str], watch: Watch) -> None:
    """As processes, at most `jobs` at a time."""
    from fastdlp.data.registry import load_source

    for dataset, folder in dict.fromkeys((config.dataset, config.data_dir) for config in configs if config.download):
        load_source(dataset, folder, download=True)  # before two processes fetch the same one
    threads = max(1, int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1) // jobs)
    waiting, running = list(configs), list[_Job]()
    stopping, failed = False, None
    try:
        while running or (waiting and not stopping):
            while waiting and len(running) < jobs and not stopping:
                config = waiting.pop(0)
                at = min(range(len(devices)), key=lambda i: sum(job.device == i for job in running), default=-1)
                if at >= 0:
                    config = replace(config, device=devices[at])
                running.append(_start(config, threads, at))
                watch.begun(running[-1].path.name)
            time.sleep(_POLL)
            for job in [job for job in running if job.process.poll() is not None]:
                running.remove(job)
                with job.errors:
                    if job.process.returncode == 0:
                        watch.ended(job.path.name)
                    elif not stopping:
                        failed = failed or f"{job.path}: {job.message()}"
            if not stopping and (failed or watch.should_stop()):
                stopping = True
                for job in running:
                    job.process.send_signal(signal.SIGINT)  # train's own: stop after the running round
    finally:
        for job in running:  # only where an exception, such as a second Ctrl-C, left the loop
            job.process.terminate()
            job.process.wait()
            job.errors.close()
    if failed:
        raise FastdlpError(failed)
    if stopping:
        raise Interrupted


def _start(config: TrainConfig, threads: int, device: int) -> _Job:
    """`fastdlp train` of a config, in a process group of its own so that Ctrl-C reaches it through this process."""
    path = _place(config)
    options = _options(config)
    if _begun(path):
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
    """Where the data set lies now, which is all that a run is told when it is resumed."""
    return {name: value for name in ("data_dir", "download") if (value := getattr(config, name))}


def _options(config: TrainConfig) -> list[str]:
    """The options of `fastdlp train` that make this config."""
    words: list[str] = []
    for option in dataclasses.fields(config):
        value = getattr(config, option.name)
        if value != option.default:
            flag = "--" + option.name.replace("_", "-")
            words += [flag] if value is True else [flag, str(value)]
    return words


def _place(config: TrainConfig) -> Path:
    if config.out is None:
        raise ValueError("a table's run has a folder")
    return Path(config.out)


def _begun(path: Path) -> bool:
    return path.is_dir() and any(path.iterdir())
