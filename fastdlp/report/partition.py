"""A partition as a table for the terminal and as a picture: clients by classes."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from rich import box
from rich.markup import escape
from rich.table import Table

from fastdlp.data.partition import Partition, counts
from fastdlp.errors import FastdlpError
from fastdlp.files import write_atomic
from fastdlp.report.heatmap import MAX_SIDE, cell_size, heat_map
from fastdlp.report.style import AMOUNT, SHADES, look, render
from fastdlp.report.text import scheme_text

_MOST_COLUMNS = 12  # classes with a column each in the table
_FORMATS = (".png", ".svg", ".pdf")
_RED = "#c0392b"


def partition_table(partition: Partition, labels: np.ndarray, class_names: Sequence[str]) -> Table:
    """A rich table, a row per client: samples of each class, and the sums of training and test samples.

    Up to 12 classes have a column each; with more, a row names its largest classes. `labels` is int [n].
    """
    table = Table(
        title=_title(partition, len(labels)),
        title_style="bold",
        title_justify="left",
        caption="a class counts all samples together",
        caption_justify="left",
        show_footer=True,
        box=box.SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
        pad_edge=False,
    )
    cells = counts(partition, labels, len(class_names))
    by_class = cells.sum(axis=2)  # [clients, classes]
    totals = by_class.sum(axis=0)
    every_class = len(class_names) <= _MOST_COLUMNS
    table.add_column("client", "all", justify="right", no_wrap=True)
    if every_class:
        for name, total in zip(class_names, totals):
            table.add_column(escape(name), _count(total), justify="right")
    else:
        table.add_column("classes", str(np.count_nonzero(totals)), justify="right")
        table.add_column("largest classes", overflow="fold", ratio=1)
    sides = {"train": partition.train, "val": partition.val, "test": partition.test}
    sizes = np.array([[len(samples) for samples in side] for side in sides.values() if side]).T  # [clients, sides]
    for name, total in zip([name for name in sides if sides[name]], sizes.sum(axis=0)):
        table.add_column(name, str(total), justify="right", no_wrap=True)

    for client, (row, size) in enumerate(zip(by_class, sizes)):
        if every_class:
            shown = [_count(number) for number in row]
        else:
            largest = [i for i in np.argsort(-row, kind="stable")[:4] if row[i]]
            shown = [str(np.count_nonzero(row)), escape(", ".join(f"{class_names[i]} {row[i]}" for i in largest))]
        table.add_row(str(client), *shown, *map(str, size), style="dim" if client in partition.empty else None)
    return table


def partition_figure(
    path: str | os.PathLike[str], partition: Partition, labels: np.ndarray, class_names: Sequence[str]
) -> None:
    """Draw clients by classes to a .png, .svg or .pdf file.

    The color of a cell is its number of samples, training and test together, which is also written into the cells
    where it fits. Bars beside the map are each client's training and test samples. `labels` is int [n].

    Raises:
        FastdlpError: another suffix, or the file cannot be written.
    """
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in _FORMATS:
        raise FastdlpError(f"cannot draw {path}: give the file one of the suffixes {', '.join(_FORMATS)}")
    with look():
        figure = _draw(partition, labels, class_names)
        write_atomic(path, render(figure, suffix[1:], tight=True))


def _draw(partition: Partition, labels: np.ndarray, class_names: Sequence[str]) -> Figure:
    cells = counts(partition, labels, len(class_names))
    samples = cells.sum(axis=2)
    clients, classes = samples.shape
    width, height, numbered = cell_size(clients, classes, MAX_SIDE)
    figure, axes = heat_map(
        samples,
        (width, height),
        ([str(client) for client in range(clients)], class_names),
        AMOUNT,
        PowerNorm(0.5, vmin=0, vmax=max(int(samples.max()), 1)),  # the root keeps small numbers visible
        "" if numbered else "samples",
        numbers=samples if numbered else None,
        edges=1.0 if numbered else 0.5,
        gap=2.0,
    )
    axes.set_ylabel("client")
    axes.set_title(_title(partition, len(labels)), pad=9)
    inches = classes * width
    _draw_bars(figure.add_axes(((inches + 0.12) / inches, 0, 1.7 / inches, 1), sharey=axes), cells.sum(axis=1))
    return figure


def _draw_bars(axes: Axes, sizes: np.ndarray) -> None:
    """Each client's samples as a bar; sizes is int [clients, 2], training and test."""
    rows, totals = np.arange(len(sizes)) + 0.5, sizes.sum(axis=1)
    axes.barh(rows, sizes[:, 0], height=0.66, color=SHADES[-2], label="train")
    axes.barh(rows, sizes[:, 1], left=sizes[:, 0], height=0.66, color=SHADES[2], label="test")
    longest = max(int(totals.max()), 1)
    axes.set_xlim(0, longest * 1.3)
    for row, total in zip(rows, totals):
        label = axes.text(total + longest * 0.04, row, str(total), va="center", fontsize=6.5)
        if not total:
            label.set_color(_RED)
    axes.legend(
        loc="upper left", bbox_to_anchor=(0, 0), ncols=2, handlelength=0.9, columnspacing=1.2, borderaxespad=0.4
    )
    axes.grid(False)
    axes.tick_params(left=False, labelleft=False, bottom=False, labelbottom=False)
    axes.spines[:].set_visible(False)


def _title(partition: Partition, samples: int) -> str:
    used = sum(map(len, partition.train + partition.test + partition.val))
    amount = f"{used:,} samples" if used == samples else f"{used:,} of {samples:,} samples"
    how = scheme_text(partition.scheme, partition.beta, partition.classes_per_client)
    parts = [partition.dataset, amount, f"{partition.clients} clients", how, f"seed {partition.seed}"]
    return " · ".join(part for part in parts if part)


def _count(number: int) -> str:
    return str(number) if number else "·"
