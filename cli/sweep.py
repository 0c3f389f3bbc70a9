"""`fastdlp sweep`: learning rate × α × seed, all members in one bank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fastdlp.cli.options import RECORD, Quiet, SummaryJson, check_options, config_options
from fastdlp.config import TrainConfig
from fastdlp.errors import FastdlpError
from fastdlp.methods import resolve

GRID = ("lr", "alpha", "seed")


@config_options(several=GRID, changed={"out": {"help": "Folder of the sweep; needed."}})
def sweep(
    given: dict[str, Any],
    resume: Annotated[
        Path | None,
        typer.Option("--resume", metavar="SWEEP", help="Go on with this sweep.", rich_help_panel=RECORD),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the sweep in --out.", rich_help_panel=RECORD)
    ] = False,
    quiet: Quiet = False,
    as_json: SummaryJson = False,
) -> None:
    """Train every learning rate with every α and every seed at once, as slots of one bank.

    Each member leaves a run folder of its own in --out. With --val-fraction the best setting is picked on validation.
    """
    if resume is not None and (given or overwrite):
        raise FastdlpError("--resume takes its options from the sweep: leave out all others")
    grid = {name: given.pop(name) for name in GRID if name in given}
    if resume is None:
        check_options(given | {name: values[0] for name, values in grid.items()})  # before torch is loaded
        if "out" not in given:
            raise FastdlpError("a sweep needs a folder: pass --out")
    from fastdlp.cli import console
    from fastdlp.run.sweep import Grid, resume_sweep
    from fastdlp.run.sweep import sweep as run_sweep

    with console.watching(quiet or as_json) as callbacks:
        if resume is not None:
            summary = resume_sweep(resume, callbacks)
        else:
            config = TrainConfig(**given)
            first = resolve(config)
            values = {name: tuple(grid.get(name, [getattr(first, name)])) for name in GRID}
            summary = run_sweep(config, Grid(**values), overwrite, callbacks)
    if as_json:
        print(json.dumps(summary, indent=1))
    elif not quiet:
        console.print_sweep(summary, resume or given["out"])
