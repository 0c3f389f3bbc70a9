"""Every method with every encoder that it allows: trained, scored from its files, continued, in bf16, and refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import fastdlp
from fastdlp.adapters.branches import Branch, Tensors
from fastdlp.methods import METHODS, resolve
from fastdlp.run import build_task
from fastdlp.run.setup import prepare
from fastdlp.run.train import Callbacks
from tests.conftest import CLI
from tests.sharing import once

ALLOWED = [(name, encoder) for name, method in METHODS.items() for encoder in method.encoders]
REFUSED = [
    (n, encoder) for n, m in METHODS.items() for encoder in ("image", "text", "both") if encoder not in m.encoders
]
STREAMED = ("fedfft", "fedvmlc")
LORA = ("feddlp", "flora", "feddat", "combined", "local", "local-sora")


@pytest.fixture(scope="module", autouse=True)
def _features_once() -> Iterator[None]:
    """All of these runs see digits through the same frozen encoder: its features are computed once a dtype."""
    honest, kept = build_task.frozen_image_features, {}

    def features(tower: Any, stem: Any, pixels: Any) -> torch.Tensor:
        dtype = tower.proj.weight.dtype
        if dtype not in kept:
            kept[dtype] = honest(tower, stem, pixels)
        return kept[dtype].clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_task, "frozen_image_features", features)
        yield


def _config(few: Path, out: Path, method: str, encoder: str = "image", **options: Any) -> fastdlp.TrainConfig:
    settings = {"partition": str(few), "batch_size": 4, "rounds": 2, "xi": 1e-3} | options
    return fastdlp.TrainConfig(method=method, encoder=encoder, out=str(out), **settings)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def runs(few: Path, shared: Path) -> Callable[[str, str], Path]:
    """The run of a method with an encoder, two rounds; beside it, in `half`, as it lay on the disk after the first."""
    root = shared / "methods"
    root.mkdir(exist_ok=True)

    def run(method: str, encoder: str) -> Path:
        def train(path: Path) -> None:
            def finished(line: dict[str, Any]) -> None:
                if line["round"] == 1:
                    shutil.copytree(path, root / f"{path.name}-half")

            fastdlp.train(_config(few, path, method, encoder), callbacks=Callbacks(finished_round=finished))

        return once(root / f"{method}-{encoder}", train)

    return run


def _lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("method", "encoder"), ALLOWED)
def test_scored_from_its_files(method: str, encoder: str, runs: Callable[[str, str], Path]) -> None:
    """fastdlp evaluate finds the same predictions as the run's last round."""
    run = runs(method, encoder)
    scores, summary = fastdlp.evaluate(run), json.loads((run / "summary.json").read_text())
    assert scores["per_client"] == summary["per_client"]
    assert scores["accuracy"] == summary["accuracy"]
    assert scores["zero_shot"] == summary["zero_shot"]


@pytest.mark.parametrize(("method", "encoder"), ALLOWED)
def test_continued_from_round_one(
    method: str, encoder: str, runs: Callable[[str, str], Path], same_run: Callable[[Path, Path], None]
) -> None:
    """Metrics, checkpoint, adapters and summary: the same bits as straight through."""
    run = runs(method, encoder)
    half = run.with_name(f"{run.name}-half")
    assert len(_lines(half)) == 1
    fastdlp.resume(half)
    same_run(half, run)


@pytest.mark.parametrize(("method", "encoder"), ALLOWED)
def test_what_a_run_leaves(method: str, encoder: str, runs: Callable[[str, str], Path]) -> None:
    """Something was learned, and the server's file is the message that the ledger counts."""
    run = runs(method, encoder)
    summary, lines = json.loads((run / "summary.json").read_text()), _lines(run)
    assert all(np.isfinite(loss) for line in lines for c in line["clients"] for loss in c["losses"].values())
    assert [c["steps"] for c in lines[0]["clients"]] == [3, 2, 2]
    files = {path.name for path in (run / "adapters").iterdir()}
    clients = {f"client-0{i}.safetensors" for i in range(3)}
    shares = not method.startswith("local")
    assert files == (set() if method in STREAMED else clients) | ({"server.safetensors"} if shares else set())
    message = (run / "adapters" / "server.safetensors").stat().st_size if shares else 0
    for line in lines:
        assert (
            [c["bytes_sent"] for c in line["clients"]]
            == [c["bytes_received"] for c in line["clients"]]
            == [message] * 3
        )
    assert summary["uploaded_bytes_per_client_round"] == summary["downloaded_bytes_per_client_round"] == message
    assert summary["uploaded_bytes_total"] == 2 * 3 * message
    if shares:
        server = load_file(run / "adapters" / "server.safetensors")
        assert sum(t.numel() for t in server.values()) == summary["uploaded_parameters"]
        assert all(name.startswith("global/") and t.dtype == torch.float32 for name, t in server.items())
        for client in files & clients:  # who all hold it between rounds
            own = load_file(run / "adapters" / client)
            assert all(torch.equal(own[name], tensor) for name, tensor in server.items())
            assert sum(t.numel() for t in own.values()) == summary["trainable_parameters"]


