"""Linear forms: what stands for an image while a sampler's own code runs once on the host.

A form is sum_k a_k v_k with float64 coefficients a_k over the variables v_k of one recording: the
samples, model outputs and noise draws of every call. It answers to the operators, methods and
torch functions that samplers apply to images; everything else raises NotAffineError with the name
of the operation and the line of the sampler's code. (A plain object: a Tensor subclass would pass
through the dispatcher, several times slower, and not through every function that samplers call.)
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastdiff.tracing.record import Recorder

__all__ = ["LinearForm", "NotAffineError", "NumberLike"]

NumberLike = float | int | np.number | Tensor
CONSTANT = -1  # the variable that is 1


class NotAffineError(TypeError):
    """The sampler did to an image what is not affine with scalar coefficients.

    Attributes:
        operation: the name of what it did.
        where: file:line of the sampler's code.
    """

    def __init__(self, operation: str, reason: str = "is not affine in the images") -> None:
        self.operation = operation
        self.where = _where()
        super().__init__(f"{operation} {reason}: {self.where}")


class _NoSuchAttribute(NotAffineError, AttributeError):
    """hasattr() must be answered, not interrupted."""


def _where() -> str:
    """The innermost line that is neither fastdiff's tracing nor torch's."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_THE_SAMPLER):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


_NOT_THE_SAMPLER = tuple(os.path.dirname(path) + os.sep for path in (__file__, torch.__file__))


def number(value: Any, operation: str) -> float | None:
    """A scalar's value; None for what is not a scalar."""
    if type(value) is float:
        return value
    if isinstance(value, LinearForm):
        return None
    if isinstance(value, Tensor | np.ndarray):
        size = value.numel() if isinstance(value, Tensor) else value.size
        if size != 1:
            raise NotAffineError(operation, f"with a tensor of shape {tuple(value.shape)}")
        return float(value.item())
    if isinstance(value, int | float | np.number):
        return float(value)
    return None


def _refusal(operation: str, reason: str = "is not affine in the images") -> Callable[..., Any]:
    def method(self: LinearForm, *_: Any) -> Any:
        raise NotAffineError(operation, reason)

    return method


