"""Prepare a run, in stages: configuration, CLIP, data, partition, task, engine.

One config is a run. Several that share model and data (`fastdlp.run.sweep`) are federations of one engine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastdlp.clip.load import load_clip
from fastdlp.config import TrainConfig
from fastdlp.data.cache import Pixels, load_pixels
from fastdlp.data.partition import Partition
from fastdlp.data.partition_file import load_partition, partition_of
from fastdlp.data.registry import check_name, load_source
from fastdlp.engine.distributed import SINGLE_PROCESS, ProcessGroup
from fastdlp.engine.engine import Engine
from fastdlp.engine.schedule import Slot
from fastdlp.errors import FastdlpError
from fastdlp.methods import make_method, resolve
from fastdlp.processes import refuse_several
from fastdlp.run.build_engine import Execution, build_engine
from fastdlp.run.build_task import build_task


@dataclass(frozen=True)
class Federation:
    """A prepared run."""

    config: TrainConfig  # resolved; micro_batch and backend as chosen
    engine: Engine
    pixels: Pixels
    partition: Partition
    weights_fingerprint: str
    number: int = 0  # index among the engine's federations
    weight_bytes: int = 0  # weights, moments and gradients of full fine-tuning

    @property
    def rows(self) -> range:
        """The engine's slots that are this run's clients."""
        return range(self.number * self.partition.clients, (self.number + 1) * self.partition.clients)

    @property
    def bank_rows(self) -> range:
        """The bank's rows of these clients."""
        rows = [self.engine.row(slot) for slot in self.rows]
        return range(rows[0], rows[-1] + 1)

    @property
    def slots(self) -> tuple[Slot, ...]:
        return self.engine.slots[self.rows.start : self.rows.stop]


@dataclass
class Callbacks:
    """Functions that a caller may pass to observe or stop a run; the defaults do nothing."""

    preparing: Callable[[str], None] = lambda text: None  # with a line for each stage of the preparation
    notice: Callable[[str], None] = lambda text: None  # with a line about a machine-dependent choice
    started: Callable[[Path, Federation, float, int], None] = lambda run, federation, zero_shot, finished: None
    finished_round: Callable[[dict[str, Any]], None] = lambda line: None  # with the best run's metrics
    should_stop: Callable[[], bool] = lambda: False  # called after each round; True raises Stopped


def prepare(
    config: TrainConfig,
    callbacks: Callbacks | None = None,
    partition_file: Path | None = None,
    group: ProcessGroup | None = None,
) -> Federation:
    """Build the run of one config, see `prepare_together`."""
    return prepare_together([config], callbacks, partition_file, group)[0]


def prepare_together(
    configs: Sequence[TrainConfig],
    callbacks: Callbacks | None = None,
    partition_file: Path | None = None,
    group: ProcessGroup | None = None,
) -> list[Federation]:
    """Build runs that differ in learning rates, ξ, α and seed only, as federations of one engine.

    Args:
        configs: any; they are resolved here.
        callbacks: `preparing` and `notice` are called, `notice` also during the first steps.
        partition_file: a run's own record, in place of the partition that the config describes.
        group: the processes that share the runs; None refuses to run in several.

    Raises:
        FastdlpError: anything in a config that does not fit the machine, the data or the model.
    """
    callbacks = callbacks or Callbacks()
    if group is None:
        refuse_several()
        group = SINGLE_PROCESS
    configs = [resolve(config) for config in configs]
    config = configs[0]
    method = make_method(config)
    if method.sequential and len(configs) > 1:
        raise FastdlpError(f"--method {method.name} keeps one copy of all weights: train one configuration at a time")
    check_name(config.dataset)
    execution = Execution.of(config, method, group)

    callbacks.preparing(f"weights of {config.model}")
    clip = load_clip(config.model, config.pretrained, config.seed)
    transform = clip.transform if config.transform == "model" else replace(clip.transform, resize_mode="squash")

    callbacks.preparing(f"images of {config.dataset}")
    with group.local_rank_zero_first():
        source = load_source(config.dataset, config.data_dir, config.download)
        pixels = load_pixels(source, transform, on_bad=config.bad_images)
    if partition_file is not None:
        partition = load_partition(partition_file, pixels.ids, pixels.name)
    else:
        partition = partition_of(config, pixels.labels, pixels.ids, pixels.name, pixels.fingerprint)
    _check_partition(partition, config)

    callbacks.preparing("frozen features")
    largest = "triton" if execution.measure else str(execution.backend)
    planned = replace(config, backend=largest, cuda_graph=execution.graphs)
    built = build_task(planned, method, clip, pixels, transform, execution.device)
    micro_batch = config.micro_batch or built.micro_batch
    configs = [replace(c, clients=partition.clients, micro_batch=micro_batch) for c in configs]

    engine, used = build_engine(
        configs, method, built, partition, pixels.labels, execution, callbacks.preparing, callbacks.notice
    )
    # Where graphs may run, None stays: a resumed run pads alike and verifies its first replays again.
    configs = [replace(c, backend=used, cuda_graph=c.cuda_graph if execution.graphs else False) for c in configs]
    fingerprint = clip.fingerprint()
    return [
        Federation(c, engine, pixels, partition, fingerprint, number, built.weight_bytes)
        for number, c in enumerate(configs)
    ]


def _check_partition(partition: Partition, config: TrainConfig) -> None:
    if partition.empty and config.empty_clients != "keep":  # what a file or --shots left empty cannot be drawn again
        raise FastdlpError(
            f"clients {', '.join(map(str, partition.empty))} have no training sample: take another partition or "
            "--empty-clients keep"
        )
    if not any(len(train) for train in partition.train):
        raise FastdlpError("no client of this partition has a training sample")
    if not any(len(test) for test in partition.test):
        raise FastdlpError(
            "no client of this partition has a test sample: use fewer clients or a larger --test-fraction"
        )
    if any(len(val) for val in partition.val):
        return
    if config.report == "validation" and not config.val_fraction:
        raise FastdlpError("--report validation needs validation samples: pass --val-fraction, for example 0.1")
    if config.val_fraction:
        raise FastdlpError(
            "no client of this partition has a validation sample: use fewer clients, or --val-fraction with clients of "
            "two training samples and more"
        )
