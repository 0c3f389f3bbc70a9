"""Tables of what was measured."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastdlp.bench.tune import describe


def print_step(result: dict[str, Any], console: Console) -> None:
    """The table of `bench_step`, medians with their 20 and 80 % quantiles, and what it was measured on."""
    table = Table(title=result["what"], title_justify="left", title_style="bold")
    for column in (
        "form",
        "dtype",
        "passes",
        "ms a step",
        f"× {result['baseline']}",
        f"× {result['baseline']} {result['rows'][0]['precision']}",
        "loss error",
    ):
        table.add_column(column, justify="left" if column in ("form", "dtype") else "right")
    for row in result["rows"]:
        table.add_row(
            row["form"],
            row["precision"],
            f"{row['forwards']} f + {row['backwards']} b",
            f"{row['ms_50']:,.0f} ({row['ms_20']:,.0f}–{row['ms_80']:,.0f})",
            f"{row['times_baseline']:.2f}",
            f"{row['times_first']:.2f}",
            f"{row['worst_loss_error']:.0e}",
        )
    console.print(table)
    console.print(_where(result), highlight=False)


def print_kernels(result: dict[str, Any], console: Console) -> None:
    """The tables of `bench_kernels`, one for each model and number of clients: medians and their ratios to frozen."""
    for (model, clients), rows in groupby(result["rows"], key=lambda row: (row["model"], row["clients"])):
        title = f"{model}, {clients} client{'s' * (clients > 1)}: {result['what']}"
        table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE, pad_edge=False)
        for column in ("linear", "form"):
            table.add_column(column, no_wrap=True)
        for column in ("forward ms", "×", "backward ms", "×", "both ms", "×", "TFLOP/s", "error"):
            table.add_column(column, justify="right", no_wrap=True)
        for (linear, form), passes in groupby(rows, key=lambda row: (row["linear"], row["form"])):
            by_pass = {row["which"]: row for row in passes}
            first = by_pass["forward"]
            if form == "frozen":
                table.add_section()
                linear = f"{linear} {first['rows']}×{first['width']}→{first['out']}"
            cells = []
            for which in ("forward", "backward", "both"):
                row = by_pass.get(which)
                cells += ["-", "-"] if row is None else [f"{row['ms_50']:.3f}", f"{row['times_frozen']:.2f}"]
            error = "computed" if first["error"] is None else f"{first['error']:.0e}"
            flops = f"{by_pass.get('both', first)['tflops']:.3g}"
            table.add_row(linear if form == "frozen" else "", form, *cells, flops, error)
        console.print(table)
    for note in result["notes"]:
        console.print(escape(note), style="yellow", highlight=False)
    console.print(
        f"measured peak {result['peak_tflops']:.3g} TFLOP/s, copy {result['copy_gbytes_per_s']:.3g} GB/s; ×: times the "
        "frozen product's; TFLOP/s: of both passes, of forward where there is no backward",
        highlight=False,
    )
    console.print(_where(result), highlight=False)


def print_tune(result: dict[str, Any], console: Console) -> None:
    """The rows that `tune` chose, and what it left out."""
    table = Table(title="new rows of the tile table", title_justify="left", title_style="bold", box=SIMPLE)
    for column in ("kernel", "bytes", "rows to", "N", "K", "tile"):
        table.add_column(column, justify="left" if column in ("kernel", "tile") else "right", no_wrap=True)
    for row in result["rows"]:
        limits = [str(row.get(name, "")) for name in ("rows_to", "out", "width")]
        table.add_row(row["kernel"], str(row["itemsize"][0]), *limits, describe(row))
    console.print(table)
    for note in result["notes"]:
        console.print(escape(note), style="yellow", highlight=False)


def _where(result: dict[str, Any]) -> str:
    """Device, versions and commit in a line."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return f"{result['device']}, {result['threads']} threads; {versions}; commit {result['commit']}"
