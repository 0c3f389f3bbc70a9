"""The operator as modules: against plain linears, the written formula, and the engine's own towers."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastdlp.adapters.bank import AdapterBank
from fastdlp.adapters.branches import Branch, tower_sites
from fastdlp.clip.load import Clip, load_clip
from fastdlp.kernels.adapt import DualLoRAAttention, adapt, branch_parameters, merge, select
from fastdlp.kernels.groups import RowGroups
from fastdlp.kernels.launch import recording
from fastdlp.kernels.module import DualLoRALinear
from tests.models import tiny_clip

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RANKS = {"local": 4, "global": 2}
OPTIONS: dict[str, Any] = {"ranks": RANKS, "gated": ["local"]}
VIEWS: list[Any] = ["local", "global", ("local", "global"), ()]
IMAGE = ["attn", "c_fc", "c_proj", "proj"]


def layer_of(slots: int = 1, parts: int = 1, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """A layer of 10 → 3 · 6 with random adapters."""
    torch.manual_seed(0)
    linear = nn.Linear(10, 18, dtype=dtype, device=DEVICE)
    return randomise(DualLoRALinear(linear, RANKS, gated=["local"], slots=slots, parts=parts, **options))


def randomise(model: nn.Module, scale: float = 0.3) -> nn.Module:
    """Every adapter of every slot away from its start."""
    for branch in RANKS:
        for parameter in branch_parameters(model, branch).values():
            parameter.data += scale * torch.randn_like(parameter)
    return model


def samples(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=dtype).to(DEVICE)


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("init", ["gaussian", "peft-gaussian", "kaiming"])
def test_is_the_frozen_linear_at_the_start(init: str, bias: bool) -> None:
    linear = nn.Linear(10, 18, bias=bias)
    layer = DualLoRALinear(linear, RANKS, gated=["local"], slots=2, parts=3, init=init)
    x = samples(4, 5, 10, dtype=torch.float32).cpu()
    expected = F.linear(x, linear.weight, linear.bias)
    assert layer.weight is linear.weight
    assert not any(p.requires_grad for p in linear.parameters())
    for view in VIEWS:
        assert torch.equal(layer(x, views=[view]), expected)
    assert all(layer.branches["local"].A.std((1, 2, 3)) > 0)


def test_starts_as_the_init_says() -> None:
    linear = nn.Linear(4096, 8, dtype=torch.bfloat16)
    for init, deviation in (("gaussian", 0.5), ("peft-gaussian", 0.25), ("kaiming", 1 / (4096 * 3) ** 0.5)):
        branch = DualLoRALinear(linear, {"a": 4}, gated=["a"], slots=2, init=init).branch("a")
        assert branch.A.dtype == branch.B.dtype == torch.float32
        assert branch.A.std().item() == pytest.approx(deviation, rel=0.03)
        assert torch.equal(branch.A[0], branch.A[1])
        assert torch.equal(branch.gate[0], branch.gate[1])
        assert not branch.B.any()


@pytest.mark.parametrize("view", VIEWS, ids=str)
@pytest.mark.parametrize("parts", [1, 3])
def test_equals_the_merged_linear(parts: int, view: Any) -> None:
    layer = layer_of(slots=3, parts=parts)
    x = samples(4, 10)
    for slot in range(3):
        sizes = [4 if s == slot else 0 for s in range(3)]
        assert_close(layer(x, views=[view], sizes=sizes), layer.merged(slot, view)(x), 1e-12)
    assert_close(layer(x[:3], views=()), torch.stack([layer.merged(slot)(x[slot]) for slot in range(3)]), 1e-12)


def plain(layer: DualLoRALinear, x: Tensor, views: list[Any], sizes: list[int]) -> Tensor:
    """The formula, sample by sample."""
    outputs, at = [], 0
    for slot, size in enumerate(sizes):
        for view in views:
            for sample in x[at : at + size]:
                y = F.linear(sample, layer.weight, layer.bias)
                for name in view:
                    b, s = layer.branches[name], 16 / RANKS[name]
                    g = torch.ones_like(b.A[slot, :, :, 0]) if b.gate is None else b.gate[slot]
                    y = y + torch.cat([s * ((sample @ A.T) * c) @ B.T for A, B, c in zip(b.A[slot], b.B[slot], g)], -1)
                outputs.append(y)
            at += size
    return torch.stack(outputs)


@pytest.mark.parametrize("parts", [1, 3])
def test_gradients_equal_the_formulas(parts: int) -> None:
    layer = layer_of(slots=4, parts=parts)
    layer.branches["local"].gate.data[:, :, 1] = 0
    views, sizes = [("local",), ("global",), ("local", "global")], [2, 0, 3, 1]
    select(layer, *views, sizes=sizes)
    x = samples(18, 3, 10).requires_grad_()
    wanted = [x, *(p for branch in RANKS for p in branch_parameters(layer, branch).values())]
    results = []
    for y in (layer(x), plain(layer, x, views, sizes)):
        results.append([y, *torch.autograd.grad((y * samples(*y.shape)).sum(), wanted)])
    for ours, theirs in zip(*results):
        assert_close(ours, theirs, 1e-11)
    d_gate = results[0][-3]  # x; local A, B, gate; global A, B
    assert d_gate.shape == layer.branches["local"].gate.shape
    assert d_gate[[0, 2, 3], :, 1].all()


def test_trains_only_what_the_rows_see() -> None:
    layer = layer_of()
    select(layer, "local")
    layer(samples(3, 10)).sum().backward()
    trained = {name for name, p in layer.named_parameters() if p.grad is not None}
    assert trained == {f"branches.local.{kind}" for kind in ("A", "B", "gate")}


def test_triton_equals_torch() -> None:
    results = []
    for backend in ("torch", "triton"):
        layer = layer_of(slots=2, parts=3, dtype=torch.float32, backend=backend)
        select(layer, "local", "global", sizes=[1, 3])
        x = samples(8, 3, 10, dtype=torch.float32).requires_grad_()
        with recording() as launches:
            y = layer(x)
            y.square().sum().backward()
        assert bool(launches) == (backend == "triton")
        results.append([y, x.grad, *(p.grad for b in RANKS for p in branch_parameters(layer, b).values())])
    for ours, theirs in zip(*results):
        assert_close(ours, theirs, 2e-5)


# -- models ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["parameter", "linear"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Clip, Any]:
    """A random model here and in open_clip; its text projection a parameter or a linear."""
    text = {"proj_bias": request.param == "linear", "layers": 2}
    name = tiny_clip(tmp_path_factory.mktemp("model"), text=text, quick_gelu=True)
    return load_clip(name), open_clip.create_model(name).eval()


def adapted(net: Any, encoder: str, **options: Any) -> tuple[Any, list[DualLoRALinear]]:
    """A copy with adapters on one tower, and its layers in the engine's order of sites."""
    net = copy.deepcopy(net)
    if encoder == "image":
        adapt(net.visual, IMAGE, **options)
    else:
        adapt(net.transformer, ["attn", "c_fc", "c_proj"], **options)
        adapt(net, ["text_projection"], **options)
    tower, last = (net.visual, net.visual.proj) if encoder == "image" else (net, net.text_projection)
    layers = [m for b in tower.transformer.resblocks for m in (b.attn.qkv, b.attn.out, b.mlp.c_fc, b.mlp.c_proj)]
    return net, [*layers, last]


