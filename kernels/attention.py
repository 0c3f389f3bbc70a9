"""Attention over short sequences.

`attention_reference` is torch's `scaled_dot_product_attention`. On a CPU its fused backward runs the few dozen
tokens of CLIP one head at a time: for [32, 12, 50, 64] forward and backward took 23.3 ms in bf16 and 13.0 ms in
fp32, where batched products and a softmax took 4.1 and 10.7 ms (2 cores of an AMD EPYC with AVX-512, torch 2.15).
So the plain products are taken there, up to a length at which their [queries, keys] matrix stays small;
`self_attention` also writes their gradients where the packed projection wants them, and saves the copies between.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PLAIN_TOKENS = 256  # keys up to which the plain form is taken on a CPU


def attention_reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / √d) v: [rows, heads, queries, d] each; `mask` is bool, broadcastable to
    [rows, heads, queries, keys], True where a key is seen."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """The same function as `attention_reference`, in the faster form for the device, dtype and length."""
    if not _products(k, k.shape[2]):
        return attention_reference(q, k, v, mask)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ v


def self_attention(qkv: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Attention of a packed projection.

    Args:
        qkv: [rows, T, 3 · width], queries, keys and values side by side.
        heads: divides width.
        mask: [T, T] bool, True where a key is seen, or None.

    Returns:
        [rows, T, width].
    """
    rows, tokens, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    if _products(qkv, tokens):
        return _SelfAttention.apply(qkv, heads, mask)
    q, k, v = qkv.view(rows, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    return attention(q, k, v, mask).transpose(1, 2).flatten(2)


def _products(k: Tensor, keys: int) -> bool:
    """Whether plain products are the faster form; in fp32 torch's own forward is, where no backward follows."""
    if k.device.type != "cpu" or keys > PLAIN_TOKENS:
        return False
    return k.dtype != torch.float32 or torch.is_grad_enabled()


class _SelfAttention(torch.autograd.Function):
    """The plain products; saves q, k and v head by head, and the probabilities."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int, mask: Tensor | None) -> Tensor:
        rows, tokens, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
        split = qkv.view(rows, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        q, k, v = split.reshape(3, rows * heads, tokens, width // heads)
        scores = torch.baddbmm(q.new_empty(1), q, k.mT, beta=0, alpha=(width // heads) ** -0.5)
        if mask is not None:
            scores.masked_fill_(~mask, float("-inf"))
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
