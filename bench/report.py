"""Tables of what was measured."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastdlp.bench.tune import describe


def print_round(result: dict[str, Any], console: Console) -> None:
    """The tables of `bench_round`, one for each group of forms, medians with their 20 and 80 % quantiles."""
    console.print(result["what"], style="bold", highlight=False)
    for group, members in groupby(sorted(result["rows"], key=lambda row: row["group"]), key=lambda row: row["group"]):
        rows = list(members)
        baselines = list(dict.fromkeys(label for row in rows for label in row["times"]))
        table = Table(title=group, title_justify="left", title_style="bold", box=SIMPLE, pad_edge=False)
        table.add_column("form", no_wrap=True)
        table.add_column("dtype")
        columns = ("passes", "ms a step", "images/s", *(f"× {label}" for label in baselines))
        for column in (*columns, "peak GB", "kernels", "of peak", "loss error", "steps"):
            table.add_column(column, justify="right", no_wrap=column in ("passes", "ms a step"))
        for row in rows:
            steps, errors = row["compared_steps"], [max(by_step) for by_step in row["loss_errors"].values()]
            table.add_row(
                row["form"],
                row["precision"],
                f"{row['forwards']}f {row['backwards']}b",
                f"{row['ms_50']:,.0f} ({row['ms_20']:,.0f}–{row['ms_80']:,.0f})",
                f"{row['images_per_s']:,.4g}",
                *(f"{row['times'][label]:.2f}" if label in row["times"] else "-" for label in baselines),
                "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.2f}",
                f"{row['kernels']:,}",
                f"{row['peak_share']:.0%}",
                f"{max(errors):.0e}" if errors else "-",
                f"{steps[0]}–{steps[-1]}" if len(steps) > 1 else "".join(map(str, steps)) or "-",
            )
        console.print(table)
    peaks = ", ".join(f"{precision} {peak:.3g}" for precision, peak in result["peak_tflops"].items())
    console.print(
        "ms and kernels: of a step of all clients, the round's time over its steps; of peak: operations of the frozen "
        f"products that the algorithm needs, over the measured peak (TFLOP/s: {peaks}); loss error: the largest, "
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
