"""A cache of the session's own, a tiny federation of three clients, and the command line called in-process."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

CLI = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTDLP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A partition file of digits: clients of 12, 7 and 5 training samples and 4 test samples each."""
    members, at = {}, 0
    for client, (train, test) in enumerate([(12, 4), (7, 4), (5, 4)]):
        names = [f"digits/{i:05d}" for i in range(at, at + train + test)]
        members[str(client)] = {"train": names[:train], "test": names[train:]}
        at += train + test
    path = tmp_path_factory.mktemp("partition") / "few.json"
    path.write_text(json.dumps({"format": "fastdlp-partition", "version": 1, "clients": members}))
    return path


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CLI:
    """Call the command line's own function: (exit code, stdout, stderr)."""
    from fastdlp.cli.main import main

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fastdlp", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main()
        return (exit_.value.code, *capsys.readouterr())

    return call


def _content(path: Path) -> Any:
    """A file without what may differ between equal runs: seconds and the run's own place."""
    if path.name == "config.json":
        return json.loads(path.read_text()) | {"out": None}
    if path.name == "summary.json":
        summary = json.loads(path.read_text())
        summary["config"]["out"] = None
        return {key: value for key, value in summary.items() if not key.startswith("seconds_")}
    if path.name == "metrics.jsonl":
        return [json.loads(line) | {"seconds": None} for line in path.read_text().splitlines()]
    return path.read_bytes()


@pytest.fixture(scope="session")
def same_run() -> Callable[[Path, Path], None]:
    """Assert that two run folders hold the same files with the same content, to the bit."""

    def compare(one: Path, other: Path) -> None:
        files, others = ({p.relative_to(run) for p in run.rglob("*") if p.is_file()} for run in (one, other))
        assert files == others
        different = [str(file) for file in sorted(files) if _content(one / file) != _content(other / file)]
        assert different == []

    return compare
