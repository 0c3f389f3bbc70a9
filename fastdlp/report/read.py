"""Run folders as arrays. Nothing here writes to them, and a run may still be going on."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from fastdlp.config import TrainConfig
from fastdlp.errors import FastdlpError
from fastdlp.files import read_json
from fastdlp.run.folder import METRICS, PARTITION, SUMMARY, RunFolder

CHECKPOINT = "checkpoint.safetensors"  # fastdlp.run.checkpoint's, which would load torch
_DAMAGED = (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)


@dataclass(frozen=True, eq=False)
class PerClass:
    """Test samples of the last round: class names [K], correct and n, int [clients, K]."""

    names: list[str]
    correct: np.ndarray
    n: np.ndarray


@dataclass(frozen=True, eq=False)
class Run:
    """What a run folder records, R rounds of C clients. Accuracies are fractions.

    Attributes:
        name: the folder's, or its whole path where two runs share a name.
        config: as the run resolved it.
        dealt: the head of partition.json, without the ids.
        members: a digest of client → sample ids.
        data, weights: fingerprints; "" where the folder does not tell.
        clients: their numbers, [C].
        n: test samples, int [C].
        accuracy: Σcorrect/Σn, [R].
        per_client: [R, C], NaN for a client without test samples.
        validation: accuracy on the validation samples, [R], or None.
        losses: [R] by name, NaN where there was none.
        gates: share of gates at zero by site part, [R]; empty for a method without a gate.
        gates_zero: share of all gates, [R].
        exchanged: bytes up to each round, up and down, all clients, [R].
        seconds: of all recorded rounds, in a finished run with the preparation.
        finished: whether it has a summary; zero_shot and uploaded are None without one.
        uploaded: parameters that a client uploads in a round.
        chosen: the round chosen on validation and its accuracy on test, or None.
        per_class: None where the run does not record it.
    """

    name: str
    config: TrainConfig
    dealt: dict[str, Any]
    members: str
    data: str
    weights: str
    clients: list[int]
    n: np.ndarray
    accuracy: np.ndarray
    per_client: np.ndarray
    validation: np.ndarray | None
    losses: dict[str, np.ndarray]
    gates: dict[str, np.ndarray]
    gates_zero: np.ndarray
    exchanged: np.ndarray
    seconds: float
    finished: bool
    zero_shot: float | None
    uploaded: int | None
    chosen: tuple[int, float] | None
    per_class: PerClass | None

    @property
    def rounds(self) -> int:
        """Recorded rounds."""
        return len(self.accuracy)

    @property
    def best(self) -> tuple[int, float]:
        """The first round that is best on test, from 1, and its accuracy."""
        at = int(self.accuracy.argmax())
        return at + 1, float(self.accuracy[at])

    def spread(self, figure: str) -> np.ndarray:
        """The lowest ("min"), highest ("max"), mean ("mean") or standard deviation ("std") of the clients, [R]."""
        have = self.per_client[:, self.n > 0]
        return np.asarray(getattr(have, figure)(axis=1))


@dataclass(frozen=True, eq=False)
class _Round:
    clients: list[int]
    correct: list[int]
    n: list[int]
    accuracy: float
    validation: float | None
    losses: dict[str, float]
    gates: dict[str, float]
    gates_zero: float  # nan without gates
    exchanged: int
    seconds: float

    def shape(self) -> tuple[Any, ...]:
        """What all rounds of a run have in common."""
        return self.clients, self.n, list(self.losses), list(self.gates), self.validation is None


def read_runs(paths: Sequence[str | os.PathLike[str]]) -> list[Run]:
    """Read run folders, in the order given.

    Raises:
        FastdlpError: no path, a path given twice, no run folder, no finished round, or a damaged record.
    """
    if not paths:
        raise FastdlpError("name at least one run folder")
    places = [os.path.realpath(path) for path in paths]
    if twice := [place for place, uses in Counter(places).items() if uses > 1]:
        raise FastdlpError(f"the run {twice[0]} is given more than once")
    short = [os.path.basename(place) for place in places]
    return [
        _read_run(Path(path), base if short.count(base) == 1 else os.fspath(path)) for path, base in zip(paths, short)
    ]


def _read_run(path: Path, name: str) -> Run:
    folder = RunFolder(path)
    config, summary = folder.config(), folder.summary()
    rounds = _read_rounds(path / METRICS, summary)
    dealt, members = _read_partition(path / PARTITION)
    recorded = _read_identity(path / CHECKPOINT)
    first = rounds[0]
    correct, n = np.array([entry.correct for entry in rounds]), np.array(first.n)
    with np.errstate(invalid="ignore"):
        per_client = correct / n  # 0/0 is NaN: no accuracy
    ended = {} if summary is None else _read_summary(path / SUMMARY, summary, len(first.clients))
    return Run(
        name=os.fsencode(name).decode(errors="replace"),
        config=config,
        dealt=dealt,
        members=members,
        data=recorded.get("data") or str(dealt.get("fingerprint", "")),
        weights=recorded.get("weights", ""),
        clients=first.clients,
        n=n,
        accuracy=np.array([entry.accuracy for entry in rounds]),
        per_client=per_client,
        validation=None if first.validation is None else np.array([entry.validation for entry in rounds], float),
        losses={name: np.array([entry.losses[name] for entry in rounds]) for name in first.losses},
        gates={part: np.array([entry.gates[part] for entry in rounds]) for part in first.gates},
        gates_zero=np.array([entry.gates_zero for entry in rounds]),
        exchanged=np.cumsum([entry.exchanged for entry in rounds]),
        finished=summary is not None,
        **({"seconds": sum(entry.seconds for entry in rounds)} | _NOT_ENDED | ended),
    )


_NOT_ENDED: dict[str, Any] = {"zero_shot": None, "uploaded": None, "chosen": None, "per_class": None}


def _read_rounds(path: Path, summary: dict[str, Any] | None) -> list[_Round]:
    """The rounds of metrics.jsonl, at least one; of a finished run, all of them."""
    try:
        *whole, rest = path.read_bytes().split(b"\n") if path.exists() else [b""]
    except OSError as error:
        raise FastdlpError(f"cannot read {path}: {error.strerror or error}") from None
    # A run that goes on, or was killed, may have half a line at the end.
    lines = whole + [rest] if rest and summary is not None else whole
    rounds = []
    for number, raw in enumerate(lines, 1):
        try:
            rounds.append(_parse_round(json.loads(raw), number))
            if rounds[-1].shape() != rounds[0].shape():
                raise ValueError("its clients, losses or gates are not those of line 1")
        except _DAMAGED as error:
            what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            raise FastdlpError(f"{path} is damaged in line {number}: {what}; leave this run out") from None
    if summary is not None and len(rounds) != summary["rounds"]:
        raise FastdlpError(
            f"{path} holds {len(rounds)} rounds and {SUMMARY} tells of {summary['rounds']}: leave this run out"
        )
    if not rounds:
        raise FastdlpError(f"{path.parent} has not finished a round: wait for one, or leave this run out")
    return rounds


def _parse_round(line: dict[str, Any], number: int) -> _Round:
    """Raises one of _DAMAGED."""
    if line["round"] != number:
        raise ValueError(f"it is of round {line['round']!r}")
    clients = line["clients"]
    correct, n = ([_whole(client[key]) for client in clients] for key in ("correct", "n"))
    if not sum(n) or any(right > of for right, of in zip(correct, n)):
        raise ValueError("more correct predictions than samples, or no sample")
    validation = line.get("accuracy_val")
    return _Round(
        clients=[_whole(client["client"]) for client in clients],
        correct=correct,
        n=n,
        accuracy=_share(line["accuracy"]),
        validation=None if validation is None else _share(validation),
        losses={name: math.nan if v is None else _finite(v) for name, v in line["losses"].items()},
        gates={part: _share(v) for part, v in line["gates_zero_by_part"].items()},
        gates_zero=math.nan if line["gates_zero_share"] is None else _share(line["gates_zero_share"]),
        exchanged=sum(_whole(client[key]) for client in clients for key in ("bytes_sent", "bytes_received")),
        seconds=_finite(line["seconds"]),
    )


def _read_summary(path: Path, summary: dict[str, Any], clients: int) -> dict[str, Any]:
    """The fields of Run that only a finished run has."""
    try:
        at, chosen = summary.get("round_chosen"), summary.get("accuracy_chosen")
        return {
            "seconds": _finite(summary["seconds_total"]),
            "zero_shot": _share(summary["zero_shot"]),
            "uploaded": _whole(summary["uploaded_parameters"]),
            "chosen": None if at is None else (_whole(at), _share(chosen)),
            "per_class": _parse_classes(summary["per_class"], clients) if summary.get("per_class") else None,
        }
    except _DAMAGED as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise FastdlpError(f"{path} is damaged: {what}; leave this run out") from None


def _parse_classes(entry: dict[str, Any], clients: int) -> PerClass:
    """Raises one of _DAMAGED."""
    names = [str(name) for name in entry["class_names"]]
    correct, n = (np.array([[_whole(v) for v in row] for row in entry[key]], int) for key in ("correct", "n"))
    if not correct.shape == n.shape == (clients, len(names)) or (correct > n).any():
        raise ValueError("per_class is not one count per client and class")
    return PerClass(names, correct, n)


def _read_partition(path: Path) -> tuple[dict[str, Any], str]:
    """The head of a partition file, and a digest of client → sample ids."""
    document = read_json(path, "partition")
    if not isinstance(document, dict) or not isinstance(document.get("clients"), dict):
        raise FastdlpError(f"{path} is not a partition file: leave this run out")
    members = json.dumps(document.pop("clients"), sort_keys=True)
    return document, hashlib.sha256(members.encode()).hexdigest()


def _read_identity(path: Path) -> dict[str, str]:
    """The fingerprints of data and weights that a checkpoint tells; none where there is no checkpoint."""
    if not path.exists():
        return {}
    try:
        with safe_open(path, "numpy") as file:
            found = json.loads((file.metadata() or {}).get("fastdlp", "{}"))
        return {key: str(found[key]) for key in ("data", "weights") if key in found}
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise FastdlpError(f"cannot read {path}: {error}; leave this run out") from None


def _whole(value: Any) -> int:
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value


def _finite(value: Any) -> float:
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no finite number")
    return float(value)


def _share(value: Any) -> float:
    if not 0 <= _finite(value) <= 1:
        raise ValueError(f"{value!r} is no share of 1")
    return float(value)
