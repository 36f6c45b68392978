"""Parts that run other programs: the CUDA compiler, memory checkers, pytest; and the profilers."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import fastdiff
from fastdiff.profiling.gpu_state import find_tool
from fastdiff.selftest.part import Context, Settings, command

__all__ = ["LIBRARY", "cuda_library", "marked_tests", "memory_checks", "served"]

LIBRARY = "CUDA library"  # the part that builds it; where it has not passed nobody tries again


def cuda_library(context: Context) -> None:
    """Builds the CUDA library for this GPU."""
    from fastdiff.backends import build
    from fastdiff.backends.toolchain import find_compiler, find_ninja

    if context.device == "cuda" and not torch.cuda.is_available():
        context.skip("PyTorch finds no GPU")
        return
    if torch.version.hip is not None:
        context.skip("the CUDA library is not for AMD GPUs, which Triton serves")
        return
    try:
        find_compiler("nvcc")
        find_ninja()
    except build.BuildError as error:
        context.skip(f"it cannot be built here: {error}")
        return
    begin = time.monotonic()
    try:
        path = build.build(build.cuda_target())
    except build.BuildError as error:
        context.check(False, f"the CUDA library: {error}")
        return
    seconds = time.monotonic() - begin
    context.check(path.is_file(), f"there is no {path}")
    context.data.update(seconds=seconds, path=str(path), bytes=path.stat().st_size)
    context.note(f"built in {seconds:.1f} s, {path.stat().st_size / 2**20:.1f} MiB: {path}")


def served(context: Context) -> list[str]:
    """The backends with kernels, as far as the parts before this one have got."""
    return ["triton", "native"] if LIBRARY in context.settings.passed else ["triton"]


# Memory checkers

_CHECKERS = ("memcheck", "racecheck", "initcheck")
# Kernels of PyTorch's own, which are not ours to judge.
_FOREIGN = re.compile(r"at::|cub::|c10::|cublas|cudnn")


def memory_checks(context: Context) -> None:
    """compute-sanitizer over the launches of a few cases, its tools side by side.

    Options: cases, by name.
    """
    if context.device == "cuda" and not torch.cuda.is_available():
        context.skip("PyTorch finds no GPU")
        return
    program = find_tool("compute-sanitizer")
    if program is None:
        context.skip("compute-sanitizer is not on PATH nor in the CUDA toolkit's folder")
        return
    runs = [(tool, name) for tool in _CHECKERS for name in served(context)]
    # Side by side: each takes long to begin, and little of the GPU.
    workers = min(len(runs), max(1, (os.cpu_count() or 1) // 2))
    share = (context.left - 2) / math.ceil(len(runs) / workers)
    with ThreadPoolExecutor(workers) as pool:
        texts = list(pool.map(lambda run: _under_checker(context, program, run, share), runs))
    worked = [_judge(context, run, text, share) for run, text in zip(runs, texts, strict=True)]
    if not any(worked):
        context.skip("compute-sanitizer does not work here")


def _result_of(context: Context, run: tuple[str, str]) -> Path:
    return Path(context.settings.result).with_suffix(f".{'-'.join(run)}.json")


def _under_checker(
    context: Context, program: str, run: tuple[str, str], share: float
) -> str | None:
    """What the tool of a run, (tool, backend), says; None where `share` seconds do not suffice."""
    tool, backend = run
    inner = Settings(
        target="fastdiff.selftest.equality:equality",
        result=str(_result_of(context, run)),
        device=context.device,
        deadline=time.monotonic() + 0.7 * share,
        options={"backend": backend, "cases": context.options["cases"]},
    )
    # Each tensor in memory of its own, so that a step past its end is seen.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            [program, "--tool", tool, "--print-limit", "20", *command(inner)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            timeout=share,
        )
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.decode(errors="replace")


def _judge(context: Context, run: tuple[str, str], text: str | None, share: float) -> bool:
    """Whether the tool ran to its end."""
    tool, backend = run
    if text is None:
        context.note(f"{tool}, {backend}: not done after {share:.0f} s")
        return False
    print(text)  # to the log
    summary = re.search(r"(ERROR|RACECHECK) SUMMARY: .*", text)
    try:
        found = json.loads(_result_of(context, run).read_bytes())
    except (OSError, ValueError):
        found = {}
    if summary is None or not found.get("checks"):
        last = [line for line in text.splitlines() if line.strip()][-1:] or ["it said nothing"]
        context.note(f"{tool}, {backend}: did not work here: {last[0].strip()[:160]}")
        return False
    ours = judged(text)
    context.check(not ours, f"{tool}, {backend}: {len(ours)} findings, the first: {ours[:1]}")
    for failure in found["failures"]:
        context.check(False, f"under {tool}: {failure}")
    context.note(f"{tool}, {backend}: {summary[0]}, {found['checks']} comparisons")
    return True


def judged(text: str) -> list[str]:
    """The findings in compute-sanitizer's output that are not in kernels of PyTorch's own."""
    findings = []
    for record in re.split(r"(?m)^=+ *$", text):
        lines = [line.strip("= ").strip() for line in record.splitlines()]
        lines = [line for line in lines if line and "SUMMARY" not in line]
        serious = r"(Error|Warning): Race|Invalid __|Uninitialized __|[Mm]isaligned|out of bounds"
        # Of the host's calls that led to a launch most are PyTorch's, whoever wrote the kernel.
        place = re.split("host backtrace|Host Frame", record)[0]
        if lines and re.search(serious, place) and not _FOREIGN.search(place):
            findings.append("; ".join(lines[:3]))
    return findings


# Tests that are marked for GPUs


def marked_tests(context: Context) -> None:
    """pytest over the tests marked `gpu`, where this is a checkout and pytest is installed.

    Options: root, of the checkout; this one unless given.
    """
    root = Path(context.options.get("root") or Path(fastdiff.__file__).resolve().parent.parent)
    files = [
        str(path)
        for path in sorted((root / "tests").glob("test_*.py"))
        if "mark.gpu" in path.read_text(encoding="utf-8")
    ]
    for module in ("pytest", "hypothesis"):
        if importlib.util.find_spec(module) is None:
            context.skip(f"{module} is not installed")
            return
    if not files:
        context.skip(f"there are no tests marked gpu in {root / 'tests'}")
        return
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *files, "-m", "gpu", "-q", "-p", "no:cacheprovider"],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        timeout=max(context.left, 1.0),
    )
    text = done.stdout.decode(errors="replace")
    print(text)  # to the log
    lines = [line for line in text.splitlines() if line.strip()]
    passed = re.search(r"(\d+) passed", text)
    context.checks += int(passed[1]) if passed else 0
    for line in lines:
        if line.startswith(("FAILED", "ERROR")):
            context.fail(line)
    if done.returncode not in (0, 5) and not context.failures:
        context.fail(f"pytest ended with status {done.returncode}: {lines[-1:]}")
    if not passed and done.returncode in (0, 5):
        context.skip(f"no test ran: {lines[-1] if lines else 'pytest said nothing'}")
    elif lines:
        context.note(lines[-1].strip("= "))
