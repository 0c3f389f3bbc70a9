"""`fastdlp reproduce`: the paper's tables, ours beside the published ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from fastdlp.cli.options import config_options
from fastdlp.config import TrainConfig
from fastdlp.errors import FastdlpError
from fastdlp.report.paper.tables import TABLES, find_table

if TYPE_CHECKING:
    from fastdlp.report.paper.plan import Plan

_WIDTH = 100  # columns of a comparison; a narrower terminal wraps it
TABLE, SETTING, RUNS = "Part of the table", "Setting", "Runs"


def _panel(panel: str, text: str, default: str) -> dict[str, str]:
    return {"rich_help_panel": panel, "help": text, "show_default": default}


# Options of `TrainConfig`: those that choose a part of the table, may be repeated; the last five are as in train.
_PARTS = {
    "dataset": _panel(TABLE, "pets, flowers, aircraft, dtd; or digits: a smoke run. Repeatable.", "the four"),
    "encoder": _panel(TABLE, "image or text. Repeatable.", "the table's"),
    "beta": _panel(TABLE, "Repeatable.", "the table's"),
    "method": _panel(TABLE, "Repeatable.", "the table's"),
    "seed": _panel(TABLE, "Of training. Repeatable.", "0, 1, 42"),
}
_SETTINGS = {
    "model": _panel(SETTING, "As in train.", "ViT-B-32-quickgelu, digits: glyph-clip"),
    "pretrained": _panel(SETTING, "As in train.", "openai"),
}
_OPTIONS = (*_PARTS, *_SETTINGS, "rounds", "protocol", "precision", "data_dir", "download")


class _Tables(TyperGroup):
    """Lists the tables when a name is unknown."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] not in self.commands:
            find_table(args[0])
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=_Tables,
    help="A table of FEDDLP's paper: runs what is missing of it, and shows our results beside the published ones.",
)


def _option(name: str, panel: str, text: str, default: str | bool = True, metavar: str | None = None) -> Any:
    return typer.Option(name, help=text, show_default=default, rich_help_panel=panel, metavar=metavar)


def _reproduce(
    given: dict[str, Any],
    ctx: typer.Context,
    target: Annotated[
        float | None,
        _option("--target", TABLE, "Accuracy to reach, a fraction (table5, table6).", "the paper's, digits: 0.95"),
    ] = None,
    lr: Annotated[
        list[str] | None,
        _option("--lr", SETTING, "A method's learning rate. Repeatable.", "as train's", metavar="METHOD=VALUE"),
    ] = None,
    partition_seeds: Annotated[
        str,
        _option(
            "--partition-seeds",
            SETTING,
            "fixed: partition seed 0 for all seeds; seed: equal to the training seed. The paper does not state it.",
        ),
    ] = "fixed",
    runs: Annotated[Path, _option("--runs", RUNS, "Folder of the run folders, which tables share.")] = Path(
        "runs/reproduce"
    ),
    jobs: Annotated[int, _option("--jobs", RUNS, "Concurrent runs, which share the threads.")] = 1,
    device: Annotated[
        str | None,
        _option("--device", RUNS, "auto, cpu, cuda, or several for the jobs: cuda:0,cuda:1.", "auto"),
    ] = None,
    no_run: Annotated[bool, _option("--no-run", RUNS, "Only compare the finished runs.")] = False,
    partial: Annotated[bool, _option("--partial", RUNS, "With --no-run: show – for missing runs.")] = False,
    out: Annotated[
        Path | None, _option("--out", RUNS, "Folder of TABLE.md, TABLE.csv and TABLE.png.", "reproduce/TABLE")
    ] = None,
) -> None:
    """Run what is missing of the table, and show our results beside the published ones.

    Without options in the paper's setting, 100 rounds of ViT-B/32 for every entry and seed: hours on a GPU. --dataset
    digits is a smoke run with the embedded model. After Ctrl-C, the same command resumes.
    """
    from fastdlp.report.paper.plan import make_plan

    name = str(ctx.info_name)
    plan = make_plan(name, runs, partition_seeds=partition_seeds, target=target, lr=lr or (), **given)
    if jobs < 1:
        raise FastdlpError(f"--jobs is {jobs}: it must be at least 1")
    if partial and not no_run:
        raise FastdlpError("--partial needs --no-run: add it, or leave out --partial to run everything")
    devices = device.split(",") if device else []
    for one in devices:
        TrainConfig(device=one).check()
    folder = out or Path("reproduce") / name
    if folder.exists() and not folder.is_dir():
        raise FastdlpError(f"--out {folder} is not a folder: name another")
    missing = _run_missing(plan, jobs, devices, no_run, partial)
    _show(plan, folder, missing)


