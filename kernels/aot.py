"""Ahead-of-time compilation for GPUs that this machine need not have.

    gpu = target("sm_90")
    launch = step.prepare(*case.arguments(shape, "meta"), policy=policy_of("sm_90"))
    compiled = compile_for(launch, gpu)         # compiled.asm["ptx"], ["cubin"]

A launch comes from the same `prepare` that serves real calls, here with tensors on the meta device,
so what is inspected is what runs. fastdiff/profiling reads what comes out.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastdiff.kernels.launch import Launch

__all__ = ["compile_for", "target"]

_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}


def target(name: str) -> GPUTarget:
    """The compiler's description of "sm_90", "gfx942" and so on."""
    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name[3:]), 32)
    return GPUTarget("hip", name, 64)  # CDNA; RDNA's wavefront would be 32


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
