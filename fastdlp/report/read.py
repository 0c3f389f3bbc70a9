"""Reads run folders as arrays. The folders are not changed, and their runs may be unfinished."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from fastdlp.config import TrainConfig
from fastdlp.errors import FastdlpError
from fastdlp.files import os_errors, read_json
from fastdlp.run.folder import CHECKPOINT, METRICS, PARTITION, SUMMARY, RunFolder

_HINT = "leave this run out, or remove its folder and run it again"


@dataclass(frozen=True, eq=False)
class PerClass:
    """Test samples of the last round."""

    names: list[str]  # [K]
    correct: np.ndarray  # int [C, K]
    n: np.ndarray  # int [C, K]


@dataclass(frozen=True, eq=False)
class Run:
    """The record of a run of C clients, R rounds. Accuracies are fractions."""

    name: str  # the folder's, or its whole path where two runs share a name
    config: TrainConfig  # resolved
    partition: dict[str, Any]  # partition.json without the sample ids
    assignment: str  # SHA-256 of client → sample ids
    data: str  # fingerprint; "" if not recorded
    clients: list[int]  # their numbers, [C]
    n: np.ndarray  # test samples, int [C]
    accuracy: np.ndarray  # Σ correct / Σ n, [R]
    per_client: np.ndarray  # accuracy, [R, C], NaN for a client without test samples
    validation: np.ndarray | None  # accuracy on the validation samples, [R]
    losses: dict[str, np.ndarray]  # [R] by name, NaN where none was computed
    gates: dict[str, np.ndarray]  # fraction of gates at zero by site part, [R]; empty for a method without gates
    gates_zero: np.ndarray  # fraction of all gates, [R]
    client_bytes: np.ndarray  # cumulative bytes of messages, up and down, int [R, C]
    seconds: float  # of all recorded rounds; of a finished run including the preparation
    finished: bool  # whether there is a summary; without it, the fields below but `weights` are None
    weights: str = ""  # fingerprint; "" if not recorded
    zero_shot: float | None = None  # accuracy before training
    uploaded: int | None = None  # parameters that a client uploads per round
    chosen: tuple[int, float] | None = None  # the round chosen on validation and its accuracy on test
    per_class: PerClass | None = None  # None if not recorded

    @property
    def rounds(self) -> int:
        """Recorded rounds."""
        return len(self.accuracy)

    @property
    def best(self) -> tuple[int, float]:
        """The first round with the highest accuracy on test, from 1, and that accuracy."""
        at = int(self.accuracy.argmax())
        return at + 1, float(self.accuracy[at])

    @property
    def exchanged(self) -> np.ndarray:
        """Cumulative bytes, up and down, all clients, [R]."""
        return self.client_bytes.sum(axis=1)

    def rounds_to(self, target: float) -> int | None:
        """The first round whose accuracy reaches `target` (a fraction); None if no round does."""
        reached = np.flatnonzero(self.accuracy >= target)
        return int(reached[0]) + 1 if len(reached) else None

    def over_clients(self, statistic: str) -> np.ndarray:
        """The "min", "max", "mean" or "std" over the clients that have test samples, [R]."""
        return np.asarray(getattr(self.per_client[:, self.n > 0], statistic)(axis=1))


def read_runs(paths: Sequence[str | os.PathLike[str]]) -> list[Run]:
    """Read run folders, in the order given.

    Raises:
        FastdlpError: no path, a path given twice, no run folder, no finished round, or a damaged record.
    """
    if not paths:
        raise FastdlpError("name at least one run folder")
    resolved = [os.path.realpath(path) for path in paths]
    if repeated := [path for path, count in Counter(resolved).items() if count > 1]:
        raise FastdlpError(f"the run {repeated[0]} is given more than once")
    names = [os.path.basename(path) for path in resolved]
    return [
        _read_run(Path(path), name if names.count(name) == 1 else os.fspath(path)) for path, name in zip(paths, names)
    ]


def read_finished(path: Path) -> Run:
    """Read the folder of a finished run. Raises FastdlpError for another one, as `read_runs`."""
    if RunFolder(path).summary() is None:
        raise FastdlpError(f"{path} has not ended: finish it with fastdlp train --resume {path}")
    return _read_run(path, path.name)


def _read_run(path: Path, name: str) -> Run:
    folder = RunFolder(path)
    config, summary = folder.config(), folder.summary()
    lines = _read_rounds(path / METRICS, None if summary is None else summary["rounds"])
    if not lines:
        raise FastdlpError(f"{path} has not finished a round: wait for one, or {_HINT}")
    first = lines[0]
    n = np.array(first["n"])
    with np.errstate(invalid="ignore"):
        per_client = np.array([line["correct"] for line in lines]) / n  # NaN without test samples
    fields: dict[str, Any] = {"seconds": sum(line["seconds"] for line in lines)}
    if summary is not None:
        fields |= _parse_summary(path / SUMMARY, summary, len(n))
    return Run(
        name=os.fsencode(name).decode(errors="replace"),
        config=config,
        clients=first["clients"],
        n=n,
        accuracy=np.array([line["accuracy"] for line in lines]),
        per_client=per_client,
        validation=None if first["validation"] is None else np.array([line["validation"] for line in lines]),
        losses={loss: np.array([line["losses"][loss] for line in lines]) for loss in first["losses"]},
        gates={part: np.array([line["gates"][part] for line in lines]) for part in first["gates"]},
        gates_zero=np.array([line["gates_zero"] for line in lines]),
        client_bytes=np.cumsum([line["bytes"] for line in lines], axis=0),
        finished=summary is not None,
        **_read_partition(path / PARTITION) | _read_fingerprints(path / CHECKPOINT) | fields,
    )


@contextmanager
def _refusing_damage(where: str) -> Iterator[None]:
    """Raise FastdlpError for what parsing a damaged record raises."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise FastdlpError(f"{where}: {reason}; {_HINT}") from None


