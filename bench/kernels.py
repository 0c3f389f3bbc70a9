"""The operator beside what it is measured against: every linear of an image tower, for one or many clients.

Rows of the table, by form:

    frozen                the library's product alone and its dX: what no adapter can beat
    roofline              computed: FLOP and bytes that a pass cannot do without, over the peak product and copy
                          that were measured in the same run
    PEFT                  its LoRA linear, adapters in fp32 as it keeps them by itself, one client after another
    PEFT, adapters cast   the same in the dtype of the weights
    addmm                 `dual_lora(backend="torch")`: library products and baddbmm_
    K-augmented           [x | P | 1] · [W | B' | b]ᵀ, weights put together outside the timed part; forward only
    Triton                `dual_lora(backend="triton")`

No form is timed before its outputs and gradients agreed with fp64 on the same operands. On a GPU a form is recorded as
a CUDA graph, because the host takes longer to launch a few kernels than they run; a row says how it was timed.
"""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastdlp.adapters.branches import TowerShape, tower_sites
from fastdlp.bench import forms
from fastdlp.bench.forms import Case, Form, Operands
from fastdlp.bench.machine import machine
from fastdlp.bench.survive import survive
from fastdlp.bench.timing import Times, graph_stream, measure
from fastdlp.engine.device import DTYPES, free_memory
from fastdlp.errors import FastdlpError
from fastdlp.kernels.backend import choose_backend
from fastdlp.kernels.frozen import frozen_linear

TOLERANCE = {"fp32": 5e-5, "bf16": 2e-2}  # of ‖out − right‖ / ‖right‖; TF32 would be 3e-4
LINEARS = ("qkv", "out", "fc1", "fc2", "proj")
PASSES = ("forward", "backward", "both")
PEAK_SIDE = {"cuda": 8192, "cpu": 1024}  # of the square product that stands for the peak
COPY_BYTES = {"cuda": 1 << 30, "cpu": 128 << 20}


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
class Row:
    """One pass of one form of one linear: quantiles in milliseconds, work that cannot be avoided, ratio to frozen."""

    model: str
    clients: int
    linear: str
    rows: int
    out: int
    width: int
    form: str
    which: str  # forward, backward or both
    ms_20: float
    ms_50: float
    ms_80: float
    calls: int  # 0: computed
    timed: str  # see Times
    flop: int
    bytes: int
    tflops: float
    gbytes_per_s: float
    times_frozen: float
    error: float | None  # the form's largest, None where it is computed


def cases(name: str, tower: ImageTower, clients: int, batch: int, linears: Sequence[str]) -> list[Case]:
    """The linears of one block and the projection, which sees one token an image and has no bias."""
    found = []
    for site in tower_sites(replace(tower.shape, layers=1)):
        linear = site.name.rpartition(".")[2]
        last = linear == "proj"
        rows = batch * (1 if last else tower.tokens)
        if linear in linears:
            size = (rows, len(site.parts), site.out_features, site.in_features)
            found.append(Case(name, linear, clients, *size, bias=not last))
    return found