for _name, _table in TABLES.items():
    _betas = " and ".join(f"{beta:g}" for beta in _table.betas)
    _command = config_options(_OPTIONS, several=_PARTS, changed=_PARTS | _SETTINGS)(_reproduce)
    app.command(_name, short_help=f"{_table.title}, β {_betas}")(_command)


@app.command()
def ledger(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run.")],
    target: Annotated[float | None, typer.Option("--target", help="Up to this accuracy, a fraction.")] = None,
) -> None:
    """What one client of a run exchanged: up to the target if one is given, else in all rounds."""
    from fastdlp.cli import console
    from fastdlp.report.paper.compare import message_sizes
    from fastdlp.report.paper.plan import check_target
    from fastdlp.report.read import read_finished

    check_target(target)
    record = read_finished(run)
    rounds = record.rounds if target is None else record.rounds_to(target)
    goal = "" if target is None else f"{target:g}"
    if rounds is None:
        number, best = record.best
        console.print_plain(f"{run} does not reach {goal}: its best round is {number} with {best:.4f}")
        return
    mb, size = message_sizes(record, rounds)
    reached = f" to an accuracy of {goal}" if goal else ""
    console.print_plain(
        f"{rounds} round{'s' * (rounds > 1)}{reached}, {record.uploaded:,} parameters per direction: {mb:.2f} MB as "
        f"the paper counts, {size:,} bytes of messages, of one client, up and down"
    )


def _run_missing(plan: Plan, jobs: int, devices: Sequence[str], no_run: bool, partial: bool) -> list[TrainConfig]:
    """Run what is missing, unless `no_run`; returns what is still missing, which only --partial allows.

    stderr shows a progress bar of runs and has a line for each finished one.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn

    from fastdlp.cli import console
    from fastdlp.report.paper.run import Interrupted, PlanCallbacks, complete, missing

    configs = plan.configs()
    absent = missing(configs)
    if no_run and absent and not partial:
        raise FastdlpError(
            f"{len(absent)} missing runs of {len(configs)}, the first is {absent[0].out}: leave out --no-run to run "
            "them, or add --partial to see the others"
        )
    if no_run or not absent:
        return absent
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with console.run_callbacks(quiet=True) as callbacks, console.progress(*columns) as progress:
        bar = progress.add_task("preparing", total=len(configs), completed=len(configs) - len(absent))

        def status(name: str, text: str) -> None:
            progress.update(bar, description=f"{name}: {text}")

        def finished(name: str) -> None:
            progress.advance(bar)
            console.print_plain(f"{round(progress.tasks[0].completed)}/{len(configs)} {name}", console=console.err)

        try:
            complete(absent, jobs, devices, PlanCallbacks(status, finished, callbacks.should_stop))
        except Interrupted:
            done = len(configs) - len(missing(configs))
            text = f"stopped with {done} of {len(configs)} runs finished; the same command resumes"
            console.print_plain(text, "yellow", console.err)
            raise typer.Exit(130) from None
    return []


def _show(plan: Plan, folder: Path, missing: Sequence[TrainConfig]) -> None:
    """Write the comparison to a folder and print it."""
    from fastdlp.cli import console
    from fastdlp.report.paper.write import notes, rich_table, sections, write_comparison

    rows = write_comparison(plan, folder, missing)
    for heading, part in sections(plan, rows):
        table = rich_table(plan, f"{plan.name} · {plan.table.title} · {heading}", part, missing)
        console.out.print(table, width=max(console.out.width, _WIDTH), crop=False)
    for note in notes(plan, missing):
        console.out.print(note, highlight=False, markup=False)
    console.print_plain(f"written: {folder}/{plan.name}.md, .csv, .png")
