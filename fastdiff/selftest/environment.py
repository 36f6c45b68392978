"""What this machine is: the part that comes first and decides whether there is a GPU to test."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from importlib import metadata

import torch

import fastdiff as fd
from fastdiff.profiling import gpu_state
from fastdiff.profiling.timing import processor
from fastdiff.selftest.part import Context

__all__ = ["environment", "gpu_environment"]

_PACKAGES = ("torch", "triton", "numpy", "ninja", "diffusers", "pytest", "safetensors")
_TOOLS = {
    "nvcc": ("--version", "release"),
    "g++": ("--version", ""),
    "gcc": ("--version", ""),
    "ninja": ("--version", ""),
    "compute-sanitizer": ("--version", "Version"),
    "ncu": ("--version", "Version"),
}


def _version(package: str) -> str | None:
    try:
        if importlib.util.find_spec(package) is None:
            return None
        return metadata.version(package)
    except (ImportError, ValueError, metadata.PackageNotFoundError):
        return None


def environment(context: Context) -> None:
    """Processor, versions, tools."""
    packages = {name: _version(name) for name in _PACKAGES}
    context.data.update(
        fastdiff=fd.__version__,
        source=str(os.path.dirname(fd.__file__)),
        python=sys.version.split()[0],
        system=platform.platform(),
        processor=processor(),
        cpus=os.cpu_count(),
        packages=packages,
    )
    context.note(f"{processor()}, {os.cpu_count()} CPUs, {platform.platform()}")
    installed = [f"{name} {version}" for name, version in packages.items() if version]
    missing = [name for name, version in packages.items() if not version]
    context.note(f"Python {platform.python_version()}, {', '.join(installed)}")
    if missing:
        context.note(f"not installed: {', '.join(missing)}")


def gpu_environment(context: Context) -> None:
    """The same and the GPU with its driver and tools; skipped where PyTorch sees no GPU."""
    if context.device == "cuda" and not torch.cuda.is_available():
        built = "is built without CUDA" if torch.version.cuda is None else "finds no CUDA device"
        if torch.version.hip is not None:
            built = "finds no AMD GPU"
        context.skip(f"there is no GPU to test: PyTorch {torch.__version__} {built}")
        return
    if context.device == "cuda":
        context.data["gpu"] = about = gpu_state.describe()
        context.data["cuda"] = torch.version.cuda or torch.version.hip
        context.data["state"] = state = gpu_state.state()
        memory, l2 = (float(str(about[key])) / 2**20 for key in ("memory", "l2"))
        context.note(
            f"{about['gpu']} ({about['arch']}), {about['multiprocessors']} multiprocessors, "
            f"{memory / 1024:.0f} GiB, L2 {l2:.0f} MiB, driver "
            f"{state.get('driver_version', 'unknown')}, PyTorch for CUDA {context.data['cuda']}"
        )
        if state:
            context.note(
                ", ".join(f"{k} {v}" for k, v in state.items() if k not in ("name", "mig.mode"))
            )
        # The first of all GPU work: what fails here fails everywhere.
        total = float(torch.arange(1000, device="cuda").sum())
        context.check(total == 499500, f"a sum on the GPU gives {total}, not 499500")
    environment(context)
    tools: dict[str, str | None] = {}
    for name, (argument, containing) in _TOOLS.items():
        path = gpu_state.find_tool(name)
        if path is None:
            tools[name] = None
        else:
            tools[name] = gpu_state.first_line(path, argument, containing=containing) or path
    context.data["tools"] = tools
    context.note("tools: " + "; ".join(f"{k}: {v}" for k, v in tools.items() if v))
    absent = [name for name, version in tools.items() if not version]
    if absent:
        context.note(f"no {', '.join(absent)}")
