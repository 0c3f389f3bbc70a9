"""Floating-point operations of the frozen products that an algorithm cannot do without, from a tower's shape."""

from __future__ import annotations

from fastdlp.bench.problem import Problem
from fastdlp.clip.tower import Tower


def forward_flops(tower: Tower, tokens: int) -> int:
    """One row (image or prompt) through the blocks and the projection: the last block for the pooled token alone."""
    shape, pooled = tower.shape, 1 if tower.pool != "avg" else tokens
    square, mlp = shape.width**2, shape.width * shape.mlp
    block = tokens * (4 * square + 2 * mlp)
    last = tokens * 2 * square + pooled * (2 * square + 2 * mlp)
    return 2 * ((shape.layers - 1) * block + last + shape.width * shape.embed)


def backward_flops(tower: Tower, tokens: int) -> int:
    """dX of the same row, no frozen weight having a gradient; none is needed in front of the first q, k and v."""
    pooled = 1 if tower.pool != "avg" else tokens
    first = tokens * 3 if tower.shape.layers > 1 else tokens * 2 + pooled
    return forward_flops(tower, tokens) - 2 * first * tower.shape.width**2


def image_step(problem: Problem, forwards: int, backwards: int) -> int:
    """A step of all clients with adapters in the image tower."""
    tower, tokens = problem.clip.image, len(problem.clip.image_stem.positions)
    each = forwards * forward_flops(tower, tokens) + backwards * backward_flops(tower, tokens)
    return problem.clients * problem.batch * each


def text_step(problem: Problem, forwards: int, backwards: int) -> int:
    """A step of all clients with adapters in the text tower, prompts up to the longest."""
    tower, tokens = problem.clip.text, int(problem.clip.text_stem.pooled(problem.ids).max()) + 1
    each = forwards * forward_flops(tower, tokens) + backwards * backward_flops(tower, tokens)
    return problem.clients * len(problem.ids) * each


def full_step(problem: Problem) -> int:
    """A step of all clients that trains both towers: forward, dX and dW, and the patches' product with its dW."""
    patches = problem.clip.image_stem.patches
    embedding = 2 * patches.numel() * (len(problem.clip.image_stem.positions) - 1)
    images = 3 * image_step(problem, 1, 0) + 2 * embedding * problem.clients * problem.batch
    return images + 3 * text_step(problem, 1, 0)
