"""A run from config to summary: rounds, records, checkpoints; and scoring a finished run again.

summary = fastdlp.train(TrainConfig(method="feddlp", out="runs/a"))
summary = fastdlp.resume("runs/a")
scores = fastdlp.evaluate("runs/a")
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastdlp
from fastdlp.bank import AdapterBank, spans
from fastdlp.checkpoint import FILE as CHECKPOINT
from fastdlp.checkpoint import load_checkpoint, save_checkpoint
from fastdlp.config import NOT_IN_NUMBERS, TrainConfig, differences
from fastdlp.data.names import check_name
from fastdlp.engine import RoundLosses
from fastdlp.errors import FastdlpError
from fastdlp.exchange import client_tensors, load_client, load_tensors, pack, save_tensors, shared_tensors
from fastdlp.federation import Federation, prepare
from fastdlp.files import write_atomic
from fastdlp.methods import make_method
from fastdlp.record import ADAPTERS, PARTITION, RunFolder
from fastdlp.trace import Trace, sample_ids


@dataclass
class Listener:
    """What a caller may be told while a run goes on, and ask of it. Every field may be left as it is."""

    preparing: Callable[[str], None] = lambda text: None  # a line: what is being prepared
    started: Callable[[Path, Federation, float, int], None] = lambda run, federation, zero_shot, finished: None
    finished_round: Callable[[dict[str, Any]], None] = lambda line: None  # the line of metrics.jsonl
    should_stop: Callable[[], bool] = lambda: False  # asked after each round; True raises Stopped


class Stopped(Exception):
    """The listener asked to stop. The run can be resumed."""

    def __init__(self, run: Path, finished: int, rounds: int) -> None:
        super().__init__(f"stopped after round {finished} of {rounds}; go on with: fastdlp train --resume {run}")
        self.run = run


def train(config: TrainConfig, overwrite: bool = False, listener: Listener | None = None) -> dict[str, Any]:
    """Run a federation from its start and return its summary (the content of summary.json).

    Args:
        config: any config; without `out` the run folder is named after it, in runs/.
        overwrite: replace a run that is already at `out`.
        listener: see `Listener`.

    Raises:
        FastdlpError: bad input, a disk that refuses, a loss that is not finite.
        Stopped: the listener asked for it.
    """
    listener = listener or Listener()
    begun = time.perf_counter()
    config = config.resolved()
    make_method(config)
    check_name(config.dataset)
    path = Path(config.out) if config.out else _named(config)
    RunFolder.check_free(path, overwrite)
    traced: list[Trace] = []
    federation = _prepare(config, listener, traced)
    config = replace(federation.config, out=str(path))
    run = RunFolder.create(path, config, federation.partition, federation.pixels.ids, overwrite)
    if config.trace:
        trace = Trace(run.path)
        traced.append(trace)
        trace.clients(federation.engine.bank)
        trace.write(0, federation.engine.bank, federation.engine.server)
    return _rounds(run, replace(federation, config=config), 0, traced, listener, begun)


def resume(
    run: str | Path,
    rounds: int | None = None,
    given: dict[str, Any] | None = None,
    listener: Listener | None = None,
) -> dict[str, Any]:
    """Go on with a run that was stopped, to the same bits as if it never had been; returns the summary.

    Args:
        run: its folder.
        rounds: a new number of rounds, to make a finished run longer.
        given: further options by name that the caller believes the run to have.
        listener: see `Listener`.

    Raises:
        FastdlpError: not a run, or a run of other options, data, model or a damaged checkpoint.
        Stopped: the listener asked for it.
    """
    listener = listener or Listener()
    begun = time.perf_counter()
    folder = RunFolder(Path(run))
    config = replace(folder.config(), out=str(run))
    if given:
        asked = replace(config, **given).resolved()
        if other := differences(config, asked):
            raise FastdlpError(f"{run} was started with {', '.join(other)}: resume without it, or start a new run")
        config = asked  # what is left decides no number: it may change
    longer = rounds is not None and rounds != config.rounds
    if longer:
        config = replace(config, rounds=rounds)
        config.check()
    summary = folder.summary()
    if summary is not None and summary["rounds"] == config.rounds:
        return summary
    traced: list[Trace] = []
    federation = _prepare(config, listener, traced, folder.path / PARTITION)
    finished = 0
    if (folder.path / CHECKPOINT).exists():
        finished = load_checkpoint(folder.path / CHECKPOINT, federation.engine.bank, _identity(federation))
        federation.engine.restore_server()
    elif folder.started():
        raise FastdlpError(f"{folder.path / CHECKPOINT} is missing: put it back, or start again with --overwrite")
    if finished > (config.rounds or 0):
        raise FastdlpError(
            f"{run} has finished {finished} rounds already: --rounds {config.rounds} cannot take them back"
        )
    if longer or given:
        folder.change_config(config)
    if config.trace:
        trace = Trace(folder.path, finished)
        traced.append(trace)
        if not finished:
            trace.clients(federation.engine.bank)
            trace.write(0, federation.engine.bank, federation.engine.server)
    return _rounds(folder, replace(federation, config=config), finished, traced, listener, begun)


def evaluate(run: str | Path, listener: Listener | None = None, device: str | None = None) -> dict[str, Any]:
    """Score the saved adapters of a finished run on every client's test samples.

    Returns:
        `accuracy` (Σcorrect/Σn), `accuracy_mean_clients`, `clients_std`, `clients_lowest`, `zero_shot`, `per_client`.

    Raises:
        FastdlpError: not a run, an unfinished run, adapters that are missing, damaged or of other weights.
    """
    listener = listener or Listener()
    folder = RunFolder(Path(run))
    if folder.summary() is None:
        raise FastdlpError(f"{run} has not ended: finish it with fastdlp train --resume {run}")
    config = folder.config()
    federation = prepare(replace(config, device=device or config.device), listener.preparing, folder.path / PARTITION)
    bank = federation.engine.bank
    for slot in range(bank.slots):
        path = folder.path / ADAPTERS / _client_file(slot)
        tensors, metadata = load_tensors(path)
        if metadata.get("weights") != federation.weights_fingerprint:
            raise FastdlpError(f"{path} was trained on other weights than {config.model} has now")
        load_client(bank, slot, tensors, path)
    zero_shot, _ = _accuracy(*federation.engine.score(adapted=False))
    correct, total = federation.engine.score()
    accuracy, clients = _accuracy(correct, total)
    return (
        {"run": str(run), "accuracy": accuracy, "zero_shot": zero_shot}
        | clients
        | {"per_client": _per_client(federation, correct, total)}
    )


def _prepare(config: TrainConfig, listener: Listener, traced: list[Trace], partition: Path | None = None) -> Federation:
    """Prepare, with the engine's batches going to the trace that `traced` will hold once the folder exists."""

    def on_batch(number: int, slot: int, step: int, samples: np.ndarray) -> None:
        for trace in traced:
            trace.batch(number, slot, step, sample_ids(federation.pixels.ids, samples))

    federation = prepare(config, listener.preparing, partition, on_batch if config.trace else None)
    return federation


