"""Writes a report: a folder with index.html and its pictures."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from fastdlp.errors import FastdlpError
from fastdlp.files import os_errors, write_atomic
from fastdlp.report.compare import Series, check_comparable, group_seeds
from fastdlp.report.curves import accuracy_figure, exchange_figure, losses_figure
from fastdlp.report.maps import classes_figure, clients_figure, gates_figure
from fastdlp.report.page import Picture, Section, page
from fastdlp.report.read import read_runs
from fastdlp.report.style import look

PAGE = "index.html"
_NUMBERED = re.compile(r"(classes|gates)-\d\d+\.png")


def write_report(
    runs: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str], overwrite: bool = False
) -> list[Path]:
    """Write a page with pictures of runs that can be compared; equal runs give equal bytes.

    Args:
        runs: run folders, finished or not.
        out: a folder that is new or empty.
        overwrite: write into `out` even if it is not empty. Files of a report are replaced, others stay.

    Returns:
        The files written, the page first.

    Raises:
        FastdlpError: runs that cannot be read or compared, or a folder that must not or cannot be written.
    """
    folder = Path(out)
    with os_errors(f"use {folder}", "name another --out"):
        if folder.exists() and not folder.is_dir():
            raise FastdlpError(f"{folder} is not a folder: name another --out")
        if folder.is_dir() and any(folder.iterdir()) and not overwrite:
            raise FastdlpError(f"{folder} is not empty: name another --out, or write into it with --overwrite")
    read = read_runs(runs)
    check_comparable(read)
    series = group_seeds(read)
    with look():
        sections = _draw(series)
    pictures = {picture.file: picture.png for section in sections for picture in section.pictures if picture.png}
    for name, data in pictures.items():
        write_atomic(folder / name, data)
    write_atomic(folder / PAGE, page(series, sections))
    for old in folder.iterdir():
        if _NUMBERED.fullmatch(old.name) and old.name not in pictures:
            old.unlink()  # of an earlier report with more runs
    return [folder / name for name in (PAGE, *pictures)]


def _draw(series: list[Series]) -> list[Section]:
    """All sections; where a picture cannot be drawn, the reason stands in its place."""
    runs = [run for one in series for run in one.runs]
    gated = [one for one in series if one.runs[0].gates]
    most = max([float(zero.max()) for run in runs for zero in run.gates.values()] + [0.01])
    several = any(len(one.runs) > 1 for one in series)
    seeds = " Thin lines are seeds, a thick one is their mean." if several else ""
    return [
        Section(
            "Accuracy by round",
            "Over all clients’ test samples. The band is the spread of the clients, from the lowest to the highest"
            + (", averaged over seeds." if several else ".")
            + seeds,
            [Picture("accuracy.png", "Accuracy by round of all runs", accuracy_figure(series))],
        ),
        Section(
            "Clients in the last round",
            "Each client on its own test samples. The lowest is hatched and marked; the dashed line is the mean of the "
            "clients. A client without test samples has no bar.",
            [Picture("clients.png", "Accuracy of every client in every run", clients_figure(series))],
        ),
        Section(
            "Clients by classes in the last round",
            "Color: accuracy on a client’s test samples of a class. The number in a cell, or on a large map the area "
            "of its square, is the number of samples; n sums them over the classes. A cell without samples is empty.",
            [
                Picture(
                    f"classes-{number:02d}.png",
                    f"Accuracy by client and class: {one.label}",
                    classes_figure(one),
                    f"{one.label}: " + _no_classes(one),
                )
                for number, one in enumerate(series, 1)
            ],
        ),
        Section(
            "Gates at zero",
            "Fraction of a linear’s gates that the threshold has set to zero, over all clients.",
            [
                Picture(
                    f"gates-{number:02d}.png", f"Gates at zero by layer and round: {one.label}", gates_figure(one, most)
                )
                for number, one in enumerate(gated, 1)
            ]
            or [Picture("", "", None, "None of these runs is of a method with gates.")],
        ),
        Section(
            "Accuracy against bytes",
            "Bytes exchanged by the end of each round, both directions and all clients together." + seeds,
            [Picture("exchange.png", "Bytes exchanged so far against accuracy", exchange_figure(series))],
        ),
        Section(
            "Losses by round",
            "The mean over a round’s steps, averaged over clients by their training samples." + seeds,
            [Picture("losses.png", "Losses by round", losses_figure(series))],
        ),
    ]


def _no_classes(series: Series) -> str:
    if all(run.finished for run in series.runs):
        return "these runs were written by a version that did not record accuracy by class."
    return "accuracy by class is recorded when a run ends."
