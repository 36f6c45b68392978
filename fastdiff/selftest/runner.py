"""Runs parts one after another, each in processes of its own, and keeps what they found.

A part that crashes, hangs, prints garbage or finds a tool missing costs its own result and no
other. Parts share a budget of time: one is stopped at its limit, or earlier where the parts after
it would lose the seconds that are kept for them. After every part the results are written again,
so that a killed run leaves those so far.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import fastdiff
from fastdiff.files import write_atomic
from fastdiff.selftest.page import page
from fastdiff.selftest.part import Settings, command, plain

__all__ = ["Outcome", "Part", "Report", "Stopped", "run"]

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
CRASHED, TIMED_OUT, NOT_RUN = "crashed", "timed out", "not run"

_SHORTEST = 3.0  # seconds; with less left a part is not started
_LOG_BYTES = 400_000  # of one part, its end
# Chosen for other programs, these would change what is tested here.
_NOT_INHERITED = ("TRITON_INTERPRET", "FASTDIFF_BACKEND", "FASTDIFF_NATIVE")


class Stopped(KeyboardInterrupt):
    """Ctrl-C or a polite kill: the results so far are written, nothing more is run."""


@dataclass(frozen=True)
class Part:
    """One part of a self-test.

    Attributes:
        name, about: for the reader.
        target: "module:function", a function of a Context (fastdiff/selftest/part.py).
        limit: seconds after which it is killed.
        least: seconds that the parts before it leave it.
        shards: processes at most that share its work; as many as half the CPUs are started.
        needs: the name of a part that must have passed before.
        required: having nothing to do counts as a failure.
        optional: being stopped at its limit is no failure.
        gate: when it has nothing to do, no later part has, and the run ends.
        options: for the function.
    """

    name: str
    about: str
    target: str
    limit: float = 60.0
    least: float = 0.0
    shards: int = 1
    needs: str | None = None
    required: bool = False
    optional: bool = False
    gate: bool = False
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Outcome:
    """What became of a part; status is one of the words at the top of this module."""

    name: str
    about: str
    status: str
    seconds: float = 0.0
    checks: int = 0
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def bad(self) -> bool:
        return self.status in (FAILED, CRASHED, TIMED_OUT)


@dataclass
class _Shard:
    process: subprocess.Popen[bytes]
    result: Path
    log: Path
    killed: bool = False


@dataclass
class Report:
    """What is known so far.

    Attributes:
        started: date and time.
        seconds: since then.
        left_over: parts that are still to come.
    """

    device: str
    started: str
    seconds: float = 0.0
    outcomes: list[Outcome] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)

    @property
    def bad(self) -> bool:
        return any(outcome.bad for outcome in self.outcomes)

    def write(self, folder: Path) -> None:
        document = {"kind": "selftest", "fastdiff": fastdiff.__version__, **asdict(self)}
        write_atomic(folder / "results.json", json.dumps(plain(document), indent=1).encode())
        write_atomic(folder / "report.txt", page(self).encode())


def run(
    parts: Sequence[Part],
    *,
    device: str,
    seconds: float,
    out: Path | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Report:
    """Runs every part within `seconds` altogether.

    Args:
        out: a folder for results.json, report.txt, log.txt and what parts add; None keeps nothing.
        tell: told a line as each part ends.

    Raises:
        Stopped: on SIGINT and SIGTERM; the results of the parts before are written.
    """
    begin = time.monotonic()
    report = Report(device, time.strftime("%Y-%m-%d %H:%M:%S %z"))
    scratch = Path(tempfile.mkdtemp(prefix="fastdiff-selftest-"))
    try:
        with _signals_stop():
            for index, part in enumerate(parts):
                passed = [o.name for o in report.outcomes if o.status == PASSED]
                reserved = sum(later.least for later in parts[index + 1 :])
                left = seconds - (time.monotonic() - begin) - reserved
                why = None
                if part.needs is not None and part.needs not in passed:
                    why = f"it needs {part.needs}, which has not passed"
                if left < _SHORTEST:
                    why = why or f"the time ran out: {max(left, 0.0):.0f} s were left for it"
                if why is not None:
                    outcome = Outcome(part.name, part.about, NOT_RUN, notes=[why])
                else:
                    limit = min(part.limit, left)
                    outcome = _run_part(part, device, limit, passed, out, scratch)
                report.outcomes.append(outcome)
                report.left_over = [later.name for later in parts[index + 1 :]]
                report.seconds = time.monotonic() - begin
                tell(f"{outcome.name:<18}{outcome.status:<10}{outcome.seconds:6.1f} s")
                if out is not None:
                    report.write(out)
                if part.gate and outcome.status == SKIPPED:
                    break
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return report


@contextlib.contextmanager
def _signals_stop() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(signal.Signals(number).name)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run_part(
    part: Part,
    device: str,
    limit: float,
    passed: Sequence[str],
    out: Path | None,
    scratch: Path,
) -> Outcome:
    begin = time.monotonic()
    count = max(1, min(part.shards, (os.cpu_count() or 1) // 2))
    # The part is told to end a little before it is killed.
    settings = Settings(
        target=part.target,
        result="",
        device=device,
        deadline=begin + limit - min(8.0, 0.2 * limit),
        shards=count,
        out=None if out is None else str(out.absolute()),
        passed=list(passed),
        options=part.options,
    )
    stem = re.sub(r"\W+", "-", part.name)
    shards: list[_Shard] = []
    try:
        for index in range(count):
            shards.append(_start(settings, index, scratch / f"{stem}-{index}"))
        while any(shard.process.poll() is None for shard in shards):
            if time.monotonic() - begin > limit:
                _kill(shards)
                break
            time.sleep(0.02)
    finally:
        _kill(shards)
    outcome = _merged(part, shards, limit)
    outcome.seconds = time.monotonic() - begin
    if out is not None:
        _append_log(out / "log.txt", part, shards)
    return outcome


def _start(settings: Settings, index: int, stem: Path) -> _Shard:
    result, log = stem.with_suffix(".json"), stem.with_suffix(".log")
    settings = replace(settings, shard=index, result=str(result))
    environment = {k: v for k, v in os.environ.items() if k not in _NOT_INHERITED}
    root = str(Path(fastdiff.__file__).absolute().parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    with log.open("wb") as file:
        process = subprocess.Popen(
            command(settings),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # killed with everything that it started
        )
    return _Shard(process, result, log)


def _kill(shards: Sequence[_Shard]) -> None:
    for shard in shards:
        if shard.process.poll() is None:
            shard.killed = True
        # Also after the part has ended by itself: what it started may still run.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(shard.process.pid, signal.SIGKILL)
    for shard in shards:
        # A process inside a driver may not die at once; it must not hold up the other parts.
        with contextlib.suppress(subprocess.TimeoutExpired):
            shard.process.wait(timeout=5)


def _read(path: Path) -> dict[str, Any] | None:
    """A part's result, None unless it is one."""
    try:
        found = json.loads(path.read_bytes())
        right = isinstance(found, dict) and all(
            isinstance(found[key], kind)
            for key, kind in (
                ("complete", bool),
                ("checks", int),
                ("failures", list),
                ("notes", list),
                ("data", dict),
            )
        )
    except (OSError, ValueError, KeyError):
        return None
    return found if right else None


