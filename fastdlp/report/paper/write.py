"""A comparison as text: for the terminal, as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from fastdlp.config import TrainConfig
from fastdlp.files import write_atomic
from fastdlp.methods import resolve
from fastdlp.report.paper.compare import ROUNDS, Row, compare, curve_rows, read_runs
from fastdlp.report.paper.plan import PAPER_MODEL, PAPER_ROUNDS, Plan
from fastdlp.report.paper.plot import draw_bars, draw_curves
from fastdlp.report.text import number

Column = tuple[str, Callable[[Row], str]]


def write_comparison(plan: Plan, folder: Path, missing: Sequence[TrainConfig]) -> list[Row]:
    """Compare a table's finished runs with the paper and write it as .md, .csv and .png; returns the rows.

    Raises:
        FastdlpError: a damaged run, or a file that cannot be written.
    """
    found = read_runs(plan, missing)
    rows = compare(plan, found)
    picture = f"{plan.name}.png"
    curve = curve_rows(plan, found) if plan.table.kind == "curve" else None
    write_atomic(folder / f"{plan.name}.md", markdown(plan, rows, missing, picture))
    write_atomic(folder / f"{plan.name}.csv", csv_text(rows if curve is None else curve))
    write_atomic(folder / picture, draw_bars(plan, rows) if curve is None else draw_curves(plan, curve))
    return rows


def columns(plan: Plan, missing: Sequence[TrainConfig]) -> list[Column]:
    """The columns of a table after data set and method: heading, and the text of a row."""
    if plan.table.kind == "communication":
        found = _communication_columns()
    elif plan.table.kind == "clients":
        found = _result_columns(plan, "std", "std, ") + _result_columns(plan, "lowest", "lowest, ")
    else:
        found = _result_columns(plan)
    if missing:
        found.append(("seeds", lambda row: f"{row['seeds']} of {len(plan.seeds)}" if row["seeds"] else "–"))
    return found


def sections(plan: Plan, rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Rows by encoder and β, with a heading for each."""
    return [
        (f"{encoder} encoder, β {beta:g}", list(part))
        for (encoder, beta), part in groupby(rows, key=lambda row: (row["encoder"], row["beta"]))
    ]


def notes(plan: Plan, missing: Sequence[TrainConfig]) -> list[str]:
    """The setting, how the results are computed, and what is missing, a sentence or two each."""
    configs = [resolve(config) for config in plan.configs()]
    first = configs[0]
    model = first.model if first.pretrained is None else f"{first.model} ({first.pretrained})"
    rates = {
        method: " and ".join(sorted({f"{config.lr:g}" for config in configs if config.method == method}))
        for method in plan.methods
    }
    found = [
        f"Setting: {model}, {' '.join(plan.datasets)}, {first.rounds} rounds, {first.clients} clients, --protocol "
        f"{first.protocol}, {first.precision}; training seeds {' '.join(map(str, plan.seeds))}; partition seed "
        f"{'0 for all of them' if plan.partition_seeds == 'fixed' else 'equal to the training seed'}"
        " (the paper does not state it).",
        "Learning rates: " + ", ".join(f"{method} {values}" for method, values in rates.items()) + ".",
        *_explanation(plan),
    ]
    setting = {"model": first.model, "pretrained": first.pretrained, "rounds": first.rounds}
    if plan.smoke and plan.table.kind != "curve":
        found.append(
            "This is a smoke run on digits: the paper's results are for other data and another model, and are shown "
            "without differences."
        )
    elif setting != PAPER_MODEL | {"rounds": PAPER_ROUNDS}:
        paper = f"{PAPER_MODEL['model']} ({PAPER_MODEL['pretrained']}), {PAPER_ROUNDS} rounds"
        found.append(f"The paper's setting differs: {paper}.")
    if missing:
        names = ", ".join(str(config.out) for config in missing)
        found.append(f"{len(missing)} of {len(configs)} runs are missing (– where an entry has no run): {names}.")
    return found


