"""One benchmark case measured: built, checked, timed. What comes out is a row of the report.

    python -m fastdiff.profiling.bench_job SPEC.json ROW.json

does it in a process of its own, which is the only place where glibc's allocator is as it comes.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fastdiff.backends import native
from fastdiff.benchmarks.registry import Case, Contest, Unavailable, cases
from fastdiff.profiling.timing import Timing, interleaved

__all__ = ["Settings", "measure"]

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """How long a case is timed.

    Attributes:
        rounds: at most.
        seconds: least length of one contestant's measurement in a round.
        budget: seconds after which no new round begins, once five have been run.
        quick: three are enough, and what is slow to compile is left out.
    """

    rounds: int = 30
    seconds: float = 0.02
    budget: float = 5.0
    quick: bool = False


def first_line(error: BaseException) -> str:
    """What an error says in one line."""
    text = str(error).strip()
    line = text.splitlines()[0] if text else ""
    return f"{type(error).__name__}: {line}"[:200].rstrip(": ")


def measure(case: Case, threads: int, settings: Settings) -> Row:
    """Builds and measures a case in this process with that many threads.

    Returns:
        the row: "status" is "measured", "unavailable" (the machine lacks something), or "failed";
        the latter two have a "reason". Times are (p10, median, p90) of rounds in seconds a call,
        ratios those of the rounds' own ratios.
    """
    row: Row = {"case": case.id, "group": case.group, "name": case.name, "threads": threads}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # graphs of other thread counts and shapes, and their limit
    try:
        # What upstream's code deprecates, and what the compiler has to say, is not the reader's.
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            contest = case.build()
            row |= _described(contest) | _measured(contest, settings)
    except Unavailable as error:
        row |= {"status": "unavailable", "reason": str(error)}
    except Exception as error:
        row |= {"status": "failed", "reason": first_line(error)}
    finally:
        torch.set_num_threads(before)
    return row


def _described(contest: Contest) -> Row:
    return {
        "elements": contest.elements,
        "bytes": contest.bytes,
        "operations": contest.operations,
        "work": contest.work,
    }


def _measured(contest: Contest, settings: Settings) -> Row:
    groups = (contest.ours, contest.opponents, contest.limits, contest.beside)
    names = [name for group in groups for name in group]
    if len(set(names)) < len(names):
        raise ValueError(f"contestants share a name: {', '.join(names)}")

    absent, wrong = dict(contest.absent), dict[str, str]()
    seconds = dict(contest.compile_seconds)
    sound: dict[str, Callable[[], Any]] = {}
    for name in (*contest.ours, *contest.opponents):
        if settings.quick and name in contest.slow:
            absent[name] = "left out by --quick, since it takes long to compile"
            continue
        call = contest.call(name)
        begin = time.perf_counter()
        try:
            call()
        except Exception as error:
            (wrong if name in contest.ours else absent)[name] = first_line(error)
            continue
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - begin
        try:
            contest.check(name)
        except Exception as error:
            wrong[name] = first_line(error)
            continue
        sound[name] = call
    result: Row = {"absent": absent, "wrong": wrong, "first_call_seconds": seconds}
    ours = [name for name in contest.ours if name in sound]
    if not ours:
        return result | {"status": "failed", "reason": next(iter(wrong.values()))}

    times = interleaved(
        {**sound, **contest.limits, **contest.beside},
        rounds=settings.rounds,
        seconds=settings.seconds,
        budget=settings.budget,
        least=3 if settings.quick else 5,
    )
    result |= {
        "status": "measured",
        "rounds": len(times[ours[0]].seconds),
        "ours": {name: _figures(times[name]) for name in ours},
        "opponents": {
            name: _figures(times[name])
            | {"ratio": {mine: times[mine].ratio_to(times[name]) for mine in ours}}
            for name in contest.opponents
            if name in sound
        },
        "limits": {name: _figures(times[name]) for name in contest.limits},
        "beside": {name: _figures(times[name]) for name in contest.beside},
        "of_limit": {},
    }
    binding = _binding({name: times[name] for name in contest.limits})
    if binding is not None:
        result["of_limit"] = {
            name: {"limit": binding, "share": times[name].ratio_to(times[binding])} for name in ours
        }
    return result


def _figures(timing: Timing) -> Row:
    return {"seconds": timing.spread, "best": timing.best}


def _binding(limits: dict[str, Timing]) -> str | None:
    """The limit that binds: the slowest over kinds of the fastest of its kind."""
    fastest: dict[str, str] = {}
    for name, timing in limits.items():
        kind = name.split(":")[0]
        if kind not in fastest or timing.median < limits[fastest[kind]].median:
            fastest[kind] = name
    return max(fastest.values(), key=lambda name: limits[name].median, default=None)


def specification(case: Case, threads: int, settings: Settings, isa: str) -> str:
    """What a process of its own needs to know to measure this case."""
    wanted = {"case": case.id, "threads": threads, "isa": isa, "settings": asdict(settings)}
    return json.dumps(wanted)


def main(arguments: list[str]) -> int:
    wanted = json.loads(Path(arguments[0]).read_text())
    if wanted["isa"]:
        native.isa(wanted["isa"])
    case = next(case for case in cases() if case.id == wanted["case"])
    row = measure(case, wanted["threads"], Settings(**wanted["settings"]))
    Path(arguments[1]).write_text(json.dumps(row))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
