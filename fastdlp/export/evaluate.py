"""Scoring a finished run again, with its own adapters or with one from elsewhere.

scores = fastdlp.evaluate("runs/a")
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from fastdlp.adapters.serialization import load_client, load_tensors
from fastdlp.engine.device import pick_device
from fastdlp.errors import FastdlpError
from fastdlp.export.score import prepare_with_adapter
from fastdlp.run.folder import ADAPTERS, PARTITION, RunFolder
from fastdlp.run.loop import Callbacks
from fastdlp.run.metrics import accuracy_metrics, per_client_metrics
from fastdlp.run.recorder import SERVER_FILE, client_file, zero_shot_accuracy
from fastdlp.run.setup import Federation, prepare


def evaluate(
    run: str | Path,
    callbacks: Callbacks | None = None,
    device: str | None = None,
    data_dir: str | None = None,
    adapter: str | Path | None = None,
) -> dict[str, Any]:
    """Score the saved adapters of a finished run on every client's test samples.

    Args:
        run: its folder.
        callbacks: see `Callbacks`.
        device: in place of the run's own.
        data_dir: where the data set lies now.
        adapter: one from elsewhere in the place of every client's own, as `fastdlp.load_adapter` reads it.

    Returns:
        `accuracy` (Σcorrect/Σn), `accuracy_mean_clients`, `clients_std`, `clients_lowest`, `zero_shot`, `per_client`.

    Raises:
        FastdlpError: not a run, an unfinished run, adapters that are missing, damaged or of other weights.
    """
    callbacks = callbacks or Callbacks()
    folder = RunFolder(Path(run))
    if folder.summary() is None:
        raise FastdlpError(f"{run} has not ended: finish it with fastdlp train --resume {run}")
    config = folder.config()
    config = replace(config, device=device or config.device, data_dir=data_dir or config.data_dir, cuda_graph=False)
    if config.backend != "torch" and pick_device(config.device).type == "cpu":  # of a run on a GPU
        config = replace(config, backend="torch")
    partition = folder.path / PARTITION
    if adapter is not None:
        federation = prepare_with_adapter(config, adapter, callbacks.preparing, partition)
    else:
        federation = prepare(config, callbacks.preparing, partition)
        _load_adapters(folder, federation)
    correct, total = federation.engine.score()
    accuracy, clients = accuracy_metrics(correct, total)
    return (
        {
            "run": str(run),
            "adapter": None if adapter is None else str(adapter),
            "accuracy": accuracy,
            "zero_shot": zero_shot_accuracy(federation),
        }
        | clients
        | {"per_client": per_client_metrics(federation, correct, total)}
    )


def _load_adapters(folder: RunFolder, federation: Federation) -> None:
    """Put the saved adapters of a run's clients into the bank. Raises FastdlpError where they are not this run's."""
    bank, model = federation.engine.bank, federation.config.model
    if federation.engine.method.sequential:  # the server's file is the message, without a word about itself
        path = folder.path / ADAPTERS / SERVER_FILE
        if (folder.summary() or {}).get("weights") != federation.weights_fingerprint:
            raise FastdlpError(f"{folder.path} was trained from other weights than {model} has now")
        load_client(bank, 0, load_tensors(path)[0], path)
        return
    for slot, row in zip(federation.slots, federation.rows):
        path = folder.path / ADAPTERS / client_file(slot.client)
        tensors, metadata = load_tensors(path)
        if metadata.get("weights") != federation.weights_fingerprint:
            raise FastdlpError(f"{path} was trained on other weights than {model} has now")
        if metadata.get("client") != str(slot.client):
            raise FastdlpError(f"{path} holds the adapters of client {metadata.get('client')}")
        load_client(bank, row, tensors, path)
