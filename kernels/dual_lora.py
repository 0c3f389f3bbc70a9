"""The operator of fastdlp: a frozen linear with a LoRA per group of rows.

    y = φ(n(x) Wᵀ + b + ((n(x) A_sᵀ) ⊙ c_g) B_sᵀ) + residual      for every row of group g, which belongs to slot s

n is a frozen LayerNorm, φ an activation; both and the residual are optional.

Rows are sorted: slot by slot, and within a slot one group per *view*, the set of branches applied to the row (local,
global or both). All views of a slot have the same number of rows. `A` and `B` concatenate the branches along the rank;
`c` [slots, views, parts, R] is scale · gate, and zero where a view does not include a branch. So gates and branch masks
never enter the large products (B' = B · diag(c) is computed once), a gate of zero still has a gradient, and a masked
branch gets exact zeros.

A linear may be *packed*: `parts` adapters over one weight of parts · N rows (q, k and v of attention).

Implementations:

- `dual_lora_reference`: the formula, group by group, differentiated by autograd. Slow.
- `dual_lora_torch`: library products with a manual backward. With P = x Aᵀ, B' = B · diag(c), T = dYᵀ P, Q = dY B':
      dX = dY W + Q A,   dA = Qᵀ X,   dB = T · diag(c),   dc = Σ_n B ⊙ T
  Consecutive slots of equal size are one batched product.
- `dual_lora_ops.py`, in Triton: the same backward in kernels that fuse the adapters into the frozen product, the norm
  into the product that computes P, and activation and residual into the epilogue. `half_blocks.py` also fuses across
  the linears of a transformer block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdlp.kernels import frozen
from fastdlp.kernels.activation import ACTIVATIONS, RECOMPUTABLE
from fastdlp.kernels.backend import choose_backend
from fastdlp.kernels.frozen import FrozenLinear, Norm, frozen_linear, frozen_linear_backward
from fastdlp.kernels.groups import RowGroups

LARGE = 1 << 19  # entries of a group's x from which oneDNN's product is faster


def dual_lora_reference(
    x: Tensor,
    linear: FrozenLinear,
    A: Tensor,
    B: Tensor,
    c: Tensor,
    groups: RowGroups,
    *,
    residual: Tensor | None = None,
) -> Tensor:
    """The formula as written. Arguments, shapes and errors as in `dual_lora`; gradients by autograd."""
    _check(x, linear, A, B, c, groups, residual)
    weight, bias, norm, activation = linear.weight, linear.bias, linear.norm, linear.activation
    if norm is not None:
        centered = x - x.mean(1, keepdim=True)
        x = centered / (centered.square().mean(1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias
    outputs = [x.new_zeros(0, weight.shape[0])]
    for slot, view, start, end in groups.groups():
        rows = x[start:end]
        y = F.linear(rows, weight, bias)
        delta = [
            ((rows @ A[slot, part].to(x.dtype).T) * c[slot, view, part].to(x.dtype)) @ B[slot, part].to(x.dtype).T
            for part in range(A.shape[1])
        ]
        outputs.append(y + torch.cat(delta, dim=1))
    y = torch.cat(outputs)
    y = y * torch.sigmoid(1.702 * y) if activation == "quick_gelu" else ACTIVATIONS[activation](y)
    return y if residual is None else y + residual


def dual_lora(
    x: Tensor,
    linear: FrozenLinear,
    A: Tensor,
    B: Tensor,
    c: Tensor,
    groups: RowGroups,
    *,
    residual: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Frozen linear plus every slot's LoRA, for all rows at once.

    Args:
        x: [M, K] rows sorted by group, in the compute dtype (fp64, fp32, bf16, fp16).
        linear: weight [parts·N, K] and bias [parts·N] or None in the dtype of x; the norm that is applied to x, if any;
            the activation of the sum of linear and LoRA: "none", "quick_gelu", "gelu" or "gelu_tanh".
        A: [slots, parts, R, K] down-projections, fp32 or the dtype of x.
        B: [slots, parts, N, R] up-projections.
        c: [slots, views, parts, R] rank-space scale (scale · gate · branch mask).
        groups: the grouping of the M rows.
        residual: [M, parts·N] added at the end, or None.
        backend: "torch", "triton" (a CUDA GPU, or Triton's interpreter for tests; not fp64), or "auto": Triton where
            its tiles were measured on that GPU's architecture, torch elsewhere.

    Returns:
        [M, parts·N] in the dtype of x. Gradients flow to x, A, B, c and residual; never to weight, bias or norm.

    Raises:
        ValueError: inconsistent shapes, dtypes or devices, or a backend that cannot run here.

    Products run in the dtype of x. With torch the gradients of A and B are accumulated in fp32 and rounded once to that
    dtype; Triton keeps them in fp32.
    """
    _check(x, linear, A, B, c, groups, residual)
    if choose_backend(backend, x.device, x.dtype, A.shape[1] * A.shape[2]) == "torch":
        return dual_lora_torch(x, linear, A, B, c, groups, residual)[0]
    from fastdlp.kernels.dual_lora_ops import dual_lora_fused

    return dual_lora_fused(x, linear, A, B, c, groups, residual)


