"""The measured profile as a part of the self-test, and the search for launch parameters."""

from __future__ import annotations

import json
import os
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastdiff.files import write_atomic
from fastdiff.profiling import measured
from fastdiff.profiling.cases import cases
from fastdiff.profiling.expected import add_predictions
from fastdiff.selftest.part import Context, plain
from fastdiff.selftest.tools import served

__all__ = ["measure", "tuning"]

_PREDICTION_SECONDS = 45  # that compiling and reading the kernels may take
# What the page of text shows, at the large shape: the rest is in profile.json.
_SHOWN = ("randn", "q_sample", "ddpm_clipped", "ddim_guided", "dpmpp_2m")


def measure(context: Context) -> None:
    """Measured figures: what is run most first, then the small shape, then all the rest.

    Options: large, small (shapes), l2, cases (names). Writes profile.json to the results' folder.
    """
    if context.device == "cuda" and not torch.cuda.is_available():
        context.skip("PyTorch finds no GPU")
        return
    large = tuple(context.options.get("large", measured.LARGE))
    small = tuple(context.options.get("small", measured.SMALL))
    names = context.options.get("cases")
    chosen = measured.ordered([c for c in cases() if names is None or c.name in names])
    first = [case for case in chosen if case.name in _SHOWN and not case.mixed]
    first = [case for case in first if case.dtype != torch.float16]
    rest = [case for case in chosen if case not in first]
    whole: dict[str, Any] = {}
    left_out: list[str] = []
    for shape, some, share, compiled in (
        (large, first, 0.5, False),
        (small, first, 0.35, False),
        (large, rest, 0.75, False),
        (large, [case for case in first if case.name != "randn"], 1.0, True),
    ):
        if context.left < 3 or not some:
            left_out += [case.id for case in some]
            continue
        report = measured.profile(
            context.device,
            some if not compiled else [],
            _backends(context),
            shape,
            seconds=share * (context.left - 2),
            l2=context.options.get("l2"),
            tell=lambda line: print(f"{time.monotonic():.1f} {line}", flush=True),
            keep=partial(_keep, context, whole),
            compiled=some if compiled else (),
        )
        whole = _joined(whole, report)
        _save(context, whole)
        if context.device == "cuda" and context.left > _PREDICTION_SECONDS:
            try:
                add_predictions(whole)
            except Exception as error:  # measurements are worth keeping without them
                whole["unpredicted"] = f"{type(error).__name__}: {error}"
            _save(context, whole)
    if not whole:
        context.skip("there was no time to measure anything")
        return
    whole["left_out"] += left_out
    for row in whole["rows"]:
        context.check("error" not in row, f"{row['case']} by {row['backend']}: {row.get('error')}")
    _describe(context, whole, large)


def tuning(context: Context) -> None:
    """The best launch parameters, written to the results' folder and not where launches look."""
    if not torch.cuda.is_available():
        context.skip("PyTorch finds no GPU")
        return
    cache = Path(context.settings.result).with_suffix(".cache")
    os.environ["FASTDIFF_CACHE"] = str(cache)
    from fastdiff.profiling import tune

    tuned = tune.tune(context.device)
    for line in tune.report(tuned).splitlines()[1:]:
        context.note(line.strip())
    context.data["row"] = tuned.policy
    if context.settings.out is not None:
        shutil.copy(tuned.path, Path(context.settings.out) / tuned.path.name)


def _backends(context: Context) -> list[str]:
    """Without the CUDA library, where it could not be built before: that would take the time."""
    known = served(context) if context.device == "cuda" else ["native"]
    return [*known, "reference"]


def _joined(whole: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    """The reports of several shapes as one."""
    if not whole:
        return report
    return {
        **whole,
        "rows": whole["rows"] + report["rows"],
        "left_out": whole["left_out"] + report["left_out"],
        "state_after": report.get("state_after", {}),
    }


def _keep(context: Context, whole: dict[str, Any], report: dict[str, Any]) -> None:
    _save(context, _joined(whole, report))


def _save(context: Context, report: dict[str, Any]) -> None:
    context.data["profile"] = report
    context.save(complete=False)
    if context.settings.out is not None:
        text = json.dumps(plain(report), indent=1)
        write_atomic(Path(context.settings.out) / "profile.json", text.encode())


def _describe(context: Context, report: dict[str, Any], large: tuple[int, ...]) -> None:
    shape = "x".join(map(str, large))
    context.note(
        f"at {shape}, cold L2: us a launch, per cent of the speed of a copy of as many bytes"
    )
    rows = [row for row in report["rows"] if "of_copy" in row and row["shape"] == list(large)]
    by_case: dict[str, list[str]] = {}
    for row in rows:
        figures = f"{row['backend']} {row['us'][1]:.1f} us {100 * row['of_copy']:.0f} %"
        if "predicted_gelem_s" in row:
            figures += f" (predicted {row['gelem_s'] / row['predicted_gelem_s']:.2f}x)"
        by_case.setdefault(row["case"], []).append(figures)
    for case, figures_of in by_case.items():
        if case.split()[0] in _SHOWN and " fp16" not in case and "+" not in case:
            context.note(f"  {case:<24} {'; '.join(figures_of)}")
    hosts = [row["host_us"] for row in rows]
    if hosts:
        context.note(f"host time of a call: {min(hosts):.1f} to {max(hosts):.1f} us")
    if "unpredicted" in report:
        context.note(f"no predictions: {report['unpredicted']}")
    if report["left_out"]:
        context.note(f"the time ran out for {len(report['left_out'])} cases")