def bench_kernels(
    towers: dict[str, ImageTower],
    clients: Sequence[int],
    linears: Sequence[str],
    dtype: str,
    batch: int,
    milliseconds: float,
    device: torch.device,
    tell: Callable[[str], None],
    save: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Check and time every form of every case in one run; `save` gets the result so far after every case.

    A form whose outputs or gradients are wrong is not timed: "failed" names form, linear and error.
    """
    peak, copy = peak_flops(DTYPES[dtype], device, milliseconds), _copy(device, milliseconds)
    command = [f"fastdlp bench kernels --dtype {dtype} --batch-size {batch} --milliseconds {milliseconds:g}"]
    command += [f"--model {name}" for name in towers] + [f"--clients {number}" for number in clients]
    command += [f"--linear {linear}" for linear in linears]
    notes, failed = list(_absent(device, DTYPES[dtype])), list[str]()
    result: dict[str, Any] = {
        "what": f"one linear of the image tower with two adapters a client, {batch} images in two views, {dtype}",
        "command": " ".join(command),
        "dtype": dtype,
        "batch_size": batch,
        "peak_tflops": peak / 1e12,
        "copy_gbytes_per_s": copy / 1e9,
        "rows": [],
        "notes": notes,
        "failed": failed,
        **machine(device),
        "versions": versions(),
    }
    for name, tower in towers.items():
        for number in clients:
            for case in cases(name, tower, number, batch, linears):
                needed, free = case.memory(DTYPES[dtype].itemsize), free_memory(device)
                if needed > free:
                    notes.append(f"left out: {_where(case)} needs {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free")
                    continue
                rows = _rows(case, dtype, device, milliseconds, peak, copy, failed, tell)
                result["rows"] += [vars(row) for row in rows]
                save(result)
    return result


def versions() -> dict[str, str]:
    """Of python and of those of torch, triton and peft that are installed."""
    found = {name: __import__(name).__version__ for name in ("torch", "triton", "peft") if _installed(name)}
    return found | {"python": platform.python_version()}


def make_forms(o: Operands, dtype: str) -> Iterator[Form]:
    """The forms that can run here, one after another: each has buffers of its own."""
    yield forms.frozen(o)
    if _installed("peft"):
        yield forms.peft(o, "PEFT", cast=False)
        if dtype != "fp32":  # in fp32 nothing is cast: it would be the same form
            yield forms.peft(o, "PEFT, adapters cast", cast=True)
    yield forms.ours(o, "addmm", "torch")
    yield forms.augmented(o)
    if _triton_refusal(o.x.device, o.x.dtype) is None:
        yield forms.ours(o, "Triton", "triton")


def _rows(
    case: Case,
    dtype: str,
    device: torch.device,
    milliseconds: float,
    peak: float,
    copy: float,
    failed: list[str],
    tell: Callable[[str], None],
) -> list[Row]:
    """All rows of one case: the frozen product first, the roofline second. None without the frozen product's times."""
    where = _where(case)
    tell(f"{where}: reference in fp64")
    o = forms.make_operands(case, DTYPES[dtype], device)
    right = forms.expected(o)
    itemsize = DTYPES[dtype].itemsize
    rows: list[Row] = []
    floor: dict[str, float] = {}
    for form in make_forms(o, dtype):
        tell(f"{where}: {form.name}")
        with survive(f"{form.name}, {where}", failed):
            wrong = forms.error(form, o, right)
            if not wrong <= TOLERANCE[dtype]:
                raise FastdlpError(
                    f"wrong in {dtype}: relative error {wrong:.1e}, allowed {TOLERANCE[dtype]:.0e}; it was not timed"
                )
            times = _times(form, device, milliseconds)
            if form.name == "frozen":
                floor = {which: t.ms_50 for which, t in times.items()}
            for which, t in times.items():
                rows.append(_row(case, form.name, which, itemsize, t, floor[which], wrong))
        if not floor:
            return []
        del form  # its buffers go before the next form makes its own
    for which in reversed(PASSES):
        flop, size = case.count(which, itemsize)
        least = max(flop / peak, size / copy) * 1e3
        rows.insert(
            len(PASSES), _row(case, "roofline", which, itemsize, Times(*[least] * 3, 0, "computed"), floor[which], None)
        )
    return rows


def _where(case: Case) -> str:
    return f"{case.model}, {case.clients} client{'s' * (case.clients > 1)}, {case.linear}"


def _times(form: Form, device: torch.device, milliseconds: float) -> dict[str, Times]:
    """Each pass of a form."""
    with graph_stream(device):
        found = {"forward": measure(form.forward, device, milliseconds, graph=True)}
        backward = form.backward
        if backward is not None:
            kept = form.forward()
            found["backward"] = measure(lambda: backward(kept), device, milliseconds, graph=True)
            del kept
            found["both"] = measure(lambda: backward(form.forward()), device, milliseconds, graph=True)
    return found


def _row(case: Case, form: str, which: str, itemsize: int, times: Times, floor: float, wrong: float | None) -> Row:
    flop, size = case.count(which, itemsize, adapted=form != "frozen")
    seconds = times.ms_50 / 1e3
    return Row(
        case.model,
        case.clients,
        case.linear,
        case.all_rows,
        case.parts * case.out,
        case.width,
        form,
        which,
        **vars(times),
        flop=flop,
        bytes=size,
        tflops=flop / seconds / 1e12,
        gbytes_per_s=size / seconds / 1e9,
        times_frozen=times.ms_50 / floor,
        error=wrong,
    )


def peak_flops(dtype: torch.dtype, device: torch.device, milliseconds: float) -> float:
    """FLOP a second of a large square product."""
    side = PEAK_SIDE[device.type]
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / (measure(lambda: frozen_linear(a, b), device, milliseconds).ms_50 / 1e3)


def _copy(device: torch.device, milliseconds: float) -> float:
    """Bytes a second, read and written, of a large copy."""
    source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / (measure(lambda: target.copy_(source), device, milliseconds).ms_50 / 1e3)


def _absent(device: torch.device, dtype: torch.dtype) -> Iterator[str]:
    """A line for every form that cannot run here."""
    if not _installed("peft"):
        yield "left out: PEFT, which is not installed (pip install '.[bench]' in the checkout)"
    if (reason := _triton_refusal(device, dtype)) is not None:
        yield f"left out: Triton ({reason})"


def _triton_refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton form cannot run here, or None."""
    try:
        choose_backend("triton", device, dtype)
    except ValueError as error:
        return str(error)
    return None


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
