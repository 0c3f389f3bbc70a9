"""The one operator of fastdlp: a frozen linear with a LoRA of its own for every group of rows.

    y = x Wᵀ + b + ((x A_sᵀ) ⊙ c_g) B_sᵀ          for every row of group g, which belongs to slot s

Rows are sorted: slot by slot, and within a slot one group per *view* (a view is the set of branches that
the row sees: local, global or both). All views of a slot have the same number of rows. `A` and `B` stack
the branches along the rank; `c` [slots, views, parts, R] holds scale · gate, and zero where a view does not see
a branch. So gates and branch masks never enter the large products (B' = B · diag(c) is made once), a gate at zero
still has a gradient, and a masked branch gets exact zeros.

A linear may be *packed*: `parts` adapters over one weight of parts · N rows (q, k and v of attention).

Two forms live here, one beside the other:

- `dual_lora_reference`: the formula, group by group, differentiated by autograd. Slow and obvious.
- `dual_lora`: the same with its own backward. With P = x Aᵀ, B' = B · diag(c), T = dYᵀ P, Q = dY B':
      dX = dY W + Q A,   dA = Qᵀ X,   dB = T · diag(c),   dc = Σ_n B ⊙ T
  Neighbouring slots with equally many rows go through one batched product.

Nothing here knows of clients, rounds or CLIP.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdlp.kernels.frozen import frozen_linear, frozen_linear_backward


@dataclass(frozen=True)
class RowGroups:
    """How the rows of a batch are split: `sizes[s]` rows in every view of slot s, `views` groups a slot."""

    sizes: tuple[int, ...]
    views: int = 1

    @cached_property
    def rows(self) -> int:
        """Rows in all: views · Σ sizes."""
        return self.views * sum(self.sizes)

    @cached_property
    def runs(self) -> tuple[tuple[int, int, int, int, int], ...]:
        """Neighbouring slots of one size, as (first slot, end slot, first row, end row, size); none is empty."""
        runs: list[tuple[int, int, int, int, int]] = []
        row = slot = 0
        while slot < len(self.sizes):
            size, end = self.sizes[slot], slot
            while end < len(self.sizes) and self.sizes[end] == size:
                end += 1
            rows = (end - slot) * self.views * size
            if rows:
                runs.append((slot, end, row, row + rows, size))
            row, slot = row + rows, end
        return tuple(runs)

    def times(self, tokens: int) -> RowGroups:
        """The same groups where every row has become `tokens` rows."""
        return self if tokens == 1 else RowGroups(tuple(n * tokens for n in self.sizes), self.views)

    def groups(self) -> Iterator[tuple[int, int, int, int]]:
        """Every group as (slot, view, first row, end row)."""
        row = 0
        for slot, size in enumerate(self.sizes):
            for view in range(self.views):
                yield slot, view, row, row + size
                row += size


def dual_lora_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, c: Tensor, groups: RowGroups
) -> Tensor:
    """The formula, literally. Arguments, shapes and errors as in `dual_lora`; gradients by autograd."""
    _check(x, weight, bias, A, B, c, groups)
    outputs = [x.new_zeros(0, weight.shape[0])]
    for slot, view, start, end in groups.groups():
        rows = x[start:end]
        y = F.linear(rows, weight, bias)
        delta = [
            ((rows @ A[slot, part].to(x.dtype).T) * c[slot, view, part].to(x.dtype)) @ B[slot, part].to(x.dtype).T
            for part in range(A.shape[1])
        ]
        outputs.append(y + torch.cat(delta, dim=1))
    return torch.cat(outputs)


def dual_lora(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, c: Tensor, groups: RowGroups
) -> Tensor:
    """Frozen linear plus every slot's LoRA, for all rows at once.

    Args:
        x: [M, K] rows sorted by group, in the compute dtype (fp64, fp32, bf16, fp16).
        weight: [parts·N, K], frozen, the dtype of x.
        bias: [parts·N] or None.
        A: [slots, parts, R, K] down-projections, fp32 or the dtype of x.
        B: [slots, parts, N, R] up-projections.
        c: [slots, views, parts, R] rank-space scale (scale · gate · branch mask).
        groups: the split of the M rows.

    Returns:
        [M, parts·N] in the dtype of x. Gradients flow to x, A, B and c; never to weight or bias.

    Raises:
        ValueError: shapes that do not fit each other.

    Products run in the dtype of x, so in bf16 the gradients of A and B are sums accumulated in fp32 and
    rounded once to bf16, then returned in the dtype of A and B.
    """
    _check(x, weight, bias, A, B, c, groups)
    return DualLoRAFunction.apply(x, weight, bias, A, B, c, groups)


class DualLoRAFunction(torch.autograd.Function):
    """`dual_lora` with the backward of the module's docstring. Saves x, P and the adapters; nothing of size N."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        c: Tensor,
        groups: RowGroups,
    ) -> Tensor:
        slots, parts, rank, width = A.shape
        out = B.shape[2]
        down = A.to(x.dtype).reshape(slots, parts * rank, width)
        up = _gated(B, c, x.dtype)
        y = frozen_linear(x, weight, bias)
        P = x.new_empty(groups.rows, parts * rank)
        for s0, s1, m0, m1, size in groups.runs:
            n, v = s1 - s0, groups.views
            p = P[m0:m1].view(n, v * size, parts * rank)
            torch.bmm(x[m0:m1].view(n, v * size, width), down[s0:s1].transpose(1, 2), out=p)
            p = p.view(n * v, size, parts, rank)
            target = y[m0:m1].view(n * v, size, parts, out)
            for part in range(parts):
                target[:, :, part].baddbmm_(p[:, :, part], up[s0:s1, :, part].flatten(0, 1).transpose(1, 2))
        ctx.groups = groups
        ctx.save_for_backward(x, weight, A, B, c, P)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, B, c, P = ctx.saved_tensors
        groups: RowGroups = ctx.groups
        (dy,) = grads
        dy = dy.contiguous()
        slots, parts, rank, width = A.shape
        out = B.shape[2]
        down = A.to(x.dtype).reshape(slots, parts * rank, width)
        up = _gated(B, c, x.dtype)
        need_x = ctx.needs_input_grad[0]
        need_a, need_b, need_c = ctx.needs_input_grad[3:6]

        dx = frozen_linear_backward(dy, weight) if need_x else None
        # A slot without rows is in no run, so its gradients stay exact zeros.
        dA = x.new_zeros(slots, parts * rank, width) if need_a else None
        T = x.new_zeros(slots, groups.views, parts, out, rank) if need_b or need_c else None
        for s0, s1, m0, m1, size in groups.runs:
            n, v = s1 - s0, groups.views
            g = dy[m0:m1].view(n * v, size, parts, out)
            p = P[m0:m1].view(n * v, size, parts, rank)
            Q = x.new_empty(n * v, size, parts, rank)
            for part in range(parts):
                if need_x or need_a:
                    Q[:, :, part] = torch.bmm(g[:, :, part], up[s0:s1, :, part].flatten(0, 1))
                if T is not None:
                    t = torch.bmm(g[:, :, part].transpose(1, 2), p[:, :, part])
                    T[s0:s1, :, part] = t.view(n, v, out, rank)
            q = Q.view(n, v * size, parts * rank)
            if dA is not None:
                torch.bmm(q.transpose(1, 2), x[m0:m1].view(n, v * size, width), out=dA[s0:s1])
            if dx is not None:
                dx[m0:m1].view(n, v * size, width).baddbmm_(q, down[s0:s1])

        dA_ = dA.view_as(A).to(A.dtype) if dA is not None else None
        dB_ = dc_ = None
        if T is not None:
            T = T.to(torch.promote_types(B.dtype, T.dtype))
            if need_b:
                dB_ = (T * c[:, :, :, None, :]).sum(1).to(B.dtype)
            if need_c:
                dc_ = (T * B[:, None]).sum(3).to(c.dtype)
        return dx, None, None, dA_, dB_, dc_, None


def _gated(B: Tensor, c: Tensor, dtype: torch.dtype) -> Tensor:
    """B' = B · diag(c), one per view: [slots, views, parts, N, R], multiplied before it is rounded."""
    return (B[:, None] * c[:, :, :, None, :]).to(dtype)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, c: Tensor, groups: RowGroups) -> None:
    if x.ndim != 2 or A.ndim != 4 or B.ndim != 4 or c.ndim != 4:
        raise ValueError(
            "dual_lora: x must be [M, K], A [slots, parts, R, K], B [slots, parts, N, R], c [slots, views, parts, R]"
        )
    slots, parts, rank, width = A.shape
    out = B.shape[2]
    expected = {
        "x": (x, (groups.rows, width)),
        "weight": (weight, (parts * out, width)),
        "B": (B, (slots, parts, out, rank)),
        "c": (c, (slots, groups.views, parts, rank)),
    }
    if bias is not None:
        expected["bias"] = (bias, (parts * out,))
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"dual_lora: {name} is {tuple(tensor.shape)}, expected {shape}")
    if len(groups.sizes) != slots:
        raise ValueError(f"dual_lora: {len(groups.sizes)} slots in the row groups, {slots} in A")
