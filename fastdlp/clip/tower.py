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

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdlp.adapters.bank import Adapters
from fastdlp.adapters.branches import TowerShape
from fastdlp.clip.stem import map_tensors
from fastdlp.kernels.activation import ACTIVATIONS
from fastdlp.kernels.attention import attention, fits, self_attention
from fastdlp.kernels.dual_lora import Recompute, dual_lora_recomputing
from fastdlp.kernels.frozen import FrozenLinear, Norm, frozen_linear
from fastdlp.kernels.groups import RowGroups
from fastdlp.selection import Selection, form_of

if TYPE_CHECKING:
    from fastdlp.kernels.half_blocks import FoldedRows, Span

SITES_PER_BLOCK = 4  # qkv, out, fc1, fc2: the order of `sites.tower_sites`


@dataclass(frozen=True)
class Block:
    """One pre-norm residual attention block; ls1, ls2 are LayerScale vectors [width] or None.

    qkv (packed of three) and fc1 have the block's norms in front of them, fc1 its activation behind it.
    """

    qkv: FrozenLinear
    out: FrozenLinear
    ls1: Tensor | None
    fc1: FrozenLinear
    fc2: FrozenLinear
    ls2: Tensor | None

    @cached_property  # one tensor permanently, because a frozen product keeps a layout of its weight
    def q(self) -> FrozenLinear:
        """The queries' part of qkv."""
        return _part(self.qkv, 0, 1)

    @cached_property
    def kv(self) -> FrozenLinear:
        """The keys' and values' part of qkv."""
        return _part(self.qkv, 1, 3)


def _part(linear: FrozenLinear, first: int, end: int) -> FrozenLinear:
    """Parts first..end of a weight packed of three."""
    width = linear.weight.shape[0] // 3
    rows = slice(first * width, end * width)
    bias = None if linear.bias is None else linear.bias[rows]
    return replace(linear, weight=linear.weight[rows], bias=bias)


