"""Reads NVIDIA machine code: resources of kernels, their instructions, paths through them.

    kernels = read(library, "sm_90")            # a .cubin, or a library with code for sm_90
    path = cheapest_path(kernels["randn_kernel"].code, {r"STG\\.E\\.128": 2})

`cheapest_path` is what a thread issues from entry to exit when it performs at least the given
numbers of certain instructions; asking for the loads, stores and transcendentals of one chunk of
elements picks the path that does the work out of all the early exits and rare cases.
"""

from __future__ import annotations

import heapq
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = ["Instruction", "Kernel", "cheapest_path", "cuobjdump", "ptx", "read"]


@dataclass(frozen=True)
class Instruction:
    """One machine instruction; text is its opcode and operands."""

    address: int
    predicated: bool
    text: str

    @property
    def opcode(self) -> str:
        return self.text.split()[0].rstrip(";")


@dataclass(frozen=True)
class Kernel:
    """registers per thread; stack and shared memory in bytes (spills are on the stack)."""

    registers: int
    stack: int
    shared: int
    code: tuple[Instruction, ...]


@cache
def cuobjdump() -> Path:
    """The disassembler that Triton carries. Raises RuntimeError where there is none."""
    try:
        import triton
    except ImportError as error:
        raise RuntimeError(f"no cuobjdump: it comes with triton, and {error}") from None
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not path.exists():
        raise RuntimeError(f"no cuobjdump: this triton has none at {path}")
    return path


def _run(*arguments: str) -> str:
    return subprocess.run(
        [str(cuobjdump()), *arguments], check=True, capture_output=True, text=True
    ).stdout


def _demangled(names: Sequence[str]) -> list[str]:
    """`step_kernel<2>` for _ZN8fastdiff11step_kernelILi2EEEv...; Triton's names are plain."""
    if not any(name.startswith("_Z") for name in names):
        return list(names)
    text = subprocess.run(
        ["c++filt"], input="\n".join(names), check=True, capture_output=True, text=True
    ).stdout
    return [
        re.sub(r"^void |fastdiff::|\(.*$| (?=>)", "", line)
        for line in text.rstrip("\n").split("\n")
    ]


def read(binary: Path, arch: str) -> dict[str, Kernel]:
    """Every kernel of a .cubin or library that holds machine code for `arch` ("sm_90")."""
    usage = re.findall(
        r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)",
        _run("-arch", arch, "--dump-resource-usage", str(binary)),
    )
    text = _run("-arch", arch, "-sass", str(binary))
    _, *functions = re.split(r"\n\s*Function : ", text)
    bodies = {body.split("\n", 1)[0].strip(): body for body in functions}
    line = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?\s*([A-Z][^;]*;)")
    names = _demangled([name for name, *_ in usage])
    return {
        name: Kernel(
            int(registers),
            int(stack),
            int(shared),
            tuple(
                Instruction(int(address, 16), bool(predicate), text)
                for address, predicate, text in line.findall(bodies[mangled])
            ),
        )
        for name, (mangled, registers, stack, shared) in zip(names, usage, strict=True)
    }


def ptx(library: Path) -> list[str]:
    """The PTX of every kernel in a library."""
    return _run("-ptx", str(library)).split(".entry ")[1:]


def cheapest_path(code: Sequence[Instruction], doing: Mapping[str, int]) -> list[Instruction]:
    """The shortest path to an EXIT with doing[pattern] matches of each pattern.

    Raises ValueError when no path does all of it.
    """
    position = {instruction.address: index for index, instruction in enumerate(code)}
    patterns = [re.compile(pattern) for pattern in doing]
    wanted = tuple(doing.values())
    hits = [[bool(p.match(instruction.text)) for p in patterns] for instruction in code]
    # A node is an instruction about to be issued and what has been done; it is settled once.
    Node = tuple[int, tuple[int, ...]]
    start: Node = (0, tuple(0 for _ in wanted))
    before: dict[Node, Node | None] = {}
    queue: list[tuple[int, Node, Node | None]] = [(0, start, None)]
    while queue:
        cost, node, previous = heapq.heappop(queue)
        if node in before:
            continue
        before[node] = previous
        index, done = node
        instruction = code[index]
        done = tuple(
            min(count + hit, most)
            for count, hit, most in zip(done, hits[index], wanted, strict=True)
        )
        if instruction.opcode == "EXIT":
            if done == wanted:
                return _path(code, before, node)
            if not instruction.predicated:
                continue
        if instruction.opcode in ("BRA", "BRA.U"):
            target = int(re.findall(r"0x([0-9a-f]+)", instruction.text)[-1], 16)
            heapq.heappush(queue, (cost + 1, (position[target], done), node))
            # A branch on a uniform predicate has that in its operands: BRA.U UP0, 0x...
            if not instruction.predicated and not re.search(r"\bU?P\d", instruction.text):
                continue
        if index + 1 < len(code):
            heapq.heappush(queue, (cost + 1, (index + 1, done), node))
    raise ValueError(f"no path does {dict(doing)}")


def _path(
    code: Sequence[Instruction],
    before: Mapping[tuple[int, tuple[int, ...]], tuple[int, tuple[int, ...]] | None],
    last: tuple[int, tuple[int, ...]],
) -> list[Instruction]:
    path, node = [], last
    while True:
        path.append(code[node[0]])
        previous = before[node]
        if previous is None:
            return path[::-1]
        node = previous
