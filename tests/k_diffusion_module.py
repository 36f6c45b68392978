"""k_diffusion.sampling and .external as installed, without the rest of the package.

Importing k_diffusion pulls in clip, torchvision, wandb and more, which no sampler uses and which
are not installed. Its files are loaded here with empty modules in place of what they import and do
not need; afterwards sys.modules is as it was.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

PACKAGE = "k_diffusion"
# What utils.py and external.py import at the top and no sampler uses.
STUBS = ("PIL", "safetensors", "torchdiffeq", "torchvision", "torchvision.transforms")


class _Stub(types.ModuleType):
    """A module that has every attribute."""

    __path__: list[str] = []  # noqa: RUF012 (a package, to the import system)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Stub(f"{self.__name__}.{name}")


def _missing(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is None
    except ModuleNotFoundError:
        return True


def load() -> tuple[Any, Any]:
    """(sampling, external)."""
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None and spec.origin is not None, "k-diffusion is not installed"
    folder = Path(spec.origin).parent
    package = types.ModuleType(PACKAGE)
    package.__path__ = [str(folder)]
    placed = {PACKAGE: package} | {name: _Stub(name) for name in STUBS if _missing(name)}
    before = {name: sys.modules.get(name) for name in placed}
    sys.modules.update(placed)
    try:
        for name in ("utils", "sampling", "external"):
            full = f"{PACKAGE}.{name}"
            spec = importlib.util.spec_from_file_location(full, folder / f"{name}.py")
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[full] = module
            spec.loader.exec_module(module)
            setattr(package, name, module)
        return package.sampling, package.external
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
            del sys.modules[name]
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


sampling, external = load()
