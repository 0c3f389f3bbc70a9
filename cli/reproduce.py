"""`fastdlp reproduce`: the paper's tables, ours beside the published ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastdlp.config import TrainConfig
from fastdlp.errors import FastdlpError

if TYPE_CHECKING:
    from fastdlp.report.paper.plan import Plan
    from fastdlp.report.paper.run import Watch

_WIDTH = 100  # columns of a comparison; a narrower terminal wraps it
WHAT, SETTING, RUNNING = "What of the table", "Setting", "Runs"


def reproduce(
    table: Annotated[str, typer.Argument(help="table1 … table8, figure2, or the word ledger.", show_default=False)],
    run: Annotated[
        Path | None, typer.Argument(help="After ledger: the folder of a finished run.", show_default=False)
    ] = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option(
            "--dataset",
            help="pets, flowers, aircraft, dtd; or digits: a rehearsal with the embedded model. May be given again.",
            show_default="the four",
            rich_help_panel=WHAT,
        ),
    ] = None,
    encoder: Annotated[
        list[str] | None,
        typer.Option(
            "--encoder", help="image or text. May be given again.", show_default="the table's", rich_help_panel=WHAT
        ),
    ] = None,
    beta: Annotated[
        list[float] | None,
        typer.Option("--beta", help="May be given again.", show_default="the table's", rich_help_panel=WHAT),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option("--method", help="May be given again.", show_default="the table's", rich_help_panel=WHAT),
    ] = None,
    seed: Annotated[
        list[int] | None,
        typer.Option("--seed", help="Of training. May be given again.", show_default="0, 1, 42", rich_help_panel=WHAT),
    ] = None,
    target: Annotated[
        float | None,
        typer.Option(
            "--target",
            help="Accuracy to reach, a fraction (table5, table6, ledger).",
            show_default="the paper's, digits: 0.95",
            rich_help_panel=WHAT,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="As in train.",
            show_default="ViT-B-32-quickgelu, digits: glyph-clip",
            rich_help_panel=SETTING,
        ),
    ] = None,
    pretrained: Annotated[
        str | None,
        typer.Option("--pretrained", help="As in train.", show_default="openai", rich_help_panel=SETTING),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option("--rounds", help="As in train.", show_default="100, digits: 20", rich_help_panel=SETTING),
    ] = None,
    lr: Annotated[
        list[str] | None,
        typer.Option(
            "--lr",
            metavar="METHOD=VALUE",
            help="A method's learning rate. May be given again.",
            show_default="as train's",
            rich_help_panel=SETTING,
        ),
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option("--protocol", help="paper or reference.", show_default="paper", rich_help_panel=SETTING),
    ] = None,
    precision: Annotated[
        str | None, typer.Option("--precision", help="fp32 or bf16.", show_default="fp32", rich_help_panel=SETTING)
    ] = None,
    partition_seeds: Annotated[
        str,
        typer.Option(
            "--partition-seeds",
            help="fixed: partition seed 0 for all seeds; seed: each seed's own. The paper does not say.",
            rich_help_panel=SETTING,
        ),
    ] = "fixed",
    data_dir: Annotated[
        str | None,
        typer.Option("--data-dir", help="Where the data sets lie, or are downloaded to.", rich_help_panel=RUNNING),
    ] = None,
    download: Annotated[
        bool, typer.Option("--download", help="Fetch what is not in --data-dir.", rich_help_panel=RUNNING)
    ] = False,
    runs: Annotated[
        Path, typer.Option("--runs", help="Folder of the run folders; tables share runs.", rich_help_panel=RUNNING)
    ] = Path("runs/reproduce"),
    jobs: Annotated[
        int, typer.Option("--jobs", help="Runs at once, which share the threads.", rich_help_panel=RUNNING)
    ] = 1,
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            help="auto, cpu, cuda, or several, cuda:0,cuda:1, for the jobs in turn.",
            show_default="auto",
            rich_help_panel=RUNNING,
        ),
    ] = None,
    no_run: Annotated[
        bool, typer.Option("--no-run", help="Run nothing, compare what is there.", rich_help_panel=RUNNING)
    ] = False,
    partial: Annotated[
        bool, typer.Option("--partial", help="With --no-run: show – for what is missing.", rich_help_panel=RUNNING)
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Folder of TABLE.md, TABLE.csv and TABLE.png.",
            show_default="reproduce/TABLE",
            rich_help_panel=RUNNING,
        ),
    ] = None,
) -> None:
    """A table of FEDDLP's paper: runs what is missing of it, and shows our figures beside the published ones.

    Without options in the paper's setting, 100 rounds of ViT-B/32 for every entry and seed: hours on a GPU. The
    rehearsal is --dataset digits. Ctrl-C stops; the same command goes on. `ledger RUN` shows what one run exchanged.
    """
    from fastdlp.report.paper.plan import make_plan

    if table == "ledger":
        return _ledger(run, target)
    if run is not None:
        raise FastdlpError(f"{table} takes no run {run}: only ledger does; the folder of all runs is --runs")
    plan = make_plan(
        table,
        runs,
        dataset,
        encoder,
        beta,
        method,
        seed,
        partition_seeds,
        target,
        lr,
        model=model,
        pretrained=pretrained,
        rounds=rounds,
        protocol=protocol,
        precision=precision,
        data_dir=data_dir,
        download=download or None,
    )
    if jobs < 1:
        raise FastdlpError(f"--jobs is {jobs}: it must be at least 1")
    if partial and not no_run:
        raise FastdlpError("--partial goes with --no-run: add it, or leave --partial out and everything is run")
    devices = device.split(",") if device else []
    for name in devices:
        TrainConfig(device=name).check()
    folder = out or Path("reproduce") / table
    if folder.exists() and not folder.is_dir():
        raise FastdlpError(f"--out {folder} is not a folder: name another")
    _show(plan, folder, _complete(plan, jobs, devices, no_run, partial))


def _complete(plan: Plan, jobs: int, devices: Sequence[str], no_run: bool, partial: bool) -> list[TrainConfig]:
    """Run what is missing; returns what is missing still, which only --partial lets pass."""
    from fastdlp.cli import console
    from fastdlp.report.paper.run import Interrupted, complete, missing

    configs = plan.configs()
    absent = missing(configs)
    if no_run and absent and not partial:
        raise FastdlpError(
            f"{len(absent)} missing runs of {len(configs)}, the first is {absent[0].out}: leave out --no-run to run "
            "them, or add --partial to see the rest"
        )
    if no_run or not absent:
        return absent
    with console.watching(quiet=True) as callbacks, _counting(len(configs), len(configs) - len(absent)) as watch:
        watch.should_stop = callbacks.should_stop
        try:
            complete(absent, jobs, devices, watch)
        except Interrupted:
            left = len(missing(configs))
            console.err.print(
                f"stopped with {len(configs) - left} of {len(configs)} runs finished; the same command goes on",
                style="yellow",
                highlight=False,
            )
            raise typer.Exit(130) from None
    return []


@contextmanager
def _counting(total: int, finished: int) -> Iterator[Watch]:
    """A watch that shows a bar of runs on stderr, and writes a line for each that has ended."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from fastdlp.cli import console
    from fastdlp.report.paper.run import Watch

    shown = TextColumn("{task.description}", markup=False)
    columns = (shown, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console.err, transient=True, disable=not console.err.is_terminal) as progress:
        bar = progress.add_task("preparing", total=total, completed=finished)

        def say(name: str, text: str) -> None:
            progress.update(bar, description=f"{name}: {text}")

        def ended(name: str) -> None:
            nonlocal finished
            finished += 1
            progress.update(bar, completed=finished)
            console.err.print(f"{finished}/{total} {name}", highlight=False, markup=False, soft_wrap=True)

        def finished_round(name: str, line: dict[str, Any]) -> None:
            say(name, f"round {line['round']}, accuracy {line['accuracy']:.3f}")

        yield Watch(lambda name: say(name, "begun"), say, finished_round, ended)