def inputs(clip: Clip, encoder: str) -> Tensor:
    """Ten images or prompts."""
    if encoder == "image":
        return samples(10, 3, clip.transform.size, clip.transform.size, dtype=torch.float32).cpu()
    return clip.tokenize([f"a photo of {'a very ' * (i % 3)}{word}" for i, word in enumerate("abcdefghij")])


def trunk(net: Any, encoder: str) -> nn.Module:
    """What holds the tower, and is frozen but for the adapters."""
    return net.visual if encoder == "image" else net


def encode(net: Any, encoder: str) -> Callable[[Tensor], Tensor]:
    return net.encode_image if encoder == "image" else net.encode_text


def flat(layers: list[DualLoRALinear], branch: str) -> Iterator[nn.Parameter]:
    for layer in layers:
        yield from (layer.branches[branch].A, layer.branches[branch].B)


@pytest.mark.parametrize("encoder", ["image", "text"])
def test_a_tower_at_the_start_is_unchanged(pair: tuple[Clip, Any], encoder: str) -> None:
    clip, net = pair
    x = inputs(clip, encoder)
    ours, layers = adapted(net, encoder, slots=5, **OPTIONS)
    with torch.no_grad():
        assert_close(encode(ours, encoder)(x), encode(net, encoder)(x), 1e-6)
    trained = {name for name, p in trunk(ours, encoder).named_parameters() if p.requires_grad}
    assert trained == {name for branch in RANKS for name in branch_parameters(trunk(ours, encoder), branch)}
    assert len(trained) == 5 * len(layers)


