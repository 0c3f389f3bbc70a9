"""A partition as a JSON file of sample ids, which any machine reads back, and the partition that a config names.

    {"format": "fastdlp-partition", "version": 1, ..., "clients": {"0": {"train": [ids], "test": [ids], "val": [ids]}}}

`val` is missing without validation.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastdlp.config import TrainConfig
from fastdlp.data.partition import SCHEMES, Partition, hold_out, keep_shots, make_partition
from fastdlp.errors import FastdlpError
from fastdlp.files import read_json, write_atomic

_FORMAT, _VERSION = "fastdlp-partition", 1
# Fields besides the clients: accepted types and the value of a file without them.
_FIELDS: dict[str, tuple[tuple[type, ...], Any]] = {
    "dataset": ((str,), ""),
    "fingerprint": ((str,), ""),
    "scheme": ((str,), "file"),
    "beta": ((int, float, type(None)), None),
    "classes_per_client": ((int, type(None)), None),
    "seed": ((int,), 0),
    "draws": ((int,), 1),
    "test_fraction": ((int, float), 0.25),
}


def partition_of(
    config: TrainConfig, labels: np.ndarray, ids: Sequence[str], dataset: str, fingerprint: str = ""
) -> Partition:
    """The partition that a config describes: drawn, or read from a file, then with its shots and validation samples.

    Args:
        config: its `PARTITION_OPTIONS`.
        labels: int [n].
        ids: n sample ids.
        dataset, fingerprint: of the data, recorded in the partition.

    Raises:
        FastdlpError: neither a scheme nor a file; as `make_partition`, `load_partition` and `hold_out`.
    """
    if config.partition in SCHEMES:
        partition = make_partition(labels, config, dataset, fingerprint)
    elif Path(config.partition).is_file():
        partition = load_partition(config.partition, ids, dataset)
    else:
        raise FastdlpError(f"--partition {config.partition!r} is neither {', '.join(SCHEMES)} nor a partition file")
    if config.shots is not None:
        partition = keep_shots(partition, labels, config.shots)
    if config.val_fraction:  # after the shots: validation samples are labeled samples too
        partition = hold_out(partition, config.val_fraction)
    return partition


def save_partition(path: str | os.PathLike[str], partition: Partition, ids: Sequence[str]) -> None:
    """Write a partition as JSON. `ids` are the names of the samples that the partition's indices refer to.

    Raises:
        FastdlpError: the file cannot be written.
    """
    head = {"format": _FORMAT, "version": _VERSION} | {name: getattr(partition, name) for name in _FIELDS}
    lines = [f" {json.dumps(name)}: {json.dumps(value)}," for name, value in head.items()]
    members = []
    parts = {"train": partition.train, "test": partition.test} | ({"val": partition.val} if partition.val else {})
    for client in range(partition.clients):
        sides = [f'   "{side}": {json.dumps([ids[i] for i in part[client]])}' for side, part in parts.items()]
        members.append(f'  "{client}": {{\n' + ",\n".join(sides) + "\n  }")
    write_atomic(path, "\n".join(["{", *lines, ' "clients": {', ",\n".join(members), " }", "}", ""]))


def load_partition(path: str | os.PathLike[str], ids: Sequence[str], dataset: str = "") -> Partition:
    """Read a partition and map its sample ids to indices into `ids`.

    Samples that the file does not name are not used. `dataset` is the name of the data of `ids`, for messages.

    Raises:
        FastdlpError: file missing, not JSON or not a partition; no client; an id twice, or not in the data.
    """
    document = read_json(path, "partition")
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        raise FastdlpError(f"{path} is not a partition file: it lacks the format {_FORMAT!r}")
    if document.get("version") != _VERSION:
        raise FastdlpError(
            f"{path} is a partition of version {document.get('version')!r}; this fastdlp reads {_VERSION}"
        )
    members = document.get("clients")
    if not isinstance(members, dict) or not members:
        raise FastdlpError(f"the partition {path} names no client")
    clients = [_client(path, client, member) for client, member in members.items()]
    _check_ids(path, [name for sides in clients for names in sides for name in names], ids, document, dataset)

    index = {name: position for position, name in enumerate(ids)}
    train, test, val = (
        [np.sort(np.array([index[n] for n in c[side]], np.int64)) for c in clients] for side in range(3)
    )
    if not any(len(samples) for samples in train):
        raise FastdlpError(f"in the partition {path} no client has a training sample")
    fields: dict[str, Any] = {name: document.get(name, default) for name, (_, default) in _FIELDS.items()}
    for name, value in fields.items():
        if not isinstance(value, _FIELDS[name][0]) or isinstance(value, bool):
            raise FastdlpError(f"in the partition {path} the field {name!r} is {value!r}")
        if float in _FIELDS[name][0] and value is not None:
            fields[name] = float(fields[name])
    return Partition(train, test, **fields, val=val if any(len(samples) for samples in val) else [])


def _client(path: Any, client: str, member: Any) -> tuple[list[str], ...]:
    """The training, test and validation ids of one client of a file."""
    member = member if isinstance(member, dict) else {}
    sides = member.get("train"), member.get("test"), member.get("val", [])
    if not all(isinstance(names, list) and all(isinstance(n, str) for n in names) for names in sides):
        raise FastdlpError(f"in the partition {path} client {client!r} lacks the lists of ids train and test")
    return sides


def _check_ids(path: Any, names: list[str], ids: Sequence[str], document: dict[str, Any], dataset: str) -> None:
    """Raise FastdlpError where a name occurs twice or is not among `ids`."""

    def first(names: list[str]) -> str:
        return repr(names[0]) + (f" and {len(names) - 1} more" if len(names) > 1 else "")

    if twice := [name for name, uses in Counter(names).items() if uses > 1]:
        raise FastdlpError(f"the partition {path} uses {first(twice)} more than once")
    known = set(ids)
    if missing := [name for name in names if name not in known]:
        original = document.get("dataset")
        note = f"; its data set is {original!r}" if original and original != dataset else ""
        raise FastdlpError(
            f"the partition {path} names samples that the data set {dataset or 'given'} does not have: "
            f"{first(missing)}{note}"
        )
