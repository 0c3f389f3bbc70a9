"""The run folder: the files of a run, and how they are read and written.

config.json        the resolved config
partition.json     client → sample ids
metrics.jsonl      a line per round: the metrics and losses of every client
checkpoint.safetensors
adapters/          client-00.safetensors …, server.safetensors, at the end
summary.json       at the end
trace/             with --trace: see fastdlp.run.trace
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from fastdlp.config import TrainConfig
from fastdlp.data.partition import Partition
from fastdlp.data.partition_file import save_partition
from fastdlp.errors import FastdlpError
from fastdlp.files import atomic_folder, check_free, os_errors, read_json, write_atomic

CONFIG, PARTITION, METRICS = "config.json", "partition.json", "metrics.jsonl"
CHECKPOINT, ADAPTERS, SUMMARY = "checkpoint.safetensors", "adapters", "summary.json"


class RunFolder:
    """The folder of one run, which exists and holds a config."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / CONFIG).is_file():
            what = "is not a run folder" if path.exists() else "does not exist"
            raise FastdlpError(f"{path} {what}: name a folder that fastdlp train wrote")

    @staticmethod
    def create(path: Path, config: TrainConfig, partition: Partition, ids: Sequence[str], overwrite: bool) -> RunFolder:
        """Create the folder with config and partition; it gets its name only when both are in it.

        Raises:
            FastdlpError: as `check_free`, or a write fails.
        """
        check_free(path, CONFIG, "run", overwrite)
        # A run that is still being written keeps its folder.
        idle = RunFolder(path).locked() if (path / CONFIG).is_file() else nullcontext()
        with idle, atomic_folder(path, replace=True) as fresh:
            write_atomic(fresh / CONFIG, config.to_json())
            save_partition(fresh / PARTITION, partition, ids)
        return RunFolder(path)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from writing to this folder. Raises FastdlpError while another one does."""
        handle = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError:
            raise FastdlpError(f"another process is writing to {self.path}: wait for it, or stop it") from None
        finally:
            os.close(handle)

    def config(self) -> TrainConfig:
        """The resolved config of the run."""
        path = self.path / CONFIG
        with os_errors(f"read {path}"):
            text = path.read_text(errors="replace")
        try:
            config = TrainConfig.from_json(text)
            config.check()
        except FastdlpError as error:
            raise FastdlpError(f"{path}: {error}") from None
        return config

    def change_config(self, config: TrainConfig) -> None:
        """Replace the config of a run that gets more rounds, and remove its summary, which is outdated."""
        write_atomic(self.path / CONFIG, config.to_json())
        (self.path / SUMMARY).unlink(missing_ok=True)

    def summary(self) -> dict[str, Any] | None:
        """The summary, or None while the run has not ended. Raises FastdlpError for a damaged one."""
        return read_summary(self.path, {"rounds"})

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write summary.json, whole or not at all."""
        write_atomic(self.path / SUMMARY, json.dumps(summary, indent=1) + "\n")


def read_summary(folder: Path, keys: set[str]) -> dict[str, Any] | None:
    """The summary in a folder, or None if there is none. Raises FastdlpError for one that lacks any of the keys."""
    path = folder / SUMMARY
    if not path.exists():
        return None
    summary = read_json(path, "summary")
    if not isinstance(summary, dict) or not keys <= set(summary):
        raise FastdlpError(f"{path} is not a summary: remove it and resume with --resume {folder}")
    return summary


def append_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Add lines to a .jsonl file. Raises FastdlpError if the write fails."""
    with os_errors(f"write {path}"), open(path, "a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())


def truncate_lines(path: Path, finished: int, every_round: bool = False) -> list[dict[str, Any]]:
    """Remove from a .jsonl file everything from the first line that is incomplete or later than round `finished`.

    Returns the lines that stay. The file may be missing. With `every_round` it must hold exactly one line for each of
    the rounds 1 to `finished`; otherwise it is left unchanged and FastdlpError raised.
    """
    lines: list[dict[str, Any]] = []
    data = path.read_bytes() if path.exists() else b""
    size = 0
    for raw in data.splitlines(keepends=True):
        try:
            line = json.loads(raw)
            if not raw.endswith(b"\n") or not line["round"] <= finished:
                break
        except (ValueError, TypeError, KeyError):
            break
        lines.append(line)
        size += len(raw)
    if every_round and [line["round"] for line in lines] != list(range(1, finished + 1)):
        raise FastdlpError(f"{path} does not hold the rounds 1 to {finished}: start again with --overwrite")
    if size < len(data):
        write_atomic(path, data[:size])
    return lines
