"""Two benchmark reports, case by case: what got faster and what got slower."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastdiff.profiling.bench_report import time_of

__all__ = ["Change", "changes", "comparison"]

Row = dict[str, Any]


@dataclass(frozen=True)
class Change:
    """One of our contestants in two reports.

    Attributes:
        ratio: new time over old, after what the machine itself did: divided by the same ratio of
            the case's opponents and limits, whose code has not changed.
        drift: that ratio, 1 where the case has nothing beside ours.
        noise: what the spread of both measurements can explain, as a ratio over 1.
    """

    name: str
    old: float
    new: float
    ratio: float
    drift: float
    noise: float

    def slower(self, threshold: float) -> bool:
        return self.ratio > max(1 + threshold, self.noise)

    def faster(self, threshold: float) -> bool:
        return 1 / self.ratio > max(1 + threshold, self.noise)


def _keyed(report: dict[str, Any]) -> dict[str, Row]:
    return {
        f"{row['case']}, {row['threads']} threads, {row['memory']}": row
        for row in report["rows"]
        if row["status"] == "measured"
    }


def changes(old: dict[str, Any], new: dict[str, Any]) -> Iterator[Change]:
    """Every contestant of ours that both reports have."""
    before = _keyed(old)
    for key, row in _keyed(new).items():
        if key not in before:
            continue
        was = before[key]
        steady = [
            row[kind][name]["seconds"][1] / was[kind][name]["seconds"][1]
            for kind in ("opponents", "limits")
            for name in row[kind]
            if name in was[kind]
        ]
        drift = float(np.median(steady)) if steady else 1.0
        for name, figures in row["ours"].items():
            if name in was["ours"]:
                a, b = was["ours"][name]["seconds"], figures["seconds"]
                noise = max(a[2] / a[1], b[2] / b[1], a[1] / a[0], b[1] / b[0])
                yield Change(f"{key}: {name}", a[1], b[1], b[1] / a[1] / drift, drift, noise)


def comparison(old: dict[str, Any], new: dict[str, Any], threshold: float) -> tuple[str, bool]:
    """The comparison as text, and whether something got slower.

    Args:
        threshold: as a fraction; a change counts when it is larger, and larger than the spread.
    """
    listed = list(changes(old, new))
    slower = sorted((c for c in listed if c.slower(threshold)), key=lambda c: -c.ratio)
    faster = sorted((c for c in listed if c.faster(threshold)), key=lambda c: c.ratio)
    lines = [f"old      {_origin(old)}", f"new      {_origin(new)}"]
    if any(old["machine"][key] != new["machine"][key] for key in ("processor", "cores")):
        lines.append(
            "WARNING  the machines differ; only what opponents and limits share is allowed for"
        )
    for title, chosen in (("slower", slower), ("faster", faster)):
        lines.append("")
        lines.append(f"{title} by more than {100 * threshold:g} % and than the spread:")
        lines += [f"  {_line(change)}" for change in chosen] or ["  none"]
    gone = [key for key in _keyed(old) if key not in _keyed(new)]
    wrong = [
        f"{row['case']}: {name}: {reason}"
        for row in new["rows"]
        for name, reason in row.get("wrong", {}).items()
    ]
    for title, names in (("only in the old report", gone), ("wrong in the new report", wrong)):
        if names:
            lines += ["", f"{title}:", *(f"  {name}" for name in names)]
    lines += ["", f"{len(listed)} compared, {len(slower)} slower, {len(faster)} faster"]
    return "\n".join(lines), bool(slower or wrong)


def _origin(report: dict[str, Any]) -> str:
    load = report["before"]["load"]
    kernels = report["machine"]["cpu kernels"]
    return f"{report['date']}, commit {report['commit'] or 'unknown'}, {kernels}, load {load}"


def _line(change: Change) -> str:
    return (
        f"{change.ratio:5.2f}x  {change.name}: {time_of(change.old)} -> {time_of(change.new)} "
        f"(others {change.drift:.2f}x, spread {change.noise:.2f}x)"
    )
