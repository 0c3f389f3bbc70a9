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
from fastdlp.kernels.frozen import frozen_linear
from fastdlp.sites import TowerShape

SITES_PER_BLOCK = 4  # qkv, out, fc1, fc2: the order of `sites.tower_sites`


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
        linear = _Linears(groups, adapters)
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            if i == last and self.pooled_only and self.pool != "avg":
                x = self._last_block(x, block, SITES_PER_BLOCK * i, linear, index)
            else:
                x = self._block(x, block, SITES_PER_BLOCK * i, linear)
        if self.norm_after_pool:
            x = _norm(self._pooled(x, index), self.ln_post)
        else:
            x = self._pooled(_norm(x, self.ln_post), index)
        return linear(x[:, None], self.proj, SITES_PER_BLOCK * len(self.blocks))[:, 0].float()

    def _pooled(self, x: Tensor, index: Tensor | None) -> Tensor:
        if x.shape[1] == 1:
            return x[:, 0]
        if self.pool == "avg":
            return x[:, 1:].mean(dim=1)
        return _take(x, index)[:, 0]

    def _block(self, x: Tensor, block: Block, site: int, linear: _Linears) -> Tensor:
        rows, tokens, width = x.shape
        qkv = linear(_norm(x, block.ln1), block.qkv, site)
        q, k, v = qkv.view(rows, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        a = attention(q, k, v, _causal(tokens, x.device) if self.causal else None)
        x = x + _scaled(linear(_joined(a), block.out, site + 1), block.ls1)
        return self._mlp(x, block, site, linear)

    def _last_block(self, x: Tensor, block: Block, site: int, linear: _Linears, index: Tensor | None) -> Tensor:
        """The block's value at the pooled token, [rows, 1, width]: keys and values of all, one query a row."""
        rows, tokens, width = x.shape
        h = _norm(x, block.ln1)
        q = linear(_take(h, index), _part(block.qkv, 0, 1), site, slice(0, 1))
        kv = linear(h, _part(block.qkv, 1, 3), site, slice(1, 3))
        q = q.view(rows, 1, self.heads, width // self.heads).transpose(1, 2)
        k, v = kv.view(rows, tokens, 2, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mask = None
        if self.causal and index is not None:
            mask = (torch.arange(tokens, device=x.device) <= index[:, None])[:, None, None, :]
        a = attention(q, k, v, mask)
        x = _take(x, index) + _scaled(linear(_joined(a), block.out, site + 1), block.ls1)
        return self._mlp(x, block, site, linear)

    def _mlp(self, x: Tensor, block: Block, site: int, linear: _Linears) -> Tensor:
        h = linear(_norm(x, block.ln2), block.fc1, site + 2)
        h = linear(ACTIVATIONS[self.activation](h), block.fc2, site + 3)
        return x + _scaled(h, block.ls2)


@dataclass(frozen=True)
class _Linears:
    """How this pass runs a frozen linear: with the active slots' adapters, or plainly where there are none."""

    groups: RowGroups | None
    adapters: Adapters | None

    def __call__(self, x: Tensor, linear: Linear, site: int, parts: slice = slice(None)) -> Tensor:
        """[rows, T, in] → [rows, T, out]; `site` and `parts` say which adapters belong to the weight."""
        rows, tokens, width = x.shape
        x = x.reshape(rows * tokens, width)
        if self.adapters is None or self.groups is None:
            return frozen_linear(x, linear.weight, linear.bias).view(rows, tokens, -1)
        A, B, c = self.adapters.site(site, parts)
        return dual_lora(x, linear.weight, linear.bias, A, B, c, self.groups.times(tokens)).view(rows, tokens, -1)


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


def _part(linear: Linear, first: int, end: int) -> Linear:
    """Parts first..end of a weight packed of three."""
    width = linear.weight.shape[0] // 3
    rows = slice(first * width, end * width)
    return Linear(linear.weight[rows], None if linear.bias is None else linear.bias[rows])


def _norm(x: Tensor, norm: Norm) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), norm.weight, norm.bias, norm.eps)


def _joined(heads: Tensor) -> Tensor:
    """[rows, heads, T, d] → [rows, T, heads · d]."""
    return heads.transpose(1, 2).flatten(2)


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


def _moved(value: Any, device: torch.device | str, dtype: torch.dtype) -> Any:
    """A frozen dataclass tree with every tensor moved."""
    if isinstance(value, Tensor):
        return value.detach().to(device=device, dtype=dtype).contiguous()
    if isinstance(value, tuple):
        return tuple(_moved(item, device, dtype) for item in value)
    if isinstance(value, (Tower, Block, Norm, Linear)):
        return replace(value, **{f.name: _moved(getattr(value, f.name), device, dtype) for f in fields(value)})
    return value
