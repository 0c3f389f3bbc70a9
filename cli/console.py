"""Terminal output: progress on stderr during a run, tables on stdout at its end."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from fastdlp.processes import leads
from fastdlp.report.text import number

if TYPE_CHECKING:
    from fastdlp.run.setup import Callbacks, Federation

out = Console()
err = Console(stderr=True)


def print_plain(text: str, style: str | None = None, console: Console = out) -> None:
    """Print text as it is: without markup, highlighting or line breaks of the terminal's width."""
    console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def status(text: str) -> Iterator[Callable[[str], None]]:
    """A status line on stderr; where stderr is no terminal, one line per status with the seconds since the start."""
    if err.is_terminal:
        with err.status(text) as line:
            yield line.update
        return
    start = time.monotonic()
    yield lambda text: print(f"{time.monotonic() - start:7.1f} s  {text}", file=sys.stderr, flush=True)


def progress(*columns: ProgressColumn) -> Progress:
    """Progress bars on stderr, which are removed at the end; none where stderr is no terminal."""
    return Progress(*columns, console=err, transient=True, disable=not err.is_terminal)


@contextmanager
def run_callbacks(quiet: bool) -> Iterator[Callbacks]:
    """Callbacks that show progress and turn the first Ctrl-C into a stop after the running round.

    Of torchrun's processes rank 0 shows progress; torchrun sends Ctrl-C to all of them.

    Raises:
        typer.Exit: the run was stopped. 130; 0 on the other ranks, since torchrun kills rank 0, which may still be
            writing, when another one fails.
    """
    from fastdlp.run.loop import Stopped
    from fastdlp.run.setup import Callbacks

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    try:
        with _first_interrupt() as interrupted:
            callbacks = Callbacks(should_stop=lambda: bool(interrupted))
            if quiet or not leads():
                yield callbacks
                return
            with progress(*columns) as bars:
                _show_progress(callbacks, bars)
                yield callbacks
    except Stopped as stopped:
        if leads():
            print_plain(str(stopped), "yellow", err)
        raise typer.Exit(130 if leads() else 0) from None


def _show_progress(callbacks: Callbacks, progress: Progress) -> None:
    """Let callbacks report a run in a progress bar, with a line on stdout at its start."""
    bar = progress.add_task("preparing", total=None)

    def started(run: Path, federation: Federation, zero_shot: float, finished: int) -> None:
        config = federation.config
        out.print(
            f"[bold]{config.method}[/] on {escape(federation.pixels.name)}, {config.encoder} encoder of "
            f"{escape(config.model)}, {federation.partition.clients} clients → {escape(str(run))}",
            highlight=False,
            soft_wrap=True,
        )
        for notice in notices(federation):
            print_plain(notice, "yellow")
        progress.reset(bar, total=config.rounds, completed=finished, description=f"zero-shot {zero_shot:.3f}")

    def finished_round(line: dict[str, Any]) -> None:
        text = f"accuracy {line['accuracy']:.3f}, lowest client {line['clients_lowest']:.3f}"
        if callbacks.should_stop():
            text = "stopping after this round"
        progress.update(bar, completed=line["round"], description=text)

    callbacks.preparing = lambda text: progress.update(bar, description=f"preparing: {escape(text)}")
    callbacks.notice = lambda text: print_plain(text, "yellow", err)
    callbacks.started, callbacks.finished_round = started, finished_round


def notices(federation: Federation) -> list[str]:
    """What a user must know before the run: empty clients, skipped images, memory of full fine-tuning."""
    found = []
    if empty := federation.partition.empty:
        found.append(f"clients without a training sample, left out of training: {', '.join(map(str, empty))}")
    if bad := federation.pixels.bad:
        shown = "; ".join(bad[:5]) + (f"; and {len(bad) - 5} more" if len(bad) > 5 else "")
        found.append(f"{len(bad)} images cannot be read and were skipped: {shown}")
    if federation.weight_bytes:
        count = federation.engine.bank.parameters(federation.engine.bank.trained[0])
        found.append(
            f"full fine-tuning of {count:,} parameters: one copy for all clients, which train one after another; "
            f"weights, moments and gradients take about {federation.weight_bytes / 1e9:.2f} GB beside the activations"
        )
    return found


