"""What a finished run has trained, for one client or on the server, read from its folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastdlp.adapters.branches import Branch
from fastdlp.adapters.serialization import load_tensors
from fastdlp.config import EMBEDDED_MODEL, TrainConfig
from fastdlp.errors import FastdlpError
from fastdlp.export.adapter import LoRA
from fastdlp.methods import make_method
from fastdlp.run.folder import ADAPTERS, RunFolder
from fastdlp.run.recorder import SERVER_FILE, client_file


@dataclass(frozen=True)
class Trained:
    """One client's personal model, or the server's: exactly one of `adapter` and `weights` is there.

    Attributes:
        config: the run's.
        about: as `LoRA.about`, all five, and `encoder`.
        adapter: of the methods that train LoRA.
        weights: of the others, by name: a parameter of open_clip's model (`visual.conv1.weight`), or one of a module
            that open_clip's model does not have (`classifier/weight`).
    """

    config: TrainConfig
    about: dict[str, str]
    adapter: LoRA | None
    weights: dict[str, Tensor]


def read_trained(run: str | Path, client: int | None) -> Trained:
    """What the clients of a run are scored with, or what its server holds.

    Args:
        run: folder of a finished run.
        client: its number; None for the server's.

    Raises:
        FastdlpError: not a run, an unfinished one, no such client, a method that exchanges nothing, or files that
            are missing or damaged.
    """
    folder = RunFolder(Path(run))
    summary = folder.summary()
    if summary is None:
        raise FastdlpError(f"{run} has not ended: finish it with fastdlp train --resume {run}")
    config = folder.config()
    method = make_method(config)
    if client is None and not method.shared:
        raise FastdlpError(f"{run} has no global adapter: {config.method} exchanges nothing; name a --client")
    if client is not None and not 0 <= client < config.clients:
        raise FastdlpError(f"{run} has no client {client}: its clients are 0 to {config.clients - 1}")
    shared = client is None or method.sequential  # clients of a sequential method hold the server's weights
    path = folder.path / ADAPTERS / (SERVER_FILE if shared else client_file(client or 0))
    tensors, metadata = load_tensors(path)
    if not shared and metadata.get("client") != str(client):
        raise FastdlpError(f"{path} holds the adapters of client {metadata.get('client')}")
    branches = {branch.name: branch for branch in method.branches()}
    scored = [branch for branch in method.shared if branch in branches] if shared else list(method.scored)
    about = {
        "model": config.model,
        "pretrained": config.pretrained or ("" if _own_weights(config.model) else "openai"),
        "weights": str(summary.get("weights", "")),
        "encoder": config.encoder,
        "method": config.method,
        "client": "global" if shared else str(client),
    }
    named = {branch: _of(branch, tensors) for branch in scored}
    lora = [(branch, named[branch.name]) for branch in map(branches.__getitem__, scored) if isinstance(branch, Branch)]
    if lora:
        rank, scale, stacked = _stacked(lora)
        return Trained(config, about, LoRA(config.encoder, rank, scale, stacked, about).check(path), {})
    return Trained(config, about, None, {name: tensor for own in named.values() for name, tensor in own.items()})


def _own_weights(model: str) -> bool:
    return model == EMBEDDED_MODEL or ":" in model


def _of(branch: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One branch's tensors by their names without it."""
    prefix = f"{branch}/"
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _stacked(branches: list[tuple[Branch, dict[str, Tensor]]]) -> tuple[int, float, dict[str, Tensor]]:
    """Branches that one forward sums, as one adapter: rank, scale, tensors. Σ sᵢ Bᵢ diag(gᵢ) Aᵢ = s B A.

    A is stacked along the rank as it is. B takes the gates and each branch's scale over the first one's; where all
    scales are equal, and where ranks differ by powers of two, that is exact.
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