def _merged(part: Part, shards: Sequence[_Shard], limit: float) -> Outcome:
    outcome = Outcome(part.name, part.about, PASSED)
    skipped = []
    for index, shard in enumerate(shards):
        found = _read(shard.result)
        who = f"process {index + 1} of {len(shards)}" if len(shards) > 1 else "its process"
        status = shard.process.returncode
        if shard.killed:
            words = f"{who} was stopped after {limit:.0f} s"
            if part.optional:
                outcome.status = NOT_RUN
                outcome.notes.append(words)
            else:
                outcome.status = TIMED_OUT
                outcome.failures.append(words + _ending(shard))
        elif status is not None and status < 0:
            outcome.status = CRASHED
            name = signal.Signals(-status).name
            outcome.failures.append(f"{who} was killed by {name}{_ending(shard)}")
        elif found is None or not found["complete"]:
            outcome.status = CRASHED
            outcome.failures.append(
                f"{who} ended with status {status} and left no result{_ending(shard)}"
            )
        if found is None:
            continue
        outcome.checks += found["checks"]
        outcome.failures += found["failures"]
        # Processes that share a part say some things alike.
        outcome.notes += [note for note in found["notes"] if note not in outcome.notes]
        if found.get("skipped"):
            skipped.append(str(found["skipped"]))
        _merge(outcome.data, found["data"])
    if outcome.failures and outcome.status == PASSED:
        outcome.status = FAILED
    if skipped and outcome.status == PASSED:
        outcome.notes[:0] = skipped[:1]
        outcome.status = SKIPPED
        if part.required:
            outcome.status = FAILED
            outcome.failures.append(f"nothing was tested: {skipped[0]}")
    return outcome


def _merge(into: dict[str, Any], more: dict[str, Any]) -> None:
    """Lists of several processes are joined, numbers added; of anything else the first stays."""
    for key, value in more.items():
        kind = next((kind for kind in (list, int) if isinstance(value, kind)), None)
        if kind is not None and isinstance(into.get(key), kind):
            into[key] += value
        else:
            into.setdefault(key, value)


def _ending(shard: _Shard) -> str:
    """The last words of a process, for the reader of a failure."""
    with contextlib.suppress(OSError):
        lines = shard.log.read_bytes()[-4000:].decode(errors="replace").split("\n")
        words = [line.strip() for line in lines if line.strip()]
        if words:
            return "; its last words: " + " | ".join(words[-2:])[:300]
    return ""


def _append_log(path: Path, part: Part, shards: Sequence[_Shard]) -> None:
    with contextlib.suppress(OSError), path.open("ab") as file:
        for index, shard in enumerate(shards):
            text = shard.log.read_bytes()
            if text:
                file.write(f"--- {part.name}, process {index + 1}\n".encode())
                file.write(text[-_LOG_BYTES:] + b"\n")
