"""The operator on every linear of an image tower, in both backends, beside the frozen product alone and PEFT's LoRA.

Every client has 32 images in two views, as in a FEDDLP step: its local rows see the adapter of rank 4, its global rows
that of rank 2. Adapters have the magnitude of the frozen product, so that an error in them is found. No backend is
timed before its outputs and gradients agreed with fp64 on the same operands.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from fastdlp.adapters.branches import Branch, TowerShape, tower_sites
from fastdlp.bench import common
from fastdlp.bench.common import Progress, measure, survive
from fastdlp.engine.device import DTYPES
from fastdlp.errors import FastdlpError
from fastdlp.kernels.backend import choose_backend
from fastdlp.kernels.dual_lora import dual_lora, dual_lora_reference
from fastdlp.kernels.frozen import FrozenLinear, frozen_linear, frozen_linear_backward
from fastdlp.kernels.groups import RowGroups

TOLERANCE = {"fp32": 5e-5, "bf16": 2e-2}  # of ‖out − right‖ / ‖right‖; TF32 would be 3e-4
LINEARS = ("qkv", "out", "fc1", "fc2", "proj")
BRANCHES = (Branch("local", 4, True), Branch("global", 2, False))  # in the order of the views and of the ranks
COLUMNS = (slice(0, 4), slice(4, 6))  # of each branch in the stacked rank
RANK = 6


@dataclass(frozen=True)
class ImageTower:
    """Sizes of an image tower and its tokens an image."""

    shape: TowerShape
    tokens: int


TOWERS = {
    "ViT-B-32": ImageTower(TowerShape(12, 768, 3072, 512), 50),
    "ViT-B-16": ImageTower(TowerShape(12, 768, 3072, 512), 197),
    "ViT-L-14": ImageTower(TowerShape(24, 1024, 4096, 768), 257),
}


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

    def __str__(self) -> str:
        return f"{self.model}, {self.clients} client{'s' * (self.clients > 1)}, {self.linear}"


def cases(name: str, tower: ImageTower, clients: int, batch: int, linears: Sequence[str]) -> list[Case]:
    """The linears of one block and the projection, which has one token an image and no bias."""
    found = []
    for site in tower_sites(replace(tower.shape, layers=1)):
        linear = site.name.rpartition(".")[2]
        rows = batch * (1 if linear == "proj" else tower.tokens)
        size = (rows, len(site.parts), site.out_features, site.in_features)
        found.append(Case(name, linear, clients, *size, bias=linear != "proj"))
    return [case for case in found if case.linear in linears]


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


def make_operands(case: Case, dtype: torch.dtype, device: torch.device) -> Operands:
    """Random operands: x of magnitude 1, W and A so that their products are too, B so that the LoRA term is."""
    g = torch.Generator(device).manual_seed(0)
    slots, parts, out, width = case.clients, case.parts, case.out, case.width

    def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=g, dtype=dtype, device=device)

    c = torch.zeros(slots, len(BRANCHES), parts, RANK, device=device)
    B = randn(slots, parts, out, RANK)
    for view, (branch, columns) in enumerate(zip(BRANCHES, COLUMNS)):
        c[:, view, :, columns] = branch.scale
        B[..., columns] /= branch.scale * math.sqrt(branch.rank)
    x, dy = randn(case.all_rows, width, dtype=dtype), randn(case.all_rows, parts * out, dtype=dtype)
    weight = (randn(parts * out, width) / math.sqrt(width)).to(dtype)
    bias = randn(parts * out, dtype=dtype) if case.bias else None
    A = randn(slots, parts, RANK, width) / math.sqrt(width)
    return Operands(x, dy, weight, bias, A, B, c, RowGroups((case.rows,) * slots, len(BRANCHES)))


# Forward and backward: y [M, parts·N] and gradients of x [M, K], A, B, c; those it has. What is a function assembles
# one for the check alone, not timed.
Run = Callable[[], Mapping[str, Tensor | Callable[[], Tensor]]]


def variants(o: Operands) -> dict[str, Run]:
    """What can run on the operands' device, the frozen product first."""

    def frozen() -> dict[str, Tensor]:
        y = frozen_linear(o.x, o.weight, o.bias)
        return {"frozen y": y, "frozen x": frozen_linear_backward(o.dy, o.weight)}

    def ours(backend: str) -> Run:
        leaves = {n: getattr(o, n).detach().requires_grad_() for n in ("x", "A", "B", "c")}

        def run() -> dict[str, Tensor]:
            y = dual_lora(linear=FrozenLinear(o.weight, o.bias), groups=o.groups, backend=backend, **leaves)
            return {"y": y.detach(), **dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), o.dy)))}

        return run

    found: dict[str, Run] = {"frozen": frozen}
    if common.installed("peft"):
        found["PEFT"] = peft(o)
    found["torch"] = ours("torch")
    if triton_refusal(o.x.device, o.x.dtype) is None:
        found["triton"] = ours("triton")
    return found


