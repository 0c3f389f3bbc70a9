"""The operator's benchmark: its reference is the operator, wrong forms are refused, and all rows come out sane."""

from __future__ import annotations

import importlib.util
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
from fastdlp.bench import forms, kernels, timing
from fastdlp.bench.forms import Case, Form, Operands
from fastdlp.bench.report import print_kernels
from fastdlp.clip.load import describe
from fastdlp.kernels.dual_lora import dual_lora_reference
from fastdlp.kernels.frozen import FrozenLinear

TINY = {"tiny": kernels.ImageTower(TowerShape(1, 32, 48, 16), 3)}
CPU = torch.device("cpu")
CASE = Case("tiny", "qkv", clients=2, rows=5, parts=3, out=24, width=40, bias=True)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """No large buffers where nothing is to be measured."""
    for sizes, small in ((timing.FLUSH, 1 << 10), (kernels.PEAK_SIDE, 64), (kernels.COPY_BYTES, 1 << 10)):
        for kind in sizes:
            monkeypatch.setitem(sizes, kind, small)
    monkeypatch.setattr(timing, "LEAST", 2)


def bench(device: torch.device, dtype: str = "fp32", linears: tuple[str, ...] = ("out",)) -> dict[str, Any]:
    return kernels.bench_kernels(TINY, [1, 2], linears, dtype, 4, 0.0, device, lambda text: None)


def test_towers_are_those_of_open_clip() -> None:
    for name, tower in kernels.TOWERS.items():
        assert describe(name)[0] == tower.shape


@pytest.mark.parametrize("bias", [True, False])
def test_expected_is_the_operator(bias: bool) -> None:
    o = forms.make_operands(replace(CASE, bias=bias), torch.float64, torch.device("cpu"))
    leaves = {name: getattr(o, name).double().requires_grad_() for name in ("x", "A", "B", "c")}
    y = dual_lora_reference(linear=FrozenLinear(o.weight, o.bias), groups=o.groups, **leaves)
    gradients = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), o.dy)))
    right = forms.expected(o, checked=7)
    assert len(right.rows) == 7
    for name, value in {"y": y.detach()[right.rows], "x": gradients["x"][right.rows]}.items():
        torch.testing.assert_close(right.at_rows[name], value)
    for name in ("A", "B", "c"):
        torch.testing.assert_close(right.whole[name], gradients[name])


def test_bytes_are_those_of_the_tensors() -> None:
    o = forms.make_operands(CASE, torch.bfloat16, torch.device("cpu"))
    assert o.bias is not None
    assert CASE.all_rows == len(o.x)
    frozen, adapters = [o.x, o.weight, o.bias, o.dy], [o.A, o.B]
    forward = sum(t.nbytes for t in frozen + adapters)
    backward = sum(t.nbytes for t in [o.dy, o.weight, o.x, o.x] + adapters * 2)
    assert CASE.count("forward", 2)[1] == forward
    assert CASE.count("backward", 2)[1] == backward
    assert CASE.count("both", 2)[1] == forward + backward
    assert CASE.count("forward", 2, adapted=False)[1] == sum(t.nbytes for t in frozen)