def _rounds(
    run: RunFolder,
    federation: Federation,
    finished: int,
    traced: list[Trace],
    listener: Listener,
    begun: float,
) -> dict[str, Any]:
    """Rounds finished+1 … to the last, then adapters and summary."""
    config, engine = federation.config, federation.engine
    rounds = config.rounds or 0
    identity = _identity(federation)
    lines = run.rounds(finished)
    zero_shot, _ = _accuracy(*engine.score(adapted=False))
    message = len(pack(shared_tensors(engine.bank, engine.server)))  # every round's has the same shapes
    listener.started(run.path, federation, zero_shot, finished)
    preparation = time.perf_counter() - begun
    if finished == 0:
        save_checkpoint(run.path / CHECKPOINT, engine.bank, 0, identity)
    for number in range(finished + 1, rounds + 1):
        clock = time.perf_counter()
        losses = engine.train_round(number)
        if losses.not_finite:
            slot, step, name = losses.not_finite
            raise FastdlpError(
                f"the loss {name} of client {slot} is not finite in round {number}, step {step}: lower --lr; "
                f"{run.path} keeps its last good checkpoint"
            )
        if bad := _not_finite(engine.bank):
            raise FastdlpError(
                f"the adapters of client {bad[0]} are not finite after round {number}: lower --lr; "
                f"{run.path} keeps its last good checkpoint"
            )
        for trace in traced:
            trace.clients(engine.bank)
        engine.aggregate()
        line = _round_line(federation, number, losses, engine.score(), message, clock)
        for trace in traced:
            trace.write(number, engine.bank, engine.server)
        run.append_round(line)
        lines.append(line)
        stop = listener.should_stop() and number < rounds
        if number % config.checkpoint_every == 0 or number == rounds or stop:
            save_checkpoint(run.path / CHECKPOINT, engine.bank, number, identity)
        listener.finished_round(line)
        if stop:
            raise Stopped(run.path, number, rounds)
    _save_adapters(run.path / ADAPTERS, federation)
    summary = _summary(federation, lines, zero_shot, message, preparation)
    run.write_summary(summary)
    return summary


