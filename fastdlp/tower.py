"""A frozen CLIP transformer tower, run over rows of many clients at once, each with its own adapters.

The weights are those of open_clip, held once whatever the number of clients; with adapters at B = 0 the
features equal `encode_image` / `encode_text`. A tower is split where the frozen part ends:

- the *stem* (patch embedding, class token, positions, ln_pre; or token embedding and positions) sees no
  adapter, so it is computed once per image or prompt and kept;
- `Tower.features` runs the blocks, the final norm and the projection.

Exact savings, each switchable so that a test can compare: text is cut at the longest prompt (nothing
behind the end token reaches it under a causal mask), and the last block computes queries, output
projection and MLP for the pooled token only.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdlp.bank import Adapters
from fastdlp.kernels.attention import attention
from fastdlp.kernels.dual_lora import RowGroups, dual_lora
from fastdlp.sites import TowerShape


@dataclass(frozen=True)
class Norm:
    """LayerNorm weights [width]."""

    weight: Tensor
    bias: Tensor
    eps: float


@dataclass(frozen=True)
class Linear:
    """Frozen weight [out, in] and bias [out] or None."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class Block:
    """One pre-norm residual attention block; ls1, ls2 are LayerScale vectors [width] or None."""

    ln1: Norm
    qkv: Linear
    out: Linear
    ls1: Tensor | None
    ln2: Norm
    fc1: Linear
    fc2: Linear
    ls2: Tensor | None


