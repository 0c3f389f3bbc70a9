"""What a step keeps in memory is what the estimate says, and the batches that follow from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdlp.adapters.bank import AdapterBank
from fastdlp.adapters.branches import Branch, TowerShape, tower_sites
from fastdlp.bench import cases
from fastdlp.clip.load import load_clip
from fastdlp.engine import memory
from fastdlp.engine.memory import GRAPHS, activation_bytes, rows_at_once
from fastdlp.errors import FastdlpError
from fastdlp.kernels.groups import RowGroups
from fastdlp.kernels.launch import recording
from fastdlp.kernels.tiles import assume
from tests.models import tiny_clip

VIT_B_32 = TowerShape(layers=12, width=768, mlp=3072, embed=512)
TOKENS, HEADS = 50, 12


def kept_bytes(tower: Any, rows: int, tokens: int, backend: str) -> int:
    """Bytes of all storages that a forward with adapters keeps for its backward, weights and adapters left out."""
    shape = tower.shape
    bank = AdapterBank(tower_sites(shape), [Branch("global", 2, gated=False, lora_alpha=16.0)], 1)
    bank.initialize("gaussian", {"global": [[0]]})
    adapters = bank.adapters(torch.tensor([0]), [("global",)], grad=True)
    found: dict[int, int] = {}
    ours = {t.untyped_storage().data_ptr() for A, B, c in adapters._stacked for t in (A, B, c)}
    ours |= {leaf.untyped_storage().data_ptr() for leaves in adapters.leaves.values() for leaf in leaves}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.numel() >= rows * tokens and storage.data_ptr() not in ours:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.randn(rows, tokens, shape.width)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = replace(tower, backend=backend).features(x, RowGroups((rows,), 1), adapters)
    assert out.requires_grad
    frozen = {p.untyped_storage().data_ptr() for p in _weights(tower)}
    return sum(size for pointer, size in found.items() if pointer not in frozen)


def _weights(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, tuple):
        return [t for item in value for t in _weights(item)]
    return [t for item in vars(value).values() for t in _weights(item)] if hasattr(value, "__dict__") else []


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_what_is_kept_is_what_is_estimated(tmp_path: Path, backend: str) -> None:
    """Of one graph, without what a running block takes; the last block keeps less, ranks and norms a little."""
    clip = load_clip(tiny_clip(tmp_path / "model", quick_gelu=True))
    tower, shape = clip.image, clip.image.shape
    rows, tokens = 8, len(clip.image_stem.positions)
    running = (4 * shape.width + 3 * shape.mlp) * tokens * 4
    estimate = rows * (activation_bytes(shape, tokens, tower.heads, 4, backend, "cpu") - running)
    per_block = estimate / shape.layers
    kept = kept_bytes(tower, rows, tokens, backend)
    assert estimate - 1.05 * per_block <= kept <= 1.2 * estimate


@pytest.mark.parametrize("arch", ["80", "90"])
def test_partial_sums_are_what_is_estimated(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ten clients' two branches on ViT-B/32, whose last block needs fewer."""
    model, views = cases.Model("ViT-B/32", TOKENS, HEADS, False, VIT_B_32), cases.VIEWS[0]
    tower, groups = cases.empty_tower(model, "quick_gelu", torch.bfloat16), RowGroups((32,) * 10, len(views))
    bank = AdapterBank(tower_sites(VIT_B_32), cases.BRANCHES, 10, "meta")
    adapters = bank.adapters(torch.arange(10, device="meta"), views, grad=True)
    x = torch.empty(groups.rows, TOKENS, VIT_B_32.width, dtype=torch.bfloat16, device="meta")
    with assume(arch), recording(dry=True):
        tower.features(x, groups, adapters, normalize=True)
    found = adapters.folded(torch.bfloat16).folded.workspace().nbytes / groups.rows
    estimate = activation_bytes(VIT_B_32, TOKENS, HEADS, 2, "triton", "cuda")
    monkeypatch.setattr(memory, "PARTIAL_RANK", 0)
    estimate -= activation_bytes(VIT_B_32, TOKENS, HEADS, 2, "triton", "cuda")
    assert 0.85 * estimate <= found <= 1.05 * estimate


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_ten_clients_of_vit_b_32_within_12_gb(backend: str) -> None:
    """10 clients × 32 images × 2 branches in bf16, with adapters, moments, gradients and the weights."""
    rows = 10 * 32
    activations = GRAPHS * rows * activation_bytes(VIT_B_32, TOKENS, HEADS, 2, backend, "cuda")
    adapters = 10 * 3 * 334_336 * 4 * 6  # weights, two moments, a copy for the forward, gradients twice
    weights = 2 * (87_849_216 + 63_428_096)
    assert activations + adapters + weights < 12e9


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_hundred_clients_on_40_gb(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    free = 40e9 - 100 * 3 * 334_336 * 4 * 3 - 2 * (87_849_216 + 63_428_096)
    monkeypatch.setattr(memory, "free_memory", lambda device: int(free))
    rows = rows_at_once(VIT_B_32, TOKENS, HEADS, 2, backend, torch.device("cuda"), least=32)
    assert rows >= 20 * 32  # clients at once
    assert GRAPHS * rows * activation_bytes(VIT_B_32, TOKENS, HEADS, 2, backend, "cuda") <= 0.8 * free


def test_a_batch_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: 10**9)
    with pytest.raises(FastdlpError, match=r"a step of one client takes about .* GB \(32 rows of 50 tokens\) and cpu"):
        rows_at_once(VIT_B_32, TOKENS, HEADS, 4, "torch", torch.device("cpu"), least=32)


def test_a_cpu_s_rows_fit_its_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: 10**12)
    rows = rows_at_once(TowerShape(4, 128, 512, 64), 17, 4, 4, "torch", torch.device("cpu"), least=32)
    assert rows * 512 * 17 * 4 <= memory.CACHE < (rows + 1) * 512 * 17 * 4
