"""A run over two processes of torchrun, against the same run in one.

With `--micro-batch 1` every product has one client's shape in both, and the sum over clients is exact in fp64, so both
runs are equal to the bit.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import fastdlp
from fastdlp.engine.device import pick_device
from fastdlp.engine.distributed import ProcessGroup, process_group
from fastdlp.errors import FastdlpError
from tests.sharing import once

Same = Callable[[Path, Path], None]
ROUNDS = 2
OPTIONS: dict[str, dict[str, Any]] = {
    "feddlp": {"micro_batch": 1, "trace": True, "local_epochs": 2},
    "text": {"method": "feddat", "encoder": "text", "micro_batch": 1, "rounds": 1},
    "local": {"method": "local-sora", "micro_batch": 1, "rounds": 1},
    "flora": {"method": "flora"},
    "fedfft": {"method": "fedfft", "trace": True},
}

# What each of torchrun's processes does: runs from a list, then what they tell each other.
SCRIPT = """
import json, sys
import numpy as np
import torch
import fastdlp
from fastdlp.errors import FastdlpError
from fastdlp.engine.distributed import process_group

todo, results = sys.argv[1:]
for case in json.loads(todo):
    if "resume" in case:
        fastdlp.resume(case["resume"], case["rounds"])
    else:
        fastdlp.train(fastdlp.TrainConfig(**case))

with process_group() as group:
    rows = torch.tensor([[0.1], [0.2], [0.3]]) + 10 * group.rank
    group.broadcast_rows(rows, [1, 0, 1])
    received = {
        "gather": group.all_gather([group.rank, float("inf")]),
        "any": [group.any(group.rank == 1), group.any(False)],
        "total": group.all_reduce(torch.tensor([1.0, group.rank], dtype=torch.float64)).tolist(),
        "any_reduce": [part.tolist() for part in group.any_reduce([np.arange(2) == group.rank, np.zeros(1, bool)])],
        "broadcast_rows": rows.tolist(),
        "errors": [],
    }
    for guilty in (0, 1):
        try:
            with group.sync_errors():
                if group.rank == guilty:
                    raise FastdlpError(f"only in {guilty}")
                with group.local_rank_zero_first():
                    received["errors"].append("did not wait")
        except FastdlpError as error:
            received["errors"].append(str(error))
    with group.sync_errors():
        pass
    open(f"{results}/{group.rank}.json", "w").write(json.dumps(received))
"""


@contextmanager
def _torchrun(*command: object) -> Iterator[subprocess.Popen[str]]:
    """Two processes, with this process's number of threads, on which bits may depend; they end with the block."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *map(str, command)]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    with subprocess.Popen(run, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A partition file of digits, n_k/n powers of two; one client has test samples alone."""
    return _partition(tmp_path_factory.mktemp("partition") / "four.json", (4, 8, 0, 4))


def _partition(path: Path, training: Sequence[int]) -> Path:
    """A partition file of clients with so many training samples, two for validation, and 4, 5, … test samples."""
    members, at = {}, 0
    for client, train in enumerate(training):
        names = [f"digits/{i:05d}" for i in range(at, at + train + client + 6)]
        members[str(client)] = {"train": names[:train], "val": names[train : train + 2], "test": names[train + 2 :]}
        at += len(names)
    path.write_text(json.dumps({"format": "fastdlp-partition", "version": 1, "clients": members}))
    return path


def _case(partition: Path, out: Path, **options: Any) -> dict[str, Any]:
    settings = {"batch_size": 3, "rounds": ROUNDS, "xi": 1e-3, "device": "cpu"} | options
    return {"partition": str(partition), "out": str(out)} | settings


@pytest.fixture(scope="module")
def runs(four: Path, shared: Path) -> tuple[Path, Path]:
    """The same runs in one process and in two: two folders of run folders."""
    folder = once(shared / "distributed", lambda folder: _run_all(four, folder))
    return folder / "one", folder / "two"


