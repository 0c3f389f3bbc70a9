"""What `fastdlp sweep` refuses: one line on stderr, exit code 2, and nothing half written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import fastdlp
from fastdlp.run.sweep import Grid, sweep
from fastdlp.run.train import Callbacks, Stopped
from tests.conftest import CLI

Files = dict[Path, bytes]
Refused = Callable[..., str]


def _files(path: Path) -> Files:
    return {p: p.read_bytes() for p in path.rglob("*") if p.is_file()} if path.is_dir() else {}


@pytest.fixture
def refused(cli: CLI, few: Path) -> Refused:
    """Call `fastdlp sweep` on a tiny federation; assert that it is refused in one line, and return that line."""

    def call(*arguments: object) -> str:
        tiny = () if "--resume" in arguments else ("--partition", few, "--rounds", 1, "--batch-size", 4)
        code, out, err = cli("sweep", *tiny, *arguments)
        assert (code, out) == (2, ""), err
        assert err.startswith("fastdlp: "), err
        assert err.count("\n") == 1, err
        assert "Traceback" not in err
        return err

    return call


@pytest.fixture(scope="module")
def stopped(few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of two members, stopped after the first of two rounds."""
    path = tmp_path_factory.mktemp("stopped") / "sweep"
    config = fastdlp.TrainConfig(method="flora", partition=str(few), batch_size=4, rounds=2, out=str(path))
    with pytest.raises(Stopped):
        sweep(config, Grid((1e-3, 2e-3), (0.1,), (0,)), callbacks=Callbacks(should_stop=lambda: True))
    return path


FIRST = "lr0.001-alpha0.1-seed0"
SECOND = "lr0.002-alpha0.1-seed0"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--lr", "1e-3", "--lr", "0.001"), "--lr 0.001 0.001 names a value twice"),
        (("--seed", 1, "--seed", 1), "--seed 1 1 names a value twice"),
        (("--alpha", 0, "--alpha", "0.0"), "--alpha 0.0 0.0 names a value twice"),
        (("--lr", "0.0010000001", "--lr", "0.001"), "the same to six digits"),
        (("--lr", "nan"), "--lr is nan"),
        (("--lr", "inf"), "--lr is inf"),
        (("--lr", "0"), "--lr is 0.0"),
        (("--lr=-1",), "--lr is -1.0"),
        (("--lr", "1e-3", "--lr", "nan"), "--lr is nan"),
        (("--lr", "large"), "--lr"),
        (("--alpha=-1",), "--alpha is -1.0"),
        (("--seed=-1",), "--seed is -1"),
        (("--method", "fedfft"), "--method fedfft trains all weights of one copy: it cannot sweep"),
        (("--method", "fedvmlc"), "--method fedvmlc trains all weights of one copy: it cannot sweep"),
        (("--method", "fedlc", "--encoder", "text"), "--method fedlc supports --encoder image only"),
        (("--method", "sgd"), "unknown --method 'sgd': choose from feddlp"),
        (("--trace",), "--trace is not supported in a sweep"),
        (("--pretrained", "none", "--seed", 0, "--seed", 1), "--pretrained none draws the weights from --seed"),
        (("--report", "validation"), "--report validation needs validation samples"),
        (("--clients", 4), "leave out --clients"),
        (("--model", "no-such-model"), "no-such-model"),
        (("--dataset", "no-such-data"), "no-such-data"),
    ],
)
def test_options(options: tuple[object, ...], expected: str, refused: Refused, tmp_path: Path) -> None:
    assert expected in refused(*options, "--out", tmp_path / "s")
    assert list(tmp_path.iterdir()) == []


