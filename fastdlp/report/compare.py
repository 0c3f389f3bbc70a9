"""Whether runs can be compared, which of them are seeds of one another, and in what they differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from fastdlp.config import NOT_IN_NUMBERS
from fastdlp.errors import FastdlpError
from fastdlp.report.read import Run

# Accuracies can be compared between runs that agree in these, and in who holds which samples.
_SAME = ("dataset", "model", "pretrained", "test_fraction", "val_fraction")
_DEALING = ("partition", "clients", "beta", "classes_per_client", "partition_seed", "empty_clients", "shots")
# What may differ between seeds of one experiment.
_NO_EXPERIMENT = NOT_IN_NUMBERS | {"seed", "trace", "device", "backend", "micro_batch", "cuda_graph", *_DEALING}
_IN_TABLE = {"method", "encoder", "seed", "rounds", "beta"}  # columns of the table of runs
_LONGEST = 60


@dataclass(frozen=True, eq=False)
class Series:
    """Runs that differ in their seed alone: one curve in a picture."""

    label: str
    runs: list[Run]

    def name(self, run: Run) -> str:
        """The label of one of the runs."""
        return f"{self.label} · seed {run.config.seed}"


def check_comparable(runs: Sequence[Run]) -> None:
    """Refuse runs whose accuracies are not of the same task on the same samples.

    Raises:
        FastdlpError: names the first two runs that differ, and in what.
    """
    for one, other in combinations(runs, 2):
        if difference := _difference(one, other):
            raise FastdlpError(
                f"{one.name} and {other.name} cannot be compared: {difference}; make a report of each kind"
            )


def group_seeds(runs: Sequence[Run]) -> list[Series]:
    """The runs by experiment, in the order of their first appearance, with labels that tell them apart."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(repr((run.finished, _experiment(run))), []).append(run)
    found = list(groups.values())
    firsts = [group[0] for group in found]
    labels = [
        _label(run, firsts) + ("" if run.finished or all(not r.finished for r in runs) else " · unfinished")
        for run in firsts
    ]
    return [Series(label, group) for label, group in zip(labels, found)]


def differing_options(series: Sequence[Series]) -> list[tuple[str, list[str]]]:
    """Options that are not equal everywhere and no column of the table of runs: flag, and a value per series."""
    runs = [run for one in series for run in one.runs]
    return [
        (_flag(name), [", ".join(dict.fromkeys(_shown(_options(run)[name]) for run in one.runs)) for one in series])
        for name in _options(runs[0])
        if name not in NOT_IN_NUMBERS | _IN_TABLE and len({repr(_options(run)[name]) for run in runs}) > 1
    ]


def _difference(one: Run, other: Run) -> str:
    """In words, what keeps two runs from being compared; "" if nothing does."""
    ours, theirs = _options(one), _options(other)
    for name in _SAME:
        if ours.get(name) != theirs.get(name):
            return f"{_flag(name)} is {_shown(ours.get(name))} and {_shown(theirs.get(name))}"
    for what, known in (("data set", (one.data, other.data)), ("frozen weights", (one.weights, other.weights))):
        if all(known) and known[0] != known[1]:
            return f"their {what} differ, with fingerprints {known[0][:12]} and {known[1][:12]}"
    if one.members != other.members:
        for name in _DEALING:
            if ours.get(name) != theirs.get(name):
                return f"{_flag(name)} is {_shown(ours.get(name))} and {_shown(theirs.get(name))}"
        return "their partition.json gives the clients different samples"
    return ""


def _options(run: Run) -> dict[str, Any]:
    return asdict(run.config)


def _experiment(run: Run) -> dict[str, Any]:
    return {name: value for name, value in _options(run).items() if name not in _NO_EXPERIMENT}


def _label(run: Run, firsts: Sequence[Run]) -> str:
    """The method, and the fewest options that tell a run from the others of its method."""
    rivals = [_experiment(other) for other in firsts if other.config.method == run.config.method]
    own = _experiment(run)
    parts = [run.config.method]
    if len({other.config.encoder for other in firsts}) > 1:
        parts.append(run.config.encoder)
        rivals = [other for other in rivals if other["encoder"] == own["encoder"]]
    for name in sorted(own, key=lambda name: name != "protocol"):  # one word for ten options
        if len({repr(other[name]) for other in rivals}) > 1:
            parts.append(f"{name.replace('_', ' ')} {_shown(own[name])}")
            rivals = [other for other in rivals if other[name] == own[name]]
    label = " · ".join(parts)
    return label if len(label) <= _LONGEST else label[: _LONGEST - 1] + "…"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
