"""The main loop of a kernel in SASS, as `cuobjdump -sass` prints it, and how often it waits, synchronises and loads.

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
    "syncs": lambda i: i.opcode.startswith("SYNCS.PHASECHK"),  # waits for an mbarrier, mostly TMA's
    "shuffles": lambda i: i.name == "SHFL",
    "ldg": lambda i: i.name == "LDG",
    "cp_async": lambda i: i.name == "LDGSTS",
    "tma": lambda i: i.name == "UTMALDG",
}


@dataclass(frozen=True)
class Instruction:
    """`@guard opcode operands` at an address."""

    address: int
    guard: str
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def target(self) -> int | None:
        """Where a branch goes; the slow path of a diverged warp (BRA.DIV) is left out, as it repeats the fast one."""
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
    """Counts of COUNTED for one iteration of the main loop, and "loop", its number of instructions.

    The main loop is the innermost that holds tensor instructions; of several, one with asynchronous copies (a low-rank
    product has a loop of its own, not pipelined), then the one with the most tensor instructions, then copies. Without
    any it is the innermost with the most loads. A kernel without a loop is counted as a whole, with "loop" 0.
    """
    code = {
        int(address, 16): Instruction(int(address, 16), guard, opcode, operands.strip())
        for address, guard, opcode, operands in INSTRUCTION.findall(sass)
    }
    reached, loops = _natural_loops(code)

    def count(body: set[int], name: str) -> int:
        return sum(COUNTED[name](code[address]) for address in body)

    def size(body: set[int], *names: str) -> int:
        return sum(count(body, name) for name in names)

    copies, tensor = ("cp_async", "tma"), ("hgmma", "hmma")
    candidates = _innermost([loop for loop in loops if size(loop, *tensor)])
    candidates = candidates or _innermost([loop for loop in loops if size(loop, "ldg", *copies)])
    if not candidates:
        return {name: count(reached, name) for name in COUNTED} | {"loop": 0}
    main = max(
        candidates,
        key=lambda loop: (size(loop, *copies) > 0, size(loop, *tensor), size(loop, *copies), size(loop, "ldg")),
    )
    # Without the retries of failed waits, which are loops inside.
    once = main.difference(*(loop for loop in loops if loop < main))
    return {name: count(once, name) for name in COUNTED} | {"loop": len(once)}


def _innermost(loops: list[set[int]]) -> list[set[int]]:
    return [loop for loop in loops if not any(other < loop for other in loops)]


def _natural_loops(code: dict[int, Instruction]) -> tuple[set[int], list[set[int]]]:
    """The addresses that can be reached, and the loops as sets of addresses, one for every header."""
    order = sorted(code)
    after = dict(pairwise(order))
    entry = order[0]
    before: dict[int, list[int]] = defaultdict(list)
    reached, todo = {entry}, [entry]
    while todo:
        here = todo.pop()
        instruction = code[here]
        following = after.get(here) if instruction.falls_through else None
        for address in {following, instruction.target}:
            if address is None:
                continue
            before[address].append(here)
            if address not in reached:
                reached.add(address)
                todo.append(address)
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
