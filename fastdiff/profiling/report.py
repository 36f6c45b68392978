"""Reports of `fastdiff profile`: what they carry, as a file, and two of them compared.

A report is a dict that JSON holds: kind ("static" or "measured"), date, commit, machine, versions
and rows; a row has case, backend, and its figures.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import fastdiff
from fastdiff.files import write_atomic
from fastdiff.profiling.timing import machine

__all__ = ["Change", "commit", "compare", "load", "new_report", "save"]

Row = Mapping[str, Any]


def new_report(kind: str, rows: Sequence[Row], nvcc: str | None = None) -> dict[str, Any]:
    """A report with what is known of this machine; `nvcc`: its version, if it was used."""
    versions = {"fastdiff": fastdiff.__version__}
    for package in ("torch", "triton"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if nvcc:
        versions["nvcc"] = nvcc
    return {
        "kind": kind,
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "commit": commit(),
        "machine": machine(),
        "versions": versions,
        "rows": list(rows),
    }


def commit() -> str | None:
    """The checkout's commit, with + where files differ from it; None outside of a checkout."""
    folder = Path(fastdiff.__file__).parent.parent
    if not (folder / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def save(report: Mapping[str, Any], path: Path) -> None:
    """Writes a report as JSON."""
    write_atomic(path, json.dumps(report, indent=1).encode() + b"\n")


def load(path: Path) -> dict[str, Any]:
    """Reads a report. Raises ValueError, saying what is wrong with the file."""
    try:
        report = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise ValueError(f"{path} is not JSON") from None
    if not isinstance(report, dict) or not isinstance(report.get("rows"), list):
        raise ValueError(f"{path} is not a report of fastdiff: it has no rows")
    return report


class Change:
    """One figure of one row that is not what it was."""

    def __init__(self, row: Row, figure: str, old: float, new: float, worse: bool) -> None:
        self.row, self.figure, self.old, self.new, self.worse = row, figure, old, new, worse

    def __str__(self) -> str:
        where = " ".join(str(part) for part in _key(self.row) if part)
        change = f", {100 * (self.new / self.old - 1):+.1f} %" if self.old else ""
        verdict = "WORSE " if self.worse else "better"
        return f"{verdict} {where}: {self.figure} {self.old:g} -> {self.new:g}{change}"


def _key(row: Row) -> tuple[str, ...]:
    shape = "x".join(map(str, row.get("shape", ())))
    return (row["case"], row["backend"], row.get("target", ""), shape)


# Figures that are compared; of the last one more is better.
_FIGURES = ("registers", "spills", "stack", "shared", "instructions", "us", "hot_us", "call_us")
_MORE_IS_BETTER = ("occupancy", "of_copy")


def compare(
    old: Mapping[str, Any], new: Mapping[str, Any], threshold: float = 0.03
) -> list[Change]:
    """What changed by more than `threshold` between rows of the same case, worse first.

    Raises ValueError when the reports are of different kinds or have no row in common.
    """
    if old.get("kind") != new.get("kind"):
        raise ValueError(f"a {old.get('kind')} report does not compare with a {new['kind']} one")
    before = {_key(row): row for row in old["rows"]}
    pairs = [(before[_key(row)], row) for row in new["rows"] if _key(row) in before]
    if not pairs:
        raise ValueError("the reports have no case, backend and target in common")
    changes = []
    for was, row in pairs:
        for figure in (*_FIGURES, *_MORE_IS_BETTER):
            if figure not in was or figure not in row:
                continue
            a, b = _number(was[figure]), _number(row[figure])
            if abs(b - a) <= threshold * abs(a):
                continue
            changes.append(Change(row, figure, a, b, (b > a) != (figure in _MORE_IS_BETTER)))
        if "error" in row and "error" not in was:
            changes.append(Change(row, "errors", 0, 1, worse=True))
    return sorted(changes, key=lambda change: not change.worse)


def _number(value: Any) -> float:
    """A figure, or the median of (p10, median, p90)."""
    return float(value[1] if isinstance(value, list) else value)
