"""Which form runs where, and what is said where one cannot."""

from __future__ import annotations

import pytest
import torch

from fastdlp.kernels import backend, tiles
from fastdlp.kernels.backend import MAX_RANK, choose_backend
from fastdlp.kernels.launch import recording

CPU, GPU = torch.device("cpu"), torch.device("cuda")
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("interpret", ["0", "1"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_auto_on_a_cpu_is_torch(dtype: torch.dtype, interpret: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    assert choose_backend("auto", CPU, dtype) == "torch"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("measured", [True, False])
@pytest.mark.parametrize("installed", [True, False])
def test_auto_on_a_gpu(dtype: torch.dtype, measured: bool, installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton where it is installed, takes the dtype, and was measured."""
    monkeypatch.setattr(tiles, "measured", lambda device, itemsize: measured)
    monkeypatch.setattr(backend, "_installed", lambda: installed)
    fits = measured and installed and dtype != torch.float64
    assert choose_backend("auto", GPU, dtype) == ("triton" if fits else "torch")


@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
def test_torch_is_always_torch(device: torch.device) -> None:
    assert choose_backend("torch", device, torch.float64) == "torch"


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_triton_on_a_gpu_measured_or_not(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert choose_backend("triton", GPU, dtype) == "triton"


def test_triton_needs_an_ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ValueError, match=r"compute capability 8\.0"):
        choose_backend("triton", GPU, torch.float16)


def test_rank_that_no_tile_was_compiled_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "measured", lambda device, itemsize: True)
    assert choose_backend("auto", GPU, torch.float16, MAX_RANK) == "triton"
    assert choose_backend("auto", GPU, torch.float16, MAX_RANK + 1) == "torch"
    with pytest.raises(ValueError, match="take 64 ranks a linear over all parts and branches, not 65"):
        choose_backend("triton", CPU, torch.float32, MAX_RANK + 1)


def test_triton_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose_backend("triton", CPU, torch.float32) == "triton"
    assert choose_backend("triton", CPU, torch.float16) == "triton"
    with pytest.raises(ValueError, match="interpreter computes bf16 products wrongly: use fp32 or fp16"):
        choose_backend("triton", CPU, torch.bfloat16)


@pytest.mark.parametrize("value", [None, "0"])
def test_triton_needs_a_gpu(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", value) if value else monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"needs a CUDA GPU, not cpu .*TRITON_INTERPRET=1"):
        choose_backend("triton", CPU, torch.float32)
    with recording(dry=True):
        assert choose_backend("triton", CPU, torch.bfloat16) == "triton"


@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
def test_triton_takes_no_fp64(device: torch.device) -> None:
    with pytest.raises(ValueError, match=r"fp32, fp16 and bf16, not torch.float64: use the backend torch"):
        choose_backend("triton", device, torch.float64)


def test_says_that_triton_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_installed", lambda: False)
    with pytest.raises(ValueError, match="triton is not installed: pip install triton"):
        choose_backend("triton", GPU, torch.float32)


def test_refuses_an_unknown_name() -> None:
    with pytest.raises(ValueError, match="unknown backend 'cuda': choose from auto, triton, torch"):
        choose_backend("cuda", CPU, torch.float32)
