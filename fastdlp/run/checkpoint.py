"""Checkpoints: the state of a run after a round in one safetensors file, which is written atomically.

It holds adapters, gates, Adam's moments and step counts of every client. Batches are a function of seed, client, round
and epoch, so there is no random state to save.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from fastdlp.adapters.serialization import load_tensors, save_tensors
from fastdlp.engine.engine import Engine
from fastdlp.errors import FastdlpError


def save_checkpoint(path: Path, engine: Engine, rows: range, finished: int, identity: dict[str, str]) -> None:
    """Write rows of the engine's bank after round `finished`; `identity` identifies the run they belong to.

    Raises:
        FastdlpError: the write fails; the earlier checkpoint stays.
    """
    tensors = {name: tensor.cpu().clone() for name, tensor in _state(engine, rows).items()}
    save_tensors(path, tensors, identity | {"round": str(finished)})


def load_checkpoint(path: Path, engine: Engine, rows: range, identity: dict[str, str]) -> int:
    """Load rows of the engine's bank from a checkpoint, and the server's state from them; returns the finished round.

    Raises:
        FastdlpError: missing, damaged, or of another config, partition or model.
    """
    tensors, metadata = load_tensors(path)
    for key, value in identity.items():
        if metadata.get(key) != value:
            raise FastdlpError(f"{path} belongs to another run: its {key} differs; resume the run it came from")
    state = _state(engine, rows)
    if set(tensors) != set(state):
        raise FastdlpError(f"{path} is not a checkpoint of this method")
    for name, own in state.items():
        if own.shape != tensors[name].shape:
            raise FastdlpError(f"{path}: {name} is {tuple(tensors[name].shape)}, this run has {tuple(own.shape)}")
        own.copy_(tensors[name])
    engine.restore_server()
    return int(metadata["round"])


def _state(engine: Engine, rows: range) -> dict[str, Tensor]:
    """Views of the state that a round starts from, by name."""
    return {
        f"{branch}/{name}": getattr(engine.bank.state[branch], name)[rows.start : rows.stop]
        for branch in engine.bank.trained
        for name in engine.state_fields
    }
