"""A finished run's rounds, and what its clients exchanged: as the paper counts, and in bytes of messages."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdlp.config import TrainConfig
from fastdlp.errors import FastdlpError
from fastdlp.report.paper.tables import paper_mb
from fastdlp.run.folder import METRICS, SUMMARY, RunFolder

_FIGURES = ("accuracy", "clients_std", "clients_lowest")


@dataclass(frozen=True)
class Ledger:
    """A finished run: its config, the lines of its rounds, and the parameters that a client sends in a round."""

    path: Path
    config: TrainConfig
    lines: list[dict[str, Any]]
    parameters: int

    def at(self, report: str) -> dict[str, Any]:
        """The line of the last round, or of the best one on test (the first of equals)."""
        return self.lines[-1] if report == "last" else max(self.lines, key=lambda line: line["accuracy"])

    def rounds_to(self, target: float) -> int | None:
        """The first round whose accuracy reaches `target` (a fraction); None where none does."""
        return next((line["round"] for line in self.lines if line["accuracy"] >= target), None)

    def paper_mb(self, rounds: int) -> float:
        """MiB that one client sent and received in the first rounds, as the paper counts."""
        return paper_mb(rounds, self.parameters)

    def true_bytes(self, rounds: int) -> int:
        """Bytes of the messages that one client sent and received in the first rounds.

        All clients that train exchange the same; one without training samples sends nothing and is not meant.
        """
        per_client: dict[int, int] = {}
        for line in self.lines[:rounds]:
            for client in line["clients"]:
                total = client["bytes_sent"] + client["bytes_received"]
                per_client[client["client"]] = per_client.get(client["client"], 0) + total
        return max(per_client.values())


def read_ledger(path: Path) -> Ledger:
    """Read a finished run's folder; nothing in it is changed.

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
        raise FastdlpError(f"{path / SUMMARY} does not tell uploaded_parameters: remove the folder and run it again")
    return Ledger(path, config, _lines(path / METRICS, config.rounds or 0), parameters)


def _lines(path: Path, rounds: int) -> list[dict[str, Any]]:
    """The lines of rounds 1 to `rounds`, each checked for what is read from it."""
    try:
        raw = path.read_text(errors="replace").splitlines()
    except OSError as error:
        raise FastdlpError(f"cannot read {path}: {error.strerror or error}") from None
    lines = []
    for number, text in enumerate(raw, start=1):
        try:
            line = json.loads(text)
            sound = line["round"] == number and all(math.isfinite(line[name]) for name in _FIGURES)
            sound = sound and all(
                isinstance(client[name], int)
                for client in line["clients"]
                for name in ("client", "bytes_sent", "bytes_received")
            )
        except (ValueError, TypeError, KeyError, RecursionError):
            sound = False
        if not sound or not line["clients"]:
            raise FastdlpError(f"{path} is damaged in line {number}: remove the run's folder and run it again")
        lines.append(line)
    if len(lines) != rounds:
        raise FastdlpError(
            f"{path} holds {len(lines)} rounds and the run has {rounds}: remove the run's folder and run it again"
        )
    return lines
