"""The folder of a sweep: its record, its members' run folders and what is written beside them.

sweep.json                what was asked, and which members diverged
lr0.001-alpha0.1-seed0/   a run folder for every member
checkpoint.safetensors    all members' state while the sweep runs
summary.json              members side by side, and what validation picks
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from fastdlp.config import TrainConfig
from fastdlp.errors import FastdlpError
from fastdlp.files import check_free, read_json, write_atomic
from fastdlp.run.checkpoint import FILE as CHECKPOINT
from fastdlp.run.folder import CONFIG, SUMMARY, RunFolder

FILE = "sweep.json"
_NUMBER = r"\d[\d.e+-]*"
_MEMBER = re.compile(rf"lr{_NUMBER}-alpha{_NUMBER}-seed\d+")


def member_name(config: TrainConfig) -> str:
    """The name of a member's folder."""
    return f"lr{config.lr:g}-alpha{config.alpha:g}-seed{config.seed}"


class SweepFolder:
    """One sweep's folder, which holds a record.

    Attributes:
        path: the folder.
        members: the names of the members' folders.
        failed: the members that diverged, each with a line that says how.

    Raises:
        FastdlpError: the folder holds no record, or a damaged one.
    """

    def __init__(self, path: Path) -> None:
        if not (path / FILE).is_file():
            raise FastdlpError(f"{path} is not a sweep: name the folder that fastdlp sweep made")
        self.path = path
        document = read_json(path / FILE, "sweep")
        document = document if isinstance(document, dict) else {}
        self.members: list[str] = document.get("members") or []
        self.failed: dict[str, str] = document.get("failed")  # type: ignore[assignment]
        if not (
            isinstance(self.members, list)
            and self.members
            and all(isinstance(name, str) and _MEMBER.fullmatch(name) for name in self.members)
            and isinstance(self.failed, dict)
            and all(name in self.members and isinstance(why, str) for name, why in self.failed.items())
        ):
            raise FastdlpError(f"{path / FILE} is damaged: start the sweep again with --out {path} --overwrite")

    @staticmethod
    def check_free(path: Path, overwrite: bool) -> None:
        """Refuse a folder that no sweep may be written to, see `fastdlp.files.check_free`."""
        check_free(path, FILE, "sweep", overwrite)

    @staticmethod
    def create(path: Path, members: Sequence[str], overwrite: bool) -> SweepFolder:
        """Make the folder with its record, in the place of an earlier sweep where it may be replaced.

        Raises:
            FastdlpError: as `check_free`; another process writes to the earlier sweep; the disk refuses.
        """
        SweepFolder.check_free(path, overwrite)
        if (path / FILE).is_file():
            _remove(path)
        _write(path, members, {})
        return SweepFolder(path)

    def fail(self, member: str, why: str) -> None:
        """Note that a member diverged."""
        self.failed[member] = why
        _write(self.path, self.members, self.failed)

    def runs(self) -> dict[str, RunFolder]:
        """The members' run folders. Raises FastdlpError where one is missing."""
        for name in self.members:
            if not (self.path / name / CONFIG).is_file():
                raise FastdlpError(
                    f"{self.path} lacks its member {name}: start the sweep again with --out {self.path} --overwrite"
                )
        return {name: RunFolder(self.path / name) for name in self.members}

    def summary(self) -> dict[str, Any] | None:
        """The summary, or None while the sweep has not ended. Raises FastdlpError for a damaged one."""
        path = self.path / SUMMARY
        if not path.exists():
            return None
        summary = read_json(path, "summary")
        if not isinstance(summary, dict) or not {"config", "members", "settings"} <= set(summary):
            raise FastdlpError(f"{path} is not a sweep's summary: remove it and go on with --resume {self.path}")
        return summary


def _write(path: Path, members: Sequence[str], failed: dict[str, str]) -> None:
    write_atomic(path / FILE, json.dumps({"members": list(members), "failed": failed}, indent=1) + "\n")


def _remove(path: Path) -> None:
    """Remove a sweep, whatever its record says: what has a member's name, and the files beside."""
    members = [run for run in path.iterdir() if run.is_dir() and not run.is_symlink() and _MEMBER.fullmatch(run.name)]
    with ExitStack() as stack:
        for run in members:
            if (run / CONFIG).is_file():
                stack.enter_context(RunFolder(run).locked())
        for run in members:
            shutil.rmtree(run, ignore_errors=True)
        for name in (FILE, SUMMARY, CHECKPOINT):
            (path / name).unlink(missing_ok=True)
