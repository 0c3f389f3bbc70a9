"""The metrics of a run: a round's line in metrics.jsonl, and the summary. Accuracies are fractions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

import fastdlp
from fastdlp.adapters.bank import AdapterBank
from fastdlp.adapters.layout import split
from fastdlp.adapters.serialization import message_bytes
from fastdlp.engine.engine import counted
from fastdlp.engine.round_losses import RoundLosses
from fastdlp.run.setup import Federation

Hits = Sequence[np.ndarray]  # per client, whether each sample is classified correctly, bool [n]


def round_line(
    federation: Federation,
    number: int,
    losses: RoundLosses,
    hits: Hits,
    val: Hits,
    message: int,
    seconds: float,
) -> dict[str, Any]:
    """A line of metrics.jsonl, after the aggregation of a round, whose numbers begin with 1.

    Args:
        losses: of the round's training, all slots of the engine.
        hits, val: on the test and validation samples of this run's clients.
        message: bytes of one serialized global adapter.
        seconds: duration of the round.
    """
    correct, total = counted(hits)
    val_correct, val_total = counted(val)
    accuracy, over_clients = accuracy_metrics(correct, total)
    validation = {"accuracy_val": float(val_correct.sum() / val_total.sum())} if val_total.any() else {}
    zero, gates, by_part = _gates(federation)
    means = {name: mean[federation.rows.start : federation.rows.stop] for name, mean in losses.means.items()}
    per_client = []
    for i, slot in enumerate(federation.slots):
        takes_part = len(slot.train) + len(slot.test) > 0
        per_client.append(
            {
                "client": slot.client,
                "correct": int(correct[i]),
                "n": int(total[i]),
                "accuracy": _ratio(correct[i], total[i]),
                "losses": {name: _number(mean[i]) for name, mean in means.items()},
                "steps": int(losses.steps[federation.rows[i]]),
                "gates_zero": int(zero[i]),
                "gates": gates,
                "bytes_sent": message if len(slot.train) else 0,
                "bytes_received": message if takes_part else 0,
            }
            | ({"val_correct": int(val_correct[i]), "val_n": int(val_total[i])} if validation else {})
        )
    sizes = np.array([len(slot.train) for slot in federation.slots])
    return {
        "round": number,
        "accuracy": accuracy,
        **over_clients,
        **validation,
        "losses": {name: _number(np.average(m[sizes > 0], weights=sizes[sizes > 0])) for name, m in means.items()},
        "gates_zero_share": _ratio(zero.sum(), gates * len(federation.slots)),
        "gates_zero_by_part": by_part,
        "clients": per_client,
        "utilisation": _ratio(losses.samples, losses.computed),  # of the whole engine; below 1 where batches are padded
        "seconds": round(seconds, 3),
    }


def summarize(
    federation: Federation,
    lines: list[dict[str, Any]],
    hits: Hits,
    zero_shot: float,
    preparation: float,
) -> dict[str, Any]:
    """The content of summary.json, from the lines of all rounds.

    Last round, best round on test and the round chosen on validation are always reported separately. `accuracy` and the
    metrics of the clients are those of the round that `--report` names.

    Args:
        federation: after the last round.
        lines: of all rounds.
        hits: of the last round on the test samples.
        zero_shot: accuracy of the frozen model.
        preparation: seconds before the first round.
    """
    config, engine = federation.config, federation.engine
    last = lines[-1]
    best = max(lines, key=lambda line: line["accuracy"])
    chosen = max(lines, key=lambda line: line["accuracy_val"]) if "accuracy_val" in last else None
    reported = {"last": last, "best": best, "validation": chosen}[config.report or "last"]
    assert reported is not None  # --report validation requires validation samples
    correct, total = (np.array([client[name] for client in reported["clients"]]) for name in ("correct", "n"))
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
        "round_reported": reported["round"],
        "accuracy_last": last["accuracy"],
        "accuracy_best_test": best["accuracy"],
        "round_best_test": best["round"],
        "accuracy_chosen": chosen and chosen["accuracy"],
        "round_chosen": chosen and chosen["round"],
        "accuracy_val_chosen": chosen and chosen["accuracy_val"],
        "accuracy_mean_clients": reported["accuracy_mean_clients"],
        "clients_std": reported["clients_std"],
        "clients_lowest": reported["clients_lowest"],
        "per_client": per_client_metrics(federation, correct, total),
        "per_class": _per_class(federation, hits),
        "empty_clients": federation.partition.empty,
        "bad_images": federation.pixels.bad,
        **exchange_metrics(engine.bank, engine.method.shared),
        "uploaded_bytes_total": sum(c["bytes_sent"] for line in lines for c in line["clients"]),
        "downloaded_bytes_total": sum(c["bytes_received"] for line in lines for c in line["clients"]),
        "gates_zero_share": last["gates_zero_share"],
        "config": asdict(config),
        "weights": federation.weights_fingerprint,
        "fastdlp_version": fastdlp.__version__,
        "seconds_preparation": round(preparation, 3),
        "seconds_total": round(preparation + sum(line["seconds"] for line in lines), 3),
    }


def exchange_metrics(bank: AdapterBank, shared: Sequence[str]) -> dict[str, int]:
    """Parameters that a client trains and uploads, and the bytes of a message each way."""
    message = message_bytes(bank, shared)
    return {
        "trainable_parameters": sum(bank.parameters(name) for name in bank.trained),
        "uploaded_parameters": sum(bank.layouts[name].weights for name in shared),
        "uploaded_bytes_per_client_round": message,
        "downloaded_bytes_per_client_round": message,
    }


def per_client_metrics(federation: Federation, correct: np.ndarray, total: np.ndarray) -> list[dict[str, Any]]:
    """Samples and accuracy of every client; the accuracy is None without test samples."""
    return [
        {
            "client": slot.client,
            "n_train": len(slot.train),
            "n_test": int(total[i]),
            "correct": int(correct[i]),
            "accuracy": _ratio(correct[i], total[i]),
        }
        for i, slot in enumerate(federation.slots)
    ]


def accuracy_metrics(correct: np.ndarray, total: np.ndarray) -> tuple[float, dict[str, float]]:
    """Σ correct / Σ n, and mean, population standard deviation and minimum over the clients that have test samples."""
    tested = total > 0
    per_client = correct[tested] / total[tested]
    return float(correct.sum() / total.sum()), {
        "accuracy_mean_clients": float(per_client.mean()),
        "clients_std": float(per_client.std()),
        "clients_lowest": float(per_client.min()),
    }


def _per_class(federation: Federation, hits: Hits) -> dict[str, Any]:
    """Correct predictions and test samples by client and class, [clients][K] each."""
    names = federation.pixels.class_names
    classes = [federation.pixels.labels[slot.test] for slot in federation.slots]
    return {
        "class_names": names,
        "correct": [np.bincount(c[h], minlength=len(names)).tolist() for c, h in zip(classes, hits)],
        "n": [np.bincount(c, minlength=len(names)).tolist() for c in classes],
    }


def _gates(federation: Federation) -> tuple[np.ndarray, int, dict[str, float]]:
    """Gates at zero per client, gates per client, and the fraction at zero by site part over all clients."""
    bank, rows = federation.engine.bank, federation.rows
    zero, count = np.zeros(len(rows), np.int64), 0
    by_part: dict[str, float] = {}
    for name, branch in bank.lora.items():
        if not branch.gated:
            continue
        at_zero = (bank.state[name].gates[rows.start : rows.stop] == 0).cpu()
        zero += at_zero.sum(1).numpy()
        count += at_zero.shape[1]
        for gate, own in split(at_zero, bank.layouts[name].in_gates).items():
            by_part[gate.removesuffix("/gate")] = float(own.numpy().mean())
    return zero, count, by_part


def _ratio(part: Any, whole: Any) -> float | None:
    return float(part / whole) if whole else None


def _number(value: Any) -> float | None:
    """A float for JSON; None where there were no samples to average over."""
    return float(value) if np.isfinite(value) else None
