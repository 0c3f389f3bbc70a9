"""The table and the picture of a partition show its numbers."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from rich.table import Table

from fastdlp.config import TrainConfig
from fastdlp.data.partition import Partition, counts, make_partition
from fastdlp.data.partition_file import partition_of
from fastdlp.data.registry import load_source
from fastdlp.errors import FastdlpError
from fastdlp.report.partition import _draw, partition_figure, partition_table
from tests.conftest import CLI

LABELS = np.arange(90) % 3
NAMES = [r"$\frac$", "[bold]c", "long name of a class"]


def _partition(clients: int = 4) -> Partition:
    return make_partition(LABELS, TrainConfig(clients=clients, beta=0.3, partition_seed=1), "toy")


def _text(table: Table) -> str:
    console = Console(file=io.StringIO(), width=150)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_narrow_table_has_every_count() -> None:
    partition = _partition()
    cells = counts(partition, LABELS)
    lines = [line.split() for line in _text(partition_table(partition, LABELS, NAMES)).splitlines()]
    for client, row in enumerate(cells):
        expected = [str(a + b) if a + b else "·" for a, b in row]
        assert [str(client), *expected, str(row[:, 0].sum()), str(row[:, 1].sum())] in lines
    totals = cells.sum(axis=0)
    assert [
        "all",
        *(str(a + b) for a, b in totals),
        str(totals[:, 0].sum()),
        str(totals[:, 1].sum()),
    ] in lines
    assert "[bold]c" in _text(partition_table(partition, LABELS, NAMES))
    assert "toy · 90 samples · 4 clients · Dirichlet β = 0.3 · seed 1" in _text(
        partition_table(partition, LABELS, NAMES)
    )


def test_a_wide_table_names_the_largest_classes() -> None:
    labels = np.repeat(np.arange(20), 10)
    labels[:70] = 7
    partition = make_partition(labels, TrainConfig(clients=2, partition="iid"))
    text = _text(partition_table(partition, labels, [f"class{i}" for i in range(20)]))
    for row in counts(partition, labels).sum(axis=2):
        largest = sorted(range(20), key=lambda i: (-row[i], i))[:4]
        assert largest[0] == 7
        assert f"{np.count_nonzero(row)}  " + ", ".join(f"class{i} {row[i]}" for i in largest) in text


def test_the_map_and_the_bars_hold_the_counts() -> None:
    partition = _partition()
    cells = counts(partition, LABELS)
    grid, bars = _draw(partition, LABELS, NAMES).axes
    shown = np.zeros((4, 3), int)
    for text in grid.texts:
        column, row = text.get_position()
        shown[int(row), int(column)] = int(text.get_text())
    assert np.array_equal(shown, cells.sum(axis=2))
    assert np.array_equal(grid.collections[0].get_array(), cells.sum(axis=2).ravel())
    assert [label.get_text() for label in grid.get_xticklabels()] == NAMES
    assert [int(text.get_text()) for text in bars.texts] == cells.sum(axis=(1, 2)).tolist()
    assert [patch.get_width() for patch in bars.patches] == cells.sum(axis=1).T.ravel().tolist()


@pytest.mark.parametrize(("clients", "classes"), [(1, 1), (10, 10), (10, 102), (100, 10), (60, 300)])
def test_pictures_of_every_shape(tmp_path: Path, clients: int, classes: int) -> None:
    labels = np.arange(900) % classes
    partition = make_partition(labels, TrainConfig(clients=clients, beta=0.1))
    partition_figure(tmp_path / "p.png", partition, labels, [f"class {i}" for i in range(classes)])
    with Image.open(tmp_path / "p.png") as image:
        assert max(image.size) < 7000
        assert image.width > 300
        assert len(image.convert("RGB").getcolors(2**24) or []) > 20


def test_formats(tmp_path: Path) -> None:
    starts = {"png": b"\x89PNG", "svg": b"<?xml", "PDF": b"%PDF"}
    for suffix, start in starts.items():
        partition_figure(tmp_path / f"p.{suffix}", _partition(), LABELS, NAMES)
        assert (tmp_path / f"p.{suffix}").read_bytes().startswith(start)
    with pytest.raises(FastdlpError, match=r"\.png, \.svg, \.pdf"):
        partition_figure(tmp_path / "p.jpg", _partition(), LABELS, NAMES)
    (tmp_path / "file").write_text("x")
    with pytest.raises(FastdlpError, match="cannot write"):
        partition_figure(tmp_path / "file" / "p.png", _partition(), LABELS, NAMES)


def test_unused_samples_and_other_schemes_are_shown() -> None:
    part = _partition()
    part = Partition(part.train[:2], part.test[:2], "file", None, None, 0, 0.25)
    used = sum(map(len, part.train + part.test))
    assert f"{used} of 90 samples · 2 clients · file" in _text(partition_table(part, LABELS, NAMES))
    pathological = make_partition(LABELS, TrainConfig(clients=3, partition="pathological", classes_per_client=1))
    assert "1 classes per client" in _text(partition_table(pathological, LABELS, NAMES))


def test_data_show_counts_the_partition_of_a_run(cli: CLI) -> None:
    """Also its shots and validation samples, and from a partition file."""
    options: dict[str, Any] = {"clients": 4, "beta": 0.5, "shots": 12, "val_fraction": 0.2}
    flags = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    code, out, err = cli("data", "show", *flags, "--json")
    assert (code, err) == (0, "")
    source = load_source("digits")
    run = partition_of(TrainConfig(**options), source.labels, source.ids, source.name)
    assert run.val
    shown = json.loads(out)["clients"]
    for side, expected in (("train", run.train), ("val", run.val), ("test", run.test)):
        assert [sum(client[side]) for client in shown] == [len(samples) for samples in expected]
    lines = [line.split() for line in cli("data", "show", *flags)[1].splitlines()]
    sizes = [[str(len(side[client])) for side in (run.train, run.val, run.test)] for client in range(4)]
    assert [line[-3:] for line in lines if line and line[0] in "0123"] == sizes


def test_data_show_refuses_what_a_partition_file_determines(few: Path, cli: CLI) -> None:
    code, out, err = cli("data", "show", "--partition", few, "--clients", 3)
    assert (code, out) == (2, "")
    assert "leave out --clients" in err
