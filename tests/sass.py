"""Reads what cuobjdump prints of a library: resources of kernels, their code, paths through it.

`cheapest_path` counts the instructions that a thread issues from entry to exit when it performs at
least the given numbers of certain instructions; asking for the loads, stores and transcendentals of
one chunk of elements picks the path that does the work out of all the early exits and rare cases.
"""

from __future__ import annotations

import heapq
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Resources:
    registers: int
    stack: int


@dataclass(frozen=True)
class Instruction:
    address: int
    predicated: bool
    text: str  # opcode and operands

    @property
    def opcode(self) -> str:
        return self.text.split()[0].rstrip(";")


def _run(tool: Path, *arguments: str) -> str:
    return subprocess.run(
        [str(tool), *arguments], check=True, capture_output=True, text=True
    ).stdout


def demangled(names: list[str]) -> list[str]:
    """`step_kernel<2>` for _ZN8fastdiff11step_kernelILi2EEEv..."""
    text = subprocess.run(
        ["c++filt"], input="\n".join(names), check=True, capture_output=True, text=True
    ).stdout
    return [
        re.sub(r"^void |fastdiff::|\(.*$| (?=>)", "", line)
        for line in text.rstrip("\n").split("\n")
    ]


def resources(cuobjdump: Path, library: Path, arch: str) -> dict[str, Resources]:
    """Registers and stack (spills are on it) of every kernel."""
    found = re.findall(
        r"Function (\S+):\s+REG:(\d+) STACK:(\d+)",
        _run(cuobjdump, "-arch", f"sm_{arch}", "--dump-resource-usage", str(library)),
    )
    names = demangled([name for name, _, _ in found])
    return {
        name: Resources(int(registers), int(stack))
        for name, (_, registers, stack) in zip(names, found, strict=True)
    }


def instructions(cuobjdump: Path, library: Path, arch: str) -> dict[str, list[Instruction]]:
    """The machine code of every kernel."""
    text = _run(cuobjdump, "-arch", f"sm_{arch}", "-sass", str(library))
    _, *functions = re.split(r"\n\s*Function : ", text)
    names = demangled([text.split("\n", 1)[0].strip() for text in functions])
    line = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?\s*([A-Z][^;]*;)")
    return {
        name: [
            Instruction(int(address, 16), bool(predicate), text)
            for address, predicate, text in line.findall(body)
        ]
        for name, body in zip(names, functions, strict=True)
    }


def cheapest_path(code: list[Instruction], doing: Mapping[str, int]) -> int:
    """Instructions on the shortest path to an EXIT with doing[pattern] matches of each pattern."""
    position = {instruction.address: index for index, instruction in enumerate(code)}
    patterns = [re.compile(pattern) for pattern in doing]
    wanted = tuple(doing.values())
    hits = [[bool(p.match(instruction.text)) for p in patterns] for instruction in code]
    best: dict[tuple[int, tuple[int, ...]], int] = {}
    queue = [(0, 0, tuple(0 for _ in wanted))]
    while queue:
        cost, index, done = heapq.heappop(queue)
        if best.get((index, done), cost + 1) <= cost:
            continue
        best[index, done] = cost
        instruction = code[index]
        done = tuple(
            min(count + hit, most)
            for count, hit, most in zip(done, hits[index], wanted, strict=True)
        )
        if instruction.opcode == "EXIT":
            if done == wanted:
                return cost + 1
            if not instruction.predicated:
                continue
        if instruction.opcode in ("BRA", "BRA.U"):
            target = int(re.findall(r"0x([0-9a-f]+)", instruction.text)[-1], 16)
            heapq.heappush(queue, (cost + 1, position[target], done))
            # A branch on a uniform predicate has that in its operands: BRA.U UP0, 0x...
            always = not instruction.predicated and not re.search(r"\bU?P\d", instruction.text)
            if always:
                continue
        if index + 1 < len(code):
            heapq.heappush(queue, (cost + 1, index + 1, done))
    raise AssertionError(f"no path does {dict(doing)}")
