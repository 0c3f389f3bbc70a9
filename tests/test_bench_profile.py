"""The profile of a step: its operations by time, for each teacher."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import CLI
from tests.models import tiny_clip


def test_profile_of_a_step(cli: CLI, tmp_path: Path) -> None:
    model, output = tiny_clip(tmp_path / "model", quick_gelu=True), tmp_path / "profile.json"
    code, out, _ = cli("bench", "profile", "--model", model, "--batch-size", 2, "--device", "cpu", "--output", output)
    assert code == 0
    result = json.loads(output.read_text())
    assert result["command"].endswith("--clients 1 --batch-size 2 --precision fp32 --backend torch")
    assert [step["teacher"] for step in result["steps"]] == ["fresh", "pre-update"]
    calls = []
    for step in result["steps"]:
        ms = [row["ms"] for row in step["kernels"]]
        assert ms == sorted(ms, reverse=True)
        assert sum(ms) == pytest.approx(step["ms_kernels"])
        assert 0 < step["ms_kernels"] <= 1.01 * step["ms_span"]
        calls.append({row["name"]: row["calls"] for row in step["kernels"]})
    assert calls[0]["DualLoRAFunction"] > calls[1]["DualLoRAFunction"] > 0
    assert "--teacher pre-update: " in out
