"""A cache of the session's own, a tiny federation of three clients, the command line called in-process, and where and
how the Triton kernels are launched."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.sharing import once

CLI = Callable[..., tuple[int, str, str]]
BAND = 2**15  # elements on either side of a guarded operand: a tile's worth, so that a missing mask ends there

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # as many threads in all as there are cores: more wait for each other
    threads = max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # for what the tests start


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTDLP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of a session have in common."""
    base = tmp_path_factory.getbasetemp()
    path = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    path.mkdir(exist_ok=True)
    return path


@pytest.fixture(scope="session")
def few(shared: Path) -> Path:
    """A partition file of digits: clients of 12, 7 and 5 training samples and 4 test samples each."""
    members, at = {}, 0
    for client, (train, test) in enumerate([(12, 4), (7, 4), (5, 4)]):
        names = [f"digits/{i:05d}" for i in range(at, at + train + test)]
        members[str(client)] = {"train": names[:train], "test": names[train:]}
        at += train + test
    content = json.dumps({"format": "fastdlp-partition", "version": 1, "clients": members})
    return once(shared / "few.json", lambda path: path.write_text(content))


@pytest.fixture(scope="session")
def handful(shared: Path) -> dict[str, str]:
    """Options of a data set for Triton's interpreter: two classes, and clients of 4, 2 and 1 training samples."""

    def write(folder: Path) -> None:
        for kind in range(2):
            (folder / "images" / f"kind_{kind}").mkdir(parents=True)
            for i in range(5):
                shades = np.random.default_rng([kind, i]).integers(0, 256, (24, 24, 3), dtype=np.uint8)
                Image.fromarray(shades).save(folder / f"images/kind_{kind}/{i}.png")
        names, members = [f"kind_{i % 2}/{i // 2}.png" for i in range(10)], {}
        for client, (first, train, test) in enumerate([(0, 4, 1), (5, 2, 1), (8, 1, 1)]):
            own = names[first : first + train + test]
            members[str(client)] = {"train": own[:train], "test": own[train:]}
        content = {"format": "fastdlp-partition", "version": 1, "clients": members}
        (folder / "partition.json").write_text(json.dumps(content))

    folder = once(shared / "handful", write)
    return {"dataset": f"folder:{folder / 'images'}", "partition": str(folder / "partition.json")}


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CLI:
    """Call the command line's own function: (exit code, stdout, stderr)."""
    from fastdlp.cli.main import main

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fastdlp", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main()
        return (exit_.value.code, *capsys.readouterr())

    return call


def _content(path: Path) -> Any:
    """A file without what may differ between equal runs: seconds and the run's own place."""
    if path.name == "config.json":
        return json.loads(path.read_text()) | {"out": None}
    if path.name == "summary.json":
        summary = json.loads(path.read_text())
        summary["config"]["out"] = None
        return {key: value for key, value in summary.items() if not key.startswith("seconds_")}
    if path.name == "metrics.jsonl":
        return [json.loads(line) | {"seconds": None} for line in path.read_text().splitlines()]
    return path.read_bytes()


@pytest.fixture(scope="session")
def same_run() -> Callable[[Path, Path], None]:
    """Assert that two run folders hold the same files with the same content, to the bit."""

    def compare(one: Path, other: Path) -> None:
        files, others = ({p.relative_to(run) for p in run.rglob("*") if p.is_file()} for run in (one, other))
        assert files == others
        different = [str(file) for file in sorted(files) if _content(one / file) != _content(other / file)]
        assert different == []

    return compare


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run: on the GPU, and without one in Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def precision(request: pytest.FixtureRequest) -> Iterator[str]:
    """The precision that a test is parametrized with (indirect); "tf32" lets torch compute fp32 products in TF32."""
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    products.fp32_precision = "tf32" if request.param == "tf32" else "ieee"
    yield request.param
    products.fp32_precision = before


@pytest.fixture
def nan_filled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What torch allocates without initializing it holds NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def guarded(nan_filled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launch every kernel but the optimizer's on copies of its operands between bands of NaN.

    What is read beyond an end is NaN, what is written there is an error, and so is an output left unwritten (NaN).
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    from fastdlp.kernels import fold, gradients, norm, normalize, product, short_attention
    from fastdlp.kernels.launch import launch

    def launch_guarded(kernel: Any, grid: tuple[int, ...], *operands: Any, **options: Any) -> None:
        tensors = {id(operand): operand for operand in operands if isinstance(operand, Tensor)}
        bands = {key: _Banded(tensor) for key, tensor in tensors.items()}  # once a tensor, however often it is passed
        given = []
        for operand in operands:
            if isinstance(operand, TensorDescriptor):
                operand = replace(operand, base=_Banded(operand.base).inside)  # only read
            given.append(bands[id(operand)].inside if id(operand) in bands else operand)
        launch(kernel, grid, *given, **options)
        for at, operand in enumerate(operands):
            if id(operand) in bands:
                bands[id(operand)].take_back(f"operand {at} of {kernel.__name__}")

    for module in (fold, gradients, norm, normalize, product, short_attention):
        monkeypatch.setattr(module, "launch", launch_guarded)


class _Banded:
    """A copy of a tensor, strides and all, between bands of NaN (of zeros where it holds integers)."""

    def __init__(self, tensor: Tensor) -> None:
        self.original = _flat(tensor)
        padding = float("nan") if tensor.is_floating_point() else 0
        self.buffer = tensor.new_full((len(self.original) + 2 * BAND,), padding)
        self.content = self.buffer[BAND : BAND + len(self.original)]
        self.content.copy_(self.original)
        self.inside = self.content.as_strided(tensor.shape, tensor.stride(), BAND)

    def take_back(self, what: str) -> None:
        for band in (self.buffer[:BAND], self.buffer[-BAND:]):
            assert (band.isnan() if band.is_floating_point() else band == 0).all(), f"{what}: written beyond an end"
        if not torch.equal(_bits(self.content), _bits(self.original)):
            self.original.copy_(self.content)


def _flat(tensor: Tensor) -> Tensor:
    """The stretch of memory from a tensor's first to its last element."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return tensor.detach().as_strided((last + 1 if tensor.numel() else 0,), (1,))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
