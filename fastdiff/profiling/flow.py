"""Paths through machine code.

`cheapest_path` is what a thread issues from entry to exit when it performs at least the given
numbers of certain instructions; asking for the loads, stores and roots of one chunk of elements
picks the path that does the work out of all the early exits and rare cases.
"""

from __future__ import annotations

import heapq
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

__all__ = ["Instruction", "cheapest_path"]

_MOST_NODES = 60_000  # a search that goes on is not about to end


@dataclass(frozen=True)
class Instruction:
    """One machine instruction.

    Attributes:
        address: its place, ascending; also what `target` refers to.
        text: opcode and operands.
        target: where it may branch to.
        goes_on: the instruction after it may be the next.
        ends: the thread may end here.
        results: that it computes at a time; 2 of packed arithmetic.
    """

    address: int
    text: str
    target: int | None = None
    goes_on: bool = True
    ends: bool = False
    results: int = 1

    @property
    def opcode(self) -> str:
        return self.text.split()[0].rstrip(";")


def cheapest_path(code: Sequence[Instruction], doing: Mapping[str, int]) -> list[Instruction]:
    """The shortest path to an exit with doing[pattern] results of what matches each pattern.

    Of paths that do it, one with the fewest branches that could have gone the other way is taken,
    and of those the shortest: skipping work that a test allows to skip is not the common path.
    Raises ValueError when no path does all of it, or none is found in reasonable time.
    """
    blocks = _blocks(code, list(doing))
    wanted = tuple(doing.values())
    # A node is a block about to be entered and what has been done. Nodes come in the order of their
    # cost, so one that has done no more than an earlier one of its block leads to nothing better.
    Node = tuple[int, tuple[int, ...]]
    before: dict[Node, Node | None] = {}
    settled: list[list[tuple[int, ...]]] = [[] for _ in blocks]
    queue: list[tuple[int, int, Node, Node | None]] = [(0, 0, (0, (0,) * len(wanted)), None)]
    while queue:
        branches, cost, node, previous = heapq.heappop(queue)
        number, done = node
        if any(all(map(operator.ge, other, done)) for other in settled[number]):
            continue
        settled[number].append(done)
        before[node] = previous
        if len(before) > _MOST_NODES:
            raise ValueError("too many paths to find the common one")
        block = blocks[number]
        done = tuple(map(min, wanted, map(operator.add, done, block.hits)))
        if block.ends and done == wanted:
            return _path(code, blocks, before, node)
        branches += len(block.successors) + block.ends > 1
        cost += block.end - block.start
        for successor in block.successors:
            heapq.heappush(queue, (branches, cost, (successor, done), node))
    raise ValueError(f"no path does {dict(doing)}")


@dataclass(frozen=True)
class _Block:
    """Instructions start..end, run one after the other; hits[i]: results of pattern i's matches."""

    start: int
    end: int
    hits: tuple[int, ...]
    ends: bool
    successors: tuple[int, ...]


def _blocks(code: Sequence[Instruction], patterns: Sequence[str]) -> list[_Block]:
    position = {instruction.address: index for index, instruction in enumerate(code)}
    starts = {0}
    for index, instruction in enumerate(code):
        if instruction.target is not None:
            starts.add(position[instruction.target])
        if instruction.target is not None or instruction.ends or not instruction.goes_on:
            starts.add(index + 1)
    borders = [*sorted(starts - {len(code)}), len(code)]
    number = {start: index for index, start in enumerate(borders)}
    compiled = [re.compile(pattern) for pattern in patterns]
    blocks = []
    for start, end in pairwise(borders):
        last = code[end - 1]
        successors = [] if last.target is None else [number[position[last.target]]]
        if last.goes_on and end < len(code):
            successors.append(number[end])
        hits = tuple(
            sum(i.results for i in code[start:end] if pattern.match(i.text)) for pattern in compiled
        )
        blocks.append(_Block(start, end, hits, last.ends, tuple(successors)))
    return blocks


def _path(
    code: Sequence[Instruction],
    blocks: Sequence[_Block],
    before: Mapping[tuple[int, tuple[int, ...]], tuple[int, tuple[int, ...]] | None],
    last: tuple[int, tuple[int, ...]],
) -> list[Instruction]:
    path: list[_Block] = []
    node: tuple[int, tuple[int, ...]] | None = last
    while node is not None:
        path.append(blocks[node[0]])
        node = before[node]
    return [
        instruction for block in reversed(path) for instruction in code[block.start : block.end]
    ]
