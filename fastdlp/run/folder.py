"""The run folder: what was asked, what was dealt, what came out.

config.json        the resolved config
partition.json     client → sample ids
metrics.jsonl      a line per round: every client's figures and every loss
checkpoint.safetensors
adapters/          client-00.safetensors …, server.safetensors, at the end
summary.json       at the end
trace/             with --trace: see fastdlp.run.trace
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from fastdlp.config import TrainConfig
from fastdlp.data.partition import Partition
from fastdlp.data.partition_file import save_partition
from fastdlp.errors import FastdlpError
from fastdlp.files import check_free, read_json, write_atomic

CONFIG, PARTITION, METRICS, SUMMARY, ADAPTERS = (
    "config.json",
    "partition.json",
    "metrics.jsonl",
    "summary.json",
    "adapters",
)


class RunFolder:
    """One run's folder, which exists and holds a config."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / CONFIG).is_file():
            what = "is not a run folder" if path.exists() else "does not exist"
            raise FastdlpError(f"{path} {what}: name the folder that fastdlp train made")

    @staticmethod
    def check_free(path: Path, overwrite: bool) -> None:
        """Refuse a folder that no run may be written to, see `fastdlp.files.check_free`."""
        check_free(path, CONFIG, "run", overwrite)

    @staticmethod
    def create(path: Path, config: TrainConfig, partition: Partition, ids: Sequence[str], overwrite: bool) -> RunFolder:
        """Make the folder with config and partition; it appears under its name only when both are in it.

        Raises:
            FastdlpError: as `check_free`, or the disk refuses.
        """
        RunFolder.check_free(path, overwrite)
        named, path = path, Path(os.path.realpath(path))  # a link stays a link
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        except OSError as error:
            raise FastdlpError(
                f"cannot write to {path.parent}: {error.strerror or error}; name another --out"
            ) from None
        old = fresh.with_name(fresh.name + ".old")
        try:
            fresh.chmod(0o777 & ~_umask())
            write_atomic(fresh / CONFIG, config.to_json())
            save_partition(fresh / PARTITION, partition, ids)
            # A run that is still being written keeps its folder.
            with RunFolder(path).locked() if (path / CONFIG).is_file() else nullcontext():
                if path.exists():
                    os.replace(path, old)  # a folder does not take the place of a full one
                try:
                    os.replace(fresh, path)
                except OSError:
                    if old.exists():
                        os.replace(old, path)
                    raise
        except OSError as error:
            raise FastdlpError(f"cannot write {named}: {error.strerror or error}") from None
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
        return RunFolder(named)

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
        try:
            config = TrainConfig.from_json((self.path / CONFIG).read_text(errors="replace"))
            config.check()
            return config
        except FastdlpError as error:
            raise FastdlpError(f"{self.path / CONFIG}: {error}") from None
        except OSError as error:
            raise FastdlpError(f"cannot read {self.path / CONFIG}: {error.strerror or error}") from None

    def change_config(self, config: TrainConfig) -> None:
        """Replace the config of a run that is made longer; its summary no longer holds."""
        write_atomic(self.path / CONFIG, config.to_json())
        (self.path / SUMMARY).unlink(missing_ok=True)

    def summary(self) -> dict[str, Any] | None:
        """The summary, or None while the run has not ended."""
        path = self.path / SUMMARY
        if not path.exists():
            return None
        summary = read_json(path, "summary")
        if not isinstance(summary, dict) or "rounds" not in summary:
            raise FastdlpError(f"{path} is not a summary: remove it and go on with --resume {self.path}")
        return summary

    def started(self) -> bool:
        """Whether a round is recorded."""
        path = self.path / METRICS
        return path.exists() and path.stat().st_size > 0

    def append_round(self, line: dict[str, Any]) -> None:
        """Add a round to metrics.jsonl. Raises FastdlpError where the disk refuses."""
        try:
            with open(self.path / METRICS, "a") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise FastdlpError(f"cannot write {self.path / METRICS}: {error.strerror or error}") from None

    def rounds(self, upto: int) -> list[dict[str, Any]]:
        """The lines of rounds 1..upto; whatever a stopped run wrote behind them is cut off the file.

        Raises:
            FastdlpError: a line is missing.
        """

        def complete(lines: list[dict[str, Any]]) -> None:
            if [line["round"] for line in lines] != list(range(1, upto + 1)):
                raise FastdlpError(
                    f"{self.path / METRICS} does not hold the rounds 1 to {upto}: start again with --overwrite"
                )

        return cut_lines(self.path / METRICS, upto, complete)

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write summary.json, whole or not at all."""
        write_atomic(self.path / SUMMARY, json.dumps(summary, indent=1) + "\n")


def cut_lines(
    path: Path, upto: int, check: Callable[[list[dict[str, Any]]], None] = lambda lines: None
) -> list[dict[str, Any]]:
    """Read a .jsonl file up to its first line that is torn or of a later round, and cut the file there.

    `check` sees the lines first: what it raises leaves the file as it is.
    """
    lines: list[dict[str, Any]] = []
    data = path.read_bytes() if path.exists() else b""
    kept = 0
    for raw in data.splitlines(keepends=True):
        try:
            line = json.loads(raw)
            if not raw.endswith(b"\n") or not line["round"] <= upto:
                break
        except (ValueError, TypeError, KeyError):
            break
        lines.append(line)
        kept += len(raw)
    check(lines)
    if kept < len(data):
        write_atomic(path, data[:kept])
    return lines


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
