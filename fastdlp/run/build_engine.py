"""The engine of a run: bank, slots, hyperparameters, schedule, and the choice of kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fastdlp.adapters.bank import AdapterBank
from fastdlp.adapters.branches import Branch
from fastdlp.adapters.optimizer import Hyperparameters
from fastdlp.config import TrainConfig
from fastdlp.data.partition import Partition
from fastdlp.engine.autotune_units import Load, measured
from fastdlp.engine.cuda_graph import cuda_graphs
from fastdlp.engine.device import DTYPES, must_measure, pick_backend, pick_device
from fastdlp.engine.distributed import ProcessGroup
from fastdlp.engine.engine import Engine
from fastdlp.engine.schedule import Schedule, Slot
from fastdlp.engine.sequential import SequentialEngine
from fastdlp.engine.tasks import ImageTask, TextTask
from fastdlp.errors import FastdlpError
from fastdlp.methods.base import Method
from fastdlp.methods.losses import Objective
from fastdlp.run.build_task import Built
from fastdlp.selection import Selection, backend_of, read_backend

PACKED = 3  # adapters on the widest linear: q, k and v

# Random streams of a seed; stream 1 orders the batches (`fastdlp.engine.schedule.epoch_order`).
_INIT_LOCAL, _INIT_GLOBAL = 2, 3


@dataclass(frozen=True)
class Execution:
    """Where and how steps run, as far as it is known before anything is measured."""

    device: torch.device
    group: ProcessGroup
    backend: str | Selection
    measure: bool  # `--backend auto` has to measure both backends
    graphs: bool  # steps are padded for CUDA graphs and recorded

    @staticmethod
    def of(config: TrainConfig, method: Method, group: ProcessGroup) -> Execution:
        """From the options. Raises FastdlpError for a device, backend or CUDA graph that is not available."""
        device, dtype = pick_device(config.device, group), DTYPES[config.precision]
        graphs = may_graph(config.cuda_graph, method, device)
        ranks = PACKED * sum(branch.rank for branch in method.branches() if isinstance(branch, Branch))
        backend = pick_backend(config.backend, device, dtype, ranks)
        return Execution(device, group, backend, must_measure(config.backend, device, dtype, ranks), graphs)


def build_engine(
    configs: Sequence[TrainConfig],
    method: Method,
    built: Built,
    partition: Partition,
    labels: np.ndarray,
    execution: Execution,
    progress: Callable[[str], None],
    notice: Callable[[str], None],
) -> tuple[Engine, str]:
    """The engine of all configs, and the backend that it uses as `TrainConfig.backend` records it.

    Args:
        configs: resolved, with micro_batch.
        labels: [samples] int64 class numbers.
        progress, notice: `preparing` and `notice` of `fastdlp.run.setup.Callbacks`.

    Raises:
        FastdlpError: the adapters do not fit into memory.
    """
    config, group, device = configs[0], execution.group, execution.device
    bank, slots = _bank(method, built, configs, device), _slots(configs, partition)
    hyper = _hyperparameters(configs, bank)
    objective = Objective(config.task_loss, config.kd_direction, config.kd_temperature, config.kd_logits)  # type: ignore[arg-type]
    # A GPU is bound by launches, which larger batches reduce. A CPU gains little, so runs keep their own shapes.
    mixed = device.type != "cpu"
    # Padded wherever graphs may run, whether or not this process uses them, so that a resumed run pads alike.
    micro_batch = config.micro_batch or built.micro_batch
    schedule = Schedule(config.batch_size, config.local_epochs, micro_batch, mixed, padded=execution.graphs)
    backend, task = execution.backend, built.task
    if config.backend == "auto":
        if execution.measure and group.is_rank_zero:
            progress("the faster kernels")
            backend = "torch"  # of a task without LoRA in a tower
            if isinstance(task, ImageTask | TextTask):
                load = _load(task, slots, schedule, group)
                backend = measured(task.tower, built.tokens, method, bank, hyper, load)
                notice(f"--backend auto: {backend.reason}")
        backend = read_backend(group.broadcast_from_rank_zero(str(backend)))
    if isinstance(task, ImageTask | TextTask):
        task.tower = replace(task.tower, backend=backend)
    bank.backend = backend_of(backend, "optimizer", bank.slots)
    runner = cuda_graphs(device, bank.tensors, None if config.cuda_graph else notice) if execution.graphs else None
    engine = SequentialEngine if method.sequential else Engine
    return engine(method, bank, task, objective, hyper, slots, labels, schedule, group, runner), str(backend)


def _bank(method: Method, built: Built, configs: Sequence[TrainConfig], device: torch.device) -> AdapterBank:
    """The initialized adapters of all clients of all configs; one row for a sequential method.

    Raises:
        FastdlpError: the adapters do not fit into memory.
    """
    clients = configs[0].clients
    rows = 1 if method.sequential else clients * len(configs)
    try:
        bank = AdapterBank(built.sites, method.branches(), rows, device, shapes=built.shapes)
    except RuntimeError:  # torch's out-of-memory error
        raise FastdlpError(
            f"what {rows} clients train does not fit the memory: use a smaller --rank-local and --rank-global, or "
            "fewer --clients"
        ) from None
    seeds = {
        name: [s for c in configs for s in init_seeds(c.seed, name in method.shared, clients)][:rows]
        for name in bank.branches
    }
    bank.initialize(configs[0].init, seeds, built.inits)
    return bank


def init_seeds(seed: int, shared: bool, clients: int) -> list[list[int]]:
    """Seed sequences of each client's initial branch: equal for a shared branch, distinct for a private one."""
    if shared:
        return [[seed, _INIT_GLOBAL]] * clients
    return [[seed, _INIT_LOCAL, client] for client in range(clients)]


def _slots(configs: Sequence[TrainConfig], partition: Partition) -> list[Slot]:
    """The clients of all configs, config by config."""
    held_out = partition.val or [np.zeros(0, np.int64)] * partition.clients
    return [
        Slot(train, test, number, client, c.seed, val)
        for number, c in enumerate(configs)
        for client, (train, test, val) in enumerate(zip(partition.train, partition.test, held_out))
    ]


def may_graph(requested: bool | None, method: Method, device: torch.device) -> bool:
    """Whether steps may be recorded as CUDA graphs: wherever they can be, unless `--no-cuda-graph`.

    Raises:
        FastdlpError: `--cuda-graph` where they cannot be.
    """
    can = device.type == "cuda" and not method.sequential
    if requested and not can:
        reason = f"--device is {device}" if device.type != "cuda" else f"--method {method.name} trains one at a time"
        raise FastdlpError(f"--cuda-graph records a step of many clients on a CUDA GPU, but {reason}: leave it out")
    return can and requested is not False


def _load(task: ImageTask | TextTask, slots: Sequence[Slot], schedule: Schedule, group: ProcessGroup) -> Load:
    """The steps that `--backend auto` measures."""
    scored = min(task.scoring_batch, max(len(slot.test) for slot in slots))
    clients, rows = -(-len(slots) // group.world_size), task.rows(schedule.batch_size)
    return Load(clients, rows, task.rows(scored), schedule.micro_batch, schedule.padded)


def _hyperparameters(configs: Sequence[TrainConfig], bank: AdapterBank) -> Hyperparameters:
    def vector(name: str) -> Tensor:
        values = [float(getattr(c, name) or 0.0) for c in configs for _ in range(c.clients)]
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
