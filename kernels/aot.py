"""Ahead-of-time compilation for GPUs that this machine need not have.

    compiled = compile_for(example("ddpm", torch.bfloat16, target("sm_90")), target("sm_90"))
    usage(compiled)        # registers, spilled bytes, shared memory

A launch comes from the same `prepare` that serves real calls, here with tensors on the meta device,
so what is inspected is what runs.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastdiff.kernels import chain, randn, step
from fastdiff.kernels.launch import Launch
from fastdiff.ops.step import StepSpec

__all__ = ["EXAMPLES", "TARGETS", "Usage", "compile_for", "example", "target", "usage"]

TARGETS = (
    "sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120",
    "gfx90a", "gfx942", "gfx950",
)  # fmt: skip
EXAMPLES = ("randn", "q_sample", "ddpm", "ddpm_learned", "ddim_guided", "chain")

_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
}


def target(name: str) -> GPUTarget:
    """The compiler's description of "sm_90", "gfx942" and so on."""
    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name[3:]), 32)
    return GPUTarget("hip", name, 64)  # CDNA; RDNA's wavefront would be 32


def example(
    name: str,
    dtype: torch.dtype,
    gpu: GPUTarget,
    *,
    shape: tuple[int, ...] = (16, 3, 64, 64),
    model_dtype: torch.dtype | None = None,
    fast: bool = False,
) -> Launch:
    """The launch of one of EXAMPLES on samples of `dtype`.

    q_sample: x_t = a x_0 + b z, a row per sample. ddpm: clamped x_0, seeded noise, in place;
    ddpm_learned: the same with learned variance. ddim_guided: two model outputs, no noise, in
    place. With a model_dtype the model's tensors have it, and its next input is written too.
    """
    nvidia = gpu.backend == "cuda"
    model_dtype, cast = model_dtype or dtype, model_dtype is not None

    def tensor(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(*size, dtype=dtype, device="meta")

    def solver_step(spec: StepSpec, outputs: int, rows: int = 1) -> Launch:
        x = tensor(*shape)
        channels = shape[1] * (2 if spec.learned else 1)
        output = tensor(shape[0], channels, *shape[2:], dtype=model_dtype)
        return step.prepare(
            [x], [output] * outputs, [],
            tensor(1000, spec.width, dtype=torch.float32), tensor(rows, dtype=torch.int64), None,
            tensor(1000, 1, 2, dtype=torch.int64) if spec.draws and outputs else None,
            tensor(1, dtype=torch.float32) if outputs == 2 else None, None,
            spec.encoded, [0, 0, 0, 2], [x if outputs else tensor(*shape)],
            tensor(*shape, dtype=model_dtype) if cast else None, nvidia=nvidia,
        )  # fmt: skip

    match name:
        case "randn":
            return randn.prepare(tensor(*shape), None, 0, 0, 0, 0, 0, fast, nvidia=nvidia)
        case "q_sample":  # columns S0, z
            spec = StepSpec(1, (0b1001,), None, 1, dtype, fast=fast)
            return solver_step(spec, outputs=0, rows=shape[0])
        case "ddpm" | "ddpm_learned":  # columns S0, c, z; c from S0, o
            learned = name == "ddpm_learned"
            spec = StepSpec(1, (0b1101,), 0b11, 1, dtype, learned, fast)
            return solver_step(spec, outputs=1)
        case "ddim_guided":  # columns S0, o
            return solver_step(StepSpec(1, (0b11,)), outputs=2)
        case "chain":
            return chain.prepare(
                tensor(*shape), None, tensor(1000, 2, dtype=torch.float32),
                tensor(1000, dtype=torch.int64), None, 0, 0, fast, tensor(8, *shape),
                nvidia=nvidia,
            )  # fmt: skip
    raise ValueError(f"name must be one of {', '.join(EXAMPLES)}, not {name!r}")


def _signature(value: Any, annotation: str) -> Any:
    if isinstance(value, tuple):
        return tuple(_signature(element, "") for element in value)
    if isinstance(value, Tensor):
        return _POINTERS[value.dtype]
    return "constexpr" if value is None else annotation


def compile_for(launch: Launch, gpu: GPUTarget, aligned: bool = True) -> Any:
    """Compiles one launch; with `aligned`, every tensor begins at a multiple of 16 bytes."""
    kernel = launch.kernel
    values = [*launch.arguments, *launch.constants.values()]
    names = [*kernel.arg_names[: len(launch.arguments)], *launch.constants]
    position = {name: index for index, name in enumerate(kernel.arg_names)}
    assert set(names) == set(position), set(names) ^ set(position)

    signature, constants, attributes = {}, {}, {}
    for name, value in sorted(zip(names, values, strict=True), key=lambda pair: position[pair[0]]):
        index = position[name]
        if name in launch.constants or value is None:
            signature[name] = "constexpr"
            constants[(index,)] = value
            continue
        signature[name] = _signature(value, kernel.params[index].annotation_type)
        if not aligned or kernel.params[index].do_not_specialize_on_alignment:
            continue
        elements = enumerate(value) if isinstance(value, tuple) else [((), value)]
        for path, element in elements:
            if isinstance(element, Tensor):
                key = (index, path) if path != () else (index,)
                attributes[key] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=gpu, options=launch.options)


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel takes; spilled counts bytes of stack (AMD: registers)."""

    registers: int
    spilled: int
    shared: int


def usage(compiled: Any) -> Usage:
    """Resource usage of a compiled kernel, read from its machine code."""
    shared = compiled.metadata.shared
    if "amdgcn" in compiled.asm:
        field = dict(re.findall(r"\.(\w+):\s+(\d+)", compiled.asm["amdgcn"]))
        spilled = int(field["vgpr_spill_count"]) + int(field["sgpr_spill_count"])
        return Usage(int(field["vgpr_count"]), spilled, shared)
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [cuobjdump, "--dump-resource-usage", file.name],
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return Usage(int(registers), int(stack), shared)
