"""The same numbers on a CUDA GPU as on the CPU, and the same bits from run to run."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from fastdlp.config import TrainConfig
from fastdlp.kernels.attention import attention, attention_reference
from fastdlp.kernels.groups import RowGroups
from tests.awkward import dual_lora, dual_lora_reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

# Largest error relative to the largest entry, operands rounded to the dtype; fp32 without TF32.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("groups", [RowGroups((63, 5, 5, 1, 0, 31)), RowGroups((100, 100, 7), views=2)], ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_operator(groups: RowGroups, dtype: torch.dtype, backend: str) -> None:
    if dtype == torch.float64 and backend == "triton":
        pytest.skip("Triton's kernels take no fp64")
    g = torch.Generator().manual_seed(0)
    slots, parts, rank, width, out = len(groups.sizes), 3, 6, 100, 96
    adapters = torch.float64 if dtype == torch.float64 else torch.float32
    shapes = {
        "x": (groups.rows, width),
        "weight": (parts * out, width),
        "bias": (parts * out,),
        "A": (slots, parts, rank, width),
        "B": (slots, parts, out, rank),
        "c": (slots, groups.views, parts, rank),
    }
    exact = {
        n: torch.randn(s, generator=g, dtype=torch.float64).to(adapters if n in "ABc" else dtype).double()
        for n, s in shapes.items()
    }
    dy = torch.randn(groups.rows, parts * out, generator=g, dtype=torch.float64).to(dtype)
    device = {n: t.to("cuda", adapters if n in "ABc" else dtype) for n, t in exact.items()}
    results = []
    ours = partial(dual_lora, backend=backend)
    for function, operands, grad in ((ours, device, dy.cuda()), (dual_lora_reference, exact, dy.double())):
        leaves = [operands[n].requires_grad_() for n in "xABc"]
        y = function(**operands, groups=groups)
        results.append([y, *torch.autograd.grad(y, leaves, grad)])
    for value, reference in zip(*results):
        assert (value.double().cpu() - reference).abs().max() <= TOLERANCE[dtype] * reference.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(4, 3, 50, 16, device="cuda", dtype=dtype) for _ in range(3))
    mask = torch.ones(50, 50, dtype=torch.bool, device="cuda").tril()
    reference = attention_reference(q.double(), k.double(), v.double(), mask)
    assert (attention(q, k, v, mask).double() - reference).abs().max() <= (1e-5 if dtype == torch.float32 else 3e-2)


@pytest.mark.parametrize("masked", [True, False])
def test_attention_is_never_cudnns(masked: bool) -> None:
    """192 tokens: of T mod 128 = 64 cuDNN's backward with a mask has given NaN."""
    q, k, v = (torch.randn(2, 3, 192, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    mask = torch.ones(192, 192, dtype=torch.bool, device="cuda").tril() if masked else None
    y = attention_reference(q, k, v, mask, causal=not masked)
    assert "Cudnn" not in type(y.grad_fn).__name__
    y.sum().backward()
    assert not any(t.grad.isnan().any() for t in (q, k, v))


@pytest.mark.parametrize("encoder", ["image", "text"])
@pytest.mark.parametrize("protocol", ["paper", "reference"])
def test_training_follows_the_cpu(tmp_path: Path, protocol: str, encoder: str) -> None:
    """Losses of two rounds in fp32: the same curve. Noise of 2e-7 in the tokens moves them by 1e-5 at the most on a
    CPU; TF32 anywhere moves them by 5e-3."""
    curves = {}
    for device in ("cpu", "cuda"):
        curves[device] = _losses(tmp_path / device, device=device, protocol=protocol, encoder=encoder, precision="fp32")
    for cpu, cuda in zip(curves["cpu"], curves["cuda"]):
        assert cuda == pytest.approx(cpu, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("encoder", ["image", "text"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_same_bits_every_run(tmp_path: Path, backend: str, encoder: str, precision: str) -> None:
    from safetensors.torch import load_file

    runs = [tmp_path / "a", tmp_path / "b"]
    for run in runs:
        _losses(run, device="cuda", backend=backend, encoder=encoder, precision=precision)
    for name in ("client-00", "client-03", "server"):
        first, second = (load_file(run / "adapters" / f"{name}.safetensors") for run in runs)
        for key, value in first.items():
            assert torch.equal(value, second[key]), f"{name}: {key}"


def _losses(run: Path, **options: object) -> list[float]:
    """Every loss of two rounds on the embedded data."""
    import json

    from fastdlp.run.train import train

    train(TrainConfig(rounds=2, clients=4, out=str(run), **options))  # type: ignore[arg-type]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [value for line in lines for value in line["losses"].values()]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(("encoder", "teacher"), [("image", "fresh"), ("image", "pre-update"), ("text", "fresh")])
def test_graphs_follow_the_plain_steps(tmp_path: Path, encoder: str, teacher: str, backend: str) -> None:
    """Losses of two rounds with every step through a CUDA graph, and without."""
    options = {"device": "cuda", "encoder": encoder, "teacher": teacher, "backend": backend, "precision": "fp32"}
    plain = _losses(tmp_path / "plain", cuda_graph=False, **options)
    assert _losses(tmp_path / "graph", cuda_graph=True, **options) == pytest.approx(plain, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_no_step_waits_for_the_host(tmp_path: Path, graph: bool) -> None:
    """A round's steps with synchronisation turned into an error, after rounds that compile, fill caches and record."""
    from fastdlp.run.setup import prepare

    engine = prepare(TrainConfig(device="cuda", clients=4, cuda_graph=graph, out=str(tmp_path))).engine
    for number in (1, 2):
        engine.train_round(number)
    run = engine.run
    assert not graph or any(held.replay for held in run.held.values())  # type: ignore[attr-defined]

    def strict(*inputs: object) -> torch.Tensor:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return run(*inputs)  # type: ignore[arg-type]
        finally:
            torch.cuda.set_sync_debug_mode("default")

    engine.run = strict
    losses = engine.train_round(3)  # raises where a step waits
    assert losses.batches > 0
    assert not losses.not_finite


def test_memory_stays_within_its_estimate(tmp_path: Path) -> None:
    """The peak of a round's activations against `activation_bytes`, ViT-B/32 in bf16."""
    from fastdlp.bench.fastdlp_rounds import EngineRounds
    from fastdlp.bench.problem import make_problem
    from fastdlp.engine.memory import GRAPHS, activation_bytes

    problem, device = make_problem("ViT-B-32-quickgelu", 32, clients=10), torch.device("cuda")
    rounds = EngineRounds(problem, "bf16", device)
    rounds.round()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    rounds.round()
    peak, tower = torch.cuda.max_memory_allocated(), problem.clip.image
    assert peak < 12e9
    estimate = GRAPHS * 320 * activation_bytes(tower.shape, 50, tower.heads, 2, "torch", "cuda")
    assert 0.5 * estimate < peak - before < 1.3 * estimate
