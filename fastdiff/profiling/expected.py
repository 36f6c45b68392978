"""What the model of bound.py expects, beside what was measured.

    add_predictions(report)     # rows gain predicted_gelem_s and bound

The kernels that were timed are compiled for their GPU once more, and their machine code is read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fastdiff.profiling import static
from fastdiff.profiling.bound import predict
from fastdiff.profiling.cases import cases
from fastdiff.profiling.gpus import ARCHITECTURES, Gpu, gpus_of

__all__ = ["add_predictions", "row_of"]

_STATIC = {"triton": "triton", "native": "cuda"}  # backends by the names of static reports


def row_of(machine: Mapping[str, Any], state: Mapping[str, str], copy: float) -> Gpu | None:
    """The GPU of a report in the table of GPUs, or a row made of what is known of it.

    Args:
        machine, state: of the report.
        copy: TB/s of a copy that was measured, for a GPU that the table does not have.

    Returns:
        None for an architecture that the table does not have.
    """
    target, name = str(machine.get("arch")), str(machine.get("gpu"))
    if target not in ARCHITECTURES:
        return None
    words = set(re.findall(r"\w+", name))
    known = [gpu for gpu in gpus_of(target) if gpu.name.split()[0] in words]
    if known:
        return max(known, key=lambda gpu: len(words & set(gpu.name.split())))
    clock = float(state.get("clocks.max.sm", 0)) / 1000 or 1.5
    multiprocessors, l2 = int(machine["multiprocessors"]), int(machine["l2"]) / 1e6
    return Gpu(name, target, multiprocessors, clock, copy, l2, copy, "measured in the same run")


def add_predictions(report: dict[str, Any], *, jobs: int | None = None) -> None:
    """Adds predicted_gelem_s and bound to the rows of kernels that have been timed.

    Where they cannot be predicted report["unpredicted"] says why.
    """
    rows = [row for row in report["rows"] if "of_copy" in row and "predicted_gelem_s" not in row]
    copies = [row["gb_s"] / row["of_copy"] / 1e3 for row in rows]
    gpu = row_of(report["machine"], report["state_before"], max(copies, default=1.0))
    if gpu is None:
        report["unpredicted"] = f"the table of GPUs has no {report['machine'].get('arch')}"
        return
    for shape in {tuple(row["shape"]) for row in rows}:
        some = [row for row in rows if tuple(row["shape"]) == shape]
        wanted = {row["case"] for row in some}
        backends = {_STATIC[row["backend"]] for row in some if row["backend"] in _STATIC}
        try:
            found = static.profile(
                [gpu.target],
                [case for case in cases() if case.id in wanted],
                sorted(backends),
                gpus=[gpu] if gpu in gpus_of(gpu.target) else [],
                shape=shape,
                jobs=jobs,
            )
        except static.ProfileError as error:
            report["unpredicted"] = str(error)
            return
        by_kernel = {(r["case"], r["backend"]): r for r in found["rows"] if "classes" in r}
        for row in some:
            kernel = by_kernel.get((row["case"], _STATIC.get(row["backend"], "")))
            if kernel is not None:
                prediction = predict(gpu, kernel["classes"], row["bytes"])
                row["predicted_gelem_s"] = prediction.gelem_s
                row["bound"] = prediction.bound
    report["predicted_for"] = gpu.name
