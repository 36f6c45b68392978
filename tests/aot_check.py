"""Compiles the Triton kernels for GPUs that need not be there and prints what came out, as JSON.

    python aot_check.py [TARGET ...]        all targets by default

A process of its own, because in the tests' process Triton is its interpreter.
"""

import json
import re
import sys

import torch

from fastdiff.backends.triton import prepare
from fastdiff.kernels import aot
from fastdiff.kernels.policy import policy_of
from fastdiff.profiling.cases import Case

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SHAPE = (16, 4, 64, 64)
ODD = (15, 1, 37, 37)  # an odd size even with all samples in one

# For every target ...
CASES = [
    (Case("q_sample", BF16), SHAPE),
    (Case("ddpm_clipped", F32, BF16), SHAPE),
    (Case("ddim_guided", F16), SHAPE),
]
# ... and, compilation taking its time, for one of each vendor.
MORE_CASES = [
    (Case("randn"), SHAPE),
    (Case("chain"), SHAPE),
    (Case("q_sample"), SHAPE),
    (Case("ddpm"), SHAPE),
    (Case("ddpm_clipped", BF16), SHAPE),
    (Case("ddpm_learned", F16), SHAPE),
    (Case("ddim_guided"), SHAPE),
    (Case("ddim_guided", BF16), SHAPE),
    (Case("dpmpp_2m"), SHAPE),
    (Case("ddim_guided"), ODD),
    (Case("ddim_guided", BF16), ODD),
]
MORE_TARGETS = ("sm_90", "gfx942")


def inspect(compiled) -> dict[str, object]:
    """Counts of what must and what must not be in the code.

    contracted: FMAs, but for those that make up a square root, which only machine code has; so
    AMD's is looked at where there is none.
    nan_dropping: minima and maxima, whose NaN numpy, and so the interpreter, passes on.
    narrow: accesses of 8 or 16 bits. wide: accesses of 128 bits.
    """
    usage = aot.usage(compiled)
    contracted = r"fmuladd|\bcontract\b|\bfadd fast\b|\bfmul fast\b"
    found = {
        "registers": usage.registers,
        "spilled": usage.spilled,
        "shared": usage.shared,
        "contracted": len(re.findall(contracted, compiled.asm["llir"])),
    }

    def count(text: str, **patterns: str) -> None:
        for name, pattern in patterns.items():
            found[name] = found.get(name, 0) + len(re.findall(pattern, text))

    if "ptx" in compiled.asm:
        count(
            compiled.asm["ptx"],
            contracted=r"\bfma\.",
            approximate=r"\.approx|div\.full",
            nan_dropping=r"\b(?:min|max)\.f32",
            flushing=r"\.ftz",
            narrow=r"(?:ld|st)\.global[.\w]*\.[bus](?:8|16)\b",
            wide=r"(?:ld|st)\.global[.\w]*\.v4\.b32",
        )
    else:
        if not re.search("v_(sqrt|rsq)_", compiled.asm["amdgcn"]):
            count(compiled.asm["amdgcn"], contracted=r"v_(?:pk_)?(?:fma|mac|mad)\w*_f32")
        count(
            compiled.asm["amdgcn"],
            nan_dropping=r"v_(?:min|max|med3)\w*_f32",
            flushing=r"float_denorm_mode_32 [^3]",
            narrow=r"(?:load|store)_(?:ubyte|sbyte|byte|ushort|sshort|short)",
            wide=r"(?:load|store)_dwordx4",
        )
    return found


def main(targets: list[str]) -> None:
    results = []
    for name in targets or aot.TARGETS:
        gpu = aot.target(name)
        for case, shape in CASES + (MORE_CASES if name in MORE_TARGETS else []):
            arguments = case.arguments(shape)
            launch = prepare(case.op)(
                *arguments, nvidia=gpu.backend == "cuda", policy=policy_of(name)
            )
            found = inspect(aot.compile_for(launch, gpu))
            limit = launch.options.get("maxnreg", 64)
            key = {"target": name, "case": case.id, "odd": shape == ODD, "limit": limit}
            results.append({**key, **found})
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
