"""A finished run's rounds, and what its clients exchanged: as the paper counts, and in bytes of messages."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdlp.config import TrainConfig
from fastdlp.errors import FastdlpError
from fastdlp.report.paper.tables import paper_mb
from fastdlp.run.folder import SUMMARY, RunFolder

_HINT = "remove the run's folder and run it again"


@dataclass(frozen=True)
class Ledger:
    """A finished run: its config, the lines of its rounds, and the parameters that a client sends per round."""

    path: Path
    config: TrainConfig
    lines: list[dict[str, Any]]
    parameters: int

    def at(self, report: str) -> dict[str, Any]:
        """The line of the "last" round, or of the "best" one on test (the first of equals)."""
        return self.lines[-1] if report == "last" else max(self.lines, key=lambda line: line["accuracy"])

    def rounds_to(self, target: float) -> int | None:
        """The first round whose accuracy reaches `target` (a fraction); None if no round does."""
        return next((line["round"] for line in self.lines if line["accuracy"] >= target), None)

    def paper_mb(self, rounds: int) -> float:
        """MiB that one client sent and received in the first rounds, as the paper counts."""
        return paper_mb(rounds, self.parameters)

    def true_bytes(self, rounds: int) -> int:
        """Bytes of the messages that one client sent and received in the first rounds.

        All clients that train exchange the same; a client without training samples sends nothing and is left out.
        """
        per_client: dict[int, int] = {}
        for line in self.lines[:rounds]:
            for client in line["clients"]:
                total = client["bytes_sent"] + client["bytes_received"]
                per_client[client["client"]] = per_client.get(client["client"], 0) + total
        return max(per_client.values())


def read_ledger(path: Path) -> Ledger:
    """Read the folder of a finished run without changing it.

    Raises:
        FastdlpError: not a run, not finished, or damaged.
    """
    folder = RunFolder(path)
    config = folder.config()
    summary = folder.summary()
    if summary is None:
        raise FastdlpError(f"{path} has not ended: finish it with fastdlp train --resume {path}")
    parameters = summary.get("uploaded_parameters")
    if not isinstance(parameters, int):
        raise FastdlpError(f"{path / SUMMARY} lacks uploaded_parameters: {_HINT}")
    return Ledger(path, config, folder.metrics(_checked, config.rounds or 0, _HINT), parameters)


def _checked(line: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics.jsonl with the entries that are read here. Raises one of `DAMAGED`."""
    if not all(math.isfinite(line[name]) for name in ("accuracy", "clients_std", "clients_lowest")):
        raise ValueError("a metric is not finite")
    if not line["clients"]:
        raise ValueError("it has no clients")
    for client in line["clients"]:
        for name in ("client", "bytes_sent", "bytes_received"):
            if not isinstance(client[name], int):
                raise ValueError(f"{name} is not an integer")
    return line
