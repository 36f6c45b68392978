"""`fastdiff profile`: what kernels will do on GPUs nobody has here, or do on the one that is."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastdiff.backends import names
from fastdiff.files import check_writable
from fastdiff.profiling import gates, report, roofline, static, table
from fastdiff.profiling.cases import NAMES, Case, cases
from fastdiff.profiling.gpus import GPUS, TARGETS, Gpu

__all__ = ["UsageError", "add_options", "command"]

_DTYPES = ("fp32", "bf16", "fp16", "fp32+bf16")
_THRESHOLD = 0.03


class UsageError(Exception):
    """A wrong option: nothing has run yet."""


def _listed(allowed: tuple[str, ...], what: str) -> Callable[[str], list[str]]:
    """Parses names with commas between, or "all"."""

    def parse(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",")]
        if names == ["all"]:
            return list(allowed)
        for name in names:
            if name not in allowed:
                raise argparse.ArgumentTypeError(
                    f"there is no {what} {name!r}; there are {', '.join(allowed)}, or all"
                )
        return list(dict.fromkeys(names))

    return parse


def _gpu(text: str) -> Gpu:
    for gpu in GPUS:
        if gpu.name.lower() == text.strip().lower():
            return gpu
    known = ", ".join(gpu.name for gpu in GPUS)
    raise argparse.ArgumentTypeError(
        f"there is no GPU {text!r} in the table; there are {known} (fastdiff/profiling/gpus.py: "
        "a new one is one row)"
    )


def _percent(text: str) -> float:
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        value = -1.0
    if not 0 <= value < 100:
        raise argparse.ArgumentTypeError(f"must be in [0, 100), in per cent, got {text!r}")
    return value / 100


def _shape(text: str) -> tuple[int, ...]:
    sizes = text.lower().split("x")
    if len(sizes) < 2 or not all(size.isdecimal() and int(size) for size in sizes):
        raise argparse.ArgumentTypeError(f"must be like 16x4x64x64, batch first, got {text!r}")
    return tuple(map(int, sizes))


def add_options(add: Callable[..., object]) -> None:
    """The options of the subcommand."""
    add(
        "--target",
        metavar="NAMES",
        type=_listed(TARGETS, "target"),
        help="compile for these and predict, without a GPU: "
        f"{', '.join(TARGETS)}, several with commas between, or all",
    )
    add("--gpu", metavar="NAME", type=_gpu, help="predict for this one only, as in 'H100 SXM'")
    add("--op", metavar="NAMES", type=_listed(NAMES, "operation"), help=", ".join(NAMES))
    add("--dtype", metavar="NAMES", type=_listed(_DTYPES, "dtype"), help=", ".join(_DTYPES))
    add(
        "--backend",
        metavar="NAMES",
        type=_listed((*static.BACKENDS, "native", "reference"), "backend"),
        help="with --target triton, cuda; without: triton, native, reference",
    )
    add("--shape", metavar="BxCxHxW", type=_shape, help="of the samples, as in 16x4x64x64")
    add("--json", metavar="FILE", help="write the whole report too")
    add("--plot", metavar="FILE.png", help="draw the roofline (needs matplotlib)")
    add("--compare", metavar="OLD.json", help="what changed since; exit status 1 if it got worse")
    add(
        "--threshold",
        metavar="PERCENT",
        type=_percent,
        default=_THRESHOLD,
        help=f"that --compare lets pass (default: {100 * _THRESHOLD:g})",
    )
    add(
        "--gated",
        action="store_true",
        help="of each target only what CI holds to recorded figures, which --record writes",
    )
    add(
        "--record",
        metavar="FILE",
        help="write the figures as the new gates of CI (implies --gated)",
    )
    add("--jobs", metavar="N", type=int, help="processes that compile (default: the cores)")
    add("--seconds", metavar="S", type=float, default=120.0, help="for measuring (default: 120)")
    add("--ncu", action="store_true", help="measuring: Nsight Compute's counters of each case too")
    add("--trace", metavar="FILE.json", help="measuring: write torch.profiler's trace too")
    add("--tune", action="store_true", help="find Triton's launch parameters on this GPU")


def _file(option: str, text: str | None, suffix: str = "") -> Path | None:
    if text is None:
        return None
    if suffix and Path(text).suffix.lower() != suffix:
        raise UsageError(f"argument {option}: must end in {suffix}, got {text!r}")
    try:
        return check_writable(text, option)
    except ValueError as error:
        raise UsageError(f"argument {error}") from None


def _chosen(options: argparse.Namespace) -> list[Case]:
    chosen = [
        case
        for case in cases()
        if (options.op is None or case.name in options.op)
        and (options.dtype is None or case.id.split()[1] in options.dtype)
    ]
    if not chosen:
        raise UsageError("argument --dtype: the chosen operations have none of these dtypes")
    return chosen


def command(options: argparse.Namespace) -> int:
    """Runs the subcommand and returns its exit status.

    Raises UsageError for wrong options, before anything is compiled.
    """
    if options.gpu is not None and options.target is None:
        options.target = [options.gpu.target]
    if options.gated and options.target is None:
        raise UsageError("argument --gated: it is for --target")
    if options.target is None and not torch.cuda.is_available():
        raise UsageError(
            "there is no GPU here to measure on: name what to compile for, as in --target sm_90 "
            f"or --gpu 'H100 SXM' (targets: {', '.join(TARGETS)})"
        )
    if options.jobs is not None and options.jobs < 1:
        raise UsageError(f"argument --jobs: must be at least 1, got {options.jobs}")
    chosen = _chosen(options)
    out = _file("--json", options.json)
    picture = _file("--plot", options.plot, ".png")
    record = _file("--record", options.record)
    _file("--trace", options.trace)
    old = None
    if options.compare is not None:
        try:
            old = report.load(Path(options.compare))
        except ValueError as error:
            raise UsageError(f"argument --compare: {error}") from None
    if picture is not None:
        try:
            roofline.require_matplotlib()
        except ModuleNotFoundError as error:
            raise UsageError(f"argument --plot: {error}") from None
    for option in ("tune", "ncu", "trace"):
        if getattr(options, option) and options.target is not None:
            raise UsageError(f"argument --{option}: it measures, and --target does not")
    if options.tune:
        from fastdiff.profiling.tune import tune

        print(tune("cuda"))
        return 0
    if options.target is None:
        if picture is not None or record is not None:
            raise UsageError("argument --plot, --record: these are for --target")
        new = _measured(chosen, options)
    else:
        new = _static(chosen, options)
    if out is not None:
        report.save(new, out)
    if picture is not None:
        roofline.draw(new, picture)
    status = 0
    if record is not None:
        for line in gates.record(new, record):
            print(line)
    if old is not None:
        status = _compared(old, new, options.threshold)
    for path in filter(None, (out, picture, record)):
        print(f"wrote {path}")
    return status


def _measured(chosen: list[Case], options: argparse.Namespace) -> dict[str, Any]:
    from fastdiff.profiling import expected, measured, nsight

    shape = options.shape or measured.LARGE
    new = measured.profile(
        "cuda",
        chosen,
        options.backend,
        shape,
        seconds=options.seconds,
        tell=lambda line: print(line, file=sys.stderr, flush=True),
    )
    new["commit"] = report.commit()
    expected.add_predictions(new, jobs=options.jobs)
    print(measured.table(new))
    timed = dict.fromkeys(row["backend"] for row in new["rows"] if "us" in row)
    backends = [name for name in timed if name in names()]
    if options.ncu:
        for case in chosen:
            for name in backends:
                print(f"\nNsight Compute, {case.id} by {name}")
                for counter, value in nsight.counters(case, name, shape).items():
                    print(f"  {counter:<60}{value:g}")
    if options.trace is not None:
        nsight.trace(Path(options.trace), chosen, backends, shape)
        print(f"wrote {options.trace}")
    return new


def _static(chosen: list[Case], options: argparse.Namespace) -> dict[str, Any]:
    targets, backends = options.target, options.backend or list(static.BACKENDS)
    wrong = [name for name in backends if name not in static.BACKENDS]
    if wrong:
        raise UsageError(f"argument --backend: with --target triton or cuda, not {wrong[0]!r}")
    gpus = None
    if options.gpu is not None:
        if options.gpu.target not in targets:
            raise UsageError(
                f"argument --gpu: {options.gpu.name} is {options.gpu.target}, which --target lacks"
            )
        gpus, targets = [options.gpu], [options.gpu.target]
    new = static.profile(
        targets,
        chosen,
        backends,
        gpus=gpus,
        shape=options.shape or static.SHAPE,
        choose=gates.covers if options.gated or options.record else static.everything,
        jobs=options.jobs,
        progress=sys.stderr.isatty(),
    )
    print(table.text(new))
    return new


def _compared(old: dict[str, Any], new: dict[str, Any], threshold: float) -> int:
    changes = report.compare(old, new, threshold)
    worse = [change for change in changes if change.worse]
    print(f"\nsince {old.get('date')} (commit {old.get('commit')}):")
    for change in changes:
        print(f"  {change}")
    print(
        f"{len(worse)} figures are worse by more than {100 * threshold:g} %, "
        f"{len(changes) - len(worse)} better"
    )
    return 1 if worse else 0
