"""The engine's training curve is the same with Triton's kernels and with torch's products."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastdlp.config import TrainConfig
from fastdlp.kernels.launch import recording
from fastdlp.run.train import train
from tests.models import tiny_clip

RUNS: dict[str, dict[str, Any]] = {
    "image": {"encoder": "image"},
    "text": {"encoder": "text"},
    "image, pre-update": {"encoder": "image", "teacher": "pre-update"},
    "image, reference": {"encoder": "image", "protocol": "reference", "rounds": 1},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_same_curve(name: str, handful: dict[str, str], tmp_path: Path) -> None:
    options = RUNS[name] | handful
    model = tiny_clip(tmp_path / "model", {"width": 16, "head_width": 8}, {"layers": 2}, quick_gelu=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    curves, adapters, launches = {}, {}, {}
    for backend in ("torch", "triton"):
        run = tmp_path / backend
        config: dict[str, Any] = {"rounds": 2, "lr": 1e-3, "model": model} | options
        with recording() as launched:
            train(TrainConfig(backend=backend, device=device, out=str(run), **config))  # type: ignore[arg-type]
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        curves[backend] = [value for line in lines for value in line["losses"].values()]
        adapters[backend] = {
            f"{path.name} {name}": value
            for path in sorted((run / "adapters").iterdir())
            for name, value in load_file(path).items()
        }
        launches[backend] = len(launched)
    assert launches["torch"] == 0
    assert launches["triton"] > 100
    assert curves["triton"] == pytest.approx(curves["torch"], rel=1e-4, abs=1e-6)
    for name, value in adapters["torch"].items():
        # AdamW divides by the gradient's size, so rounding shows most where a gradient is nearly zero.
        assert (adapters["triton"][name] - value).square().mean().sqrt() <= 2e-2 * value.square().mean().sqrt() + 1e-6
