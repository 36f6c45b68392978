"""Runs benchmark cases and keeps what they gave: the report behind `fastdiff bench`.

    report = run(Options(quick=True), save=Path("bench.json"))

A report is a dictionary that is JSON as it stands; fastdiff/profiling/bench_report.py turns it into
text. With warm memory, which is the default, glibc keeps what it has been given back; cold memory
is its own behaviour, each case in a process of its own.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import fastdiff
from fastdiff.backends import native
from fastdiff.benchmarks.registry import ALL, Case, cases, smoke
from fastdiff.profiling.bench_job import Row, Settings, first_line, measure, specification
from fastdiff.profiling.report import load, new_report
from fastdiff.profiling.report import save as write_report
from fastdiff.profiling.timing import conditions, cores, keep_memory
from fastdiff.progress import track

__all__ = ["SCHEMA", "Job", "Options", "expected_seconds", "jobs", "read", "run"]

SCHEMA = 1
WARM, COLD = "warm", "cold"
TOTAL = {False: 1080.0, True: 100.0}  # seconds, of a full run and of a quick one
MOST = 6.0  # seconds of timing that one case gets at most
LEAST = 0.2
# Building, checking and the first calls of a case, where compilation is most of it; of a process.
PREPARATION, PROCESS = 1.0, 6.0
PACKAGES = ("numpy", "diffusers", "k-diffusion", "denoising-diffusion-pytorch")
ROOT = Path(fastdiff.__file__).resolve().parent.parent


@dataclass(frozen=True)
class Options:
    """What to measure, and for how long.

    Attributes:
        only: globs of case ids; all cases when empty.
        quick: the quick cases only, on one thread.
        threads: thread counts of every case, instead of its own.
        rounds, seconds: of one case, as in bench_job.Settings.
        budget: seconds for everything; a target, since every case is given five rounds.
        cold: with the default allocator only, every case in a process of its own.
        isa: instruction level of the CPU kernels; "" is the best.
    """

    only: Sequence[str] = ()
    quick: bool = False
    threads: Sequence[int] = ()
    rounds: int = 30
    seconds: float = 0.02
    budget: float | None = None
    cold: bool = False
    isa: str = ""

    @property
    def total(self) -> float:
        return TOTAL[self.quick] if self.budget is None else self.budget


@dataclass(frozen=True)
class Job:
    """A case with a thread count and a state of the allocator."""

    case: Case
    threads: int
    memory: str = WARM


def jobs(options: Options) -> list[Job]:
    """What a run with these options measures, in its order.

    Raises:
        ValueError: a pattern matches no case, or a thread count is beyond the machine.
    """
    there = cores()
    for count in options.threads:
        if count > there:
            raise ValueError(f"threads is {count}, and this process may use {there} cores")
    chosen = cases(options.only, options.quick)
    if not chosen:
        raise ValueError("no quick case matches; leave out --quick")
    result = []
    for case in chosen:
        counts = options.threads or ((1,) if options.quick else case.threads)
        resolved = dict.fromkeys(there if count == ALL else count for count in counts)
        memory = COLD if options.cold else WARM
        result += [Job(case, count, memory) for count in resolved if count <= there]
    if not (options.cold or options.quick):
        result += [Job(job.case, 1, COLD) for job in result if job.case.cold and job.threads == 1]
    return result


def expected_seconds(listed: Sequence[Job], options: Options) -> float:
    """About how long a run takes, on a machine whose compiler cache is warm."""
    return sum(
        min(MOST, max(LEAST, options.total / len(listed) - PREPARATION))
        + (PREPARATION if job.memory == WARM else PROCESS)
        for job in listed
    )


def run(options: Options, save: Path | None = None, progress: bool = False) -> dict[str, Any]:
    """Measures and returns the report.

    Args:
        save: written after every case, whole or not at all.
        progress: show a bar on stderr.

    Ctrl-C ends it early: the report then holds what was measured, and "interrupted" is True.
    """
    listed = jobs(options)
    if options.isa:
        native.isa(options.isa)
    report = _head(options)
    rows: list[Row] = report["rows"]
    begin = time.perf_counter()
    timed = 0.0
    try:
        for done, job in enumerate(track(listed, "bench", enabled=progress)):
            spent = time.perf_counter() - begin
            overhead = (spent - timed) / done if done else PREPARATION
            share = (options.total - spent) / (len(listed) - done) - overhead
            allowance = min(MOST, max(LEAST, share))
            started = time.perf_counter()
            row = _row(job, options, _settings(options, allowance))
            row["took"] = time.perf_counter() - started
            timed += min(row["took"], allowance)
            rows.append(row)
            if save is not None:
                write_report(report, save)
    except KeyboardInterrupt:
        report["interrupted"] = True
    report["after"] = conditions()
    report["took"] = time.perf_counter() - begin
    if save is not None:
        write_report(report, save)
    return report


def _settings(options: Options, allowance: float) -> Settings:
    return Settings(options.rounds, options.seconds, allowance, options.quick)


def _row(job: Job, options: Options, settings: Settings) -> Row:
    if job.memory == COLD:
        row = _apart(job, options, settings)
        return row | {"memory": COLD}
    gc.collect()  # what the last case left in cycles
    warm = keep_memory()
    return measure(job.case, job.threads, settings) | {"memory": WARM if warm else COLD}


def _apart(job: Job, options: Options, settings: Settings) -> Row:
    """measure() in a process of its own, with the allocator as it comes."""
    with tempfile.TemporaryDirectory() as folder:
        wanted, result = Path(folder, "spec.json"), Path(folder, "row.json")
        wanted.write_text(specification(job.case, job.threads, settings, options.isa))
        command = [sys.executable, "-m", "fastdiff.profiling.bench_job", str(wanted), str(result)]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode == 0:
            row: Row = json.loads(result.read_text())
            return row
    said = done.stderr.strip().splitlines()
    why = said[-1] if said else f"its process ended with status {done.returncode}"
    case = job.case
    return {
        "case": case.id, "group": case.group, "name": case.name, "threads": job.threads,
        "status": "failed", "reason": why[:200],
    }  # fmt: skip


def _head(options: Options) -> dict[str, Any]:
    try:
        kernels = f"native, {native.isa()}"
    except RuntimeError as error:
        kernels = f"reference ({first_line(error)})"
    report = new_report("bench", [])
    report["machine"] |= {"cpu kernels": kernels}
    report["versions"] |= _versions()
    return report | {
        "schema": SCHEMA,
        "options": {
            "quick": options.quick, "only": list(options.only), "threads": list(options.threads),
            "rounds": options.rounds, "seconds": options.seconds, "budget": options.total,
            "cold": options.cold, "isa": options.isa,
        },
        "smoke": smoke(),
        "interrupted": False,
        "before": conditions(),
        "after": None,
    }  # fmt: skip


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A report from its file.

    Raises:
        ValueError: there is no such file, or it is not a report of this schema.
    """
    report = load(Path(path))
    if report.get("kind") != "bench":
        raise ValueError(f"{path} is not a report of `fastdiff bench`")
    if report.get("schema") != SCHEMA:
        raise ValueError(
            f"{path} has schema {report.get('schema')}, and this version reads {SCHEMA}; "
            "measure again"
        )
    return report
