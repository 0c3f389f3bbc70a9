"""A run that was stopped, in whatever way and at whatever moment, goes on to the very same bits."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fastdlp
from fastdlp.run.folder import RunFolder
from fastdlp.run.train import Callbacks, Stopped

ROUNDS = 4
KILLS = int(os.environ.get("FASTDLP_KILLS", "3"))  # 20 for the whole proof
Same = Callable[[Path, Path], None]


def _config(few: Path, out: Path, **options: Any) -> fastdlp.TrainConfig:
    settings = {"partition": str(few), "batch_size": 4, "rounds": ROUNDS, "trace": True, "xi": 1e-3} | options
    return fastdlp.TrainConfig(out=str(out), **settings)


def _stop_after(number: int) -> Callbacks:
    """Asks to stop after the round of this number, as Ctrl-C does."""
    callbacks = Callbacks()
    done: list[int] = []
    callbacks.should_stop = lambda: (done.append(1) or len(done)) >= number  # asked once a round
    return callbacks


def _break_after(number: int) -> Callbacks:
    """Dies after the round of this number without any care, as a second Ctrl-C does."""

    def finished(line: dict[str, Any]) -> None:
        if line["round"] == number:
            raise KeyboardInterrupt

    return Callbacks(finished_round=finished)


@pytest.fixture(scope="module")
def whole(few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing stopped, with a trace."""
    run = tmp_path_factory.mktemp("whole") / "run"
    fastdlp.train(_config(few, run))
    return run


def _files(run: Path) -> dict[Path, tuple[bytes, int]]:
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in run.rglob("*") if p.is_file()}


def test_the_run_has_something_to_lose(whole: Path) -> None:
    """Moments, pruned gates and unequal step counts, or equality with it would prove little."""
    state = load_file(whole / "checkpoint.safetensors")
    assert state["local/steps"].tolist() == [3 * ROUNDS, 2 * ROUNDS, 2 * ROUNDS]
    for name in ("weights_m", "weights_v", "gates_m", "gates_v"):
        assert state[f"local/{name}"].any(dim=1).all(), name
    assert (state["local/gates"] == 0).any()


