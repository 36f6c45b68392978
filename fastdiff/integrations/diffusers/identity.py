"""What decides a scheduler's plan, as a key; and a cache of plans by such keys."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Hashable
from types import FunctionType
from typing import Any, Generic, TypeVar

import numpy as np
from torch import Tensor

__all__ = ["Cache", "digest"]

T = TypeVar("T")
# What a run changes, and what does not decide the numbers.
_LEFT_OUT = {
    "_step_index", "_begin_index", "_internal_dict", "noise_sampler", "timestep_list", "this_order",
    "this_predictor_order", "this_corrector_order", "last_noise", "is_scale_input_called",
    "sigma_data",
}  # fmt: skip


class Cache(Generic[T]):
    """Values by key, shared by all threads; those not used for longest go first."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._items: OrderedDict[Hashable, T] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> T | None:
        with self._lock:
            if key not in self._items:
                return None
            self._items.move_to_end(key)
            return self._items[key]

    def put(self, key: Hashable, value: T) -> T:
        """Keeps a value, or returns the one that another thread put there first."""
        with self._lock:
            value = self._items.setdefault(key, value)
            while len(self._items) > self._limit:
                self._items.popitem(last=False)
            return value


# Configurations by identity, with what they say: upstream replaces one and never changes it, and
# one with a thousand trained betas takes a millisecond to write out.
_configurations: Cache[tuple[Any, bytes]] = Cache(64)


def _configuration(scheduler: Any) -> bytes:
    config = scheduler.config
    found = _configurations.get(id(config))
    if found is None:
        text = repr(sorted(config.items(), key=str)).encode()
        found = _configurations.put(id(config), (config, text))
    return found[1]


def digest(scheduler: Any) -> str:
    """Hash of a scheduler's configuration, tables, timesteps and settings."""
    state = hashlib.sha256(_configuration(scheduler))
    for name, value in sorted(vars(scheduler).items()):
        if value is None:
            continue  # as good as not there, which it is before the first run
        if name not in _LEFT_OUT and not name.startswith("_fastdiff"):
            state.update(name.encode())
            state.update(_bytes(value))
    return state.hexdigest()


def _bytes(value: Any) -> bytes:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = value.double().numpy() if value.is_floating_point() else value.numpy()
    if isinstance(value, np.ndarray):
        return f"{value.dtype.str}{value.shape}".encode() + value.tobytes()
    if value is None or isinstance(value, int | float | str | bool | np.number):
        return repr(value).encode()
    if isinstance(value, list | tuple):
        return b"[" + b",".join(_bytes(item) for item in value) + b"]"
    if isinstance(value, dict):
        return b"{" + b",".join(repr(k).encode() + _bytes(v) for k, v in value.items()) + b"}"
    if isinstance(value, FunctionType):
        code = value.__code__
        cells = tuple(cell.cell_contents for cell in value.__closure__ or ())
        parts = (code.co_names, cells, value.__defaults__)
        return code.co_code + repr(code.co_consts).encode() + _bytes(repr(parts))
    return repr((type(value), id(value))).encode()
