"""A partition to look at: clients by classes, as a table for the terminal and as a picture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fastdlp.data.partition import Partition, counts
from fastdlp.errors import FastdlpError
from fastdlp.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from rich.table import Table

_WIDE = 12  # classes that still fit as table columns
_ROOMY = 20  # classes or clients up to which the picture's cells are large
_NUMBERS = 50  # classes up to which it writes counts into them; with more, a scale explains the shades
_MOST_NAMES = 210  # class names that the picture writes; with more classes it names every second, third, ...
_MOST_INCHES = 36.0  # of the picture's map, a side
_FORMATS = (".png", ".svg", ".pdf")
_SHADES = ("#f1f4f8", "#c6dbea", "#86b6d6", "#3f8bbd", "#15609a", "#0b3a66")
_INK = "#333b45"
_ALARM = "#c0392b"


def partition_table(partition: Partition, labels: np.ndarray, class_names: Sequence[str]) -> Table:
    """A rich table, a row per client: samples of each class, and the sums of training and test samples.

    Up to 12 classes have a column each; with more, a row names its largest classes. `labels` is int [n].
    """
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title=_title(partition, len(labels)),
        show_footer=True,
        box=box.SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
        pad_edge=False,
    )
    table.title_style, table.title_justify = "bold", "left"
    table.caption, table.caption_justify = "a class counts all samples together", "left"
    cells = counts(partition, labels, len(class_names))
    every = cells.sum(axis=0)
    wide = len(class_names) <= _WIDE
    table.add_column("client", "all", justify="right")
    if wide:
        for name, both in zip(class_names, every):
            table.add_column(escape(name), _count(both), justify="right")
    else:
        table.add_column("classes", str(np.count_nonzero(every.sum(axis=1))), justify="right")
        table.add_column("largest classes", "", overflow="fold", ratio=1)
    held_out = [len(samples) for samples in partition.val] or [0] * partition.clients
    table.add_column("train", str(every[:, 0].sum() - sum(held_out)), justify="right", min_width=5)
    if partition.val:
        table.add_column("val", str(sum(held_out)), justify="right")
    table.add_column("test", str(every[:, 1].sum()), justify="right")

    for client, row in enumerate(cells):
        totals = row.sum(axis=1)
        if wide:
            middle = [_count(both) for both in row]
        else:
            largest = [i for i in np.argsort(-totals, kind="stable")[:4] if totals[i]]
            middle = [
                str(np.count_nonzero(totals)),
                escape(", ".join(f"{class_names[i]} {totals[i]}" for i in largest)),
            ]
        table.add_row(
            str(client),
            *middle,
            str(row[:, 0].sum() - held_out[client]),
            *([str(held_out[client])] if partition.val else []),
            str(row[:, 1].sum()),
            style="dim" if client in partition.empty else None,
        )
    return table


def partition_figure(
    path: str | os.PathLike[str], partition: Partition, labels: np.ndarray, class_names: Sequence[str]
) -> None:
    """Draw clients by classes to a .png, .svg or .pdf file.

    The map's shade is the number of samples, training and test together, which is also written into the cells
    where there is room. Bars beside it are each client's training and test samples. `labels` is int [n].

    Raises:
        FastdlpError: another suffix, or the file cannot be written.
    """
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in _FORMATS:
        raise FastdlpError(f"cannot draw {path}: give the file one of the suffixes {', '.join(_FORMATS)}")
    from matplotlib.figure import Figure

    cells = counts(partition, labels, len(class_names))
    clients, classes = cells.shape[:2]
    # Everything is laid out in inches from the cell's size; savefig then fits the page around the names.
    numbers = classes <= _NUMBERS and clients <= _MOST_INCHES / 0.17
    preferred = 0.46 if classes <= _ROOMY else 0.34 if numbers else 0.17
    width = classes * min(preferred, _MOST_INCHES / classes)
    height = clients * min(0.34 if clients <= _ROOMY else 0.17, _MOST_INCHES / clients)
    figure = Figure(figsize=(width + 2.2, height), dpi=150)

    def place(left: float, bottom: float, across: float, up: float) -> tuple[float, float, float, float]:
        return left / (width + 2.2), bottom / height, across / (width + 2.2), up / height

    grid = figure.add_axes(place(0, 0, width, height))
    shades = _draw_grid(grid, cells.sum(axis=2), class_names, numbers)
    _draw_bars(figure.add_axes(place(width + 0.12, 0, 1.7, height), sharey=grid), cells.sum(axis=1))
    if not numbers:
        scale = figure.colorbar(
            shades, cax=figure.add_axes(place(width + 0.14, -0.62, 1.3, 0.1)), orientation="horizontal"
        )
        scale.set_label("samples", fontsize=8, color=_INK, labelpad=1)
        scale.ax.tick_params(labelsize=7, length=2, labelcolor=_INK)
        scale.outline.set_visible(False)
    grid.set_title(_title(partition, len(labels)), loc="left", fontsize=10, color=_INK, pad=9, parse_math=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, bbox_inches="tight", pad_inches=0.15, facecolor="white")


def _draw_grid(axes: Axes, totals: np.ndarray, class_names: Sequence[str], numbers: bool) -> QuadMesh:
    """The map, with or without numbers in it; totals is int [clients, classes]."""
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm

    clients, classes = totals.shape
    norm = PowerNorm(0.5, vmin=0, vmax=max(int(totals.max()), 1))  # the root keeps a handful of samples visible
    mesh = axes.pcolormesh(
        totals,
        cmap=LinearSegmentedColormap.from_list("fastdlp", _SHADES),
        norm=norm,
        edgecolors="white",
        linewidth=1.5 if max(clients, classes) <= _ROOMY else 0.5,
        rasterized=totals.size > 20_000,
    )
    if numbers:
        for client, label in np.argwhere(totals):
            count = int(totals[client, label])
            axes.text(
                label + 0.5,
                client + 0.5,
                str(count),
                ha="center",
                va="center",
                fontsize=8 if count < 1000 and max(clients, classes) <= _ROOMY else 6.5,
                color="white" if norm(count) > 0.55 else _INK,
            )
    axes.set_xlim(0, classes)
    axes.set_ylim(clients, 0)
    columns = range(0, classes, -(-classes // _MOST_NAMES))
    small = classes > _ROOMY
    axes.set_xticks(
        [column + 0.5 for column in columns],
        [class_names[column] for column in columns],
        rotation=90 if small else 40,
        ha="center" if small else "right",
        rotation_mode="default" if small else "anchor",
        fontsize=7 if small else 8.5,
        parse_math=False,  # a class name may hold a dollar sign
    )
    step = 1 if clients <= 40 else 5 * -(-clients // 200)
    axes.set_yticks([row + 0.5 for row in range(0, clients, step)], [str(row) for row in range(0, clients, step)])
    axes.tick_params(length=0, labelcolor=_INK, pad=3)
    axes.tick_params(axis="y", labelsize=8.5)
    axes.set_ylabel("client", fontsize=9, color=_INK)
    axes.spines[:].set_visible(False)
    return mesh


def _draw_bars(axes: Axes, sizes: np.ndarray) -> None:
    """Each client's samples as a bar; sizes is int [clients, 2], training and test."""
    rows = np.arange(len(sizes)) + 0.5
    axes.barh(rows, sizes[:, 0], height=0.66, color=_SHADES[-2], label="train")
    axes.barh(rows, sizes[:, 1], left=sizes[:, 0], height=0.66, color=_SHADES[2], label="test")
    longest = max(int(sizes.sum(axis=1).max()), 1)
    axes.set_xlim(0, longest * 1.3)
    for row, total in zip(rows, sizes.sum(axis=1)):
        axes.text(
            total + longest * 0.04,
            row,
            str(total),
            va="center",
            fontsize=8 if len(sizes) <= _ROOMY else 6.5,
            color=_INK if total else _ALARM,
        )
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(0, 0),
        ncols=2,
        frameon=False,
        fontsize=8,
        labelcolor=_INK,
        handlelength=0.9,
        columnspacing=1.2,
        borderaxespad=0.4,
        borderpad=0,
    )
    axes.tick_params(left=False, labelleft=False, bottom=False, labelbottom=False)
    axes.spines[:].set_visible(False)


def _title(partition: Partition, samples: int) -> str:
    how = {
        "dirichlet": f"Dirichlet β = {partition.beta:g}" if partition.beta is not None else "Dirichlet",
        "pathological": f"{partition.classes_per_client} classes per client",
    }.get(partition.scheme, partition.scheme)
    used = sum(map(len, partition.train + partition.test + partition.val))
    amount = f"{used:,} samples" if used == samples else f"{used:,} of {samples:,} samples"
    parts = [partition.dataset, amount, f"{partition.clients} clients", how, f"seed {partition.seed}"]
    return " · ".join(part for part in parts if part)


def _count(both: np.ndarray) -> str:
    """Training and test samples of one cell together; a dot where there is none."""
    return str(both.sum()) if both.any() else "·"
