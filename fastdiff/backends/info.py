"""What serves on this machine, and why the rest does not: the text of `fastdiff info`."""

from __future__ import annotations

import importlib.util
import os
import platform
from importlib import metadata

import torch

import fastdiff
from fastdiff import backends
from fastdiff.backends import native
from fastdiff.backends.build import cache_root
from fastdiff.ops.schemas import SCHEMAS
from fastdiff.profiling.timing import processor

__all__ = ["info"]

_PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "ninja",
    "diffusers",
    "safetensors",
    "pillow",
    "matplotlib",
)
_ENVIRONMENT = (
    "FASTDIFF_BACKEND", "FASTDIFF_NATIVE", "FASTDIFF_CACHE", "FASTDIFF_CUDA_ARCHS", "CXX",
    "CUDA_HOME", "TRITON_INTERPRET",
)  # fmt: skip


def _devices() -> list[torch.device]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(count))]


def info() -> str:
    """Machine, versions, every backend x operation x dtype with the reason where it cannot serve.

    Builds the native library if that has not happened yet.
    """
    lines = [f"fastdiff {fastdiff.__version__}", ""]
    lines.append(f"machine      {processor()}, {os.cpu_count()} CPUs, {platform.platform()}")
    lines.append(f"python       {platform.python_version()}")
    for package in _PACKAGES:
        installed = importlib.util.find_spec({"pillow": "PIL"}.get(package, package)) is not None
        version = metadata.version(package) if installed else "not installed"
        lines.append(f"{package:<12} {version}")
    lines.append(f"threads      {torch.get_num_threads()}")
    for device in _devices()[1:]:
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        lines.append(
            f"{device!s:<12} {torch.cuda.get_device_name(device)}, capability {capability}"
        )
    if len(_devices()) == 1:
        lines.append("gpu          none that torch can see")
    lines.append(f"cache        {cache_root()}")
    if backends.probe("native", torch.device("cpu"), torch.float32) is None:
        lines.append(f"cpu kernels  {native.isa()} instructions")
    lines += ["", "environment"]
    for name in _ENVIRONMENT:
        lines.append(f"  {name:<22} {os.environ.get(name, '(not set)')}")
    width = max(len(name) for name in SCHEMAS) + 2
    for device in _devices():
        served = " > ".join(backends.order(device.type))
        lines += ["", f"{device}: automatic order {served}"]
        lines.append(f"  {'backend':<12}{'math':<10}" + "".join(f"{op:<{width}}" for op in SCHEMAS))
        for name in backends.names():
            for dtype in (torch.float32, torch.float64):
                reason = backends.probe(name, device, dtype)
                marks = "".join(f"{'yes' if reason is None else 'no':<{width}}" for _ in SCHEMAS)
                short = str(dtype).removeprefix("torch.")
                lines.append(f"  {name:<12}{short:<10}{marks}{reason or ''}".rstrip())
    return "\n".join(lines)
