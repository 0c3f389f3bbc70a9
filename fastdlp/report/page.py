"""The report as one HTML page, without scripts, links or a date."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from fastdlp.report.compare import Series, differing_options
from fastdlp.report.curves import MIB, zero_shot_levels
from fastdlp.report.read import Run
from fastdlp.report.style import DPI, FAINT, GRID, INK
from fastdlp.report.text import number, scheme_text

_STYLE = f"""
:root {{ color-scheme: light; }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: #fff; color: {INK};
  font: 15px/1.55 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }}
main {{ max-width: 1240px; margin: 0 auto; padding: 36px 28px 60px; }}
h1 {{ font-size: 27px; line-height: 1.25; margin: 0 0 4px; font-weight: 650; overflow-wrap: anywhere; }}
h2 {{ font-size: 19px; margin: 46px 0 6px; padding-top: 14px; border-top: 1px solid {GRID}; font-weight: 650; }}
p {{ max-width: 74ch; margin: 6px 0 10px; }}
.lead, figcaption, .note {{ color: {FAINT}; }}
.lead {{ margin-bottom: 20px; max-width: none; }}
.missing {{ border-left: 3px solid #E69F00; padding: 2px 0 2px 12px; }}
figure {{ margin: 14px 0 28px; break-inside: avoid; }}
figure img {{ display: block; max-width: 100%; height: auto; }}
figcaption {{ font-size: 12.5px; margin-top: 4px; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 12.5px; line-height: 1.35; margin: 10px 0;
  font-variant-numeric: tabular-nums; }}
th, td {{ padding: 5px 7px; text-align: right; white-space: nowrap; border-bottom: 1px solid {GRID}; }}
thead th {{ vertical-align: bottom; white-space: normal; font-weight: 600; border-bottom: 1.5px solid {INK}; }}
.name {{ text-align: left; font-weight: 500; min-width: 15ch; max-width: 34ch;
  white-space: normal; overflow-wrap: anywhere; }}
svg {{ vertical-align: middle; margin-right: 7px; }}
@media print {{ main {{ padding: 0; max-width: none; }} table {{ font-size: 9px; }} th, td {{ padding: 3px 4px; }} }}
""".strip()

_PIXELS_PER_INCH = 112  # of a picture on the page
_NOTE = (
    "Accuracy is Σ correct / Σ n over all clients’ own test samples. Mean, std (of the population) and lowest are of "
    "the clients’ accuracies in the last round. Best on test is selected on the test samples themselves. Bytes are up "
    "and down, all clients, all rounds."
)
_UNFINISHED = " The time of an unfinished run does not include the preparation."


@dataclass(frozen=True)
class Picture:
    """A PNG of the report, or a sentence that says why there is none."""

    file: str
    alt: str
    png: bytes | None
    missing: str = ""


@dataclass(frozen=True)
class Section:
    """A heading, a text that explains the pictures, and the pictures."""

    title: str
    text: str
    pictures: list[Picture]


def page(series: Sequence[Series], sections: Sequence[Section]) -> str:
    """The whole page."""
    runs = [run for one in series for run in one.runs]
    title = f"{runs[0].config.dataset} · {runs[0].config.model} · {len(runs[0].clients)} clients"
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="lead">{escape(_lead(series, runs))}</p>',
        "<h2>Runs</h2>",
        _runs_table(series, runs),
        f'<p class="note">{_NOTE}{"" if all(run.finished for run in runs) else _UNFINISHED}</p>',
        _seeds_table(series),
        _options_table(series),
        *(
            "\n".join([f"<h2>{escape(one.title)}</h2>", f"<p>{escape(one.text)}</p>", *map(_figure, one.pictures)])
            for one in sections
        ),
    ]
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{_STYLE}\n</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def _lead(series: Sequence[Series], runs: Sequence[Run]) -> str:
    partition = runs[0].partition
    scheme = scheme_text(str(partition.get("scheme", "file")), _beta(runs[0]), partition.get("classes_per_client"))
    parts = [
        f"{len(runs)} {'run' if len(runs) == 1 else 'runs'}",
        f"{runs[0].n.sum():,} test samples",
        f"{scheme}, partition seed {partition.get('seed')}",
        f"pretrained {runs[0].config.pretrained}" if runs[0].config.pretrained else "",
        *[f"zero-shot accuracy {level:.4f}" for level in zero_shot_levels(series)],
    ]
    return " · ".join(part for part in parts if part)


def _runs_table(series: Sequence[Series], runs: Sequence[Run]) -> str:
    columns: dict[str, Callable[[Run], str]] = {
        "method": lambda run: run.config.method,
        "encoder": lambda run: run.config.encoder,
        "β": lambda run: number(_beta(run), "g"),
        "seed": lambda run: str(run.config.seed),
        "rounds": lambda run: f"{run.rounds}" + ("" if run.finished else f" of {run.config.rounds}, unfinished"),
        "last round": lambda run: f"{run.accuracy[-1]:.4f}",
        "best on test (round)": lambda run: f"{run.best[1]:.4f} ({run.best[0]})",
        "chosen on validation (round)": lambda run: f"{run.chosen[1]:.4f} ({run.chosen[0]})" if run.chosen else "–",
        "mean of clients": lambda run: f"{run.over_clients('mean')[-1]:.4f}",
        "std": lambda run: f"{run.over_clients('std')[-1]:.4f}",
        "lowest client": lambda run: f"{run.over_clients('min')[-1]:.4f}",
        "parameters uploaded": lambda run: number(run.uploaded, ","),
        "MiB exchanged": lambda run: f"{run.exchanged[-1] / MIB:,.2f}",
        "gates at zero": lambda run: f"{run.gates_zero[-1]:.1%}" if run.gates else "–",
        "time": lambda run: _time(run.seconds),
    }
    if all(run.validation is None for run in runs):
        del columns["chosen on validation (round)"]
    rows = [
        (_swatch(one) + escape(run.name), [text(run) for text in columns.values()])
        for one in series
        for run in one.runs
    ]
    return _table(["run", *columns], rows)


def _seeds_table(series: Sequence[Series]) -> str:
    """Mean ± standard deviation over seeds, where a series has several."""
    several = [one for one in series if len(one.runs) > 1]
    if not several:
        return ""
    columns: dict[str, Callable[[Run], float | None]] = {
        "last round": lambda run: run.accuracy[-1],
        "best on test": lambda run: run.best[1],
        "chosen on validation": lambda run: run.chosen[1] if run.chosen else None,
        "mean of clients": lambda run: run.over_clients("mean")[-1],
        "lowest client": lambda run: run.over_clients("min")[-1],
    }
    if not any(run.chosen for one in several for run in one.runs):
        del columns["chosen on validation"]
    rows = []
    for one in several:
        seeds = ", ".join(str(run.config.seed) for run in one.runs)
        cells = [_over_seeds([column(run) for run in one.runs]) for column in columns.values()]
        rows.append((_swatch(one) + escape(one.label), [seeds, *cells]))
    return (
        _table(["mean ± std over seeds", "seeds", *columns], rows)
        + '<p class="note">std over seeds: population standard deviation.</p>'
    )


def _options_table(series: Sequence[Series]) -> str:
    """The options that differ between the runs, besides those in the table of runs."""
    options = differing_options(series)
    if not options:
        return ""
    rows = [(f"<code>{escape(flag)}</code>", values) for flag, values in options]
    return "<h2>Options that differ</h2>" + _table(["option", *(one.label for one in series)], rows)


def _figure(picture: Picture) -> str:
    if picture.png is None:
        return f'<p class="missing">{escape(picture.missing)}</p>'
    width = int.from_bytes(picture.png[16:20], "big")  # PNG's header
    data = base64.b64encode(picture.png).decode()
    return (
        f'<figure><img src="data:image/png;base64,{data}" style="width:{round(width * _PIXELS_PER_INCH / DPI)}px" '
        f'alt="{escape(picture.alt)}">'
        f"<figcaption>{escape(picture.file)}</figcaption></figure>"
    )


def _table(head: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """A table; the first cell of a row is HTML, the others are text."""
    first, *others = head
    lines = [f'<th class="name">{escape(first)}</th>' + "".join(f"<th>{escape(name)}</th>" for name in others)]
    lines += [f'<td class="name">{name}</td>' + "".join(f"<td>{escape(c)}</td>" for c in cells) for name, cells in rows]
    top, *below = (f"<tr>{line}</tr>" for line in lines)
    joined = "\n".join(below)
    return f'<div class="wide"><table>\n<thead>{top}</thead>\n<tbody>\n{joined}\n</tbody></table></div>'


def _swatch(series: Series) -> str:
    """The line of a series in the pictures, as SVG."""
    dashes = "" if series.dash == "-" else f' stroke-dasharray="{" ".join(f"{2 * d:g}" for d in series.dash[1])}"'
    return (
        '<svg width="30" height="10" aria-hidden="true"><line x1="0" y1="5" x2="30" y2="5" stroke-width="3" '
        f'stroke="{series.color}"{dashes}/></svg>'
    )


def _over_seeds(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    return f"{np.mean(known):.4f}" + (f" ± {np.std(known):.4f}" if len(known) > 1 else "")


def _beta(run: Run) -> float | None:
    beta = run.partition.get("beta")
    return beta if isinstance(beta, float) else None


def _time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
