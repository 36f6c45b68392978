"""Random functions of torch, for a tracing thread only.

While some thread traces, torch.randn and its kin stand replaced by functions that look up who
calls: a tracing thread's images become draws of its recorder, everyone else gets torch's own.
(A TorchFunctionMode would do the same, but every operation on a number passes through it, which
doubles the time of a trace.)
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fastdiff.tracing.linear_form import NotAffineError
from fastdiff.tracing.record import Recorder

__all__ = ["intercepted"]

_FUNCTIONS = (
    "randn", "rand", "rand_like", "randint", "randint_like", "normal", "bernoulli", "multinomial",
    "poisson", "randperm",
)  # fmt: skip
_METHODS = ("normal_", "uniform_", "random_", "bernoulli_", "exponential_")

_recorders: dict[int, list[Recorder]] = {}  # by thread, the innermost last
_originals: list[tuple[Any, str, Any]] = []
_lock = threading.Lock()


@contextmanager
def intercepted(recorder: Recorder) -> Iterator[None]:
    """Within the block normal draws of this thread are draws of the recorder."""
    thread = threading.get_ident()
    with _lock:
        if not _recorders:
            _install()
        _recorders.setdefault(thread, []).append(recorder)
    try:
        yield
    finally:
        with _lock:
            _recorders[thread].pop()
            if not _recorders[thread]:
                del _recorders[thread]
            if not _recorders:
                _remove()


def _install() -> None:
    for owner, names in ((torch, _FUNCTIONS), (torch.Tensor, _METHODS)):
        for name in names:
            original = getattr(owner, name)
            _originals.append((owner, name, vars(owner).get(name)))
            setattr(owner, name, _replacement(original, name))


def _remove() -> None:
    for owner, name, own in _originals:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)
    _originals.clear()


def _replacement(original: Callable[..., Any], name: str) -> Callable[..., Any]:
    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        mine = _recorders.get(threading.get_ident())
        if mine is None:
            return original(*args, **kwargs)
        if name != "randn":
            raise NotAffineError(f"torch.{name}", "is not a normal draw")
        size = args[0] if args and not isinstance(args[0], int) else args
        size = tuple(kwargs.get("size", size))
        if size != tuple(mine[-1].shape):
            raise NotAffineError("torch.randn", f"of shape {size} is not noise for an image")
        return mine[-1].drawn(kwargs.get("dtype") or torch.get_default_dtype())

    return replacement
