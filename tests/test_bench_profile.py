"""The profile of a step: its operations by time, for each teacher."""

from __future__ import annotations

import json
from pathlib import Path

from tests.conftest import CLI
from tests.models import tiny_clip


def test_profile_of_a_step(cli: CLI, tmp_path: Path) -> None:
    model, output = tiny_clip(tmp_path / "model", quick_gelu=True), tmp_path / "profile.json"
    code, out, _ = cli("bench", "profile", "--model", model, "--batch-size", 2, "--device", "cpu", "--output", output)
    assert code == 0
    result = json.loads(output.read_text())
    assert result["what"].endswith("image encoder, 1 clients × 2 images, fp32, torch")
    assert [step["teacher"] for step in result["steps"]] == ["fresh", "pre-update"]
    calls = []
    for step in result["steps"]:
        ms = [row["ms"] for row in step["kernels"]]
        assert ms == sorted(ms, reverse=True)
        assert sum(ms) > 0
        calls.append({row["name"]: row["calls"] for row in step["kernels"]})
    assert calls[0]["DualLoRAFunction"] > calls[1]["DualLoRAFunction"] > 0
    assert "--teacher pre-update: " in out
