"""The operator of one linear under pytest-benchmark, to be compared from commit to commit on one machine:

    pytest bench/bench_operator.py --benchmark-only --benchmark-autosave --benchmark-compare

`fastdlp bench kernels` measures all linears and models.
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from fastdlp.bench import kernels
from fastdlp.bench.common import synchronize

CUDA = torch.cuda.is_available()
DEVICE, PRECISION = (torch.device("cuda"), "bf16") if CUDA else (torch.device("cpu"), "fp32")
CLIENTS, BATCH = (10, 32) if CUDA else (1, 2)


@pytest.mark.parametrize("name", ["frozen", "PEFT", "torch", "triton"])
def test_forward_and_backward(name: str, benchmark: BenchmarkFixture) -> None:
    [case] = kernels.cases("ViT-B-32", kernels.TOWERS["ViT-B-32"], CLIENTS, BATCH, ["fc1"])
    o = kernels.make_operands(case, kernels.DTYPES[PRECISION], DEVICE)
    runs = kernels.variants(o)
    if name not in runs or (name == "triton" and not CUDA):
        pytest.skip("needs PEFT" if name == "PEFT" else "needs a CUDA GPU")
    assert kernels.error(runs[name], o, kernels.expected(o)) <= kernels.TOLERANCE[PRECISION]

    def finished() -> None:
        runs[name]()
        synchronize(DEVICE)

    benchmark(finished)
