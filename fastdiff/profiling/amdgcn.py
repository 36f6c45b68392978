"""Reads the assembly that Triton's AMD compiler writes: resources and instructions.

It is text from before the assembler, so counts are exact; which pipe of CDNA takes an instruction
is known less well than for NVIDIA, and classes are approximate.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from fastdiff.profiling.flow import Instruction

__all__ = ["Kernel", "access", "classify", "parse"]

_DWORDS = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "b128": 128, "b64": 64}
_CLASSES = (
    ("mufu", r"v_(?:sqrt|rsq|rcp|log|exp|sin|cos)_"),
    ("imad", r"v_(?:mul_lo|mul_hi|mad_u64|mad_i64)_"),
    ("fp32", r"v_(?:pk_)?(?:add|sub|subrev|mul|fma|fmac|mac|mad)\w*_(?:legacy_)?f(?:32|16)"),
    ("alu", r"v_"),
    ("memory", r"(?:buffer|global|flat|scratch|ds)_"),
)


@dataclass(frozen=True)
class Kernel:
    """Registers of a thread (vector), of a wavefront (scalar), and how many are spilled.

    shared: bytes of local data share of a block.
    """

    registers: int
    scalar_registers: int
    spills: int
    shared: int
    code: tuple[Instruction, ...]


def classify(instruction: Instruction) -> str:
    """The class of gpus.CLASSES that an instruction counts in; scalar ones are "other"."""
    text = instruction.text
    return next((name for name, pattern in _CLASSES if re.match(pattern, text)), "other")


def access(instruction: Instruction) -> tuple[str, int] | None:
    """("load" or "store", bits) of a vector access to global memory; None for others."""
    match = re.match(r"(?:buffer|global|flat)_(load|store)_(\w+)", instruction.opcode)
    if match is None:
        return None
    kind, width = match.groups()
    bits = next((bits for name, bits in _DWORDS.items() if width.startswith(name)), 0)
    return kind, bits or (8 if "byte" in width else 16)


def parse(text: str) -> Kernel:
    """The one kernel of a module's assembly."""
    labels: dict[str, int] = {}
    lines: list[str] = []
    for line in text.split("\n"):
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label[1]] = len(lines)
        elif instruction := re.match(r"\t([a-z]+_[a-z]\w*(?:[ \t][^;]*)?)", line):
            lines.append(instruction[1].strip())
        elif line.startswith(".Lfunc_end"):
            break
    code = []
    for address, line in enumerate(lines):
        opcode, *operands = line.split()
        target = labels[operands[0]] if re.match(r"s_c?branch", opcode) else None
        goes_on = opcode not in ("s_branch", "s_endpgm")
        ends, results = opcode == "s_endpgm", 2 if opcode.startswith("v_pk_") else 1
        code.append(Instruction(address, line, target, goes_on, ends, results))
    field = {name: int(value) for name, value in re.findall(r"\.(\w+):\s+(\d+)", text)}
    return Kernel(
        field["vgpr_count"],
        field["sgpr_count"],
        field["vgpr_spill_count"] + field["sgpr_spill_count"],
        field["group_segment_fixed_size"],
        tuple(code),
    )