@pytest.mark.parametrize("encoder", ["image", "text"])
def test_a_tower_equals_the_engines(pair: tuple[Clip, Any], encoder: str) -> None:
    """Two clients and two views in a batch: features and every gradient, with the same adapters."""
    clip, net = pair
    tower, x = clip.tower(encoder), inputs(clip, encoder)
    bank = AdapterBank(tower_sites(tower.shape), [Branch("local", 4, gated=True), Branch("global", 2, gated=False)], 2)
    bank.initialize("gaussian", {"local": [[1], [2]], "global": [[3], [3]]})
    for state in bank.state.values():
        state.weights += 0.05 * torch.randn(state.weights.shape, generator=torch.Generator().manual_seed(4))
    ours, layers = adapted(net, encoder, slots=2, **OPTIONS)
    for name, state in bank.state.items():
        for pieces, parameters in (
            (state.weights, list(flat(layers, name))),
            (state.gates, [m.branches[name].gate for m in layers if m.branches[name].gate is not None]),
        ):
            for piece, parameter in zip(pieces.split([p[0].numel() for p in parameters], dim=1), parameters):
                parameter.data.copy_(piece.view_as(parameter))

    select(ours, "local", "global", sizes=[3, 2])
    features = encode(ours, encoder)(x)
    (features * torch.linspace(-1, 1, features.numel()).view_as(features)).sum().backward()
    adapters = bank.adapters(torch.tensor([0, 1]), [("local",), ("global",)], grad=True)
    groups = RowGroups((3, 2), views=2)
    if encoder == "image":
        expected = tower.features(clip.image_stem(x), groups, adapters)
    else:
        tokens, index = clip.text_stem(x)
        expected = tower.features(tokens, groups, adapters, index)
    loss = (expected * torch.linspace(-1, 1, expected.numel()).view_as(expected)).sum()
    gradients = adapters.gradients(loss, list(RANKS))
    assert_close(features, expected, 1e-5)
    for name, (weights, gates) in gradients.items():
        assert_close(torch.cat([p.grad.flatten(1) for p in flat(layers, name)], dim=1), weights, 2e-5)
        if name == "local":
            assert_close(torch.cat([m.branches[name].gate.grad.flatten(1) for m in layers], dim=1), gates, 2e-5)


@pytest.mark.parametrize("encoder", ["image", "text"])
def test_merge_gives_the_model_back(pair: tuple[Clip, Any], encoder: str) -> None:
    clip, net = pair
    x = inputs(clip, encoder)
    ours, _ = adapted(net, encoder, slots=2, **OPTIONS)
    randomise(ours, 0.05)
    for view in VIEWS:
        select(ours, view, sizes=[0, 10])
        merged = merge(copy.deepcopy(ours), slot=1, view=view)
        assert {n: t.shape for n, t in merged.state_dict().items()} == {n: t.shape for n, t in net.state_dict().items()}
        assert not [m for m in merged.modules() if "LoRA" in type(m).__name__]
        assert not any(p.requires_grad for p in trunk(merged, encoder).parameters())
        with torch.no_grad():
            assert_close(encode(merged, encoder)(x), encode(ours, encoder)(x), 1e-5)


def test_parameter_counts_of_the_paper() -> None:
    config = {k: v for k, v in open_clip.get_model_config("ViT-B-32").items() if k != "custom_text"}
    with torch.device("meta"):
        net = open_clip.CLIP(**config)
    for encoder, count in (("image", 334_336), ("text", 223_232)):
        ours, _ = adapted(net, encoder, ranks={"global": 2})
        assert sum(p.numel() for p in branch_parameters(ours, "global").values()) == count
        assert sum(p.numel() for p in trunk(ours, encoder).parameters() if p.requires_grad) == count


