"""The whole operator in the Triton form against its formula in fp64, and as torch ops: fake, autograd, compiled."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastdlp.kernels.dual_lora_ops import dual_lora_backward_op, dual_lora_op, forward_pass
from fastdlp.kernels.frozen import Norm
from fastdlp.kernels.groups import RowGroups
from fastdlp.kernels.launch import recording
from tests.awkward import (
    DTYPES,
    GROUPS,
    PHI,
    PRECISIONS,
    Draw,
    assert_close,
    dual_lora,
    dual_lora_reference,
    exact,
    in_fp64,
    kernel_cases,
    operands,
    values_and_gradients,
)

# The interpreter's exponential; the sigmoid is 0 there.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")

# Largest error over largest entry, RMS error over RMS: about four times what was measured in fp32 and fp16. Those of
# bf16 and TF32 are not measured; they follow from fp16's (bf16 has 3 bits less; TF32 has as many, but may truncate).
TOLERANCE = {"fp32": (4e-6, 2e-6), "fp16": (5e-3, 4e-3), "bf16": (4e-2, 3e-2), "tf32": (1e-2, 8e-3)}


def check(arguments: dict[str, Any], dy: Tensor, precision: str, **options: Any) -> dict[str, Tensor]:
    """The Triton form gives what the formula gives: y, and the gradient of everything that has one."""
    ours = values_and_gradients(dual_lora, arguments, dy, backend="triton", **options)
    reference = values_and_gradients(dual_lora_reference, in_fp64(arguments), dy.double().cpu(), **options)
    assert ours.keys() == reference.keys()
    for what, tensor in ours.items():
        assert tensor.dtype == (arguments[what[1:]] if what != "y" else arguments["x"]).dtype
        assert_close(tensor, reference[what], TOLERANCE[precision], what)
    return ours


@pytest.mark.usefixtures("guarded")
@kernel_cases(
    GROUPS,
    ranks=[(1, 1), (3, 6), (2, 16), (1, 17)],  # parts, R
    shape=[(64, 96), (100, 50), (33, 40), (130, 16), (1, 3)],  # K, N of a part
    activation=list(PHI),
    bias=[True, False],
    norm=[False, True],
    residual=[True, False],
)
def test_equals_the_formula(
    name: str,
    ranks: tuple[int, int],
    shape: tuple[int, int],
    activation: str,
    bias: bool,
    norm: bool,
    residual: bool,
    precision: str,
    device: torch.device,
) -> None:
    groups, draw = GROUPS[name], Draw(device, DTYPES[precision])
    arguments = operands(draw, groups, *ranks, *shape, bias, norm, residual)
    check(arguments, draw(groups.rows, ranks[0] * shape[1]), precision, activation=activation)


SMALL = RowGroups((9, 0, 1, 12), views=2)  # 44 rows


def fp32(device: torch.device, groups: RowGroups = SMALL, seed: int = 0, **options: Any) -> dict[str, Any]:
    """Operands of one small problem: K = 40, N = 48, R = 6 in one part."""
    return operands(Draw(device, torch.float32, seed), groups, 1, 6, 40, 48, **options)


@pytest.mark.usefixtures("guarded")
def test_no_slots(device: torch.device) -> None:
    arguments = fp32(device, RowGroups(()), norm=True, residual=True)
    check(arguments, torch.zeros(0, 48, device=device), "fp32", activation="gelu")


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_adapters_in_the_dtype_of_x(dtype: torch.dtype, device: torch.device) -> None:
    draw = Draw(device, dtype)
    arguments = operands(draw, SMALL, 2, 4, 40, 48)
    arguments |= {name: arguments[name].to(dtype) for name in "ABc"}
    check(arguments, draw(44, 96), "fp16" if dtype == torch.float16 else "fp32")


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize("precision", PRECISIONS, indirect=True)
def test_all_gates_at_zero(precision: str, device: torch.device) -> None:
    """The frozen linear to the bit, nothing for A and B, and the gradient that opens the gates again."""
    draw = Draw(device, DTYPES[precision])
    arguments = operands(draw, GROUPS["ragged"], 2, 6, 40, 33)
    arguments["c"].zero_()
    ours = check(arguments, draw(100, 66), precision, activation="quick_gelu")
    assert (ours["dA"] == 0).all()
    assert (ours["dB"] == 0).all()
    assert (ours["dc"][[2, 3, 7, 9]] != 0).all()  # the slots that have rows
    without = arguments | {"A": torch.zeros_like(arguments["A"]), "B": torch.zeros_like(arguments["B"])}
    assert torch.equal(ours["y"], dual_lora(**without, activation="quick_gelu", backend="triton"))


@pytest.mark.usefixtures("guarded")
def test_a_view_does_not_see_the_other_branch(device: torch.device) -> None:
    """View 0 sees ranks 0 to 3, view 1 the others; with a gradient for view 0 alone the others get exact zeros."""
    arguments = fp32(device)
    arguments["c"][:, 0, :, 4:] = 0
    arguments["c"][:, 1, :, :4] = 0
    dy = Draw(device, torch.float32, 1)(44, 48)
    check(arguments, dy, "fp32")
    for _, view, start, end in SMALL.groups():
        if view == 1:
            dy[start:end] = 0
    ours = check(arguments, dy, "fp32")
    assert (ours["dA"][:, :, 4:] == 0).all()
    assert (ours["dB"][..., 4:] == 0).all()
    assert (ours["dc"][:, 1] == 0).all()
    assert (ours["dc"][[0, 2, 3], 0] != 0).all()


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize("precision", PRECISIONS, indirect=True)
def test_same_bits_every_run(precision: str, device: torch.device) -> None:
    draw = Draw(device, DTYPES[precision])
    arguments, dy = operands(draw, GROUPS["ragged"], 2, 4, 40, 33, norm=True, residual=True), draw(100, 66)
    runs = [values_and_gradients(dual_lora, arguments, dy, activation="gelu", backend="triton") for _ in range(2)]
    for what, tensor in runs[0].items():
        assert torch.equal(tensor, runs[1][what]), what


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # NumPy's word for what is meant here
@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize(
    ("what", "middle", "value"),
    [(what, 7, float("nan")) for what in ("x", "residual", "A", "B", "c")]
    + [(what, 7, float("inf")) for what in ("x", "A", "c")]
    + [(what, 0, float("nan")) for what in "ABc"],  # adapters of nobody's rows
)
def test_a_slot_that_has_diverged_stays_alone(what: str, middle: int, value: float, device: torch.device) -> None:
    """All three slots share a tile. The second shows what it holds, and the others do not see it."""
    groups = RowGroups((10, middle, 20))
    arguments, dy = fp32(device, groups, norm=True, residual=True), Draw(device, torch.float32, 1)(groups.rows, 48)
    clean = values_and_gradients(dual_lora, arguments, dy, activation="gelu", backend="triton")
    own = slice(10, 10 + middle)
    arguments[what][own if what in ("x", "residual") else 1] = value
    dirty = values_and_gradients(dual_lora, arguments, dy, activation="gelu", backend="triton")
    rows, slots = [*range(10), *range(10 + middle, groups.rows)], [0, 2]
    for name, tensor in clean.items():
        kept = slots if name in ("dA", "dB", "dc") else rows
        assert torch.equal(tensor[kept], dirty[name][kept]), name
    assert not dirty["y"][own].isfinite().any()


def _transposed(t: Tensor) -> Tensor:
    """The same values, stored the other way round in the last two dimensions."""
    return t.transpose(-1, -2).contiguous().transpose(-1, -2)


def _inside(dimension: int) -> Callable[[Tensor], Tensor]:
    """The same values as a slice of a longer dimension whose rest is NaN."""

    def place(t: Tensor) -> Tensor:
        shape = list(t.shape)
        shape[dimension] += 5
        wide = t.new_full(shape, float("nan"))
        part = wide.narrow(dimension, 3, t.shape[dimension])
        part.copy_(t)
        return part

    return place


def _every_second(t: Tensor) -> Tensor:
    """The same values, one NaN after each in the last dimension."""
    wide = t.new_full((*t.shape[:-1], 2 * t.shape[-1]), float("nan"))
    wide[..., ::2] = t
    return wide[..., ::2]


LAYOUTS = {
    "transposed": _transposed,
    "rows of more": _inside(0),
    "columns of more": _inside(-1),
    "parts of more": _inside(1),
    "every second": _every_second,
}


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize("first", range(len(LAYOUTS)))
def test_strides(first: int, device: torch.device) -> None:
    """Numbers are the same wherever they lie: two parts, two views. Every operand has every layout once, all at a time
    another one."""
    draw, layouts = Draw(device, torch.float32), [*LAYOUTS.values()]
    arguments, dy = operands(draw, SMALL, 2, 4, 20, 24, norm=True, residual=True), draw(44, 48)
    names = ["x", "weight", "A", "B", "c", "residual", "dy"]
    laid_out = {
        name: layouts[(first + number) % len(layouts)](tensor)
        for number, (name, tensor) in enumerate(zip(names, [*(arguments[n] for n in names[:-1]), dy]))
    }
    dy = laid_out.pop("dy")
    check(arguments | laid_out, dy, "fp32", activation="quick_gelu")


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize("layout", [_every_second, lambda t: t[:1].expand(t.shape)], ids=["every second", "expanded"])
def test_strides_of_the_vectors(layout: Callable[[Tensor], Tensor], device: torch.device) -> None:
    """Bias, and weight and bias of the norm."""
    arguments, dy = fp32(device, norm=True), Draw(device, torch.float32, 1)(44, 48)
    norm = arguments["norm"]
    arguments["bias"] = layout(arguments["bias"])
    arguments["norm"] = Norm(layout(norm.weight), layout(norm.bias), norm.eps)
    check(arguments, dy, "fp32")


@pytest.mark.usefixtures("guarded")
def test_expanded_rows_and_gradients(device: torch.device) -> None:
    """Stride 0: x from one row, c from one scale, dy as .sum().backward() gives it."""
    arguments = fp32(device, residual=True)
    arguments["x"] = arguments["x"][:1].expand(44, 40)
    arguments["c"] = arguments["c"][:1, :1, :1, :1].expand(4, 2, 1, 6)
    check(arguments, torch.ones((), device=device).expand(44, 48), "fp32", activation="gelu")


def test_x_is_its_own_residual(device: torch.device) -> None:
    """Both gradients meet in x."""
    arguments = operands(Draw(device, torch.float32), SMALL, 1, 4, 40, 40)
    gradients = []
    for function, values, options in (
        (dual_lora, arguments, {"backend": "triton"}),
        (dual_lora_reference, in_fp64(arguments), {}),
    ):
        x = values["x"].requires_grad_()
        function(**values | {"residual": x}, **options).square().sum().backward()
        gradients.append(x.grad)
    assert_close(*gradients, TOLERANCE["fp32"], "dx")


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "fp64": (lambda a: {n: a[n].double() for n in ("x", "weight", "bias", "residual")}, "not torch.float64"),
    "int": (lambda a: {n: a[n].long() for n in ("x", "weight", "bias", "residual")}, "not torch.int64"),
    "weight's dtype": (lambda a: {"weight": a["weight"].half()}, "weight is torch.float16, x is torch.float32"),
    "bias's dtype": (lambda a: {"bias": a["bias"].half()}, "bias is torch.float16, x is torch.float32"),
    "residual's dtype": (lambda a: {"residual": a["residual"].half()}, "residual is torch.float16"),
    "residual's shape": (lambda a: {"residual": a["residual"][:1]}, r"residual is \(1, 48\), expected \(44, 48\)"),
    "norm's width": (lambda a: {"norm": Norm(a["bias"], a["bias"], 1e-5)}, r"norm.weight is \(48,\), expected \(40,"),
    "x's rows": (lambda a: {"x": a["x"][1:]}, r"x is \(43, 40\), expected \(44, 40\)"),
    "slots": (lambda a: {"groups": RowGroups((22,), 2)}, "c is|1 slots"),
    "views": (lambda a: {"groups": RowGroups((20, 0, 1, 23))}, r"c is \(4, 2, 1, 6\), expected \(4, 1, 1, 6\)"),
    "weight's device": (lambda a: {"weight": a["weight"].to("meta")}, "weight is on meta, x on"),
    "A's device": (lambda a: {"A": a["A"].to("meta")}, "A is on meta, x on"),
    "c's device": (lambda a: {"c": a["c"].to("meta")}, "c is on meta, x on"),
    "norm's device": (lambda a: {"norm": Norm(*(torch.ones(40, device="meta"),) * 2, 1e-5)}, "norm.weight is on meta"),
    "activation": (lambda a: {"activation": "relu"}, "unknown activation 'relu': choose from none, quick_gelu"),
    "backend": (lambda a: {"backend": "cuda"}, "unknown backend 'cuda': choose from auto, triton, torch"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str, device: torch.device) -> None:
    arguments = fp32(device, residual=True, backend="triton")
    change, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        dual_lora(**arguments | change(arguments))


def test_refuses_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = fp32(torch.device("cpu"), backend="triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="needs a CUDA GPU, not cpu"):
        dual_lora(**arguments)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    bf16 = {name: arguments[name].bfloat16() for name in ("x", "weight", "bias")}
    with pytest.raises(ValueError, match="bf16 products wrongly"):
        dual_lora(**arguments | bf16)


def _launched(launches: list[Any]) -> list[str]:
    return [launch.kernel.__name__.removesuffix("_kernel") for launch in launches]


@pytest.mark.parametrize(
    ("wanted", "norm", "backward"),
    [
        (["x", "A", "B", "c"], False, ["adapter_gradients", "product", "sum_partials"]),
        (["A", "B", "c"], True, ["adapter_gradients", "sum_partials"]),
        (["c"], False, ["adapter_gradients", "sum_partials"]),
        (["x"], True, ["adapter_gradients", "product", "norm_backward"]),
        (["residual"], True, []),
    ],
)
def test_launches_only_what_a_gradient_needs(
    wanted: list[str], norm: bool, backward: list[str], device: torch.device
) -> None:
    arguments = fp32(device, norm=norm, residual=True)
    for name in wanted:
        arguments[name].requires_grad_()
    with recording() as forward:
        y = dual_lora(**arguments, backend="triton")
    assert _launched(forward) == ["fold", "down", "product"]
    assert forward[1].options["HAS_NORM"] == norm
    with recording() as launches:
        y.sum().backward()
    assert _launched(launches) == backward
    for name in ("x", "A", "B", "c", "residual"):
        assert (arguments[name].grad is not None) == (name in wanted)


def test_keeps_nothing_without_gradients(device: torch.device) -> None:
    arguments = fp32(device, norm=True)
    arguments["A"].requires_grad_()
    with torch.no_grad(), recording() as launches:
        y = dual_lora(**arguments, activation="gelu", backend="triton")
    assert y.grad_fn is None
    assert launches[-1].options["PREACTIVATION"] == "none"
    outputs = dual_lora_op(*_op_arguments(arguments, "gelu", keep=False))
    assert [len(output) for output in outputs] == [44, 0, 0, 0, 0, 0, 0]


def test_nothing_of_the_backward_runs_for_an_unused_output(device: torch.device) -> None:
    arguments = fp32(device)
    arguments["A"].requires_grad_()
    with recording() as launches:
        y = dual_lora(**arguments, backend="triton")
        (arguments["A"].sum() + 0 * y.detach().sum()).backward()
    assert _launched(launches) == ["fold", "down", "product"]


def test_the_residual_gets_dy_itself(device: torch.device) -> None:
    arguments, dy = fp32(device, residual=True), Draw(device, torch.float32, 1)(44, 48)
    ours = values_and_gradients(dual_lora, arguments, dy, activation="gelu", backend="triton")
    assert torch.equal(ours["dresidual"], dy)


def test_refuses_a_second_derivative(device: torch.device) -> None:
    arguments = fp32(device)
    x = arguments["x"].requires_grad_()
    y = dual_lora(**arguments, backend="triton")
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="dual_lora_backward"):
        dx.sum().backward()


def test_checkpointed(device: torch.device) -> None:
    """The first forward keeps nothing, the second what the backward needs: the same gradients."""
    arguments = fp32(device, norm=True)
    arguments["A"].requires_grad_()
    gradients = []
    for run in (dual_lora, lambda **a: checkpoint(lambda: dual_lora(**a), use_reentrant=False)):
        run(**arguments, activation="gelu", backend="triton").sum().backward()
        gradients.append(arguments["A"].grad)
        arguments["A"].grad = None
    assert torch.equal(*gradients)


def _op_arguments(arguments: dict[str, Any], activation: str, keep: bool) -> tuple[Any, ...]:
    a, norm, groups = arguments, arguments["norm"], arguments["groups"]
    normed = (None, None, 0.0) if norm is None else (norm.weight, norm.bias, norm.eps)
    frozen = (a["weight"], a["bias"], *normed, activation)
    return (a["x"], *frozen, a["A"], a["B"], a["c"], list(groups.sizes), groups.views, a["residual"], keep)


def _backward_arguments(forward: tuple[Any, ...], dy: Tensor, saved: list[Tensor]) -> tuple[Any, ...]:
    """What `fastdlp::dual_lora_backward` takes after a forward, without the flags of what is needed."""
    x, weight, _, *rest = (t.detach() if isinstance(t, Tensor) else t for t in forward[:12])
    return (dy, x, *saved, weight, *rest)


CONFIGURATIONS = [  # groups, bias, norm, residual, activation, keep
    ("small", True, False, False, "none", True),
    ("small", False, True, True, "quick_gelu", True),
    ("small", True, True, False, "none", False),
    ("small", True, False, True, "gelu", False),
    ("nobody", False, True, False, "gelu_tanh", True),
]
NEEDS = [(True, True), (False, True), (True, False)]  # dx, the adapters' gradients


@pytest.mark.slow
@pytest.mark.parametrize(("name", "bias", "norm", "residual", "activation", "keep"), CONFIGURATIONS)
def test_opcheck(
    name: str, bias: bool, norm: bool, residual: bool, activation: str, keep: bool, device: torch.device
) -> None:
    """Schema, fake tensors, autograd registration and aot_autograd with dynamic shapes, of both ops."""
    arguments = fp32(device, SMALL if name == "small" else GROUPS[name], bias=bias, norm=norm, residual=residual)
    if keep:
        for leaf in ("x", "A", "B", "c", "residual"):
            if arguments[leaf] is not None:
                arguments[leaf].requires_grad_()
    forward = _op_arguments(arguments, activation, keep)
    torch.library.opcheck(torch.ops.fastdlp.dual_lora.default, forward)
    if keep:
        with torch.no_grad():
            y, *saved = forward_pass(*forward)
        for need in NEEDS:
            backward = (*_backward_arguments(forward, y, saved), *need)
            torch.library.opcheck(torch.ops.fastdlp.dual_lora_backward.default, backward)


@pytest.mark.parametrize(
    ("name", "bias", "norm", "residual", "activation", "keep", "need"),
    [(*CONFIGURATIONS[number % 5], NEEDS[number % 3]) for number in range(7)],
)
def test_fakes_are_laid_out_like_what_runs(
    name: str,
    bias: bool,
    norm: bool,
    residual: bool,
    activation: str,
    keep: bool,
    need: tuple[bool, bool],
    device: torch.device,
) -> None:
    """Shape, stride and dtype on the device "meta" are those of the real outputs, which share no memory."""
    arguments = fp32(device, SMALL if name == "small" else GROUPS[name], bias=bias, norm=norm, residual=residual)
    arguments["x"] = _transposed(arguments["x"])
    real_in = _op_arguments(arguments, activation, True)
    meta_in = tuple(t.to("meta") if isinstance(t, Tensor) else t for t in real_in)
    real, meta = dual_lora_op(*real_in[:-1], keep), dual_lora_op(*meta_in[:-1], keep)
    _assert_alike(real, meta)
    real, meta = dual_lora_op(*real_in), dual_lora_op(*meta_in)
    results = []
    for (y, *saved), given in ((real, real_in), (meta, meta_in)):
        results.append(dual_lora_backward_op(*_backward_arguments(given, _transposed(y), saved), *need))
    _assert_alike(*results)


def _assert_alike(real: tuple[Tensor, ...], meta: tuple[Tensor, ...]) -> None:
    for ours, fake in zip(real, meta):
        assert (ours.shape, ours.stride(), ours.dtype) == (fake.shape, fake.stride(), fake.dtype)
    places = [t.data_ptr() for t in real if t.numel()]
    assert len(places) == len(set(places))


class Block(torch.nn.Module):
    """x + φ(n(x) Wᵀ + b + LoRA), then a second linear without a norm."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        draw = Draw(device, torch.float32)
        first, second = (operands(draw, RowGroups((1, 1, 1)), 1, 6, 40, 40, norm=n) for n in (True, False))
        self.norm, self.frozen = first["norm"], [(o["weight"], o["bias"]) for o in (first, second)]
        self.adapters = torch.nn.ParameterList(
            torch.nn.Parameter(t) for o in (first, second) for t in (o["A"], o["B"], o["c"])
        )

    def forward(self, x: Tensor, groups: RowGroups) -> Tensor:
        A, B, c, A2, B2, c2 = self.adapters
        (w, b), (w2, b2) = self.frozen
        options: dict[str, Any] = {"norm": self.norm, "activation": "quick_gelu", "residual": x, "backend": "triton"}
        x = dual_lora(x, w, b, A, B, c, groups, **options)
        return dual_lora(x.tanh(), w2, b2, A2, B2, c2, groups, backend="triton")


