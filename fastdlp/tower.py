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
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdlp.bank import Adapters
from fastdlp.kernels.activation import ACTIVATIONS
from fastdlp.kernels.attention import attention, self_attention
from fastdlp.kernels.dual_lora import Norm, Recompute, RowGroups, dual_lora_recomputing
from fastdlp.kernels.frozen import frozen_linear
from fastdlp.sites import TowerShape

SITES_PER_BLOCK = 4  # qkv, out, fc1, fc2: the order of `sites.tower_sites`


@dataclass(frozen=True)
class Linear:
    """Frozen weight [out, in] and bias [out] or None."""

    weight: Tensor
    bias: Tensor | None

    def part(self, first: int, end: int) -> Linear:
        """Parts first..end of a weight packed of three."""
        width = self.weight.shape[0] // 3
        rows = slice(first * width, end * width)
        return Linear(self.weight[rows], None if self.bias is None else self.bias[rows])


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

    @cached_property  # one tensor for good, because a frozen product keeps a layout of its weight
    def q(self) -> Linear:
        """The queries' part of qkv."""
        return self.qkv.part(0, 1)

    @cached_property
    def kv(self) -> Linear:
        """The keys' and values' part of qkv."""
        return self.qkv.part(1, 3)


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
    backend: str = "torch"  # form of the adapted linears: "torch" or "triton"

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
        linear = _Linears(groups, adapters, self.backend)
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            if i == last and self.pooled_only and self.pool != "avg":
                x = self._last_block(x, block, SITES_PER_BLOCK * i, linear, index)
            else:
                x = self._block(x, block, SITES_PER_BLOCK * i, linear)
        # The norm is row by row, so for one token of many it goes behind the pooling whatever the model's order.
        norm = self.ln_post
        if self.pool == "avg" and not self.norm_after_pool:
            x, norm = F.layer_norm(x, (x.shape[-1],), norm.weight, norm.bias, norm.eps), None
        x = linear(self._pooled(x, index)[:, None], self.proj, SITES_PER_BLOCK * len(self.blocks), norm=norm)
        return x[:, 0].float()

    def _pooled(self, x: Tensor, index: Tensor | None) -> Tensor:
        if x.shape[1] == 1:
            return x[:, 0]
        if self.pool == "avg":
            return x[:, 1:].mean(dim=1)
        return _take(x, index)[:, 0]

    def _block(self, x: Tensor, block: Block, site: int, linear: _Linears) -> Tensor:
        tokens = x.shape[1]
        qkv = linear(x, block.qkv, site, norm=block.ln1)
        a = self_attention(qkv, self.heads, _causal(tokens, x.device) if self.causal else None)
        x = _added(x, linear, a, block.out, site + 1, block.ls1)
        return self._mlp(x, block, site, linear)

    def _last_block(self, x: Tensor, block: Block, site: int, linear: _Linears, index: Tensor | None) -> Tensor:
        """The block's value at the pooled token, [rows, 1, width]: keys and values of all, one query a row."""
        rows, tokens, width = x.shape
        pooled = _take(x, index)
        q = linear(pooled, block.q, site, slice(0, 1), norm=block.ln1)
        kv = linear(x, block.kv, site, slice(1, 3), norm=block.ln1)
        q = q.view(rows, 1, self.heads, width // self.heads).transpose(1, 2)
        k, v = kv.view(rows, tokens, 2, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mask = None
        if self.causal and index is not None:
            mask = (torch.arange(tokens, device=x.device) <= index[:, None])[:, None, None, :]
        a = attention(q, k, v, mask)
        x = _added(pooled, linear, a.transpose(1, 2).flatten(2), block.out, site + 1, block.ls1)
        return self._mlp(x, block, site, linear)

    def _mlp(self, x: Tensor, block: Block, site: int, linear: _Linears) -> Tensor:
        h, made = linear.recomputing(x, block.fc1, site + 2, norm=block.ln2, activation=self.activation)
        return _added(x, linear, h, block.fc2, site + 3, block.ls2, made)


@dataclass(frozen=True)
class _Linears:
    """How this pass runs a frozen linear: with the active slots' adapters, or plainly where there are none."""

    groups: RowGroups | None
    adapters: Adapters | None
    backend: str

    def __call__(
        self,
        x: Tensor,
        linear: Linear,
        site: int,
        parts: slice = slice(None),
        norm: Norm | None = None,
        residual: Tensor | None = None,
        made: Recompute | None = None,
    ) -> Tensor:
        """residual + linear(norm(x)): [rows, T, in] → [rows, T, out]; `site`, `parts`: which adapters."""
        return self.recomputing(x, linear, site, parts, norm, "none", residual, made)[0]

    def recomputing(
        self,
        x: Tensor,
        linear: Linear,
        site: int,
        parts: slice = slice(None),
        norm: Norm | None = None,
        activation: str = "none",
        residual: Tensor | None = None,
        made: Recompute | None = None,
    ) -> tuple[Tensor, Recompute | None]:
        """residual + φ(linear(norm(x))), and how the next linear makes it again."""
        rows, tokens, width = x.shape
        x = x.reshape(rows * tokens, width)
        skip = None if residual is None else residual.reshape(rows * tokens, -1)
        remade = None
        if self.adapters is None or self.groups is None:
            h = x if norm is None else F.layer_norm(x, (width,), norm.weight, norm.bias, norm.eps)
            y = ACTIVATIONS[activation](frozen_linear(h, linear.weight, linear.bias))
            y = y if skip is None else skip + y
        else:
            A, B, c = self.adapters.site(site, parts)
            y, remade = dual_lora_recomputing(
                x,
                linear.weight,
                linear.bias,
                A,
                B,
                c,
                self.groups.times(tokens),
                norm=norm,
                activation=activation,
                residual=skip,
                backend=self.backend,
                made=made,
            )
        return y.view(rows, tokens, -1), remade


def _added(
    x: Tensor,
    linear: _Linears,
    h: Tensor,
    weights: Linear,
    site: int,
    scale: Tensor | None,
    made: Recompute | None = None,
) -> Tensor:
    """x + LayerScale · linear(h); one kernel adds where there is no LayerScale."""
    if scale is None:
        return linear(h, weights, site, residual=x, made=made)
    return x + scale * linear(h, weights, site, made=made)


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
        # The same tensor where nothing changes: a frozen product's layout is kept for a tensor.
        value = value.detach() if value.requires_grad else value
        return value.to(device=device, dtype=dtype).contiguous()
    if isinstance(value, tuple):
        return tuple(_moved(item, device, dtype) for item in value)
    if isinstance(value, (Tower, Block, Norm, Linear)):
        return replace(value, **{f.name: _moved(getattr(value, f.name), device, dtype) for f in fields(value)})
    return value
