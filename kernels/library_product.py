"""The products of `product.py` by the library: cuBLAS for the frozen one, baddbmm_ for the low-rank term."""

from __future__ import annotations

from torch import Tensor

from fastdlp.kernels.activation import KEPT
from fastdlp.kernels.frozen import FrozenLinear, frozen_linear, frozen_linear_backward
from fastdlp.kernels.groups import RowGroups
from fastdlp.kernels.low_rank import SiteAdapters


def library_forward(
    x: Tensor,
    linear: FrozenLinear,
    P: Tensor,
    site: SiteAdapters,
    groups: RowGroups,
    residual: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor | None]:
    """`product.forward_product`."""
    u = frozen_linear(x, linear.weight, linear.bias)
    parts, out, rank = site.parts, site.out, site.padded_rank
    for s0, s1, m0, m1, size in groups.runs:
        g0, g1 = s0 * groups.views, s1 * groups.views
        p, target = P[m0:m1].view(g1 - g0, size, parts, rank), u[m0:m1].view(g1 - g0, size, parts, out)
        for part in range(parts):
            target[:, :, part].baddbmm_(p[:, :, part], site.up[g0:g1, part * rank : (part + 1) * rank])
    if linear.activation == "none":
        return (u if residual is None else u + residual), None
    kept = KEPT[linear.activation]
    y = kept.value(kept.keep(u.clone() if keep else u))
    return (y if residual is None else y + residual), u if keep else None


def library_backward(
    dy: Tensor,
    weight: Tensor,
    Q: Tensor,
    site: SiteAdapters,
    groups: RowGroups,
    u: Tensor | None = None,
    activation: str = "none",
    dA: Tensor | None = None,
) -> Tensor:
    """`product.backward_product`; the only row tile holds all rows, so slot s leaves share s of dA."""
    dx = frozen_linear_backward(dy, weight)
    for s0, s1, m0, m1, size in groups.runs:
        shape = (s1 - s0, groups.views * size, -1)
        dx[m0:m1].view(shape).baddbmm_(Q[m0:m1].view(shape), site.down[s0:s1])
    if u is None:
        return dx
    kept = KEPT[activation].keep(u.clone())
    if dA is not None:
        h = KEPT[activation].value(kept)
        for s0, s1, m0, m1, size in groups.runs:
            by_slot = (s1 - s0, groups.views * size, -1)
            q = Q[m0:m1].view(by_slot)[:, :, : site.rank]
            dA[s0:s1, 0] = q.mT @ h[m0:m1].view(by_slot)
    return KEPT[activation].backward(dx, kept)
