"""How much memory a step takes, and so how many rows go through a tower at once."""

from __future__ import annotations

import torch

from fastdlp.adapters.branches import TowerShape
from fastdlp.engine.device import free_memory
from fastdlp.errors import FastdlpError

# Share of what is free that activations may take; the rest is for what the estimate does not know.
SHARE = {"cpu": 0.4, "cuda": 0.8}
# What the widest activation may take on a CPU, whose cache holds several: with 240 clients of digits a row cost 1.2
# times as much at 44 MB and 1.7 times at 197 MB as at 11 MB (EPYC with 32 MB of L3).
CACHE = 12 << 20
SHARE_RANK, SHARE_ROWS = 6, 256  # of all branches together, and of a chunk, where the estimate of shares is right
GRAPHS = 2  # autograd graphs that a step holds at once (local and global)


def activation_bytes(shape: TowerShape, tokens: int, heads: int, itemsize: int, backend: str, device: str) -> int:
    """Bytes that a row (one image or prompt in one view) keeps for the backward, and takes while a block runs.

    Kept per token and block: the residual stream before each of its halves, q, k and v, attention's output and what
    the MLP's activation was given. torch's attention keeps its output in its own layout as well on a GPU; on a CPU the
    plain form keeps the probabilities. The Triton form holds shares of the adapters' gradients until the backward ends,
    in fp32: SHARE_RANK for each input and output of a linear and SHARE_ROWS rows, twice as many for fc2's input.

    Args:
        shape: of the tower.
        tokens: per row.
        heads: of attention.
        itemsize: bytes of an entry.
        backend: "torch" or "triton".
        device: "cpu" or "cuda".
    """
    stream, attention, mlp = 2 * shape.width, 4 * shape.width, shape.mlp
    shares = 0
    if backend == "triton":
        shares = shape.layers * (10 * shape.width + 3 * shape.mlp) * SHARE_RANK * 4 // SHARE_ROWS
    else:
        attention += heads * tokens if device == "cpu" else shape.width
    running = 4 * shape.width + 3 * shape.mlp  # gradients and temporaries of one block
    return ((shape.layers * (stream + attention + mlp) + running) * itemsize + shares) * tokens


def rows_at_once(
    shape: TowerShape,
    tokens: int,
    heads: int,
    itemsize: int,
    backend: str,
    device: torch.device,
    least: int,
    pools: int = 1,
) -> int:
    """Rows a view that fit what is free now, and a CPU's cache; at least one client's batch of `least` rows.

    `pools` hold a step's memory each: CUDA graphs have one of their own, beside that of eager steps.

    Raises:
        FastdlpError: that batch does not fit.
    """
    row = GRAPHS * activation_bytes(shape, tokens, heads, itemsize, backend, device.type)
    free = free_memory(device)
    rows = int(SHARE[device.type] * free) // (pools * row)
    if least * row > free:
        raise FastdlpError(
            f"a step of one client takes about {least * row / 1e9:.1f} GB ({least} rows of {tokens} tokens) and "
            f"{device} has {free / 1e9:.1f} GB free: use a smaller --model or --batch-size, or --precision bf16"
        )
    if device.type == "cpu":
        rows = min(rows, CACHE // (shape.mlp * tokens * itemsize))
    return max(least, rows)