@pytest.mark.parametrize("mask", ["none", "bool", "float", "heads"])
def test_attention_takes_the_masks_of_torchs(mask: str) -> None:
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(8, 2, bias=mask != "bool", batch_first=True)
    ours, x = DualLoRAAttention(copy.deepcopy(theirs), **OPTIONS), torch.randn(3, 5, 8)
    future = torch.ones(5, 5).triu(1).bool()
    masks = {
        "none": None,
        "bool": future,
        "float": torch.zeros(5, 5).masked_fill(future, float("-inf")),
        "heads": future & (torch.rand(6, 5, 5) < 0.5),
    }
    expected = theirs(x, x, x, need_weights=False, attn_mask=masks[mask])[0]
    assert_close(ours(x, x, x, need_weights=False, attn_mask=masks[mask])[0], expected, 1e-6)


def test_state_goes_through_safetensors(pair: tuple[Clip, Any], tmp_path: Path) -> None:
    clip, net = pair
    x = inputs(clip, "image")
    (first, _), (second, _) = (adapted(net, "image", slots=2, **OPTIONS) for _ in range(2))
    randomise(first)
    save_file(first.state_dict(), tmp_path / "all.safetensors")
    second.load_state_dict(load_file(tmp_path / "all.safetensors"))
    assert torch.equal(second.encode_image(x), first.encode_image(x))
    (third, _) = adapted(net, "image", slots=2, **OPTIONS)
    for branch in RANKS:
        save_file(branch_parameters(first, branch), tmp_path / "branch.safetensors")
        _, unexpected = third.load_state_dict(load_file(tmp_path / "branch.safetensors"), strict=False)
        assert unexpected == []
    assert torch.equal(third.encode_image(x), first.encode_image(x))


