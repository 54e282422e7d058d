"""Paths through machine code (SASS) as cuobjdump prints it: their instructions, and a model of their time.

A path is found by what it has to execute (so many tensor-core products and asynchronous copies, say), as the
shortest one that does: a kernel's fast path is the shortest through its branches, and addresses mean nothing.
The time is that of one warp alone. It follows the compiler's own control words, which say for how long each
instruction holds up the next and which results it waits for; latencies of memory and of the special units are
assumptions.
"""

from __future__ import annotations

import heapq
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

INSTRUCTION = re.compile(
    r"^\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);\s+/\* 0x[0-9a-f]{16} \*/\n\s+/\* 0x([0-9a-f]{16})", re.M
)

# Cycles until a result is there that the compiler waits for by a scoreboard, by opcode; assumed, for Hopper.
# (LD: of shared memory, where the compiler does not know that it is.)
LATENCY = {
    **dict.fromkeys(("LDG", "ATOM", "ATOMG"), 350), "LD": 60, "ATOMS": 60, "LDC": 35, "HMMA": 35, "LDSM": 33,
    **dict.fromkeys(("LDS", "MUFU", "BAR"), 30), "SHFL": 26, "LDGSTS": 20, "POPC": 20, "FLO": 20,
    **dict.fromkeys(("I2F", "F2I", "S2R", "S2UR", "STS"), 25),
    **dict.fromkeys(("CS2R", "F2FP", "I2FP", "IMAD"), 10),
}  # fmt: skip
OTHER_LATENCY = 12
BRANCH_CYCLES = 8  # of one that is taken


