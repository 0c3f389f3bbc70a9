"""What a person sees: progress on stderr while a run goes on, tables on stdout when it ends."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from fastdlp.processes import leads

if TYPE_CHECKING:
    from fastdlp.run.loop import Callbacks, Stopped
    from fastdlp.run.setup import Federation

out = Console()
err = Console(stderr=True)


@contextmanager
def telling(text: str) -> Iterator[Callable[[str], None]]:
    """A line on stderr that says what goes on; in a log a line for each, with the seconds, for who is killed there."""
    if err.is_terminal:
        with err.status(text) as status:
            yield status.update
        return
    start = time.monotonic()
    yield lambda text: print(f"{time.monotonic() - start:7.1f} s  {text}", file=sys.stderr, flush=True)


@contextmanager
def watching(quiet: bool) -> Iterator[Callbacks]:
    """A callbacks that shows progress and turns the first Ctrl-C into a stop after the running round.

    Of torchrun's processes the first shows progress; torchrun hands Ctrl-C to all of them.
    """
    from fastdlp.run.loop import Callbacks

    callbacks = Callbacks()
    with _first_interrupt() as interrupted:
        callbacks.should_stop = lambda: bool(interrupted)
        if quiet or not leads():
            yield callbacks
            return
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
            bar = progress.add_task("preparing", total=None)

            def preparing(text: str) -> None:
                progress.update(bar, description=f"preparing: {escape(text)}")

            def started(run: Path, federation: Federation, zero_shot: float, finished: int) -> None:
                config = federation.config
                out.print(
                    f"[bold]{config.method}[/] on {escape(federation.pixels.name)}, {config.encoder} encoder of "
                    f"{escape(config.model)}, {federation.partition.clients} clients → {escape(str(run))}",
                    highlight=False,
                    soft_wrap=True,
                )
                for notice in notices(federation):
                    out.print(f"[yellow]{escape(notice)}[/]", highlight=False, soft_wrap=True)
                progress.reset(bar, total=config.rounds, completed=finished, description=f"zero-shot {zero_shot:.3f}")

            def finished_round(line: dict[str, Any]) -> None:
                text = f"accuracy {line['accuracy']:.3f}, lowest client {line['clients_lowest']:.3f}"
                if interrupted:
                    text = "stopping after this round"
                progress.update(bar, completed=line["round"], description=text)

            def notice(text: str) -> None:
                err.print(text, style="yellow", highlight=False, markup=False, soft_wrap=True)

            callbacks.preparing, callbacks.started, callbacks.finished_round = preparing, started, finished_round
            callbacks.notice = notice
            yield callbacks


def print_stop(stopped: Stopped) -> None:
    """Where a run was stopped, and how to go on."""
    err.print(str(stopped), style="yellow", highlight=False, markup=False, soft_wrap=True)


def notices(federation: Federation) -> list[str]:
    """What a user must know before the run: empty clients, dropped images."""
    found = []
    if empty := federation.partition.empty:
        found.append(f"clients without a training sample, taking no part in training: {', '.join(map(str, empty))}")
    if bad := federation.pixels.bad:
        shown = "; ".join(bad[:5]) + (f"; and {len(bad) - 5} more" if len(bad) > 5 else "")
        found.append(f"{len(bad)} images cannot be read and were skipped: {shown}")
    if federation.weight_bytes:
        count = federation.engine.bank.parameters(federation.engine.bank.trained[0])
        found.append(
            f"full fine-tuning of {count:,} parameters: one copy for all clients, who take turns; weights, moments and "
            f"gradients take about {federation.weight_bytes / 1e9:.2f} GB beside the activations"
        )
    return found


def print_summary(summary: dict[str, Any], run: str | Path) -> None:
    """The clients' table and the run's figures."""
    rounds = f"{summary['rounds']} round" + "s" * (summary["rounds"] != 1)
    title = f"{summary['method']} · {summary['dataset']} · {summary['encoder']} encoder · {rounds}"
    out.print(client_table(summary["per_client"], title))
    figures = Table.grid(padding=(0, 2))
    mark = {summary["accuracy_is"]: "   ← --report"}
    gates = summary["gates_zero_share"]
    chosen = "no validation samples: --val-fraction"
    if summary["accuracy_chosen"] is not None:
        chosen = f"{summary['accuracy_chosen']:.4f}   (round {summary['round_chosen']}){mark.get('validation', '')}"
    for name, value in (
        (
            "accuracy, last round",
            f"{summary['accuracy_last']:.4f}   (zero-shot {summary['zero_shot']:.4f}){mark.get('last', '')}",
        ),
        (
            "best round on test",
            f"{summary['accuracy_best_test']:.4f}   (round {summary['round_best_test']}){mark.get('best', '')}",
        ),
        ("chosen on validation", chosen),
        (
            f"clients, round {summary['round_reported']}",
            f"mean {summary['accuracy_mean_clients']:.4f}, std {summary['clients_std']:.4f}, "
            f"lowest {summary['clients_lowest']:.4f}",
        ),
        (
            "exchanged",
            f"{summary['uploaded_parameters']:,} parameters, {summary['uploaded_bytes_per_client_round']:,} "
            "bytes each way per client and round",
        ),
        ("gates at zero", "no gates" if gates is None else f"{gates:.1%}"),
        ("time", f"{summary['seconds_total']:.1f} s, {summary['seconds_preparation']:.1f} s of it preparation"),
    ):
        figures.add_row(f"[bold]{name}[/]", escape(value))
    out.print(figures, highlight=False)
    out.print(f"[bold]run folder[/]            {escape(str(run))}", highlight=False, soft_wrap=True)


def print_sweep(summary: dict[str, Any], path: str | Path) -> None:
    """The settings' table: means over seeds, and which setting validation picks."""
    config, picked = summary["config"], summary["picked_on_validation"]
    seeds = ", ".join(str(seed) for seed in summary["settings"][0]["seeds"])
    table = Table(
        title=f"{config['method']} · {config['dataset']} · {config['encoder']} encoder · means over seeds {seeds}",
        title_justify="left",
        title_style="bold",
    )
    for column in ("lr", "α", "last round", "best on test", "chosen on validation", "validation", "lowest client"):
        table.add_column(column, justify="right")
    figures = ("accuracy_last", "accuracy_best_test", "accuracy_chosen", "accuracy_val_chosen", "clients_lowest")
    for setting in summary["settings"]:
        cells = ["–" if setting[name] is None else f"{setting[name]:.4f}" for name in figures]
        style = "bold" if picked is not None and setting == picked else None
        table.add_row(f"{setting['lr']:g}", f"{setting['alpha']:g}", *cells, style=style)
    out.print(table)
    for row in summary["members"]:
        if row["failed"]:
            out.print(f"[yellow]{escape(row['name'])}: {escape(row['failed'])}[/]", highlight=False, soft_wrap=True)
    if picked is None:
        out.print("nothing is picked: without --val-fraction only test accuracies are known", highlight=False)
    else:
        out.print(f"picked on validation: lr {picked['lr']:g}, α {picked['alpha']:g}", highlight=False)
    out.print(f"[bold]sweep[/]  {escape(str(path))}, {summary['seconds_total']:.1f} s", highlight=False, soft_wrap=True)


def client_table(clients: list[dict[str, Any]], title: str) -> Table:
    """A row per client, the lowest marked."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in ("client", "train", "test", "correct", "accuracy"):
        table.add_column(column, justify="right")
    lowest = min((c["accuracy"] for c in clients if c["accuracy"] is not None), default=None)
    for c in clients:
        accuracy = "–" if c["accuracy"] is None else f"{c['accuracy']:.3f}"
        style = "red" if c["accuracy"] is not None and c["accuracy"] == lowest else None
        table.add_row(str(c["client"]), str(c["n_train"]), str(c["n_test"]), str(c["correct"]), accuracy, style=style)
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
