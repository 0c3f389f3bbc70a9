"""From configs to an engine: weights, data, partition, frozen features, adapters.

One config is a run. Several that share model and data (`fastdlp.run.sweep`) are federations side by side in one bank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastdlp.adapters.bank import AdapterBank
from fastdlp.adapters.branches import Branch
from fastdlp.adapters.optimizer import Hyperparameters
from fastdlp.clip.load import load_clip
from fastdlp.config import TrainConfig
from fastdlp.data.cache import Pixels, load_pixels
from fastdlp.data.partition import Partition
from fastdlp.data.partition_file import load_partition, partition_of
from fastdlp.data.registry import check_name, load_source
from fastdlp.data.transform import Transform
from fastdlp.engine.autotune_units import Load, measured
from fastdlp.engine.cuda_graph import cuda_graphs
from fastdlp.engine.device import DTYPES, must_measure, pick_backend, pick_device
from fastdlp.engine.distributed import ALONE, Shards
from fastdlp.engine.engine import Engine, Schedule, Slot
from fastdlp.engine.tasks import ImageTask, TextTask
from fastdlp.errors import FastdlpError
from fastdlp.methods import make_method, resolve
from fastdlp.methods.base import Method
from fastdlp.methods.losses import Objective
from fastdlp.processes import refuse_several
from fastdlp.run.build_task import Built, build_task
from fastdlp.selection import Selection, form_of, read_backend

PACKED = 3  # adapters on the widest linear: q, k and v

# Which stream of random numbers a seed's draw belongs to; the engine's batches are stream 1.
_INIT_LOCAL, _INIT_GLOBAL = 2, 3


@dataclass(frozen=True)
class Federation:
    """A prepared run: everything that a round needs, and what a record tells."""

    config: TrainConfig  # resolved, micro_batch filled in
    engine: Engine
    pixels: Pixels
    partition: Partition
    weights_fingerprint: str
    number: int = 0  # which of the engine's federations this one is
    weight_bytes: int = 0  # what full fine-tuning holds of weights, moments and gradients

    @property
    def rows(self) -> range:
        """The engine's slots that are this run's clients."""
        return range(self.number * self.partition.clients, (self.number + 1) * self.partition.clients)

    @property
    def bank_rows(self) -> range:
        """The bank's rows of these clients: the one row of a sequential method."""
        return range(1) if self.engine.method.sequential else self.rows

    @property
    def slots(self) -> tuple[Slot, ...]:
        return self.engine.slots[self.rows.start : self.rows.stop]


def prepare(
    config: TrainConfig,
    tell: Callable[[str], None] = lambda text: None,
    partition_file: Path | None = None,
    shards: Shards | None = None,
    notice: Callable[[str], None] = lambda text: None,
) -> Federation:
    """Build a run from a config.

    Args:
        config: any config; it is resolved here.
        tell: told in a line what is being done.
        partition_file: take the partition from this file instead of from the config (a run's own record).
        shards: the processes that share the run; None refuses to run in several.
        notice: told in a line what was found out about the machine, now or in the first steps.

    Raises:
        FastdlpError: anything in the config that does not fit the machine, the data or the model.
    """
    return prepare_together([config], tell, partition_file, shards, notice)[0]


def prepare_together(
    configs: Sequence[TrainConfig],
    tell: Callable[[str], None] = lambda text: None,
    partition_file: Path | None = None,
    shards: Shards | None = None,
    notice: Callable[[str], None] = lambda text: None,
) -> list[Federation]:
    """Build runs that differ in learning rates, ξ, α and seed alone, as federations of one engine.

    Args, Raises: as `prepare`.
    """
    if shards is None:
        refuse_several()
        shards = ALONE
    configs = [resolve(config) for config in configs]
    config = configs[0]
    method = make_method(config)
    check_name(config.dataset)
    device = pick_device(config.device, shards)

    graphs = may_graph(config.cuda_graph, method, device)
    tell(f"weights of {config.model}")
    clip = load_clip(config.model, config.pretrained, config.seed)
    transform = clip.transform if config.transform == "model" else replace(clip.transform, resize_mode="squash")
    tell(f"images of {config.dataset}")
    with shards.in_turn():
        pixels = read_pixels(config, transform)
    partition = read_partition(config, pixels, partition_file)
    _check_partition(partition, config)

    ranks = PACKED * sum(branch.rank for branch in method.branches() if isinstance(branch, Branch))
    backend = pick_backend(config.backend, device, DTYPES[config.precision], ranks)
    unknown = must_measure(config.backend, device, DTYPES[config.precision], ranks)
    tell("frozen features")
    planned = replace(config, backend="triton" if unknown else str(backend), cuda_graph=graphs)
    built = build_task(planned, method, clip, pixels, transform, device)
    micro_batch = config.micro_batch or built.micro_batch
    configs = [replace(c, clients=partition.clients, micro_batch=micro_batch) for c in configs]

    slots = [
        Slot(train, test, number, client, c.seed, val)
        for number, c in enumerate(configs)
        for client, (train, test, val) in enumerate(zip(partition.train, partition.test, _validation(partition)))
    ]
    bank = _bank(method, built, configs, partition.clients, device)
    objective = Objective(config.task_loss, config.kd_direction, config.kd_temperature, config.kd_logits)  # type: ignore[arg-type]
    # A GPU is bound by launches, which a larger batch saves. A CPU gains little, so runs keep their own shapes.
    mixed = device.type != "cpu"
    # Padded wherever graphs may run, whether or not the first steps keep them: who goes on later pads alike.
    schedule = Schedule(config.batch_size, config.local_epochs, micro_batch, mixed, padded=graphs)
    runner = cuda_graphs(device, bank.tensors, None if config.cuda_graph else notice) if graphs else None
    hyper = _hyperparameters(configs, bank, partition.clients)
    if config.backend == "auto":
        if unknown and shards.leads:
            tell("the faster form of the kernels")
            backend = _measured(built, method, bank, hyper, schedule, slots, shards, notice)
        backend = read_backend(shards.agreed(str(backend)))
    _use(backend, built, bank)
    # Where graphs may run, None stays: a resumed run pads alike, and looks at its first replays again.
    configs = [replace(c, backend=str(backend), cuda_graph=c.cuda_graph if graphs else False) for c in configs]
    engine = Engine(method, bank, built.task, objective, hyper, slots, pixels.labels, schedule, shards, runner)
    fingerprint = clip.fingerprint()
    return [
        Federation(c, engine, pixels, partition, fingerprint, number, built.weight_bytes)
        for number, c in enumerate(configs)
    ]


