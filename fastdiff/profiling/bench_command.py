"""`fastdiff bench`: measure, compare two reports, or rewrite the tables of README.md."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fastdiff.backends import native
from fastdiff.files import check_writable, write_atomic
from fastdiff.profiling import bench, bench_compare, bench_readme, bench_report, plots
from fastdiff.profiling.roofline import require_matplotlib

__all__ = ["UsageError", "add_options", "command"]

README = bench.ROOT / "README.md"


class UsageError(Exception):
    """A wrong option: nothing has run yet."""


def _number(kind: Callable[[str], float], low: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None
        if not low <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be at least {low:g}, got {text}")
        return value

    return parse


def _fraction(text: str) -> float:
    number = text.removesuffix("%")
    try:
        value = float(number) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be a share such as 5% or 0.05, got {text!r}")
    return value


def add_options(add: Callable[..., object]) -> None:
    """The options of `fastdiff bench`, given argparse's add_argument."""
    add("--quick", action="store_true", help="few cases, one thread, under 2 minutes")
    add("--only", metavar="GLOB", nargs="+", default=[], help="cases, as in 'operations/q_sample*'")
    add("--list", action="store_true", help="print the cases and stop")
    count, real = _number(int, 1), _number(float, 0.001)
    add("--threads", metavar="N", nargs="+", type=count, default=[], help="instead of each case's")
    add("--rounds", metavar="N", type=count, default=30, help="at most, a case (default: 30)")
    add("--seconds", metavar="X", type=real, default=0.02, help="least length of a measurement")
    add("--budget", metavar="SECONDS", type=real, help="for everything (default: 1080, quick 100)")
    add(
        "--cold", action="store_true", help="glibc's allocator as it comes, a process for each case"
    )
    add(
        "--isa", metavar="LEVEL", default="", help="of the CPU kernels, as avx2 (default: the best)"
    )
    add("--json", metavar="FILE", help="the report, written after every case")
    add("--markdown", metavar="FILE", help="the report as tables")
    add("--plots", metavar="DIR", help="pictures (needs matplotlib)")
    add("--compare", metavar="FILE.json", nargs=2, help="two reports; status 1 if ours got slower")
    add(
        "--threshold", metavar="X%", type=_fraction, default=0.05,
        help="of --compare: changes that count (default: 5%%)",
    )  # fmt: skip
    add("--readme", metavar="FILE.json", help="rewrite the tables of README.md from a report")
    add("--check", action="store_true", help="with --readme: status 1 if they differ from it")


def command(options: argparse.Namespace) -> int:
    """Runs it; the exit status.

    Raises:
        UsageError: an option that cannot be served, before anything runs.
    """
    if options.compare:
        return _compare(options)
    if options.readme:
        return _readme(options)
    return _measure(options)


@contextmanager
def _usage() -> Iterator[None]:
    """What is refused within is an option's fault."""
    try:
        yield
    except (ValueError, ImportError, RuntimeError) as error:
        raise UsageError(str(error)) from None


def _compare(options: argparse.Namespace) -> int:
    with _usage():
        old, new = map(bench.read, options.compare)
    text, worse = bench_compare.comparison(old, new, options.threshold)
    print(text)
    return 1 if worse else 0


def _readme(options: argparse.Namespace) -> int:
    if not README.is_file():
        raise UsageError(f"argument --readme: there is no {README}; run it in a checkout")
    old = README.read_text(encoding="utf-8")
    with _usage():
        new = bench_readme.rewritten(old, bench.read(options.readme))
    if options.check:
        print(f"{README} {'matches' if new == old else 'does not match'} {options.readme}")
        return 0 if new == old else 1
    write_atomic(README, new.encode())
    print(f"wrote     {README}")
    return 0


def _settings(options: argparse.Namespace) -> bench.Options:
    return bench.Options(
        only=tuple(options.only), quick=options.quick, threads=tuple(options.threads),
        rounds=options.rounds, seconds=options.seconds, budget=options.budget, cold=options.cold,
        isa=options.isa,
    )  # fmt: skip


def _measure(options: argparse.Namespace) -> int:
    settings = _settings(options)
    with _usage():
        listed = bench.jobs(settings)
        if options.isa and options.isa not in native.isa_levels():
            levels = ", ".join(native.isa_levels())
            raise ValueError(f"argument --isa: must be {levels}, not {options.isa!r}")
        save = _writable("--json", options.json)
        page = _writable("--markdown", options.markdown)
        folder = _folder(options.plots)
    if options.list:
        for job in listed:
            threads = f"{job.threads} thread" + ("s" if job.threads > 1 else "")
            print(f"{job.case.id}, {threads}, {job.memory} memory")
        return 0

    minutes = bench.expected_seconds(listed, settings) / 60
    measurements = f"{len(listed)} measurement" + ("s" if len(listed) > 1 else "")
    print(f"{measurements}, about {max(minutes, 0.1):.1f} min", file=sys.stderr)
    report = bench.run(settings, save, progress=sys.stderr.isatty())
    print(bench_report.text(report))
    if page is not None:
        write_atomic(page, bench_report.markdown(report).encode())
    if folder is not None:
        for path in plots.draw(report, folder):
            print(f"wrote     {path}")
    for path in filter(None, (save, page)):
        print(f"wrote     {path}")
    if report["interrupted"]:
        return 130
    return 1 if any(_wrong(row) for row in report["rows"]) else 0


def _wrong(row: bench.Row) -> bool:
    """Whether a result was wrong or a case failed; what is missing here is no failure."""
    return row["status"] == "failed" or bool(row.get("wrong"))


def _writable(option: str, path: str | None) -> Path | None:
    return None if path is None else check_writable(path, f"argument {option}")


def _folder(path: str | None) -> Path | None:
    """The folder for the pictures, made if need be."""
    if path is None:
        return None
    require_matplotlib()
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"argument --plots: {folder} cannot be made: {error.strerror}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"argument --plots: the folder {folder} is not writable")
    return folder
