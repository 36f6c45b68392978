"""Gates: recorded figures of compiled kernels, and what a report breaks of them.

The file is JSON with a line for each case and backend: registers, instructions an element and
shared memory, "32 27.50 0", for each target. Beside them stand `limits` that no record may exceed,
and `exceptions` to those, each with its reason; these two are kept when the rest is recorded anew
(`fastdiff profile --target all --record FILE`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastdiff.files import write_atomic
from fastdiff.profiling.cases import Case, cases

__all__ = ["Figures", "breaches", "covers", "load", "record", "recorded", "same_compiler"]

Row = Mapping[str, Any]
Gates = dict[str, Any]

_EMPTY: Gates = {"versions": {}, "margin": 0.02, "targets": [], "limits": [], "exceptions": []}
_LIMITED = {"registers": "registers", "loop": "instructions an element in the loop"}
_INEXACT = ("contracted", "approximate", "flushing", "nan_dropping")
# By backend, the version whose change moves instruction counts.
_COMPILERS = {"triton": "triton", "cuda": "nvcc"}


class Figures(NamedTuple):
    registers: int
    instructions: float | None  # None, written "-": they could not be counted
    shared: int

    @classmethod
    def of(cls, row: Row) -> Figures:
        return cls(row["registers"], row.get("instructions"), row["shared"])

    @classmethod
    def parse(cls, text: str) -> Figures:
        registers, instructions, shared = text.split()
        counted = None if instructions == "-" else float(instructions)
        return cls(int(registers), counted, int(shared))

    def __str__(self) -> str:
        instructions = "-" if self.instructions is None else f"{self.instructions:.2f}"
        return f"{self.registers} {instructions} {self.shared}"


def covers(case: Case, target: str, backend: str) -> bool:
    """Whether a case is held to its figures; not all are, since compiling them takes CI's time.

    The CUDA library has every kernel in it. Of Triton's, every dtype is compiled for one target of
    each vendor; for the others float32, bfloat16, and none that mix two.
    """
    every = backend == "cuda" or target in ("sm_90", "gfx942")
    return every or not (case.mixed or case.dtype == torch.float16)


def load(path: Path) -> Gates:
    """The gates in a file; none in one that does not exist."""
    if not path.exists():
        return dict(_EMPTY)
    return {**_EMPTY, **json.loads(path.read_text())}


def recorded(gates: Gates, row: Row) -> Figures | None:
    """What is recorded for the case, backend and target of a row."""
    cell = gates.get(row["backend"], {}).get(row["case"], {}).get(row["target"])
    return None if cell is None else Figures.parse(cell)


def same_compiler(gates: Gates, versions: Mapping[str, str], backend: str) -> str | None:
    """None if counts compare with the recorded ones, else why they do not."""
    name = _COMPILERS[backend]
    before, now = gates["versions"].get(name), versions.get(name)
    if before is None or now is None or _minor(before) == _minor(now):
        return None
    return f"recorded with {name} {before}, and this is {now}"


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]


def breaches(gates: Gates, row: Row, versions: Mapping[str, str]) -> list[str]:
    """What a row of a static report breaks, in sentences with the figures.

    With another compiler than the recorded one, counts are not compared with the record; what is
    absolute holds all the same.
    """
    if "error" in row:
        return [row["error"]]
    excused = [e for e in gates["exceptions"] if _concerns(e, row)]
    found = [
        f"{text}: {row[figure]}"
        for figure, text in (
            ("spills", "spilled registers are loaded and stored"),
            ("stack", "bytes of stack are used"),
        )
        if row[figure] > max((e[figure] for e in excused if figure in e), default=0)
    ]
    width = row.get("width", 128)
    if width < min((e["width"] for e in excused if "width" in e), default=128):
        found.append(f"tensors are accessed {width} bits at a time, not 128")
    found += [f"{count} {what} in the code" for what, count in _forbidden(row) if count]
    found += _over_limits(gates["limits"], excused, row)
    before = recorded(gates, row)
    if before is None:
        return [*found, "nothing is recorded for it: record it"]
    if same_compiler(gates, versions, row["backend"]) is not None:
        return found
    now = Figures.of(row)
    if before.instructions is not None:
        if now.instructions is None:
            found.append(f"instructions are not counted: {row['uncounted']}")
        elif now.instructions > before.instructions * (1 + gates["margin"]):
            change = f"{now.instructions:.2f} instructions an element"
            found.append(f"{change}, recorded {before.instructions:.2f}")
    if row["registers"] > before.registers:
        found.append(f"{row['registers']} registers, recorded {before.registers}")
    if row["shared"] > before.shared:
        found.append(f"{row['shared']} bytes of shared memory, recorded {before.shared}")
    return found


def _forbidden(row: Row) -> Iterable[tuple[str, int]]:
    """What must not be in the code. The fast form of noise fuses and approximates, on purpose."""
    counts = row.get("arithmetic", {})
    kinds = [] if row["case"].endswith(" fast") else list(_INEXACT)
    if row["backend"] == "triton":  # the others have ends of a few elements in the same kernel
        kinds.append("narrow")
    return ((kind, counts.get(kind, 0)) for kind in kinds)


def _concerns(rule: Mapping[str, Any], row: Row) -> bool:
    return (
        any(fnmatch(row["case"], pattern) for pattern in rule["cases"])
        and row["target"] in rule["targets"]
        and row["backend"] in rule.get("backends", _COMPILERS)
    )


def _over_limits(
    limits: Sequence[Mapping[str, Any]], excused: Sequence[Mapping[str, Any]], row: Row
) -> list[str]:
    """Limits that the row exceeds, an exception's figure standing in for a limit's."""
    found = []
    for figure in _LIMITED:
        allowed = [rule[figure] for rule in limits if figure in rule and _concerns(rule, row)]
        instead = [rule[figure] for rule in excused if figure in rule]
        if not allowed:
            continue
        most = max(instead) if instead else min(allowed)
        if row.get(figure, 0) > most:
            found.append(f"{row[figure]:g} {_LIMITED[figure]}, and the limit is {most:g}")
    return found


def record(report: Mapping[str, Any], path: Path) -> list[str]:
    """Writes the figures of a static report as the new gates.

    Rows that the report has not are kept as they were. Returns what changed, a line each: new
    figures, those that moved by more than the margin, and what is wrong with the new ones.
    """
    gates = load(path)
    said = []
    targets = list(dict.fromkeys([*gates["targets"], *(row["target"] for row in report["rows"])]))
    for row in report["rows"]:
        if "error" in row:
            said.append(f"not recorded: {_name(row)}: {row['error']}")
            continue
        before = recorded(gates, row)
        now = Figures.of(row)
        cells = gates.setdefault(row["backend"], {}).setdefault(row["case"], {})
        cells[row["target"]] = str(now)
        if before is not None and _moved(before, now, gates["margin"]):
            said.append(f"{_name(row)}: {before} -> {now}")
    names = ("triton", "nvcc")
    gates["versions"] |= {n: report["versions"][n] for n in names if n in report["versions"]}
    gates["targets"] = targets
    for row in report["rows"]:
        if "error" not in row:
            said += [f"wrong: {_name(row)}: {what}" for what in breaches(gates, row, {})]
    write_atomic(path, _written(gates).encode())
    return said


def _name(row: Row) -> str:
    return f"{row['case']} by {row['backend']} on {row['target']}"


def _moved(before: Figures, now: Figures, margin: float) -> bool:
    if before.instructions is None or now.instructions is None:
        return before != now
    change = abs(now.instructions - before.instructions) > margin * before.instructions
    return change or now.registers != before.registers or now.shared != before.shared


def _written(gates: Gates) -> str:
    """JSON with a line for each rule and for each case."""

    def rules(name: str) -> str:
        lines = ",\n".join("    " + json.dumps(rule) for rule in gates[name])
        return f'  "{name}": [\n{lines}\n  ]' if lines else f'  "{name}": []'

    def figures(backend: str) -> str:
        rows = gates[backend]
        width = max(len(json.dumps(case)) for case in rows)
        lines = []
        for case in (case.id for case in cases() if case.id in rows):
            cells = rows[case]
            present = [target for target in gates["targets"] if target in cells]
            parts = [f'"{target}": "{cells[target]}"' for target in present]
            padded = [f"{part}," for part in parts[:-1]]
            text = " ".join([*(part.ljust(len("gfx942") + 23) for part in padded), parts[-1]])
            lines.append(f"    {json.dumps(case) + ':':<{width + 1}} {{{text}}}")
        return f'  "{backend}": {{\n' + ",\n".join(lines) + "\n  }"

    head = [f'  "{name}": {json.dumps(gates[name])}' for name in ("versions", "margin", "targets")]
    body = [figures(backend) for backend in _COMPILERS if backend in gates]
    return "{\n" + ",\n".join([*head, rules("limits"), rules("exceptions"), *body]) + "\n}\n"
