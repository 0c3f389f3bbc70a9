"""`fastdlp report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, finished or not, or sweeps.")],
    out: Annotated[
        Path, typer.Option("--out", metavar="FOLDER", help="Folder for index.html and its PNGs; new or empty.")
    ],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Write to --out even if it is not empty; other files in it stay.")
    ] = False,
) -> None:
    """Compare runs: a self-contained HTML page and its pictures.

    Runs that differ only in --seed are one curve with its seeds. All must have the same data set, model and partition,
    so that their accuracies can be compared.
    """
    from fastdlp.report.write import write_report

    runs = [run for path in runs for run in _members(path)]
    page, *pictures = write_report(runs, out, overwrite)
    print(f"{page}: {len(runs)} {'run' if len(runs) == 1 else 'runs'}, {len(pictures)} pictures")


def _members(path: Path) -> list[Path]:
    """The run itself; for a sweep, the members that have not diverged."""
    from fastdlp.run.sweep_folder import FILE, SweepFolder

    if not (path / FILE).is_file():
        return [path]
    sweep = SweepFolder(path)
    return [path / name for name in sweep.members if name not in sweep.failed]
