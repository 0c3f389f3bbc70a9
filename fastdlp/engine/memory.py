"""Estimated memory of a step, and from it the number of rows that go through a tower at once."""

from __future__ import annotations

import torch

from fastdlp.adapters.branches import TowerShape
from fastdlp.engine.device import free_memory
from fastdlp.errors import FastdlpError

# Fraction of free memory for activations; the rest covers what the estimate omits.
SHARE = {"cpu": 0.4, "cuda": 0.8}
# Bytes of the widest activation on a CPU, so that several fit its cache: with 240 clients of digits a row took 1.2
# times as long at 44 MB and 1.7 times at 197 MB as at 11 MB (EPYC with 32 MB of L3).
CACHE = 12 << 20
# Rank of all branches together, and rows of a chunk, for which the estimate of partial sums is exact.
PARTIAL_RANK, PARTIAL_ROWS = 6, 256
GRAPHS = 2  # autograd graphs that a step holds at once (local and global)


def activation_bytes(shape: TowerShape, tokens: int, heads: int, itemsize: int, backend: str, device: str) -> int:
    """Bytes that a row (one image or prompt in one view) saves for the backward and needs while a block runs.

    Saved per token and block: the residual stream before each of its halves, q, k and v, attention's output and the
    input of the MLP's activation. torch's attention saves its output in its own layout as well on a GPU; on a CPU the
    math implementation saves the probabilities. Triton's backward holds partial sums of the adapters' gradients in
    fp32 until it ends: PARTIAL_RANK for each input and output of a linear and PARTIAL_ROWS rows, twice as many for
    fc2's input.

    Args:
        shape: of the tower.
        tokens: per row.
        heads: of attention.
        itemsize: bytes of an entry.
        backend: "torch" or "triton".
        device: "cpu" or "cuda".
    """
    stream, attention, mlp = 2 * shape.width, 4 * shape.width, shape.mlp
    partial_sums = 0
    if backend == "triton":
        partial_sums = shape.layers * (10 * shape.width + 3 * shape.mlp) * PARTIAL_RANK * 4 // PARTIAL_ROWS
    else:
        attention += heads * tokens if device == "cpu" else shape.width
    running = 4 * shape.width + 3 * shape.mlp  # gradients and temporaries of one block
    return ((shape.layers * (stream + attention + mlp) + running) * itemsize + partial_sums) * tokens


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
    """Rows per view that fit the free memory, and a CPU's cache; at least one client's batch of `least` rows.

    `pools`: memory pools of the size of a step; CUDA graphs have one of their own beside that of eager steps.

    Raises:
        FastdlpError: one batch does not fit.
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