@pytest.mark.parametrize(
    ("method", "encoder"),
    [
        ("feddlp", "image"),
        ("feddlp", "text"),
        ("feddat", "image"),
        ("combined", "text"),
        ("fedclip", "image"),
        ("fedclip", "text"),
        ("fedlc", "image"),
        ("fedvmlc", "image"),
        ("fedfft", "image"),
        ("fedfft", "text"),
        ("fedfft", "both"),
    ],
)
def test_in_bf16(method: str, encoder: str, few: Path, tmp_path: Path) -> None:
    """The losses of a first round differ from fp32's by no more than 2 %; what is trained stays fp32."""
    options = {"rounds": 1, "lr": 1e-4}
    for precision in ("fp32", "bf16"):
        fastdlp.train(_config(few, tmp_path / precision, method, encoder, precision=precision, **options))
    (full,), (half,) = _lines(tmp_path / "fp32"), _lines(tmp_path / "bf16")
    assert half["losses"] != full["losses"]
    for name, loss in full["losses"].items():
        if name.startswith("ce"):
            assert half["losses"][name] == pytest.approx(loss, rel=0.02)
    assert all(
        t.dtype == torch.float32 for t in load_file(tmp_path / "bf16" / "adapters" / "server.safetensors").values()
    )


@pytest.mark.parametrize(("method", "encoder"), REFUSED)
def test_refused_encoders(method: str, encoder: str, tmp_path: Path, cli: CLI) -> None:
    for command in (("train", "--out", tmp_path / "run"), ("info",)):
        code, out, err = cli(*command, "--method", method, "--encoder", encoder)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert f"--method {method} supports --encoder {' or '.join(METHODS[method].encoders)} only" in err
    assert list(tmp_path.iterdir()) == []


def test_both_encoders_are_for_full_fine_tuning_alone() -> None:
    assert {name for name, method in METHODS.items() if "both" in method.encoders} == {"fedfft"}
    assert {name for name, method in METHODS.items() if method.sequential} == set(STREAMED)
    assert {name for name, method in METHODS.items() if not method.shared} == {"local", "local-sora"}


@pytest.mark.parametrize("method", ["fedlc", "fedvmlc"])
def test_a_classifier_has_no_contrastive_loss(method: str, tmp_path: Path, cli: CLI) -> None:
    code, out, err = cli("train", "--method", method, "--task-loss", "contrastive", "--out", tmp_path / "run")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"--method {method} has a classifier and does not support --task-loss contrastive" in err
    assert list(tmp_path.iterdir()) == []


VIT = "ViT-B-32-quickgelu"
ADAMW = {"optimizer": "adamw", "eps": 1e-8, "weight_decay": 0.0}
FEDAA = {"lr": 5e-5, "optimizer": "adam", "eps": 1e-6, "weight_decay": 0.2}


