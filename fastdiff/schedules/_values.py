"""Checks of host-side arguments, and arrays and objects that cannot change."""

from __future__ import annotations

import hashlib
import math
import operator
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
TimestepArray = NDArray[np.int64] | NDArray[np.float64]


def as_int(name: str, value: Any, minimum: int, maximum: int | None = None) -> int:
    """`value` as an int in [minimum, maximum]; TypeError or ValueError naming the argument."""
    allowed = f">= {minimum}" if maximum is None else f"in [{minimum}, {maximum}]"
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer {allowed}, got {value!r}") from None
    if number < minimum or (maximum is not None and number > maximum):
        raise ValueError(f"{name} must be {allowed}, got {number}")
    return number


def as_float(name: str, value: Any) -> float:
    """`value` as a finite float; TypeError or ValueError naming the argument."""
    if isinstance(value, bool | np.bool_ | str | bytes):
        raise TypeError(f"{name} must be a real number, got {value!r}")
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise TypeError(f"{name} must be a real number, got {value!r}") from None
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {number}")
    return number


def as_flag(name: str, value: Any) -> bool:
    """`value` as a bool; TypeError naming the argument for anything else."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def as_vector(name: str, value: Any, *, length: int | None = None, kinds: str = "iuf") -> Any:
    """`value` as a 1-D array of real numbers (not NaN) in its own dtype, not yet copied."""
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be a 1-D array of numbers: {error}") from None
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{name} must be a non-empty 1-D array, got shape {array.shape}")
    if array.dtype.kind not in kinds:
        wanted = "integers" if "f" not in kinds else "real numbers"
        raise TypeError(f"{name} must hold {wanted}, got dtype {array.dtype}")
    if length is not None and array.size != length:
        raise ValueError(f"{name} must have {length} entries, got {array.size}")
    refuse_where(name, array, array != array, "not be NaN")
    return array


def as_float_vector(name: str, value: Any, *, length: int | None = None) -> FloatArray:
    """`value` as a float64 array (T,) without NaN; narrower floats are widened exactly."""
    vector: FloatArray = np.asarray(as_vector(name, value, length=length), dtype=np.float64)
    return vector


def as_timesteps(value: Any, length: int) -> TimestepArray:
    """The model's own t: (length,), strictly increasing, integers as int64, else float64."""
    array = as_vector("timesteps", value, length=length)
    array = array.astype(np.float64 if array.dtype.kind == "f" else np.int64)
    refuse_where("timesteps", array, ~np.isfinite(array), "be finite")
    refuse_where("timesteps", array, np.r_[False, array[1:] <= array[:-1]], "strictly increase")
    timesteps: TimestepArray = array
    return timesteps


def refuse_where(name: str, array: Any, wrong: NDArray[np.bool_], must: str) -> None:
    """ValueError naming the first entry of `array` where `wrong` holds."""
    if wrong.any():
        i = int(np.argmax(wrong))
        raise ValueError(f"{name} must {must}, got {name}[{i}] = {array[i]}")


def freeze(array: Any) -> Any:
    """A copy that nobody can make writable again: it sits on a bytes object. -0 becomes 0."""
    array = np.ascontiguousarray(array) + array.dtype.type(0)
    return np.frombuffer(array.tobytes(), dtype=array.dtype)


class ComparedByContent:
    """Equality and hash by `fingerprint`, a hash of the arrays that matter; names do not count.

    Fingerprint and length are plain attributes made once by the constructor, not properties:
    caches key on the one, and torch.compile guards on both without looking at NumPy arrays.

    Attributes:
        fingerprint: hexadecimal SHA-256.
        num_timesteps: T, the number of noise levels.
    """

    fingerprint: str
    num_timesteps: int

    def _identify(self, *arrays: NDArray[Any]) -> None:
        object.__setattr__(self, "num_timesteps", arrays[0].size)
        digest = hashlib.sha256(type(self).__name__.encode())
        for array in arrays:
            digest.update(array.dtype.str.encode() + repr(array.shape).encode() + array.tobytes())
        object.__setattr__(self, "fingerprint", digest.hexdigest())

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        assert isinstance(other, ComparedByContent)
        return self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)