def _step(block: torch.nn.Module, x: Tensor, groups: RowGroups) -> list[Tensor]:
    block.zero_grad()
    x = x.detach().requires_grad_()
    y = block(x, groups)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in block.parameters())]


@pytest.mark.slow
def test_compiles_in_one_graph(device: torch.device) -> None:
    """With aot_eager, forward and backward to the bit, also for other sizes in a second and third call."""
    torch._dynamo.reset()
    block, draw = Block(device), Draw(device, torch.float32, 1)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for groups in (RowGroups((10, 0, 23)), RowGroups((5, 6, 7)), RowGroups((1, 0, 0))):
        x = draw(groups.rows, 40)
        for ours, eager in zip(_step(compiled, x, groups), _step(block, x, groups)):
            assert torch.equal(ours, eager)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
def test_compiles_with_inductor(device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    block, groups = Block(device), RowGroups((10, 0, 23))
    x = Draw(device, torch.float32, 1)(33, 40)
    compiled = _step(torch.compile(block, fullgraph=True), x, groups)
    for ours, eager in zip(compiled, _step(block, x, groups)):
        assert_close(ours, eager.double(), TOLERANCE["fp32"], "inductor")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA GPU")
def test_cuda_graph(device: torch.device) -> None:
    """Captured once, replayed with other numbers: what eager launches give, to the bit."""
    groups, options = GROUPS["ragged"], {"activation": "gelu", "backend": "triton"}
    first, second = (fp32(device, groups, seed, norm=True, residual=True) for seed in (0, 1))
    names = ("x", "A", "B", "c", "residual")
    leaves = [first[name].requires_grad_() for name in names]
    dy = torch.ones(100, 48, device=device)

    def run() -> tuple[Tensor, ...]:
        y = dual_lora(**first, **options)
        return (y, *torch.autograd.grad(y, leaves, dy))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()  # compiles the kernels and makes the chunk tables
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        for name in names:
            first[name].copy_(second[name])
    graph.replay()
    for ours, eager in zip(captured, run()):
        assert torch.equal(ours, eager)


BIG = 40e9  # bytes of a GPU on which the largest test fits


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory < BIG,
    reason="needs a CUDA GPU with 40 GB",
)
def test_more_entries_than_32_bits_count(device: torch.device) -> None:
    last_rows_of_many(2**31 // 3072 + 1000, 3072, Draw(device, torch.bfloat16), "bf16")


def test_last_rows_of_many(device: torch.device) -> None:
    last_rows_of_many(120, 64, Draw(device, torch.float32), "fp32")


def last_rows_of_many(rows: int, out: int, draw: Draw, precision: str) -> None:
    """The last 50 rows, a slot of their own, come out as they do alone. x is a slice of the residual, dy the same."""
    wide = torch.ones(rows, out, device=draw.device, dtype=draw.dtype)
    wide[-50:] = draw(50, out)
    arguments = operands(draw, RowGroups((1, 1)), 1, 6, 32, out)
    arguments |= {"x": wide[:, :32], "residual": wide, "groups": RowGroups((rows - 50, 50))}
    ours = values_and_gradients(dual_lora, arguments, wide, activation="gelu", backend="triton")
    alone = {name: arguments[name][1:] for name in "ABc"} | {name: arguments[name][-50:] for name in ("x", "residual")}
    alone = in_fp64(arguments | alone | {"groups": RowGroups((50,))})
    reference = values_and_gradients(dual_lora_reference, alone, exact(wide[-50:]), activation="gelu")
    for what, tensor in ours.items():
        of_the_last = slice(1, None) if what in ("dA", "dB", "dc") else slice(-50, None)
        assert_close(tensor[of_the_last], reference[what], TOLERANCE[precision], what)
