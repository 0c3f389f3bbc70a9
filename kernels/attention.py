"""Attention over short sequences.

`attention_reference` is torch's `scaled_dot_product_attention`. On a CPU its fused backward processes the few dozen
tokens of CLIP one head at a time: for [32, 12, 50, 64] forward and backward took 23.3 ms in bf16 and 13.0 ms in
fp32, where batched products and a softmax took 4.1 and 10.7 ms (2 cores of an AMD EPYC with AVX-512, torch 2.15).
So on a CPU, explicit products are used up to a length at which their [queries, keys] matrix stays small;
`self_attention` also writes their gradients in the layout of the packed projection, and saves the copies between. On a
GPU `short_attention.py` is used for the sequences that `fits` accepts.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# Without cuDNN: its backward with an explicit mask can give NaN (pytorch #196678).
GPU_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
SHORT_TOKENS = 128  # up to which a Triton program holds a whole sequence
PLAIN_TOKENS = 256  # keys up to which explicit products are used on a CPU


def attention_reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """softmax(q kᵀ / √d) v: [rows, heads, queries, d] each; `mask` is broadcastable to [rows, heads, queries, keys],
    bool (True: attend) or added to the scores; `causal` instead of a mask: a query attends up to its own position."""
    with sdpa_kernel(GPU_BACKENDS) if q.is_cuda else nullcontext():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """`attention_reference`, in the faster implementation for the device, dtype and length."""
    if not _use_products(k, k.shape[2]):
        return attention_reference(q, k, v, mask)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ v


def self_attention(qkv: Tensor, heads: int, causal: bool = False) -> Tensor:
    """Attention of a packed projection.

    Args:
        qkv: [rows, T, 3 · width], queries, keys and values side by side.
        heads: divides width.
        causal: a query attends up to its own position.

    Returns:
        [rows, T, width].
    """
    if _use_products(qkv, qkv.shape[1]):
        return _SelfAttention.apply(qkv, heads, causal)
    q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    mask = None
    if causal and qkv.device.type == "cpu":
        mask, causal = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril(), False
    return attention_reference(q, k, v, mask, causal).transpose(1, 2).flatten(2)


def fits(tokens: int, head_dim: int) -> bool:
    """Whether `short_attention` supports sequences and heads of this size: larger ones, or more than 32 rows of A in
    the forward that computes P, may spill."""
    return 1 <= tokens <= SHORT_TOKENS and head_dim in (16, 32, 64)


def _use_products(k: Tensor, keys: int) -> bool:
    """Whether explicit products are faster; in fp32 torch's own forward is, if no backward follows."""
    if k.device.type != "cpu" or keys > PLAIN_TOKENS:
        return False
    return k.dtype != torch.float32 or torch.is_grad_enabled()


class _SelfAttention(torch.autograd.Function):
    """By explicit products; saves q, k and v head by head, and the probabilities."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int, causal: bool) -> Tensor:
        rows, tokens, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
        split = qkv.view(rows, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        q, k, v = split.reshape(3, rows * heads, tokens, width // heads)
        scores = torch.baddbmm(q.new_empty(1), q, k.mT, beta=0, alpha=(width // heads) ** -0.5)
        if causal:
            scores.masked_fill_(torch.ones(tokens, tokens, dtype=torch.bool).triu(1), float("-inf"))
        probabilities = torch.softmax(scores, -1)
        ctx.save_for_backward(q, k, v, probabilities)
        ctx.heads = heads
        return torch.bmm(probabilities, v).view(rows, heads, tokens, -1).transpose(1, 2).reshape(rows, tokens, width)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, probabilities = ctx.saved_tensors
        groups, tokens, depth = q.shape
        rows = groups // ctx.heads
        scale = depth**-0.5
        dy = grads[0].view(rows, tokens, ctx.heads, depth).transpose(1, 2).reshape(groups, tokens, depth)
        d = q.new_empty(3, groups, tokens, depth)
        torch.bmm(probabilities.mT, dy, out=d[2])
        dscores = torch._softmax_backward_data(torch.bmm(dy, v.mT), probabilities, -1, q.dtype)
        torch.baddbmm(d[0], dscores, k, beta=0, alpha=scale, out=d[0])
        torch.baddbmm(d[1], dscores.mT, q, beta=0, alpha=scale, out=d[1])
        split = d.view(3, rows, ctx.heads, tokens, depth).permute(1, 3, 0, 2, 4)
        return split.reshape(rows, tokens, -1), None, None