@dataclass(frozen=True)
class Recompute:
    """How to recompute the output of an activation from what that saves, so that the next linear need not save it."""

    saved: Tensor  # see `activation.Recomputable`
    activation: str


def dual_lora_torch(
    x: Tensor,
    linear: FrozenLinear,
    A: Tensor,
    B: Tensor,
    c: Tensor,
    groups: RowGroups,
    residual: Tensor | None = None,
    recompute: Recompute | None = None,
) -> tuple[Tensor, Recompute | None]:
    """`dual_lora` on the torch backend, without its checks.

    Args:
        recompute: how the backward recomputes x; None: x is saved.

    Returns:
        The output, and the `recompute` of the next linear, if there is an activation.
    """
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, A, B, c, residual))
    y, u = DualLoRAFunction.apply(x, linear, A, B, c, groups, residual, recompute, save)
    return y, None if u is None else Recompute(u, linear.activation)


class DualLoRAFunction(torch.autograd.Function):
    """`dual_lora_torch`, with the backward of the module's docstring.

    Saves x or what it is recomputed from, the norm's two statistics per row, P, what φ saves, and the adapters. Outputs
    of norms and activations are recomputed: a pass over memory, where a product would be expensive.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        linear: FrozenLinear,
        A: Tensor,
        B: Tensor,
        c: Tensor,
        groups: RowGroups,
        residual: Tensor | None,
        recompute: Recompute | None,
        save: bool,
    ) -> tuple[Tensor, Tensor | None]:
        slots, parts, rank, width = A.shape
        out = B.shape[2]
        norm, phi = linear.norm, RECOMPUTABLE[linear.activation]
        h = x
        stats: list[Tensor] = []
        if norm is not None:
            h, *stats = torch.native_layer_norm(x, (width,), norm.weight, norm.bias, norm.eps)
        down = A.to(x.dtype).reshape(slots, parts * rank, width)
        up = _gated(B, c, x.dtype)
        u = frozen_linear(h, linear.weight, linear.bias)
        P = x.new_empty(groups.rows, parts * rank)
        for s0, s1, m0, m1, size in groups.runs:
            n, v = s1 - s0, groups.views
            p = P[m0:m1].view(n, v * size, parts * rank)
            torch.bmm(h[m0:m1].view(n, v * size, width), down[s0:s1].transpose(1, 2), out=p)
            p = p.view(n * v, size, parts, rank)
            target = u[m0:m1].view(n * v, size, parts, out)
            for part in range(parts):
                target[:, :, part].baddbmm_(p[:, :, part], up[s0:s1, :, part].flatten(0, 1))
        u = phi.saved(u)
        y = phi.value(u)
        if residual is not None:
            y.add_(residual)
        if not save:
            return y, None
        ctx.groups, ctx.linear, ctx.phi = groups, linear, phi
        ctx.phi_of_x = RECOMPUTABLE["none" if recompute is None else recompute.activation]
        ctx.set_materialize_grads(False)
        source, activated = x if recompute is None else recompute.saved, linear.activation != "none"
        ctx.save_for_backward(source, linear.weight, A, B, c, P, u if activated else None, *stats)
        if not activated:
            return y, None
        ctx.mark_non_differentiable(u)
        return y, u

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        source, weight, A, B, c, P, u, *stats = ctx.saved_tensors
        groups: RowGroups = ctx.groups
        norm: Norm | None = ctx.linear.norm
        slots, parts, rank, width = A.shape
        out = B.shape[2]
        if grads[0] is None:
            return (None,) * 9
        dy = grads[0].contiguous()
        du = dy if u is None else ctx.phi.backward(dy, u)
        down = A.to(dy.dtype).reshape(slots, parts * rank, width)
        up = _gated(B, c, dy.dtype)
        need_x = ctx.needs_input_grad[0]
        need_a, need_b, need_c = ctx.needs_input_grad[2:5]
        x = ctx.phi_of_x.value(source) if need_a or norm is not None else source
        h = x if norm is None or not need_a else F.layer_norm(x, (width,), norm.weight, norm.bias, norm.eps)

        dh = frozen_linear_backward(du, weight) if need_x else None
        # A slot without rows is in no run, so its gradients stay zero.
        dA = du.new_zeros(slots, parts * rank, width) if need_a else None
        T = du.new_zeros(slots, groups.views, parts, rank, out) if need_b or need_c else None
        for s0, s1, m0, m1, size in groups.runs:
            n, v = s1 - s0, groups.views
            g = du[m0:m1].view(n * v, size, parts, out)
            if T is not None:  # P's few columns on the left: dYᵀ P takes six times as long on a CPU
                t = _columns_by_rows(P[m0:m1].view(n * v, size, -1), g.flatten(2), parts)
                T[s0:s1] = t.view(n, v, parts, rank, out)
            Q = du.new_empty(n * v, size, parts, rank)
            for part in range(parts):
                if need_x or need_a:
                    Q[:, :, part] = torch.bmm(g[:, :, part], up[s0:s1, :, part].flatten(0, 1).mT)
            q = Q.view(n, v * size, parts * rank)
            if dA is not None:
                dA[s0:s1] = _columns_by_rows(q, h[m0:m1].view(n, v * size, width), 1)[:, 0]
            if dh is not None:
                dh[m0:m1].view(n, v * size, width).baddbmm_(q, down[s0:s1])

        dx = dh
        if dh is not None and norm is not None:
            frozen_norm = (norm.weight, norm.bias, [True, False, False])
            dx, _, _ = torch.ops.aten.native_layer_norm_backward(dh, x, (width,), *stats, *frozen_norm)
        dA_ = dA.view_as(A).to(A.dtype) if dA is not None else None
        dB_ = dc_ = None
        if T is not None:
            T = T.to(torch.promote_types(B.dtype, T.dtype))
            if need_b:
                dB_ = (T * c[..., None]).sum(1).mT.to(B.dtype)
            if need_c:
                dc_ = (T * B.mT[:, None]).sum(4).to(c.dtype)
        residual = dy if ctx.needs_input_grad[6] else None
        return dx, None, dA_, dB_, dc_, None, residual, None, None


def _columns_by_rows(p: Tensor, x: Tensor, parts: int) -> Tensor:
    """pᵀ x of every group and part: p [groups, M, parts · r], x [groups, M, parts · N] → [groups, parts, r, N].

    On a CPU large fp32 products of few columns use oneDNN, because they take five times as long in torch's library; it
    also computes the products of one part with another's columns, which are dropped.
    """
    if parts == 1 and not _large_on_cpu(x):
        return torch.bmm(p.mT, x)[:, None]
    p_parts, x_parts = p.unflatten(2, (parts, -1)), x.unflatten(2, (parts, -1))
    if _large_on_cpu(x):
        whole = torch.stack([frozen.product(own.T, rows.T) for own, rows in zip(p, x)])
        blocks = whole.view(len(p), parts, p_parts.shape[3], parts, x_parts.shape[3])
        return blocks.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
    return torch.stack([torch.bmm(p_parts[:, :, i].mT, x_parts[:, :, i]) for i in range(parts)], dim=1)


def _large_on_cpu(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.shape[1] * x.shape[2] >= LARGE and frozen.by_onednn(x)


def _gated(B: Tensor, c: Tensor, dtype: torch.dtype) -> Tensor:
    """(B · diag(c))ᵀ, one per view: [slots, views, parts, R, N], multiplied before it is rounded."""
    B_t = B.mT.contiguous() if B.device.type == "cpu" else B.mT  # makes the products four times as fast on a CPU
    return (B_t[:, None] * c[..., None]).to(dtype)


def _check(
    x: Tensor, linear: FrozenLinear, A: Tensor, B: Tensor, c: Tensor, groups: RowGroups, residual: Tensor | None
) -> None:
    bias, norm = linear.bias, linear.norm
    if x.ndim != 2 or A.ndim != 4 or B.ndim != 4 or c.ndim != 4:
        raise ValueError(
            "dual_lora: x must be [M, K], A [slots, parts, R, K], B [slots, parts, N, R], c [slots, views, parts, R]"
        )
    slots, parts, rank, width = A.shape
    out = B.shape[2]
    expected = {
        "x": (x, (groups.rows, width)),
        "A": (A, (slots, parts, rank, width)),
        "weight": (linear.weight, (parts * out, width)),
        "B": (B, (slots, parts, out, rank)),
        "c": (c, (slots, groups.views, parts, rank)),
    }
    if bias is not None:
        expected["bias"] = (bias, (parts * out,))
    if norm is not None:
        expected |= {"norm.weight": (norm.weight, (width,)), "norm.bias": (norm.bias, (width,))}
    if residual is not None:
        expected["residual"] = (residual, (groups.rows, parts * out))
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"dual_lora: {name} is {tuple(tensor.shape)}, expected {shape}")
        if tensor.device != x.device:
            raise ValueError(f"dual_lora: {name} is on {tensor.device}, x on {x.device}")
        if name in ("weight", "bias", "residual") and tensor.dtype != x.dtype:
            raise ValueError(f"dual_lora: {name} is {tensor.dtype}, x is {x.dtype}: cast one of them")
    if len(groups.sizes) != slots:
        raise ValueError(f"dual_lora: {len(groups.sizes)} slots in the row groups, {slots} in A")
    if linear.activation not in ACTIVATIONS:
        raise ValueError(f"dual_lora: unknown activation {linear.activation!r}: choose from {', '.join(ACTIVATIONS)}")