@dataclass(frozen=True)
class Tower:
    """Frozen weights from the first block to the joint space.

    pool: "tok" the first token, "avg" the mean over patches (both images), or "index" one position per row
    (text: its end token). norm_after_pool says on which side of the pooling the final norm stands.
    """

    blocks: tuple[Block, ...]
    ln_post: Norm
    proj: Linear
    heads: int
    activation: str  # "quick_gelu", "gelu" or "gelu_tanh"
    causal: bool
    pool: str
    norm_after_pool: bool = False
    pooled_only: bool = True  # the last block for the pooled token only; exact, off only to be compared

    @property
    def shape(self) -> TowerShape:
        fc1 = self.blocks[0].fc1.weight
        return TowerShape(len(self.blocks), fc1.shape[1], fc1.shape[0], self.proj.weight.shape[0])

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Tower:
        """The same tower elsewhere."""
        return _moved(self, device, dtype)

    def features(
        self,
        x: Tensor,
        groups: RowGroups | None = None,
        adapters: Adapters | None = None,
        index: Tensor | None = None,
    ) -> Tensor:
        """Features of the joint space, before normalisation.

        Args:
            x: [rows, T, width] tokens behind the stem, sorted by group.
            groups: the split of the rows (one row is one image or prompt); needed with adapters.
            adapters: the active slots' adapters, or None for the frozen tower.
            index: [rows] int64 pooled position of each row, for pool "index".

        Returns:
            [rows, embed] fp32.
        """
        site = 0
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            if i == last and self.pooled_only and self.pool != "avg":
                x = self._last_block(x, block, site, groups, adapters, index)
            else:
                x = self._block(x, block, site, groups, adapters)
            site += 4
        if self.norm_after_pool:
            x = _norm(self._pooled(x, index), self.ln_post)
        else:
            x = self._pooled(_norm(x, self.ln_post), index)
        return _linear(x[:, None], self.proj, site, groups, adapters)[:, 0].float()

    def _pooled(self, x: Tensor, index: Tensor | None) -> Tensor:
        if x.shape[1] == 1:
            return x[:, 0]
        if self.pool == "avg":
            return x[:, 1:].mean(dim=1)
        return _take(x, index)[:, 0]

    def _block(self, x: Tensor, block: Block, site: int, groups: RowGroups | None, adapters: Adapters | None) -> Tensor:
        rows, tokens, width = x.shape
        qkv = _linear(_norm(x, block.ln1), block.qkv, site, groups, adapters)
        q, k, v = qkv.view(rows, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        a = attention(q, k, v, _causal(tokens, x.device) if self.causal else None)
        a = a.transpose(1, 2).reshape(rows, tokens, width)
        x = x + _scaled(_linear(a, block.out, site + 1, groups, adapters), block.ls1)
        return self._mlp(x, block, site, groups, adapters)

    def _last_block(
        self,
        x: Tensor,
        block: Block,
        site: int,
        groups: RowGroups | None,
        adapters: Adapters | None,
        index: Tensor | None,
    ) -> Tensor:
        """The block's value at the pooled token alone, [rows, 1, width]: keys and values of all, one query a row."""
        rows, tokens, width = x.shape
        split = (rows, -1, self.heads, width // self.heads)
        h = _norm(x, block.ln1)
        q = _linear(_take(h, index), _part(block.qkv, 0, 1), site, groups, adapters, slice(0, 1))
        kv = _linear(h, _part(block.qkv, 1, 3), site, groups, adapters, slice(1, 3))
        k, v = kv.view(rows, tokens, 2, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mask = None
        if self.causal:
            positions = torch.arange(tokens, device=x.device)
            mask = (positions <= _positions(index, rows, x.device)[:, None])[:, None, None, :]
        a = attention(q.view(split).transpose(1, 2), k, v, mask)
        a = a.transpose(1, 2).reshape(rows, 1, width)
        x = _take(x, index) + _scaled(_linear(a, block.out, site + 1, groups, adapters), block.ls1)
        return self._mlp(x, block, site, groups, adapters)

    def _mlp(self, x: Tensor, block: Block, site: int, groups: RowGroups | None, adapters: Adapters | None) -> Tensor:
        h = _linear(_norm(x, block.ln2), block.fc1, site + 2, groups, adapters)
        h = _linear(ACTIVATIONS[self.activation](h), block.fc2, site + 3, groups, adapters)
        return x + _scaled(h, block.ls2)


class _QuickGELU(torch.autograd.Function):
    """x · sigmoid(1.702 x), keeping x alone for the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.silu(x * 1.702).div_(1.702)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grads[0], x * 1.702)


ACTIVATIONS = {
    "quick_gelu": _QuickGELU.apply,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def _linear(
    x: Tensor,
    linear: Linear,
    site: int,
    groups: RowGroups | None,
    adapters: Adapters | None,
    parts: slice = slice(None),
) -> Tensor:
    """The frozen linear on [rows, T, in], with the active slots' adapters where there are any."""
    if adapters is None or groups is None:
        return F.linear(x, linear.weight, linear.bias)
    rows, tokens, width = x.shape
    A, B, c = adapters.site(site, parts)
    y = dual_lora(x.reshape(rows * tokens, width), linear.weight, linear.bias, A, B, c, groups.times(tokens))
    return y.view(rows, tokens, -1)


def _part(linear: Linear, first: int, end: int) -> Linear:
    """Parts first..end of a weight packed of three."""
    width = linear.weight.shape[0] // 3
    rows = slice(first * width, end * width)
    return Linear(linear.weight[rows], None if linear.bias is None else linear.bias[rows])


def _norm(x: Tensor, norm: Norm) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), norm.weight, norm.bias, norm.eps)


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else x * scale


def _take(x: Tensor, index: Tensor | None) -> Tensor:
    """[rows, 1, width]: the token at `index` of every row, the first where there is none."""
    if index is None:
        return x[:, :1]
    return x.gather(1, index[:, None, None].expand(-1, 1, x.shape[2]))


def _causal(tokens: int, device: torch.device) -> Tensor:
    """[T, T] bool: a query sees itself and what stands before it."""
    return torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()


def _positions(index: Tensor | None, rows: int, device: torch.device) -> Tensor:
    return torch.zeros(rows, dtype=torch.int64, device=device) if index is None else index


def _moved(value: Any, device: torch.device | str, dtype: torch.dtype) -> Any:
    """A frozen dataclass tree with every tensor moved."""
    if isinstance(value, Tensor):
        return value.detach().to(device=device, dtype=dtype).contiguous()
    if isinstance(value, tuple):
        return tuple(_moved(item, device, dtype) for item in value)
    if isinstance(value, (Tower, Block, Norm, Linear)):
        return replace(value, **{f.name: _moved(getattr(value, f.name), device, dtype) for f in fields(value)})
    return value
