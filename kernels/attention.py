"""Attention over short sequences.

`attention_reference` is torch's `scaled_dot_product_attention`. On a CPU its fused backward runs the few dozen
tokens of CLIP one head at a time: for [32, 12, 50, 64] forward and backward took 23.3 ms in bf16 and 13.0 ms in
fp32, where batched products and a softmax took 4.1 and 10.7 ms (2 cores of an AMD EPYC with AVX-512, torch 2.15).
So the plain products are taken there, up to a length at which their [queries, keys] matrix stays small;
`self_attention` also writes their gradients where the packed projection wants them, and saves the copies between. On a
GPU `short_attention.py` does, for the sequences that `fits` names.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastdlp.kernels.backend import choose_backend

# On a GPU never cuDNN's: its backward with an explicit mask can give NaN (pytorch #196678).
GPU_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
SHORT_TOKENS = 128  # up to which the Triton form holds a sequence in one program
PLAIN_TOKENS = 256  # keys up to which the plain form is taken on a CPU


def attention_reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """softmax(q kᵀ / √d) v: [rows, heads, queries, d] each; `mask` is broadcastable to [rows, heads, queries, keys],
    bool, True where a key is seen, or added to the scores; `causal` instead of a mask lets a query see up to itself."""
    with sdpa_kernel(GPU_BACKENDS) if q.is_cuda else nullcontext():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """The same function as `attention_reference`, in the faster form for the device, dtype and length."""
    if not _products(k, k.shape[2]):
        return attention_reference(q, k, v, mask)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ v


def self_attention(
    qkv: Tensor, heads: int, mask: Tensor | None = None, causal: bool = False, backend: str = "auto"
) -> Tensor:
    """Attention of a packed projection.

    Args:
        qkv: [rows, T, 3 · width], queries, keys and values side by side.
        heads: divides width.
        mask: [T, T] bool, True where a key is seen, or None.
        causal: a query sees up to itself; instead of a mask, and on a GPU the faster way to say so.
        backend: "triton" or "torch", or "auto" for what `choose_backend` takes here. The Triton form is for sequences
            that fit and have no mask; all others stay with torch.

    Returns:
        [rows, T, width].
    """
    rows, tokens, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    if mask is not None and causal:
        raise ValueError("self_attention: a mask or causal, not both")
    chosen = choose_backend(backend, qkv.device, qkv.dtype)
    if chosen == "triton" and mask is None and fits(tokens, width // heads):
        from fastdlp.kernels.short_attention import short_attention

        return short_attention(qkv.reshape(rows * tokens, 3 * width), heads, tokens, causal).view(rows, tokens, width)
    if causal and qkv.device.type == "cpu":
        mask, causal = torch.ones(tokens, tokens, dtype=torch.bool).tril(), False
    if _products(qkv, tokens):
        return _SelfAttention.apply(qkv, heads, mask)
    q, k, v = qkv.view(rows, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    a = attention_reference(q, k, v, mask, causal)
    return a.transpose(1, 2).flatten(2)


def fits(tokens: int, head_dim: int) -> bool:
    """Whether the Triton form takes sequences and heads of this size: larger ones, and more than 32 rows of A in the
    forward that makes P, may spill."""
    return 1 <= tokens <= SHORT_TOKENS and head_dim in (16, 32, 64)


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
