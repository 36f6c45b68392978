"""A progress bar on stderr: rich's when it is installed, else one line that is rewritten."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

__all__ = ["track"]

T = TypeVar("T")


def track(items: Sequence[T], description: str, enabled: bool = True) -> Iterator[T]:
    """Yields the items and shows how many are done, how fast, and for how long still."""
    if not enabled:
        yield from items
        return
    try:
        from rich.console import Console
        from rich.progress import track as rich_track
    except ImportError:
        yield from _plain(items, description)
        return
    yield from rich_track(items, description, console=Console(stderr=True), transient=False)


def _plain(items: Sequence[T], description: str) -> Iterator[T]:
    start = shown = time.perf_counter()
    total = len(items)
    for done, item in enumerate(items, start=1):
        yield item
        now = time.perf_counter()
        if done == total or now - shown > 0.1:
            shown = now
            rate = done / max(now - start, 1e-9)
            left = (total - done) / rate
            end = "\n" if done == total else ""
            print(
                f"\r{description} {done}/{total} {rate:.1f}/s {left:.0f}s left ",
                end=end, file=sys.stderr, flush=True,
            )  # fmt: skip
