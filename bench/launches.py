"""How many kernels one FEDDLP step launches and how many bytes they move, counted without a GPU.

The step runs on the CPU under a dispatch mode that counts every operation of torch that would be at least one kernel on
a GPU (views and allocations are none), with attention as the one fused operation that it is there; Triton's launches
are listed, not run. What an operation launches beyond one kernel (a concatenation of many tensors, a large reduction)
is not seen, so the counts are lower bounds, for every form alike.

Bytes are those of the kernels' docstrings: every operand is read once and every result written once, and what an
update changes in place is both. What a cache does not hold comes on top, for every form alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdlp.bench.engine import image_rounds
from fastdlp.bench.machine import machine, peft_versions
from fastdlp.bench.peft_baseline import PeftRounds
from fastdlp.bench.problem import make_problem
from fastdlp.kernels import attention
from fastdlp.kernels.launch import Launch, recording
from fastdlp.kernels.tiles import assume

# Not views by their schema, and yet no kernel.
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "lift_fresh"}
FREE |= {"_unsafe_view", "_local_scalar_dense", "_reshape_alias", "promote_types"}


# Of the optimizer's kernels, what is read and written.
IN_PLACE = {f"{stack}{moment}_ptr" for stack in ("weight", "gate") for moment in ("", "_m", "_v")}


@dataclass
class Counted:
    """Operations of torch and Triton's kernels, by name, and the bytes that they move."""

    operations: Counter[str] = field(default_factory=Counter)
    kernels: Counter[str] = field(default_factory=Counter)
    bytes: int = 0

    @property
    def total(self) -> int:
        """Launches."""
        return self.operations.total() + self.kernels.total()


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counted = Counted()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        result = func(*args, **(kwargs or {}))
        if func.namespace == "aten" and not func.is_view and name not in FREE:
            self.counted.operations[name] += 1
            self.counted.bytes += _bytes(tree_leaves((args, kwargs))) + _bytes(tree_leaves(result))
        return result


def _bytes(values: Iterable[Any]) -> int:
    """Of the different tensors among these; an expanded one has no more than its storage."""
    tensors = {id(value): value for value in values if isinstance(value, Tensor)}.values()
    return sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in tensors)


def _bytes_of_launches(launches: Sequence[Launch]) -> int:
    """Each branch's sum reads its own part of the partial sums, so all of them together read the workspace once."""
    total, partials = 0, {}
    for launch in launches:
        operands = [getattr(operand, "base", operand) for operand in launch.operands]  # of a tensor descriptor
        named = list(zip(launch.kernel.arg_names, operands))
        if launch.kernel.__name__ == "sum_partials_kernel":
            partials[id(operands[0])] = operands.pop(0)
        total += _bytes(operands) + _bytes(operand for name, operand in named if name in IN_PLACE)
    return total + _bytes(partials.values())


def count(step: Callable[[], object]) -> Counted:
    """What a step launches."""
    plain, attention.PLAIN_TOKENS = attention.PLAIN_TOKENS, 0
    try:
        with assume("80"), recording(dry=True) as launched, _Counter() as counter:
            step()
    finally:
        attention.PLAIN_TOKENS = plain
    counted = counter.counted
    counted.kernels = Counter(launch.kernel.__name__ for launch in launched)
    counted.bytes += _bytes_of_launches(launched)
    return counted


FORMS = ("peft", "torch", "triton")


def bench_launches(model: str, clients: int, batch: int, only: Sequence[str] = FORMS) -> dict[str, Any]:
    """The counts of one step in bf16: PEFT's (a client's, times clients) and fastdlp's forms.

    A first step goes before the one that is counted: it makes tables that are kept. Launches do not depend on `batch`.

    Args:
        only: of FORMS. All but "triton" compute on the CPU, which takes minutes for ten clients of 32 images.

    Raises:
        FastdlpError: PEFT is wanted and not installed.
    """
    versions = {"torch": torch.__version__, **(peft_versions() if "peft" in only else {})}
    problem, cpu = make_problem(model, batch, clients), torch.device("cpu")
    forms: list[tuple[str, int, Callable[[], object]]] = []
    if "peft" in only:
        forms.append(("PEFT, adapters cast", clients, PeftRounds(problem.small(1), "bf16", cpu, cast=True).step))
    for teacher in ("fresh", "pre-update"):
        for backend in (form for form in FORMS[1:] if form in only):
            rounds = image_rounds(problem, "bf16", cpu, backend, teacher=teacher)
            forms.append((f"fastdlp --teacher {teacher} --backend {backend}", 1, rounds.step))
    rows = []
    for name, times, step in forms:
        count(step)
        found = count(step)
        rows.append(
            {
                "form": name,
                "torch": times * found.operations.total(),
                "triton": times * found.kernels.total(),
                "bytes": times * found.bytes,
                "operations": dict(found.operations.most_common()),
                "kernels": dict(found.kernels.most_common()),
            }
        )
    return {
        "command": " ".join(
            [
                f"fastdlp bench launches --model {model} --clients {clients} --batch-size {batch}",
                *(f"--only {form}" for form in only if len(only) < len(FORMS)),
            ]
        ),
        "what": f"launches of one FEDDLP step, {model}, image encoder, {clients} × {batch} images, bf16",
        "rows": rows,
        "commit": machine(cpu)["commit"],
        "versions": versions,
    }


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The counts as a Markdown table."""
    lines = ["| form | torch operations | Triton launches | in all | GB moved |", "|---|---|---|---|---|"]
    for row in rows:
        launches = f"{row['torch']:,} | {row['triton']:,} | {row['torch'] + row['triton']:,}"
        lines.append(f"| {row['form']} | {launches} | {row['bytes'] / 1e9:.1f} |")
    return "\n".join(lines) + "\n"