def may_graph(asked: bool | None, method: Method, device: torch.device) -> bool:
    """Whether steps are cut for CUDA graphs: where they can be, unless `--no-cuda-graph` says otherwise.

    Raises:
        FastdlpError: asked for where they cannot be.
    """
    can = device.type == "cuda" and not method.sequential
    if asked and not can:
        reason = f"--device is {device}" if device.type != "cuda" else f"--method {method.name} takes clients in turn"
        raise FastdlpError(f"--cuda-graph records a step of many clients on a CUDA GPU, but {reason}: leave it out")
    return can and asked is not False


def _measured(
    built: Built,
    method: Method,
    bank: AdapterBank,
    hyper: Hyperparameters,
    schedule: Schedule,
    slots: Sequence[Slot],
    shards: Shards,
    notice: Callable[[str], None],
) -> str | Selection:
    """What `--backend auto` finds for these steps; torch for a task that has no LoRA in a tower."""
    task = built.task
    if not isinstance(task, ImageTask | TextTask):
        return "torch"
    scored = min(task.scoring_batch, max(len(slot.test) for slot in slots))
    clients = -(-len(slots) // shards.count)
    rows = task.rows(schedule.batch_size)
    load = Load(clients, rows, task.rows(scored), schedule.micro_batch, schedule.padded)
    selection = measured(task.tower, built.tokens, method, bank, hyper, load)
    notice(f"--backend auto: {selection.reason}")
    return selection


def _use(backend: str | Selection, built: Built, bank: AdapterBank) -> None:
    """Set the form of the adapted tower and of the optimizer."""
    if isinstance(built.task, ImageTask | TextTask):
        built.task.tower = replace(built.task.tower, backend=backend)
    bank.backend = form_of(backend, "optimizer", bank.slots)


def init_words(seed: int, shared: bool, clients: int) -> list[list[int]]:
    """What seeds each client's first draw of a branch: a shared one starts equal everywhere, private ones apart."""
    if shared:
        return [[seed, _INIT_GLOBAL]] * clients
    return [[seed, _INIT_LOCAL, client] for client in range(clients)]


def read_pixels(
    config: TrainConfig, transform: Transform, progress: Callable[[int, int], None] | None = None
) -> Pixels:
    """The data set of a config, preprocessed or from the cache. Raises FastdlpError for data that is not there."""
    source = load_source(config.dataset, config.data_dir, config.download)
    return load_pixels(source, transform, on_bad=config.bad_images, progress=progress)


def read_partition(config: TrainConfig, pixels: Pixels, record: Path | None = None) -> Partition:
    """The partition of a config: drawn by scheme and seed, or read from the file that it names; or a run's record."""
    if record is not None:
        return load_partition(record, pixels.ids, pixels.name)
    return partition_of(config, pixels.labels, pixels.ids, pixels.name, pixels.fingerprint)


def _validation(partition: Partition) -> list[np.ndarray]:
    return partition.val or [np.zeros(0, np.int64)] * partition.clients


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


def _bank(
    method: Method, built: Built, configs: Sequence[TrainConfig], clients: int, device: torch.device
) -> AdapterBank:
    """The bank of all clients of all configs, drawn; of a sequential method its one row."""
    config = configs[0]
    if method.sequential and len(configs) > 1:
        raise FastdlpError(f"--method {method.name} keeps one copy of all weights: train one configuration at a time")
    rows = 1 if method.sequential else clients * len(configs)
    try:
        bank = AdapterBank(built.sites, method.branches(), rows, device, shapes=built.shapes)
    except RuntimeError:  # torch's for memory that it does not get
        raise FastdlpError(
            f"what {rows} clients train does not fit the memory: use a smaller --rank-local and --rank-global, or "
            "fewer --clients"
        ) from None
    words = {
        name: [w for c in configs for w in init_words(c.seed, name in method.shared, clients)][:rows]
        for name in bank.branches
    }
    bank.initialize(config.init, words, built.starts)
    return bank


def _hyperparameters(configs: Sequence[TrainConfig], bank: AdapterBank, clients: int) -> Hyperparameters:
    def vector(name: str) -> Tensor:
        values = [float(getattr(c, name) or 0.0) for c in configs for _ in range(clients)]
        return torch.tensor(values[: bank.slots], device=bank.device)

    config = configs[0]
    return Hyperparameters(
        lr=vector("lr"),
        gate_lr=vector("gate_lr"),
        xi=vector("xi"),
        alpha=vector("alpha"),
        clip_norm=config.clip_norm or 0.0,
        threshold=config.threshold or "soft",
        weight_decay=config.weight_decay or 0.0,
        eps=config.eps or 1e-8,
        optimizer=config.optimizer or "adamw",
    )
