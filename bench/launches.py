"""How many kernels one FEDDLP step launches, counted without a GPU.

The step runs on the CPU under a dispatch mode that counts every operation of torch that would be at least one kernel on
a GPU (views and allocations are none), with attention as the one fused operation that it is there; Triton's launches
are listed, not run. What an operation launches beyond one kernel (a concatenation of many tensors, a large reduction)
is not seen, so the counts are lower bounds, for every form alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastdlp.bench.engine import image_rounds
from fastdlp.bench.machine import machine, peft_versions
from fastdlp.bench.peft_baseline import PeftRounds
from fastdlp.bench.problem import make_problem
from fastdlp.kernels import attention
from fastdlp.kernels.launch import recording
from fastdlp.kernels.tiles import assume

# Not views by their schema, and yet no kernel.
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "lift_fresh"}
FREE |= {"_unsafe_view", "_local_scalar_dense", "_reshape_alias", "promote_types"}


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace == "aten" and not func.is_view and name not in FREE:
            self.operations[name] += 1
        return func(*args, **(kwargs or {}))


def count(step: Callable[[], object]) -> tuple[Counter[str], Counter[str]]:
    """What a step launches: operations of torch, and Triton's kernels, by name."""
    plain, attention.PLAIN_TOKENS = attention.PLAIN_TOKENS, 0
    try:
        with assume("80"), recording(dry=True) as launched, _Counter() as counter:
            step()
    finally:
        attention.PLAIN_TOKENS = plain
    return counter.operations, Counter(launch.kernel.__name__ for launch in launched)


def bench_launches(model: str, clients: int, with_peft: bool = True) -> dict[str, Any]:
    """The counts of one step in bf16, two images a client: PEFT's (a client's, times clients) and fastdlp's forms.

    Raises:
        FastdlpError: PEFT is wanted and not installed.
    """
    versions = {"torch": torch.__version__, **(peft_versions() if with_peft else {})}
    problem, cpu = make_problem(model, 2, clients), torch.device("cpu")
    forms: list[tuple[str, int, Callable[[], object]]] = []
    if with_peft:
        forms.append(("PEFT, adapters cast", clients, PeftRounds(problem.small(1), "bf16", cpu, cast=True).step))
    for teacher in ("fresh", "pre-update"):
        for backend in ("torch", "triton"):
            rounds = image_rounds(problem, "bf16", cpu, backend, teacher=teacher)
            forms.append((f"fastdlp --teacher {teacher} --backend {backend}", 1, rounds.step))
    rows = []
    for name, times, step in forms:
        operations, kernels = count(step)
        rows.append(
            {
                "form": name,
                "torch": times * operations.total(),
                "triton": times * kernels.total(),
                "operations": dict(operations.most_common()),
                "kernels": dict(kernels.most_common()),
            }
        )
    peft_flag = [] if with_peft else ["--without-peft"]
    return {
        "command": " ".join(["fastdlp bench launches", f"--model {model}", f"--clients {clients}", *peft_flag]),
        "what": f"launches of one FEDDLP step, {model}, image encoder, {clients} client{'s' * (clients > 1)}, bf16",
        "rows": rows,
        "commit": machine(cpu)["commit"],
        "versions": versions,
    }


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The counts as a Markdown table."""
    lines = ["| form | torch operations | Triton launches | in all |", "|---|---|---|---|"]
    for row in rows:
        lines.append(f"| {row['form']} | {row['torch']:,} | {row['triton']:,} | {row['torch'] + row['triton']:,} |")
    return "\n".join(lines) + "\n"
