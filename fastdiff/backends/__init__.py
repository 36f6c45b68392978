"""Which implementation serves an operation, and why the others do not.

    reference   pure PyTorch, the definition (fastdiff/ops); any device with the dtypes it needs
    native      csrc/: C++ SIMD kernels on the CPU, CUDA C++ kernels on NVIDIA GPUs
    triton      kernels/: Triton kernels on NVIDIA and AMD GPUs

All three give the same bits (DESIGN of the noise and arithmetic contracts: README.md), so choosing
one is choosing speed. Automatic selection takes the first of the device's list that can serve and
keeps the reason of each that cannot; an explicit choice (`backend=`, use_backend, the environment
variable FASTDIFF_BACKEND, read at import) that cannot serve raises BackendError with that reason.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from fastdiff.backends import native, reference, triton
from fastdiff.compiling import constant
from fastdiff.ops.schemas import SCHEMAS

__all__ = [
    "BackendError", "forget", "names", "operation", "order", "probe", "register", "select",
    "use_backend",
]  # fmt: skip

Probe = Callable[[torch.device, torch.dtype], "str | None"]
_probes: dict[str, Probe] = {}
_operations: dict[tuple[str, str], Any] = {}

# Automatic order by device type. On GPUs Triton comes first because it needs no CUDA toolkit on the
# machine (only a C compiler); on CPUs Triton has only its interpreter.
_ORDER = {"cpu": ("native", "reference"), "cuda": ("triton", "native", "reference")}

_chosen: ContextVar[str | None] = ContextVar("fastdiff_backend", default=None)
_reasons: dict[tuple[str, torch.device, torch.dtype], str | None] = {}
_selected: dict[tuple[torch.device, torch.dtype, str | None], str] = {}
# Read once: a look at the environment costs as much as the rest of a selection.
_ENVIRONMENT = os.environ.get("FASTDIFF_BACKEND") or None


class BackendError(RuntimeError):
    """An explicitly chosen backend cannot serve."""


def register(name: str, serves: Probe) -> None:
    """Adds the backend whose operations are torch.ops.fastdiff_<name>.

    Args:
        serves: function of (device, dtype of the math) that returns None, or why it cannot serve.
    """
    _probes[name] = serves
    namespace = getattr(torch.ops, f"fastdiff_{name}")
    for op in SCHEMAS:
        _operations[name, op] = getattr(namespace, op).default


def names() -> tuple[str, ...]:
    return tuple(_probes)


def order(device_type: str) -> tuple[str, ...]:
    """The backends that automatic selection tries, first to last."""
    return _ORDER.get(device_type, ("reference",))


def _check_name(name: str) -> str:
    if name not in _probes:
        raise ValueError(f"backend must be one of {', '.join(_probes)}, not {name!r}")
    return name


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Within the block (of this thread or task) operations run on the named backend.

    None returns to automatic selection. Raises ValueError for an unknown name at once, and
    BackendError at the first operation that the backend cannot serve. Under torch.compile the
    choice is made when the graph is compiled.
    """
    token = _chosen.set(None if name is None else _check_name(name))
    try:
        yield
    finally:
        _chosen.reset(token)


def probe(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """None when the backend serves tensors of this device with math in this dtype, else why not.

    The first probe of the native backend builds its library.
    """
    key = (name, device, dtype)
    if key not in _reasons:
        _reasons[key] = _probes[name](device, dtype)
    return _reasons[key]


def forget() -> None:
    """Probes again at the next operation (after a build, or when a device appeared)."""
    _reasons.clear()
    _selected.clear()


def select(device: torch.device, dtype: torch.dtype, backend: str | None = None) -> str:
    """The name of the backend for operations on `device` with math in `dtype`."""
    explicit = backend or _chosen.get() or _ENVIRONMENT
    key = (device, dtype, explicit)
    if key not in _selected:
        _selected[key] = _find(device, dtype, explicit)
    return _selected[key]


def _find(device: torch.device, dtype: torch.dtype, explicit: str | None) -> str:
    if explicit is not None:
        reason = probe(_check_name(explicit), device, dtype)
        if reason is not None:
            raise BackendError(f"backend {explicit!r} cannot serve {device} {dtype}: {reason}")
        return explicit
    for name in order(device.type):
        if probe(name, device, dtype) is None:
            return name
    raise BackendError(f"no backend serves {device} {dtype}")  # reference serves everything


# torch.compile makes the choice once, when it traces.
_traced_select = constant(select)


def operation(op: str, device: torch.device, dtype: torch.dtype, backend: str | None = None) -> Any:
    """The operation `op` (see ops/schemas.py) of the backend that select() names."""
    return _operations[_traced_select(device, dtype, backend), op]


for _name, _module in (("reference", reference), ("native", native), ("triton", triton)):
    register(_name, _module.probe)
