"""A picture of `bench round`: images a second of every form."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

from fastdlp.bench.round_form import KEYS
from fastdlp.report.style import FAINT, PALETTE, WIDTH, look, pale, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"fp32": PALETTE[0], "bf16": PALETTE[1]}
BAR = 0.38  # of the height of a form, one for each dtype


def draw_round(result: dict[str, Any]) -> bytes:
    """A PNG: a panel for each group of forms, a bar for each form and dtype."""
    from matplotlib.figure import Figure

    groups: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        groups.setdefault(row["group"], []).append(row)
    order = KEYS[result["encoder"]]
    forms = [len({row["form"] for row in rows}) for rows in groups.values()]
    with look():
        height = 0.45 * sum(forms) + 0.55 * len(groups) + 0.5
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.subplots(len(groups), squeeze=False, gridspec_kw={"height_ratios": forms})[:, 0]
        for axis, (group, rows) in zip(axes, groups.items()):
            _draw_group(axis, sorted(rows, key=lambda row: order.index(row["key"])))
            axis.set_title(group)
        axes[-1].set_xlabel("images a second")
        for dtype in result["peak_tflops"]:
            axes[0].barh([0], [0], color=COLOURS[dtype], label=dtype)
        axes[0].legend(loc="upper right", labelcolor=FAINT)  # the baselines stand there, and their bars are short
        where = f"{result['device']}, {result['threads']} threads" if result["on_cpu"] else result["device"]
        figure.suptitle(textwrap.fill(f"{result['what']}; {where}", 110), fontsize=8, x=0.01, ha="left")
        return png(figure)


def _draw_group(axes: Axes, rows: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(row["form"] for row in rows))
    for row in rows:
        own = [r["precision"] for r in rows if r["form"] == row["form"]]
        at = names.index(row["form"]) + BAR * (own.index(row["precision"]) - (len(own) - 1) / 2)
        ours = row["form"].startswith("fastdlp")
        colour = COLOURS[row["precision"]]
        axes.barh(at, row["images_per_s"], BAR * 0.92, color=colour if ours else pale(colour))
        axes.annotate(
            f"{row['images_per_s']:,.3g}" if row["images_per_s"] < 1000 else f"{row['images_per_s']:,.0f}",
            (row["images_per_s"], at),
            (3, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
        )
    axes.set_yticks(range(len(names)), [textwrap.fill(name, 30) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(0, 1.12 * max(row["images_per_s"] for row in rows))
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
