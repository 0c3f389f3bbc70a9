"""Tables of what was measured."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def print_step(result: dict[str, Any], console: Console) -> None:
    """The table of `bench_step`, medians with their 20 and 80 % quantiles, and what it was measured on."""
    table = Table(title=result["what"], title_justify="left", title_style="bold")
    for column in (
        "form",
        "dtype",
        "passes",
        "ms a step",
        "× PEFT",
        f"× PEFT {result['rows'][0]['precision']}",
        "loss error",
    ):
        table.add_column(column, justify="left" if column in ("form", "dtype") else "right")
    for row in result["rows"]:
        table.add_row(
            row["form"],
            row["precision"],
            f"{row['forwards']} f + {row['backwards']} b",
            f"{row['ms_50']:,.0f} ({row['ms_20']:,.0f}–{row['ms_80']:,.0f})",
            f"{row['times_peft']:.2f}",
            f"{row['times_first']:.2f}",
            f"{row['worst_loss_error']:.0e}",
        )
    console.print(table)
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    console.print(
        f"{result['device']}, {result['threads']} threads; {versions}; commit {result['commit']}",
        highlight=False,
    )