def _read_rounds(path: Path, rounds: int | None) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; `rounds` of a finished run, None where the last line may be incomplete."""
    with os_errors(f"read {path}"):
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    if rounds is None and lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    parsed: list[dict[str, Any]] = []
    for number, raw in enumerate(lines, 1):
        with _refusing_damage(f"{path} is damaged in line {number}"):
            line = json.loads(raw)
            if line["round"] != number:
                raise ValueError(f"it is of round {line['round']!r}")
            parsed.append(_parse_round(line))
            if _structure(parsed[-1]) != _structure(parsed[0]):
                raise ValueError("its clients, losses or gates are not those of line 1")
    if rounds is not None and len(parsed) != rounds:
        raise FastdlpError(f"{path} holds {len(parsed)} rounds and the run has {rounds}: {_HINT}")
    return parsed


def _parse_round(line: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics.jsonl, checked."""
    clients, validation, gates_zero = line["clients"], line.get("accuracy_val"), line["gates_zero_share"]
    correct, n = ([_count(client[key]) for client in clients] for key in ("correct", "n"))
    if not sum(n) or any(c > total for c, total in zip(correct, n)):
        raise ValueError("more correct predictions than samples, or no sample")
    return {
        "clients": [_count(client["client"]) for client in clients],
        "correct": correct,
        "n": n,
        "accuracy": _fraction(line["accuracy"]),
        "validation": None if validation is None else _fraction(validation),
        "losses": {name: math.nan if loss is None else _finite(loss) for name, loss in line["losses"].items()},
        "gates": {part: _fraction(zero) for part, zero in line["gates_zero_by_part"].items()},
        "gates_zero": math.nan if gates_zero is None else _fraction(gates_zero),
        "bytes": [_count(client["bytes_sent"]) + _count(client["bytes_received"]) for client in clients],
        "seconds": _finite(line["seconds"]),
    }


def _structure(line: dict[str, Any]) -> tuple[Any, ...]:
    """What must be equal in all rounds of a run."""
    return line["clients"], line["n"], list(line["losses"]), list(line["gates"]), line["validation"] is None


def _parse_summary(path: Path, summary: dict[str, Any], clients: int) -> dict[str, Any]:
    """The fields of `Run` that come from the summary."""
    with _refusing_damage(f"{path} is damaged"):
        number, accuracy = summary.get("round_chosen"), summary.get("accuracy_chosen")
        return {
            "seconds": _finite(summary["seconds_total"]),
            "zero_shot": _fraction(summary["zero_shot"]),
            "uploaded": _count(summary["uploaded_parameters"]),
            "chosen": None if number is None else (_count(number), _fraction(accuracy)),
            "per_class": _parse_classes(summary["per_class"], clients) if summary.get("per_class") else None,
        }


def _parse_classes(entry: dict[str, Any], clients: int) -> PerClass:
    names = [str(name) for name in entry["class_names"]]
    correct, n = (np.array([[_count(value) for value in row] for row in entry[key]], int) for key in ("correct", "n"))
    if not correct.shape == n.shape == (clients, len(names)) or (correct > n).any():
        raise ValueError("per_class is not one count per client and class")
    return PerClass(names, correct, n)


def _read_partition(path: Path) -> dict[str, Any]:
    """The fields of `Run` that come from the partition file."""
    document = read_json(path, "partition")
    if not isinstance(document, dict) or not isinstance(document.get("clients"), dict):
        raise FastdlpError(f"{path} is not a partition file: {_HINT}")
    assignment = json.dumps(document.pop("clients"), sort_keys=True)
    return {
        "partition": document,
        "assignment": hashlib.sha256(assignment.encode()).hexdigest(),
        "data": str(document.get("fingerprint", "")),
    }


def _read_fingerprints(path: Path) -> dict[str, str]:
    """The fingerprints of data and weights in a checkpoint; empty without a checkpoint."""
    if not path.exists():
        return {}
    try:
        with safe_open(path, "numpy") as file:
            metadata = json.loads((file.metadata() or {}).get("fastdlp", "{}"))
        return {key: str(metadata[key]) for key in ("data", "weights") if metadata.get(key)}
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
        raise FastdlpError(f"cannot read {path}: {error}; {_HINT}") from None


def _count(value: Any) -> int:
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is not a count")
    return value


def _finite(value: Any) -> float:
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{value!r} is not a finite number")
    return float(value)


def _fraction(value: Any) -> float:
    if not 0 <= _finite(value) <= 1:
        raise ValueError(f"{value!r} is not a fraction between 0 and 1")
    return float(value)
