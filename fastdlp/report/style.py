"""The style of all pictures: light, safe for the color-blind, the same bytes for the same numbers."""

from __future__ import annotations

import io
from contextlib import AbstractContextManager
from typing import Any, Literal

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

DPI = 200  # two dots per pixel of the page
WIDTH = 8.2  # inches of a picture of curves or bars

INK, FAINT, GRID, EMPTY = "#222b33", "#67727d", "#e3e7eb", "#f3f4f6"
# Okabe and Ito's colors, without the yellow, which is hard to see on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# With the colors 28 combinations before one repeats.
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (1.2, 1.2)), (0, (7, 1.6, 1.2, 1.6)))
SHADES = ("#eef2f6", "#c6dbea", "#86b6d6", "#3f8bbd", "#15609a", "#0b3a66")  # from nothing to much
AMOUNT = LinearSegmentedColormap.from_list("amount", SHADES)
# Marks of rounds: name, shape and size. Hollow and of different sizes, since they may coincide.
MARKS = {
    "last": ("last round", ".", 5.5),
    "best": ("best on test", "^", 6.5),
    "chosen": ("chosen on validation", "D", 8),
}

_SETTINGS: dict[str, Any] = {
    "figure.dpi": DPI,
    "savefig.dpi": DPI,
    "savefig.facecolor": "white",
    "font.family": "DejaVu Sans",  # part of matplotlib, so that pictures are the same on every machine
    "font.size": 8,
    "text.color": INK,
    "text.parse_math": False,  # names of classes and folders may contain dollar signs
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 5,
    "axes.labelsize": 8,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "legend.handlelength": 2.6,
    "hatch.linewidth": 0.6,
    "lines.linewidth": 1.6,
}


def look() -> AbstractContextManager[None]:
    """Apply the style; matplotlib's settings are restored at the end."""
    return matplotlib.style.context(_SETTINGS, after_reset=True)


def png(figure: Figure, tight: bool = False) -> bytes:
    """The picture as PNG; see `render`."""
    return render(figure, "png", tight)


def render(figure: Figure, kind: str, tight: bool = False) -> bytes:
    """The picture as "png", "svg" or "pdf"; a PNG without version and date, so that equal pictures are equal files.

    `tight` fits the page to what is drawn, also outside the figure.
    """
    buffer = io.BytesIO()
    fit: dict[str, Any] = {"bbox_inches": "tight", "pad_inches": 0.06} if tight else {}
    figure.savefig(buffer, format=kind, metadata={"Software": None} if kind == "png" else None, **fit)
    return buffer.getvalue()


def panels(count: int, columns: int, height: float, width: float = WIDTH) -> tuple[Figure, list[Axes]]:
    """A figure `width` inches wide with `count` equal axes in rows of `columns`, each row `height` inches high."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(width, rows * height), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


def rounds_axis(axes: Axes, rounds: int) -> None:
    """An x axis of whole rounds from 1 to the last."""
    axes.set_xlim(1 - min(0.6, 0.02 * rounds), rounds + 0.02 * rounds)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, steps=[1, 2, 5, 10], min_n_ticks=1))
    axes.set_xlabel("round")


def pale(color: str) -> tuple[float, ...]:
    """A color halfway to white; unlike a transparent one it covers the grid."""
    return tuple((1 + part) / 2 for part in to_rgb(color))


def logarithmic(axes: Axes, which: Literal["x", "y"]) -> None:
    """A logarithmic axis with plain numbers, since powers of ten need the math text that is turned off for names."""
    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if which == "x" else (1.0, 3.0), numticks=12))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())
