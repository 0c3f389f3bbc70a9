"""The embedded demonstration as a table: methods × β × encoder over seeds, on digits with glyph-clip.

It shows that the methods run, learn and differ. It is not the paper's setting: small images, a small model,
ten easy classes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from fastdlp.config import TrainConfig
from fastdlp.run.train import Callbacks, train

METHODS, BETAS, ENCODERS, SEEDS = ("local", "flora", "feddlp"), (0.1, 0.01), ("image", "text"), (0, 1, 42)
FIGURES = ("zero_shot", "accuracy_last", "accuracy_best_test", "clients_lowest", "gates_zero_share", "seconds_total")


def demonstrate(
    tell: Callable[[str], None], seeds: Sequence[int] = SEEDS, rounds: int | None = None
) -> list[dict[str, Any]]:
    """Run everything, one run after the other; returns a row per method, β and encoder with each seed's figures."""
    rows = []
    for encoder in ENCODERS:
        for beta in BETAS:
            for method in METHODS:
                runs = []
                for seed in seeds:
                    tell(f"{method}, {encoder} encoder, β {beta:g}, seed {seed}")
                    with tempfile.TemporaryDirectory() as folder:
                        config = TrainConfig(
                            method=method,
                            encoder=encoder,  # type: ignore[arg-type]
                            beta=beta,
                            seed=seed,
                            rounds=rounds,
                            out=str(Path(folder) / "run"),
                        )
                        runs.append(train(config, callbacks=Callbacks()))
                rows.append(
                    {
                        "encoder": encoder,
                        "beta": beta,
                        "method": method,
                        "seeds": list(seeds),
                        "rounds": runs[0]["rounds"],
                        "lr": runs[0]["config"]["lr"],
                    }
                    | {name: [run[name] for run in runs] for name in FIGURES}
                )
    return rows


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table: means over seeds, the lowest client of the worst seed, each seed's accuracy."""
    lines = [
        "| encoder | β | method | zero-shot | last round | each seed | best round | lowest client (worst seed) | s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        each = " ".join(f"{a:.3f}" for a in row["accuracy_last"])
        lines.append(
            f"| {row['encoder']} | {row['beta']:g} | {row['method']} | {mean(row['zero_shot']):.3f} "
            f"| **{mean(row['accuracy_last']):.3f}** | {each} | {mean(row['accuracy_best_test']):.3f} "
            f"| {mean(row['clients_lowest']):.3f} ({min(row['clients_lowest']):.3f}) "
            f"| {mean(row['seconds_total']):.0f} |"
        )
    return "\n".join(lines) + "\n"
