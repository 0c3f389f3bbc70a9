"""The paper's tables: which methods, encoders and β each one holds, and what was published in it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastdlp.errors import FastdlpError
from fastdlp.files import read_json

PUBLISHED = Path(__file__).resolve().parents[2] / "assets" / "paper_tables.json"
DATASETS = ("pets", "flowers", "aircraft", "dtd")
SMOKE = "digits"  # the data set of a smoke run, with the embedded model
AVERAGE = "average"
ENCODERS = ("text", "image")
PARAMETERS = {"text": 223_232, "image": 334_336}
"""What a client of FLoRA, FedDAT or FEDDLP sends in a round of the paper's setting: rank 2 on ViT-B/32."""

Kind = Literal["accuracy", "clients", "communication", "ablation", "curve"]


@dataclass(frozen=True)
class Cell:
    """One entry of a table; its runs differ in their seed only."""

    encoder: str
    beta: float
    method: str
    dataset: str


@dataclass(frozen=True)
class Table:
    """The entries of a table; the data sets are the same four in all tables."""

    kind: Kind
    title: str
    methods: tuple[str, ...]
    betas: tuple[float, ...]
    encoders: tuple[str, ...] = ENCODERS


_ALL, _TWO = ("local", "fedclip", "flora", "feddat", "feddlp"), ("combined", "feddlp")

# The numbers of the tables are inferred, since the file of published results does not contain them. The β of Figure 2
# is not published; 0.1 is this project's choice.
TABLES = {
    "table1": Table("accuracy", "Accuracy", _ALL, (0.1,)),
    "table2": Table("accuracy", "Accuracy", _ALL, (0.01,)),
    "table3": Table("clients", "Spread over clients", _ALL, (0.1,)),
    "table4": Table("clients", "Spread over clients", _ALL, (0.01,)),
    "table5": Table("communication", "Communication to a target", ("feddat", "feddlp"), (0.1, 0.01), ("text",)),
    "table6": Table(
        "communication", "Communication to a target", ("flora", "feddat", "feddlp"), (0.1, 0.01), ("image",)
    ),
    "table7": Table("ablation", "Combined against FEDDLP", _TWO, (0.1,)),
    "table8": Table("ablation", "Combined against FEDDLP", _TWO, (0.01,)),
    "figure2": Table("curve", "LoRA against SoRA, accuracy by round", ("local", "local-sora"), (0.1,)),
}


def find_table(name: str) -> Table:
    """The table of a name. Raises FastdlpError, listing the names, for an unknown one."""
    if name not in TABLES:
        raise FastdlpError(f"unknown table {name!r}: choose from {', '.join(TABLES)}")
    return TABLES[name]


def published(table: Table, cell: Cell) -> dict[str, float]:
    """The paper's results for a cell; empty where it has none (other data, Figure 2).

    Returns:
        accuracy: `mean` and `std`; clients: `std` and `lowest`; ablation: `mean`; all in percent.
        communication: `target` in percent, `mb` in MiB up plus down, and the corresponding `rounds`.
    """
    if table.kind == "curve" or cell.dataset not in (*DATASETS, AVERAGE):
        return {}
    results = _published()[table.kind]
    beta = f"{cell.beta:g}"
    if table.kind == "communication":
        entry = results[cell.encoder][cell.dataset][beta]
        mb = entry[cell.method]
        return {"target": entry["target"], "mb": mb, "rounds": round(mb / paper_mb(1, PARAMETERS[cell.encoder]))}
    entry = results[beta][cell.encoder][cell.method][cell.dataset]
    return {"mean": entry} if table.kind == "ablation" else entry


def paper_mb(rounds: int, parameters: int) -> float:
    """MiB of `rounds` rounds as the paper counts: up plus down, fp32, one direction rounded to three digits."""
    return 2 * rounds * round(4 * parameters / 2**20, 3)


@functools.cache
def _published() -> dict[str, Any]:
    return read_json(PUBLISHED, "published results")
