"""Score a finished run again, with its own adapters or with an external one.

scores = fastdlp.evaluate("runs/a")
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from fastdlp.adapters.branches import tower_sites
from fastdlp.adapters.serialization import load_client
from fastdlp.clip.load import describe
from fastdlp.config import TrainConfig
from fastdlp.engine.device import pick_device
from fastdlp.errors import FastdlpError
from fastdlp.export.api import load_adapter
from fastdlp.export.trained import finished_run, load_trained
from fastdlp.methods.flora import FLoRA
from fastdlp.run.folder import PARTITION, RunFolder
from fastdlp.run.metrics import accuracy_metrics, per_client_metrics
from fastdlp.run.recorder import zero_shot_accuracy
from fastdlp.run.setup import Callbacks, Federation, prepare


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
        device: replaces the run's.
        data_dir: replaces the run's.
        adapter: replaces every client's own, see `fastdlp.load_adapter`.

    Returns:
        `accuracy` (Σcorrect/Σn), `accuracy_mean_clients`, `clients_std`, `clients_lowest`, `zero_shot`, `per_client`.

    Raises:
        FastdlpError: not a run, an unfinished run, adapters that are missing, damaged or of other weights.
    """
    callbacks = callbacks or Callbacks()
    folder, summary = finished_run(run)
    config = folder.config()
    config = replace(config, device=device or config.device, data_dir=data_dir or config.data_dir, cuda_graph=False)
    if config.backend != "torch" and pick_device(config.device).type == "cpu":  # a run on a GPU
        config = replace(config, backend="torch")
    if adapter is not None:
        federation = _prepare_with_adapter(config, Path(adapter), callbacks, folder)
    else:
        federation = prepare(config, callbacks, folder.path / PARTITION)
        _load_adapters(folder, summary, federation)
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


def _load_adapters(folder: RunFolder, summary: dict[str, Any], federation: Federation) -> None:
    """Copy the saved adapters of a run's clients into the bank. Raises FastdlpError where they are not this run's."""
    bank, shared = federation.engine.bank, not federation.engine.stateful_clients
    for client, row in [(None, 0)] if shared else zip((slot.client for slot in federation.slots), federation.rows):
        path, tensors, metadata = load_trained(folder, client)
        weights = summary.get("weights") if shared else metadata.get("weights")  # the server's file has no metadata
        if weights != federation.weights_fingerprint:
            raise FastdlpError(f"{path} was trained on other weights than {federation.config.model} has now")
        load_client(bank, row, tensors, path)


def _prepare_with_adapter(config: TrainConfig, path: Path, callbacks: Callbacks, folder: RunFolder) -> Federation:
    """The federation of a run, every client with the adapter at `path` as its one LoRA.

    Model, data and partition are the run's; encoder, rank and scale the adapter's, whatever the run's method.

    Raises:
        FastdlpError: as `load_adapter` and `prepare`; an adapter of another shape or for other weights.
    """
    adapter = load_adapter(path)
    image, text = describe(config.model)
    tensors = adapter.fitted(tower_sites(image if adapter.encoder == "image" else text), path)
    one_lora = replace(
        config,
        method=FLoRA.name,
        encoder=adapter.encoder,  # type: ignore[arg-type]
        rank_global=adapter.rank,
        lora_alpha=adapter.lora_alpha,
    )
    federation = prepare(one_lora, callbacks, folder.path / PARTITION)
    if adapter.about.get("weights", federation.weights_fingerprint) != federation.weights_fingerprint:
        raise FastdlpError(f"{path} was trained on other weights than {config.model} has now")
    bank = federation.engine.bank
    (branch,) = bank.branches
    for slot in range(bank.slots):
        bank.load_named(branch, slot, tensors)
    return federation
