"""What six rounds of FEDDLP exchange on ViT-B/32: as the paper counts, and in bytes that are there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fastdlp
from fastdlp.report.paper.compare import message_sizes
from fastdlp.report.read import read_finished


@pytest.mark.slow
def test_six_rounds_on_vit_b_32(tmp_path: Path) -> None:
    """The paper's Table VI has FEDDLP at 15.30 MB on Flowers, β 0.1."""
    rng = np.random.default_rng(0)
    for name in ("dark", "light"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(tmp_path / f"images/{name}/{i}.png")
    fastdlp.train(
        fastdlp.TrainConfig(
            model="ViT-B-32",
            pretrained="none",
            dataset=f"folder:{tmp_path / 'images'}",
            partition="iid",
            clients=2,
            rounds=6,
            test_fraction=0.5,
            checkpoint_every=6,
            out=str(tmp_path / "run"),
        )
    )
    run = read_finished(tmp_path / "run")
    assert run.uploaded == 334_336
    mb, size = message_sizes(run, 6)
    assert round(mb, 2) == 15.30
    message = (tmp_path / "run/adapters/server.safetensors").stat().st_size
    assert size == 2 * 6 * message
    assert 4 * 334_336 < message < 1.01 * 4 * 334_336
