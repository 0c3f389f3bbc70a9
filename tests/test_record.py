"""A run folder is complete and consistent, and can be evaluated, used as a partition and reproduced."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import fastdlp
from fastdlp.run.setup import Federation
from fastdlp.run.train import Callbacks
from tests.sharing import once

CLIENTS, ROUNDS = 4, 2
OPTIONS = f"--clients {CLIENTS} --beta 0.5 --rounds {ROUNDS} --batch-size 64 --xi 1e-3".split()
LINEARS = [f"{block}.{part}" for block in range(4) for part in ("q", "k", "v", "out", "fc1", "fc2")] + ["proj"]
SIZES = {"q": (128, 128), "k": (128, 128), "v": (128, 128), "out": (128, 128), "fc1": (128, 512), "fc2": (512, 128)}
LOSSES = {"ce_local", "kd_local", "ce_global", "kd_global"}


def _main(*arguments: object) -> tuple[int, str, str]:
    from fastdlp.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr("sys.argv", ["fastdlp", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
    return exit_.value.code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="session")
def run(shared: Path) -> Path:
    """Four clients over all of digits, two rounds, traced."""

    def train(path: Path) -> None:
        code, out, err = _main("train", *OPTIONS, "--trace", "--out", path, "--json")
        assert (code, err) == (0, "")
        assert json.loads(out) == json.loads((path / "summary.json").read_text())  # JSON, and nothing else

    return once(shared / "record", train)


@pytest.fixture(scope="session")
def summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


@pytest.fixture(scope="session")
def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _settled(summary: dict[str, Any]) -> dict[str, Any]:
    """A summary without times and places."""
    config = {k: v for k, v in summary["config"].items() if k not in ("out", "trace", "partition")}
    return {k: v for k, v in summary.items() if not k.startswith("seconds_")} | {"config": config}


def test_files(run: Path) -> None:
    files = {str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()}
    assert files == (
        {"config.json", "partition.json", "metrics.jsonl", "checkpoint.safetensors", "summary.json"}
        | {f"adapters/client-{i:02d}.safetensors" for i in range(CLIENTS)}
        | {"adapters/server.safetensors", "trace/batches.jsonl"}
        | {f"trace/round-{number:04d}.safetensors" for number in range(ROUNDS + 1)}
    )


def test_permissions_follow_the_umask(run: Path) -> None:
    mask = os.umask(0)
    os.umask(mask)
    assert run.stat().st_mode & 0o777 == 0o777 & ~mask
    for path in run.rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~mask, path


def test_config(run: Path, summary: dict[str, Any]) -> None:
    config = json.loads((run / "config.json").read_text())
    assert (config["clients"], config["beta"], config["rounds"], config["batch_size"], config["xi"]) == (
        CLIENTS, 0.5, ROUNDS, 64, 1e-3,
    )  # fmt: skip
    open_ = {name for name, value in config.items() if value is None}
    assert open_ <= {"pretrained", "data_dir", "template", "rank_local", "shots"}  # the others were filled in
    assert summary["config"] == config


def test_partition(run: Path, summary: dict[str, Any]) -> None:
    partition = json.loads((run / "partition.json").read_text())
    members = list(partition["clients"].values())
    names = [name for member in members for side in ("train", "test") for name in member[side]]
    assert sorted(names) == [f"digits/{i:05d}" for i in range(1797)]
    assert [(len(m["train"]), len(m["test"])) for m in members] == [
        (c["n_train"], c["n_test"]) for c in summary["per_client"]
    ]


def test_metrics(metrics: list[dict[str, Any]], run: Path) -> None:
    members = list(json.loads((run / "partition.json").read_text())["clients"].values())
    sizes = np.array([len(member["train"]) for member in members])
    message = (run / "adapters/server.safetensors").stat().st_size
    assert [line["round"] for line in metrics] == list(range(1, ROUNDS + 1))
    for line in metrics:
        clients = line["clients"]
        assert [c["client"] for c in clients] == list(range(CLIENTS))
        for client, member in zip(clients, members):
            assert client["n"] == len(member["test"])
            assert client["accuracy"] == client["correct"] / client["n"]
            assert set(client["losses"]) == LOSSES
            assert client["steps"] == -(-len(member["train"]) // 64)
            assert client["gates"] == 4 * len(LINEARS)
            assert client["bytes_sent"] == client["bytes_received"] == message
        assert line["accuracy"] == sum(c["correct"] for c in clients) / sum(c["n"] for c in clients)
        each = [c["accuracy"] for c in clients]
        assert line["accuracy_mean_clients"] == pytest.approx(np.mean(each), abs=1e-12)
        assert line["clients_std"] == pytest.approx(np.std(each), abs=1e-12)
        assert line["clients_lowest"] == min(each)
        for name in LOSSES:
            mean = np.average([c["losses"][name] for c in clients], weights=sizes)
            assert line["losses"][name] == pytest.approx(mean, rel=1e-12)
        zero = sum(c["gates_zero"] for c in clients)
        assert line["gates_zero_share"] == zero / (4 * len(LINEARS) * CLIENTS)
        assert set(line["gates_zero_by_part"]) == set(LINEARS)
        assert np.mean(list(line["gates_zero_by_part"].values())) == pytest.approx(line["gates_zero_share"])
        assert line["seconds"] > 0


def test_losses_are_means_and_decrease(metrics: list[dict[str, Any]]) -> None:
    """B starts at zero: both models are the frozen one, so the first round's losses are near each other."""
    first, last = metrics[0]["losses"], metrics[-1]["losses"]
    assert 0 < last["ce_local"] < first["ce_local"] < np.log(10)
    assert 0 < last["ce_global"] < first["ce_global"] < np.log(10)
    assert min(first["kd_local"], first["kd_global"]) > 0


