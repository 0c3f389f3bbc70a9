"""The ways to compute one dual-LoRA linear that `fastdlp bench kernels` compares, on the same operands.

Every client has 32 images in two views: its local rows see the adapter of rank 4, its global rows that of rank 2, as
in a FEDDLP step with both passes in one batch. The adapters stand at the size of the frozen product, so that an error
in them is seen; the gates stand at one, because PEFT has none.

A form is timed only after `error` found its outputs and gradients right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastdlp.adapters.branches import Branch
from fastdlp.kernels.dual_lora import dual_lora
from fastdlp.kernels.frozen import FrozenLinear, frozen_linear, frozen_linear_backward
from fastdlp.kernels.groups import RowGroups

BRANCHES = (Branch("local", 4, True), Branch("global", 2, False))  # in the order of the views and of the ranks
RANK = sum(branch.rank for branch in BRANCHES)
SEEN = RANK // len(BRANCHES)  # ranks that a row sees, on average
CHECKED = 1024  # rows of y and dX that are compared

Gradients = Sequence[Tensor]


@dataclass(frozen=True)
class Case:
    """One linear of a tower for a number of clients: `rows` a view of a client, `parts` adapters of `out` columns."""

    model: str
    linear: str
    clients: int
    rows: int
    parts: int
    out: int
    width: int
    bias: bool

    @property
    def all_rows(self) -> int:
        """M."""
        return self.clients * len(BRANCHES) * self.rows

    def count(self, which: str, itemsize: int, adapted: bool = True) -> tuple[int, int]:
        """FLOP and bytes that a pass cannot do without: "forward", "backward" or "both".

        Every operand is read once and every result written once; what a form keeps from forward to backward is its own
        affair. FLOP count the ranks that a row sees. Without `adapted`, those of the frozen product and of its dX.
        """
        if which == "both":
            passes = [self.count(p, itemsize, adapted) for p in ("forward", "backward")]
            return sum(flop for flop, _ in passes), sum(size for _, size in passes)
        m, n, k = self.all_rows, self.parts * self.out, self.width
        flop, size = 2 * m * n * k, itemsize * (m * k + n * k + m * n)
        if which == "forward" and self.bias:
            size += itemsize * n
        if adapted:
            products, adapters = (1, 1) if which == "forward" else (2, 2)
            flop += products * 2 * m * SEEN * (self.parts * k + n)
            size += adapters * 4 * self.clients * self.parts * RANK * (k + self.out)
            size += 0 if which == "forward" else itemsize * m * k  # x, for dA
        return flop, size

    def memory(self, itemsize: int) -> int:
        """Bytes that the hungriest form needs: PEFT's fp32 copy of x and results put together, or the augmented W."""
        m, n, k = self.all_rows, self.parts * self.out, self.width
        slot, groups = self.rows * len(BRANCHES), self.clients * len(BRANCHES)
        return itemsize * (m * (5 * k + 4 * n) + groups * n * (k + 32)) + 32 * slot * (k + n) + (1 << 30)


@dataclass(frozen=True)
class Operands:
    """x [M, K], dy [M, parts·N], weight, bias in the compute dtype; A, B, c as `dual_lora` takes them, fp32."""

    x: Tensor
    dy: Tensor
    weight: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    c: Tensor
    groups: RowGroups


@dataclass(frozen=True)
class Form:
    """One way to compute it. `backward` takes what `forward` returned and leaves it usable; None: forward only.

    `named` puts outputs and gradients into the operator's layout: y [M, parts·N], x [M, K], A, B and c, those it has.
    """

    name: str
    forward: Callable[[], Any]
    backward: Callable[[Any], Gradients] | None
    named: Callable[[Any, Gradients], dict[str, Tensor]]


def make_operands(case: Case, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Operands:
    """Random operands: x of size 1, W and A so that their products are too, B so that the LoRA term is."""
    g = torch.Generator(device).manual_seed(seed)
    slots, parts, out, width = case.clients, case.parts, case.out, case.width

    def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=g, dtype=dtype, device=device)

    c = torch.zeros(slots, len(BRANCHES), parts, RANK, device=device)
    B = randn(slots, parts, out, RANK)
    for view, (branch, columns) in enumerate(zip(BRANCHES, rank_columns())):
        c[:, view, :, columns] = branch.scale
        B[..., columns] /= branch.scale * math.sqrt(branch.rank)
    return Operands(
        x=randn(case.all_rows, width, dtype=dtype),
        dy=randn(case.all_rows, parts * out, dtype=dtype),
        weight=(randn(parts * out, width) / math.sqrt(width)).to(dtype),
        bias=randn(parts * out, dtype=dtype) if case.bias else None,
        A=randn(slots, parts, RANK, width) / math.sqrt(width),
        B=B,
        c=c,
        groups=RowGroups((case.rows,) * slots, len(BRANCHES)),
    )


