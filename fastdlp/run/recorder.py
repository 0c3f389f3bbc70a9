"""Writes a run's folder: a line of metrics per round, checkpoints, the trace, and at the end adapters and summary.

With several processes, each has a recorder and all compute the same lines; only rank 0 writes.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastdlp.adapters.serialization import client_tensors, message_bytes, pack, save_tensors, shared_tensors
from fastdlp.config import NOT_IN_NUMBERS
from fastdlp.data.partition import Partition
from fastdlp.engine.engine import counted
from fastdlp.engine.round_losses import RoundLosses
from fastdlp.errors import FastdlpError
from fastdlp.files import write_atomic
from fastdlp.run.checkpoint import load_checkpoint, save_checkpoint
from fastdlp.run.folder import ADAPTERS, CHECKPOINT, METRICS, RunFolder, append_lines, truncate_lines
from fastdlp.run.metrics import Hits, accuracy_metrics, round_line, summarize
from fastdlp.run.setup import Federation
from fastdlp.run.trace import Trace

SERVER_FILE = "server.safetensors"


class Recorder:
    """Writes the folder of one run with `finished` completed rounds, whose engine may hold other runs as well."""

    def __init__(self, run: RunFolder, federation: Federation, finished: int) -> None:
        self.run, self.federation = run, federation
        config, engine = federation.config, federation.engine
        self.writes = engine.group.is_rank_zero
        traced = config.trace and self.writes
        self.trace = Trace(run.path, engine, federation.pixels.ids, finished) if traced else None
        self.lines = truncate_lines(run.path / METRICS, finished, every_round=True) if self.writes else []
        self.message = message_bytes(engine.bank, engine.method.shared)
        self._identity = identity(federation)
        self._hits: Hits | None = None  # of the last round, if this process has run one

    def start(self, zero_shot: float, preparation: float) -> None:
        """Set the accuracy of the frozen model and the seconds of preparation, for the summary."""
        self.zero_shot, self.preparation = zero_shot, preparation

    def failure(self, number: int, losses: RoundLosses) -> str | None:
        """Why the run cannot continue after a round's training, and what to do about it, in one line; or None."""
        rows = self.federation.rows
        for slot, (step, name) in losses.not_finite.items():
            if slot in rows:
                client = slot - rows.start
                return f"the loss {name} of client {client} is not finite in round {number}, step {step}: lower --lr"
        if bad := [slot - rows.start for slot in losses.diverged if slot in rows]:
            return f"the adapters of client {bad[0]} are not finite after round {number}: lower --lr"
        return None

    def before_aggregation(self) -> None:
        """Copy the state before aggregation for the trace."""
        if self.federation.config.trace:
            self.federation.engine.collect("weights", "gates")
        if self.trace:
            self.trace.before_aggregation()

    def round(self, number: int, losses: RoundLosses, hits: Hits, val: Hits, seconds: float) -> dict[str, Any]:
        """Append a round's line and return it. `hits` and `val` cover all slots of the engine."""
        rows = self.federation.rows
        self.federation.engine.collect("gates")
        self._hits = hits[rows.start : rows.stop]
        line = round_line(
            self.federation, number, losses, self._hits, val[rows.start : rows.stop], self.message, seconds
        )
        if self.trace:
            self.trace.write(number)
        if self.writes:
            append_lines(self.run.path / METRICS, [line])
        self.lines.append(line)
        return line

    def checkpoint(self, number: int) -> None:
        """Write the state after a round."""
        federation = self.federation
        federation.engine.collect()
        if not self.writes:
            return
        save_checkpoint(self.run.path / CHECKPOINT, federation.engine, federation.bank_rows, number, self._identity)

    def finish(self) -> dict[str, Any]:
        """Write the adapters and the summary; returns the summary."""
        rows, engine = self.federation.rows, self.federation.engine
        hits = self._hits or engine.hits()[rows.start : rows.stop]
        engine.collect()
        summary: dict[str, Any] | None = None  # only rank 0 has the lines of rounds before a resume
        if self.writes:
            _save_adapters(self.run.path / ADAPTERS, self.federation)
            summary = summarize(self.federation, self.lines, hits, self.zero_shot, self.preparation)
            self.run.write_summary(summary)
        return engine.group.all_gather(summary)[0]


def zero_shot_accuracy(federation: Federation) -> float:
    """Σ correct / Σ n of the frozen model on the test samples."""
    rows = federation.rows
    hits = federation.engine.hits(adapted=False, among=rows)[rows.start : rows.stop]
    return accuracy_metrics(*counted(hits))[0]


def restore(run: RunFolder, federation: Federation) -> int:
    """Load a run's checkpoint into the engine; returns the finished round, 0 for a run without any.

    Raises:
        FastdlpError: the checkpoint is damaged, of another run, or missing although rounds are recorded.
    """
    path = run.path / CHECKPOINT
    if not path.exists():
        metrics = run.path / METRICS
        if metrics.exists() and metrics.stat().st_size:
            raise FastdlpError(
                f"{path} is missing (a sweep's member that diverged has none): put it back, or start again with "
                "--overwrite"
            )
        return 0
    return load_checkpoint(path, federation.engine, federation.bank_rows, identity(federation))


def identity(federation: Federation) -> dict[str, str]:
    """What must match between a checkpoint and the run that loads it: options that affect results, data, weights."""
    options = {k: v for k, v in asdict(federation.config).items() if k not in NOT_IN_NUMBERS | {"rounds", "trace"}}
    return {
        "config": hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest(),
        "partition": _partition_digest(federation.partition),
        "device": federation.engine.bank.device.type,
        "data": federation.pixels.fingerprint,
        "weights": federation.weights_fingerprint,
    }


def _partition_digest(partition: Partition) -> str:
    """SHA-256 of the assignment of samples to clients."""
    digest = hashlib.sha256()
    for side in (partition.train, partition.test, partition.val):
        for samples in side:
            digest.update(f"{len(samples)} ".encode() + samples.astype("<i8").tobytes())
    return digest.hexdigest()


def client_file(client: int) -> str:
    """Name of a client's file in the folder of adapters."""
    return f"client-{client:02d}.safetensors"


def _save_adapters(folder: Path, federation: Federation) -> None:
    """Write the adapters of every client and of the server, with metadata that suffices to load them.

    Clients of a sequential method have no adapters of their own: only the server's are written.
    """
    engine, config = federation.engine, federation.config
    metadata = {
        "format": "pt",
        "weights": federation.weights_fingerprint,
        "method": config.method,
        "encoder": config.encoder,
        "model": config.model,
        "branches": json.dumps([asdict(engine.bank.branches[name]) for name in engine.bank.trained]),
        "scored": json.dumps(engine.method.scored),
    }
    if engine.stateful_clients:
        for slot, row in zip(federation.slots, federation.rows):
            metadata["client"] = str(slot.client)
            save_tensors(folder / client_file(slot.client), client_tensors(engine.bank, row), metadata)
    if message := pack(shared_tensors(engine.bank, engine.server, federation.number)):
        write_atomic(folder / SERVER_FILE, message)  # the bytes that a client receives