def _run_all(four: Path, folder: Path) -> None:
    one, two, results = (folder / name for name in ("one", "two", "results"))
    for path in (one, two, results):
        path.mkdir(parents=True)
    cases = {name: (four, options) for name, options in OPTIONS.items()}
    cases["idle"] = _partition(results / "one-client", (0, 8, 0, 0)), {"method": "flora", "micro_batch": 1}
    cases["thirds"] = _partition(results / "thirds", (9, 13, 0, 6)), {"micro_batch": 1, "trace": True, "rounds": 1}
    for name, (partition, options) in cases.items():
        fastdlp.train(fastdlp.TrainConfig(**_case(partition, one / name, **options)))
    todo: list[dict[str, Any]] = [_case(p, two / name, **options) for name, (p, options) in cases.items()]

    longer = OPTIONS["feddlp"] | {"rounds": 1}
    fastdlp.train(fastdlp.TrainConfig(**_case(four, two / "one-two", **longer)))
    todo += [{"resume": str(two / "one-two"), "rounds": ROUNDS}, _case(four, two / "two-one", **longer)]
    script = results / "script.py"
    script.write_text(SCRIPT)
    with _torchrun(script, json.dumps(todo), results) as process:
        out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out == ""
    fastdlp.resume(two / "two-one", ROUNDS)
    for rank in (0, 1):
        (two / f"{rank}.json").write_text((results / f"{rank}.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["feddlp", "text", "local", "idle"])
def test_two_processes_equal_one_to_the_bit(name: str, runs: tuple[Path, Path], same_run: Same) -> None:
    """Config, partition, every figure and loss, the trace, checkpoint and adapters."""
    one, two = runs
    same_run(two / name, one / name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one-two", "two-one"])
def test_goes_on_with_another_number_of_processes(name: str, runs: tuple[Path, Path], same_run: Same) -> None:
    one, two = runs
    same_run(two / name, one / "feddlp")


@pytest.mark.slow
def test_the_run_exercises_what_is_merged(runs: tuple[Path, Path]) -> None:
    """Clients of both processes with moments, pruned gates and one server, or equality would prove little."""
    state = load_file(runs[1] / "feddlp" / "checkpoint.safetensors")
    assert state["local/steps"].tolist() == [8, 12, 0, 8]  # 4, 8, 0 and 4 samples by 3, two epochs, two rounds
    assert state["local/weights_m"].any(dim=1).tolist() == [True, True, False, True]
    assert (state["local/gates"] == 0).any()
    weights = state["global/weights"]
    assert torch.equal(weights, weights[:1].expand_as(weights))


@pytest.mark.slow
def test_the_mean_is_the_same_to_the_bit(runs: tuple[Path, Path]) -> None:
    """Also with n_k/n that no float holds: n_k · weights and their sum are exact in fp64, and divided once."""
    one, two = (load_file(folder / "thirds" / "trace" / "round-0001.safetensors") for folder in runs)
    assert one.keys() == two.keys()
    assert {name for name, tensor in one.items() if not torch.equal(tensor, two[name])} == set()


def _metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flora", "fedfft"])
def test_other_shapes_and_sums_agree_to_rounding(name: str, runs: tuple[Path, Path]) -> None:
    """Chunks of other clients (flora), and a sum of two fp32 sums (fedfft): losses to 1e-4; of the server's weights, as
    AdamW divides a gradient by its own size, all but a thousandth to 2 % of the learning rate and none off by more
    than a step a round."""
    one, two = (folder / name for folder in runs)
    assert (one / "partition.json").read_bytes() == (two / "partition.json").read_bytes()
    configs = [json.loads((run / "config.json").read_text()) | {"out": None} for run in (one, two)]
    assert configs[0] == configs[1]
    for line, other in zip(_metrics(one), _metrics(two), strict=True):
        assert line["losses"].keys() == other["losses"].keys()
        for client, same in zip(line["clients"], other["clients"], strict=True):
            for key in ("correct", "n", "steps", "gates_zero", "bytes_sent"):
                assert client[key] == same[key], key
            losses = (np.array(list(c["losses"].values()), float) for c in (client, same))  # None: nan
            assert np.allclose(*losses, rtol=1e-4, atol=0, equal_nan=True)
    servers = [load_file(run / "adapters" / "server.safetensors") for run in (one, two)]
    assert servers[0].keys() == servers[1].keys()
    off = torch.cat([(tensor - servers[1][key]).abs().flatten() for key, tensor in servers[0].items()])
    off /= configs[0]["lr"]
    assert np.quantile(off.numpy(), 0.999) <= 2e-2
    assert off.max() <= ROUNDS
    assert (one / "trace").exists() == (name == "fedfft")
    for run in (one, two) if name == "fedfft" else ():
        assert (run / "trace" / "batches.jsonl").read_bytes() == (one / "trace" / "batches.jsonl").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_what_processes_exchange(rank: int, runs: tuple[Path, Path]) -> None:
    received = json.loads((runs[1] / f"{rank}.json").read_text())
    assert received["gather"] == [[0, float("inf")], [1, float("inf")]]
    assert received["any"] == [True, False]
    assert received["total"] == [2.0, 1.0]
    assert received["any_reduce"] == [[True, True], [False]]
    assert np.allclose(received["broadcast_rows"], [[10.1], [0.2], [10.3]], rtol=0, atol=1e-6)
    messages = [error for error in received["errors"] if error != "did not wait"]
    assert messages == ["only in 0", "only in 1"]


@pytest.mark.parametrize(
    ("loads", "count", "owners"),
    [
        ([5, 9, 1], 1, [0, 0, 0]),
        ([5, 9, 1], 2, [1, 0, 1]),
        ([4, 4, 4, 4], 2, [0, 1, 0, 1]),
        ([1, 2, 3, 4, 5, 6], 3, [0, 1, 2, 2, 1, 0]),
        ([7, 0, 0], 2, [0, 1, 1]),
        ([3], 4, [0]),
    ],
)
def test_the_largest_goes_to_whoever_has_least(loads: list[int], count: int, owners: list[int]) -> None:
    for rank in range(count):
        assert ProcessGroup(rank, count).owners(loads) == owners


def test_no_process_has_more_than_a_client_more_than_another() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        loads = rng.integers(0, 500, 40).tolist()
        owners = np.array(ProcessGroup(0, 4).owners(loads))
        totals = [np.array(loads)[owners == rank].sum() for rank in range(4)]
        assert max(totals) - min(totals) <= max(loads)


def test_alone_is_left_alone() -> None:
    alone, rows, found = ProcessGroup(), torch.ones(2, 1), [np.ones(1, bool)]
    alone.broadcast_rows(rows, [0, 0])
    assert (alone.all_gather({"a": (1,)}), alone.any(True), alone.any_reduce(found)) == ([{"a": (1,)}], True, found)
    assert alone.all_reduce(rows) is rows
    with pytest.raises(FastdlpError, match="as it was"), alone.sync_errors(), alone.local_rank_zero_first():
        raise FastdlpError("as it was")


def test_each_process_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for name in ("auto", "cuda"):
        assert [pick_device(name, ProcessGroup(rank, 2, rank)) for rank in (0, 1)] == [
            torch.device("cuda", 0),
            torch.device("cuda", 1),
        ]
    assert chosen == [0, 1, 0, 1]
    assert pick_device("cpu", ProcessGroup(1, 2, 1)) == torch.device("cpu")
    with pytest.raises(FastdlpError, match="more processes than GPUs: torch sees 2 CUDA devices"):
        pick_device("auto", ProcessGroup(2, 3, 2))
    with pytest.raises(FastdlpError, match="--device cuda:1 names one GPU for several processes"):
        pick_device("cuda:1", ProcessGroup(1, 2, 1))


def test_a_world_without_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(FastdlpError, match="WORLD_SIZE is 2 without RANK, LOCAL_RANK"), process_group():
        pass


@pytest.mark.parametrize(
    "command",
    [["evaluate", "run"], ["sweep", "--out", "x"], ["bench", "step"], ["reproduce", "table1"], ["data", "show"]],
)
def test_other_commands_refuse(command: list[str], cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    code, out, err = cli(*command)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "torchrun shards fastdlp train only" in err


def test_in_python_too(four: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastdlp.run.setup import prepare
    from fastdlp.run.train import train_together

    monkeypatch.setenv("WORLD_SIZE", "2")
    config = fastdlp.TrainConfig(**_case(four, tmp_path / "run"))
    for call in (lambda: prepare(config), lambda: train_together([config])):
        with pytest.raises(FastdlpError, match="torchrun shards fastdlp train only"):
            call()
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_folder_that_is_taken(four: Path, runs: tuple[Path, Path]) -> None:
    """One line for all processes, soon, and nothing written."""
    run = runs[0] / "flora"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    start = time.monotonic()
    with _torchrun("-m", "fastdlp", "train", "--partition", four, "--out", run) as process:
        out, err = process.communicate(timeout=60)
    assert time.monotonic() - start < 40
    assert process.returncode != 0
    assert out == ""
    (line,) = [line for line in err.splitlines() if line.startswith("fastdlp:")]
    assert line == f"fastdlp: {run} holds a run: continue with --resume {run}, or replace it with --overwrite"
    assert "cli/main.py" not in err  # no traceback but torchrun's own
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


@pytest.mark.slow
def test_ctrl_c(four: Path, same_run: Same, tmp_path: Path, cli: Any) -> None:
    """torchrun hands it to all processes; they stop after the same round, and the run goes on to the same bits."""
    run, rounds = tmp_path / "run", 60
    options = ["--partition", four, "--batch-size", 3, "--rounds", rounds, "--method", "flora", "--micro-batch", 1]
    options += ["--device", "cpu"]
    metrics = run / "metrics.jsonl"
    with _torchrun("-m", "fastdlp", "train", *options, "--out", run) as process:
        limit = time.monotonic() + 60
        while not (metrics.exists() and metrics.stat().st_size):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < limit, "nothing happened for a minute"
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    finished = len(_metrics(run))
    assert 1 <= finished < rounds
    assert err.count("stopping after this round") == 1
    assert err.count(f"stopped after round {finished} of {rounds}") == 1
    assert cli("train", "--resume", run, "--rounds", finished + 1, "--quiet") == (0, "", "")
    assert cli("train", *options[:4], "--rounds", finished + 1, *options[6:], "--out", tmp_path / "whole", "-q")[0] == 0
    same_run(run, tmp_path / "whole")
