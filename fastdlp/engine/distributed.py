"""A run over several processes, one per GPU, started by torchrun.

    torchrun --nproc-per-node=4 -m fastdlp train …

Every process prepares the whole federation and trains its own clients. A round has one all-reduce of the shared
adapters; losses, predictions and gates are then exchanged, so that all ranks hold the same results and take the same
decisions. Rank 0 writes the run folder and the console output; a checkpoint does not depend on the number of processes.

Tensors are exchanged over NCCL on GPUs and over gloo on CPUs, other values as JSON, never pickled. Processes on several
machines need a shared file system for the run folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from fastdlp.errors import FastdlpError
from fastdlp.processes import world_size

# One process may download a data set while the others wait; torchrun terminates all of them when one dies.
TIMEOUT = timedelta(days=7)


class _RemoteError(FastdlpError):
    """An error of another rank, which all ranks have already received."""


@dataclass(frozen=True)
class ProcessGroup:
    """The processes that share a run, as seen by one of them. The default is a single process."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # on this machine; the index of its GPU

    @property
    def is_rank_zero(self) -> bool:
        """Whether this process writes the run folder."""
        return self.rank == 0

    def owners(self, loads: Sequence[int]) -> list[int]:
        """The rank that trains each slot: largest load first, to the rank with the least load, lowest rank first."""
        totals, owners = [0] * self.world_size, [0] * len(loads)
        for slot in sorted(range(len(loads)), key=lambda i: -loads[i]):
            owners[slot] = totals.index(min(totals))
            totals[owners[slot]] += loads[slot]
        return owners

    def all_reduce(self, part: Tensor) -> Tensor:
        """Sum over ranks, in place; bit-identical on all ranks."""
        if self.world_size > 1:
            dist.all_reduce(part)
        return part

    def any_reduce(self, flags: list[np.ndarray]) -> list[np.ndarray]:
        """Logical or over ranks of bool arrays."""
        if self.world_size == 1:
            return flags
        reduced = self.all_reduce(torch.from_numpy(np.concatenate(flags)).to(torch.uint8)).numpy().astype(bool)
        return np.split(reduced, np.cumsum([len(part) for part in flags])[:-1])

    def broadcast_rows(self, rows: Tensor, owners: Sequence[int]) -> None:
        """Copy every row of `rows` [slots, …] from its owner to all ranks, in place."""
        for rank in range(self.world_size if self.world_size > 1 and rows.numel() else 0):
            own = [slot for slot, owner in enumerate(owners) if owner == rank]
            if own:
                buffer = rows[own]
                dist.broadcast(buffer, rank)
                rows[own] = buffer

    def all_gather(self, value: Any) -> list[Any]:
        """The JSON-serializable values of all ranks, by rank."""
        if self.world_size == 1:
            return [value]
        text = json.dumps(value).encode()
        longest = torch.tensor(len(text))
        dist.all_reduce(longest, dist.ReduceOp.MAX)
        own = torch.frombuffer(bytearray(text.ljust(int(longest))), dtype=torch.uint8)
        texts = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(texts, own)
        return [json.loads(text.numpy().tobytes()) for text in texts]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return any(self.all_gather(flag))

    def broadcast_from_rank_zero(self, value: str) -> str:
        """Rank 0's value. Within `sync_errors`, where another rank may have failed instead of calling this."""
        values = self.all_gather([value])
        if errors := [error for error in values if not isinstance(error, list)]:
            raise _RemoteError(errors[0])
        return values[0][0]

    @contextmanager
    def sync_errors(self) -> Iterator[None]:
        """A FastdlpError that any rank raises within the block is raised on all ranks at its end.

        Within the block ranks may synchronize only through `local_rank_zero_first` and `broadcast_from_rank_zero`.
        """
        try:
            yield
        except _RemoteError:
            raise
        except FastdlpError as error:
            self.all_gather(str(error))
            raise
        self._raise_remote_errors()

    @contextmanager
    def local_rank_zero_first(self) -> Iterator[None]:
        """The first process of each machine executes the block before the others, which reuse its files."""
        if self.local_rank:
            self._raise_remote_errors()
        yield
        if not self.local_rank:
            self._raise_remote_errors()

    def _raise_remote_errors(self) -> None:
        """Wait for the other ranks and raise the first error that one of them reports."""
        if errors := [message for message in self.all_gather(None) if message is not None]:
            raise _RemoteError(errors[0])


SINGLE_PROCESS = ProcessGroup()


@contextmanager
def process_group() -> Iterator[ProcessGroup]:
    """Join the processes that torchrun started, if any.

    Raises:
        FastdlpError: WORLD_SIZE is set without torchrun's other variables.
    """
    count = world_size()
    if count == 1:
        yield SINGLE_PROCESS
        return
    if missing := [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise FastdlpError(f"WORLD_SIZE is {count} without {', '.join(missing)}: start with torchrun, or unset it")
    if not dist.is_initialized():  # it still is after an earlier run of this process was stopped
        _initialize(count)
    yield ProcessGroup(int(os.environ["RANK"]), count, int(os.environ["LOCAL_RANK"]))
    # Not after an error, which may be local to this rank: destroying waits for ranks that wait for this one.
    dist.destroy_process_group()


def _initialize(count: int) -> None:
    """Initialize the process group under a new prefix: the store still holds the addresses of an earlier run."""
    store, rank, _ = next(rendezvous("env://", timeout=TIMEOUT))
    run = (store.add("fastdlp/joined", 1) - 1) // count
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    prefixed = dist.PrefixStore(f"fastdlp/{run}", store)
    dist.init_process_group(backend, store=prefixed, rank=rank, world_size=count, timeout=TIMEOUT)
