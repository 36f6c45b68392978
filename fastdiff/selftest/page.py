"""The results of a self-test on one page of text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastdiff.selftest.runner import Report

__all__ = ["page"]

_LINES = 80
_WIDTH = 140
_MOST_FAILURES = 4  # of a part; all are in results.json


def page(report: Report) -> str:
    """A line for each part, under it what failed and what it has to say.

    Notes give way, the longest list first, where the whole would not fit on a page of 80 lines.
    """
    outcomes = report.outcomes
    counts: dict[str, int] = {}
    for outcome in outcomes:
        counts[outcome.status] = counts.get(outcome.status, 0) + 1
    verdict = "FAILED" if any(outcome.bad for outcome in outcomes) else "PASSED"
    if report.left_over:
        verdict += f", NOT FINISHED ({', '.join(report.left_over)} still to come)"
    summary = ", ".join(f"{count} {status}" for status, count in counts.items()) or "nothing yet"
    head = [
        f"fastdiff selftest on {report.device}, {report.started}, {report.seconds:.0f} s",
        f"{verdict}: {summary}",
        "",
    ]
    failures = [_shortened(o.failures, _MOST_FAILURES) for o in outcomes]
    room = _LINES - len(head) - len(outcomes) - sum(map(len, failures)) - 1
    allowed = max((len(o.notes) for o in outcomes), default=0)
    while allowed and sum(min(len(o.notes), allowed) for o in outcomes) > room:
        allowed -= 1
    lines = head
    for outcome, failed in zip(outcomes, failures, strict=True):
        checks = f"{outcome.checks} checks" if outcome.checks else ""
        lines.append(
            f"{outcome.name:<22} {outcome.status:<10}{outcome.seconds:6.1f} s  {checks:<14} "
            f"{outcome.about}"[:_WIDTH].rstrip()
        )
        lines += [f"  ! {line}"[:_WIDTH] for line in failed]
        lines += [f"  {line}"[:_WIDTH].rstrip() for line in _shortened(outcome.notes, allowed)]
    return "\n".join(lines) + "\n"


def _shortened(lines: Sequence[str], most: int) -> list[str]:
    flat = [" ".join(line.split()) if "\n" in line else line for line in lines]
    if len(flat) <= most:
        return flat
    return [*flat[: max(most - 1, 0)], f"and {len(flat) - max(most - 1, 0)} more"][:most]
