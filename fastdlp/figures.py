"""What a run reports: the line of a round, the summary, and the figures in them (accuracies are fractions)."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import numpy as np

import fastdlp
from fastdlp.bank import AdapterBank, spans
from fastdlp.engine import RoundLosses
from fastdlp.exchange import client_tensors, shared_tensors
from fastdlp.federation import Federation


def round_line(
    federation: Federation,
    number: int,
    losses: RoundLosses,
    scores: tuple[np.ndarray, np.ndarray],
    message: int,
    clock: float,
) -> dict[str, Any]:
    """A line of metrics.jsonl.

    Args:
        federation: after the round's aggregation.
        number: the round, from 1.
        losses: of the round's training.
        scores: correct predictions and test samples, [slots] each.
        message: bytes of one serialised global adapter.
        clock: `time.perf_counter()` when the round began.
    """
    engine = federation.engine
    correct, total = scores
    accuracy, clients = accuracy_figures(correct, total)
    zero, gates, by_part = _gates(engine.bank)
    per_client = []
    for slot, entry in enumerate(engine.slots):
        takes_part = len(entry.train) + len(entry.test) > 0
        per_client.append(
            {
                "client": entry.client,
                "correct": int(correct[slot]),
                "n": int(total[slot]),
                "accuracy": _ratio(correct[slot], total[slot]),
                "losses": {name: _number(means[slot]) for name, means in losses.means.items()},
                "steps": int(losses.steps[slot]),
                "gates_zero": int(zero[slot]),
                "gates": gates,
                "bytes_sent": message if len(entry.train) else 0,
                "bytes_received": message if takes_part else 0,
            }
        )
    sizes = np.array([len(entry.train) for entry in engine.slots])
    return {
        "round": number,
        "accuracy": accuracy,
        **clients,
        "losses": {
            name: _number(np.average(m[sizes > 0], weights=sizes[sizes > 0])) for name, m in losses.means.items()
        },
        "gates_zero_share": _ratio(zero.sum(), gates * len(engine.slots)) or 0.0,
        "gates_zero_by_part": by_part,
        "clients": per_client,
        "seconds": round(time.perf_counter() - clock, 3),
    }


def summarise(
    federation: Federation, lines: list[dict[str, Any]], zero_shot: float, message: int, preparation: float
) -> dict[str, Any]:
    """The content of summary.json, from the lines of all rounds. `preparation` in seconds."""
    config, engine = federation.config, federation.engine
    last = lines[-1]
    best = max(lines, key=lambda line: line["accuracy"])
    correct = np.array([client["correct"] for client in last["clients"]])
    total = np.array([client["n"] for client in last["clients"]])
    reported = last if config.report == "last" else best
    shared = sum(t.numel() for t in shared_tensors(engine.bank, engine.server).values())
    return {
        "method": config.method,
        "encoder": config.encoder,
        "model": config.model,
        "pretrained": config.pretrained,
        "dataset": federation.pixels.name,
        "partition": federation.partition.scheme,
        "beta": federation.partition.beta,
        "clients": federation.partition.clients,
        "rounds": config.rounds,
        "seed": config.seed,
        "partition_seed": federation.partition.seed,
        "protocol": config.protocol,
        "precision": config.precision,
        "device": engine.bank.device.type,
        "zero_shot": zero_shot,
        "accuracy": reported["accuracy"],
        "accuracy_is": config.report,
        "accuracy_last": last["accuracy"],
        "accuracy_best_test": best["accuracy"],
        "round_best_test": best["round"],
        "accuracy_mean_clients": last["accuracy_mean_clients"],
        "clients_std": last["clients_std"],
        "clients_lowest": last["clients_lowest"],
        "per_client": per_client_figures(federation, correct, total),
        "empty_clients": federation.partition.empty,
        "bad_images": federation.pixels.bad,
        "trainable_parameters": sum(t.numel() for t in client_tensors(engine.bank, 0).values()),
        "uploaded_parameters": shared,
        "uploaded_bytes_per_client_round": message,
        "downloaded_bytes_per_client_round": message,
        "uploaded_bytes_total": sum(c["bytes_sent"] for line in lines for c in line["clients"]),
        "downloaded_bytes_total": sum(c["bytes_received"] for line in lines for c in line["clients"]),
        "gates_zero_share": last["gates_zero_share"],
        "config": asdict(config),
        "fastdlp_version": fastdlp.__version__,
        "seconds_preparation": round(preparation, 3),
        "seconds_total": round(preparation + sum(line["seconds"] for line in lines), 3),
    }


def per_client_figures(federation: Federation, correct: np.ndarray, total: np.ndarray) -> list[dict[str, Any]]:
    """Samples and accuracy of every client; the accuracy of one without test samples is None."""
    return [
        {
            "client": slot.client,
            "n_train": len(slot.train),
            "n_test": int(total[i]),
            "correct": int(correct[i]),
            "accuracy": _ratio(correct[i], total[i]),
        }
        for i, slot in enumerate(federation.engine.slots)
    ]


def accuracy_figures(correct: np.ndarray, total: np.ndarray) -> tuple[float, dict[str, float]]:
    """Σcorrect/Σn, and mean, population standard deviation and lowest over the clients that have test samples."""
    have = total > 0
    per = correct[have] / total[have]
    clients = {
        "accuracy_mean_clients": float(per.mean()),
        "clients_std": float(per.std()),
        "clients_lowest": float(per.min()),
    }
    return float(correct.sum() / total.sum()), clients


def _gates(bank: AdapterBank) -> tuple[np.ndarray, int, dict[str, float]]:
    """Gates at zero per slot [slots], gates per slot, and the share at zero by site part over all slots."""
    zero, count = np.zeros(bank.slots, np.int64), 0
    by_part: dict[str, float] = {}
    for name, branch in bank.branches.items():
        if not branch.gated:
            continue
        at_zero = (bank.state[name].gates == 0).cpu().numpy()
        zero += at_zero.sum(1)
        count += at_zero.shape[1]
        for site, span in zip(bank.sites, spans(bank.sites, branch.rank)):
            parts = at_zero[:, span.gate].reshape(bank.slots, len(site.parts), branch.rank)
            by_part |= {part: float(parts[:, i].mean()) for i, part in enumerate(site.parts)}
    return zero, count, by_part


def _ratio(part: Any, whole: Any) -> float | None:
    return float(part / whole) if whole else None


def _number(value: Any) -> float | None:
    """A float for JSON; None where there was nothing to average."""
    return float(value) if np.isfinite(value) else None
