"""Attention's forms against torch's."""

from __future__ import annotations

import pytest
import torch

from fastdlp.kernels.attention import PLAIN_TOKENS, attention, attention_reference


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize("kind", ["full", "causal", "one query"])
@pytest.mark.parametrize("tokens", [1, 17, PLAIN_TOKENS + 1])
def test_equals_torch(kind: str, tokens: int, dtype: torch.dtype, tolerance: float) -> None:
    g = torch.Generator().manual_seed(0)
    queries = 1 if kind == "one query" else tokens
    q, k, v = (torch.randn(3, 2, n, 8, generator=g).to(dtype).requires_grad_() for n in (queries, tokens, tokens))
    mask = None
    if kind == "causal":
        mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    elif kind == "one query":  # each row sees its own number of keys
        mask = (torch.arange(tokens) <= torch.tensor([0, tokens // 2, tokens - 1])[:, None])[:, None, None]
    dy = torch.randn(3, 2, queries, 8, generator=g).to(dtype)
    ours = attention(q, k, v, mask)
    reference = attention_reference(*(t.double() for t in (q, k, v)), mask)
    assert (ours.double() - reference).abs().max() <= tolerance * max(1.0, float(reference.detach().abs().max()))
    grads = torch.autograd.grad(ours, (q, k, v), dy)
    for mine, theirs in zip(grads, torch.autograd.grad(reference, (q, k, v), dy.double())):
        assert (mine.double() - theirs.double()).abs().max() <= 4 * tolerance * max(1.0, float(theirs.abs().max()))
    with torch.no_grad():
        assert (attention(q, k, v, mask).double() - reference).abs().max() <= 4 * tolerance