def _round_line(
    federation: Federation,
    number: int,
    losses: RoundLosses,
    scores: tuple[np.ndarray, np.ndarray],
    message: int,
    clock: float,
) -> dict[str, Any]:
    engine = federation.engine
    correct, total = scores
    accuracy, clients = _accuracy(correct, total)
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


def _summary(
    federation: Federation, lines: list[dict[str, Any]], zero_shot: float, message: int, preparation: float
) -> dict[str, Any]:
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
        "per_client": _per_client(federation, correct, total),
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


def _per_client(federation: Federation, correct: np.ndarray, total: np.ndarray) -> list[dict[str, Any]]:
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


def _accuracy(correct: np.ndarray, total: np.ndarray) -> tuple[float, dict[str, float]]:
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


def _not_finite(bank: AdapterBank) -> list[int]:
    """The slots whose adapters hold a value that is not finite; the loss tells of it a step later, or never."""
    fine = [tensor.isfinite().all(1) for state in bank.state.values() for tensor in (state.weights, state.gates)]
    return (~torch.stack(fine).all(0)).nonzero().flatten().tolist()


def _save_adapters(folder: Path, federation: Federation) -> None:
    """Every client's adapters and the server's, with what is needed to use them in the metadata."""
    engine, config = federation.engine, federation.config
    about = {
        "format": "pt",
        "weights": federation.weights_fingerprint,
        "method": config.method,
        "encoder": config.encoder,
        "model": config.model,
        "branches": json.dumps([asdict(branch) for branch in engine.bank.branches.values()]),
        "scored": json.dumps(engine.method.scored),
    }
    for slot in range(engine.bank.slots):
        save_tensors(folder / _client_file(slot), client_tensors(engine.bank, slot), about)
    if message := pack(shared_tensors(engine.bank, engine.server)):  # byte for byte what a client receives
        write_atomic(folder / "server.safetensors", message)


def _identity(federation: Federation) -> dict[str, str]:
    """What a checkpoint must agree with: every option that decides numbers, the data and the frozen weights."""
    options = {k: v for k, v in asdict(federation.config).items() if k not in NOT_IN_NUMBERS | {"rounds", "trace"}}
    return {
        "config": hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest(),
        "data": federation.pixels.fingerprint,
        "weights": federation.weights_fingerprint,
    }


def _client_file(slot: int) -> str:
    return f"client-{slot:02d}.safetensors"


def _named(config: TrainConfig) -> Path:
    """A run folder that tells what it holds, for those who name none."""
    data = config.dataset.rstrip("/").rpartition("/")[2].replace(":", "-")
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    name = f"{data}-{config.method}-{config.encoder}-beta{config.beta:g}-seed{config.seed}-{stamp}"
    path, number = Path("runs") / name, 1
    while path.exists():  # another run of this second
        number += 1
        path = path.with_name(f"{name}-{number}")
    return path


def _ratio(part: Any, whole: Any) -> float | None:
    return float(part / whole) if whole else None


def _number(value: Any) -> float | None:
    """A float for JSON; None where there was nothing to average."""
    return float(value) if np.isfinite(value) else None