def test_summary(summary: dict[str, Any], metrics: list[dict[str, Any]]) -> None:
    last, best = metrics[-1], max(metrics, key=lambda line: line["accuracy"])
    expected = {
        "method": "feddlp", "encoder": "image", "model": "glyph-clip", "dataset": "digits", "partition": "dirichlet",
        "beta": 0.5, "clients": CLIENTS, "rounds": ROUNDS, "seed": 0, "partition_seed": 0, "protocol": "paper",
        "precision": "fp32", "accuracy_is": "last", "empty_clients": [], "bad_images": [],
        "accuracy": last["accuracy"], "accuracy_last": last["accuracy"], "accuracy_best_test": best["accuracy"],
        "round_best_test": best["round"], "accuracy_mean_clients": last["accuracy_mean_clients"],
        "clients_std": last["clients_std"], "clients_lowest": last["clients_lowest"],
        "gates_zero_share": last["gates_zero_share"], "fastdlp_version": fastdlp.__version__,
    }  # fmt: skip
    assert {name: summary[name] for name in expected} == expected
    for client, line in zip(summary["per_client"], last["clients"]):
        assert (client["client"], client["correct"], client["n_test"], client["accuracy"]) == (
            line["client"], line["correct"], line["n"], line["accuracy"],
        )  # fmt: skip
    for name in ("zero_shot", "accuracy_last", "accuracy_best_test", "accuracy_mean_clients", "clients_lowest"):
        assert 0 < summary[name] <= 1, name
    assert 0 < summary["gates_zero_share"] < 1
    assert summary["accuracy_last"] > summary["zero_shot"]
    rounds = sum(line["seconds"] for line in metrics)
    assert summary["seconds_total"] == pytest.approx(summary["seconds_preparation"] + rounds, abs=2e-3)


def test_the_recorded_bytes_are_those_of_the_messages(
    run: Path, summary: dict[str, Any], metrics: list[dict[str, Any]]
) -> None:
    server = run / "adapters/server.safetensors"
    parameters = sum(tensor.numel() for tensor in load_file(server).values())
    assert summary["uploaded_parameters"] == parameters == 2 * (128 + 128) * 16 + 2 * (128 + 512) * 8 + 2 * 256
    size = server.stat().st_size
    assert 4 * parameters < size < 1.2 * 4 * parameters
    assert summary["uploaded_bytes_per_client_round"] == summary["downloaded_bytes_per_client_round"] == size
    assert summary["uploaded_bytes_total"] == size * CLIENTS * ROUNDS
    assert summary["uploaded_bytes_total"] == sum(c["bytes_sent"] for line in metrics for c in line["clients"])
    assert summary["downloaded_bytes_total"] == sum(c["bytes_received"] for line in metrics for c in line["clients"])
    own = load_file(run / "adapters/client-00.safetensors")
    assert summary["trainable_parameters"] == sum(tensor.numel() for tensor in own.values())


