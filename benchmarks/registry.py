"""The one list of benchmark cases.

    register(Case("operations", "q_sample fp32 16x4x64x64", partial(q_sample, ...), quick=True))

A module of MODULES registers its cases when it is imported and does no work before a case is built,
so listing is cheap; other packages are imported by `build`. One that is missing here, or that does
not compile (a contestant that raises at its first call), is reported as absent with the reason.
fastdiff/profiling/bench.py runs the cases.
"""

from __future__ import annotations

import fnmatch
import importlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = [
    "ALL",
    "Case",
    "Contest",
    "Unavailable",
    "cases",
    "compiled",
    "register",
    "shape_of",
    "smoke",
]

MODULES = (
    "limits", "operations", "training", "scaling", "schedulers", "samplers", "loops", "share",
)  # fmt: skip
ALL = 0  # as a thread count: every core of the machine

Call = Callable[[], Any]


class Unavailable(Exception):
    """Raised by a case's `build` where the whole case cannot run: a sentence that says why."""


@dataclass
class Contest:
    """What takes part in one case, ready to be called. A call is timed as it is; what needs set-up
    before every call is a fastdiff.profiling.timing.Prepared.

    Attributes:
        ours: name to call; the first returns fresh tensors as the opponents do ("fastdiff"), others
            say what is different ("fastdiff in place").
        check: check(name) raises AssertionError when the result of that contestant (ours or an
            opponent) is wrong; it is then listed as wrong and not timed. Runs once, after the
            contestant's first call; undoes what it does to state that later calls need.
        opponents: name to call, the strongest included.
        absent: opponents that cannot take part here, and why (one line). An opponent whose first
            call raises is moved here by the runner.
        slow: opponents that take long to compile: `--quick` leaves them out.
        limits: what the machine can do, timed in the same rounds. A name is "kind: detail", as in
            "memory: copy", "noise: fastdiff.randn", "call: one multiplication". Of one kind the
            fastest counts (two ways to copy); over kinds the slowest binds.
        beside: calls that belong to the story but do not compete. Of {"model": ...} the report
            makes every contestant's share of the whole: its time over its time and the model's.
        elements: of the sample that one call works on.
        bytes: read and written by one call, each tensor once.
        operations: floating-point operations of one call, where that is meaningful.
        work: what one call completes, for rates, as in {"images": 16, "steps": 50}.
        compile_seconds: spent before the first call (a trace, a torch.compile done in `build`).
            The runner adds the time of every contestant's first call.
    """

    ours: dict[str, Call]
    check: Callable[[str], None]
    opponents: dict[str, Call] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    slow: tuple[str, ...] = ()
    limits: dict[str, Call] = field(default_factory=dict)
    beside: dict[str, Call] = field(default_factory=dict)
    elements: int = 0
    bytes: int = 0
    operations: float | None = None
    work: dict[str, float] = field(default_factory=dict)
    compile_seconds: dict[str, float] = field(default_factory=dict)

    def call(self, name: str) -> Call:
        """The call of a contestant, of ours or of an opponent."""
        return self.ours[name] if name in self.ours else self.opponents[name]


@dataclass(frozen=True)
class Case:
    """One line of the benchmark.

    Attributes:
        group: the name of the module, "operations".
        name: unique in the group; says operation, dtype and shape.
        build: makes the contest; called after the thread count is set.
        quick: part of `fastdiff bench --quick`.
        threads: counts it is measured with; ALL is every core. Counts beyond the machine's are
            left out.
        cold: measured once more with the default allocator, in a process of its own.
    """

    group: str
    name: str
    build: Callable[[], Contest]
    quick: bool = False
    threads: tuple[int, ...] = (1,)
    cold: bool = False

    @property
    def id(self) -> str:
        return f"{self.group}/{self.name}"


_registered: dict[str, Case] = {}


def register(case: Case) -> None:
    """Adds a case to the list. Raises ValueError when its name is taken."""
    if case.id in _registered:
        raise ValueError(f"there is a case named {case.id!r} already")
    _registered[case.id] = case


def cases(
    only: Sequence[str] = (), quick: bool = False, modules: Sequence[str] = MODULES
) -> list[Case]:
    """The cases, in the order of their modules.

    Args:
        only: glob patterns of ids, as in "operations/q_sample*"; a word without * or / is looked
            for anywhere in the id. A case that matches one of them is taken; all when empty.
        quick: only those marked quick.

    Raises:
        ValueError: a pattern matches no case.
    """
    for name in modules:
        importlib.import_module(f"fastdiff.benchmarks.{name}")
    chosen = [case for case in _registered.values() if case.group in modules]
    for pattern in only:
        if not any(_matches(case, pattern) for case in chosen):
            raise ValueError(f"{pattern!r} matches no case; --list prints them")
    if only:
        chosen = [case for case in chosen if any(_matches(case, pattern) for pattern in only)]
    return [case for case in chosen if case.quick or not quick]


def _matches(case: Case, pattern: str) -> bool:
    if not any(mark in pattern for mark in "*?["):
        return pattern in case.id
    return fnmatch.fnmatchcase(case.id, pattern)


def smoke() -> bool:
    """Whether cases are to be tiny and uncompiled, so that a test can run every one of them.

    FASTDIFF_BENCH_SMOKE=1 says so. No time taken then means anything; reports are marked.
    """
    return os.environ.get("FASTDIFF_BENCH_SMOKE") == "1"


def shape_of(text: str) -> tuple[int, ...]:
    """(16, 4, 64, 64) of "16x4x64x64"; when smoke() no dimension is larger than 4."""
    sizes = tuple(int(word) for word in text.split("x"))
    return tuple(min(size, 4) for size in sizes) if smoke() else sizes


def compiled(function: Callable, **options: bool) -> Callable:
    """torch.compile of a whole function at static shapes; the function itself when smoke().

    It compiles at its first call. Options are Inductor's, as in fallback_random=True, which keeps
    torch's own generator.
    """
    if smoke():
        return function
    return torch.compile(function, fullgraph=True, dynamic=False, options=dict(options) or None)
