"""The growth benchmark measures the points that it names, on a run's own steps, and writes them down."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fastdlp.bench import growth
from fastdlp.errors import FastdlpError
from tests.models import tiny_clip

SAMPLES, BATCH = 160, 4
Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_clip(tmp_path_factory.mktemp("growth") / "model")


def _measure(model: str) -> dict[str, Any]:
    clients, ranks = (1, 20), (1, 2)
    return growth.bench_growth(
        model, SAMPLES, BATCH, "fp32", 2, torch.device("cpu"), lambda text: None, clients, ranks, "torch"
    )


def _along(result: dict[str, Any], axis: str, *names: str) -> list[tuple[Any, ...]]:
    return [tuple(row[name] for name in names) for row in result["rows"] if row["axis"] == axis]


def test_every_axis_has_its_points(model: str) -> None:
    result = _measure(model)
    few = SAMPLES // 4
    assert _along(result, "clients", "clients", "samples", "smallest_client") == [
        (1, 160, 160),
        (10, 160, 16),
        (20, 160, 8),
    ]
    assert _along(result, "samples", "clients", "samples") == [(10, few), (10, 2 * few), (10, 4 * few)]
    assert _along(result, "ranks", "rank_global", "rank_local", "samples") == [(1, 2, few), (2, 4, few)]
    assert _along(result, "ragged", "clients", "samples", "largest_client") == [(10, few, 4), (10, few, 28)]


def test_steps_follow_the_largest_client_and_rows_the_sizes(model: str) -> None:
    result = _measure(model)
    assert _along(result, "clients", "steps", "samples_a_step") == [(40, 4.0), (4, 40.0), (2, 80.0)]
    assert _along(result, "ragged", "steps", "samples_a_step") == [
        (1, 40.0),
        (8, 5.0),
    ]  # the last, smaller batches wait for each other


def test_steps_are_cut_into_the_chunks_of_a_run(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = growth.build_task
    monkeypatch.setattr(growth, "build_task", lambda *args: replace(whole(*args), micro_batch=2 * BATCH))
    result = _measure(model)
    assert result["micro_batch"] == 2 * BATCH
    assert _along(result, "clients", "steps", "steps_of_largest_client") == [(40, 40), (20, 4), (20, 2)]


def test_a_point_of_two_axes_is_measured_once_and_is_beside_the_right_reference(model: str) -> None:
    result = _measure(model)
    ten, most = (
        next(r for r in result["rows"] if r["axis"] == axis and r["samples"] == SAMPLES and r["clients"] == 10)
        for axis in ("clients", "samples")
    )
    assert ten["seconds"] == most["seconds"]
    assert ten["times_reference"] == 1.0
    first = next(row for row in result["rows"] if row["axis"] == "samples")
    assert most["times_reference"] == pytest.approx(most["seconds"] / SAMPLES / (first["seconds"] / (SAMPLES // 4)))
    for axis in growth.AXES:
        assert [row["is_reference"] for row in result["rows"] if row["axis"] == axis].count(True) == 1
    for row in result["rows"]:
        assert 0 < row["seconds_averaging"] < row["seconds"]
        assert row["seconds_least"] <= row["seconds"] <= row["seconds_most"]
        assert row["ms_a_sample"] == pytest.approx(row["seconds"] / row["samples"] * 1e3)


@pytest.mark.parametrize("samples", [40, 41, 320, 4000, 8000, 32000])
def test_uneven_clients_share_all_samples_and_end_in_tails(samples: int) -> None:
    sizes = growth.ragged_sizes(samples)
    assert (len(sizes), sum(sizes)) == (growth.FEW, samples)
    assert sizes[0] == round(growth.SKEW * samples)
    assert sizes[1] == max(sizes[1:])
    assert min(sizes) >= 1
    assert any(size % 4 for size in sizes)


@pytest.mark.parametrize(
    ("samples", "batch", "says"),
    [(1000, 32, "use a multiple of 32000"), (0, 32, "use a multiple of 32000"), (4000, 2, "--batch-size is 2")],
)
def test_samples_that_leave_tails_are_refused(samples: int, batch: int, says: str) -> None:
    with pytest.raises(FastdlpError, match=says):
        growth.settings(samples, batch)


@pytest.mark.slow
def test_the_command_writes_json_and_picture(cli: Cli, model: str, tmp_path: Path) -> None:
    options = ("--model", model, "--samples", SAMPLES, "--batch-size", BATCH, "--clients", 2, "--rank", 1, "--rank", 2)
    files = ("--output", tmp_path / "growth.json", "--plot", tmp_path / "growth.png")
    code, out, _ = cli("bench", "growth", *options, "--repeats", 1, "--device", "cpu", *files)
    assert code == 0
    assert all(title in out for title in growth.AXES.values())
    result = json.loads((tmp_path / "growth.json").read_text())
    assert {row["axis"] for row in result["rows"]} == set(growth.AXES)
    assert {"command", "device", "threads", "commit", "versions", "micro_batch"} <= set(result)
    with Image.open(tmp_path / "growth.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 800


def test_the_command_refuses_in_one_line(cli: Cli, model: str) -> None:
    code, _, err = cli("bench", "growth", "--model", model, "--samples", 100, "--device", "cpu")
    assert (code, err.count("\n")) == (2, 1)
    assert "use a multiple of 32000" in err
