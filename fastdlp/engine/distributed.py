"""A run over several processes, one a GPU: who trains which client, and what they tell each other.

    torchrun --nproc-per-node=4 -m fastdlp train …

Every process prepares the whole federation and steps its own clients alone. A round has one all-reduce of the shared
adapters; losses, predictions and gates follow, so that every process knows the same and decides alike. The first
process writes, shows and locks; a checkpoint is of the whole run, whatever number of processes wrote it.

Tensors travel over NCCL where they lie on GPUs, over gloo else; what is told in words is JSON, never pickled.
Processes on several machines need one file system for the run folder.
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

# One process may download a data set while the others wait. torchrun ends them all when one dies, so no clock need.
PATIENCE = timedelta(days=7)


class _Elsewhere(FastdlpError):
    """What went wrong in another process; everyone has heard of it already."""


@dataclass(frozen=True)
class Shards:
    """One process among those that share a run; as it stands, the only one.

    rank: this process's number. count: of processes. local_rank: its number on this machine, which is its GPU's.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @property
    def leads(self) -> bool:
        """Whether this process writes the run folder."""
        return self.rank == 0

    def owners(self, loads: Sequence[int]) -> list[int]:
        """The process of each slot: the largest load first, to whoever has least, equals to the lowest rank."""
        totals, found = [0] * self.count, [0] * len(loads)
        for slot in sorted(range(len(loads)), key=lambda i: -loads[i]):
            found[slot] = totals.index(min(totals))
            totals[found[slot]] += loads[slot]
        return found

    def total(self, part: Tensor) -> Tensor:
        """Σ over processes of tensors of one shape, in place, the same bits in all."""
        if self.count > 1:
            dist.all_reduce(part)
        return part

    def union(self, found: list[np.ndarray]) -> list[np.ndarray]:
        """Bool arrays, True where they are in any process."""
        if self.count == 1:
            return found
        marks = self.total(torch.from_numpy(np.concatenate(found)).to(torch.uint8)).numpy().astype(bool)
        return np.split(marks, np.cumsum([len(part) for part in found])[:-1])

    def spread(self, rows: Tensor, owners: Sequence[int]) -> None:
        """Bring every row of `rows` [slots, …] from its owner to all processes, in place, bit for bit."""
        for rank in range(self.count if self.count > 1 and rows.numel() else 0):
            own = [slot for slot, owner in enumerate(owners) if owner == rank]
            if own:
                held = rows[own]
                dist.broadcast(held, rank)
                rows[own] = held

    def gather(self, value: Any) -> list[Any]:
        """What every process says, by rank: anything that JSON holds."""
        if self.count == 1:
            return [value]
        text = json.dumps(value).encode()
        longest = torch.tensor(len(text))
        dist.all_reduce(longest, dist.ReduceOp.MAX)
        own = torch.frombuffer(bytearray(text.ljust(int(longest))), dtype=torch.uint8)
        texts = [torch.empty_like(own) for _ in range(self.count)]
        dist.all_gather(texts, own)
        return [json.loads(text.numpy().tobytes()) for text in texts]

    def any(self, flag: bool) -> bool:
        """Whether it is so in any process."""
        return any(self.gather(flag))

    def agreed(self, value: str) -> str:
        """What the first process says. Within `together`, where another process may have failed instead."""
        told = self.gather([value])
        if failed := [message for message in told if not isinstance(message, list)]:
            raise _Elsewhere(failed[0])
        return told[0][0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """A FastdlpError in the block, in any process, is raised in all of them when all have come to its end.

        Processes that wait for each other within the block do so through `in_turn` and `agreed` alone.
        """
        try:
            yield
        except _Elsewhere:
            raise
        except FastdlpError as error:
            self.gather(str(error))
            raise
        self._hear()

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """The first process of a machine does the block before the others do, who find what it left on the disk."""
        if self.local_rank:
            self._hear()
        yield
        if not self.local_rank:
            self._hear()

    def _hear(self) -> None:
        """Wait for the other processes, with nothing to complain of. Raises what another one complains of."""
        told = [message for message in self.gather(None) if message is not None]
        if told:
            raise _Elsewhere(told[0])


ALONE = Shards()


@contextmanager
def sharded() -> Iterator[Shards]:
    """Join the other processes of torchrun, where there are any.

    Raises:
        FastdlpError: WORLD_SIZE is set by someone who is not torchrun.
    """
    count = world_size()
    if count == 1:
        yield ALONE
        return
    if missing := [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise FastdlpError(f"WORLD_SIZE is {count} without {', '.join(missing)}: start with torchrun, or unset it")
    if not dist.is_initialized():  # a run of this process that was stopped has left its group
        _join(count)
    yield Shards(int(os.environ["RANK"]), count, int(os.environ["LOCAL_RANK"]))
    # Not after an error, which may be this process's alone: leaving would wait for others, who wait for this one.
    dist.destroy_process_group()


def _join(count: int) -> None:
    """Make a process group, under a name of its own: the store still holds the addresses of an earlier run's."""
    store, rank, _ = next(rendezvous("env://", timeout=PATIENCE))
    run = (store.add("fastdlp/joined", 1) - 1) // count
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    named = dist.PrefixStore(f"fastdlp/{run}", store)
    dist.init_process_group(backend, store=named, rank=rank, world_size=count, timeout=PATIENCE)
