"""One part of a self-test: what it is given, what it leaves, and the process that it runs in.

    def part(context: Context) -> None:
        context.check(1 + 1 == 2, "one and one are not two")

`python -m fastdiff.selftest.part SETTINGS` runs one; fastdiff/selftest/runner.py starts it and
survives whatever happens in it. Results go through a file, so that a part may print what it likes.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import importlib
import json
import math
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fastdiff.files import write_atomic

__all__ = ["Context", "Settings", "main", "plain"]

_SAVE_SECONDS = 2.0  # between the results that a killed part leaves
_MOST_FAILURES = 50
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Settings:
    """What a part's process is told.

    Attributes:
        target: "module:function".
        result: the file that takes the result.
        device: "cpu" or "cuda".
        deadline: when the part should have ended, by time.monotonic(), which the processes of a
            machine share; a part that has more to do stops by itself.
        shard, shards: of a part whose work several processes share.
        out: the folder of the results, for files that a part adds; None where nothing is kept.
        passed: names of the parts before it that have passed.
        options: of the part.
    """

    target: str
    result: str
    device: str = "cpu"
    deadline: float = math.inf
    shard: int = 0
    shards: int = 1
    out: str | None = None
    passed: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)


def plain(value: Any) -> Any:
    """As JSON has it: names are strings, numbers are finite (others become their names)."""
    if isinstance(value, dict):
        return {str(key): plain(element) for key, element in value.items()}
    if isinstance(value, list | tuple):
        return [plain(element) for element in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


class Context:
    """Collects what a part finds, and keeps it on disk as it goes.

    Attributes:
        checks: comparisons made.
        failures: sentences, one for each that failed; a part passes without any.
        notes: lines for the page of text.
        data: figures for the JSON result.
        skipped: why there was nothing to do, if so.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.device = settings.device
        self.options = settings.options
        self.checks = 0
        self.failures: list[str] = []
        self.notes: list[str] = []
        self.data: dict[str, Any] = {}
        self.skipped: str | None = None
        self._saved = time.monotonic()

    @property
    def left(self) -> float:
        """Seconds until the part should have ended."""
        return self.settings.deadline - time.monotonic()

    def check(self, right: bool, failure: str) -> bool:
        """Counts a comparison; `failure` is a sentence that names what was compared."""
        self.checks += 1
        if not right:
            self.fail(failure)
        if time.monotonic() - self._saved > _SAVE_SECONDS:
            self.save(complete=False)
        return right

    def fail(self, failure: str) -> None:
        if len(self.failures) < _MOST_FAILURES:
            self.failures.append(failure)
        elif len(self.failures) == _MOST_FAILURES:
            self.failures.append("and more")

    def note(self, line: str) -> None:
        self.notes.append(line)

    def skip(self, reason: str) -> None:
        self.skipped = reason

    def mine(self, items: Sequence[Any]) -> list[Any]:
        """This process's share of the work."""
        return list(items[self.settings.shard :: self.settings.shards])

    def save(self, complete: bool) -> None:
        result = {
            "complete": complete,
            "checks": self.checks,
            "failures": self.failures,
            "notes": self.notes,
            "skipped": self.skipped,
            "data": self.data,
        }
        text = json.dumps(plain(result), indent=1)
        write_atomic(self.settings.result, text.encode())
        self._saved = time.monotonic()


def _die_with_parent() -> None:
    """A runner that is killed leaves no part behind (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main(argv: Sequence[str]) -> int:
    settings = Settings(**json.loads(argv[0]))
    _die_with_parent()
    # What hangs shows in the log where it hung.
    faulthandler.enable()
    context = Context(settings)
    if math.isfinite(settings.deadline):
        faulthandler.dump_traceback_later(max(context.left, 1.0))
    try:
        module, function = settings.target.split(":")
        getattr(importlib.import_module(module), function)(context)
    except Exception as error:
        traceback.print_exc()
        reason = str(error).strip().splitlines() or ["no message"]
        context.fail(f"stopped by {type(error).__name__}: {reason[0]}")
    faulthandler.cancel_dump_traceback_later()
    context.save(complete=True)
    return 1 if context.failures else 0


def command(settings: Settings) -> list[str]:
    """The command line of a part's process."""
    return [sys.executable, "-m", "fastdiff.selftest.part", json.dumps(asdict(settings))]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