@pytest.mark.parametrize(
    ("method", "model", "protocol", "expected"),
    [
        ("feddlp", VIT, "paper", {"lr": 1e-5, "rounds": 100, "task_loss": "cross-entropy"} | ADAMW),
        ("feddlp", VIT, "reference", {"lr": 1e-5, "rounds": 101, "task_loss": "contrastive"} | ADAMW),
        ("feddlp", "glyph-clip", "reference", {"lr": 1e-3, "rounds": 20} | ADAMW),
        ("flora", VIT, "paper", {"lr": 1e-5, "rounds": 100} | ADAMW),
        ("flora", "glyph-clip", "paper", {"lr": 1e-3, "rounds": 20} | ADAMW),
        ("fedclip", VIT, "paper", {"lr": 1e-3, "rounds": 100} | ADAMW),
        ("fedaa", VIT, "paper", {"rounds": 50} | FEDAA),
        ("fedaa", VIT, "reference", {"rounds": 50, "clip_norm": 1.0} | FEDAA),
        ("fedaa", "glyph-clip", "paper", {"rounds": 20} | FEDAA),
        ("fedlc", VIT, "reference", {"lr": 1e-3, "task_loss": "cross-entropy", "kd_temperature": 3.0} | ADAMW),
        ("fedvmlc", VIT, "reference", {"lr": 1e-5, "task_loss": "cross-entropy"} | ADAMW),
        ("fedvmlc", "glyph-clip", "paper", {"lr": 1e-4, "rounds": 20} | ADAMW),
        ("fedfft", VIT, "paper", {"lr": 1e-5, "rounds": 100} | ADAMW),
        ("fedfft", "glyph-clip", "paper", {"lr": 1e-4, "rounds": 20} | ADAMW),
        ("local", VIT, "paper", {"lr": 1e-5, "rounds": 100} | ADAMW),
    ],
)
def test_defaults(method: str, model: str, protocol: Any, expected: dict[str, Any]) -> None:
    """What is given, else the embedded model's demonstration, else the method's, else the protocol's."""
    config = resolve(fastdlp.TrainConfig(method=method, model=model, protocol=protocol))
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.gate_lr == config.lr
    given: dict[str, Any] = {
        "lr": 0.5,
        "rounds": 7,
        "optimizer": "adam" if expected["optimizer"] == "adamw" else "adamw",
        "eps": 0.25,
        "weight_decay": 0.125,
    }
    config = resolve(fastdlp.TrainConfig(method=method, model=model, protocol=protocol, **given))
    assert {name: getattr(config, name) for name in given} == given


def test_unknown_methods_list_the_known_ones(cli: CLI, tmp_path: Path) -> None:
    code, out, err = cli("train", "--method", "fedavg", "--out", tmp_path / "run")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"unknown --method 'fedavg': choose from {', '.join(METHODS)}" in err


def test_the_frozen_copy_of_feddat(few: Path, tmp_path: Path) -> None:
    """Taken anew as a round begins, from the average; never stepped, exchanged or saved."""
    engine = prepare(_config(few, tmp_path, "feddat")).engine
    state = engine.bank.state
    seen: list[tuple[int, torch.Tensor, torch.Tensor]] = []
    step, before = engine.run, []

    def run(*inputs: Any) -> torch.Tensor:
        losses = step(*inputs)
        seen.append((len(before), state["frozen"].weights.clone(), state["global"].weights.clone()))
        return losses

    engine.run = run
    for number in (1, 2):
        before.append(state["global"].weights.clone())
        engine.train_round(number)
        engine.aggregate()
    assert not torch.equal(before[0], before[1])
    for number, frozen, shared in seen:
        assert torch.equal(frozen, before[number - 1])
        assert not torch.equal(shared, frozen)
    assert not state["frozen"].steps.any()
    assert set(engine.server) == {"global"}
    assert engine.bank.trained == ("local", "global")


def test_the_copy_is_in_no_file(runs: Callable[[str, str], Path]) -> None:
    run = runs("feddat", "image")
    summary = json.loads((run / "summary.json").read_text())
    names = set(load_file(run / "checkpoint.safetensors"))
    for client in range(3):
        names |= set(load_file(run / "adapters" / f"client-0{client}.safetensors"))
    assert {name.partition("/")[0] for name in names} == {"local", "global"}
    one = sum(t.numel() for t in load_file(run / "adapters" / "server.safetensors").values())
    assert summary["trainable_parameters"] == 2 * one
    assert summary["uploaded_parameters"] == one


@pytest.mark.parametrize(("method", "encoder"), ALLOWED)
def test_global_parts_start_equal_and_local_ones_apart(method: str, encoder: str, few: Path, tmp_path: Path) -> None:
    federation = prepare(_config(few, tmp_path, method, encoder))
    bank = federation.engine.bank
    assert bank.slots == len(federation.bank_rows) == (1 if METHODS[method].sequential else 3)
    for name, branch in bank.branches.items():
        rows = bank.state[name].weights
        assert all(torch.equal(rows[0], row) for row in rows) == (name != "local")
        if isinstance(branch, Branch):
            named = bank.named(name, 0)
            assert not any(tensor.any() for part, tensor in named.items() if part.endswith("/B"))
            assert all(tensor.any() for part, tensor in named.items() if part.endswith("/A"))
            assert branch.lora_alpha / branch.rank == branch.scale
        else:
            assert isinstance(branch, Tensors)
