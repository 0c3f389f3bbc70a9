"""How many kernels one FEDDLP step launches, counted without a GPU.

The step runs on the CPU under a dispatch mode that counts every operation of torch that would be at least one kernel on
a GPU (views and allocations are none), with attention as the one fused operation that it is there; Triton's launches
are listed, not run. What an operation launches beyond one kernel (a concatenation of many tensors, a large reduction)
is not seen, so the counts are lower bounds for every variant.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode

from fastdlp.bench import common
from fastdlp.bench.baselines import PeftRounds
from fastdlp.bench.common import Progress
from fastdlp.bench.fastdlp_rounds import EngineRounds
from fastdlp.bench.problem import make_problem
from fastdlp.kernels import attention
from fastdlp.kernels.launch import recording
from fastdlp.kernels.tiles import assume

# No views by their schema, and yet no kernels.
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "lift_fresh"}
FREE |= {"_unsafe_view", "_local_scalar_dense", "_reshape_alias", "promote_types"}


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace == "aten" and not func.is_view and name not in FREE:
            self.operations[name] += 1
        return func(*args, **(kwargs or {}))


def count(step: Callable[[], object]) -> tuple[Counter[str], Counter[str]]:
    """Operations of torch and Triton's kernels that a step launches, by name."""
    plain, attention.PLAIN_TOKENS = attention.PLAIN_TOKENS, 0
    try:
        with assume("80"), recording(dry=True) as launched, _Counter() as counter:
            step()
    finally:
        attention.PLAIN_TOKENS = plain
    return counter.operations, Counter(launch.kernel.__name__ for launch in launched)


def bench_launches(model: str, with_peft: bool, progress: Progress) -> dict[str, Any]:
    """The counts of one step in bf16: PEFT's for each client, fastdlp's for any number of clients.

    Raises:
        FastdlpError: PEFT is wanted and not installed.
    """
    problem, cpu = make_problem(model, batch=2), torch.device("cpu")
    steps: dict[str, Callable[[], object]] = {}
    if with_peft:
        common.require_peft()
        steps["PEFT, adapters cast, a client"] = PeftRounds(problem, "bf16", cpu, cast=True).step
    for teacher in ("fresh", "pre-update"):
        for backend in ("torch", "triton"):
            rounds = EngineRounds(problem, "bf16", cpu, backend, teacher=teacher)
            steps[f"fastdlp --teacher {teacher} --backend {backend}"] = rounds.step
    rows = []
    for name, step in steps.items():
        progress(name)
        count(step)  # the first step also builds tables that are kept
        operations, kernels = count(step)
        rows.append(
            {
                "variant": name,
                "torch": operations.total(),
                "triton": kernels.total(),
                "operations": dict(operations.most_common()),
                "kernels": dict(kernels.most_common()),
            }
        )
    what = f"kernels that one FEDDLP step launches, {model}, image encoder, bf16"
    return {"what": what, "rows": rows, **common.facts(cpu, "peft", "transformers")}


def print_launches(result: dict[str, Any], console: Console) -> None:
    lines = [
        {
            "variant": row["variant"],
            "torch": f"{row['torch']:,}",
            "Triton": f"{row['triton']:,}",
            "total": f"{row['torch'] + row['triton']:,}",
        }
        for row in result["rows"]
    ]
    common.print_table(console, result["what"], lines)
    common.print_facts(console, result)
