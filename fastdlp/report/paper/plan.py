"""The runs that a table needs, from the options of `fastdlp reproduce`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

from fastdlp.config import EMBEDDED_MODEL, TrainConfig
from fastdlp.errors import FastdlpError
from fastdlp.methods import resolve
from fastdlp.report.paper.tables import DATASETS, SMOKE, Cell, Table, find_table
from fastdlp.run.folder import CONFIG

SEEDS = (0, 1, 42)
PAPER_MODEL = {"model": "ViT-B-32-quickgelu", "pretrained": "openai"}
PAPER_ROUNDS = 100  # the default of the paper's protocol
SMOKE_TARGET = 0.95
PARTITION_SEEDS = ("fixed", "seed")

T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """A table or a part of it. `options` are those of `TrainConfig` that all runs have in common."""

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
    def smoke(self) -> bool:
        """Whether the runs are smoke runs on digits, which no published result can be compared with."""
        return self.datasets == (SMOKE,)

    @property
    def report(self) -> str:
        """The round whose accuracy is reported, "last" or "best" on test."""
        return str(resolve(self.config(self.cells()[0], self.seeds[0])).report)

    def cells(self) -> list[Cell]:
        """The table's entries, in order."""
        cells = product(self.encoders, self.betas, self.datasets, self.methods)
        return [Cell(encoder, beta, method, dataset) for encoder, beta, dataset, method in cells]

    def config(self, cell: Cell, seed: int) -> TrainConfig:
        """The config of one run, with its folder."""
        partition_seed = seed if self.partition_seeds == "seed" else 0
        name = f"{cell.dataset}-{cell.method}-{cell.encoder}-beta{cell.beta:g}-seed{seed}"
        if partition_seed:
            name += f"-partition{partition_seed}"
        return TrainConfig(
            **asdict(cell),
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
    dataset: Sequence[str] = (),
    encoder: Sequence[str] = (),
    beta: Sequence[float] = (),
    method: Sequence[str] = (),
    seed: Sequence[int] = (),
    partition_seeds: str = "fixed",
    target: float | None = None,
    lr: Sequence[str] = (),
    **options: Any,
) -> Plan:
    """A plan from checked options; the default is the whole table in the paper's setting.

    Args:
        name: table1 … table8, figure2.
        runs: the folder that holds the run folders.
        dataset, encoder, beta, method: restrict the table. `dataset` = ["digits"]: smoke runs, embedded model.
        seed: seeds of training, in place of 0, 1 and 42.
        partition_seeds: "fixed": 0 for all seeds; "seed": equal to the training seed.
        target: accuracy as a fraction, in place of the paper's (communication tables only).
        lr: "method=value" each, in place of the method's default.
        options: of `TrainConfig`; None counts as not given.

    Raises:
        FastdlpError: an entry that the table does not have, or an invalid value.
    """
    table = find_table(name)
    if runs.exists() and not runs.is_dir():
        raise FastdlpError(f"--runs {runs} is not a folder: name another")
    if (runs / CONFIG).exists():
        raise FastdlpError(f"--runs {runs} is a run itself: name the folder that holds the runs")
    smoke = SMOKE in dataset
    if smoke and len(set(dataset)) > 1:
        raise FastdlpError(f"--dataset {SMOKE} is a smoke run with the embedded model: give it alone")
    known_betas = tuple(beta) if beta and table.kind == "curve" else table.betas  # a curve's β is not published
    if partition_seeds not in PARTITION_SEEDS:
        raise FastdlpError(f"unknown --partition-seeds {partition_seeds!r}: choose from {', '.join(PARTITION_SEEDS)}")
    methods = _chosen("--method", method, table.methods, name)
    given = {key: value for key, value in options.items() if value is not None}
    if "model" not in given:
        given = ({"model": EMBEDDED_MODEL} if smoke else PAPER_MODEL) | given
    plan = Plan(
        name=name,
        table=table,
        runs=runs,
        datasets=(SMOKE,) if smoke else _chosen("--dataset", dataset, DATASETS, name, also=(SMOKE,)),
        encoders=_chosen("--encoder", encoder, table.encoders, name),
        betas=_chosen("--beta", beta, known_betas, name),
        methods=methods,
        seeds=tuple(dict.fromkeys(seed or SEEDS)),
        partition_seeds=partition_seeds,
        target=_target(target, table, smoke),
        lr=_learning_rates(lr, methods, name),
        options=given,
    )
    for config in plan.configs():
        resolve(config)  # refuses invalid values
    return plan


def _chosen(
    option: str, given: Sequence[T], known: tuple[T, ...], table: str, also: tuple[T, ...] = ()
) -> tuple[T, ...]:
    """The values given, each once, or all known ones. Raises FastdlpError for one that the table does not have."""
    for value in given:
        if value not in known + also:
            raise FastdlpError(f"{table} has no {option} {value}: choose from {', '.join(map(str, known + also))}")
    return tuple(dict.fromkeys(given or known))


def check_target(target: float | None) -> None:
    """Raises FastdlpError for an accuracy that is not a fraction."""
    if target is not None and not 0 < target <= 1:
        raise FastdlpError(f"--target is {target:g}: give a fraction above 0 and up to 1, such as 0.88")


def _target(given: float | None, table: Table, smoke: bool) -> float | None:
    """The accuracy to reach in place of the paper's, a fraction; None: the paper's."""
    if given is not None and table.kind != "communication":
        raise FastdlpError("--target belongs to table5 and table6: leave it out")
    check_target(given)
    return SMOKE_TARGET if given is None and smoke and table.kind == "communication" else given


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