@dataclass(frozen=True)
class Tower:
    """Frozen weights from the first block to the joint space.

    pool: "tok" the first token, "avg" the mean over patches (both images), or "index" one position per row
    (text: its end token). norm_after_pool says on which side of the pooling the final norm stands.
    """

    blocks: tuple[Block, ...]
    ln_post: Norm
    proj: FrozenLinear
    heads: int
    causal: bool
    pool: str
    norm_after_pool: bool = False
    pooled_only: bool = True  # the last block for the pooled token only; exact, off only to be compared
    backend: str | Selection = "torch"  # form of the adapted linears: "torch", "triton", or chosen for every unit

    @property
    def shape(self) -> TowerShape:
        fc1 = self.blocks[0].fc1.weight
        return TowerShape(len(self.blocks), fc1.shape[1], fc1.shape[0], self.proj.weight.shape[0])

    @property
    def activation(self) -> str:
        """ "quick_gelu", "gelu" or "gelu_tanh"."""
        return self.blocks[0].fc1.activation

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Tower:
        """The same tower elsewhere."""

        def move(tensor: Tensor) -> Tensor:
            # The same tensor where nothing changes: a frozen product's layout is kept for a tensor.
            tensor = tensor.detach() if tensor.requires_grad else tensor
            return tensor.to(device=device, dtype=dtype).contiguous()

        return map_tensors(self, move)

    def features(
        self,
        x: Tensor,
        groups: RowGroups | None = None,
        adapters: Adapters | None = None,
        index: Tensor | None = None,
    ) -> Tensor:
        """Features of the joint space, before normalization.

        Args:
            x: [rows, T, width] tokens behind the stem, sorted by group.
            groups: the split of the rows (one row is one image or prompt); needed with adapters.
            adapters: the active slots' adapters, or None for the frozen tower.
            index: [rows] int64 pooled position of each row, for pool "index".

        Returns:
            [rows, embed] fp32.
        """
        return self._joint(x, groups, adapters, index)[0].float()

    def unit_features(
        self,
        x: Tensor,
        groups: RowGroups | None = None,
        adapters: Adapters | None = None,
        index: Tensor | None = None,
    ) -> Tensor:
        """`features`, normalized to length one."""
        features, linears = self._joint(x, groups, adapters, index)
        return linears.normalized(features)

    def _joint(
        self, x: Tensor, groups: RowGroups | None, adapters: Adapters | None, index: Tensor | None
    ) -> tuple[Tensor, _Linears]:
        """Features in the tower's dtype, and what ran the projection."""

        def linears(unit: str) -> _Linears:
            """What runs a unit that takes x: "attention" and "mlp" are the halves of a block, "last" the last block
            where it runs for the pooled token alone, and "projection"."""
            if adapters is None or groups is None:
                return _Linears()
            if form_of(self.backend, unit, len(x)) == "triton":
                return _FusedLinears(groups, adapters, adapters.folded(x.dtype))
            return _AdaptedLinears(groups, adapters)

        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            site = SITES_PER_BLOCK * i
            if i == last and self.pooled_only and self.pool != "avg":
                x = self._last_block(x, block, site, linears("last"), index)
            else:
                x = linears("attention").attention(x, block, site, self.heads, self.causal)
                x = linears("mlp").mlp(x, block, site)
        # The norm is row by row, so for one token of many it goes behind the pooling whatever the model's order.
        norm: Norm | None = self.ln_post
        if self.pool == "avg" and not self.norm_after_pool:
            x, norm = F.layer_norm(x, (x.shape[-1],), self.ln_post.weight, self.ln_post.bias, self.ln_post.eps), None
        projection, pooled = linears("projection"), self._pooled(x, index)[:, None]
        x = projection(pooled, replace(self.proj, norm=norm), SITES_PER_BLOCK * len(self.blocks))
        return x.squeeze(1), projection

    def _pooled(self, x: Tensor, index: Tensor | None) -> Tensor:
        if x.shape[1] == 1:
            return x.squeeze(1)
        if self.pool == "avg":
            return x[:, 1:].mean(dim=1)
        return _take(x, index)[:, 0]

    def _last_block(self, x: Tensor, block: Block, site: int, linears: _Linears, index: Tensor | None) -> Tensor:
        """The block's value at the pooled token, [rows, 1, width]: keys and values of all, one query a row."""
        rows, tokens, width = x.shape
        pooled = _take(x, index)
        q = linears(pooled, block.q, site, slice(0, 1))
        kv = linears(x, block.kv, site, slice(1, 3))
        q = q.view(rows, 1, self.heads, width // self.heads).transpose(1, 2)
        k, v = kv.view(rows, tokens, 2, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mask = None
        if self.causal and index is not None:
            mask = (torch.arange(tokens, device=x.device) <= index[:, None])[:, None, None, :]
        a = attention(q, k, v, mask)
        x = linears.added(pooled, a.transpose(1, 2).flatten(2), block.out, site + 1, block.ls1)
        return linears.mlp(x, block, site)


class _Linears:
    """How a pass runs a frozen linear and the halves of a block: here, without adapters."""

    def __call__(
        self,
        x: Tensor,
        linear: FrozenLinear,
        site: int,
        parts: slice = slice(None),
        residual: Tensor | None = None,
    ) -> Tensor:
        """residual + φ(linear(norm(x))): [rows, T, in] → [rows, T, out]; `site`, `parts`: which adapters."""
        norm = linear.norm
        h = x if norm is None else F.layer_norm(x, (x.shape[-1],), norm.weight, norm.bias, norm.eps)
        y = frozen_linear(h.reshape(-1, h.shape[-1]), linear.weight, linear.bias)
        y = ACTIVATIONS[linear.activation](y).view(*x.shape[:-1], -1)
        return y if residual is None else residual + y

    def attention(self, x: Tensor, block: Block, site: int, heads: int, causal: bool) -> Tensor:
        """x + attention(norm(x)): [rows, T, width] → the same shape."""
        a = self_attention(self(x, block.qkv, site), heads, causal=causal, backend="torch")
        return self.added(x, a, block.out, site + 1, block.ls1)

    def mlp(self, x: Tensor, block: Block, site: int) -> Tensor:
        """x + mlp(norm(x)): [rows, T, width] → the same shape."""
        return self.added(x, self(x, block.fc1, site + 2), block.fc2, site + 3, block.ls2)

    def normalized(self, x: Tensor) -> Tensor:
        """Rows [rows, embed] of length one, fp32."""
        return F.normalize(x.float(), dim=-1)

    def added(self, x: Tensor, h: Tensor, linear: FrozenLinear, site: int, scale: Tensor | None) -> Tensor:
        """x + LayerScale · linear(h); one kernel adds where there is no LayerScale."""
        if scale is None:
            return self(h, linear, site, residual=x)
        return x + scale * self(h, linear, site)


@dataclass(frozen=True)
class _AdaptedLinears(_Linears):
    """With the active slots' adapters, in the torch form."""

    groups: RowGroups
    adapters: Adapters

    def __call__(
        self,
        x: Tensor,
        linear: FrozenLinear,
        site: int,
        parts: slice = slice(None),
        residual: Tensor | None = None,
    ) -> Tensor:
        return self._recomputing(x, linear, site, parts, residual)[0]

    def mlp(self, x: Tensor, block: Block, site: int) -> Tensor:
        h, recompute = self._recomputing(x, block.fc1, site + 2)
        y, _ = self._recomputing(h, block.fc2, site + 3, slice(None), x if block.ls2 is None else None, recompute)
        return y if block.ls2 is None else x + block.ls2 * y

    def _recomputing(
        self,
        x: Tensor,
        linear: FrozenLinear,
        site: int,
        parts: slice = slice(None),
        residual: Tensor | None = None,
        recompute: Recompute | None = None,
    ) -> tuple[Tensor, Recompute | None]:
        """What a call gives, and how the next linear recomputes it."""
        rows, tokens, width = x.shape
        y, behind = dual_lora_recomputing(
            x.reshape(rows * tokens, width),
            linear,
            *self.adapters.site(site, parts),
            self.groups.times(tokens),
            residual=None if residual is None else residual.reshape(rows * tokens, -1),
            backend="torch",
            made=recompute,
        )
        return y.view(rows, tokens, -1), behind


@dataclass(frozen=True)
class _FusedLinears(_Linears):
    """With the active slots' adapters, in the Triton form."""

    groups: RowGroups
    adapters: Adapters
    folded: FoldedRows

    def __call__(
        self,
        x: Tensor,
        linear: FrozenLinear,
        site: int,
        parts: slice = slice(None),
        residual: Tensor | None = None,
    ) -> Tensor:
        from fastdlp.kernels import half_blocks

        tokens, flat = x.shape[1], x.reshape(-1, x.shape[-1])
        skip = None if residual is None else residual.reshape(len(flat), -1)
        span = self.adapters.span(site, parts)
        y = half_blocks.linear(flat, linear, self.folded, span, self.groups.times(tokens), skip)
        return y.view(*x.shape[:-1], -1)

    def attention(self, x: Tensor, block: Block, site: int, heads: int, causal: bool) -> Tensor:
        from fastdlp.kernels import half_blocks

        rows, tokens, width = x.shape
        if not fits(tokens, width // heads):
            return super().attention(x, block, site, heads, causal)
        how, skip = half_blocks.Heads(heads, tokens, causal), block.ls1 is None
        flat = x.reshape(rows * tokens, width)
        spans = self._spans(site, site + 1)
        y = half_blocks.attention_half(flat, block.qkv, block.out, how, self.folded, spans, self.groups, skip)
        return y.view_as(x) if skip else x + block.ls1 * y.view_as(x)

    def mlp(self, x: Tensor, block: Block, site: int) -> Tensor:
        from fastdlp.kernels import half_blocks

        flat, skip = x.reshape(-1, x.shape[-1]), block.ls2 is None
        groups, spans = self.groups.times(x.shape[1]), self._spans(site + 2, site + 3)
        y = half_blocks.mlp_half(flat, block.fc1, block.fc2, self.folded, spans, groups, skip)
        return y.view_as(x) if skip else x + block.ls2 * y.view_as(x)

    def normalized(self, x: Tensor) -> Tensor:
        from fastdlp.kernels.normalize import normalize

        return normalize(x)

    def _spans(self, first: int, second: int) -> tuple[Span, Span]:
        return self.adapters.span(first), self.adapters.span(second)


def _take(x: Tensor, index: Tensor | None) -> Tensor:
    """[rows, 1, width]: the token at `index` of every row, the first where there is none."""
    if index is None:
        return x[:, :1]
    return x.gather(1, index[:, None, None].expand(-1, 1, x.shape[2]))
