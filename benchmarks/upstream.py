"""Other projects' samplers as installed, without what their packages import and no sampler uses.

Importing k_diffusion pulls in clip, torchvision, wandb and more, and denoising_diffusion_pytorch
torchvision: such modules are empty here while they load, where they are not installed. Loops show
no bars. Every function raises Unavailable when its project is not installed.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import types
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from fastdiff.benchmarks.registry import Unavailable

__all__ = ["denoising_diffusion_pytorch", "diffusers", "k_diffusion"]


def diffusers() -> Any:
    """The package."""
    module = _imported("diffusers", "fastdiff[diffusers]")
    module.logging.set_verbosity_error()
    return module


class KDiffusion(NamedTuple):
    """Two modules of k_diffusion."""

    sampling: Any
    external: Any


@functools.cache
def k_diffusion() -> KDiffusion:
    """Its samplers and its denoisers."""
    name = "k_diffusion"
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise Unavailable("k-diffusion is not installed: pip install k-diffusion")
    folder = Path(spec.origin).parent
    package = types.ModuleType(name)
    package.__path__ = [str(folder)]
    # What utils.py and external.py import at the top.
    unused = ("PIL", "safetensors", "torchdiffeq", "torchvision", "torchvision.transforms")
    before = {key: sys.modules[key] for key in list(sys.modules) if key.partition(".")[0] == name}
    try:
        with _stubs(unused):
            sys.modules[name] = package
            for part in ("utils", "sampling", "external"):
                setattr(package, part, importlib.import_module(f"{name}.{part}"))
    except ImportError as error:
        raise Unavailable(f"k-diffusion cannot be imported: {error}") from error
    finally:
        for key in [key for key in sys.modules if key.partition(".")[0] == name]:
            del sys.modules[key]
        sys.modules.update(before)
    return KDiffusion(package.sampling, package.external)


def denoising_diffusion_pytorch() -> Any:
    """The package; its loops show no bar."""
    with _stubs(("torchvision", "torchvision.transforms", "torchvision.utils")):
        package = _imported("denoising_diffusion_pytorch", "denoising-diffusion-pytorch")
    module: Any = sys.modules["denoising_diffusion_pytorch.denoising_diffusion_pytorch"]
    module.tqdm = lambda iterable, **_: iterable
    return package


def _imported(name: str, requirement: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ImportError as error:
        if error.name is not None and error.name.partition(".")[0] != name:
            raise Unavailable(f"{name} cannot be imported: {error}") from error
        raise Unavailable(f"{name} is not installed: pip install '{requirement}'") from None


class _Stub(types.ModuleType):
    """A module that has every attribute."""

    __path__: list[str] = []  # noqa: RUF012 (a package, to the import system)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Stub(f"{self.__name__}.{name}")


@contextmanager
def _stubs(names: Sequence[str]) -> Iterator[None]:
    """Within: a module of every attribute for each of these that is not installed."""
    placed = [name for name in names if _missing(name)]
    for name in placed:
        sys.modules[name] = _Stub(name)
    try:
        yield
    finally:
        for name in placed:
            del sys.modules[name]


def _missing(name: str) -> bool:
    if name in sys.modules:
        return False
    try:
        return importlib.util.find_spec(name) is None
    except ModuleNotFoundError:
        return True
