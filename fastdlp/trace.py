"""What anyone needs to replay a run with an implementation of their own.

    trace/round-0000.safetensors      the start: every client's adapters and the server's
    trace/round-0001.safetensors …    every client's adapters before aggregation, the server's after it
    trace/batches.jsonl               a line per batch: round, client, step, sample ids

Tensors are fp32, named `c{client}/{branch}/{block}.{q|k|v|out|fc1|fc2}/{A|B|gate}` and
`c{client}/{branch}/proj/{A|B|gate}`; the server's begin with `server/` in place of `c{client}/`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from fastdlp.bank import AdapterBank
from fastdlp.errors import FastdlpError
from fastdlp.exchange import client_tensors, save_tensors, shared_tensors
from fastdlp.record import cut_lines

FOLDER = "trace"


class Trace:
    """Writes the trace of one run into its folder."""

    def __init__(self, run: Path, finished: int = 0) -> None:
        """`finished`: the round that the run goes on from; batches of later rounds are cut off."""
        self.path = run / FOLDER
        try:
            self.path.mkdir(exist_ok=True)
        except OSError as error:
            raise FastdlpError(f"cannot write {self.path}: {error.strerror or error}") from None
        cut_lines(self.path / "batches.jsonl", finished)
        self._lines: list[str] = []
        self._clients: dict[str, Tensor] = {}

    def batch(self, number: int, client: int, step: int, ids: Sequence[str]) -> None:
        """Note one batch of the running round."""
        line = {"round": number, "client": client, "step": step, "samples": list(ids)}
        self._lines.append(json.dumps(line) + "\n")

    def clients(self, bank: AdapterBank) -> None:
        """Keep every client's adapters as they are now, before aggregation."""
        self._clients = {
            f"c{slot}/{name}": tensor
            for slot in range(bank.slots)
            for name, tensor in client_tensors(bank, slot).items()
        }

    def write(self, number: int, bank: AdapterBank, server: Mapping[str, Tensor]) -> None:
        """Write the round's tensors and batches. Raises FastdlpError where the disk refuses."""
        tensors = self._clients | {f"server/{name}": t for name, t in shared_tensors(bank, server).items()}
        save_tensors(self.path / f"round-{number:04d}.safetensors", tensors, {"round": str(number)})
        try:
            with open(self.path / "batches.jsonl", "a") as file:
                file.writelines(self._lines)
        except OSError as error:
            raise FastdlpError(f"cannot write {self.path / 'batches.jsonl'}: {error.strerror or error}") from None
        self._lines.clear()
        self._clients.clear()


def sample_ids(ids: Sequence[str], samples: np.ndarray) -> list[str]:
    """Names of the samples of a batch, in its order."""
    return [ids[int(i)] for i in samples]
