"""The operator of one linear under pytest-benchmark, to be compared from commit to commit on one machine:

    pytest bench/bench_operator.py --benchmark-only --benchmark-autosave --benchmark-compare

`fastdlp bench kernels` is the measurement; this one is small.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from fastdlp.bench import forms
from fastdlp.bench.forms import Case, Form, Operands

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = (torch.device("cuda"), torch.bfloat16) if CUDA else (torch.device("cpu"), torch.float32)
CASE = Case(
    "ViT-B-32", "fc1", clients=10 if CUDA else 1, rows=1600 if CUDA else 100, parts=1, out=3072, width=768, bias=True
)
FORMS: dict[str, Callable[[Operands], Form]] = {
    "frozen": forms.frozen,
    "torch": lambda o: forms.ours(o, "torch", "torch"),
    "triton": lambda o: forms.ours(o, "triton", "triton"),
}


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> Form:
    if request.param == "triton" and not CUDA:
        pytest.skip("needs a CUDA GPU")
    return FORMS[request.param](forms.make_operands(CASE, DTYPE, DEVICE))


def test_forward(form: Form, benchmark: BenchmarkFixture) -> None:
    benchmark(_finished(form.forward))


def test_backward(form: Form, benchmark: BenchmarkFixture) -> None:
    assert form.backward is not None
    benchmark(_finished(form.backward), form.forward())


def _finished(call: Callable[..., Any]) -> Callable[..., None]:
    """The call, waited for."""

    def wait(*arguments: Any) -> None:
        call(*arguments)
        if CUDA:
            torch.cuda.synchronize()

    return wait
