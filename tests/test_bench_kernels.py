"""The operator's benchmark: its reference is the operator, wrong variants are refused, and all rows are measured."""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fastdlp.adapters.branches import TowerShape
from fastdlp.bench import common, kernels
from fastdlp.bench.kernels import Case, Operands, Run
from fastdlp.clip.load import describe
from fastdlp.kernels.dual_lora import dual_lora_reference
from fastdlp.kernels.frozen import FrozenLinear

TINY = {"tiny": kernels.ImageTower(TowerShape(1, 32, 48, 16), 3)}
CPU = torch.device("cpu")
CASE = Case("tiny", "qkv", clients=2, rows=5, parts=3, out=24, width=40, bias=True)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """No large buffers where nothing is to be measured."""
    for kind in common.PEAK_SIDE:
        monkeypatch.setitem(common.PEAK_SIDE, kind, 64)


def bench(device: torch.device, dtype: str = "fp32", linears: tuple[str, ...] = ("out",)) -> dict[str, Any]:
    return kernels.bench_kernels(TINY, [1, 2], linears, dtype, 4, 0.0, device, lambda text: None)


def test_towers_are_those_of_open_clip() -> None:
    for name, tower in kernels.TOWERS.items():
        assert describe(name)[0] == tower.shape


@pytest.mark.parametrize("bias", [True, False])
def test_expected_is_the_operator(bias: bool) -> None:
    o = kernels.make_operands(replace(CASE, bias=bias), torch.float64, CPU)
    leaves = {name: getattr(o, name).double().requires_grad_() for name in ("x", "A", "B", "c")}
    y = dual_lora_reference(linear=FrozenLinear(o.weight, o.bias), groups=o.groups, **leaves)
    values = {"y": y.detach(), **dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), o.dy)))}
    values |= {"frozen y": torch.nn.functional.linear(o.x, o.weight, o.bias), "frozen x": o.dy @ o.weight}
    right = kernels.expected(o)
    assert right.keys() == values.keys()
    for name, value in values.items():
        torch.testing.assert_close(right[name], value.float())