def test_a_copy_is_its_own_and_keeps_the_selection() -> None:
    layer = layer_of()
    select(layer, "global")
    x = samples(2, 10)
    twin, before = copy.deepcopy(layer), layer(x)
    randomise(layer)
    assert torch.equal(twin(x), before)
    assert not torch.equal(layer(x), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_moves_to_a_dtype(dtype: torch.dtype) -> None:
    layer, x = layer_of(slots=2, parts=3), samples(4, 10)
    exact = layer(x)
    y = layer.to(dtype)(x.to(dtype))
    assert y.dtype == dtype
    assert_close(y.double(), exact, {torch.float32: 5e-6, torch.bfloat16: 3e-2, torch.float64: 0}[dtype])


def test_follows_autocast() -> None:
    layer, x = layer_of(dtype=torch.float32), samples(4, 10, dtype=torch.float32)
    exact = layer(x)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        y = layer(x)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.branches["local"].A.grad.dtype == torch.float32
    assert_close(y.float(), exact, 3e-2)


class Little(nn.Module):
    """One of each: an attention, a linear and a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.fc = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 10)
        self.proj = nn.Parameter(torch.randn(10, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.fc(x + self.attn(x, x, x, need_weights=False)[0]))[:, 0] @ self.proj


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_compiles_in_one_graph(backend: str) -> None:
    torch._dynamo.reset()
    model = randomise(adapt(Little(), ["attn", "fc", "proj"], slots=2, backend=backend, **OPTIONS)).to(DEVICE)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = samples(6, 3, 8, dtype=torch.float32)
    for views, sizes in ((["local"], None), (["local", "global"], [1, 2])):
        select(model, *views, sizes=sizes)
        results = []
        for function in (compiled, model):
            model.zero_grad()
            y = function(x)
            y.square().sum().backward()
            results.append([y, *(p.grad for p in branch_parameters(model, "local").values())])
        for ours, theirs in zip(*results):
            assert_close(ours, theirs, 1e-6)


# -- errors ---------------------------------------------------------------------------------------------------

LINEAR = nn.Linear(10, 18)
WRONG_LAYERS: list[tuple[dict[str, Any], str]] = [
    ({"ranks": {}}, "a branch at least"),
    ({"ranks": {"a": 0}}, "a rank and slots of 1"),
    ({"ranks": {"a": 1}, "slots": 0}, "slots of 1"),
    ({"ranks": {"a": 1}, "parts": 4}, "parts=4 does not divide the 18"),
    ({"ranks": {"a": 1}, "gated": ["b"]}, "gated: no branch 'b': choose from a"),
    ({"ranks": {"a": 1}, "init": "zeros"}, "unknown init 'zeros': choose from gaussian"),
]
WRONG_CALLS: list[tuple[tuple[int, ...], dict[str, Any], str]] = [
    ((3, 10), {}, "3 samples do not divide into 2 slots, 1 views"),
    ((4, 10), {"views": ["both"]}, "no branch 'both': choose from local, global"),
    ((4, 10), {"views": "local"}, "no branch 'l'"),
    ((4, 10), {"sizes": [4]}, "do not fit 2 slots"),
    (
        (4, 10),
        {"views": ["local", "global"], "sizes": [2, 1]},
        r"sizes=\[2, 1\] in 2 views do not fit 2 slots, 4 samples",
    ),
    ((4, 20), {}, r"x is \(4, 20\), expected \(4, 10\)"),
]


@pytest.mark.parametrize(("options", "message"), WRONG_LAYERS)
def test_refuses_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DualLoRALinear(LINEAR, **options)


@pytest.mark.parametrize(("shape", "options", "message"), WRONG_CALLS)
def test_refuses_calls(shape: tuple[int, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer_of(slots=2)(samples(*shape), **options)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("out_proj", "MultiheadAttention reads its weights itself"),
        ("in_proj_weight", "MultiheadAttention reads its weights itself"),
        ("ln_post", "visual.ln_post is a LayerNorm"),
        ("class_embedding", "is a Parameter"),
        ("fc3", "no module or parameter 'fc3'"),
    ],
)
def test_adapt_refuses_targets_and_replaces_nothing(pair: tuple[Clip, Any], target: str, message: str) -> None:
    net = copy.deepcopy(pair[1])
    with pytest.raises(ValueError, match=message):
        adapt(net, ["c_fc", target], **OPTIONS)
    assert list(net.state_dict()) == list(pair[1].state_dict())


def test_adapt_refuses_layers_with_a_fast_path() -> None:
    with pytest.raises(ValueError, match="linear1: TransformerEncoderLayer reads its weights itself"):
        adapt(nn.TransformerEncoderLayer(8, 2, batch_first=True), ["linear1"], **OPTIONS)


def test_select_and_branch_parameters_refuse_what_is_not_there(pair: tuple[Clip, Any]) -> None:
    for function in (select, branch_parameters):
        with pytest.raises(ValueError, match="no adapted linear: call adapt first"):
            function(pair[1], "local")
        with pytest.raises(ValueError, match="no branch 'lokal'"):
            function(layer_of(), "lokal")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"batch_first": False}, "batch_first=True"), ({"kdim": 4}, "kdim"), ({"dropout": 0.1}, "dropout")],
)
def test_attention_refuses_other_kinds(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DualLoRAAttention(nn.MultiheadAttention(8, 2, **{"batch_first": True, **options}), **OPTIONS)


def test_attention_refuses_cross_attention_and_weights() -> None:
    attention, x = DualLoRAAttention(nn.MultiheadAttention(8, 2, batch_first=True), **OPTIONS), torch.randn(2, 3, 8)
    with pytest.raises(ValueError, match="one tensor"):
        attention(x, x.clone(), x, need_weights=False)
    with pytest.raises(ValueError, match="need_weights=False"):
        attention(x, x, x)


def test_readme_example(capsys: pytest.CaptureFixture[str]) -> None:
    """The README's code runs as it stands and prints what its comments say."""
    readme = (Path(__file__).resolve().parent.parent / "README.md").read_text()
    found = re.search(r"<!-- example -->\n```python\n(.*?)```", readme, re.DOTALL)
    assert found is not None
    exec(compile(found[1], "README.md", "exec"), {})
    expected = re.findall(r"^print\(.*\)  # (.*)$", found[1], re.MULTILINE)
    assert expected
    assert capsys.readouterr().out.splitlines() == expected
