"""A comparison as text: for the terminal, as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from fastdlp.config import TrainConfig
from fastdlp.methods import resolve
from fastdlp.report.paper.compare import Row
from fastdlp.report.paper.plan import PAPER_MODEL, PAPER_ROUNDS, Plan

if TYPE_CHECKING:
    from rich.table import Table

NOTHING = "–"
Column = tuple[str, Callable[[Row], str]]


def columns(plan: Plan, missing: Sequence[TrainConfig]) -> list[Column]:
    """The columns of a table behind its data set and method: heading, and a row's text."""
    found = _COLUMNS[plan.table.kind](plan)
    if missing:
        found.append(("seeds", lambda row: f"{row['seeds']} of {len(plan.seeds)}" if row["seeds"] else NOTHING))
    return found


def sections(plan: Plan, rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Rows by encoder and β, with a heading for each."""
    return [
        (f"{encoder} encoder, β {beta:g}", list(part))
        for (encoder, beta), part in groupby(rows, key=lambda row: (row["encoder"], row["beta"]))
    ]


def notes(plan: Plan, missing: Sequence[TrainConfig]) -> list[str]:
    """What a reader must know: the setting, what is compared with what, and what is missing."""
    configs = [resolve(config) for config in plan.configs()]
    first = configs[0]
    model = first.model if first.pretrained is None else f"{first.model} ({first.pretrained})"
    by_method = {
        method: " and ".join(sorted({f"{config.lr:g}" for config in configs if config.method == method}))
        for method in plan.methods
    }
    found = [
        f"Setting: {model}, {' '.join(plan.datasets)}, {first.rounds} rounds, {first.clients} clients, --protocol "
        f"{first.protocol}, {first.precision}; training seeds {' '.join(map(str, plan.seeds))}; partition seed "
        f"{'0 for all of them' if plan.partition_seeds == 'fixed' else 'equal to the training seed'}"
        " (the paper does not say which).",
        "Learning rates: " + ", ".join(f"{method} {values}" for method, values in by_method.items()) + ".",
        *_MEANING[plan.table.kind](plan),
    ]
    setting = {"model": first.model, "pretrained": first.pretrained, "rounds": first.rounds}
    if plan.rehearsal and plan.table.kind != "curve":
        found.append(
            "This is a rehearsal on digits: the paper's figures are of other data and another model, and stand here "
            "only to be seen; no difference is taken."
        )
    elif setting != PAPER_MODEL | {"rounds": PAPER_ROUNDS}:
        paper = f"{PAPER_MODEL['model']} ({PAPER_MODEL['pretrained']}), {PAPER_ROUNDS} rounds"
        found.append(f"The paper's setting is another: {paper}.")
    if missing:
        names = ", ".join(str(config.out) for config in missing)
        found.append(f"{len(missing)} of {len(configs)} runs are missing ({NOTHING} where none is there): {names}.")
    return found


def rich_table(plan: Plan, heading: str, rows: Sequence[Row], missing: Sequence[TrainConfig]) -> Table:
    """One section for the terminal; headings wrap between words, cells do not."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=heading, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("data set", no_wrap=True)
    table.add_column("method", no_wrap=True)
    shown = columns(plan, missing)
    for name, text in shown:
        longest = max(map(len, [*name.split(), *map(text, rows)]))
        table.add_column(name, justify="right", min_width=longest)
    for dataset, part in groupby(rows, key=lambda row: str(row["dataset"])):
        table.add_section()
        for number, row in enumerate(part):
            table.add_row("" if number else dataset, row["method"], *(text(row) for _, text in shown))
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
    """The rows to ten digits; an empty field where there is nothing, an empty file for no rows."""
    if not rows:
        return ""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {name: f"{value:.10g}" if isinstance(value, float) else value for name, value in row.items()} for row in rows
    )
    return file.getvalue()


def _accuracy_columns(plan: Plan) -> list[Column]:
    return [*_rounds(plan, lambda which: (which, f"{which}_std")), *_paper("paper", "paper_std", "difference")]


def _curve_columns(plan: Plan) -> list[Column]:
    return _rounds(plan, lambda which: (which, f"{which}_std"))


def _clients_columns(plan: Plan) -> list[Column]:
    return [
        column
        for name in ("std", "lowest")
        for column in (
            *((f"{name}, {head}", text) for head, text in _rounds(plan, lambda which, n=name: (f"{n}_{which}", ""))),  # type: ignore[misc]
            *_paper(f"{name}_paper", "", f"{name}_difference"),
        )
    ]