def rank_columns() -> list[slice]:
    """Where each branch stands in the stacked rank."""
    ends = [sum(branch.rank for branch in BRANCHES[: i + 1]) for i in range(len(BRANCHES))]
    return [slice(end - branch.rank, end) for branch, end in zip(BRANCHES, ends)]


# -- what is right ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expected:
    """In fp64: gradients of A, B and c whole; y and dX, with and without adapters, at `rows` drawn at random."""

    rows: Tensor
    at_rows: dict[str, Tensor]
    whole: dict[str, Tensor]


def expected(o: Operands, checked: int = CHECKED) -> Expected:
    """The formula of `dual_lora` and of its gradients in fp64, group by group, at most `checked` rows of y and dX."""
    parts = o.A.shape[1]
    weight, A, B, c = o.weight.double(), o.A.double(), o.B.double(), o.c.double()
    bias = 0.0 if o.bias is None else o.bias.double()
    dA, dB, dc = torch.zeros_like(A), torch.zeros_like(B), torch.zeros_like(c)
    rows = torch.randperm(o.groups.rows, generator=torch.Generator().manual_seed(0))[:checked].sort().values
    found: dict[str, list[Tensor]] = {"y": [], "x": [], "frozen y": [], "frozen x": []}
    for slot, view, first, end in o.groups.groups():
        x, dy = o.x[first:end].double(), o.dy[first:end].double().view(end - first, parts, -1)
        up = B[slot] * c[slot, view][:, None]
        P = torch.einsum("mk,prk->mpr", x, A[slot])
        Q = torch.einsum("mpn,pnr->mpr", dy, up)
        T = torch.einsum("mpn,mpr->pnr", dy, P)
        dA[slot] += torch.einsum("mpr,mk->prk", Q, x)
        dB[slot] += T * c[slot, view][:, None]
        dc[slot, view] = (T * B[slot]).sum(1)
        here = (rows[(rows >= first) & (rows < end)] - first).to(x.device)
        y, dx = x[here] @ weight.T + bias, dy[here].flatten(1) @ weight
        found["frozen y"].append(y)
        found["frozen x"].append(dx)
        found["y"].append(y + torch.einsum("mpr,pnr->mpn", P[here], up).flatten(1))
        found["x"].append(dx + torch.einsum("mpr,prk->mk", Q[here], A[slot]))
    at_rows = {name: torch.cat(value) for name, value in found.items()}
    return Expected(rows.to(o.x.device), at_rows, {"A": dA, "B": dB, "c": dc})


def error(form: Form, o: Operands, right: Expected) -> float:
    """The largest ‖out − right‖ / ‖right‖ over the form's outputs and gradients; NaN where one is not finite.

    Memory that an output may be put into holds NaN before, lest unwritten rows show an earlier form's results.
    """
    _poison(o)
    outputs = form.forward()
    gradients = [] if form.backward is None else form.backward(outputs)
    worst = 0.0
    for name, tensor in form.named(outputs, gradients).items():
        if not math.isfinite(tensor.sum().item()):
            return math.nan
        out, value = (tensor, right.whole[name]) if name in right.whole else (tensor[right.rows], right.at_rows[name])
        worst = max(worst, ((out.double() - value).norm() / value.norm()).item())
    return worst


def _poison(o: Operands) -> None:
    """NaN into what the allocator will hand out for y and dX."""
    _held = [torch.full_like(o.dy, math.nan), torch.full_like(o.x, math.nan)]


# -- the forms ----------------------------------------------------------------------------------------------


def frozen(o: Operands) -> Form:
    """The frozen product alone, and its dX = dY W: the floor."""
    return Form(
        "frozen",
        lambda: frozen_linear(o.x, o.weight, o.bias),
        lambda y: [frozen_linear_backward(o.dy, o.weight)],
        lambda y, gradients: {"frozen y": y, "frozen x": gradients[0]},
    )


def ours(o: Operands, name: str, backend: str) -> Form:
    """`dual_lora` in one of its backends."""
    leaves = {"x": o.x, "A": o.A, "B": o.B, "c": o.c}
    leaves = {n: tensor.detach().requires_grad_() for n, tensor in leaves.items()}

    def forward() -> Tensor:
        return dual_lora(linear=FrozenLinear(o.weight, o.bias), groups=o.groups, backend=backend, **leaves)

    return Form(
        name,
        forward,
        lambda y: torch.autograd.grad(y, list(leaves.values()), o.dy, retain_graph=True),
        lambda y, gradients: {"y": y.detach(), **dict(zip(leaves, gradients))},
    )


