"""`fastdlp sweep`: learning rate × α × seed, all members in one bank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fastdlp.cli.options import OPTIMISER, RECORD, check_method_options, check_partition_options, config_options
from fastdlp.config import TrainConfig
from fastdlp.errors import FastdlpError
from fastdlp.methods import resolve

OWN = ("lr", "alpha", "seed", "out")  # options that this command has in another form than train


def _sweep(
    given: dict[str, Any],
    lr: Annotated[
        list[float] | None,
        typer.Option("--lr", help="A learning rate; give the option again for each.", rich_help_panel=OPTIMISER),
    ] = None,
    alpha: Annotated[
        list[float] | None, typer.Option("--alpha", help="An α; likewise.", rich_help_panel=OPTIMISER)
    ] = None,
    seed: Annotated[
        list[int] | None, typer.Option("--seed", help="A seed; likewise.", rich_help_panel=OPTIMISER)
    ] = None,
    out: Annotated[
        str | None, typer.Option("--out", help="Folder of the sweep; needed.", rich_help_panel=RECORD)
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option("--resume", metavar="SWEEP", help="Go on with this sweep.", rich_help_panel=RECORD),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the sweep in --out.", rich_help_panel=RECORD)
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Show nothing but errors.", rich_help_panel=RECORD)
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the summary as JSON on stdout.", rich_help_panel=RECORD)
    ] = False,
) -> None:
    """Train every learning rate with every α and every seed at once, as slots of one bank.

    Each member leaves a run folder of its own in --out. With --val-fraction the best setting is picked on validation.
    """
    given |= {"out": out} if out is not None else {}
    if resume is not None and (given or lr or alpha or seed or overwrite):
        raise FastdlpError("--resume takes its options from the sweep: leave out all others")
    if resume is None:
        resolve(TrainConfig(**given))  # a wrong option is told before torch is loaded
        check_method_options(given | ({"alpha": alpha[0]} if alpha else {}))
        check_partition_options(given)
        if "out" not in given:
            raise FastdlpError("a sweep needs a folder: pass --out")
    from fastdlp.cli import console
    from fastdlp.run import sweep as engine
    from fastdlp.run import train as training

    try:
        with console.watching(quiet or as_json) as callbacks:
            if resume is not None:
                summary = engine.resume_sweep(resume, callbacks)
            else:
                config = TrainConfig(**given)
                grid = engine.Grid(
                    tuple(lr or [resolve(config).lr or 0.0]),
                    tuple(alpha or [config.alpha]),
                    tuple(seed or [config.seed]),
                )
                summary = engine.sweep(config, grid, overwrite, callbacks)
    except training.Stopped as stopped:
        console.print_stop(stopped)
        raise typer.Exit(130) from None
    if as_json:
        print(json.dumps(summary, indent=1))
    elif not quiet:
        console.print_sweep(summary, resume or given["out"])


sweep = config_options(_sweep, without=OWN)