class LinearForm:
    """An image as a linear form. shape, dtype and device are those of the image it stands for.

    magnitude is the form's size if nothing in the arithmetic that led to it had cancelled, each
    variable counted by its natural size: times 2^-53 and a small factor it bounds the rounding.
    """

    __slots__ = ("device", "dtype", "magnitude", "recorder", "shape", "terms")
    __array_ufunc__ = None  # NumPy's numbers leave the arithmetic to the form

    def __init__(
        self,
        recorder: Recorder,
        terms: dict[int, float],
        dtype: torch.dtype = torch.float64,
        shape: torch.Size | None = None,
        magnitude: float = 1.0,
    ) -> None:
        self.recorder = recorder
        self.terms = terms
        self.magnitude = magnitude
        self.dtype = dtype
        self.shape = recorder.shape if shape is None else shape
        self.device = torch.device("cpu")

    def _like(
        self, terms: dict[int, float], dtype: torch.dtype | None = None, scale: float = 1.0
    ) -> LinearForm:
        magnitude = self.magnitude * abs(scale)
        return LinearForm(self.recorder, terms, dtype or self.dtype, self.shape, magnitude)

    # Arithmetic.

    def __add__(self, other: Any) -> LinearForm:
        return self._combine(other, 1.0, "add")

    __radd__ = __add__

    def __sub__(self, other: Any) -> LinearForm:
        return self._combine(other, -1.0, "subtract")

    def __rsub__(self, other: Any) -> LinearForm:
        return (-self)._combine(other, 1.0, "subtract")

    def _combine(self, other: Any, sign: float, operation: str) -> LinearForm:
        if isinstance(other, LinearForm):
            terms = dict(self.terms)
            for key, value in other.terms.items():
                total = terms.get(key, 0.0) + sign * value
                if total != 0.0:
                    terms[key] = total
                else:
                    terms.pop(key, None)
            dtype = self.dtype
            if other.dtype != dtype:
                dtype = torch.promote_types(dtype, other.dtype)
            magnitude = self.magnitude + other.magnitude
            return LinearForm(self.recorder, terms, dtype, self.shape, magnitude)
        constant = number(other, operation)
        if constant is None:
            raise NotAffineError(operation, f"with {type(other).__name__}")
        if constant == 0.0:
            return self
        terms = dict(self.terms)
        terms[CONSTANT] = terms.get(CONSTANT, 0.0) + sign * constant
        return self._like(terms)

    def __mul__(self, other: Any) -> LinearForm:
        if isinstance(other, Exponential):
            return other * self
        value = number(other, "multiply")
        if value is None:
            raise NotAffineError("multiply", f"with {type(other).__name__} is not affine")
        return self._scaled(value)

    __rmul__ = __mul__

    def _scaled(self, value: float) -> LinearForm:
        if value == 0.0:
            return self._like({}, scale=0.0)
        if not math.isfinite(value):
            raise NotAffineError("multiply", f"by {value}")
        return self._like({k: v * value for k, v in self.terms.items()}, scale=value)

    def __truediv__(self, other: Any) -> LinearForm:
        value = number(other, "divide")
        if value is None:
            raise NotAffineError("divide", f"by {type(other).__name__} is not affine")
        if value == 0.0 or math.isnan(value):
            raise NotAffineError("divide", f"by {value}")
        if math.isinf(value):
            return self._like({}, scale=0.0)
        return self._like({k: v / value for k, v in self.terms.items()}, scale=1.0 / value)

    def __neg__(self) -> LinearForm:
        return self._like({k: -v for k, v in self.terms.items()})

    def __pos__(self) -> LinearForm:
        return self

    __rtruediv__ = _refusal("divide", "by an image is not affine")
    __pow__ = __rpow__ = _refusal("power")
    __mod__ = __rmod__ = __floordiv__ = __rfloordiv__ = _refusal("remainder")
    __matmul__ = __rmatmul__ = _refusal("matrix product", "mixes the elements of images")
    __abs__ = _refusal("abs()")
    __bool__ = _refusal("bool()", "decides by the values of images")
    __float__ = _refusal("float()", "reads the values of images")
    __int__ = _refusal("int()", "reads the values of images")
    __lt__ = __le__ = __gt__ = __ge__ = _refusal("comparison", "decides by the values of images")
    __getitem__ = __setitem__ = _refusal("indexing", "takes images apart")
    __iter__ = _refusal("iteration", "takes images apart")
    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        if other is None:
            return False
        raise NotAffineError("comparison", "decides by the values of images")

    def __ne__(self, other: object) -> bool:
        return not self == other

    # What samplers ask of a tensor.

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def requires_grad(self) -> bool:
        return False

    def dim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        return math.prod(self.shape)

    def is_floating_point(self) -> bool:
        return True

    def to(self, *args: Any, **kwargs: Any) -> LinearForm:
        for value in (*args, kwargs.get("dtype")):
            if isinstance(value, torch.dtype):
                return self._like(self.terms, value)
            if isinstance(value, Tensor | LinearForm):
                return self._like(self.terms, value.dtype)
        return self

    def clone(self, *_: Any, **__: Any) -> LinearForm:
        return self

    contiguous = detach = cpu = cuda = clone

    def new_ones(self, size: Any, **_: Any) -> Tensor:
        return torch.ones(size, dtype=torch.float64)

    def new_zeros(self, size: Any, **_: Any) -> Tensor:
        return torch.zeros(size, dtype=torch.float64)

    def new_tensor(self, data: Any, **_: Any) -> Tensor:
        return torch.tensor(data, dtype=torch.float64)

    def add(self, other: Any, *, alpha: NumberLike = 1) -> LinearForm:
        return self + other * alpha

    def sub(self, other: Any, *, alpha: NumberLike = 1) -> LinearForm:
        return self - other * alpha

    def mul(self, other: Any) -> LinearForm:
        return self * other

    def div(self, other: Any) -> LinearForm:
        return self / other

    def neg(self) -> LinearForm:
        return -self

    def lerp(self, end: Any, weight: NumberLike) -> LinearForm:
        return self * (1 - weight) + end * weight

    def clamp(self, min: NumberLike | None = None, max: NumberLike | None = None) -> LinearForm:
        lo = number(min, "clamp") if min is not None else -math.inf
        hi = number(max, "clamp") if max is not None else math.inf
        if lo is None or hi is None:
            raise NotAffineError("clamp", "between images is not a clamp by numbers")
        return self.recorder.clamp(self, lo, hi)

    clip = clamp

    def exp(self) -> Exponential:
        return Exponential(self)

    def split(self, size: int, dim: int = 0) -> list[LinearForm]:
        """A model output with learned variance into its halves along the channels."""
        if dim != 1 or self.shape[1] != 2 * size:
            raise NotAffineError("split", "is not that of model output and variance")
        return self.recorder.halves(self)

    def chunk(self, chunks: int, dim: int = 0) -> list[LinearForm]:
        if chunks != 2:
            raise NotAffineError("chunk", f"into {chunks}")
        return self.split(self.shape[dim] // 2, dim)

    def __getattr__(self, name: str) -> Any:
        if name == "type":
            return self.to
        if name in _CASTS:
            return lambda: self.to(_CASTS[name])
        raise _NoSuchAttribute(f"Tensor.{name}")

    def __len__(self) -> int:
        return self.shape[0]

    def __deepcopy__(self, memo: dict[int, Any]) -> LinearForm:
        return self

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        from fastdiff.tracing.torch_functions import FUNCTIONS

        name = getattr(func, "__name__", str(func))
        handler = FUNCTIONS.get(name)
        if handler is None:
            raise NotAffineError(f"torch.{name}")
        try:
            return handler(*args, **(kwargs or {}))
        except NotAffineError:
            raise
        except TypeError as error:  # arguments that the handler does not know
            raise NotAffineError(f"torch.{name}", f"is not known so ({error})") from error

    def __repr__(self) -> str:
        parts = [
            f"{value:+.6g} {self.recorder.variable_name(key)}"
            for key, value in sorted(self.terms.items())
        ]
        return " ".join(parts) or "0"


class Exponential:
    """exp of a form: only as the noise scale of a learned variance."""

    def __init__(self, exponent: LinearForm) -> None:
        self.exponent = exponent

    def __mul__(self, other: Any) -> LinearForm:
        if not isinstance(other, LinearForm):
            raise NotAffineError("exp", "times anything but noise is not affine")
        return self.exponent.recorder.scaled_noise(self.exponent, other)

    __rmul__ = __mul__


# Methods whose names would hide Python's own types in the annotations above.
_CASTS = {
    "float": torch.float32,
    "double": torch.float64,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
}
