"""A progress bar on stderr: rich's when it is installed, else one line that is rewritten."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

__all__ = ["track"]

T = TypeVar("T")


def track(
    items: Sequence[T],
    description: str,
    enabled: bool = True,
    *,
    first: int = 0,
    note: Callable[[], str] | None = None,
) -> Iterator[T]:
    """Yields the items and shows how many are done, how fast, and for how long still.

    Args:
        first: as many were done before these items, and are shown as done.
        note: asked for a few words to show whenever the line is drawn.
    """
    if not enabled:
        yield from items
        return
    try:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            Progress,
            ProgressColumn,
            TaskProgressColumn,
            TextColumn,
            TimeRemainingColumn,
        )
    except ImportError:
        yield from _plain(items, description, first, note)
        return
    columns: list[ProgressColumn] = [
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    ]  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=first + len(items), completed=first, note="")
        for item in items:
            yield item
            bar.update(task, advance=1, note=note() if note else "")


def _plain(
    items: Sequence[T], description: str, first: int, note: Callable[[], str] | None
) -> Iterator[T]:
    start = shown = time.perf_counter()
    total = first + len(items)
    for done, item in enumerate(items, start=first + 1):
        yield item
        now = time.perf_counter()
        if done == total or now - shown > 0.1:
            shown = now
            rate = (done - first) / max(now - start, 1e-9)
            left = (total - done) / rate
            words = f" {note()}" if note else ""
            end = "\n" if done == total else ""
            print(
                f"\r{description} {done}/{total} {rate:.1f}/s {left:.0f}s left{words} ",
                end=end, file=sys.stderr, flush=True,
            )  # fmt: skip
