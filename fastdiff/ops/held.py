"""Device tables made once and kept, in a form that torch.compile can lift into its graphs.

A compiled graph reaches a table through an attribute of `_store`, so Dynamo lifts it as an input
and guards on it. (A tensor returned by a `constant` function would be simpler, but
Dynamo takes two of them in one graph for the same one.)
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fastdiff.compiling import constant

__all__ = ["faking", "held", "lasting", "remembered"]

P = ParamSpec("P")
R = TypeVar("R")

_LIMIT = 1024  # tables kept for eager calls; then they are dropped and made again


class _Store:
    """Tables of compiled graphs by attribute; never renamed, as graphs do not guard on identity."""


_store = _Store()
_names: dict[tuple[Any, ...], str] = {}
_numbers = itertools.count()
_tensors: dict[tuple[Any, ...], Tensor] = {}
_lock = threading.RLock()


def faking() -> bool:
    """Whether tensors made now are stand-ins that may not meet real ones (FakeTensorMode)."""
    mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    return mode is not None and not mode.allow_non_fake_inputs


@contextmanager
def lasting() -> Iterator[None]:
    """Within the block tensors are made that may be kept: real ones, outside of inference mode,
    whatever modes the caller is in (torch.export traces its callers with stand-ins)."""
    with torch.inference_mode(False), _disable_current_modes():
        yield


def _made(make: Callable[..., Tensor], arguments: tuple[Any, ...]) -> Tensor:
    with lasting():
        tensor = make(*arguments)
    with _lock:
        if len(_tensors) >= _LIMIT:
            _tensors.clear()
        return _tensors.setdefault((make, arguments), tensor)


@constant
def _name(fingerprint: str, make: Callable[..., Tensor], *arguments: Any) -> str:
    """The attribute of _store that holds make(*arguments), made when it is missing."""
    key = (make, arguments)
    with _lock:
        if key not in _names:
            name = f"table_{next(_numbers)}"
            setattr(_store, name, _made(make, arguments))
            _names[key] = name
        return _names[key]


def held(fingerprint: str, make: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """make(*arguments), made once per arguments (compared by value).

    Args:
        fingerprint: that of the schedule among the arguments; being a plain string read by the
            caller, it makes a compiled graph guard on the schedule's content.
    """
    if torch.compiler.is_dynamo_compiling():
        tensor: Tensor = getattr(_store, _name(fingerprint, make, *arguments))
        return tensor
    if faking():
        return make(*arguments)
    found = _tensors.get((make, arguments))
    return _made(make, arguments) if found is None else found


def remembered(function: Callable[P, R]) -> Callable[P, R]:
    """lru_cache for functions of hashable arguments that compiled code calls too.

    Dynamo warns about lru_cache and traces through it; here it traces the function itself.
    """
    cached: Callable[..., R] = lru_cache(maxsize=1024)(function)

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        return cached(*args, **kwargs)

    return call