def augmented(o: Operands) -> Form:
    """[x | P | 1] · [W | B' | b]ᵀ, one product of K + 16 (32 for three parts) a group; forward only.

    Not timed: the weight beside each group's B', made once a step, and x in the wide buffer, where its producer would
    put it. Timed: P = x Aᵀ into the buffer and the wide product.
    """
    slots, parts, rank, width = o.A.shape
    views, out, L = o.groups.views, o.B.shape[2], parts * rank
    dtype, device = o.x.dtype, o.x.device
    wide = width + -(-(L + 1) // 16) * 16
    x = torch.zeros(slots, len(o.x) // slots, wide, dtype=dtype, device=device)
    x[:, :, :width] = o.x.view(slots, -1, width)
    x[:, :, width + L] = 1
    weight = torch.zeros(slots, views, parts * out, wide, dtype=dtype, device=device)
    weight[..., :width] = o.weight
    up = o.B[:, None] * o.c[:, :, :, None, :]
    for part in range(parts):
        ranks = slice(width + part * rank, width + (part + 1) * rank)
        weight[:, :, part * out : (part + 1) * out, ranks] = up[:, :, part].to(dtype)
    if o.bias is not None:
        weight[..., width + L] = o.bias
    down = o.A.to(dtype).view(slots, L, width)

    def forward() -> Tensor:
        x[:, :, width : width + L] = torch.bmm(x[:, :, :width], down.transpose(1, 2))
        return torch.bmm(x.view(slots * views, -1, wide), weight.flatten(0, 1).transpose(1, 2))

    return Form("K-augmented", forward, None, lambda y, gradients: {"y": y.flatten(0, 1)})


def peft(o: Operands, name: str, cast: bool) -> Form:
    """PEFT's LoRA linear over the same frozen linear, one adapter pair a client, one client after another.

    A packed linear is three, as in Hugging Face's CLIP. `cast` holds the adapters in the dtype of the weights; PEFT by
    itself keeps them in fp32. It has no gate, so it has no gradient of c to compute.
    """
    slots, parts, out, _ = o.B.shape
    biases = [None] * parts if o.bias is None else o.bias.chunk(parts)
    bases = [_linear(weight, bias) for weight, bias in zip(o.weight.chunk(parts), biases)]
    xs, layers, upstream = [], [], []
    for slot, view, first, end in o.groups.groups():
        xs.append(o.x[first:end].detach().requires_grad_())
        for part, base in enumerate(bases):
            columns = rank_columns()[view]
            layers.append(_lora(base, BRANCHES[view], o.A[slot, part, columns], o.B[slot, part, :, columns], cast))
            upstream.append(o.dy[first:end, part * out : (part + 1) * out].contiguous())
    downs = [layer.lora_A["default"].weight for layer in layers]
    ups = [layer.lora_B["default"].weight for layer in layers]
    leaves = [*xs, *downs, *ups]

    def forward() -> list[Tensor]:
        return [layer(xs[i // parts]) for i, layer in enumerate(layers)]

    def named(outputs: list[Tensor], gradients: Gradients) -> dict[str, Tensor]:
        dA, dB = torch.zeros_like(o.A), torch.zeros_like(o.B)
        groups, rest = len(xs), iter(gradients[len(xs) :])
        sites = [(s, p, rank_columns()[v]) for s in range(slots) for v in range(o.groups.views) for p in range(parts)]
        for slot, part, columns in sites:
            dA[slot, part, columns] = next(rest).float()
        for slot, part, columns in sites:
            dB[slot, part, :, columns] = next(rest).float()
        y = [torch.cat(outputs[i * parts : (i + 1) * parts], 1).detach() for i in range(groups)]
        return {"y": torch.cat(y), "x": torch.cat(list(gradients[:groups])), "A": dA, "B": dB}

    return Form(name, forward, lambda y: torch.autograd.grad(y, leaves, upstream, retain_graph=True), named)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A frozen nn.Linear over tensors that exist already."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)  # type: ignore[assignment]
    return linear


def _lora(base: nn.Linear, branch: Branch, A: Tensor, B: Tensor, cast: bool) -> Any:
    """PEFT's layer around `base` with the adapter A [r, K], B [N, r]."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=branch.rank, lora_alpha=int(branch.lora_alpha), lora_dropout=0.0, target_modules=["0"])
    model: Any = get_peft_model(nn.Sequential(base), config, autocast_adapter_dtype=not cast)
    layer = model.base_model.model[0]
    layer.lora_A["default"].weight.data.copy_(A)
    layer.lora_B["default"].weight.data.copy_(B)
    return layer
