"""Checks of options that many builders have."""

from __future__ import annotations

from collections.abc import Sequence

from fastdiff.schedules._values import as_float

__all__ = ["check_choice", "check_clip", "check_positive", "check_thresholding"]


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")


def check_positive(name: str, value: float, zero: bool = False) -> float:
    """A float > 0; with `zero` >= 0."""
    number = as_float(name, value)
    if number < 0 or (number == 0 and not zero):
        raise ValueError(f"{name} must be {'>= 0' if zero else '> 0'}, not {number}")
    return number


def check_clip(clip: Sequence[float] | None) -> tuple[float, float] | None:
    """None, or (lo, hi) with lo < hi."""
    if clip is None:
        return None
    try:
        lo, hi = (float(bound) for bound in clip)
    except (TypeError, ValueError):
        raise TypeError(f"clip must be None or a pair (lo, hi), not {clip!r}") from None
    if not lo < hi:
        raise ValueError(f"clip must have lo < hi, not {clip!r}")
    return lo, hi


def check_thresholding(thresholding: Sequence[float] | None) -> tuple[float, float] | None:
    """None, or (ratio, largest) with 0 <= ratio <= 1 <= largest."""
    if thresholding is None:
        return None
    try:
        ratio, largest = (float(value) for value in thresholding)
    except (TypeError, ValueError):
        raise TypeError(
            f"thresholding must be None or a pair (ratio, largest), not {thresholding!r}"
        ) from None
    if not (0 <= ratio <= 1 and largest >= 1):
        raise ValueError(f"thresholding must have 0 <= ratio <= 1 <= largest, not {thresholding!r}")
    return ratio, largest
