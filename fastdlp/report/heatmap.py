"""A heat map: cells of rows by columns, with numbers where they fit, names along the sides and a color bar."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure

from fastdlp.report.style import EMPTY, INK

# Inches. A map is laid out from the size of its cells; a tight page then includes the names around it.
MAX_SIDE = 30.0
_WIDE, _NARROW, _HIGH, _LOW = 0.42, 0.34, 0.3, 0.17  # cells with numbers, up to and beyond _FEW rows or columns
_FEW, _MOST_NUMBERED = 20, 50
_CROWDED = 0.17  # width of cells without
_NAME = 0.1  # between two names
_MIN_SIDE = 0.3  # of the filled part of a cell, so that a single sample is visible


def cell_size(rows: int, columns: int, max_width: float) -> tuple[float, float, bool]:
    """Width and height of the cells of a map, and whether they are large enough for numbers."""
    width = _WIDE if columns <= _FEW else _NARROW
    height = _HIGH if rows <= _FEW else _LOW
    if columns <= _MOST_NUMBERED and columns * width <= max_width and rows * height <= MAX_SIDE:
        return width, height, True
    return min(_CROWDED, max_width / columns), min(height, MAX_SIDE / rows), False


def heat_map(
    values: np.ndarray,
    cell: tuple[float, float],
    names: tuple[Sequence[str], Sequence[str]],
    colors: str | Colormap,
    norm: Normalize,
    label: str = "",
    present: np.ndarray | None = None,
    numbers: np.ndarray | None = None,
    areas: np.ndarray | None = None,
    edges: float = 0.0,
    gap: float = 0.5,
) -> tuple[Figure, Axes]:
    """Draw a map that fills its figure; all else lies outside the figure.

    Args:
        values: [rows, columns].
        cell: width and height of a cell in inches.
        names: of the rows and of the columns; every few where all would overlap.
        colors: color map of the values.
        norm: scale of the values.
        label: of the color bar; "" for none.
        present: cells to draw, bool [rows, columns]; default: all.
        numbers: to write into the cells, int [rows, columns], but for 0.
        areas: fractions of the cells to fill, [rows, columns]; default: all of them.
        edges: width of the white lines between cells.
        gap: between map and color bar, in inches.
    """
    rows, columns = values.shape
    width, height = columns * cell[0], rows * cell[1]
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1), facecolor=EMPTY)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, pad=3)
    axes.set(xlim=(0, columns), ylim=(rows, 0))

    present = np.ones(values.shape, bool) if present is None else present
    sides = np.ones(present.sum()) if areas is None else np.clip(np.sqrt(areas[present]), _MIN_SIDE, 1)
    centers = np.argwhere(present)[:, ::-1] + 0.5  # column, row
    square = np.array([(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)])
    cells = PolyCollection(
        list(centers[:, None] + sides[:, None, None] * square),
        array=values[present],
        cmap=colors,
        norm=norm,
        edgecolors="white" if edges else "none",
        linewidths=edges,
        antialiaseds=edges > 0,  # smooth edges of cells that touch leave gaps
        rasterized=values.size > 20_000,
    )
    axes.add_collection(cells)
    if numbers is not None:
        _write_numbers(axes, cells, centers, values[present], numbers[present])
    _write_names(axes, cell, names, numbers is not None)
    if label:
        high = min(max(height, 0.9), 1.5)
        bar = figure.add_axes(((width + gap) / width, 1 - high / height, 0.1 / width, high / height))
        scale = figure.colorbar(cells, cax=bar)
        scale.set_label(label, fontsize=7.5)
        bar.tick_params(labelsize=7, length=2)
        scale.outline.set_visible(False)
    return figure, axes


def _write_numbers(
    axes: Axes, cells: PolyCollection, centers: np.ndarray, values: np.ndarray, numbers: np.ndarray
) -> None:
    """In the middle of every cell but those of 0, dark on light colors and white on dark ones."""
    lightness = cells.to_rgba(values)[:, :3] @ (0.3, 0.59, 0.11)
    for (x, y), number, light in zip(centers, numbers, lightness):
        if number:
            ink = INK if light > 0.5 else "white"
            axes.text(x, y, str(number), ha="center", va="center", fontsize=6.5, color=ink)


def _write_names(
    axes: Axes, cell: tuple[float, float], names: tuple[Sequence[str], Sequence[str]], numbered: bool
) -> None:
    """Every few along both sides, so that they do not overlap; slanted where the cells are as wide as numbers."""
    row_names, column_names = names
    every = range(0, len(row_names), math.ceil(_NAME / cell[1]))
    axes.set_yticks([row + 0.5 for row in every], [row_names[row] for row in every], fontsize=7)
    every = range(0, len(column_names), math.ceil(_NAME / cell[0]))
    axes.set_xticks(
        [column + 0.5 for column in every],
        [name if len(name) <= 24 else name[:23] + "…" for name in column_names[:: every.step]],
        rotation=40 if numbered else 90,
        ha="right" if numbered else "center",
        rotation_mode="anchor" if numbered else "default",
        fontsize=7.5 if numbered else 6,
    )
