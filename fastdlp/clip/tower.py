"""A frozen CLIP transformer tower, run over rows of many clients at once, each with its own adapters.

The weights are those of open_clip, in memory once for all clients; with adapters at B = 0 the features equal
`encode_image` / `encode_text`. A tower is split where the frozen part ends:

- the *stem* (patch embedding, class token, positions, ln_pre; or token embedding and positions) has no adapters, so it
  is computed once per image or prompt and cached;
- `Tower.features` runs the blocks, the final norm and the projection.

Exact savings, which tests can disable: text is cut to the longest prompt (under a causal mask later tokens do not
affect the end token), and the last block computes queries, output projection and MLP for the pooled token only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdlp.adapters.bank import Adapters
from fastdlp.adapters.branches import TowerShape
from fastdlp.clip.stem import map_tensors
from fastdlp.kernels.activation import ACTIVATIONS
from fastdlp.kernels.attention import attention, fits, self_attention
from fastdlp.kernels.dual_lora import Recompute, dual_lora_torch
from fastdlp.kernels.frozen import FrozenLinear, Norm, frozen_linear
from fastdlp.kernels.groups import RowGroups
from fastdlp.selection import Selection, backend_of

if TYPE_CHECKING:
    from fastdlp.kernels.half_blocks import AdaptedLinear, FoldedRows

SITES_PER_BLOCK = 4  # qkv, out, fc1, fc2: the order of `branches.tower_sites`


@dataclass(frozen=True)
class Block:
    """One pre-norm residual attention block; ls1, ls2 are LayerScale vectors [width] or None.

    qkv (three packed linears) and fc1 include the block's norms, fc1 also its activation.
    """

    qkv: FrozenLinear
    out: FrozenLinear
    ls1: Tensor | None
    fc1: FrozenLinear
    fc2: FrozenLinear
    ls2: Tensor | None

    @cached_property  # the same tensors in every call, because frozen products cache a layout per weight
    def q(self) -> FrozenLinear:
        """The queries' part of qkv."""
        return self._rows_of_qkv(slice(0, self.out.weight.shape[1]))

    @cached_property
    def kv(self) -> FrozenLinear:
        """The keys' and values' part of qkv."""
        return self._rows_of_qkv(slice(self.out.weight.shape[1], None))

    def _rows_of_qkv(self, rows: slice) -> FrozenLinear:
        bias = None if self.qkv.bias is None else self.qkv.bias[rows]
        return replace(self.qkv, weight=self.qkv.weight[rows], bias=bias)


@dataclass(frozen=True)
class Tower:
    """Frozen weights from the first block to the joint space.

    pool: "tok" the first token, "avg" the mean over patches (both images), or "index" one position per row
    (text: its end token). norm_after_pool: whether the final norm follows the pooling.
    """

    blocks: tuple[Block, ...]
    ln_post: Norm
    proj: FrozenLinear
    heads: int
    causal: bool
    pool: str
    norm_after_pool: bool = False
    pooled_only: bool = True  # the last block for the pooled token only; exact, disabled only by tests
    backend: str | Selection = "torch"  # of the adapted linears: "torch", "triton", or selected per unit

    @property
    def shape(self) -> TowerShape:
        fc1 = self.blocks[0].fc1.weight
        return TowerShape(len(self.blocks), fc1.shape[1], fc1.shape[0], self.proj.weight.shape[0])

    @property
    def activation(self) -> str:
        """ "quick_gelu", "gelu" or "gelu_tanh"."""
        return self.blocks[0].fc1.activation

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Tower:
        """The tower on another device or in another dtype."""

        def move(tensor: Tensor) -> Tensor:
            # The same tensor if nothing changes, because frozen products cache a layout per tensor.
            tensor = tensor.detach() if tensor.requires_grad else tensor
            return tensor.to(device=device, dtype=dtype).contiguous()

        return map_tensors(self, move)

    def features(
        self,
        x: Tensor,
        groups: RowGroups | None = None,
        adapters: Adapters | None = None,
        index: Tensor | None = None,
        normalize: bool = False,
    ) -> Tensor:
        """Features of the joint space.

        Args:
            x: [rows, T, width] output of the stem, sorted by group.
            groups: the grouping of the rows (one row is one image or prompt); required with adapters.
            adapters: the active slots' adapters, or None for the frozen tower.
            index: [rows] int64 pooled position of each row, for pool "index".
            normalize: L2-normalize the features.

        Returns:
            [rows, embed] fp32.
        """

        def linears(unit: str) -> _Linears:
            """The implementation of a unit: "attention" and "mlp" are the halves of a block, "last" the last block if
            it runs for the pooled token only, and "projection"."""
            if adapters is None or groups is None or backend_of(self.backend, unit, len(x)) != "triton":
                return _Linears(groups, adapters)
            return _FusedLinears(groups, adapters, adapters.folded(x.dtype))

        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            site = SITES_PER_BLOCK * i
            if i == last and self.pooled_only and self.pool != "avg":
                x = self._last_block(x, block, site, linears("last"), index)
            else:
                x = linears("attention").attention(x, block, site, self.heads, self.causal)
                x = linears("mlp").mlp(x, block, site)
        # The norm is row by row, so for one token of many it can follow the pooling in any model.
        norm: Norm | None = self.ln_post
        if self.pool == "avg" and not self.norm_after_pool:
            x, norm = F.layer_norm(x, (x.shape[-1],), self.ln_post.weight, self.ln_post.bias, self.ln_post.eps), None
        projection, pooled = linears("projection"), self._pooled(x, index)[:, None]
        x = projection(pooled, replace(self.proj, norm=norm), SITES_PER_BLOCK * len(self.blocks)).squeeze(1)
        return projection.normalized(x) if normalize else x.float()

    def _pooled(self, x: Tensor, index: Tensor | None) -> Tensor:
        if x.shape[1] == 1:
            return x.squeeze(1)
        if self.pool == "avg":
            return x[:, 1:].mean(dim=1)
        return _take(x, index)[:, 0]

    def _last_block(self, x: Tensor, block: Block, site: int, linears: _Linears, index: Tensor | None) -> Tensor:
        """The block's output at the pooled token, [rows, 1, width]: keys and values of all tokens, one query a row."""
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


