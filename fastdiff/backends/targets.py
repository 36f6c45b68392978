"""What the native libraries are made of: sources, flags, and what they link to.

Nothing here runs a compiler; fastdiff/backends/build.py does. Flags are free of paths of this
installation (build.py adds include and library folders), so they can be part of a library's hash.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch

__all__ = [
    "BuildError",
    "Source",
    "Target",
    "cpu_target",
    "cuda_archs",
    "cuda_host_target",
    "cuda_target",
    "not_served",
]

_TORCH = Path(torch.__file__).parent


class BuildError(RuntimeError):
    """The library cannot be built here; the message says why and what to do about it."""


class Source(NamedTuple):
    path: str  # relative to csrc
    suffix: str = ""  # tells the objects of one source apart
    flags: tuple[str, ...] = ()  # after the target's


@dataclass(frozen=True)
class Target:
    name: str
    sources: tuple[Source, ...]
    flags: tuple[str, ...]
    link_flags: tuple[str, ...]
    compiler: Literal["c++", "nvcc"] = "c++"
    label: str = "library"  # as messages call it
    seconds: int = 1  # roughly, for the message


# The stable ABI of torch 2.10: one library serves every torch from there on, and headers outside
# the stable ABI refuse to compile.
_STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"
# The arithmetic contract: mul and add stay two roundings, so that every backend gives the same
# bits. errno and traps do not change a result, and math calls would not vectorize with them.
_EXACT = ("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
_HOST_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", *_EXACT, _STABLE_ABI)
# Noise is long chains of dependent instructions. GCC leaves them one after another unless asked to
# schedule before it allocates registers; interleaved they take up to a quarter less time.
_INTERLEAVED = ("-fschedule-insns", "-fsched-pressure")
# Linked by name to what torch has loaded by the time the library is. Threads are torch's as well,
# through the stable ABI: no OpenMP here, and no second pool of threads.
_LINK_FLAGS = ("-shared", "-ltorch_cpu", "-lc10")
_CUDA_KERNELS = ("cuda/step.cu", "cuda/loss.cu", "cuda/bits.cu")


def cpu_target() -> Target:
    """The CPU kernels, one object per ISA level; csrc/cpu/dispatch.cpp chooses at run time."""
    levels: dict[str, tuple[str, ...]] = {"portable": ()}
    if platform.machine() in ("x86_64", "AMD64"):
        levels["avx2"] = ("-march=x86-64-v3",)
        levels["avx512"] = ("-march=x86-64-v4", "-mprefer-vector-width=512")
        levels["avx512_bf16"] = (*levels["avx512"], "-mavx512bf16")
    have = tuple(f"-DFASTDIFF_HAVE_{name.upper()}" for name in levels if name != "portable")
    binding = ("-DFASTDIFF_NAMESPACE=fastdiff_native", "-DFASTDIFF_DISPATCH_KEY=CPU")
    # Baseline objects first: of an inline function that several objects define (one of the standard
    # library, say) the linker takes the first, which every machine must be able to run.
    return Target(
        name="native_cpu",
        sources=(
            Source("bindings/ops.cpp", flags=binding),
            Source("cpu/dispatch.cpp"),
            *(
                Source("cpu/kernels.cpp", name, (*flags, *_INTERLEAVED, f"-DFASTDIFF_ISA={name}"))
                for name, flags in levels.items()
            ),
        ),
        flags=(*_HOST_FLAGS, *have),
        link_flags=_LINK_FLAGS,
        label="native CPU library",
        seconds=40,
    )


def cuda_target(archs: Sequence[str] | None = None) -> Target:
    """The CUDA kernels: machine code for each of `archs` ("9.0" or "90"), PTX for the newest.

    None takes FASTDIFF_CUDA_ARCHS, or the capabilities of the visible GPUs.
    """
    numbers = cuda_archs(archs)
    pairs = [(number, f"sm_{number}") for number in numbers]
    newest = numbers[-1].rstrip("af")
    pairs.append((newest, f"compute_{newest}"))  # newer GPUs than any here compile this themselves
    host = ",".join(("-fPIC", "-fvisibility=hidden", *_EXACT))
    has_torch_cuda = (_TORCH / "lib" / "libtorch_cuda.so").exists()
    cuda = ("-DUSE_CUDA", "-DFASTDIFF_CUDA")
    binding = ("-DFASTDIFF_NAMESPACE=fastdiff_native", "-DFASTDIFF_DISPATCH_KEY=CUDA")
    kernels = (
        "-fmad=false",
        *("-t", "0"),  # architectures in parallel
        *(f"-gencode=arch=compute_{number},code={code}" for number, code in pairs),
    )
    return Target(
        name="native_cuda",
        sources=(
            Source("bindings/ops.cpp", flags=(*cuda, *binding)),
            *(Source(path, flags=kernels) for path in _CUDA_KERNELS),
        ),
        flags=("-O3", "-std=c++17", "-Xcompiler", host, _STABLE_ABI),
        link_flags=(
            *_LINK_FLAGS,
            *("-cudart", "static"),
            *(["-ltorch_cuda"] if has_torch_cuda else []),
        ),
        compiler="nvcc",
        label=f"native CUDA library for {', '.join('sm_' + number for number in numbers)}",
        seconds=30 + 8 * len(numbers),
    )


def cuda_host_target() -> Target:
    """The CUDA sources compiled by the C++ compiler to run on the host: what tests execute."""
    host = ("-DFASTDIFF_CUDA_HOST",)
    binding = ("-DFASTDIFF_NAMESPACE=fastdiff_cuda_host", "-DFASTDIFF_DISPATCH_KEY=CPU")
    kernels = ("-x", "c++", *host, "-include", "cuda/host.h")
    return Target(
        name="cuda_host",
        sources=(
            Source("bindings/ops.cpp", flags=(*host, *binding)),
            *(Source(path, flags=kernels) for path in _CUDA_KERNELS),
        ),
        flags=_HOST_FLAGS,
        link_flags=_LINK_FLAGS,
        label="CUDA library that runs on the host",
        seconds=40,
    )


def cuda_archs(archs: Sequence[str] | None = None) -> list[str]:
    """Compute capabilities as nvcc writes them ("90"), ascending, each once.

    None takes FASTDIFF_CUDA_ARCHS, or the capabilities of the visible GPUs. Raises BuildError where
    there are none, and for what nvcc would not understand.
    """
    if archs is None:
        archs = re.split(r"[\s,;]+", os.environ.get("FASTDIFF_CUDA_ARCHS", "").strip(" ,;"))
    names = [name for name in archs if name]
    if not names and torch.cuda.is_available():
        devices = range(torch.cuda.device_count())
        names = ["{}.{}".format(*torch.cuda.get_device_capability(device)) for device in devices]
    if not names:
        raise BuildError(
            "no GPU is visible: name compute capabilities in FASTDIFF_CUDA_ARCHS, "
            'or run fastdiff build --cuda-archs "8.0 9.0"'
        )
    for name in names:
        if not re.fullmatch(r"(sm_)?\d{1,2}\.?\d[af]?", name):
            raise BuildError(f"CUDA architecture {name!r} is not like '9.0', '90' or 'sm_90'")
    numbers = {name.removeprefix("sm_").replace(".", "") for name in names}
    return sorted(numbers, key=lambda number: (int(number.rstrip("af")), number))


def not_served(archs: Sequence[str], capability: tuple[int, int]) -> str | None:
    """Why a library for `archs` (of `cuda_archs`) does not run on a GPU; None when it does.

    Machine code runs on GPUs of its major version and the same or a higher minor one, that of an
    "a" architecture on its own only; the PTX of the newest is compiled on any newer GPU.
    """
    gpu = 10 * capability[0] + capability[1]
    for arch in archs:
        number = int(arch.rstrip("af"))
        if gpu == number or (not arch.endswith("a") and number < gpu < (number // 10 + 1) * 10):
            return None
    if gpu > int(archs[-1].rstrip("af")):
        return None
    name = "{}.{}".format(*capability)
    return (
        f"the native CUDA library is for {', '.join('sm_' + arch for arch in archs)} "
        f'and this GPU is {name}: add "{name}" to FASTDIFF_CUDA_ARCHS'
    )
