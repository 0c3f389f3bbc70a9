"""The step benchmark: its PEFT baseline computes what fastdlp computes, and a form that does not is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastdlp.bench import step
from fastdlp.bench.peft_baseline import PeftStep
from fastdlp.errors import FastdlpError
from tests.models import tiny_clip

pytest.importorskip("peft", reason="the baseline needs the extra fastdlp[bench]")


@pytest.fixture
def model(tmp_path: Path) -> str:
    return tiny_clip(tmp_path / "model", quick_gelu=True)


def test_rows_are_checked_and_measured(model: str) -> None:
    result = step.bench_step(model, 4, ["fp32", "bf16"], 2, torch.device("cpu"), lambda text: None, clients=2)
    forms = [(row["form"], row["precision"]) for row in result["rows"]]
    assert ("PEFT", "fp32") in forms
    assert ("fastdlp --teacher pre-update", "bf16") in forms
    for row in result["rows"]:
        assert row["worst_loss_error"] <= step.TOLERANCE[row["precision"]]
        assert 0 < row["ms_20"] <= row["ms_50"] <= row["ms_80"]


def test_without_peft_the_first_form_is_the_baseline(model: str) -> None:
    result = step.bench_step(model, 4, ["fp32"], 2, torch.device("cpu"), lambda text: None, with_peft=False)
    assert result["baseline"] == "fastdlp"
    assert [row["form"] for row in result["rows"]] == ["fastdlp", "fastdlp --teacher pre-update"]
    assert result["rows"][0]["times_baseline"] == 1.0
    assert "peft" not in result["versions"]


def test_a_form_with_other_losses_gets_no_row(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = PeftStep._logits
    monkeypatch.setattr(
        PeftStep, "_logits", lambda self, adapter: plain(self, adapter) * (1.0 + 0.01 * (adapter == "local"))
    )
    with pytest.raises(FastdlpError, match="does not compute the baseline's losses"):
        step.bench_step(model, 4, ["fp32"], 2, torch.device("cpu"), lambda text: None)