def _communication_columns(plan: Plan) -> list[Column]:
    def ours(name: str, form: str) -> Callable[[Row], str]:
        def text(row: Row) -> str:
            if row[name] is not None:
                return format(row[name], form)
            return "not reached" if row["seeds"] else NOTHING

        return text

    return [
        ("target %", lambda row: _number(row["target"], "g")),
        ("rounds, each seed", lambda row: row["rounds"] or NOTHING),
        ("MB as the paper counts", ours("mb", ".2f")),
        ("bytes of messages", ours("bytes", ",")),
        ("paper: target %", lambda row: _number(row["paper_target"], "g")),
        ("paper: rounds", lambda row: _number(row["paper_rounds"], "d")),
        ("paper: MB", lambda row: _number(row["paper_mb"], ".2f")),
        ("difference", lambda row: _number(row["difference"], "+.2f")),
    ]


_COLUMNS: dict[str, Callable[[Plan], list[Column]]] = {
    "accuracy": _accuracy_columns,
    "ablation": _accuracy_columns,
    "curve": _curve_columns,
    "clients": _clients_columns,
    "communication": _communication_columns,
}


def _rounds(plan: Plan, names: Callable[[str], tuple[str, str]]) -> list[Column]:
    """Our figure in the last and in the best round, the reported one marked."""

    def column(which: str) -> Column:
        mean, std = names(which)
        return f"{which} round" + (" *" if which == plan.report else ""), lambda row: _with_spread(row, mean, std)

    return [column("last"), column("best")]


def _paper(mean: str, std: str, difference: str) -> list[Column]:
    return [
        ("paper", lambda row: _with_spread(row, mean, std)),
        ("difference", lambda row: _number(row[difference], "+.2f")),
    ]


def _with_spread(row: Row, mean: str, std: str) -> str:
    text = _number(row[mean], ".2f")
    alone = row[mean] is None or row.get(std) is None or (row["seeds"] == 1 and not mean.startswith("paper"))
    return text if alone else f"{text} ± {row[std]:.2f}"


def _number(value: Any, form: str) -> str:
    return NOTHING if value is None else format(value, form)


def _accuracy_meaning(plan: Plan) -> list[str]:
    which = {"last": "the last round", "best": "the round that is best on test"}[plan.report]
    return [
        "Accuracy is Σcorrect/Σn over all clients, in percent, mean ± population standard deviation over seeds; "
        "best round: each seed's own, chosen on test.",
        f"* is the reported round of these runs (--report), {which}; differences are it minus the paper's, whose ± is "
        "over seeds too.",
    ]


def _curve_meaning(plan: Plan) -> list[str]:
    which = {"last": "the last round", "best": "the round that is best on test"}[plan.report]
    return [
        _accuracy_meaning(plan)[0],
        f"* is the reported round of these runs (--report), {which}. The paper has a picture and no figures.",
    ]


def _average_meaning(plan: Plan) -> list[str]:
    average = "average: mean of the four data sets' means, ± mean of their deviations, as the paper's."
    return [*_accuracy_meaning(plan), average]


def _ablation_meaning(plan: Plan) -> list[str]:
    other = "The paper's ablation has no ±, and its figures of FEDDLP are not those of its tables 1 and 2."
    return [*_accuracy_meaning(plan), other]


def _clients_meaning(plan: Plan) -> list[str]:
    which = {"last": "the last round", "best": "the round that is best on test"}[plan.report]
    return [
        "std: population standard deviation of accuracy over the clients that have test samples; lowest: the lowest "
        "client; in percent, mean over seeds.",
        f"* is the reported round of these runs (--report), {which}; differences are it minus the paper's.",
    ]


def _communication_meaning(plan: Plan) -> list[str]:
    return [
        "A seed's rounds: up to the first whose accuracy (Σcorrect/Σn on test) reaches the target. MB and bytes are "
        "of one client, up and down, mean over the seeds that reach it.",
        "MB as the paper counts: 2 × rounds × round(4 bytes × exchanged parameters / 2^20, 3). Bytes of messages: "
        "what the run's ledger counts, headers included.",
        *([f"The target {100 * plan.target:g} % is not the paper's."] if plan.target is not None else []),
    ]


_MEANING: dict[str, Callable[[Plan], list[str]]] = {
    "accuracy": _average_meaning,
    "ablation": _ablation_meaning,
    "curve": _curve_meaning,
    "clients": _clients_meaning,
    "communication": _communication_meaning,
}
