"""Compiles the Triton kernel of a case for a GPU that need not be there, and reads what came out.

Triton must be the compiler, not its interpreter: not with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import math
import re
import tempfile
from pathlib import Path
from typing import Any

from fastdiff.backends.triton import prepare
from fastdiff.profiling import amdgcn, sass
from fastdiff.profiling.cases import Case
from fastdiff.profiling.paths import CommonPath, common_path

__all__ = ["inspect"]


def inspect(case: Case, target: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """Figures of the launch that a case with samples of `shape` becomes on `target`.

    Its "path" is a sentence where the common path was not found. Raises what the compiler raises.
    """
    from fastdiff.kernels import aot, policy

    gpu = aot.target(target)
    nvidia = gpu.backend == "cuda"
    row = policy.ROWS.get(target, policy.UNKNOWN)
    launch = prepare(case.op)(*case.arguments(shape), nvidia=nvidia, policy=row)
    compiled = aot.compile_for(launch, gpu)
    kernel: sass.Kernel | amdgcn.Kernel
    if nvidia:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            (kernel,) = sass.read(Path(file.name), target).values()
        resources = {
            "stack": kernel.stack,
            "spills": sum(i.opcode.startswith(("LDL", "STL")) for i in kernel.code),
        }
    else:
        kernel = amdgcn.parse(compiled.asm["amdgcn"])
        resources = {
            "stack": 0, "spills": kernel.spills, "scalar_registers": kernel.scalar_registers
        }  # fmt: skip
    threads = compiled.metadata.num_warps * gpu.warp_size
    block = launch.constants["BLOCK"]
    rounds = max(1, round(math.prod(shape) / (block * math.prod(launch.grid))))
    path: CommonPath | str
    try:
        path = common_path(kernel, case, block // threads, loops=rounds > 1)
    except ValueError as error:
        path = str(error)
    return {
        "kernel": compiled.metadata.name,
        "registers": kernel.registers,
        **resources,
        "shared": compiled.metadata.shared,
        "threads": threads,
        "rounds": rounds,
        "path": path,
        "arithmetic": _arithmetic(compiled.asm),
    }


def _arithmetic(asm: dict[str, str]) -> dict[str, int]:
    """Counts of what changes bits, over the whole kernel.

    contracted: fused multiply-adds, but for those that make up a root or a quotient, which only
    machine code has; so AMD's is looked at where there is neither. approximate: functions of the
    special function unit, and quotients. flushing: denormals to zero. nan_dropping: minima and
    maxima that lose a NaN. narrow: accesses of 8 or 16 bits.
    """
    found = {
        "contracted": len(
            re.findall(r"fmuladd|\bcontract\b|\bfadd fast\b|\bfmul fast\b", asm["llir"])
        )
    }
    if "ptx" in asm:
        text = asm["ptx"]
        patterns = {
            "contracted": r"\bfma\.",
            "approximate": r"\.approx|div\.full",
            "flushing": r"\.ftz",
            "nan_dropping": r"\b(?:min|max)\.f32",
            "narrow": r"(?:ld|st)\.global[.\w]*\.[bus](?:8|16)\b",
        }
    else:
        text = asm["amdgcn"]
        patterns = {
            "flushing": r"float_denorm_mode_32 [^3]",
            "nan_dropping": r"v_(?:min|max|med3)\w*_f32",
            "narrow": r"(?:load|store)_(?:ubyte|sbyte|byte|ushort|sshort|short)",
        }
        if not re.search("v_(sqrt|rsq|rcp)_", text):
            # A product that widens its operands adds a negative zero, which changes nothing.
            patterns["contracted"] = r"v_(?:pk_)?(?:fma|mac|mad)\w*_f32(?!.*\bneg\(0\))"
    for name, pattern in patterns.items():
        found[name] = found.get(name, 0) + len(re.findall(pattern, text))
    return found