@dataclass(frozen=True)
class Instruction:
    address: int
    text: str
    control: int

    @cached_property
    def words(self) -> list[str]:
        return re.sub(r"^@!?U?P\w+\s+", "", self.text).split()

    @cached_property
    def opcode(self) -> str:
        return self.words[0]

    @property
    def family(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def conditional(self) -> bool:
        """Whether a branch may not be taken. (DIV and CONV ask whether lanes have diverged.)"""
        return self.text.startswith("@") or bool(re.search(r"BRA\S*(\.DIV|\.CONV| +!?U?P)", self.text))

    @property
    def width(self) -> int:
        """32-bit words that each lane of a load or store moves."""
        return 4 if ".128" in self.opcode else 2 if ".64" in self.opcode else 1

    @property
    def skipped(self) -> bool:
        """Never executed: its predicate is false."""
        return self.text.startswith(("@!PT ", "@!UPT "))

    @property
    def target(self) -> int:
        return int(re.findall(r"0x([0-9a-f]+)", self.text)[-1], 16)

    # Fields of the control word: cycles until the next instruction may issue, the scoreboards (7: none) that
    # are set until its result is there or its operands are read, and a bit for each that it waits for.
    @property
    def stall(self) -> int:
        return max(1, self.control >> 41 & 15)

    @property
    def writes(self) -> int:
        return self.control >> 46 & 7

    @property
    def reads(self) -> int:
        return self.control >> 49 & 7

    @property
    def waits(self) -> int:
        return self.control >> 52 & 63


@dataclass
class Block:
    """Instructions that are executed one after another, and where it goes on."""

    code: list[Instruction]
    next: list[int] = field(default_factory=list)  # addresses of blocks; none: the end
    callee: int | None = None  # called at its end


class Place(NamedTuple):
    """A block that is executed, and where the functions that are under way return to."""

    block: int
    returns: tuple[int, ...]


class Function:
    """The machine code of a kernel."""

    def __init__(self, text: str) -> None:
        self.code = [Instruction(int(a, 16), t.strip(), int(c, 16)) for a, t, c in INSTRUCTION.findall(text)]
        addresses = [i.address for i in self.code]
        following = dict(itertools.pairwise(addresses))
        leaders = {addresses[0]} if addresses else set()
        for i in self.code:
            if i.family in ("BRA", "CALL"):
                leaders.add(i.target)
            if i.family in ("BRA", "CALL", "EXIT", "RET", "BREAK") and i.address in following:
                leaders.add(following[i.address])
        self.blocks: dict[int, Block] = {}
        self._counted: dict[tuple, dict[int, tuple[int, ...]]] = {}
        block = Block([])
        for i in self.code:
            if i.address in leaders:
                if block.code and not _ends(block.code[-1]):
                    block.next = [i.address]
                block = self.blocks[i.address] = Block([])
            block.code.append(i)
            after = [following[i.address]] if i.address in following else []
            # A call under a condition is a jump that sm_80 takes out of loops.
            if i.family == "BRA" or (i.family == "CALL" and i.conditional):
                block.next = [i.target, *after] if i.conditional else [i.target]
            elif i.family == "CALL":
                block.callee, block.next = i.target, after
            elif i.family in ("EXIT", "RET") and not i.text.startswith("@"):
                block.next = []
            elif _ends(i):
                block.next = after

    @property
    def bytes(self) -> int:
        return 16 * len(self.code)

    @property
    def body_bytes(self) -> int:
        """Without the functions that it calls, which are out of the way of what does not call them."""
        found, queue = set(), [min(self.blocks)]
        while queue:
            at = queue.pop()
            if at not in found:
                found.add(at)
                queue += self.blocks[at].next
        return 16 * self.length(list(found))

    def blocks_with(self, pattern: str) -> list[int]:
        return [at for at, b in self.blocks.items() if any(re.match(pattern, i.opcode) for i in b.code)]

    def counts(self, block: Block, wanted: Mapping[str, str]) -> tuple[int, ...]:
        """How many of each it executes; of what is called words, the words that they move."""
        return tuple(
            sum(
                i.width if name.endswith("words") else 1
                for i in block.code
                if not i.skipped and re.match(pattern, i.opcode)
            )
            for name, pattern in wanted.items()
        )

    def _next(self, at: Place) -> Iterator[Place]:
        """Where a path may go on, calls and returns included.

        No kernel calls a function from within itself, so a path that seems to has left one by a jump.
        """
        block, returns = self.blocks[at.block], at.returns
        if block.callee is not None and block.next:
            if block.next[0] not in returns:
                yield Place(block.callee, (block.next[0], *returns))
            return
        if block.code[-1].family == "RET" and returns:
            yield Place(returns[0], returns[1:])
        for to in block.next:
            yield Place(to, returns)

    def _counts_of_blocks(self, wanted: Mapping[str, str]) -> dict[int, tuple[int, ...]]:
        key = tuple(wanted.items())
        if key not in self._counted:
            self._counted[key] = {at: self.counts(block, wanted) for at, block in self.blocks.items()}
        return self._counted[key]

    def shortest(
        self,
        begins: Iterable[int],
        goal: Callable[[int], bool],
        wanted: Mapping[str, str],
        amounts: Mapping[str, int],
        most: int = 20000,
    ) -> list[int] | None:
        """The blocks of the shortest path from one of `begins` to one for which goal(address) holds.

        Before it enters that, it has executed exactly so many of each of `wanted` (patterns of opcodes; a
        negative amount: at least so many). None: there is no such path of at most `most` instructions.
        """
        limits = tuple(amounts[name] for name in wanted)
        per_block = self._counts_of_blocks(wanted)
        done = tuple(abs(limit) for limit in limits)

        def add(have: tuple[int, ...], block: int) -> tuple[int, ...] | None:
            more = per_block[block]
            if not any(more):
                return have
            out = []
            for h, m, limit in zip(have, more, limits, strict=True):
                if 0 <= limit < h + m:
                    return None
                out.append(min(h + m, -limit) if limit < 0 else h + m)
            return tuple(out)

        # Dijkstra's algorithm; a state is a place and what was executed on the way to it.
        queue, best, before = [], {}, {}
        for begin in begins:
            have = add((0,) * len(limits), begin)
            if have is not None:
                start = (Place(begin, ()), have)
                best[start], before[start] = len(self.blocks[begin].code), None
                queue.append((best[start], *start))
        heapq.heapify(queue)
        while queue:
            length, at, have = heapq.heappop(queue)
            if length > best[(at, have)]:
                continue
            for to in self._next(at):
                if have == done and goal(to.block):
                    path, state = [], (at, have)
                    while state is not None:
                        path.append(state[0].block)
                        state = before[state]
                    return path[::-1]
                more = add(have, to.block)
                total = length + len(self.blocks[to.block].code)
                if more is not None and total < best.get((to, more), most + 1):
                    best[(to, more)] = total
                    before[(to, more)] = (at, have)
                    heapq.heappush(queue, (total, to, more))
        return None

    def instructions(self, path: list[int]) -> Iterator[Instruction]:
        for at in path:
            yield from self.blocks[at].code

    def length(self, path: list[int]) -> int:
        return sum(len(self.blocks[at].code) for at in path)

    def cycles(self, path: list[int], latency: Mapping[str, int] = LATENCY) -> int:
        """The model's time of a path, by a warp that has the scheduler for itself."""
        now, ready = 0, [0] * 6
        for n, at in enumerate(path):
            for i in self.blocks[at].code:
                for b in range(6):
                    if i.waits >> b & 1:
                        now = max(now, ready[b])
                cost = 4 if i.skipped else latency.get(i.family, OTHER_LATENCY)
                if i.writes < 6:
                    ready[i.writes] = now + cost
                if i.reads < 6:
                    ready[i.reads] = now + min(cost, 20)
                now += i.stall
            last = self.blocks[at].code[-1]
            taken = last.family == "BRA" and n + 1 < len(path) and path[n + 1] == last.target
            if taken or last.family in ("CALL", "RET"):
                now += BRANCH_CYCLES
        return now

    def histogram(self, path: list[int]) -> Counter[str]:
        return Counter(i.family for i in self.instructions(path))


def _ends(i: Instruction) -> bool:
    return i.family in ("BRA", "CALL", "EXIT", "RET", "BREAK")


def functions(listing: str) -> dict[str, Function]:
    """The functions of a listing, by their mangled names."""
    parts = listing.split("Function : ")[1:]
    return {part.split(None, 1)[0]: Function(part) for part in parts}
