"""A sweep's members are runs like any other: their folders, their numbers, their end, whatever the others do."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import mean
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fastdlp
from fastdlp.run.folder import RunFolder
from fastdlp.run.setup import prepare_together
from fastdlp.run.sweep import METRICS, Grid, resume_sweep, summarise_sweep, sweep
from fastdlp.run.train import Callbacks, Stopped
from tests.conftest import CLI

ROUNDS = 2
Same = Callable[[Path, Path], None]
# Members and runs alone cut into steps of one client each: every product then has one shape in both.
ONE_BY_ONE = {"micro_batch": 1}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Sums that are split over threads are rounded otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _config(few: Path, out: Path, **options: Any) -> fastdlp.TrainConfig:
    settings = {"partition": str(few), "batch_size": 4, "rounds": ROUNDS, "xi": 1e-3} | options
    return fastdlp.TrainConfig(out=str(out), **settings)


def _lines(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl, which may be missing before the first round, without the seconds."""
    if not (run / "metrics.jsonl").exists():
        return []
    return [json.loads(line) | {"seconds": None} for line in (run / "metrics.jsonl").read_text().splitlines()]


def _without_seconds(summary: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in summary.items() if not key.startswith("seconds")}


def _stop_after(number: int) -> Callbacks:
    callbacks = Callbacks()
    done: list[int] = []
    callbacks.should_stop = lambda: (done.append(1) or len(done)) >= number  # asked once a round
    return callbacks


def _same_sweep(one: Path, other: Path, same_run: Same) -> None:
    written = [(path / "summary.json").read_text().replace(str(path), "SWEEP") for path in (one, other)]
    summaries = [_without_seconds(json.loads(text)) for text in written]
    assert summaries[0] == summaries[1]
    assert {p.name for p in one.iterdir()} == {p.name for p in other.iterdir()}
    for member in summaries[0]["members"]:
        if member["failed"] is None:
            same_run(one / member["name"], other / member["name"])
        else:
            assert _lines(one / member["name"]) == _lines(other / member["name"])


GRID = Grid((1e-3, 4e-3), (0.1,), (0, 7))
NAMES = {f"lr{lr}-alpha0.1-seed{seed}" for lr in ("0.001", "0.004") for seed in (0, 7)}


