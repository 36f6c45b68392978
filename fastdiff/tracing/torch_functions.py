"""torch's functions on linear forms: what samplers call besides operators and methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff.tracing.linear_form import Exponential, LinearForm, NotAffineError, NumberLike

__all__ = ["FUNCTIONS"]


class Stack:
    """torch.stack of forms, for the einsum over them that UniPC writes."""

    def __init__(self, forms: list[LinearForm], dim: int) -> None:
        self.forms = forms
        self.dim = dim

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is not torch.einsum:
            name = getattr(func, "__name__", str(func))
            raise NotAffineError(f"torch.{name}", "of stacked images is not known")
        return LinearForm.__torch_function__(func, types, args, kwargs)


def _stack(forms: Sequence[Any], dim: int = 0) -> Stack:
    if not all(isinstance(form, LinearForm) for form in forms):
        raise NotAffineError("torch.stack", "of images and other tensors")
    return Stack(list(forms), dim)


def _einsum(equation: str, weights: Tensor, stack: Stack) -> LinearForm:
    operands, _, result = equation.replace(" ", "").partition("->")
    first, _, second = operands.partition(",")
    known = isinstance(weights, Tensor) and weights.dim() == 1 and isinstance(stack, Stack)
    summed = len(first) == 1 and second.replace(first, "", 1) == result
    if not known or not summed or second.find(first) != stack.dim:
        raise NotAffineError("torch.einsum", f"of {equation!r} is not a weighted sum of images")
    if len(stack.forms) != len(weights):
        raise NotAffineError("torch.einsum", f"of {len(weights)} weights and {len(stack.forms)}")
    total = stack.forms[0] * float(weights[0])
    for weight, form in zip(weights[1:], stack.forms[1:], strict=True):
        total = total + form * float(weight)
    return total


def _zeros_like(form: LinearForm, **kwargs: Any) -> LinearForm:
    return form._like({}, kwargs.get("dtype"), scale=0.0)


def _draw(form: LinearForm, *, dtype: torch.dtype | None = None, **_: Any) -> LinearForm:
    return form.recorder.drawn(dtype or form.dtype)


def _times(a: Any, b: Any) -> LinearForm:
    return b * a if isinstance(b, LinearForm | Exponential) else a * b


def _minus(a: Any, b: Any, *, alpha: NumberLike = 1) -> LinearForm:
    return (a - b * alpha) if isinstance(a, LinearForm) else (b * alpha).__rsub__(a)


def _plus(a: Any, b: Any, *, alpha: NumberLike = 1) -> LinearForm:
    return a + b * alpha if isinstance(a, LinearForm) else b * alpha + a


def _over(a: Any, b: Any) -> LinearForm:
    if isinstance(b, LinearForm):
        raise NotAffineError("divide", "by an image is not affine")
    form: LinearForm = a / b
    return form


def _lerp(a: Any, b: Any, weight: Any) -> LinearForm:
    return _plus(a, _times(_minus(b, a), weight))


def _clamped(form: Any, *args: Any, **kwargs: Any) -> LinearForm:
    if not isinstance(form, LinearForm):
        raise NotAffineError("clamp", "between images is not a clamp by numbers")
    return form.clamp(*args, **kwargs)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "add": _plus, "__add__": _plus, "__radd__": _plus,
    "sub": _minus, "subtract": _minus, "__sub__": _minus, "rsub": lambda a, b: _minus(b, a),
    "__rsub__": lambda a, b: _minus(b, a),
    "mul": _times, "multiply": _times, "__mul__": _times, "__rmul__": _times,
    "div": _over, "divide": _over, "true_divide": _over, "__truediv__": _over,
    "__rtruediv__": lambda a, b: _over(b, a), "__rdiv__": lambda a, b: _over(b, a),
    "neg": lambda a: -a, "negative": lambda a: -a,
    "lerp": _lerp, "clamp": _clamped, "clip": _clamped,
    "exp": lambda a: a.exp(),
    "split": lambda a, *args, **kwargs: a.split(*args, **kwargs),
    "chunk": lambda a, *args, **kwargs: a.chunk(*args, **kwargs),
    "stack": _stack, "einsum": _einsum,
    "zeros_like": _zeros_like,
    "randn_like": _draw,
    "clone": lambda a, **_: a,
    "is_floating_point": lambda _: True,
}  # fmt: skip
