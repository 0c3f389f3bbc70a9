"""The growth benchmark measures the points that it names, on a run's own steps, and writes them down."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdlp.bench import growth
from fastdlp.errors import FastdlpError
from tests.models import tiny_clip

SAMPLES, BATCH = 160, 4
Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_clip(tmp_path_factory.mktemp("growth") / "model")


def _measure(model: str) -> dict[str, Any]:
    return growth.bench_growth(
        model, SAMPLES, BATCH, "fp32", 2, torch.device("cpu"), (1, 20), "torch", lambda text: None
    )


def _of(result: dict[str, Any], *names: str) -> list[tuple[Any, ...]]:
    return [tuple(row[name] for name in names) for row in result["rows"]]


@pytest.mark.slow
def test_every_point_and_its_steps(model: str) -> None:
    """Steps follow the largest client and rows the sizes."""
    result = _measure(model)
    assert _of(result, "clients", "uneven", "samples", "largest_client") == [
        (1, False, 160, 160),
        (10, False, 160, 16),
        (20, False, 160, 8),
        (10, True, 160, 112),
    ]
    # The smaller last batches of the uneven clients wait for each other.
    assert _of(result, "steps", "samples_a_step")[:3] == [(40, 4.0), (4, 40.0), (2, 80.0)]
    assert result["rows"][3]["steps"] > 112 // BATCH


@pytest.mark.slow
def test_steps_are_cut_into_the_chunks_of_a_run(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = growth.build_task
    monkeypatch.setattr(growth, "build_task", lambda *args: replace(whole(*args), micro_batch=2 * BATCH))
    result = _measure(model)
    assert result["micro_batch"] == 2 * BATCH
    assert _of(result, "steps", "steps_of_largest_client")[:3] == [(40, 40), (20, 4), (20, 2)]


@pytest.mark.slow
def test_points_are_beside_ten_equal_clients(model: str) -> None:
    rows = _measure(model)["rows"]
    assert rows[1]["times_reference"] == 1.0
    for row in rows:
        assert row["times_reference"] == pytest.approx(row["seconds"] / rows[1]["seconds"])
        assert 0 < row["seconds_averaging"] < row["seconds"]
        assert row["seconds_least"] <= row["seconds"] <= row["seconds_most"]
        assert row["ms_a_sample"] == pytest.approx(row["seconds"] / row["samples"] * 1e3)


@pytest.mark.parametrize("samples", [40, 41, 320, 4000, 8000, 32000])
def test_uneven_clients_share_all_samples_and_end_in_tails(samples: int) -> None:
    sizes = growth.uneven_sizes(samples)
    assert (len(sizes), sum(sizes)) == (growth.FEW, samples)
    assert sizes[0] == round(growth.SKEW * samples)
    assert sizes[1] == max(sizes[1:])
    assert min(sizes) >= 1
    assert any(size % 4 for size in sizes)


@pytest.mark.parametrize("samples", [1000, 0])
def test_samples_that_leave_tails_are_refused(samples: int) -> None:
    with pytest.raises(FastdlpError, match="use a multiple of 32000"):
        growth.settings(samples, 32, growth.CLIENTS)


@pytest.mark.slow
def test_the_command_writes_json(cli: Cli, model: str, tmp_path: Path) -> None:
    options = ("--model", model, "--samples", SAMPLES, "--batch-size", BATCH, "--clients", 2)
    output = tmp_path / "growth.json"
    code, out, _ = cli("bench", "growth", *options, "--repeats", 1, "--device", "cpu", "--output", output)
    assert code == 0
    assert "10 uneven" in out
    result = json.loads(output.read_text())
    assert [row["clients"] for row in result["rows"]] == [2, 10, 10]
    assert {"command", "device", "threads", "commit", "versions", "micro_batch"} <= set(result)


def test_the_command_refuses_in_one_line(cli: Cli, model: str) -> None:
    code, _, err = cli("bench", "growth", "--model", model, "--samples", 100, "--device", "cpu")
    assert (code, err.count("\n")) == (2, 1)
    assert "use a multiple of 32000" in err
