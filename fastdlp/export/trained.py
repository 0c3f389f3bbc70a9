"""Trained adapters or weights of one client or of the server, read from the folder of a finished run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdlp.adapters.branches import Branch
from fastdlp.adapters.serialization import by_branch, load_tensors
from fastdlp.config import EMBEDDED_MODEL, TrainConfig
from fastdlp.errors import FastdlpError
from fastdlp.export.adapter import LoRA
from fastdlp.methods import make_method
from fastdlp.run.folder import ADAPTERS, RunFolder
from fastdlp.run.recorder import SERVER_FILE, client_file


@dataclass(frozen=True)
class Trained:
    """One client's personal model, or the server's: either `adapter` or `weights`.

    Attributes:
        config: the run's.
        about: as `LoRA.about`, complete, and `encoder`.
        adapter: of methods that train LoRA.
        weights: of the other methods, by name: a parameter of open_clip's model (`visual.conv1.weight`), or of a
            module that open_clip's model does not have (`classifier/weight`).
    """

    config: TrainConfig
    about: dict[str, str]
    adapter: LoRA | None
    weights: dict[str, Tensor]


def finished_run(run: str | Path) -> tuple[RunFolder, dict[str, Any]]:
    """The folder and the summary of a run. Raises FastdlpError unless it is finished."""
    folder = RunFolder(Path(run))
    summary = folder.summary()
    if summary is None:
        raise FastdlpError(f"{run} has not ended: finish it with fastdlp train --resume {run}")
    return folder, summary


def load_trained(folder: RunFolder, client: int | None) -> tuple[Path, dict[str, Tensor], dict[str, str]]:
    """The file of a client (None: of the server), its tensors and its metadata.

    Raises:
        FastdlpError: it is missing, damaged or another client's.
    """
    path = folder.path / ADAPTERS / (SERVER_FILE if client is None else client_file(client))
    tensors, metadata = load_tensors(path)
    if client is not None and metadata.get("client") != str(client):
        raise FastdlpError(f"{path} holds the adapters of client {metadata.get('client')}")
    return path, tensors, metadata


def read_trained(run: str | Path, client: int | None) -> Trained:
    """The model that a client of a run is scored with, or the server's.

    Args:
        run: folder of a finished run.
        client: its number; None for the server's.

    Raises:
        FastdlpError: not a run, an unfinished one, no such client, a method that exchanges nothing, or files that
            are missing or damaged.
    """
    folder, summary = finished_run(run)
    config = folder.config()
    method = make_method(config)
    if client is None and not method.shared:
        raise FastdlpError(f"{run} has no global adapter: {config.method} exchanges nothing; name a --client")
    if client is not None and not 0 <= client < config.clients:
        raise FastdlpError(f"{run} has no client {client}: its clients are 0 to {config.clients - 1}")
    shared = client is None or method.sequential  # clients of a sequential method hold the server's weights
    path, tensors, _ = load_trained(folder, None if shared else client)
    branches, held = {branch.name: branch for branch in method.branches()}, by_branch(tensors)
    scored = {name: held.get(name, {}) for name in (method.shared if shared else method.scored)}
    about = {
        "model": config.model,
        "pretrained": config.pretrained or ("" if config.model == EMBEDDED_MODEL or ":" in config.model else "openai"),
        "weights": str(summary.get("weights", "")),
        "encoder": config.encoder,
        "method": config.method,
        "client": "global" if shared else str(client),
    }
    lora = [(branch, own) for name, own in scored.items() if isinstance(branch := branches[name], Branch)]
    if lora:
        rank, scale, stacked = _stacked(lora)
        return Trained(config, about, LoRA(config.encoder, rank, scale, stacked, about).check(path), {})
    return Trained(config, about, None, {name: tensor for own in scored.values() for name, tensor in own.items()})


def _stacked(branches: list[tuple[Branch, dict[str, Tensor]]]) -> tuple[int, float, dict[str, Tensor]]:
    """Branches that one forward sums, as one adapter: rank, scale, tensors. Σ sᵢ Bᵢ diag(gᵢ) Aᵢ = s B A.

    A is stacked along the rank unchanged. B is multiplied by the gates and by each branch's scale over the first one's,
    which is exact where scales are equal or ranks differ by powers of two.
    """
    scale = branches[0][0].scale
    stacked: dict[str, Tensor] = {}
    for part in dict.fromkeys(name.partition("/")[0] for name in branches[0][1]):
        a = [tensors[f"{part}/A"] for _, tensors in branches]
        b = []
        for branch, tensors in branches:
            folded = tensors[f"{part}/B"] * (branch.scale / scale)
            b.append(folded * tensors[f"{part}/gate"] if branch.gated else folded)
        stacked[f"{part}/A"], stacked[f"{part}/B"] = torch.cat(a), torch.cat(b, dim=1)
    return sum(branch.rank for branch, _ in branches), scale, stacked
