"""Options of the command line: numbers in a range, files that can be written, and refusals."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from fastdiff.files import check_writable

__all__ = ["UsageError", "integer", "output_file", "real"]


class UsageError(Exception):
    """A wrong option that argparse alone does not see."""


def integer(low: int, high: int) -> Callable[[str], int]:
    """Parses an integer in [low, high]; for argparse."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be an integer, got {text!r}") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be in [{low}, {high}], got {value}")
        return value

    return parse


def real(low: float, high: float) -> Callable[[str], float]:
    """Parses a number in [low, high]; for argparse."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None
        if not low <= value <= high:  # refuses NaN as well
            raise argparse.ArgumentTypeError(f"must be in [{low:g}, {high:g}], got {text}")
        return value

    return parse


def output_file(option: str, text: str, suffix: str) -> Path:
    """The path, if it ends as it should and can be written; else raises UsageError."""
    if Path(text).suffix.lower() != suffix:
        raise UsageError(f"argument {option}: must end in {suffix}, got {text!r}")
    try:
        return check_writable(text, option)
    except ValueError as error:
        raise UsageError(f"argument {error}") from None
