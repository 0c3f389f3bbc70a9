"""A run's clients with one adapter from elsewhere in the place of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fastdlp.adapters.branches import tower_sites
from fastdlp.clip.load import describe
from fastdlp.config import TrainConfig
from fastdlp.errors import FastdlpError
from fastdlp.export.api import load_adapter
from fastdlp.methods.flora import FLoRA
from fastdlp.run.setup import Federation, prepare


def prepare_with_adapter(
    config: TrainConfig,
    path: str | Path,
    tell: Callable[[str], None] = lambda text: None,
    partition_file: Path | None = None,
) -> Federation:
    """The federation of a config, every client holding the adapter at `path` as its one plain LoRA.

    Model, data and partition are the config's; tower, rank and scale the adapter's, whatever method the config names.

    Args:
        config: a run's.
        path: as `load_adapter`.
        tell, partition_file: as `fastdlp.run.setup.prepare`.

    Raises:
        FastdlpError: as `load_adapter` and `prepare`; an adapter that does not fit the model, or that was made for
            other weights.
    """
    adapter = load_adapter(path)
    image, text = describe(config.model)
    fitted = adapter.fitted(tower_sites(image if adapter.encoder == "image" else text), path)
    one_lora = replace(
        config,
        method=FLoRA.name,
        encoder=adapter.encoder,  # type: ignore[arg-type]
        rank_global=adapter.rank,
        lora_alpha=adapter.lora_alpha,
    )
    federation = prepare(one_lora, tell, partition_file)
    if adapter.about.get("weights", federation.weights_fingerprint) != federation.weights_fingerprint:
        raise FastdlpError(f"{path} was made for other weights than {config.model} has now")
    bank = federation.engine.bank
    (branch,) = bank.branches
    for slot in range(bank.slots):
        bank.load_named(branch, slot, fitted)
    return federation
