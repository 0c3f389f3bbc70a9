"""Train and resume runs.

summary = fastdlp.train(TrainConfig(method="feddlp", out="runs/a"))
summary = fastdlp.resume("runs/a")

Under torchrun every process calls the same function, the processes share the run's clients
(`fastdlp.engine.distributed`), and all return the same summary. Only rank 0's callbacks report; `should_stop`
is called on every rank.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from fastdlp.config import TrainConfig, differences
from fastdlp.engine.distributed import SINGLE_PROCESS, ProcessGroup, process_group
from fastdlp.errors import FastdlpError
from fastdlp.files import check_free, remove_temporaries
from fastdlp.methods import make_method, resolve
from fastdlp.processes import refuse_several
from fastdlp.run.folder import CONFIG, PARTITION, RunFolder
from fastdlp.run.loop import Stopped, run_rounds
from fastdlp.run.recorder import Recorder, restore
from fastdlp.run.setup import Callbacks, prepare, prepare_together

__all__ = ["Callbacks", "Stopped", "batched_by_seed", "resume", "train", "train_together"]


def train(config: TrainConfig, overwrite: bool = False, callbacks: Callbacks | None = None) -> dict[str, Any]:
    """Run a federation from its start and return its summary (the content of summary.json).

    Args:
        config: any config; without `out` the run folder is named after it, in runs/.
        overwrite: replace a run that is already at `out`.
        callbacks: see `Callbacks`.

    Raises:
        FastdlpError: invalid input, a failed write, a loss that is not finite.
        Stopped: `callbacks.should_stop` returned True.
    """
    config = resolve(config)
    with process_group() as group:
        out = config.out or group.all_gather(str(_named(config)))[0]
        return _train([replace(config, out=out)], overwrite, callbacks or Callbacks(), group)[0]


def train_together(
    configs: Sequence[TrainConfig], overwrite: bool = False, callbacks: Callbacks | None = None
) -> list[dict[str, Any]]:
    """Run federations that differ in seed, α and learning rates only, in one engine; returns their summaries.

    Each has its own `out` and checkpoints and can be resumed alone. The callbacks receive the start of the first run
    and the rounds of the best. Raises as `train`, and FastdlpError in several processes.
    """
    refuse_several()
    return _train(configs, overwrite, callbacks or Callbacks(), SINGLE_PROCESS)


def _train(
    configs: Sequence[TrainConfig], overwrite: bool, callbacks: Callbacks, group: ProcessGroup
) -> list[dict[str, Any]]:
    """`train_together` in one of the processes that share the runs."""
    start_time = time.perf_counter()
    callbacks = _rank_zero_only(callbacks, group)
    paths = [Path(config.out or "") for config in configs]
    with group.sync_errors():
        for path in paths if group.is_rank_zero else ():
            check_free(path, CONFIG, "run", overwrite)
    with group.sync_errors():
        configs = [replace(config, out=str(path)) for config, path in zip(configs, paths)]
        federations = prepare_together(configs, callbacks, group=group)
    with ExitStack() as stack:
        with group.sync_errors():
            for f, path in zip(federations, paths) if group.is_rank_zero else ():
                run = RunFolder.create(path, f.config, f.partition, f.pixels.ids, overwrite)
                stack.enter_context(run.locked())
        recorders = [Recorder(RunFolder(path), f, 0) for f, path in zip(federations, paths)]
        return [recorder.finish() for recorder in run_rounds(recorders, 0, callbacks, start_time)]


def batched_by_seed(configs: Sequence[TrainConfig]) -> list[list[TrainConfig]]:
    """Configs in their order, those that `train_together` can run together in one list."""
    batches: dict[TrainConfig, list[TrainConfig]] = {}
    for config in configs:
        alone = make_method(config).sequential or config.pretrained == "none" or config.trace
        batches.setdefault(config if alone else replace(config, seed=0, out=None), []).append(config)
    return list(batches.values())


def resume(
    run: str | Path,
    rounds: int | None = None,
    given: dict[str, Any] | None = None,
    callbacks: Callbacks | None = None,
) -> dict[str, Any]:
    """Continue a stopped run, bit-identical to an uninterrupted one; returns the summary.

    Args:
        run: its folder.
        rounds: a new number of rounds, to extend a finished run.
        given: options by name that the run must have been started with.
        callbacks: see `Callbacks`.

    Raises:
        FastdlpError: not a run; other options, data or model; a damaged checkpoint.
        Stopped: `callbacks.should_stop` returned True.
    """
    with process_group() as group, ExitStack() as stack:
        with group.sync_errors():
            folder = RunFolder(Path(run))
            if group.is_rank_zero:
                stack.enter_context(folder.locked())
        return _resume(folder, rounds, given or {}, _rank_zero_only(callbacks or Callbacks(), group), group)


def _resume(
    run: RunFolder, rounds: int | None, given: dict[str, Any], callbacks: Callbacks, group: ProcessGroup
) -> dict[str, Any]:
    """`resume` with the folder locked."""
    start_time = time.perf_counter()
    with group.sync_errors():
        config = replace(run.config(), out=str(run.path))
        requested = resolve(replace(config, **given)) if given else config
        if other := differences(config, requested):
            raise FastdlpError(f"{run.path} was started with {', '.join(other)}: resume without it, or start a new run")
        if rounds is not None:
            requested = replace(requested, rounds=rounds)
            requested.check()
        summary = run.summary()
        if summary is not None and summary["rounds"] == requested.rounds:
            return summary
        federation = prepare(requested, callbacks, run.path / PARTITION, group)
        finished = restore(run, federation)
        if finished > (requested.rounds or 0):
            raise FastdlpError(
                f"{run.path} has finished {finished} rounds already: --rounds {requested.rounds} cannot undo them"
            )
    if group.is_rank_zero:
        remove_temporaries(run.path)
        if requested != config:
            run.change_config(requested)
    recorder = Recorder(run, replace(federation, config=requested), finished)
    run_rounds([recorder], finished, callbacks, start_time)
    return recorder.finish()


def _rank_zero_only(callbacks: Callbacks, group: ProcessGroup) -> Callbacks:
    """The callbacks on rank 0; elsewhere only `should_stop`."""
    return callbacks if group.is_rank_zero else Callbacks(should_stop=callbacks.should_stop)


def _named(config: TrainConfig) -> Path:
    """The default run folder."""
    data = config.dataset.rstrip("/").rpartition("/")[2].replace(":", "-")
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    name = f"{data}-{config.method}-{config.encoder}-beta{config.beta:g}-seed{config.seed}-{stamp}"
    path, number = Path("runs") / name, 1
    while path.exists():  # another run started within this second
        number += 1
        path = path.with_name(f"{name}-{number}")
    return path
