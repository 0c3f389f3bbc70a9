"""The main loop of a kernel in SASS as `cuobjdump -sass` prints it.

Loops are the natural loops of the control flow graph. A backward branch alone is none: ptxas moves the retry of a
failed wait (SYNCS) after the kernel's end and branches back into the middle of the loop from there.
"""

from __future__ import annotations

import re
from itertools import pairwise

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+((?:@!?U?P\w+\s+)?[A-Z][^;]*);")
PREDICATE = re.compile(r"^@|\bU?P\d")  # a guard, or an operand of the branch: `BRA !UP0, 0x10`
ENDS = re.compile(r"(?:@\S+ +)?(?:EXIT|RET|BRX|JMP|KILL|BRA)\b(?!\.DIV)")  # BRA.DIV: the slow path of a diverged warp
TENSOR = re.compile(r"\bHG?MMA\b")
COPIES = re.compile(r"\b(?:LDGSTS|UTMALDG)\b")
LOADS = re.compile(r"\b(?:LDG|LDGSTS|UTMALDG)\b")


def main_loop(sass: str) -> list[str]:
    """The instructions of one iteration of the main loop; all of a kernel without a loop that multiplies or loads.

    The main loop is the innermost with tensor instructions. Of several it is one with asynchronous copies (a low-rank
    product has a loop of its own, not pipelined), then the one with the most tensor instructions, then copies. Without
    tensor instructions it is the innermost with the most loads.
    """
    code = {int(address, 16): text.strip() for address, text in INSTRUCTION.findall(sass)}
    reached, loops = _natural_loops(code)

    def count(pattern: re.Pattern[str], loop: set[int]) -> int:
        return sum(pattern.search(code[address]) is not None for address in loop)

    for wanted in (TENSOR, LOADS):
        found = [loop for loop in loops if count(wanted, loop)]
        innermost = [loop for loop in found if not any(other < loop for other in found)]
        if innermost:
            order = (TENSOR, COPIES, LOADS)
            main = max(
                innermost, key=lambda loop: (count(COPIES, loop) > 0, *(count(pattern, loop) for pattern in order))
            )
            retries = set[int]().union(*(loop for loop in loops if loop < main))
            return [code[address] for address in sorted(main - retries)]
    return [code[address] for address in reached]


def _natural_loops(code: dict[int, str]) -> tuple[list[int], list[set[int]]]:
    """The addresses that can be reached, and those of every loop, one for each header."""
    targets = {a: int(text.split()[-1], 16) for a, text in code.items() if re.search(r"\bBRA\b(?!\.DIV)", text)}
    after = {address: [targets[address]] if address in targets else [] for address in code}
    for address, following in pairwise(code):
        if not ENDS.match(code[address]) or PREDICATE.search(code[address]) or ".CONV" in code[address]:
            after[address].append(following)
    entry = next(iter(code))
    before: dict[int, list[int]] = {entry: []}  # of reached addresses
    todo = [entry]
    while todo:
        address = todo.pop()
        todo += [following for following in after[address] if following not in before]
        for following in after[address]:
            before.setdefault(following, []).append(address)
    loops: dict[int, set[int]] = {}
    for latch, header in targets.items():
        if header > latch or latch not in before:
            continue
        body, todo = {header, latch}, [latch] if latch != header else []
        while todo:
            new = [address for address in before[todo.pop()] if address not in body]
            body.update(new)
            todo += new
        if entry not in body or header == entry:  # otherwise the entry reaches the latch without the header
            loops.setdefault(header, set()).update(body)
    return sorted(before), list(loops.values())