def test_a_method_that_exchanges_nothing(few: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    code, out, err = _main("train", "--method", "local", "--partition", few, "--rounds", 1, "--out", path, "--json")
    assert (code, err) == (0, "")
    result = json.loads(out)
    for way in ("uploaded", "downloaded"):
        assert (result[f"{way}_bytes_per_client_round"], result[f"{way}_bytes_total"]) == (0, 0)
    assert result["uploaded_parameters"] == 0
    assert not (path / "adapters/server.safetensors").exists()


def test_adapters(run: Path) -> None:
    """Names and shapes as documented: A [r, K], B [N, r], gate [r]; the shared branch is the server's."""
    server = load_file(run / "adapters/server.safetensors")
    shapes = {}
    for linear in LINEARS:
        inner, outer = SIZES.get(linear.rpartition(".")[2], (128, 128))
        for branch, rank in (("local", 4), ("global", 2)):
            shapes |= {f"{branch}/{linear}/A": (rank, inner), f"{branch}/{linear}/B": (outer, rank)}
        shapes[f"local/{linear}/gate"] = (4,)
    assert {name: tuple(t.shape) for name, t in server.items()} == {
        name: shape for name, shape in shapes.items() if name.startswith("global/")
    }
    for client in range(CLIENTS):
        own = load_file(run / f"adapters/client-{client:02d}.safetensors")
        assert {name: tuple(t.shape) for name, t in own.items()} == shapes
        assert {t.dtype for t in own.values()} == {torch.float32}
        assert all(torch.equal(own[name], tensor) for name, tensor in server.items())
    with safe_open(run / "adapters/client-00.safetensors", "pt") as file:
        about = json.loads(file.metadata()["fastdlp"])
    assert (about["method"], about["encoder"], about["model"]) == ("feddlp", "image", "glyph-clip")
    assert json.loads(about["scored"]) == ["local"]
    assert [(b["name"], b["rank"]) for b in json.loads(about["branches"])] == [("local", 4), ("global", 2)]


def test_trace(run: Path, metrics: list[dict[str, Any]]) -> None:
    kinds = [("local", ("A", "B", "gate")), ("global", ("A", "B"))]
    own = {f"{branch}/{linear}/{kind}" for branch, has in kinds for linear in LINEARS for kind in has}
    names = {f"c{client}/{name}" for client in range(CLIENTS) for name in own}
    names |= {f"server/{name}" for name in own if name.startswith("global/")}
    rounds = [load_file(run / f"trace/round-{number:04d}.safetensors") for number in range(ROUNDS + 1)]
    for tensors in rounds:
        assert set(tensors) == names
        assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert not any(tensor.any() for name, tensor in rounds[0].items() if name.endswith("/B"))
    last, name = rounds[-1], "global/2.fc1/B"
    assert torch.equal(last[f"server/{name}"], load_file(run / "adapters/server.safetensors")[name])
    assert not torch.equal(last[f"c0/{name}"], last[f"server/{name}"])  # a client's is from before the average
    sizes = np.array([c["n_train"] for c in json.loads((run / "summary.json").read_text())["per_client"]])
    mean = sum(last[f"c{i}/{name}"].double() * float(size / sizes.sum()) for i, size in enumerate(sizes))
    assert torch.allclose(last[f"server/{name}"].double(), torch.as_tensor(mean), atol=1e-7)

    batches = [json.loads(line) for line in (run / "trace/batches.jsonl").read_text().splitlines()]
    members = json.loads((run / "partition.json").read_text())["clients"]
    for line in metrics:
        for client in line["clients"]:
            mine = [b for b in batches if (b["round"], b["client"]) == (line["round"], client["client"])]
            assert [b["step"] for b in mine] == list(range(client["steps"]))
            used = [name for b in mine for name in b["samples"]]
            assert sorted(used) == sorted(members[str(client["client"])]["train"])


@pytest.mark.parametrize("method", ["feddlp", "flora", "local"])
@pytest.mark.parametrize("encoder", ["image", "text"])
def test_evaluate_gives_the_last_accuracies(method: str, encoder: str, few: Path, run: Path, tmp_path: Path) -> None:
    if (method, encoder) == ("feddlp", "image"):
        path = run
    else:
        path = tmp_path / "run"
        options = {"method": method, "encoder": encoder, "partition": str(few), "rounds": 2, "batch_size": 4}
        fastdlp.train(fastdlp.TrainConfig(out=str(path), **options))
    summary = json.loads((path / "summary.json").read_text())
    code, out, err = _main("evaluate", path, "--json")
    assert (code, err) == (0, "")
    scores = json.loads(out)
    assert scores["accuracy"] == summary["accuracy_last"]
    for name in ("zero_shot", "accuracy_mean_clients", "clients_std", "clients_lowest", "per_client"):
        assert scores[name] == summary[name], name
    assert fastdlp.evaluate(path) == scores


def test_adapters_of_another_client_are_refused(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    shutil.copy(copy / "adapters/client-01.safetensors", copy / "adapters/client-00.safetensors")
    code, _, err = _main("evaluate", copy)
    assert code == 2
    assert "client-00.safetensors holds the adapters of client 1" in err


def test_quiet(few: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    assert _main("train", "--partition", few, "--rounds", 1, "--out", path, "--quiet") == (0, "", "")
    assert (path / "summary.json").exists()


def test_without_out_a_folder_is_named_and_printed(few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = _main("train", "--partition", few, "--rounds", 1, "--seed", 7, "--method", "flora")
    assert code == 0
    (path,) = (tmp_path / "runs").iterdir()
    assert path.name.startswith("digits-flora-image-")
    assert "seed7" in path.name
    assert (path / "summary.json").exists()
    name = f"runs/{path.name}"
    assert [line for line in out.splitlines() if line.startswith("run folder") and line.endswith(name)]
    assert len([line for line in out.splitlines() if line.endswith(name)]) == 2  # when it starts, and when it ends
    assert err == ""


def test_two_runs_at_once_get_two_folders(few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a loop over learning rates: same name, same second."""
    monkeypatch.chdir(tmp_path)

    class Stopped:
        @staticmethod
        def now() -> Any:
            from datetime import datetime

            return datetime(2026, 1, 1)

    monkeypatch.setattr("fastdlp.run.train.datetime", Stopped)
    for lr in (1e-3, 1e-4):
        assert _main("train", "--partition", few, "--rounds", 1, "--lr", lr, "--quiet") == (0, "", "")
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_the_partition_file_gives_the_same_run(run: Path, summary: dict[str, Any], tmp_path: Path) -> None:
    """From its file alone."""
    again = tmp_path / "again"
    command = f"train --rounds {ROUNDS} --batch-size 64 --xi 1e-3 --quiet --partition".split()
    assert _main(*command, run / "partition.json", "--out", again) == (0, "", "")
    assert (again / "partition.json").read_text() == (run / "partition.json").read_text()
    assert (again / "adapters/server.safetensors").read_bytes() == (run / "adapters/server.safetensors").read_bytes()
    result = json.loads((again / "summary.json").read_text())
    for name in ("clients", "beta", "partition", "partition_seed", "per_client", "accuracy_last"):
        assert result[name] == summary[name], name


def test_equal_configs_give_equal_bits(
    run: Path, few: Path, tmp_path: Path, same_run: Callable[[Path, Path], None]
) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        options = ["--partition", few, "--rounds", 2, "--batch-size", 4, "--trace", "--seed", seed, "--quiet"]
        assert _main("train", *options, "--out", tmp_path / name) == (0, "", "")
    same_run(tmp_path / "a", tmp_path / "b")
    one, other = (load_file(tmp_path / name / "adapters/client-00.safetensors") for name in "ac")
    assert all(not torch.equal(one[name], other[name]) for name in one)
    batches = [(tmp_path / name / "trace/batches.jsonl").read_text() for name in "ac"]
    assert batches[0] != batches[1]


def test_python_is_the_command_line(run: Path, summary: dict[str, Any], tmp_path: Path) -> None:
    seen: list[Any] = []
    callbacks = Callbacks(
        preparing=seen.append,
        started=lambda path, federation, zero_shot, finished: seen.append((path, federation, zero_shot, finished)),
        finished_round=seen.append,
    )
    config = fastdlp.TrainConfig(
        clients=CLIENTS, beta=0.5, rounds=ROUNDS, batch_size=64, xi=1e-3, out=str(tmp_path / "run")
    )
    result = fastdlp.train(config, callbacks=callbacks)
    assert _settled(result) == _settled(summary)
    assert json.loads((tmp_path / "run/summary.json").read_text()) == result
    path, federation, zero_shot, finished = next(item for item in seen if isinstance(item, tuple))
    assert (path, zero_shot, finished) == (tmp_path / "run", summary["zero_shot"], 0)
    assert isinstance(federation, Federation)
    rounds = [item for item in seen if isinstance(item, dict)]
    assert rounds == [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("encoder", "parameters"), [("image", 334336), ("text", 223232)])
def test_info_counts_without_weights(encoder: str, parameters: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import open_clip
    import safetensors.torch

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("info must not load weights")

    for module, names in (
        (open_clip, ("create_model", "create_model_and_transforms", "CLIP", "download_pretrained", "load_checkpoint")),
        (open_clip.factory, ("create_model", "load_checkpoint", "load_state_dict", "CLIP")),
        (safetensors.torch, ("load_file",)),
        (torch, ("load",)),
    ):
        for name in names:
            monkeypatch.setattr(module, name, refuse)
    code, out, err = _main("info", "--model", "ViT-B-32", "--encoder", encoder, "--json")
    assert (code, err) == (0, "")
    facts = json.loads(out)
    assert facts["uploaded_parameters"] == parameters
    assert facts["parameter_bytes_per_round_per_client"] == 8 * parameters
    assert 4 * parameters < facts["uploaded_bytes_per_client_round"] < 1.1 * 4 * parameters


def test_info_and_a_run_agree(summary: dict[str, Any]) -> None:
    facts = json.loads(_main("info", "--json")[1])
    for name in ("uploaded_parameters", "trainable_parameters", "uploaded_bytes_per_client_round"):
        assert facts[name] == summary[name], name
