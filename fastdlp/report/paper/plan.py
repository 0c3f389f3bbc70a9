"""From what was asked to the runs that a table needs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fastdlp.config import EMBEDDED_MODEL, TrainConfig
from fastdlp.errors import FastdlpError
from fastdlp.methods import resolve
from fastdlp.report.paper.tables import DATASETS, REHEARSAL, Cell, Table, find_table
from fastdlp.run.folder import CONFIG

SEEDS = (0, 1, 42)
PAPER_MODEL = {"model": "ViT-B-32-quickgelu", "pretrained": "openai"}
PAPER_ROUNDS = 100  # the default of the paper's protocol
REHEARSAL_TARGET = 0.95
PARTITION_SEEDS = ("fixed", "seed")

T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """A table as it was asked for. `options` are those of `TrainConfig` that all runs have in common."""

    name: str
    table: Table
    runs: Path
    datasets: tuple[str, ...]
    encoders: tuple[str, ...]
    betas: tuple[float, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    partition_seeds: str = "fixed"
    target: float | None = None
    lr: dict[str, float] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def rehearsal(self) -> bool:
        """Whether the runs are of digits, so that no published figure can be compared with them."""
        return self.datasets == (REHEARSAL,)

    @property
    def report(self) -> str:
        """The round whose accuracy counts, "last" or "best" on test."""
        return str(resolve(self.config(self.cells()[0], self.seeds[0])).report)

    def cells(self) -> list[Cell]:
        """The table's entries in its order."""
        return [
            Cell(encoder, beta, method, dataset)
            for encoder in self.encoders
            for beta in self.betas
            for dataset in self.datasets
            for method in self.methods
        ]

    def config(self, cell: Cell, seed: int) -> TrainConfig:
        """One run, with a folder whose name tells it."""
        partition_seed = seed if self.partition_seeds == "seed" else 0
        name = f"{cell.dataset}-{cell.method}-{cell.encoder}-beta{cell.beta:g}-seed{seed}"
        if partition_seed:
            name += f"-partition{partition_seed}"
        return TrainConfig(
            method=cell.method,
            encoder=cell.encoder,  # type: ignore[arg-type]
            dataset=cell.dataset,
            beta=cell.beta,
            seed=seed,
            partition_seed=partition_seed,
            lr=self.lr.get(cell.method),
            out=str(self.runs / name),
            **self.options,
        )

    def configs(self) -> list[TrainConfig]:
        """Every run of the table."""
        return [self.config(cell, seed) for cell in self.cells() for seed in self.seeds]


def make_plan(
    name: str,
    runs: Path,
    datasets: Sequence[str] | None = None,
    encoders: Sequence[str] | None = None,
    betas: Sequence[float] | None = None,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    partition_seeds: str = "fixed",
    target: float | None = None,
    lr: Sequence[str] | None = None,
    **options: Any,
) -> Plan:
    """Check what was asked of a table and fill in the rest: all of the table, in the paper's setting.

    Args:
        name: table1 … table8, figure2.
        runs: the folder that holds the run folders.
        datasets, encoders, betas, methods: restrict the table. `datasets` = ["digits"] takes the embedded model.
        seeds: of training, in place of 0, 1 and 42.
        partition_seeds: "fixed": 0 for all seeds; "seed": each seed's own.
        target: accuracy as a fraction, in place of the paper's (communication tables only).
        lr: "method=value" each, in place of the product's default.
        options: of `TrainConfig`; None counts as not given.

    Raises:
        FastdlpError: what the table does not hold, or a value that cannot be.
    """
    table = find_table(name)
    if runs.exists() and not runs.is_dir():
        raise FastdlpError(f"--runs {runs} is not a folder: name another")
    if (runs / CONFIG).exists():
        raise FastdlpError(f"--runs {runs} is a run itself: name the folder that holds the runs")
    chosen = _chosen("--dataset", datasets, (*DATASETS, REHEARSAL), DATASETS, name)
    if REHEARSAL in chosen and len(chosen) > 1:
        raise FastdlpError(f"--dataset {REHEARSAL} is a rehearsal with the embedded model: give it alone")
    if table.kind == "curve" and betas:  # nothing was published, so any β will do
        over = tuple(dict.fromkeys(betas))
    else:
        over = _chosen("--beta", betas, table.betas, table.betas, name)
    if partition_seeds not in PARTITION_SEEDS:
        raise FastdlpError(f"unknown --partition-seeds {partition_seeds!r}: choose from {', '.join(PARTITION_SEEDS)}")
    among = _chosen("--method", methods, table.methods, table.methods, name)
    given = {key: value for key, value in options.items() if value is not None}
    if REHEARSAL in chosen:
        given = {"model": EMBEDDED_MODEL} | given
    elif "model" not in given:
        given = PAPER_MODEL | given
    plan = Plan(
        name=name,
        table=table,
        runs=runs,
        datasets=chosen,
        encoders=_chosen("--encoder", encoders, table.encoders, table.encoders, name),
        betas=over,
        methods=among,
        seeds=tuple(dict.fromkeys(seeds or SEEDS)),
        partition_seeds=partition_seeds,
        target=_target(target, table, REHEARSAL in chosen),
        lr=_learning_rates(lr or [], among, name),
        options=given,
    )
    for config in plan.configs():
        resolve(config)  # refuses what no run can have
    return plan


def _chosen(
    option: str, given: Sequence[T] | None, known: Iterable[T], everything: tuple[T, ...], table: str
) -> tuple[T, ...]:
    """What was given, each once, or everything. Raises FastdlpError for what the table does not hold."""
    for value in given or ():
        if value not in known:
            raise FastdlpError(f"{table} has no {option} {value}: choose from {', '.join(map(str, known))}")
    return tuple(dict.fromkeys(given)) if given else everything


def _target(given: float | None, table: Table, rehearsal: bool) -> float | None:
    """The accuracy to reach in place of the paper's, a fraction; None: the paper's."""
    if given is None:
        return REHEARSAL_TARGET if rehearsal and table.kind == "communication" else None
    if table.kind != "communication":
        raise FastdlpError("--target belongs to table5 and table6: leave it out")
    if not 0 < given <= 1:
        raise FastdlpError(f"--target is {given:g}: give a fraction above 0 and up to 1, such as 0.88")
    return given


def _learning_rates(given: Sequence[str], methods: Sequence[str], table: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for text in given:
        method, _, value = text.partition("=")
        if method not in methods:
            raise FastdlpError(f"--lr {text!r}: {table} runs {', '.join(methods)}; write METHOD=VALUE")
        if method in found:
            raise FastdlpError(f"--lr gives {method} two values: leave one out")
        try:
            found[method] = float(value)
        except ValueError:
            raise FastdlpError(f"--lr {text!r}: {value!r} is not a number; write METHOD=VALUE") from None
    return found