@pytest.fixture(scope="module")
def whole(few: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Four members of FEDDLP, with validation, client by client."""
    path = tmp_path_factory.mktemp("whole") / "sweep"
    return path, sweep(_config(few, path, val_fraction=0.3, **ONE_BY_ONE), GRID)


def test_a_folder_for_every_member_and_a_summary(whole: tuple[Path, dict[str, Any]]) -> None:
    path, summary = whole
    assert {p.name for p in path.iterdir()} == NAMES | {"sweep.json", "summary.json"}
    assert json.loads((path / "summary.json").read_text()) == summary
    assert {member["name"] for member in summary["members"]} == NAMES
    assert len(summary["settings"]) == 2
    assert all(setting["seeds"] == [0, 7] for setting in summary["settings"])
    for member in summary["members"]:
        own = json.loads((path / member["name"] / "summary.json").read_text())
        for metric in ("zero_shot", "accuracy_last", "accuracy_best_test", "accuracy_chosen", "accuracy_val_chosen"):
            assert member[metric] == own[metric]
        for option in ("lr", "alpha", "seed"):
            assert member[option] == own["config"][option]
        assert own["config"]["gate_lr"] == own["config"]["lr"]
    assert len({json.dumps(_lines(path / name)) for name in NAMES}) == len(NAMES)  # every member is one of its own


@pytest.mark.parametrize(("lr", "seed"), [(1e-3, 0), (4e-3, 7)])
def test_a_member_is_the_run_alone_to_the_bit(
    lr: float, seed: int, few: Path, whole: tuple[Path, dict[str, Any]], same_run: Same, tmp_path: Path
) -> None:
    """metrics, adapters, checkpoint, config, partition and summary: the same files with the same bytes."""
    options = {"lr": lr, "seed": seed, "val_fraction": 0.3} | ONE_BY_ONE
    fastdlp.train(_config(few, tmp_path / "run", **options))
    same_run(whole[0] / f"lr{lr:g}-alpha0.1-seed{seed}", tmp_path / "run")


def test_of_the_authors_protocol(few: Path, same_run: Same, tmp_path: Path) -> None:
    """Clipping, the other threshold, in-batch losses and the best round."""
    config = _config(few, tmp_path / "sweep", protocol="reference", rounds=2, **ONE_BY_ONE)
    sweep(config, Grid((1e-3, 4e-3), (0.1,), (7,)))
    fastdlp.train(replace(config, lr=4e-3, seed=7, out=str(tmp_path / "run")))
    same_run(tmp_path / "sweep" / "lr0.004-alpha0.1-seed7", tmp_path / "run")


def test_alpha_is_a_member_s_own(few: Path, same_run: Same, tmp_path: Path) -> None:
    config = _config(few, tmp_path / "sweep", rounds=1, lr=1e-3, **ONE_BY_ONE)
    sweep(config, Grid((1e-3,), (0.1, 10.0), (0,)))
    fastdlp.train(replace(config, alpha=10.0, out=str(tmp_path / "run")))
    same_run(tmp_path / "sweep" / "lr0.001-alpha10-seed0", tmp_path / "run")
    assert _lines(tmp_path / "run") != _lines(tmp_path / "sweep" / "lr0.001-alpha0.1-seed0")


@pytest.mark.parametrize(
    ("method", "encoder"),
    [("flora", "image"), ("feddat", "image"), ("fedclip", "image"), ("flora", "text")],
)
def test_of_every_kind_of_method(method: str, encoder: str, few: Path, same_run: Same, tmp_path: Path) -> None:
    config = _config(few, tmp_path / "sweep", method=method, encoder=encoder, rounds=2 - (encoder == "text"))
    config = replace(config, **ONE_BY_ONE)
    sweep(config, Grid((1e-3, 4e-3), (0.1,), (7,)))
    fastdlp.train(replace(config, lr=4e-3, alpha=0.1, seed=7, out=str(tmp_path / "run")))
    same_run(tmp_path / "sweep" / "lr0.004-alpha0.1-seed7", tmp_path / "run")


@pytest.mark.parametrize("method", ["feddlp", "fedclip"])
def test_many_members_in_one_product_change_no_more_than_rounding(method: str, few: Path, tmp_path: Path) -> None:
    """Without --micro-batch, products have more rows than the run's alone, and are summed in another order where the
    library takes another kernel for them: MKL for fewer than four rows (the pooled tokens of a last batch here), and
    `frozen_linear` itself, which goes to oneDNN above a size. Adam then grows the difference.
    """
    config = _config(few, tmp_path / "sweep", method=method, rounds=2, val_fraction=0.3)
    sweep(config, Grid((1e-3, 5e-4), (0.1,), (0, 7)))
    fastdlp.train(replace(config, lr=1e-3, alpha=0.1, seed=7, out=str(tmp_path / "run")))
    member = tmp_path / "sweep" / "lr0.001-alpha0.1-seed7"
    for ours, alone in zip(_lines(member), _lines(tmp_path / "run"), strict=True):
        for one, other in zip(ours["clients"], alone["clients"], strict=True):
            assert one["losses"] == pytest.approx(other["losses"], rel=1e-3, abs=1e-5)
            assert (one["steps"], one["n"], one["bytes_sent"]) == (other["steps"], other["n"], other["bytes_sent"])
    state, expected = (load_file(run / "checkpoint.safetensors") for run in (member, tmp_path / "run"))
    for name in ("global/weights", "local/weights"):
        if name in state:
            assert (state[name] - expected[name]).norm() < 1e-4 * expected[name].norm()


def test_averages_stay_within_a_member(few: Path, tmp_path: Path) -> None:
    config = _config(few, tmp_path)
    federations = prepare_together([replace(config, lr=1e-3), replace(config, lr=1e-2)])
    engine = federations[0].engine
    engine.train_round(1)
    before = engine.bank.state["global"].weights.clone()
    engine.aggregate()
    shares = torch.tensor([12, 7, 5], dtype=torch.float64) / 24
    means = []
    for federation in federations:
        rows = list(federation.rows)
        means.append((shares[:, None] * before[rows].double()).sum(0))
        for row in rows:
            assert torch.allclose(engine.bank.state["global"].weights[row].double(), means[-1], rtol=0, atol=1e-6)
    assert (means[0] - means[1]).abs().max() > 1e-3


def test_validation_picks_the_setting_of_the_highest_mean(whole: tuple[Path, dict[str, Any]]) -> None:
    path, summary = whole
    means: dict[tuple[float, float], float] = {}
    for lr in GRID.lr:
        for alpha in GRID.alpha:
            runs = [path / f"lr{lr:g}-alpha{alpha:g}-seed{seed}" for seed in GRID.seed]
            means[lr, alpha] = mean(max(line["accuracy_val"] for line in _lines(run)) for run in runs)
    picked = summary["picked_on_validation"]
    assert picked["accuracy_val_chosen"] == max(means.values()) == means[picked["lr"], picked["alpha"]]
    for setting in summary["settings"]:
        assert setting["accuracy_val_chosen"] == pytest.approx(means[setting["lr"], setting["alpha"]])


def test_validation_picks_and_not_test() -> None:
    """One setting is better in every metric on test, the other on validation."""
    members, summaries = {}, {}
    for lr, test, val in ((1e-3, 0.9, 0.5), (2e-3, 0.6, 0.7)):
        for seed, more in ((0, 0.0), (1, 0.05)):
            name = f"lr{lr}-seed{seed}"
            members[name] = SimpleNamespace(config=fastdlp.TrainConfig(lr=lr, seed=seed))
            summaries[name] = dict.fromkeys(METRICS, test + more) | {"accuracy_val_chosen": val + more}
    picked = summarise_sweep(members, summaries, {})["picked_on_validation"]  # type: ignore[arg-type]
    assert (picked["lr"], picked["seeds"]) == (2e-3, [0, 1])
    assert picked["accuracy_val_chosen"] == pytest.approx(0.725)
    assert picked["accuracy_last"] == pytest.approx(0.625)
    failed = {"lr0.002-seed1": "diverged"}
    del summaries["lr0.002-seed1"]
    assert summarise_sweep(members, summaries, failed)["picked_on_validation"]["lr"] == 1e-3  # type: ignore[arg-type]


def test_without_validation_nothing_is_picked(few: Path, tmp_path: Path) -> None:
    summary = sweep(_config(few, tmp_path / "s", method="flora", rounds=1), Grid((1e-3, 2e-3), (0.1,), (0,)))
    assert summary["picked_on_validation"] is None
    assert all(row["accuracy_val_chosen"] is None for row in summary["members"] + summary["settings"])
    assert all(row["accuracy_last"] is not None for row in summary["members"] + summary["settings"])


BAD = "lr1e+30-alpha0.1-seed0"  # a learning rate with which every loss diverges
GOOD = "lr0.001-alpha0.1-seed0"


@pytest.fixture(scope="module")
def diverged(few: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    path = tmp_path_factory.mktemp("diverged") / "sweep"
    return path, sweep(_config(few, path, val_fraction=0.3, **ONE_BY_ONE), Grid((1e30, 1e-3), (0.1,), (0,)))


def test_one_that_diverges_harms_no_other(
    few: Path, diverged: tuple[Path, dict[str, Any]], same_run: Same, tmp_path: Path
) -> None:
    """Beside a member that stays finite the good one's files are equal to the bit."""
    sweep(_config(few, tmp_path / "sweep", val_fraction=0.3, **ONE_BY_ONE), Grid((2e-3, 1e-3), (0.1,), (0,)))
    same_run(diverged[0] / GOOD, tmp_path / "sweep" / GOOD)


def test_one_that_diverges_is_named(diverged: tuple[Path, dict[str, Any]]) -> None:
    path, summary = diverged
    failed = {member["name"]: member["failed"] for member in summary["members"]}
    assert failed[GOOD] is None
    assert "not finite" in failed[BAD]
    assert "\n" not in failed[BAD]
    assert "checkpoint" not in failed[BAD] or (path / BAD / "checkpoint.safetensors").exists()
    bad = next(member for member in summary["members"] if member["name"] == BAD)
    assert bad["accuracy_last"] is None
    assert bad["accuracy_val_chosen"] is None
    setting = next(setting for setting in summary["settings"] if setting["lr"] == 1e30)
    assert setting["accuracy_last"] is None
    assert setting["accuracy_val_chosen"] is None
    assert summary["picked_on_validation"]["lr"] == 1e-3
    assert not (path / BAD / "summary.json").exists()
    assert not (path / BAD / "adapters").exists()
    assert json.loads((path / "sweep.json").read_text())["failed"] == {BAD: failed[BAD]}


def test_a_setting_with_a_diverged_seed_has_no_mean(few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One seed of a setting diverges: the other's metrics are not the setting's."""
    from fastdlp.run import recorder

    honest = recorder.Recorder.failure

    def failure(self: recorder.Recorder, number: int, losses: Any) -> str | None:
        diverges = self.federation.config.seed == 7 and self.federation.config.lr == 1e-3 and number == 2
        return "not finite" if diverges else honest(self, number, losses)

    monkeypatch.setattr(recorder.Recorder, "failure", failure)
    config = _config(few, tmp_path / "s", method="flora", val_fraction=0.3)
    summary = sweep(config, Grid((1e-3, 1e-4), (0.1,), (0, 7)))
    by_lr = {setting["lr"]: setting for setting in summary["settings"]}
    assert by_lr[1e-3]["accuracy_last"] is None
    assert by_lr[1e-4]["accuracy_last"] is not None
    assert summary["picked_on_validation"] == by_lr[1e-4]
    assert len(_lines(tmp_path / "s" / "lr0.001-alpha0.1-seed7")) == 1  # what it did before


def test_stopped_after_a_member_failed(
    few: Path, diverged: tuple[Path, dict[str, Any]], same_run: Same, tmp_path: Path
) -> None:
    with pytest.raises(Stopped):
        sweep(
            _config(few, tmp_path / "s", val_fraction=0.3, **ONE_BY_ONE),
            Grid((1e30, 1e-3), (0.1,), (0,)),
            callbacks=_stop_after(1),
        )
    resume_sweep(tmp_path / "s")
    _same_sweep(diverged[0], tmp_path / "s", same_run)


def test_every_member_diverges(few: Path, tmp_path: Path, cli: CLI) -> None:
    code, out, err = cli(
        *("sweep", "--partition", few, "--batch-size", 4, "--rounds", 2, "--method", "flora", "--out", tmp_path / "s"),
        *("--lr", "1e30", "--lr", "2e30", "--quiet"),
    )
    assert code == 2
    assert err.count("\n") == 1
    assert "every member of the sweep diverged" in err
    assert out == ""


def test_resume_when_every_member_has_diverged(few: Path, tmp_path: Path, cli: CLI) -> None:
    config = _config(few, tmp_path / "s", method="flora", rounds=2)
    with pytest.raises(fastdlp.FastdlpError, match="every member of the sweep diverged"):
        sweep(config, Grid((1e30,), (0.1,), (0,)))
    code, _, err = cli("sweep", "--resume", tmp_path / "s", "--quiet")
    assert code == 2
    assert err.count("\n") == 1
    assert "every member of the sweep diverged" in err


def test_stopped_by_a_callback(few: Path, whole: tuple[Path, dict[str, Any]], same_run: Same, tmp_path: Path) -> None:
    path, number = tmp_path / "sweep", 1
    with pytest.raises(Stopped, match=f"after round {number} of {ROUNDS}.*fastdlp sweep --resume {path}"):
        sweep(_config(few, path, val_fraction=0.3, **ONE_BY_ONE), GRID, callbacks=_stop_after(number))
    assert (path / "checkpoint.safetensors").exists()
    assert not (path / "summary.json").exists()
    assert all(len(_lines(path / name)) == number for name in NAMES)
    assert _without_seconds(resume_sweep(path)) == _without_seconds(whole[1])
    _same_sweep(whole[0], path, same_run)
    assert resume_sweep(path) == json.loads((path / "summary.json").read_text())  # a finished one is only read


def test_broken_between_the_ends_of_two_members(
    few: Path,
    whole: tuple[Path, dict[str, Any]],
    same_run: Same,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All rounds are done, some members have their summary and some not."""
    path, written = tmp_path / "sweep", []
    honest = RunFolder.write_summary

    def write_summary(self: RunFolder, summary: dict[str, Any]) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(self.path)
        honest(self, summary)

    monkeypatch.setattr(RunFolder, "write_summary", write_summary)
    with pytest.raises(KeyboardInterrupt):
        sweep(_config(few, path, val_fraction=0.3, **ONE_BY_ONE), GRID)
    monkeypatch.undo()
    resume_sweep(path)
    _same_sweep(whole[0], path, same_run)


@pytest.mark.slow
def test_killed_between_rounds(few: Path, same_run: Same, tmp_path: Path) -> None:
    """kill -9 while metrics are ahead of the checkpoint, then --resume: as if nothing had happened."""
    path, options = tmp_path / "sweep", ["--method", "flora", "--batch-size", "4", "--checkpoint-every", "2"]
    command = [sys.executable, "-m", "fastdlp", "sweep", "--partition", str(few), "--out", str(path), *options]
    command += ["--rounds", "12", "--lr", "1e-3", "--lr", "2e-3", "--micro-batch", "1", "--quiet"]
    with subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        metrics = path / "lr0.002-alpha0.1-seed0" / "metrics.jsonl"
        while process.poll() is None and (not metrics.exists() or len(metrics.read_bytes().splitlines()) < 3):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert 3 <= len(metrics.read_bytes().splitlines()) < 12
    resume_sweep(path)
    config = _config(few, tmp_path / "whole", method="flora", rounds=12, checkpoint_every=2, **ONE_BY_ONE)
    sweep(replace(config, xi=5e-5), Grid((1e-3, 2e-3), (0.1,), (0,)))
    _same_sweep(tmp_path / "whole", path, same_run)


def test_what_a_kill_left_half_written_is_removed(few: Path, tmp_path: Path) -> None:
    path = tmp_path / "sweep"
    with pytest.raises(Stopped):
        sweep(_config(few, path, method="flora"), Grid((1e-3,), (0.1,), (0,)), callbacks=_stop_after(1))
    for left in (path / ".checkpoint.0123456789ab.safetensors", path / GOOD / ".summary.0123456789ab.json"):
        left.write_text("half")
    resume_sweep(path)
    assert [p.name for p in path.rglob(".*")] == []


def test_a_member_is_made_longer_and_scored(
    few: Path, whole: tuple[Path, dict[str, Any]], same_run: Same, tmp_path: Path, cli: CLI
) -> None:
    shutil.copytree(whole[0], tmp_path / "sweep")
    member = tmp_path / "sweep" / GOOD
    code, out, err = cli("train", "--resume", member, "--rounds", ROUNDS + 2, "--json")
    assert code == 0, err
    options = {"lr": 1e-3, "val_fraction": 0.3, "rounds": ROUNDS + 2} | ONE_BY_ONE
    fastdlp.train(_config(few, tmp_path / "run", **options))
    same_run(tmp_path / "run", member)
    code, out, err = cli("evaluate", member, "--json")
    assert code == 0, err
    summary = json.loads((member / "summary.json").read_text())
    assert json.loads(out)["per_client"] == summary["per_client"]


def test_overwrite_takes_the_place_of_all_members(few: Path, tmp_path: Path, same_run: Same) -> None:
    config = _config(few, tmp_path / "s", method="flora", rounds=1, **ONE_BY_ONE)
    sweep(config, Grid((1e-3, 2e-3), (0.1,), (0,)))
    sweep(config, Grid((2e-3, 4e-3), (0.1,), (0,)), overwrite=True)
    sweep(replace(config, out=str(tmp_path / "fresh")), Grid((2e-3, 4e-3), (0.1,), (0,)))
    _same_sweep(tmp_path / "fresh", tmp_path / "s", same_run)


def test_overwrite_leaves_a_running_sweep_alone(few: Path, tmp_path: Path) -> None:
    config = _config(few, tmp_path / "s", method="flora", rounds=1)
    sweep(config, Grid((1e-3,), (0.1,), (0,)))
    before = {p: p.read_bytes() for p in (tmp_path / "s").rglob("*") if p.is_file()}
    with (
        RunFolder(tmp_path / "s" / GOOD).locked(),
        pytest.raises(fastdlp.FastdlpError, match="another process is writing"),
    ):
        sweep(config, Grid((1e-3,), (0.1,), (0,)), overwrite=True)
    assert {p: p.read_bytes() for p in (tmp_path / "s").rglob("*") if p.is_file()} == before


def test_what_appears_while_it_prepares_is_not_replaced(few: Path, tmp_path: Path) -> None:
    """Another process may end a sweep at the same place before this one begins to write."""
    config, grid = _config(few, tmp_path / "s", method="flora", rounds=1), Grid((1e-3,), (0.1,), (0,))
    files: dict[Path, bytes] = {}

    def preparing(text: str) -> None:
        if not files:
            sweep(config, grid)
            files.update({p: p.read_bytes() for p in (tmp_path / "s").rglob("*") if p.is_file()})

    with pytest.raises(fastdlp.FastdlpError, match="holds a sweep"):
        sweep(config, grid, callbacks=Callbacks(preparing=preparing))
    assert {p: p.read_bytes() for p in (tmp_path / "s").rglob("*") if p.is_file()} == files


def test_moved_and_resumed(few: Path, tmp_path: Path, same_run: Same) -> None:
    config, grid = _config(few, tmp_path / "s", method="flora", rounds=2), Grid((1e-3,), (0.1,), (0,))
    with pytest.raises(Stopped):
        sweep(config, grid, callbacks=_stop_after(1))
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "s", tmp_path / "elsewhere" / "t")
    resume_sweep(tmp_path / "elsewhere" / "t")
    assert not (tmp_path / "s").exists()
    sweep(config, grid)
    _same_sweep(tmp_path / "s", tmp_path / "elsewhere" / "t", same_run)


def test_the_command_line(few: Path, tmp_path: Path, cli: CLI) -> None:
    options = ("--partition", few, "--batch-size", 4, "--rounds", 2, "--method", "flora", "--val-fraction", 0.3)
    grid = ("--lr", "1e-3", "--lr", "1e30", "--seed", 0, "--seed", 1)
    code, out, err = cli("sweep", *options, *grid, "--out", tmp_path / "s", "--json")
    assert code == 0, err
    summary = json.loads(out)
    assert summary == json.loads((tmp_path / "s" / "summary.json").read_text())
    assert [(member["lr"], member["seed"]) for member in summary["members"]] == [
        (lr, seed) for lr in (1e-3, 1e30) for seed in (0, 1)
    ]
    assert not any(math.isnan(v) for member in summary["members"] for v in member.values() if isinstance(v, float))
    code, out, err = cli("sweep", "--resume", tmp_path / "s")
    assert code == 0, err
    assert "0.001" in out + err
    assert "1e+30" in out + err


def test_the_default_grid_is_the_run_of_train(few: Path, tmp_path: Path, same_run: Same) -> None:
    """One value of each, resolved as fastdlp train resolves them."""
    config = _config(few, tmp_path / "run", method="flora", rounds=1, **ONE_BY_ONE)
    fastdlp.train(config)
    sweep(replace(config, out=str(tmp_path / "s")), Grid((1e-3,), (0.1,), (0,)))
    same_run(tmp_path / "s" / GOOD, tmp_path / "run")
