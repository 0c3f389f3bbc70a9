"""Tables of what was measured."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import groupby
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastdlp.bench.tune import describe

WIDE = 140  # columns of a terminal that shows all of a round's table
WIDE_ONLY = ("passes", "20–80 %", "images\na second", "kernels", "loss\nerror", "steps")


def _round_cells(baselines: list[str], wide: bool, memory: bool) -> dict[str, Callable[[dict[str, Any]], str]]:
    """What a row shows by column."""
    cells: dict[str, Callable[[dict[str, Any]], str]] = {
        "form": lambda row: row["form"],
        "dtype": lambda row: row["precision"],
        "passes": lambda row: f"{row['forwards']}f {row['backwards']}b",
        "ms a\nstep": lambda row: f"{row['ms_50']:,.0f}",
        "20–80 %": lambda row: f"{row['ms_20']:,.0f}–{row['ms_80']:,.0f}",
        "images\na second": lambda row: f"{row['images_per_s']:,.4g}",
    }
    for label in baselines:
        cells["×\n" + "\n".join(label.split())] = partial(_times, label)
    cells |= {
        "peak\nGB": lambda row: f"{row['peak_bytes'] / 1e9:.2f}",
        "kernels": lambda row: "-" if row["kernels"] is None else f"{row['kernels']:,}",
        "of\npeak": lambda row: f"{row['peak_share']:.0%}",
        "÷ frozen": lambda row: "-" if row["times_products"] is None else f"{row['times_products']:.2f}",
        "loss\nerror": _error,
        "steps": lambda row: f"1–{len(row['compared_steps'])}" if row["compared_steps"] else "-",
    }
    if not memory:
        del cells["peak\nGB"]
    return cells if wide else {name: cell for name, cell in cells.items() if name not in WIDE_ONLY}


def _times(label: str, row: dict[str, Any]) -> str:
    return f"{row['times'][label]:.2f}" if label in row["times"] else "-"


def _error(row: dict[str, Any]) -> str:
    errors = [max(by_step) for by_step in row["loss_errors"].values()]
    return f"{max(errors):.0e}" if errors else "-"


def print_round(result: dict[str, Any], console: Console) -> None:
    """The tables of `bench_round`, one for each group of forms, medians with their 20 and 80 % quantiles."""
    console.print(result["what"], style="bold", highlight=False)
    wide = console.width >= WIDE
    for group, members in groupby(sorted(result["rows"], key=lambda row: row["group"]), key=lambda row: row["group"]):
        rows = list(members)
        baselines = list(dict.fromkeys(label for row in rows for label in row["times"]))
        cells = _round_cells(baselines, wide, memory=any(row["peak_bytes"] is not None for row in rows))
        table = Table(title=group, title_justify="left", title_style="bold", box=SIMPLE, pad_edge=False)
        table.collapse_padding = True
        for column in cells:
            table.add_column(column, justify="left" if column in ("form", "dtype") else "right", no_wrap=True)
        for row in rows:
            table.add_row(*(cell(row) for cell in cells.values()))
        console.print(table)
    if not wide:
        console.print("a terminal of 140 columns shows quantiles, kernels and compared steps too", highlight=False)
    peaks = ", ".join(f"{precision} {peak:.3g}" for precision, peak in result["peak_tflops"].items())
    console.print(
        "ms and kernels: of a step of all clients, the round's time over its steps; of peak: operations of the frozen "
        f"products that the algorithm needs, over the measured peak (TFLOP/s: {peaks}); ÷ frozen: the step over those "
        "products alone, timed behind each of its rounds; loss error: the largest, "
        "of the steps of every client that were compared before anything was timed, relative to the loss's largest",
        highlight=False,
    )
    for other in dict.fromkeys(row["compared_with"] for row in result["rows"] if row["compared_steps"]):
        forms = dict.fromkeys(row["form"] for row in result["rows"] if row["compared_with"] == other)
        console.print(f"compared with {other}, fp32: {'; '.join(forms)}", highlight=False)
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
        "frozen product's; TFLOP/s: of both passes, of forward where there is no backward; timed by replaying a graph: "
        f"{sum(row['timed'] == 'graph' for row in result['rows'])} rows, by calls: "
        f"{sum(row['timed'] == 'calls' for row in result['rows'])}",
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