def test_without_a_place(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "a sweep needs a folder: pass --out" in refused("--lr", "1e-3")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_holds_something_else(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert "exists and is not a sweep folder: name another --out" in refused("--out", tmp_path)
    assert "exists and is not a sweep folder: name another --out" in refused("--out", tmp_path, "--overwrite")
    assert "exists and is not a sweep folder: name another --out" in refused("--out", tmp_path / "notes.txt")
    assert _files(tmp_path) == {tmp_path / "notes.txt": b"mine"}


def test_a_place_that_holds_a_run(refused: Refused, stopped: Path, tmp_path: Path) -> None:
    """One member's folder is no sweep, with --overwrite or without."""
    shutil.copytree(stopped / FIRST, tmp_path / "run")
    before = _files(tmp_path)
    for overwrite in ((), ("--overwrite",)):
        assert "exists and is not a sweep" in refused("--out", tmp_path / "run", *overwrite)
    assert _files(tmp_path) == before


def test_a_place_that_holds_a_sweep(refused: Refused, stopped: Path) -> None:
    before = _files(stopped)
    assert f"holds a sweep: continue with --resume {stopped}, or replace it" in refused("--out", stopped)
    assert _files(stopped) == before


def test_a_place_beneath_a_file(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert "cannot" in refused("--out", tmp_path / "notes.txt" / "s", "--lr", "1e-3")
    assert _files(tmp_path) == {tmp_path / "notes.txt": b"mine"}


def test_a_place_that_cannot_be_written(refused: Refused) -> None:
    assert "cannot" in refused("--out", "/proc/fastdlp/sweep", "--lr", "1e-3")


def test_a_name_that_is_too_long(refused: Refused, tmp_path: Path) -> None:
    refused("--out", tmp_path / ("s" * 300), "--lr", "1e-3")
    assert list(tmp_path.iterdir()) == []


def test_the_working_directory(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: Path
) -> None:
    """As fastdlp train: a sweep that takes the place of another must not pull the shell's folder away."""
    shutil.copytree(stopped, tmp_path / "s")
    monkeypatch.chdir(tmp_path / "s" / FIRST)
    before = _files(tmp_path)
    assert "working directory" in refused("--out", tmp_path / "s", "--overwrite", "--lr", "1e-3")
    assert _files(tmp_path) == before


@pytest.mark.parametrize("options", [("--lr", "1e-3"), ("--rounds", 3), ("--seed", 1), ("--overwrite",), ("--trace",)])
def test_resume_takes_no_other_option(options: tuple[object, ...], refused: Refused, stopped: Path) -> None:
    before = _files(stopped)
    assert "--resume takes its options from the sweep: leave out all others" in refused("--resume", stopped, *options)
    assert _files(stopped) == before


def test_resume_of_what_is_no_sweep(refused: Refused, stopped: Path, tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nowhere", stopped / FIRST):
        assert "is not a sweep: name a folder that fastdlp sweep wrote" in refused("--resume", place)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "record",
    [
        "",
        "{",
        "[]",
        "null",
        '"sweep"',
        "{}",
        '{"members": []}',
        '{"members": "all"}',
        '{"members": [1]}',
        f'{{"members": ["{FIRST}", "{SECOND}"]}}',
        f'{{"members": ["{FIRST}", "{SECOND}"], "failed": null, "grid": {{}}}}',
        f'{{"members": ["{FIRST}", "{SECOND}"], "failed": [], "grid": {{}}}}',
        '{"members": ["../elsewhere"], "failed": {}, "grid": {}}',
        '{"members": [".."], "failed": {}, "grid": {}}',
        '{"members": ["."], "failed": {}, "grid": {}}',
        '{"members": [""], "failed": {}, "grid": {}}',
    ],
)
def test_a_damaged_record(record: str, refused: Refused, stopped: Path, tmp_path: Path) -> None:
    shutil.copytree(stopped, tmp_path / "s")
    (tmp_path / "s" / "sweep.json").write_text(record)
    before = _files(tmp_path)
    assert "sweep.json" in refused("--resume", tmp_path / "s")
    assert _files(tmp_path) == before


def test_a_damaged_record_can_be_overwritten(few: Path, stopped: Path, tmp_path: Path, cli: CLI) -> None:
    """Its refusal says "start again with --overwrite"."""
    shutil.copytree(stopped, tmp_path / "s")
    (tmp_path / "s" / "sweep.json").write_text("{}")
    options = ("--partition", few, "--rounds", 1, "--batch-size", 4, "--method", "flora", "--quiet", "--overwrite")
    code, _, err = cli("sweep", *options, "--out", tmp_path / "s")
    assert code == 0, err


def test_a_record_never_removes_what_lies_outside(few: Path, stopped: Path, tmp_path: Path, cli: CLI) -> None:
    """--overwrite removes the members that the record names: a name that leads out of the folder is none."""
    shutil.copytree(stopped / FIRST, tmp_path / "a")  # a run's folder, as members are
    shutil.copytree(stopped, tmp_path / "a" / "s")
    (tmp_path / "a" / "mine.txt").write_text("mine")
    (tmp_path / "a" / "s" / "sweep.json").write_text('{"members": [".."], "failed": {}, "grid": {}}')
    options = ("--partition", few, "--rounds", 1, "--batch-size", 4, "--method", "flora", "--quiet", "--overwrite")
    sweep_, before = tmp_path / "a" / "s", _files(tmp_path / "a")
    before = {p: content for p, content in before.items() if not p.is_relative_to(sweep_)}
    code, _, err = cli("sweep", *options, "--out", sweep_)
    assert code == 0 or err.count("\n") == 1
    assert before.items() <= _files(tmp_path / "a").items()


def test_a_sweep_with_half_a_member_can_be_overwritten(few: Path, stopped: Path, tmp_path: Path, cli: CLI) -> None:
    """What a kill while members are removed may leave."""
    shutil.copytree(stopped, tmp_path / "s")
    (tmp_path / "s" / FIRST / "config.json").unlink()
    options = ("--partition", few, "--rounds", 1, "--batch-size", 4, "--method", "flora", "--quiet", "--overwrite")
    code, _, err = cli("sweep", *options, "--out", tmp_path / "s")
    assert code == 0, err


def test_a_member_is_missing(refused: Refused, stopped: Path, tmp_path: Path) -> None:
    shutil.copytree(stopped, tmp_path / "s")
    shutil.rmtree(tmp_path / "s" / SECOND)
    before = _files(tmp_path)
    assert SECOND in refused("--resume", tmp_path / "s")
    assert _files(tmp_path) == before


@pytest.mark.parametrize(
    "change",
    [
        {"lr": 3e-3},
        {"seed": 1},
        {"alpha": 5.0},
        {"batch_size": 2},
        {"rank_global": 4},
        {"method": "feddlp"},
        {"encoder": "text"},
        {"rounds": 5},
        {"checkpoint_every": 0},
        {"lr": None},
    ],
)
def test_a_member_of_another_config(change: dict[str, object], refused: Refused, stopped: Path, tmp_path: Path) -> None:
    """What a member's config says is not what the sweep trained: refused, and nothing written."""
    shutil.copytree(stopped, tmp_path / "s")
    config = json.loads((tmp_path / "s" / SECOND / "config.json").read_text())
    (tmp_path / "s" / SECOND / "config.json").write_text(json.dumps(config | change))
    before = _files(tmp_path)
    refused("--resume", tmp_path / "s")
    assert _files(tmp_path) == before


@pytest.mark.parametrize("file", ["checkpoint.safetensors", f"{SECOND}/config.json", f"{FIRST}/partition.json"])
def test_a_damaged_file(file: str, refused: Refused, stopped: Path, tmp_path: Path) -> None:
    shutil.copytree(stopped, tmp_path / "s")
    (tmp_path / "s" / file).write_bytes(b"\x07\x00\x00")
    before = _files(tmp_path)
    assert Path(file).name in refused("--resume", tmp_path / "s")
    assert _files(tmp_path) == before


def test_rounds_that_are_missing(refused: Refused, stopped: Path, tmp_path: Path) -> None:
    shutil.copytree(stopped, tmp_path / "s")
    (tmp_path / "s" / SECOND / "metrics.jsonl").unlink()
    before = _files(tmp_path)
    assert "metrics.jsonl" in refused("--resume", tmp_path / "s")
    assert _files(tmp_path) == before


def test_a_damaged_summary(refused: Refused, stopped: Path, tmp_path: Path) -> None:
    for text in ("", "{", "[]"):
        shutil.copytree(stopped, tmp_path / "s")
        (tmp_path / "s" / "summary.json").write_text(text)
        assert "summary.json" in refused("--resume", tmp_path / "s")
        shutil.rmtree(tmp_path / "s")
