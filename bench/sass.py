"""The main loop of a kernel in SASS, as `cuobjdump -sass` prints it: its tensor instructions, waits and copies.

Loops are the natural loops of the control flow graph: a backward branch alone is none, because ptxas moves the retry of
a failed wait (SYNCS) behind the kernel's end and branches back into the middle of the loop from there.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)([^;]*);")
PREDICATE = re.compile(r"\bU?P\d")

COUNTED: dict[str, Callable[[Instruction], bool]] = {
    "hgmma": lambda i: i.name == "HGMMA",
    "hmma": lambda i: i.name == "HMMA",
    "waits": lambda i: i.opcode.startswith("WARPGROUP.DEPBAR"),  # for wgmma
    "drains": lambda i: i.opcode.startswith("WARPGROUP.DEPBAR") and i.operands.endswith("0x0"),  # leave none in flight
    "barriers": lambda i: i.opcode.startswith(("BAR.SYNC", "BAR.RED")),
    "loads": lambda i: i.name == "LDG",
    "async_loads": lambda i: i.name in ("LDGSTS", "UTMALDG"),
}


@dataclass(frozen=True)
class Instruction:
    """`@guard opcode operands` at an address."""

    guard: str
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def target(self) -> int | None:
        """Of a branch; the slow path of a diverged warp (BRA.DIV) is left out, as it repeats the fast one."""
        if self.name != "BRA" or ".DIV" in self.opcode:
            return None
        return int(self.operands.split()[-1], 16)

    @property
    def falls_through(self) -> bool:
        """Whether the next instruction can follow; a branch may name its predicate as an operand (`BRA !UP0, 0x10`)."""
        ends = self.name in ("EXIT", "RET", "BRX", "JMP", "KILL") or self.target is not None
        conditional = self.guard or ".CONV" in self.opcode or PREDICATE.search(self.operands)
        return not ends or bool(conditional)


def count_main_loop(sass: str) -> dict[str, int]:
    """Counts of COUNTED for one iteration of the main loop.

    The main loop is the innermost that holds tensor instructions; of several, one with asynchronous loads (a low-rank
    product has a loop of its own, not pipelined), then the one with the most tensor instructions, then loads. Without
    any it is the innermost with the most loads. A kernel without a loop is counted as a whole.
    """
    code = {
        int(address, 16): Instruction(guard, opcode, operands.strip())
        for address, guard, opcode, operands in INSTRUCTION.findall(sass)
    }
    reached, loops = _natural_loops(code)

    def size(body: set[int], *names: str) -> int:
        return sum(COUNTED[name](code[address]) for address in body for name in names)

    def innermost(*names: str) -> list[set[int]]:
        found = [loop for loop in loops if size(loop, *names)]
        return [loop for loop in found if not any(other < loop for other in found)]

    candidates = innermost("hgmma", "hmma") or innermost("loads", "async_loads")
    once = reached
    if candidates:
        main = max(
            candidates,
            key=lambda loop: (
                size(loop, "async_loads") > 0,
                size(loop, "hgmma", "hmma"),
                size(loop, "async_loads"),
                size(loop, "loads"),
            ),
        )
        once = main.difference(*(loop for loop in loops if loop < main))  # without the retries of failed waits
    return {name: size(once, name) for name in COUNTED}


def _natural_loops(code: dict[int, Instruction]) -> tuple[set[int], list[set[int]]]:
    """The addresses that can be reached, and the loops as sets of addresses, one for every header."""
    after = dict(pairwise(sorted(code)))
    entry = min(code)
    before: dict[int, list[int]] = defaultdict(list)
    reached, todo = {entry}, [entry]
    while todo:
        address = todo.pop()
        instruction = code[address]
        following = after.get(address) if instruction.falls_through else None
        for successor in {following, instruction.target} - {None}:
            assert successor is not None
            before[successor].append(address)
            if successor not in reached:
                reached.add(successor)
                todo.append(successor)
    loops: dict[int, set[int]] = {}
    for latch in reached:
        header = code[latch].target
        if header is None or header > latch:
            continue
        body, todo = {header, latch}, [latch] if latch != header else []
        while todo:
            new = [address for address in before[todo.pop()] if address not in body]
            body.update(new)
            todo += new
        # Where the entry reaches the branch without its target, the target heads no loop.
        if header == entry or entry not in body:
            loops.setdefault(header, set()).update(body)
    return reached, list(loops.values())
