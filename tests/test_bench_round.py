"""The benchmark of a round: every variant is measured after its check, and a wrong one is refused."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdlp.bench import baselines, fastdlp_rounds, round
from fastdlp.bench.problem import Problem, make_problem
from fastdlp.cli import bench as cli_bench
from fastdlp.cli import console
from fastdlp.clip import tower
from fastdlp.kernels import dual_lora
from fastdlp.run import build_engine, build_task
from tests.conftest import CLI
from tests.models import tiny_clip

pytest.importorskip("peft", reason="the baselines need the extra fastdlp[bench]")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_clip(tmp_path_factory.mktemp("bench") / "model", quick_gelu=True)


@pytest.fixture
def setting(model: str) -> round.Setting:
    """Two clients of two batches of four images."""
    return round.Setting(model, "image", 2, 2, 4, ("fp32", "bf16"), 2, CPU)


@pytest.fixture(scope="module")
def problem(model: str) -> Problem:
    return make_problem(model, 4, clients=2, steps=2)


def measured(setting: round.Setting, **changes: Any) -> dict[str, Any]:
    return round.bench_round(replace(setting, **changes), lambda text: None)


@pytest.mark.slow
def test_every_variant_is_checked_and_measured(setting: round.Setting) -> None:
    result = measured(setting)
    rows = {(row["variant"], row["precision"]): row for row in result["rows"]}
    both = ["PEFT", "PEFT, strongest", "paper's way, 8 forwards", "full fine-tuning"]
    both += ["fastdlp", "fastdlp pre-update", "fastdlp flora, image", "fastdlp flora, text"]
    assert set(rows) == {(name, p) for name in both for p in ("fp32", "bf16")} | {("PEFT, autocast", "bf16")}
    for (name, precision), row in rows.items():
        assert 0 < row["ms_20"] <= row["ms_50"] <= row["ms_80"]
        assert row["rounds"] == 2
        assert 0 < row["peak_share"] < 1
        assert row["peak_bytes"] is None
        if (name, precision) in (("PEFT", "fp32"), ("full fine-tuning", "fp32")):
            assert (row["compared_with"], row["loss_errors"]) == ("itself", {})
            continue
        assert row["loss_errors"]
        for name, errors in row["loss_errors"].items():
            assert len(errors) == (1 if row["group"] == "FLoRA" else 3)
            assert max(errors) <= result["tolerance"][precision][name[:2]]
    assert rows["fastdlp", "fp32"]["compared_with"] == "PEFT"
    assert "pair of forwards" in rows["fastdlp pre-update", "fp32"]["compared_with"]
    assert rows["PEFT", "fp32"]["times"]["PEFT"] == 1.0
    assert set(rows["fastdlp", "bf16"]["times"]) == {"PEFT", "PEFT fp32", "strongest", "paper fp32"}
    assert set(rows["fastdlp flora, text", "bf16"]["times"]) == {"full", "full fp32"}


@pytest.mark.slow
def test_what_is_measured_by_default_passes_with_a_margin() -> None:
    """At a learning rate of 1e-4 what rounding grew to had the variant refused, with these prompts and 32 images."""
    setting = round.Setting("ViT-B-32-quickgelu", "image", 1, 1, 32, ("fp32",), 2, CPU)
    posed = make_problem(setting.model, setting.batch)
    peft, ours = (v for v in round.variants(posed, setting, "fp32") if v.name in ("PEFT", "fastdlp"))
    expected: dict[tuple[str, str], Any] = {}
    for variant in (peft, ours):
        variant.check(posed, CPU, expected)
    assert ours.reference[0] == "PEFT"
    assert (peft.is_reference, peft.errors, ours.is_reference) == (True, {}, False)
    assert ours.errors
    for name, errors in ours.errors.items():
        assert max(errors) < 0.1 * round.TOLERANCE["fp32"][name[:2]]


def test_references_are_not_in_tf32(setting: round.Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, plain = [], baselines.PeftRounds.first_steps

    def first_steps(self: baselines.PeftRounds) -> Any:
        seen.append(torch.backends.cudnn.allow_tf32)
        return plain(self)

    monkeypatch.setattr(baselines.PeftRounds, "first_steps", first_steps)
    measured(setting, precisions=("fp32",), only=("peft", "fastdlp"))
    assert seen == [False]
    assert torch.backends.cudnn.allow_tf32


def test_without_peft_the_first_variant_is_the_reference(setting: round.Setting) -> None:
    result = measured(setting, precisions=("fp32",), with_peft=False)
    rows = {row["key"]: row for row in result["rows"]}
    assert set(rows) == {"fastdlp", "pre-update", "full", "flora"}
    for key in ("fastdlp", "pre-update", "full"):
        assert (rows[key]["compared_with"], rows[key]["loss_errors"]) == ("itself", {})
    assert rows["flora"]["compared_with"] == "full fine-tuning"
    assert "peft" not in result["versions"]


WRONG = {
    # what is changed: which variant it is, and the first step at which its losses must be refused
    "a loss": ("peft", "step 1"),
    "the step of one adapter left out": ("strongest", "step 2"),
    "the same in bf16": ("strongest", "step"),
    "text features of other prompts": ("paper", "step 1"),
    "no average": ("paper", "step 3"),
    "adapters left by the client before": ("fastdlp", "step 1"),
    "another learning rate": ("pre-update", "step"),
    "the loss of full fine-tuning": ("full", "step 1"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_variant_is_refused(what: str, setting: round.Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    key, step = WRONG[what]
    if what == "a loss":
        plain = baselines.kl
        monkeypatch.setattr(baselines, "kl", lambda student, teacher: 1.05 * plain(student, teacher))
        key = "fastdlp"  # it is PEFT that the others are compared with
    elif what in ("the step of one adapter left out", "the same in bf16"):
        update = baselines.PeftRounds._update

        def forgets(self: Any, adapter: str, *others: Any) -> Any:
            weights = [tensor.clone() for tensor in self._live]
            losses = update(self, adapter, *others)
            if adapter == "global":
                torch._foreach_copy_(self._live, weights)
            return losses

        monkeypatch.setattr(baselines.StrongestRounds, "_update", forgets)
    elif what == "text features of other prompts":
        features = baselines.PaperRounds._class_features
        monkeypatch.setattr(baselines.PaperRounds, "_class_features", lambda self: features(self).roll(1, 0))
    elif what == "no average":
        monkeypatch.setattr(baselines.PaperRounds, "_average", lambda self: None)
    elif what == "adapters left by the client before":
        monkeypatch.setattr(torch, "_foreach_copy_", lambda live, held: None)
    elif what == "another learning rate":
        settings = build_engine.Hyperparameters
        monkeypatch.setattr(build_engine, "Hyperparameters", lambda lr, **others: settings(lr=1.5 * lr, **others))
    else:
        monkeypatch.setattr(baselines.FullRounds, "_epoch", _scaled(baselines.FullRounds._epoch))
        key = "flora"  # which is compared with it
    result = measured(setting, precisions=("bf16" if "bf16" in what else "fp32",), only=(key,))
    assert result["rows"] == []
    for refusal in result["failed"]:
        assert "does not compute the losses of" in refusal
        assert step in refusal
        assert "\n" not in refusal
    assert result["failed"]


def _scaled(epoch: Any) -> Any:
    return lambda self, client, steps: [
        {n: 1.01 * loss for n, loss in one.items()} for one in epoch(self, client, steps)
    ]


def test_a_result_grows_and_one_variant_loses_no_other(
    model: str, cli: CLI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A variant that dies in its second round keeps its first; a wrong one is reported; the exit code is of both."""
    features = baselines.PaperRounds._class_features
    monkeypatch.setattr(baselines.PaperRounds, "_class_features", lambda self: features(self).roll(1, 0))
    train, rounds, sizes = fastdlp_rounds.EngineRounds.round, [0], []

    def dies(self: Any) -> Any:
        rounds[0] += 1
        if rounds[0] == 3:
            raise RuntimeError("an illegal memory access")
        return train(self)

    def keep(result: dict[str, Any]) -> None:
        sizes.append(len(json.loads(json.dumps(result))["rows"]))

    monkeypatch.setattr(fastdlp_rounds.EngineRounds, "round", dies)
    monkeypatch.setattr(cli_bench, "_saving", lambda output: keep)
    command = ["bench", "round", "--model", model, "--batch-size", 2, "--repeats", 3, "--device", "cpu"]
    command += ["--precision", "fp32", "--only", "peft", "--only", "paper", "--only", "fastdlp"]
    code, out, err = cli(*command, "--json", "--output", tmp_path / "round.json")
    assert code == 1
    result = json.loads(out)
    wrong, died = result["failed"]
    assert wrong.startswith("paper's way, 8 forwards in fp32 does not compute the losses of PEFT: ")
    assert died == "fastdlp in fp32: RuntimeError an illegal memory access"
    assert "illegal memory access" in err
    assert {row["key"]: row["rounds"] for row in result["rows"]} == {"peft": 3, "fastdlp": 1}
    assert sizes[:3] == [1, 1, 2]
    assert json.loads((tmp_path / "round.json").read_text()) == result
    round.print_round(result, console.out)