def print_summary(summary: dict[str, Any], run: str | Path) -> None:
    """The table of clients and the run's metrics."""
    rounds = f"{summary['rounds']} round" + "s" * (summary["rounds"] != 1)
    title = f"{summary['method']} · {summary['dataset']} · {summary['encoder']} encoder · {rounds}"
    out.print(client_table(summary["per_client"], title))
    mark = {summary["accuracy_is"]: "   ← --report"}
    last, best, chosen = (
        "no validation samples: --val-fraction"
        if summary[f"accuracy_{key}"] is None
        else f"{summary[f'accuracy_{key}']:.4f}   ({note}){mark.get(report, '')}"
        for key, note, report in (
            ("last", f"zero-shot {summary['zero_shot']:.4f}", "last"),
            ("best_test", f"round {summary['round_best_test']}", "best"),
            ("chosen", f"round {summary['round_chosen']}", "validation"),
        )
    )
    gates = summary["gates_zero_share"]
    metrics = {
        "accuracy, last round": last,
        "best round on test": best,
        "chosen on validation": chosen,
        f"clients, round {summary['round_reported']}": f"mean {summary['accuracy_mean_clients']:.4f}, "
        f"std {summary['clients_std']:.4f}, lowest {summary['clients_lowest']:.4f}",
        "exchanged": f"{summary['uploaded_parameters']:,} parameters, {summary['uploaded_bytes_per_client_round']:,} "
        "bytes each way per client and round",
        "gates at zero": "no gates" if gates is None else f"{gates:.1%}",
        "time": f"{summary['seconds_total']:.1f} s, {summary['seconds_preparation']:.1f} s of it preparation",
    }
    table = Table.grid(padding=(0, 2))
    for name, value in metrics.items():
        table.add_row(f"[bold]{name}[/]", escape(value))
    out.print(table, highlight=False)
    out.print(f"[bold]run folder[/]            {escape(str(run))}", highlight=False, soft_wrap=True)


def print_sweep(summary: dict[str, Any], path: str | Path) -> None:
    """The table of settings, with means over seeds, and the setting that validation picks."""
    config, picked = summary["config"], summary["picked_on_validation"]
    seeds = ", ".join(str(seed) for seed in summary["settings"][0]["seeds"])
    title = f"{config['method']} · {config['dataset']} · {config['encoder']} encoder · means over seeds {seeds}"
    columns = ("lr", "α", "last round", "best on test", "chosen on validation", "validation", "lowest client")
    table = _table(title, columns)
    metrics = ("accuracy_last", "accuracy_best_test", "accuracy_chosen", "accuracy_val_chosen", "clients_lowest")
    for setting in summary["settings"]:
        cells = [number(setting[name], ".4f") for name in metrics]
        style = "bold" if picked is not None and setting == picked else None
        table.add_row(f"{setting['lr']:g}", f"{setting['alpha']:g}", *cells, style=style)
    out.print(table)
    for row in summary["members"]:
        if row["failed"]:
            print_plain(f"{row['name']}: {row['failed']}", "yellow")
    if picked is None:
        print_plain("no setting is picked: without --val-fraction only test accuracies are known")
    else:
        print_plain(f"picked on validation: lr {picked['lr']:g}, α {picked['alpha']:g}")
    out.print(f"[bold]sweep[/]  {escape(str(path))}, {summary['seconds_total']:.1f} s", highlight=False, soft_wrap=True)


def client_table(clients: list[dict[str, Any]], title: str) -> Table:
    """A row per client, the lowest accuracy in red."""
    table = _table(title, ("client", "train", "test", "correct", "accuracy"))
    lowest = min((c["accuracy"] for c in clients if c["accuracy"] is not None), default=None)
    for c in clients:
        style = "red" if c["accuracy"] is not None and c["accuracy"] == lowest else None
        counts = [str(c[name]) for name in ("client", "n_train", "n_test", "correct")]
        table.add_row(*counts, number(c["accuracy"], ".3f"), style=style)
    return table


def _table(title: str, columns: Iterable[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column, justify="right")
    return table


@contextmanager
def _first_interrupt() -> Iterator[list[int]]:
    """Collect the first Ctrl-C in the yielded list; the second raises KeyboardInterrupt as usual."""
    seen: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)
        if leads():
            err.print("stopping after this round; press Ctrl-C again to stop at once", style="yellow")

    before = signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)
