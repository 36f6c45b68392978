"""The Triton backend: launches kernels/ on NVIDIA and AMD GPUs, and on the CPU in the interpreter.

Triton is imported at the first probe or call, not with this module.
"""

from __future__ import annotations

import functools
import os
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.ops.schemas import SCHEMAS, define

__all__ = ["prepare", "probe"]

_LIBRARY = define("triton")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def probe(device: torch.device, dtype: torch.dtype) -> str | None:
    """None when Triton serves tensors of this device with math in this dtype, else why not."""
    try:
        from triton import knobs
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    if dtype not in _DTYPES:
        return f"its kernels compute in float32 and serve no {str(dtype).removeprefix('torch.')}"
    if device.type == "cpu":
        if not knobs.runtime.interpret:
            return "on the CPU Triton has only its interpreter (start with TRITON_INTERPRET=1)"
    elif device.type != "cuda":
        return f"its kernels are for NVIDIA and AMD GPUs and the CPU interpreter, not {device.type}"
    elif not torch.cuda.is_available():
        return "torch finds no GPU"
    elif torch.version.hip is None and torch.cuda.get_device_capability(device) < (7, 5):
        return "it needs an NVIDIA GPU of compute capability 7.5 or later"
    elif not any(shutil.which(name) for name in _compilers()):
        return "Triton compiles its launcher with a C compiler: install gcc or clang, or set CC"
    elif not _has_python_headers():
        return (
            "Triton compiles its launcher with Python's C headers, and there is no Python.h in "
            f"{_python_include()}: install python3-dev (Debian, Ubuntu) or python3-devel"
        )
    return None


def _compilers() -> list[str]:
    """What Triton would compile its launcher with: CC, taken at its word, else gcc or clang."""
    chosen = os.environ.get("CC", "").split()
    return chosen[:1] or ["gcc", "clang"]


def _python_include() -> Path:
    """Where Triton looks for Python.h."""
    scheme = sysconfig.get_default_scheme()
    return Path(
        sysconfig.get_path("include", "posix_prefix" if scheme == "posix_local" else scheme)
    )


def _has_python_headers() -> bool:
    elsewhere = any(os.environ.get(name) for name in ("CPATH", "C_INCLUDE_PATH"))
    return elsewhere or (_python_include() / "Python.h").is_file()


@functools.cache
def prepare(op: str) -> Callable[..., Any]:
    """What turns the arguments of an operation into its Launch; see kernels/."""
    from fastdiff.kernels import bits, chain, loss, randn, step

    return {
        "bits": bits.prepare, "bits_bound": bits.prepare_bound,
        "bits_bound_grad": bits.prepare_bound_grad, "chain": chain.prepare, "loss": loss.prepare,
        "loss_grad": loss.prepare_grad, "randn": randn.prepare, "step": step.prepare,
    }[op]  # fmt: skip


def _on_gpu(op: str) -> Callable[..., None]:
    nvidia = torch.version.hip is None

    def call(*arguments: Any) -> None:
        launch = prepare(op)(*arguments, nvidia=nvidia)
        if launch is None:
            return
        device = _device(arguments[0])
        if device.index == torch.cuda.current_device():
            launch()
        else:
            with torch.cuda.device(device):
                launch()

    return call


def _on_cpu(op: str) -> Callable[..., None]:
    def call(*arguments: Any) -> None:
        reason = probe(torch.device("cpu"), torch.float32)
        if reason is not None:
            raise RuntimeError(f"fastdiff_triton::{op}: {reason}")
        # The interpreter has no inline assembly, and on the CPU noise="fast" means exact.
        launch = prepare(op)(*arguments, nvidia=False)
        if launch is not None:
            # numpy, which interprets, would speak of NaN that a kernel makes and does not take.
            with np.errstate(invalid="ignore", over="ignore"):
                launch()

    return call


def _device(first: Tensor | list[Tensor]) -> torch.device:
    return first.device if isinstance(first, Tensor) else first[0].device


for _op in SCHEMAS:
    _LIBRARY.impl(_op, _on_gpu(_op), "CUDA")
    _LIBRARY.impl(_op, _on_cpu(_op), "CPU")