def rich_table(plan: Plan, heading: str, rows: Sequence[Row], missing: Sequence[TrainConfig]) -> Table:
    """One section for the terminal; headings wrap between words, cells do not."""
    table = Table(title=heading, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("data set", no_wrap=True)
    table.add_column("method", no_wrap=True)
    shown = columns(plan, missing)
    for name, text in shown:
        longest = max(map(len, [*name.split(), *map(text, rows)]))
        table.add_column(name, justify="right", min_width=longest)
    for dataset, part in groupby(rows, key=lambda row: str(row["dataset"])):
        table.add_section()
        for index, row in enumerate(part):
            table.add_row("" if index else dataset, row["method"], *(text(row) for _, text in shown))
    return table


def markdown(plan: Plan, rows: Sequence[Row], missing: Sequence[TrainConfig], picture: str) -> str:
    """The whole comparison as a page. `picture` is the name of the picture beside it."""
    shown = columns(plan, missing)
    lines = [f"# {plan.name}: {plan.table.title}", "", *(f"- {note}" for note in notes(plan, missing))]
    for heading, part in sections(plan, rows):
        lines += ["", f"## {heading[0].upper()}{heading[1:]}", ""]
        lines.append("| " + " | ".join(["data set", "method", *(name for name, _ in shown)]) + " |")
        lines.append("|---|---|" + "---:|" * len(shown))
        for row in part:
            lines.append("| " + " | ".join([row["dataset"], row["method"], *(text(row) for _, text in shown)]) + " |")
    return "\n".join([*lines, "", f"![{plan.name}]({picture})", ""])


def csv_text(rows: Sequence[Row]) -> str:
    """The rows to ten digits; an empty field for None, an empty file for no rows."""
    if not rows:
        return ""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {name: f"{value:.10g}" if isinstance(value, float) else value for name, value in row.items()} for row in rows
    )
    return file.getvalue()


def _result_columns(plan: Plan, metric: str = "", heading: str = "") -> list[Column]:
    """Our result in the last and in the best round, the reported one marked; then the paper's, and the difference.

    Accuracy has no `metric`, but a standard deviation.
    """

    def ours(which: str) -> Column:
        mark = " *" if which == plan.report else ""
        name, std = (f"{metric}_{which}", "") if metric else (which, f"{which}_std")
        return f"{heading}{which} round{mark}", lambda row: _with_std(row, name, std if row["seeds"] > 1 else "")

    found = [ours(which) for which in ROUNDS]
    if plan.table.kind != "curve":
        prefix = f"{metric}_" if metric else ""
        found.append(("paper", lambda row: _with_std(row, f"{prefix}paper", f"{prefix}paper_std")))
        found.append(("difference", lambda row: number(row[f"{prefix}difference"], "+.2f")))
    return found


def _communication_columns() -> list[Column]:
    def ours(name: str, spec: str) -> Callable[[Row], str]:
        return lambda row: "not reached" if row[name] is None and row["seeds"] else number(row[name], spec)

    return [
        ("target %", lambda row: number(row["target"], "g")),
        ("rounds, each seed", lambda row: row["rounds"] or "–"),
        ("MB as the paper counts", ours("mb", ".2f")),
        ("bytes of messages", ours("bytes", ",")),
        ("paper: target %", lambda row: number(row["paper_target"], "g")),
        ("paper: rounds", lambda row: number(row["paper_rounds"], "d")),
        ("paper: MB", lambda row: number(row["paper_mb"], ".2f")),
        ("difference", lambda row: number(row["difference"], "+.2f")),
    ]


def _with_std(row: Row, mean: str, std: str) -> str:
    text = number(row[mean], ".2f")
    return text if row[mean] is None or row.get(std) is None else f"{text} ± {row[std]:.2f}"


def _explanation(plan: Plan) -> list[str]:
    """How the results of a table are computed."""
    kind = plan.table.kind
    if kind == "communication":
        found = [
            "A seed's rounds: up to the first whose accuracy (Σcorrect/Σn on test) reaches the target. MB and bytes "
            "are of one client, up and down, mean over the seeds that reach it.",
            "MB as the paper counts: 2 × rounds × round(4 bytes × exchanged parameters / 2^20, 3). Bytes of messages: "
            "as recorded by the run, headers included.",
        ]
        return found if plan.target is None else [*found, f"The target {100 * plan.target:g} % is not the paper's."]
    which = {"last": "the last round", "best": "the round that is best on test"}[plan.report]
    reported = f"* is the reported round of these runs (--report), {which}"
    if kind == "clients":
        return [
            "std: population standard deviation of accuracy over the clients that have test samples; lowest: the "
            "lowest client; in percent, mean over seeds.",
            f"{reported}; differences are it minus the paper's.",
        ]
    accuracy = (
        "Accuracy is Σcorrect/Σn over all clients, in percent, mean ± population standard deviation over seeds; "
        "best round: each seed's own, chosen on test."
    )
    if kind == "curve":
        return [accuracy, f"{reported}. The paper has a picture and no numbers."]
    last = {
        "accuracy": "average: mean of the four data sets' means, ± mean of their deviations, as in the paper.",
        "ablation": "The paper's ablation has no ±, and its results of FEDDLP are not those of its tables 1 and 2.",
    }[kind]
    return [accuracy, f"{reported}; differences are it minus the paper's, whose ± is over seeds too.", last]
