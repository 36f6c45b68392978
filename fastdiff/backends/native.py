"""The native backend: csrc compiled for this machine, C++ SIMD on the CPU and CUDA C++ on NVIDIA.

A library is built (or found in the cache of backends/build.py) and loaded at the first probe of its
device, once per process, whichever thread comes first. Importing this module only defines the
operations.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from fastdiff.backends import build as builder
from fastdiff.ops.schemas import define

__all__ = ["build", "isa", "isa_levels", "probe"]

_library = define("native")
_lock = threading.RLock()
# Library name: None once loaded, or why it cannot be. Absent: not tried yet.
_state: dict[str, str | None] = {}


def probe(device: torch.device, dtype: torch.dtype) -> str | None:
    """None when the native kernels serve `device` with math in `dtype`, else the reason."""
    if device.type not in ("cpu", "cuda"):
        return f"there are native kernels for cpu and cuda, not for {device.type}"
    if dtype not in (torch.float32, torch.float64):
        return f"native kernels calculate in float32 or float64, not in {dtype}"
    if device.type == "cpu":
        return _load("cpu", builder.cpu_target)
    if not torch.cuda.is_available():
        return "no CUDA device is available to PyTorch"
    if torch.version.hip is not None:
        return "the native GPU kernels are CUDA C++; this PyTorch is for AMD GPUs"
    capability = torch.cuda.get_device_capability(device)
    try:
        reason = builder.not_served(builder.cuda_archs(), capability)
    except builder.BuildError as error:
        reason = f"build failed: {error}"
    return reason or _load("cuda", builder.cuda_target)


def isa(force: str = "") -> str:
    """The SIMD level of the CPU kernels, the best that this CPU has: one of isa_levels().

    `force` switches to another level of this CPU for the whole process: every level gives the same
    bits, so this serves tests and benchmarks. Raises RuntimeError when the library cannot be
    loaded, or for a level that this CPU does not have.
    """
    _require_cpu()
    level: str = torch.ops.fastdiff_native.isa(force)
    return level


def isa_levels() -> list[str]:
    """The SIMD levels that this CPU runs, best first, of avx512_bf16, avx512, avx2 and portable.

    Raises RuntimeError as isa() does.
    """
    _require_cpu()
    levels: str = torch.ops.fastdiff_native.isa_levels()
    return levels.split(",")


def _require_cpu() -> None:
    reason = probe(torch.device("cpu"), torch.float32)
    if reason is not None:
        raise RuntimeError(f"no native CPU kernels: {reason}")


def build(
    force: bool = False,
    verbose: bool = False,
    cuda: bool | None = None,
    archs: Sequence[str] | None = None,
) -> list[Path]:
    """Builds the libraries ahead of time and returns their paths.

    Args:
        force: build even when the cache has them. A process that has loaded the old one keeps it.
        verbose: show the compiler's commands and output.
        cuda: build the CUDA library too; None does when PyTorch sees a CUDA device, or for `archs`.
        archs: compute capabilities to build it for, as "9.0" or "90"; default those of
            FASTDIFF_CUDA_ARCHS, else of the visible GPUs. A library is found again by a process
            whose default they are.

    Raises:
        BuildError: a library cannot be built; the message says why.
    """
    if cuda is None:
        cuda = bool(archs) or (torch.cuda.is_available() and torch.version.hip is None)
    targets = [builder.cpu_target()] + ([builder.cuda_target(archs)] if cuda else [])
    return [builder.build(target, force=force, verbose=verbose) for target in targets]


def _load(name: str, target: Callable[[], builder.Target]) -> str | None:
    """Builds and loads a library once; the reason when that fails, the same ever after."""
    if name not in _state:
        with _lock:
            if name not in _state:
                _state[name] = _try_load(target)
    return _state[name]


def _try_load(target: Callable[[], builder.Target]) -> str | None:
    if os.environ.get("FASTDIFF_NATIVE") == "0":
        return "switched off by FASTDIFF_NATIVE=0"
    try:
        path = builder.build(target())
    except builder.BuildError as error:
        return f"build failed: {error}"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"cannot load {path}: {error}"
    return None
