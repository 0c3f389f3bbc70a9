"""The count of launches: it sees what runs, and the fused form needs fewer."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch

from fastdlp.bench.launches import FORMS, _bytes_of_launches, bench_launches, count
from fastdlp.kernels.launch import Launch
from tests.models import tiny_clip


def test_what_is_counted() -> None:
    x = torch.ones(4, 4)
    counted = count(lambda: (x.t() @ x.view(16)[:4]).exp_().add(1))
    assert counted.operations == {"mv": 1, "exp_": 1, "add": 1}
    assert counted.kernels == {}
    # [4, 4] and [4] read, [4] written; [4] changed in place; [4] read, [4] written. A view is as large as it is.
    assert counted.bytes == 4 * (16 + 4 + 4) + 4 * (4 + 4) + 4 * (4 + 4)


def test_bytes_of_launches() -> None:
    """Every operand once, whatever its strides, a tensor that is passed twice once, and the optimizer's state twice."""
    names = ["x_ptr", "up_ptr", "again_ptr", "weight_ptr", "weight_grad_ptr", "K"]
    x, state, grads = torch.empty(10, 8)[:, :4], torch.empty(6), torch.empty(6)
    kernel = SimpleNamespace(arg_names=names, __name__="a_kernel")
    launch = Launch(kernel, (1,), (x, x[:1].expand(5, 4), x, state, grads, 7), {})
    assert _bytes_of_launches([launch]) == 4 * (40 + 20 + 6 + 6) + 4 * 6
    sums = SimpleNamespace(arg_names=["partial_ptr", "out_ptr"], __name__="sum_partials_kernel")
    both = [Launch(sums, (1,), (x, torch.empty(n)), {}) for n in (3, 5)]
    assert _bytes_of_launches(both) == 4 * (40 + 3 + 5)


def test_the_fused_form_launches_less(tmp_path: Path) -> None:
    result = bench_launches(tiny_clip(tmp_path / "model", quick_gelu=True), 2, 2, FORMS[1:])
    rows = {row["form"]: row for row in result["rows"]}
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
        assert fused["bytes"] < torch_form["bytes"]
