"""What torch.compile is told about functions here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["constant"]

F = TypeVar("F", bound=Callable[..., Any])


def constant(function: F) -> F:
    """Marks a function that compiled code calls when it is traced: its result is a constant.

    As torch.compiler.assume_constant_result, which imports the compiler, at more than a second.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
