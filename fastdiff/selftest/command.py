"""`fastdiff selftest`: runs the parts and says what came out."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from fastdiff.selftest import runner
from fastdiff.selftest.page import page
from fastdiff.selftest.parts import GPU_PARTS, HOST_PARTS

__all__ = ["add_options", "results_folder", "selftest"]

GPU_FOLDER = "gpu-check"
_GPU_MINUTES = 9.5
_HOST_MINUTES = 10.0  # most of which only a library that must be built, or a hang, would take


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number of minutes, got {text!r}") from None
    if not 0.1 <= value <= 120:
        raise argparse.ArgumentTypeError(f"must be in [0.1, 120], got {value:g}")
    return value


def add_options(add: Callable[..., object]) -> None:
    """The options of the subcommand."""
    add("--gpu", action="store_true", help="everything worth running on a GPU, in ten minutes")
    add(
        "--minutes",
        metavar="M",
        type=_minutes,
        help=f"for everything (default: {_GPU_MINUTES:g} with --gpu, else {_HOST_MINUTES:g})",
    )
    add(
        "--out",
        metavar="DIR",
        help="folder for results.json, report.txt and log.txt "
        f"(default: {GPU_FOLDER} with --gpu, else none)",
    )


def results_folder(text: str) -> Path:
    """The folder, made if need be, once a file could be written there.

    Raises:
        ValueError: it cannot be made or written to.
    """
    folder = Path(text)
    try:
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"--out: results cannot be written to {folder}: {reason}") from None
    (folder / "log.txt").unlink(missing_ok=True)  # of an earlier run; parts append to it
    return folder


def selftest(gpu: bool, minutes: float | None, out: Path | None) -> int:
    """Runs everything and prints the page of text.

    Returns:
        The exit status: 0 all passed, 1 something failed, 2 there is no GPU to test.
    """
    parts = GPU_PARTS if gpu else HOST_PARTS
    device = "cuda" if gpu else "cpu"
    minutes = minutes or (_GPU_MINUTES if gpu else _HOST_MINUTES)

    def tell(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    try:
        report = runner.run(parts, device=device, seconds=60 * minutes, out=out, tell=tell)
    except runner.Stopped:
        if out is not None and (out / "report.txt").exists():
            print((out / "report.txt").read_text(), end="")
        raise
    first = report.outcomes[0]
    if parts[0].gate and first.status == runner.SKIPPED:
        print(f"fastdiff selftest: {first.notes[0]}", file=sys.stderr)
        return 2
    print(page(report), end="")
    if out is not None:
        print(f"all of it is in {out}")
    return 1 if report.bad else 0
