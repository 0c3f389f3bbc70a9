"""Adapters as safetensors: the messages between clients and server, and the files of a run. Tensors are fp32.

Names are `{branch}/{site part}/{A|B|gate}`, for example `global/0.q/A` [r, K], `global/0.q/B` [N, r] and
`local/proj/gate` [r]. The bytes that a run records as sent and received are the length of `pack`'s result.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastdlp.adapters.bank import AdapterBank
from fastdlp.errors import FastdlpError
from fastdlp.files import write_atomic


def client_tensors(bank: AdapterBank, slot: int) -> dict[str, Tensor]:
    """All tensors that one client trains, by name."""
    return {f"{branch}/{name}": t for branch in bank.trained for name, t in bank.named(branch, slot).items()}


def shared_tensors(bank: AdapterBank, server: Mapping[str, Tensor], federation: int = 0) -> dict[str, Tensor]:
    """The server's adapters of one federation, by name; empty if the method exchanges nothing."""
    return {
        f"{branch}/{name}": t
        for branch, rows in server.items()
        for name, t in bank.named(branch, weights=rows[federation]).items()
    }


def by_branch(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors of `{branch}/{name}` by branch, then by name."""
    branches: dict[str, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        branch, _, name = full_name.partition("/")
        branches.setdefault(branch, {})[name] = tensor
    return branches


def pack(tensors: Mapping[str, Tensor]) -> bytes:
    """Serialize named tensors as one safetensors message; b"" for none."""
    return safetensors.torch.save(dict(tensors)) if tensors else b""


def message_bytes(bank: AdapterBank, shared: Sequence[str]) -> int:
    """The length of `pack`'s result for these branches, computed without serializing; 0 for none."""
    shapes = {f"{b}/{name}": shape for b in shared for name, shape in bank.layouts[b].in_weights.items()}
    if not shapes:
        return 0
    header: dict[str, Any] = {}
    start = end = 0
    for name, shape in sorted(shapes.items()):
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + -(-length // 8) * 8 + end  # the header's length, the header padded to a multiple of 8 bytes, the data


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically. Raises FastdlpError if the write fails."""
    # One metadata key: safetensors writes several in an arbitrary order, and equal runs must give equal files.
    write_atomic(path, safetensors.torch.save(dict(tensors), {"fastdlp": json.dumps(metadata, sort_keys=True)}))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        FastdlpError: missing, damaged or not a safetensors file.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = json.loads((file.metadata() or {}).get("fastdlp", "{}"))
            if not isinstance(metadata, dict):
                raise ValueError("its metadata is not an object")
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except FileNotFoundError:
        raise FastdlpError(f"{path} is missing") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise FastdlpError(f"{path} is damaged or not a safetensors file: {error}") from None


def load_client(bank: AdapterBank, slot: int, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Load the result of `client_tensors` into a slot. Raises FastdlpError for adapters of another shape."""
    branches: dict[str, dict[str, Tensor]] = {branch: {} for branch in bank.trained} | by_branch(tensors)
    if set(branches) != set(bank.trained):
        raise FastdlpError(f"{path} holds the adapters {sorted(branches)}, this run has {sorted(bank.trained)}")
    for branch, named in branches.items():
        try:
            bank.load_named(branch, slot, named)
        except ValueError as error:
            raise FastdlpError(f"{path}: {error}") from None
