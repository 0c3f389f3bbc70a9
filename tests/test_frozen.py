"""The frozen product against fp64, and what it promises of its bits and of the layout that it keeps."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import pytest
import torch

from fastdlp.kernels import frozen
from fastdlp.kernels.frozen import ONEDNN, frozen_linear, frozen_linear_backward
from tests.pairs import cases

SHAPES = [(0, 8, 8), (1, 1, 1), (63, 100, 96), (257, 768, 100), (401, 512, 100), (1000, 300, 257)]
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1e-2}


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@cases(shape=SHAPES, dtype=TOLERANCE, biased=[False, True], threads=[1, 2])
def test_equals_the_product(
    shape: tuple[int, int, int], dtype: torch.dtype, biased: bool, threads: int, set_threads: Callable[[int], None]
) -> None:
    set_threads(threads)
    rows, width, out = shape
    g = torch.Generator().manual_seed(0)
    x, weight, bias, dy = (
        torch.randn(s, generator=g).to(dtype) for s in ((rows, width), (out, width), (out,), (rows, out))
    )
    y = frozen_linear(x, weight, bias if biased else None)
    expected = x.double() @ weight.double().T + (bias.double() if biased else 0)
    assert y.shape == (rows, out)
    assert y.dtype == dtype
    assert y.is_contiguous()
    dx = frozen_linear_backward(dy, weight)
    if rows:
        assert (y.double() - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()
        expected = dy.double() @ weight.double()
        assert (dx.double() - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()


def test_rows_that_are_not_contiguous() -> None:
    x = torch.randn(512, 800)[:, ::2]
    weight = torch.randn(256, 400)
    assert torch.allclose(frozen_linear(x, weight), x @ weight.T, atol=1e-3)


@pytest.mark.skipif(not ONEDNN, reason="without oneDNN the library is free to sum otherwise")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_and_threads_change_no_bit(dtype: torch.dtype) -> None:
    x, weight, bias = torch.randn(1601, 300).to(dtype), torch.randn(257, 300).to(dtype), torch.randn(257).to(dtype)
    whole, threads = frozen_linear(x, weight, bias), torch.get_num_threads()
    for rows in (1, 2, 31, 50, 1600):
        assert torch.equal(frozen_linear(x[:rows], weight, bias), whole[:rows])
        assert torch.equal(frozen_linear_backward(whole[:rows], weight), frozen_linear_backward(whole, weight)[:rows])
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert torch.equal(frozen_linear(x, weight, bias), whole)
    finally:
        torch.set_num_threads(threads)


def test_a_weight_that_is_written_to_is_laid_out_again() -> None:
    x, weight = torch.randn(5, 7), torch.randn(3, 7)
    frozen_linear(x, weight), frozen_linear_backward(x[:, :3], weight)
    weight.mul_(2)
    assert torch.allclose(frozen_linear(x, weight), x @ weight.T, atol=1e-5)
    assert torch.allclose(frozen_linear_backward(x[:, :3], weight), x[:, :3] @ weight, atol=1e-5)


@torch.inference_mode()
def test_a_weight_of_inference_mode_keeps_no_layout() -> None:
    x, weight = torch.randn(5, 7), torch.randn(3, 7)
    for _ in range(2):
        assert torch.allclose(frozen_linear(x, weight), x @ weight.T, atol=1e-5)
        assert torch.allclose(frozen_linear_backward(x[:, :3], weight), x[:, :3] @ weight, atol=1e-5)
        weight.mul_(2)


def test_the_layout_goes_with_its_weight() -> None:
    before = len(frozen._blocked)
    weight = torch.randn(3, 7)
    frozen_linear(torch.randn(5, 7), weight)
    assert len(frozen._blocked) == before + ONEDNN
    del weight
    gc.collect()
    assert len(frozen._blocked) <= before
