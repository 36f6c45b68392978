"""Reads the machine code of the CUDA kernel that a case launches."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fastdiff.backends.build import source_root
from fastdiff.ops.step import parse
from fastdiff.profiling import sass
from fastdiff.profiling.cases import Case
from fastdiff.profiling.paths import CommonPath, common_path

__all__ = ["arithmetic", "inspect", "kernel_name", "rounds"]

_THREADS = 256  # of a block: csrc/cuda/launch.cuh
# By case, the structure in csrc/cuda/loss_chunk.cuh.
_LOSSES = {"mse": "NoiseError", "hybrid": "ClippedHybrid", "log_prob": "StepDensity"}
_TYPES = {torch.float32: "float", torch.bfloat16: "bf16_t", torch.float16: "f16_t"}


def kernel_name(case: Case) -> str:
    """The kernel that csrc/cuda/*.cu launches for a case, as sass.read names it."""
    state = _TYPES[case.dtype]
    if case.name == "randn":
        return f"randn_kernel<Layout<8, {_flag(state == 'float')}>, {state}, {_flag(case.fast)}>"
    if case.name == "chain":
        return f"chain_kernel<{state}>"
    if case.op in ("loss", "loss_grad"):
        structure = _LOSSES[case.name.removesuffix("_grad")]
        model = _TYPES[case.model_dtype or case.dtype]
        if structure == "NoiseError":  # no tensor but the model output
            state = model
        served = ("float",) if structure == "ClippedHybrid" else ("float", "bf16_t")
        known = state in served and model != "f16_t"
        made_for = f"KnownLoss<{structure}, {state}, {model}, {_flag(case.fast)}>"
        return f"{case.op}_kernel<{made_for if known else 'AnyLoss'}>"
    if case.op.startswith("bits"):  # from logits of x_0, but for q_sample
        return f"{case.op}_kernel<{_flag(case.name != 'bits_q_sample')}>"
    layout = parse(case.arguments((1, 1))[2])
    spec, model_outputs = layout.spec, layout.model_outputs
    outputs = len(spec.outputs)
    model = _TYPES[case.model_dtype or case.dtype] if model_outputs else state
    typed = model == state or state == "float"
    if spec.states == outputs == 1 and not spec.learned and typed:
        flags = ", ".join(map(_flag, (spec.clamp is not None, spec.draws > 0, case.fast)))
        return f"plain_kernel<Plain<{state}, {model}, {model_outputs}, {flags}>>"
    return f"step_kernel<{next(most for most in (1, 2, 4, 8) if outputs <= most)}>"


def _flag(value: bool) -> str:
    return "true" if value else "false"


@cache
def rounds(target: str) -> int:
    """Chunks that a thread works through once the GPU is full: the policy of launch.cuh."""
    text = (source_root() / "cuda" / "launch.cuh").read_text()
    policies: dict[str, str] = dict(re.findall(r"\{(\d+), \d+, (\d+)", text))
    return int(policies.get(target.removeprefix("sm_")) or policies["0"])


def inspect(library: Path, target: str, cases: Sequence[Case]) -> list[dict[str, Any] | str]:
    """Figures of every case, as triton_code.inspect gives them; or why there are none."""
    try:
        kernels = sass.read(library, target)
    except RuntimeError as error:  # a disassembler older than the target
        return [str(error)] * len(cases)
    return [_figures(kernels, case, rounds(target)) for case in cases]


def _elements(case: Case) -> int:
    """Of a round of the kernel's loop: the width of its layout, or a leaf of the tree of sums."""
    if case.op == "bits_bound":
        return 32
    return 4 if case.name.startswith("hybrid") else 8


def _figures(kernels: dict[str, sass.Kernel], case: Case, rounds: int) -> dict[str, Any] | str:
    name = kernel_name(case)
    kernel = kernels.get(name)
    if kernel is None:
        return f"the library has no kernel {name}"
    path: CommonPath | str
    try:
        path = common_path(kernel, case, _elements(case), loops=True)
    except ValueError as error:
        path = str(error)
    return {
        "kernel": name,
        "registers": kernel.registers,
        "stack": kernel.stack,
        "spills": sum(i.opcode.startswith(("LDL", "STL")) for i in kernel.code),
        "shared": kernel.shared,
        "threads": _THREADS,
        "rounds": rounds,
        "path": path,
    }


def arithmetic(library: Path) -> dict[str, dict[str, int]]:
    """By kernel, counts in its PTX: fused multiply-adds, approximations, flushing of denormals.

    Nothing is counted in a kernel that has the fast form of noise, by itself or beside the exact
    one: that form fuses and approximates.
    """
    texts = sass.ptx(library)
    names = sass.demangled([text.split("(", 1)[0].strip() for text in texts])
    return {
        name: {}
        if "lg2.approx" in text
        else {
            "contracted": len(re.findall(r"\bfma\.", text)),
            "approximate": len(re.findall(r"\.approx|div\.full", text)),
            "flushing": len(re.findall(r"\.ftz", text)),
        }
        for name, text in zip(names, texts, strict=True)
    }
