"""The count of launches: it sees what runs, and the fused form needs fewer."""

from __future__ import annotations

from pathlib import Path

import torch

from fastdlp.bench.launches import bench_launches, count
from tests.models import tiny_clip


def test_what_is_counted() -> None:
    x = torch.ones(4, 4)
    operations, kernels = count(lambda: (x.t() @ x.view(16)[:4]).exp_().add(1))
    assert operations == {"mv": 1, "exp_": 1, "add": 1}
    assert kernels == {}


def test_the_fused_form_launches_less(tmp_path: Path) -> None:
    result = bench_launches(tiny_clip(tmp_path / "model", quick_gelu=True), with_peft=False, progress=print)
    rows = {row["variant"]: row for row in result["rows"]}
    for teacher, forwards in (("fresh", 3), ("pre-update", 2)):
        torch_form, fused = (rows[f"fastdlp --teacher {teacher} --backend {b}"] for b in ("torch", "triton"))
        assert torch_form["triton"] == 0
        assert fused["torch"] + fused["triton"] < 0.4 * torch_form["torch"]
        # A fold for every branch of every forward, one sum of partials for every branch that learns.
        assert fused["kernels"]["fold_kernel"] == forwards
        assert fused["kernels"]["sum_partials_kernel"] == fused["kernels"]["adamw_kernel"] == 2
        # Two blocks: 4 linears in the first, 5 in the last, whose q and kv are apart, and the projection.
        backwards = 2 if teacher == "fresh" else 1
        assert fused["kernels"]["adapter_gradients_kernel"] == 10 * backwards
