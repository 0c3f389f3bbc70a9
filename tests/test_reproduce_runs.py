"""`fastdlp reproduce` with training: finished runs are kept, others are resumed, with one job or several."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from fastdlp.config import TrainConfig
from fastdlp.errors import FastdlpError
from fastdlp.report.paper.plan import make_plan
from fastdlp.report.paper.run import Interrupted, PlanCallbacks, _options, complete, missing
from fastdlp.run.train import Callbacks, Stopped, resume, train

CLI = Callable[..., tuple[int, str, str]]
FLAGS = ("--dataset", "digits", "--encoder", "text", "--seed", 0, "--rounds", 2)
METHODS = ("--method", "local", "--method", "flora")


def _configs(runs: Path, *methods: str, **options: Any) -> list[TrainConfig]:
    return make_plan("table1", runs, ["digits"], ["text"], method=methods, seed=[0], rounds=2, **options).configs()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of local and flora, one by one."""
    runs = tmp_path_factory.mktemp("reproduce") / "runs"
    complete(_configs(runs, "local", "flora"), 1, [], PlanCallbacks())
    return runs


def test_what_is_finished_is_taken(finished: Path, tmp_path: Path, cli: CLI) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    code, out, err = cli("reproduce", "table1", *FLAGS, *METHODS, "--runs", finished, "--out", tmp_path / "one")
    assert (code, err) == (0, "")
    summary = json.loads((finished / "digits-flora-text-beta0.1-seed0/summary.json").read_text())
    assert f" {100 * summary['accuracy_last']:.2f} " in out  # of one seed, so without a deviation
    code, _, err = cli("reproduce", "table3", *FLAGS, *METHODS, "--runs", finished, "--out", tmp_path / "three")
    assert (code, err) == (0, "")
    page = (tmp_path / "three/table3.md").read_text()
    assert f"{100 * summary['clients_std']:.2f} |" in page
    assert f"{100 * summary['clients_lowest']:.2f} |" in page
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*")}


def test_the_ledger_of_a_true_run(finished: Path, cli: CLI) -> None:
    run = finished / "digits-flora-text-beta0.1-seed0"
    summary = json.loads((run / "summary.json").read_text())
    _, out, _ = cli("reproduce", "ledger", run)
    assert f"2 rounds, {summary['uploaded_parameters']:,} parameters" in out
    assert f"{4 * summary['uploaded_bytes_per_client_round']:,} bytes of messages" in out


def test_the_rest_is_resumed_to_the_same_bits(
    finished: Path, tmp_path: Path, cli: CLI, same_run: Callable[[Path, Path], None]
) -> None:
    runs = tmp_path / "runs"
    name = "digits-local-text-beta0.1-seed0"
    shutil.copytree(finished / "digits-flora-text-beta0.1-seed0", runs / "digits-flora-text-beta0.1-seed0")
    (config,) = _configs(runs, "local")
    with pytest.raises(Stopped):
        train(config, callbacks=Callbacks(should_stop=lambda: True))
    assert len((runs / name / "metrics.jsonl").read_text().splitlines()) == 1
    code, _, err = cli("reproduce", "table1", *FLAGS, *METHODS, "--runs", runs, "--out", tmp_path / "out")
    assert (code, err.splitlines()) == (0, [f"2/2 {name}"])
    same_run(runs / name, finished / name)


@pytest.mark.slow
def test_jobs_make_the_same_runs(finished: Path, tmp_path: Path) -> None:
    """One is started and one resumed, each in a process of its own, with other threads and so to rounding."""
    configs = _configs(tmp_path / "runs", "local", "flora")
    with pytest.raises(Stopped):
        train(configs[0], callbacks=Callbacks(should_stop=lambda: True))
    ended: list[str] = []
    complete(configs, 2, ["cpu"], PlanCallbacks(finished=ended.append))
    assert sorted(ended) == ["digits-flora-text-beta0.1-seed0", "digits-local-text-beta0.1-seed0"]
    assert missing(configs) == []
    for config in configs:
        name = Path(str(config.out)).name
        ours, theirs = (load_file(runs / name / "checkpoint.safetensors") for runs in (tmp_path / "runs", finished))
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            if key.endswith("/weights"):
                assert (ours[key] - tensor).norm() < 1e-3 * tensor.norm()


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_stop_leaves_runs_to_resume(jobs: int, tmp_path: Path) -> None:
    """Long before their end, with a checkpoint of the rounds that are recorded, and the third was never started."""
    configs = [replace(config, rounds=99) for config in _configs(tmp_path / "runs", "local", "flora", "feddlp")]
    first = tmp_path / "runs/digits-local-text-beta0.1-seed0"
    started: list[str] = []
    callbacks = PlanCallbacks(
        status=lambda name, text: started.append(name) if text == "started" else None,
        should_stop=(first / "metrics.jsonl").exists,
    )
    with pytest.raises(Interrupted):
        complete(configs, jobs, [], callbacks)
    assert missing(configs) == configs
    assert len(started) == jobs
    lines = len((first / "metrics.jsonl").read_text().splitlines())
    assert 1 <= lines < 99
    with pytest.raises(Stopped, match=f"after round {lines + 1} "):
        resume(first, callbacks=Callbacks(should_stop=lambda: True))


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_that_fails_is_named(jobs: int, tmp_path: Path, cli: CLI) -> None:
    code, out, err = cli(
        "reproduce", "table1", *FLAGS, "--method", "flora", "--lr", "flora=1e38", "--runs", tmp_path / "runs",
        "--out", tmp_path / "out", "--jobs", jobs,
    )  # fmt: skip
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"{tmp_path / 'runs/digits-flora-text-beta0.1-seed0'}: " in err
    assert "lower --lr" in err
    assert not (tmp_path / "out").exists()


def test_the_options_of_a_process_make_its_config(tmp_path: Path, cli: CLI, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every field that a table's run can have, away from its default, goes through the command line and back."""
    (config,) = make_plan(
        "table1", tmp_path / "runs", ["pets"], ["text"], method=["flora"], seed=[3], lr=["flora=1e-06"], rounds=7,
        partition_seeds="seed", protocol="reference", precision="bf16", data_dir=str(tmp_path), download=True,
    ).configs()  # fmt: skip
    config = replace(config, device="cuda:1")
    seen: list[TrainConfig] = []

    def note(config: TrainConfig, *rest: object) -> dict[str, Any]:
        seen.append(config)
        return {}

    monkeypatch.setattr("fastdlp.run.train.train", note)
    code, _, err = cli("train", "--quiet", *_options(config))
    assert (code, err, seen) == (0, "", [config])
    changed = {f.name for f in dataclasses.fields(config) if getattr(config, f.name) != f.default}
    assert changed >= {"method", "encoder", "model", "pretrained", "dataset", "seed", "partition_seed", "lr", "rounds"}
    assert changed >= {"protocol", "precision", "data_dir", "download", "device", "out"}


def test_a_data_set_is_fetched_before_the_processes_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[tuple[str, str | None]] = []

    def fetch(name: str, folder: str | None, download: bool) -> None:
        fetched.append((name, folder))
        if name == "dtd":
            raise FastdlpError("no more")

    monkeypatch.setattr("fastdlp.data.registry.load_source", fetch)
    configs = make_plan("table1", tmp_path / "runs", ["pets", "dtd"], method=["flora"], download=True).configs()
    with pytest.raises(FastdlpError, match="no more"):
        complete(configs, 2, [], PlanCallbacks())
    assert fetched == [("pets", None), ("dtd", None)]
    assert not (tmp_path / "runs").exists()
