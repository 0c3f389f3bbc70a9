"""The folder of a sweep: its record and the run folders of its members.

sweep.json                names of the members, and which of them diverged
lr0.001-alpha0.1-seed0/   a run folder for every member
checkpoint.safetensors    state of all members while the sweep runs
summary.json              results of the members, and the setting that is best on validation
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
from fastdlp.run.folder import CHECKPOINT, CONFIG, SUMMARY, RunFolder, read_summary

FILE = "sweep.json"
_NUMBER = r"\d[\d.e+-]*"
_MEMBER = re.compile(rf"lr{_NUMBER}-alpha{_NUMBER}-seed\d+")


def member_name(config: TrainConfig) -> str:
    """The name of a member's folder."""
    return f"lr{config.lr:g}-alpha{config.alpha:g}-seed{config.seed}"


class SweepFolder:
    """The folder of one sweep. Raises FastdlpError where it holds no record, or a damaged one."""

    def __init__(self, path: Path) -> None:
        if not (path / FILE).is_file():
            raise FastdlpError(f"{path} is not a sweep: name a folder that fastdlp sweep wrote")
        self.path = path
        document = read_json(path / FILE, "sweep")
        document = document if isinstance(document, dict) else {}
        self.members: list[str] = document.get("members") or []  # names of their folders
        self.failed: dict[str, str] = document.get("failed")  # type: ignore[assignment] # those that diverged, and why
        if not (
            isinstance(self.members, list)
            and self.members
            and all(isinstance(name, str) and _MEMBER.fullmatch(name) for name in self.members)
            and isinstance(self.failed, dict)
            and all(name in self.members and isinstance(why, str) for name, why in self.failed.items())
        ):
            raise FastdlpError(f"{path / FILE} is damaged: start the sweep again with --out {path} --overwrite")

    @staticmethod
    def create(path: Path, members: Sequence[str], overwrite: bool) -> SweepFolder:
        """Create the folder with its record; with `overwrite`, an earlier sweep is removed first.

        Raises:
            FastdlpError: as `check_free`; another process writes to the earlier sweep; a write fails.
        """
        check_free(path, FILE, "sweep", overwrite)
        if (path / FILE).is_file():
            _remove(path)
        _write(path, members, {})
        return SweepFolder(path)

    def fail(self, member: str, why: str) -> None:
        """Record that a member diverged, and check that others are left."""
        self.failed[member] = why
        _write(self.path, self.members, self.failed)
        self.check_alive()

    def check_alive(self) -> None:
        """Raise FastdlpError where every member has diverged."""
        if len(self.failed) == len(self.members):
            raise FastdlpError(f"every member of the sweep diverged; the first: {next(iter(self.failed.values()))}")

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
        return read_summary(self.path, {"config", "members", "settings"})


def _write(path: Path, members: Sequence[str], failed: dict[str, str]) -> None:
    write_atomic(path / FILE, json.dumps({"members": list(members), "failed": failed}, indent=1) + "\n")


def _remove(path: Path) -> None:
    """Remove a sweep by the names of its files, since its record may be damaged."""
    members = [run for run in path.iterdir() if run.is_dir() and not run.is_symlink() and _MEMBER.fullmatch(run.name)]
    with ExitStack() as stack:
        for run in members:
            if (run / CONFIG).is_file():
                stack.enter_context(RunFolder(run).locked())
        for run in members:
            shutil.rmtree(run, ignore_errors=True)
        for name in (FILE, SUMMARY, CHECKPOINT):
            (path / name).unlink(missing_ok=True)
