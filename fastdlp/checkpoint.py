"""The state of a run after a round, in one safetensors file that is there whole or not at all.

Batches are a function of seed, client, round and epoch, so there is no random state to keep: adapters,
gates, AdamW moments and step counts of every slot are all.
"""

from __future__ import annotations

from pathlib import Path

from fastdlp.bank import AdapterBank, BranchState
from fastdlp.errors import FastdlpError
from fastdlp.exchange import load_tensors, save_tensors

FILE = "checkpoint.safetensors"


def save_checkpoint(path: Path, bank: AdapterBank, finished: int, identity: dict[str, str]) -> None:
    """Write the bank after round `finished`; `identity` says which run it belongs to.

    Raises:
        FastdlpError: the disk refuses; the earlier checkpoint stays.
    """
    tensors = {
        f"{branch}/{name}": getattr(state, name).cpu()
        for branch, state in bank.state.items()
        for name in BranchState.FIELDS
    }
    save_tensors(path, tensors, identity | {"round": str(finished)})


def load_checkpoint(path: Path, bank: AdapterBank, identity: dict[str, str]) -> int:
    """Fill the bank from a checkpoint; returns the finished round.

    Raises:
        FastdlpError: missing, damaged, or of another config, partition or model.
    """
    tensors, metadata = load_tensors(path)
    for key, value in identity.items():
        if metadata.get(key) != value:
            raise FastdlpError(f"{path} belongs to another run: its {key} differs; resume the run it came from")
    expected = {f"{branch}/{name}" for branch in bank.state for name in BranchState.FIELDS}
    if set(tensors) != expected:
        raise FastdlpError(f"{path} is not a checkpoint of this method")
    for branch, state in bank.state.items():
        for name in BranchState.FIELDS:
            own, saved = getattr(state, name), tensors[f"{branch}/{name}"]
            if own.shape != saved.shape:
                raise FastdlpError(f"{path}: {branch}/{name} is {tuple(saved.shape)}, this run has {tuple(own.shape)}")
            own.copy_(saved)
    return int(metadata["round"])