@dataclass(frozen=True)
class _Linears:
    """Frozen linears and the halves of a block, with the active slots' adapters, if any, on the torch backend."""

    groups: RowGroups | None
    adapters: Adapters | None

    def __call__(
        self,
        x: Tensor,
        linear: FrozenLinear,
        site: int,
        parts: slice = slice(None),
        residual: Tensor | None = None,
    ) -> Tensor:
        """residual + φ(linear(norm(x))): [rows, T, in] → [rows, T, out]; `site` and `parts` of the adapters."""
        return self._recomputable(x, linear, site, parts, residual)[0]

    def attention(self, x: Tensor, block: Block, site: int, heads: int, causal: bool) -> Tensor:
        """x + attention(norm(x)): [rows, T, width] → the same shape."""
        return self.added(x, self_attention(self(x, block.qkv, site), heads, causal), block.out, site + 1, block.ls1)

    def mlp(self, x: Tensor, block: Block, site: int) -> Tensor:
        """x + mlp(norm(x)): [rows, T, width] → the same shape."""
        h, recompute = self._recomputable(x, block.fc1, site + 2)
        residual = x if block.ls2 is None else None
        y, _ = self._recomputable(h, block.fc2, site + 3, residual=residual, recompute=recompute)
        return y if block.ls2 is None else x + block.ls2 * y

    def normalized(self, x: Tensor) -> Tensor:
        """L2-normalized rows [rows, embed], fp32."""
        return F.normalize(x.float(), dim=-1)

    def added(self, x: Tensor, h: Tensor, linear: FrozenLinear, site: int, scale: Tensor | None) -> Tensor:
        """x + LayerScale · linear(h); without LayerScale the linear adds x."""
        if scale is None:
            return self(h, linear, site, residual=x)
        return x + scale * self(h, linear, site)

    def _recomputable(
        self,
        x: Tensor,
        linear: FrozenLinear,
        site: int,
        parts: slice = slice(None),
        residual: Tensor | None = None,
        recompute: Recompute | None = None,
    ) -> tuple[Tensor, Recompute | None]:
        """The output, and how the next linear recomputes it."""
        if self.groups is None or self.adapters is None:
            norm = linear.norm
            h = x if norm is None else F.layer_norm(x, (x.shape[-1],), norm.weight, norm.bias, norm.eps)
            y = frozen_linear(h.reshape(-1, h.shape[-1]), linear.weight, linear.bias)
            y = ACTIVATIONS[linear.activation](y).view(*x.shape[:-1], -1)
            return y if residual is None else residual + y, None
        rows = x.reshape(-1, x.shape[-1])
        if residual is not None:
            residual = residual.reshape(-1, residual.shape[-1])
        adapters, groups = self.adapters.site(site, parts), self.groups.times(x.shape[1])
        y, recompute = dual_lora_torch(rows, linear, *adapters, groups, residual, recompute)
        return y.view(*x.shape[:-1], -1), recompute


@dataclass(frozen=True)
class _FusedLinears(_Linears):
    """With the active slots' adapters, on the Triton backend."""

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
        return self._run(x, self._adapted(x, linear, site, parts), residual)

    def attention(self, x: Tensor, block: Block, site: int, heads: int, causal: bool) -> Tensor:
        from fastdlp.kernels.half_blocks import AttentionHalf

        tokens, width = x.shape[1:]
        if not fits(tokens, width // heads):
            return super().attention(x, block, site, heads, causal)
        qkv, out = self._adapted(x, block.qkv, site), self._adapted(x, block.out, site + 1)
        y = self._run(x, AttentionHalf(qkv, out, self.groups, heads, tokens, causal, block.ls1 is None))
        return y if block.ls1 is None else x + block.ls1 * y

    def mlp(self, x: Tensor, block: Block, site: int) -> Tensor:
        from fastdlp.kernels.half_blocks import MLPHalf

        fc1, fc2 = self._adapted(x, block.fc1, site + 2), self._adapted(x, block.fc2, site + 3)
        y = self._run(x, MLPHalf(fc1, fc2, block.ls2 is None))
        return y if block.ls2 is None else x + block.ls2 * y

    def normalized(self, x: Tensor) -> Tensor:
        from fastdlp.kernels.normalize import normalize

        return normalize(x)

    def _adapted(self, x: Tensor, linear: FrozenLinear, site: int, parts: slice = slice(None)) -> AdaptedLinear:
        from fastdlp.kernels.half_blocks import AdaptedLinear

        return AdaptedLinear(linear, self.adapters.span(site, parts), self.groups.times(x.shape[1]))

    def _run(self, x: Tensor, unit: Any, residual: Tensor | None = None) -> Tensor:
        from fastdlp.kernels.half_blocks import run

        residual = None if residual is None else residual.reshape(-1, residual.shape[-1])
        return run(x.reshape(-1, x.shape[-1]), unit, self.folded, residual).view(*x.shape[:-1], -1)


def _take(x: Tensor, index: Tensor | None) -> Tensor:
    """[rows, 1, width]: the token at `index` of every row, the first where there is none."""
    if index is None:
        return x[:, :1]
    return x.gather(1, index[:, None, None].expand(-1, 1, x.shape[2]))