@pytest.mark.parametrize("number", [1, ROUNDS - 1])
def test_stopped_by_a_callback(number: int, few: Path, whole: Path, same_run: Same, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(Stopped, match=f"stopped after round {number} of {ROUNDS}.*--resume {run}"):
        fastdlp.train(_config(few, run), callbacks=_stop_after(number))
    assert len((run / "metrics.jsonl").read_text().splitlines()) == number
    assert not (run / "summary.json").exists()
    fastdlp.resume(run)
    same_run(run, whole)


def test_stopped_three_times(few: Path, whole: Path, same_run: Same, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(Stopped):
        fastdlp.train(_config(few, run), callbacks=_stop_after(1))
    for _ in range(2):
        with pytest.raises(Stopped):
            fastdlp.resume(run, callbacks=_stop_after(1))
    fastdlp.resume(run)
    same_run(run, whole)


@pytest.mark.parametrize(("method", "encoder"), [("flora", "text"), ("local", "image")])
def test_the_other_methods_and_the_text_tower(
    method: str, encoder: str, few: Path, same_run: Same, tmp_path: Path
) -> None:
    options = {"method": method, "encoder": encoder, "rounds": 2, "protocol": "reference"}
    fastdlp.train(_config(few, tmp_path / "whole", **options))
    with pytest.raises(Stopped):
        fastdlp.train(_config(few, tmp_path / "run", **options), callbacks=_stop_after(1))
    fastdlp.resume(tmp_path / "run")
    same_run(tmp_path / "run", tmp_path / "whole")


@pytest.fixture(scope="module")
def every_second(few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a checkpoint after every second round."""
    run = tmp_path_factory.mktemp("every-second") / "run"
    fastdlp.train(_config(few, run, checkpoint_every=2))
    return run


@pytest.mark.parametrize(("number", "kept"), [(1, 0), (2, 2), (3, 2), (ROUNDS, ROUNDS)])
def test_rounds_behind_the_last_checkpoint_are_done_again(
    number: int, kept: int, few: Path, every_second: Path, same_run: Same, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        fastdlp.train(_config(few, run, checkpoint_every=2), callbacks=_break_after(number))
    assert len((run / "metrics.jsonl").read_text().splitlines()) == number
    done: list[int] = []
    fastdlp.resume(run, callbacks=Callbacks(finished_round=lambda line: done.append(line["round"])))
    assert done == list(range(kept + 1, ROUNDS + 1))
    same_run(run, every_second)


def test_a_stop_writes_a_checkpoint_between_two(few: Path, every_second: Path, same_run: Same, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(Stopped):
        fastdlp.train(_config(few, run, checkpoint_every=2), callbacks=_stop_after(3))
    done: list[int] = []
    fastdlp.resume(run, callbacks=Callbacks(finished_round=lambda line: done.append(line["round"])))
    assert done == [4]
    same_run(run, every_second)


def test_a_torn_last_line_is_done_again(few: Path, whole: Path, same_run: Same, tmp_path: Path) -> None:
    """What a kill in the middle of a write leaves after the last checkpoint, in both files of lines."""
    run = tmp_path / "run"
    with pytest.raises(Stopped):
        fastdlp.train(_config(few, run), callbacks=_stop_after(2))
    for file in (run / "metrics.jsonl", run / "trace" / "batches.jsonl"):
        with open(file, "a") as stream:
            stream.write('{"round": 3, "clie')
    fastdlp.resume(run)
    same_run(run, whole)


def test_a_finished_run_is_printed_again_and_unchanged(whole: Path, cli: Any, tmp_path: Path) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    before = _files(run)
    code, out, err = cli("train", "--resume", run, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == json.loads((run / "summary.json").read_text())
    assert _files(run) == before


def test_longer(few: Path, whole: Path, same_run: Same, tmp_path: Path, cli: Any) -> None:
    """--rounds makes a finished run, and a stopped one, as long as if it had been started so."""
    short, stopped = tmp_path / "short", tmp_path / "stopped"
    fastdlp.train(_config(few, short, rounds=2))
    with pytest.raises(Stopped):
        fastdlp.train(_config(few, stopped, rounds=3), callbacks=_stop_after(2))
    for run in (short, stopped):
        code, _, err = cli("train", "--resume", run, "--rounds", ROUNDS, "--quiet")
        assert (code, err) == (0, "")
        same_run(run, whole)


def test_shorter_than_it_is(whole: Path, cli: Any, tmp_path: Path) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    before = _files(run)
    code, out, err = cli("train", "--resume", run, "--rounds", ROUNDS - 1, "--quiet")
    assert (code, out) == (2, "")
    assert f"has finished {ROUNDS} rounds" in err
    assert _files(run) == before


def test_options_that_decide_no_number_may_change(few: Path, whole: Path, tmp_path: Path, cli: Any) -> None:
    run = tmp_path / "run"
    with pytest.raises(Stopped):
        fastdlp.train(_config(few, run), callbacks=_stop_after(1))
    data = tmp_path / "elsewhere"
    assert cli("train", "--resume", run, "--checkpoint-every", 4, "--data-dir", data, "--quiet") == (0, "", "")
    used = json.loads((run / "summary.json").read_text())["config"]
    assert (used["checkpoint_every"], used["data_dir"]) == (4, str(data))
    assert (run / "adapters" / "server.safetensors").read_bytes() == (
        whole / "adapters" / "server.safetensors"
    ).read_bytes()


def test_options_may_be_repeated(
    few: Path, whole: Path, same_run: Same, tmp_path: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also as a path relative to where one stands, and before another stop."""
    run = tmp_path / "run"
    with pytest.raises(Stopped):
        fastdlp.train(_config(few, run), callbacks=_stop_after(1))
    monkeypatch.chdir(few.parent)
    with pytest.raises(Stopped):
        fastdlp.resume(run, given={"partition": few.name, "seed": 0, "xi": 1e-3}, callbacks=_stop_after(1))
    monkeypatch.chdir(tmp_path)
    assert cli("train", "--resume", run, "--quiet", "--seed", 0) == (0, "", "")
    same_run(run, whole)


def test_a_moved_run(few: Path, whole: Path, same_run: Same, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        fastdlp.train(_config(few, tmp_path / "run"), callbacks=_stop_after(2))
    (tmp_path / "run").rename(tmp_path / "moved")
    assert fastdlp.resume(tmp_path / "moved")["config"]["out"] == str(tmp_path / "moved")
    same_run(tmp_path / "moved", whole)


# -- true processes -----------------------------------------------------------------------------------------


def _start(few: Path, run: Path, rounds: int) -> subprocess.Popen[str]:
    """A run in a process of its own, with this process's number of threads, on which bits may depend."""
    command = [sys.executable, "-m", "fastdlp", "train", "--partition", few, "--batch-size", 4, "--rounds", rounds]
    command += ["--xi", 1e-3, "--trace", "--out", run]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(list(map(str, command)), env=environment, stderr=subprocess.PIPE, text=True,
                            stdout=subprocess.DEVNULL)  # fmt: skip


def _wait_for(there: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    limit = time.monotonic() + 60
    while not there():
        if process.poll() is not None and not there():
            pytest.fail(f"ended too early: {process.communicate()[1]}")
        assert time.monotonic() < limit, "nothing happened for a minute"
        time.sleep(0.001)


@pytest.mark.slow
def test_ctrl_c(few: Path, same_run: Same, tmp_path: Path, cli: Any) -> None:
    run, rounds = tmp_path / "a run [1] in a folder whose name is much longer than a line of eighty columns", 40
    process = _start(few, run, rounds)
    metrics = run / "metrics.jsonl"
    _wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    (line,) = [line for line in err.splitlines() if "--resume" in line]
    finished = len(metrics.read_text().splitlines())
    assert 1 <= finished < rounds
    assert f"stopped after round {finished} of {rounds}" in line
    assert str(run) in line
    assert cli("train", "--resume", run, "--quiet", "--rounds", finished + 1) == (0, "", "")
    fastdlp.train(_config(few, tmp_path / "whole", rounds=finished + 1))
    same_run(run, tmp_path / "whole")


@pytest.fixture(scope="module")
def span(few: Path, whole: Path, same_run: Same, tmp_path_factory: pytest.TempPathFactory) -> float:
    """Seconds from the run folder's appearance to the end, in a process of its own (that equals `whole`)."""
    run = tmp_path_factory.mktemp("span") / "run"
    process = _start(few, run, ROUNDS)
    _wait_for(run.exists, process)
    start = time.monotonic()
    while not (run / "summary.json").exists() and process.poll() is None:
        time.sleep(0.001)
    seconds = time.monotonic() - start
    assert process.wait(60) == 0, process.communicate()[1]
    same_run(run, whole)
    return seconds


@pytest.mark.slow
@pytest.mark.parametrize("kill", range(KILLS))
def test_kill_9(kill: int, span: float, few: Path, whole: Path, same_run: Same, tmp_path: Path, cli: Any) -> None:
    """Killed once in each of KILLS equal parts of the run, at a random moment of the part."""
    seed = f"{KILLS}/{kill}"
    moment = (kill + random.Random(seed).random()) / KILLS * span
    for attempt in range(6):  # a run that was over before its kill proves nothing: once more, and sooner
        run = tmp_path / f"run-{attempt}"
        process = _start(few, run, ROUNDS)
        _wait_for(run.exists, process)
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        if process.returncode == -signal.SIGKILL and not (run / "summary.json").exists():
            break
        moment *= 0.8
    else:
        pytest.fail("the run was always faster than its kill")
    left = sorted(str(p.relative_to(run)) for p in run.rglob("*") if p.is_file())
    metrics = run / "metrics.jsonl"
    lines = len(metrics.read_bytes().splitlines()) if metrics.exists() else 0
    story = f"seed {seed}: killed {moment:.3f} s into {span:.3f} s, {lines} lines of metrics, {left}"
    assert cli("train", "--resume", run, "--quiet") == (0, "", ""), story
    print(story)  # shown if what follows fails
    same_run(run, whole)


def test_one_writer_at_a_time(few: Path, tmp_path: Path, cli: Any) -> None:
    """Two processes that resume one run would mix their rounds."""
    run = tmp_path / "run"
    assert cli("train", "--partition", few, "--rounds", 1, "--quiet", "--out", run)[0] == 0
    with RunFolder(run).locked():
        for command in (["--resume", run, "--rounds", 2], ["--out", run, "--overwrite", "--partition", few]):
            code, out, err = cli("train", *command)
            assert (code, out) == (2, "")
            assert f"another process is writing to {run}" in err
    assert cli("train", "--resume", run, "--rounds", 2, "--quiet")[0] == 0