def test_text_rows(setting: round.Setting) -> None:
    result = measured(setting, encoder="text")
    rows = {(row["key"], row["precision"]): row for row in result["rows"]}
    assert set(rows) == {(key, p) for key in ("uncached", "fastdlp") for p in ("fp32", "bf16")}
    assert rows["uncached", "fp32"]["compared_with"] == "itself"
    for key in (("uncached", "bf16"), ("fastdlp", "fp32"), ("fastdlp", "bf16")):
        assert {len(errors) for errors in rows[key]["loss_errors"].values()} == {3}
    plain, ours = rows["uncached", "fp32"], rows["fastdlp", "fp32"]
    assert ours["times"]["uncached"] == pytest.approx(plain["ms_50"] / ours["ms_50"])
    assert ours["ms_50"] < plain["ms_50"]  # which runs the image tower in each of three forwards


def test_wrong_cached_images_are_refused(setting: round.Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    features = build_task.frozen_image_features
    monkeypatch.setattr(build_task, "frozen_image_features", lambda *a: features(*a).roll(1, 0))
    lines = measured(setting, encoder="text", only=("fastdlp",))["failed"]
    assert lines[0].startswith("fastdlp in fp32 does not compute the losses of all 20 tokens")


def test_operations_of_the_frozen_products(problem: Problem) -> None:
    """By hand for the tiny tower: width 32, 4 · 32 in the MLP, 10 tokens, 2 blocks, 16 in the joint space."""
    w, m, tokens = 32, 128, 10
    block, last = tokens * (4 * w * w + 2 * w * m), tokens * 2 * w * w + 2 * w * w + 2 * w * m
    forward = 2 * (block + last + w * 16)
    image = problem.clip.image
    assert round.frozen_flops(image, 1, tokens, 1, 0) == forward
    assert round.frozen_flops(image, 1, tokens, 0, 1) == forward - 2 * tokens * 3 * w * w
    assert round.frozen_flops(image, 8, tokens, 3, 2) == 8 * (5 * forward - 4 * tokens * 3 * w * w)


@pytest.mark.parametrize("encoder", ["image", "text"])
def test_operations_are_those_of_a_step(
    problem: Problem, setting: round.Setting, encoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The FLOP of a variant are those of all calls of frozen products in a step, in either direction."""
    calls: Counter[tuple[Any, ...]] = Counter()

    def count(name: str, *modules: Any) -> None:
        plain = getattr(modules[0], name)

        def counting(x: torch.Tensor, weight: torch.Tensor, *bias: Any) -> torch.Tensor:
            calls[tuple(weight.shape), len(x)] += 1
            return plain(x, weight, *bias)

        for module in modules:
            monkeypatch.setattr(module, name, counting)

    rounds = fastdlp_rounds.EngineRounds(problem, "fp32", CPU, encoder=encoder)
    count("frozen_linear", dual_lora, tower)
    count("frozen_linear_backward", dual_lora)
    rounds.engine.slots = rounds.slots(range(1))
    rounds.step()
    found = {variant.key: variant for variant in round.variants(problem, replace(setting, encoder=encoder), "fp32")}
    assert found["fastdlp"].flop == sum(2 * rows * out * width * n for ((out, width), rows), n in calls.items())


def test_files_are_written(model: str, cli: CLI, tmp_path: Path) -> None:
    output = tmp_path / "round.json"
    command = ["bench", "round", "--model", model, "--batch-size", 2, "--repeats", 2, "--clients", 2, "--steps", 2]
    command += ["--device", "cpu", "--only", "peft", "--only", "fastdlp", "--only", "flora"]
    code, out, _ = cli(*command, "--output", output)
    assert code == 0
    assert "PEFT" in out
    result = json.loads(output.read_text())
    assert result["command"].startswith("fastdlp bench round --model")
    assert {"device", "threads", "commit", "versions", "tolerance", "peak_tflops"} <= set(result)
    assert len(result["rows"]) == 8


def test_a_file_that_cannot_be_written_loses_no_result(model: str, cli: CLI, tmp_path: Path) -> None:
    command = ["bench", "round", "--model", model, "--batch-size", 2, "--repeats", 2, "--device", "cpu"]
    code, out, err = cli(*command, "--only", "flora", "--precision", "fp32", "--json", "--output", tmp_path)
    *progress, line = err.splitlines()
    assert code == 2
    assert "cannot write" in line
    assert all(re.match(r" +\d+\.\d s  \S", line) for line in progress)
    assert json.loads(out)["rows"]


def test_nothing_left_is_refused(model: str, cli: CLI) -> None:
    code, _, err = cli("bench", "round", "--model", model, "--only", "autocast", "--precision", "fp32")
    assert code == 2
    assert "no variant is left" in err
    assert err.count("\n") == 1