def test_flop_are_those_of_the_products() -> None:
    m, n, k, parts = CASE.all_rows, CASE.parts * CASE.out, CASE.width, CASE.parts
    ranks = 3 * parts  # a row sees 4 or 2 of a part's 6
    down, up = 2 * m * k * ranks, 2 * m * (n // parts) * ranks
    assert CASE.count("forward", 2)[0] == 2 * m * n * k + down + up
    assert CASE.count("backward", 2)[0] == 2 * m * n * k + 2 * down + 2 * up


@pytest.mark.parametrize("dtype", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
def test_rows_are_checked_and_measured(device: torch.device, dtype: str) -> None:
    result = bench(device, dtype, ("qkv", "proj"))
    expected = {"frozen", "roofline", "addmm", "K-augmented"}
    with_peft = importlib.util.find_spec("peft") is not None
    if with_peft:
        expected |= {"PEFT"} if dtype == "fp32" else {"PEFT", "PEFT, adapters cast"}
    if dtype == "fp32" or device.type == "cuda":
        expected |= {"Triton"}
    assert len(result["notes"]) == (not with_peft) + ("Triton" not in expected)
    rows = result["rows"]
    found = {(row["clients"], row["linear"], row["form"], row["which"]) for row in rows}
    assert len(found) == len(rows)
    assert found == {
        (clients, linear, form, which)
        for clients in (1, 2)
        for linear in ("qkv", "proj")
        for form in expected
        for which in (("forward",) if form == "K-augmented" else kernels.PASSES)
    }
    for row in rows:
        assert row["rows"] == row["clients"] * 4 * 2 * (3 if row["linear"] == "qkv" else 1)
        assert 0 < row["ms_20"] <= row["ms_50"] <= row["ms_80"]
        assert row["tflops"] * row["ms_50"] * 1e9 == pytest.approx(row["flop"])
        assert row["gbytes_per_s"] * row["ms_50"] * 1e6 == pytest.approx(row["bytes"])
        if row["form"] == "roofline":
            assert (row["calls"], row["timed"], row["error"]) == (0, "computed", None)
        else:
            assert (row["calls"], row["timed"]) == (timing.LEAST, "graph" if device.type == "cuda" else "calls")
            assert row["error"] <= kernels.TOLERANCE[dtype]
        if row["form"] == "frozen":
            assert row["times_frozen"] == 1.0
    assert json.loads(json.dumps(result)) == result


def wrong_y(y: Any, gradients: Any) -> tuple[Any, Any]:
    return y * 1.0002, gradients


def wrong_gradient_of_a(y: Any, gradients: Any) -> tuple[Any, Any]:
    return y, [g * (1.0002 if i == 1 else 1) for i, g in enumerate(gradients)]


@pytest.fixture
def no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its interpreter is slow."""
    monkeypatch.setattr(kernels, "_triton_refusal", lambda device, dtype: "not here")


@pytest.fixture(params=[wrong_y, wrong_gradient_of_a])
def wrong_addmm(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, no_triton: None) -> None:
    plain, spoilt = forms.ours, request.param

    def ours(o: Operands, name: str, backend: str) -> Form:
        form = plain(o, name, backend)
        return replace(form, named=lambda y, gradients: form.named(*spoilt(y, gradients))) if name == "addmm" else form

    monkeypatch.setattr(forms, "ours", ours)


@pytest.mark.usefixtures("wrong_addmm")
def test_a_wrong_form_is_told_and_the_others_are_timed() -> None:
    result = bench(torch.device("cpu"))
    line, other = result["failed"]
    assert line.startswith("addmm, tiny, 1 client, out: wrong in fp32: relative error 2.0e-04, allowed 5e-05")
    assert other.startswith("addmm, tiny, 2 clients, out: ")
    assert {"frozen", "roofline", "K-augmented"} <= {row["form"] for row in result["rows"]}
    assert "addmm" not in {row["form"] for row in result["rows"]}


@pytest.mark.usefixtures("wrong_addmm")
def test_a_wrong_form_shows_in_the_exit_code(
    cli: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "TOWERS", TINY)
    options = ("--model", "tiny", "--linear", "out", "--milliseconds", 0, "--batch-size", 2, "--device", "cpu")
    code, out, err = cli("bench", "kernels", *options, "--json")
    assert code == 1
    assert json.loads(out)["rows"]
    assert "addmm, tiny, 1 client, out: wrong in fp32" in err


@pytest.mark.usefixtures("no_triton")
def test_a_form_that_dies_loses_no_other(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def dies(o: Operands) -> Form:
        return replace(forms.frozen(o), name="K-augmented", forward=lambda: [][0])

    monkeypatch.setattr(forms, "augmented", dies)
    saved: list[int] = []
    result = kernels.bench_kernels(
        TINY, [1, 2], ("out",), "fp32", 4, 0.0, CPU, lambda text: None, lambda result: saved.append(len(result["rows"]))
    )
    assert result["failed"][0] == "K-augmented, tiny, 1 client, out: IndexError list index out of range"
    assert "Traceback" in capsys.readouterr().err
    assert len(saved) == 2
    assert 0 < saved[0] < saved[1] == len(result["rows"])


@pytest.mark.usefixtures("no_triton")
def test_nothing_is_told_without_the_frozen_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "TOLERANCE", {"fp32": -1.0})
    result = bench(CPU)
    assert result["rows"] == []
    assert len(result["failed"]) == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_unwritten_row_is_seen_wherever_it_is(value: float) -> None:
    o = forms.make_operands(CASE, torch.float32, torch.device("cpu"))
    right = forms.expected(o, checked=3)
    (row, *_) = set(range(len(o.x))) - set(right.rows.tolist())
    form = forms.frozen(o)
    assert forms.error(form, o, right) < 1e-6

    def unwritten() -> torch.Tensor:
        y = form.forward()
        y[row, 0] = value
        return y

    assert math.isnan(forms.error(replace(form, forward=unwritten), o, right))


def test_what_does_not_fit_is_left_out_with_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "free_memory", lambda device: 1 << 20)
    result = bench(torch.device("cpu"))
    assert result["rows"] == []
    assert [note for note in result["notes"] if "tiny, 2 clients, out needs 1 GB, 0 GB are free" in note]


def test_measure_gives_what_the_clock_says() -> None:
    calls = []

    def call() -> None:
        time.sleep(0.002)
        calls.append(1)

    times = timing.measure(call, torch.device("cpu"), 30.0)
    assert 2.0 <= times.ms_20 <= times.ms_50 <= times.ms_80
    assert timing.LEAST <= times.calls <= 15
    assert len(calls) == 1 + 3 + times.calls + times.calls // 4  # first, estimate, timed and warm-up


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
    assert result["command"].startswith("fastdlp bench kernels --dtype fp32 --batch-size 2")
    assert {"device", "threads", "commit", "versions"} <= set(result)
    text = io.StringIO()
    print_kernels(result, Console(file=text, width=140))
    assert "K-augmented" in text.getvalue()
    assert "computed" in text.getvalue()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "ViT-Z"), "unknown --model 'ViT-Z': choose from ViT-B-32, ViT-B-16, ViT-L-14"),
        (("--linear", "fc3"), "unknown --linear 'fc3': choose from qkv, out, fc1, fc2, proj"),
        (("--dtype", "fp64"), "unknown --dtype 'fp64': choose from fp32, bf16"),
    ],
)
def test_unknown_words(cli: Callable[..., tuple[int, str, str]], options: tuple[str, str], message: str) -> None:
    assert cli("bench", "kernels", *options) == (2, "", f"fastdlp: {message}\n")