@pytest.mark.parametrize("dtype", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
def test_rows_are_checked_and_measured(device: torch.device, dtype: str) -> None:
    result = bench(device, dtype, ("qkv", "proj"))
    with_peft = common.installed("peft")
    expected = {"frozen", "torch"} | ({"PEFT"} if with_peft else set())
    if dtype == "fp32" or device.type == "cuda":
        expected |= {"triton"}
    assert len(result["notes"]) == ("triton" not in expected) + (not with_peft)
    rows = result["rows"]
    found = {(row["clients"], row["linear"], row["variant"]) for row in rows}
    assert len(found) == len(rows)
    assert found == {(clients, linear, name) for clients in (1, 2) for linear in ("qkv", "proj") for name in expected}
    sizes = {"qkv": (96, 32), "proj": (16, 32)}
    for row in rows:
        assert row["rows"] == row["clients"] * 4 * 2 * (3 if row["linear"] == "qkv" else 1)
        assert 0 < row["ms_20"] <= row["ms_50"] <= row["ms_80"]
        out, width = sizes[row["linear"]]
        assert row["tflops"] * row["ms_50"] * 1e9 == pytest.approx(4 * row["rows"] * out * width)
        assert row["timed"] == ("graph" if device.type == "cuda" else "calls")
        assert row["error"] <= kernels.TOLERANCE[dtype]
        if row["variant"] == "frozen":
            assert row["times_frozen"] == 1.0
    assert json.loads(json.dumps(result)) == result


@pytest.fixture
def no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its interpreter is slow; PEFT is left out with it."""
    monkeypatch.setattr(kernels, "triton_refusal", lambda device, dtype: "not here")
    monkeypatch.setattr(common, "installed", lambda package: False)


@pytest.mark.parametrize("parts", [1, 3])
def test_peft_computes_the_operator(parts: int) -> None:
    """Every output and gradient that it has, assembled in the operator's layout."""
    pytest.importorskip("peft")
    o = kernels.make_operands(replace(CASE, parts=parts), torch.float32, CPU)
    run = kernels.variants(o)["PEFT"]
    assert list(run()) == ["y", "x", "A", "B"]
    right = kernels.expected(o)
    assert kernels.error(run, o, right) < 1e-5
    for name in run():
        assert kernels.error(run, o, right | {name: 1.001 * right[name]}) > kernels.TOLERANCE["fp32"]


@pytest.fixture(params=["y", "x", "A", "B", "c"])
def wrong_torch(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, no_triton: None) -> None:
    plain, spoilt = kernels.variants, request.param

    def variants(o: Operands) -> dict[str, Run]:
        runs = plain(o)

        def run() -> dict[str, torch.Tensor]:
            outputs = runs["torch"]()
            return outputs | {spoilt: outputs[spoilt] * 1.0002}

        return {"frozen": runs["frozen"], "torch": run, "other": runs["torch"]}

    monkeypatch.setattr(kernels, "variants", variants)


@pytest.mark.usefixtures("wrong_torch")
def test_a_wrong_variant_is_reported_and_the_others_are_timed() -> None:
    result = bench(CPU)
    line, other = result["failed"]
    assert line.startswith("torch, tiny, 1 client, out: wrong in fp32: relative error 2.0e-04, allowed 5e-05")
    assert other.startswith("torch, tiny, 2 clients, out: ")
    assert {row["variant"] for row in result["rows"]} == {"frozen", "other"}


@pytest.mark.usefixtures("wrong_torch")
def test_a_wrong_variant_shows_in_the_exit_code(
    cli: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "TOWERS", TINY)
    options = ("--model", "tiny", "--linear", "out", "--milliseconds", 0, "--batch-size", 2, "--device", "cpu")
    code, out, err = cli("bench", "kernels", *options, "--json")
    assert code == 1
    assert json.loads(out)["rows"]
    assert "torch, tiny, 1 client, out: wrong in fp32" in err


@pytest.mark.usefixtures("no_triton")
def test_a_variant_that_raises_loses_no_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = kernels.variants
    monkeypatch.setattr(kernels, "variants", lambda o: {**plain(o), "last": lambda: [][0]})
    saved: list[int] = []
    result = kernels.bench_kernels(
        TINY, [1, 2], ("out",), "fp32", 4, 0.0, CPU, lambda text: None, lambda result: saved.append(len(result["rows"]))
    )
    assert result["failed"][0] == "last, tiny, 1 client, out: IndexError list index out of range"
    assert "Traceback" in capsys.readouterr().err
    assert saved == [2, 4]


@pytest.mark.usefixtures("no_triton")
def test_there_are_no_rows_without_the_frozen_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "TOLERANCE", {"fp32": -1.0})
    result = bench(CPU)
    assert result["rows"] == []
    assert len(result["failed"]) == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_unwritten_row_is_seen(value: float) -> None:
    o = kernels.make_operands(CASE, torch.float32, CPU)
    right, run = kernels.expected(o), kernels.variants(o)["frozen"]
    assert kernels.error(run, o, right) < 1e-6

    def unwritten() -> dict[str, torch.Tensor]:
        outputs = run()
        outputs["frozen y"][3, 0] = value
        return outputs

    assert math.isnan(kernels.error(unwritten, o, right))


def test_measure_gives_what_the_clock_says() -> None:
    calls = []

    def call() -> None:
        time.sleep(0.002)
        calls.append(1)

    times = common.measure(call, CPU, 30.0)
    assert 2.0 <= times.ms_20 <= times.ms_50 <= times.ms_80  # how much longer depends on the machine
    assert len(calls) > 5


@pytest.mark.slow
def test_command_line(
    cli: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(kernels, "TOWERS", TINY)
    options = ("--model", "tiny", "--linear", "proj", "--milliseconds", 0, "--batch-size", 2, "--device", "cpu")
    code, out, _ = cli("bench", "kernels", *options, "--json", "--output", tmp_path / "a.json")
    result = json.loads(out)
    assert code == 0
    assert json.loads((tmp_path / "a.json").read_text()) == result
    assert {row["linear"] for row in result["rows"]} == {"proj"}
    assert result["command"].startswith("fastdlp bench kernels --model tiny --linear proj")
    assert {"device", "threads", "commit", "versions"} <= set(result)
    text = io.StringIO()
    kernels.print_kernels(result, Console(file=text, width=140))
    assert "tiny, 1 client, proj" in text.getvalue()
    assert "measured peak" in text.getvalue()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "ViT-Z"), "unknown --model 'ViT-Z': choose from ViT-B-32, ViT-B-16, ViT-L-14"),
        (("--linear", "fc3"), "unknown --linear 'fc3': choose from qkv, out, fc1, fc2, proj"),
        (("--dtype", "fp64"), "unknown --dtype 'fp64': choose from fp32, bf16"),
    ],
)
def test_unknown_choices(cli: Callable[..., tuple[int, str, str]], options: tuple[str, str], message: str) -> None:
    assert cli("bench", "kernels", *options) == (2, "", f"fastdlp: {message}\n")