def peft(o: Operands) -> Run:
    """PEFT's LoRA on an nn.Linear for each client and view, one after another; it has no gates, so no gradient of c.

    A packed linear is three, as in Hugging Face's CLIP.
    """
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    parts, out = o.B.shape[1:3]
    xs, layers, upstream, places_a, places_b = [], [], [], [], []
    for slot, view, first, end in o.groups.groups():
        xs.append(o.x[first:end].detach().requires_grad_())
        columns, rank = COLUMNS[view], BRANCHES[view].rank
        alpha = round(BRANCHES[view].scale * rank)
        for part, dy in enumerate(o.dy[first:end].split(out, 1)):
            rows = slice(part * out, (part + 1) * out)
            base = nn.Linear(o.x.shape[1], out, o.bias is not None, device=o.x.device, dtype=o.x.dtype)
            base.weight.data = o.weight[rows]
            if o.bias is not None:
                base.bias.data = o.bias[rows]
            layer = Linear(base, "default", LoraConfig(r=rank, lora_alpha=alpha), r=rank, lora_alpha=alpha)
            places_a.append((slot, part, columns))
            places_b.append((slot, part, slice(None), columns))
            layer.lora_A["default"].weight.data = o.A[places_a[-1]].clone()
            layer.lora_B["default"].weight.data = o.B[places_b[-1]].clone()
            layers.append(layer)
            upstream.append(dy.contiguous())
    leaves: list[Any] = [*xs, *(layer.lora_A["default"].weight for layer in layers)]
    leaves += [layer.lora_B["default"].weight for layer in layers]

    def placed(like: Tensor, places: Sequence[Any], gradients: Sequence[Tensor]) -> Tensor:
        found = torch.zeros_like(like)
        for place, gradient in zip(places, gradients, strict=True):
            found[place] = gradient
        return found

    def run() -> dict[str, Callable[[], Tensor]]:
        y = [layer(xs[i // parts]) for i, layer in enumerate(layers)]
        gradients = torch.autograd.grad(y, leaves, upstream)
        return {
            "y": lambda: torch.cat([torch.cat(y[i : i + parts], 1) for i in range(0, len(y), parts)]).detach(),
            "x": lambda: torch.cat(gradients[: len(xs)]),
            "A": lambda: placed(o.A, places_a, gradients[len(xs) : -len(layers)]),
            "B": lambda: placed(o.B, places_b, gradients[-len(layers) :]),
        }

    return run


def triton_refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton backend cannot run here, or None."""
    try:
        choose_backend("triton", device, dtype)
    except ValueError as error:
        return str(error)
    return None


def expected(o: Operands) -> dict[str, Tensor]:
    """Outputs and gradients, with and without adapters, computed client by client in fp64 and kept in fp32."""
    weight, bias = o.weight.double(), None if o.bias is None else o.bias.double()
    found: dict[str, list[Tensor]] = {}
    for slot, (x, dy) in enumerate(zip(o.x.double().chunk(len(o.A)), o.dy.double().chunk(len(o.A)))):
        groups = RowGroups(o.groups.sizes[slot : slot + 1], o.groups.views)
        adapters = {name: getattr(o, name)[slot : slot + 1].double() for name in ("A", "B", "c")}
        leaves = {name: value.requires_grad_() for name, value in {"x": x, **adapters}.items()}
        y = dual_lora_reference(linear=FrozenLinear(weight, bias), groups=groups, **leaves)
        values = {"y": y, **dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy)))}
        values |= {"frozen y": F.linear(x, weight, bias), "frozen x": dy @ weight}
        for name, value in values.items():
            found.setdefault(name, []).append(value.detach().float())
    return {name: torch.cat(values) for name, values in found.items()}


def error(run: Run, o: Operands, right: dict[str, Tensor]) -> float:
    """The largest ‖out − right‖ / ‖right‖ over outputs and gradients; NaN where one is not finite.

    Memory that the allocator may reuse for outputs is filled with NaN before, so that rows that are not written show.
    """
    freed = [torch.full_like(o.dy, math.nan), torch.full_like(o.x, math.nan)]
    del freed
    outputs = {name: out() if callable(out) else out for name, out in run().items()}
    errors = [((out.float() - right[name]).norm() / right[name].norm()).item() for name, out in outputs.items()]
    return max(errors) if all(map(math.isfinite, errors)) else math.nan


def bench_kernels(
    towers: dict[str, ImageTower],
    clients: Sequence[int],
    linears: Sequence[str],
    dtype: str,
    batch: int,
    milliseconds: float,
    device: torch.device,
    progress: Progress,
    save: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Check and time every variant of every case in one run; `save` gets the result so far after every case.

    A variant whose outputs or gradients are wrong is not timed: "failed" names variant, linear and error.
    """
    reason = triton_refusal(device, DTYPES[dtype])
    result: dict[str, Any] = {
        "what": f"one linear of the image tower with two adapters a client, {batch} images in two views, {dtype}",
        "peak_tflops": common.peak_flops(DTYPES[dtype], device, milliseconds) / 1e12,
        "rows": [],
        "notes": [f"left out: Triton ({reason})"] * (reason is not None)
        + ["left out: PEFT (pip install '.[bench]')"] * (not common.installed("peft")),
        "failed": [],
        **common.facts(device, "triton", "peft"),
    }
    for name, tower in towers.items():
        for number in clients:
            for case in cases(name, tower, number, batch, linears):
                result["rows"] += _rows(case, dtype, device, milliseconds, result["failed"], progress)
                save(result)
    return result


def _rows(
    case: Case, dtype: str, device: torch.device, milliseconds: float, failed: list[str], progress: Progress
) -> list[dict[str, Any]]:
    """All rows of one case; none without the frozen product's times."""
    progress(f"{case}: reference in fp64")
    o = make_operands(case, DTYPES[dtype], device)
    right = expected(o)
    rows: list[dict[str, Any]] = []
    for name, run in variants(o).items():
        progress(f"{case}: {name}")
        with survive(f"{name}, {case}", failed):
            wrong = error(run, o, right)
            if not wrong <= TOLERANCE[dtype]:
                raise FastdlpError(
                    f"wrong in {dtype}: relative error {wrong:.1e}, allowed {TOLERANCE[dtype]:.0e}; it was not timed"
                )
            times = measure(run, device, milliseconds, graph=True)
            row = {
                "case": str(case),
                "linear": case.linear,
                "clients": case.clients,
                "rows": case.all_rows,
                "variant": name,
                **vars(times),
                "times_frozen": times.ms_50 / (rows[0]["ms_50"] if rows else times.ms_50),
                "tflops": 4 * len(o.x) * o.weight.numel() / times.ms_50 / 1e9,  # of the frozen products
                "error": wrong,
            }
            rows.append(row)
        if not rows:
            break
    return rows


def print_kernels(result: dict[str, Any], console: Console) -> None:
    """A table with all cases: medians and their ratios to frozen."""
    lines = [
        {
            "linear": row["case"],
            "variant": row["variant"],
            "ms": f"{row['ms_50']:.3f}",
            "20–80%": f"{row['ms_20']:.3f}–{row['ms_80']:.3f}",
            "÷ frozen": f"{row['times_frozen']:.2f}",
            "TFLOP/s": f"{row['tflops']:.3g}",
            "error": f"{row['error']:.0e}",
            "timed": row["timed"],
        }
        for row in result["rows"]
    ]
    common.print_table(console, result["what"], lines)
    explanation = (
        f"ms: forward and backward; TFLOP/s: of the frozen products, measured peak {result['peak_tflops']:.3g}"
    )
    common.print_facts(console, result, explanation)
