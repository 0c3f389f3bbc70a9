"""The trace of a run: all that another implementation needs to repeat it.

    trace/round-0000.safetensors      the start: every client's adapters and the server's
    trace/round-0001.safetensors …    every client's adapters before aggregation, the server's after it
    trace/batches.jsonl               a line per batch: round, client, step, sample ids

Tensors are fp32, named `c{client}/{branch}/{block}.{q|k|v|out|fc1|fc2}/{A|B|gate}` and
`c{client}/{branch}/proj/{A|B|gate}`; the server's begin with `server/` in place of `c{client}/`. Heads and whole
encoders have the names of their own tensors after the branch. Full fine-tuning writes the server's only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fastdlp.adapters.serialization import client_tensors, save_tensors, shared_tensors
from fastdlp.engine.engine import Engine
from fastdlp.files import os_errors
from fastdlp.run.folder import append_lines, truncate_lines

FOLDER, BATCHES = "trace", "batches.jsonl"


class Trace:
    """Writes the trace of one run, whose first `finished` rounds are written already; a new run starts with round 0."""

    def __init__(self, run: Path, engine: Engine, ids: Sequence[str], finished: int = 0) -> None:
        self.path, self.engine, self.ids = run / FOLDER, engine, ids
        with os_errors(f"write {self.path}"):
            self.path.mkdir(exist_ok=True)
        truncate_lines(self.path / BATCHES, finished)
        self._clients: dict[str, Tensor] = {}
        if not finished:
            self.before_aggregation()
            self.write(0)

    def before_aggregation(self) -> None:
        """Copy every client's adapters."""
        bank = self.engine.bank
        if not self.engine.stateful_clients:
            return
        self._clients = {
            f"c{slot}/{name}": tensor
            for slot in range(bank.slots)
            for name, tensor in client_tensors(bank, slot).items()
        }

    def write(self, number: int) -> None:
        """Write the round's tensors and batches. Raises FastdlpError if the write fails."""
        server = shared_tensors(self.engine.bank, self.engine.server)
        tensors = self._clients | {f"server/{name}": tensor for name, tensor in server.items()}
        save_tensors(self.path / f"round-{number:04d}.safetensors", tensors, {"round": str(number)})
        append_lines(self.path / BATCHES, self._batch_lines(number))
        self._clients.clear()

    def _batch_lines(self, number: int) -> Iterator[dict[str, Any]]:
        for slot, step, samples in self.engine.ordered_batches(number) if number else ():
            client, names = self.engine.slots[slot].client, [self.ids[int(i)] for i in samples]
            yield {"round": number, "client": client, "step": step, "samples": names}
