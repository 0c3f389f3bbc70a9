"""Which runs can be compared, which of them differ in their seed only, and in which options the others differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from fastdlp.config import NOT_IN_NUMBERS, OPTIONS, PARTITION_OPTIONS
from fastdlp.errors import FastdlpError
from fastdlp.report.read import Run
from fastdlp.report.style import DASHES, PALETTE
from fastdlp.report.text import number

# Accuracies can be compared between runs with equal values of these and an equal assignment of samples to clients.
_TASK_OPTIONS = ("dataset", "model", "pretrained", "test_fraction", "val_fraction")
_PARTITION_OPTIONS = [name for name in PARTITION_OPTIONS if name not in _TASK_OPTIONS]
# May differ between the seeds of one experiment, and between a run and the plan of a table.
MACHINE_OPTIONS = ("trace", "device", "backend", "micro_batch", "cuda_graph")
_NOT_IN_EXPERIMENT = NOT_IN_NUMBERS | {"seed", *MACHINE_OPTIONS, *_PARTITION_OPTIONS}
_IN_RUNS_TABLE = {"method", "encoder", "seed", "rounds", "beta"}
_MAX_LABEL = 60


@dataclass(frozen=True, eq=False)
class Series:
    """Runs that differ in their seed only: one curve in every picture."""

    label: str
    runs: list[Run]
    color: str
    dash: Any

    def name(self, run: Run) -> str:
        """The label of one of the runs."""
        return f"{self.label} · seed {run.config.seed}"


def check_comparable(runs: Sequence[Run]) -> None:
    """Refuse runs whose accuracies are not of the same task on the same samples.

    Raises:
        FastdlpError: names the first two runs that differ, and their difference.
    """
    for one, other in combinations(runs, 2):
        if difference := _difference(one, other):
            raise FastdlpError(
                f"{one.name} and {other.name} cannot be compared: {difference}; make a report of each kind"
            )


def group_seeds(runs: Sequence[Run]) -> list[Series]:
    """The runs by experiment, in the order of their first appearance, with distinct labels."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(repr((run.finished, _experiment(run))), []).append(run)
    firsts = [group[0] for group in groups.values()]
    series = []
    for index, group in enumerate(groups.values()):
        unfinished = not group[0].finished and any(run.finished for run in runs)
        label = _label(group[0], firsts) + (" · unfinished" if unfinished else "")
        series.append(Series(label, group, PALETTE[index % len(PALETTE)], DASHES[index % len(DASHES)]))
    return series


def differing_options(series: Sequence[Series]) -> list[tuple[str, list[str]]]:
    """Options that differ between the runs and are not in the table of runs: flag, and a value per series."""
    options = [[asdict(run.config) for run in one.runs] for one in series]
    hidden = NOT_IN_NUMBERS | _IN_RUNS_TABLE
    return [
        (OPTIONS[name].flag, [", ".join(dict.fromkeys(_shown(run[name]) for run in runs)) for runs in options])
        for name in options[0][0]
        if name not in hidden and len({repr(run[name]) for runs in options for run in runs}) > 1
    ]


def _difference(one: Run, other: Run) -> str:
    """Why two runs cannot be compared; "" if they can."""
    if text := _differing(one, other, _TASK_OPTIONS):
        return text
    for what, known in (("data set", (one.data, other.data)), ("frozen weights", (one.weights, other.weights))):
        if all(known) and known[0] != known[1]:
            return f"their {what} differ, with fingerprints {known[0][:12]} and {known[1][:12]}"
    if one.assignment == other.assignment:
        return ""
    return _differing(one, other, _PARTITION_OPTIONS) or "their partition.json assigns different samples to the clients"


def _differing(one: Run, other: Run, options: Sequence[str]) -> str:
    """The first of the options in which two runs differ, with its values; "" if there is none."""
    for name in options:
        values = getattr(one.config, name), getattr(other.config, name)
        if values[0] != values[1]:
            return f"{OPTIONS[name].flag} is {_shown(values[0])} and {_shown(values[1])}"
    return ""


def _experiment(run: Run) -> dict[str, Any]:
    return {name: value for name, value in asdict(run.config).items() if name not in _NOT_IN_EXPERIMENT}


def _label(run: Run, firsts: Sequence[Run]) -> str:
    """The method, and the fewest options that distinguish a run from the others of its method."""
    others = [_experiment(other) for other in firsts if other.config.method == run.config.method]
    own = _experiment(run)
    parts = [run.config.method]
    if len({other.config.encoder for other in firsts}) > 1:
        parts.append(run.config.encoder)
        others = [other for other in others if other["encoder"] == own["encoder"]]
    for name in sorted(own, key=lambda name: name != "protocol"):  # first the one that stands for ten options
        if len({repr(other[name]) for other in others}) > 1:
            parts.append(f"{name.replace('_', ' ')} {_shown(own[name])}")
            others = [other for other in others if other[name] == own[name]]
    label = " · ".join(parts)
    return label if len(label) <= _MAX_LABEL else label[: _MAX_LABEL - 1] + "…"


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return number(value, "g" if isinstance(value, float) else "")