def _show(plan: Plan, folder: Path, missing: Sequence[TrainConfig]) -> None:
    """Print the comparison and write it to a folder."""
    from fastdlp.cli import console
    from fastdlp.files import write_atomic
    from fastdlp.report.paper.compare import compare, curve_rows, read_runs
    from fastdlp.report.paper.plot import draw_bars, draw_curves
    from fastdlp.report.paper.write import csv_text, markdown, notes, rich_table, sections

    found = read_runs(plan, [config.out for config in missing])
    rows = compare(plan, found)
    picture = f"{plan.name}.png"
    write_atomic(folder / f"{plan.name}.md", markdown(plan, rows, missing, picture))
    if plan.table.kind == "curve":
        curve = curve_rows(plan, found)
        write_atomic(folder / f"{plan.name}.csv", csv_text(curve))
        draw_curves(folder / picture, plan, curve)
    else:
        write_atomic(folder / f"{plan.name}.csv", csv_text(rows))
        draw_bars(folder / picture, plan, rows)
    for heading, part in sections(plan, rows):
        shown = rich_table(plan, f"{plan.name} · {plan.table.title} · {heading}", part, missing)
        console.out.print(shown, width=max(console.out.width, _WIDTH), crop=False)
    for note in notes(plan, missing):
        console.out.print(note, highlight=False, markup=False)
    console.out.print(f"written: {folder}/{plan.name}.md, .csv, .png", highlight=False, markup=False, soft_wrap=True)


def _ledger(run: Path | None, target: float | None) -> None:
    """Print what a client of one run exchanged: up to the target where one is given, else in all rounds."""
    from fastdlp.cli import console
    from fastdlp.report.paper.ledger import read_ledger

    if run is None:
        raise FastdlpError("ledger needs a run: name the folder of a finished one")
    if target is not None and not 0 < target <= 1:
        raise FastdlpError(f"--target is {target:g}: give a fraction above 0 and up to 1, such as 0.88")
    ledger = read_ledger(run)
    rounds = len(ledger.lines) if target is None else ledger.rounds_to(target)
    if rounds is None:
        best = ledger.at("best")
        text = f"{run} does not reach {target:g}: its best round is {best['round']} with {best['accuracy']:.4f}"
    else:
        reached = "" if target is None else f" to an accuracy of {target:g}"
        text = (
            f"{rounds} round{'s' * (rounds > 1)}{reached}, {ledger.parameters:,} parameters a direction: "
            f"{ledger.paper_mb(rounds):.2f} MB as the paper counts, {ledger.true_bytes(rounds):,} bytes of messages, "
            "of one client, up and down"
        )
    console.out.print(text, highlight=False, markup=False, soft_wrap=True)
