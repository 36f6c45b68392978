"""What compiled kernels will do on GPUs that need not be here: the report of `profile --target`.

    report = profile(["sm_90"], cases=list(cases()), backends=["triton", "cuda"])

A row is one case on one target by one backend: what it takes, what its threads issue, how full the
GPU gets, and the prediction for every GPU of that target. bound.py has the model.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from fastdiff.backends import build
from fastdiff.backends.toolchain import find_compiler
from fastdiff.profiling.bound import REACH, occupancy, occupancy_limit, predict
from fastdiff.profiling.cases import Case
from fastdiff.profiling.gpus import Gpu, gpus_of
from fastdiff.profiling.report import new_report
from fastdiff.progress import track

__all__ = ["BACKENDS", "SHAPE", "ProfileError", "everything", "profile"]

BACKENDS = ("triton", "cuda")
SHAPE = (16, 4, 64, 64)
_FEW = 6  # kernels that are compiled here sooner than in other processes

Task = tuple[str, str, tuple[Case, ...], Path | None]  # backend, target, cases, library
Row = dict[str, Any]


class ProfileError(RuntimeError):
    """Nothing can be compiled here; the message says why."""


def everything(case: Case, target: str, backend: str) -> bool:
    """Chooses every case for every target and backend."""
    return True


def profile(
    targets: Sequence[str],
    cases: Sequence[Case],
    backends: Sequence[str] = BACKENDS,
    *,
    gpus: Sequence[Gpu] | None = None,
    shape: tuple[int, ...] = SHAPE,
    choose: Callable[[Case, str, str], bool] = everything,
    jobs: int | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Compiles cases for targets and reports on them.

    Args:
        targets: of gpus.TARGETS.
        cases: which; fast ones are left out on AMD, where they are the exact ones.
        backends: "triton", "cuda" (NVIDIA only) or both; one that cannot compile here is left out,
            and report["left_out"] says why.
        gpus: to predict for; those of each target unless given.
        shape: of the samples, (B, C, H, W).
        choose: of a case, target and backend, whether it is wanted.
        jobs: processes at most; the cores of this process unless given.
        progress: show a bar on stderr.

    Raises:
        ProfileError: none of the backends can compile here.
    """
    left_out: dict[str, str] = {}
    tasks: list[Task] = []
    library = None
    nvidia = [target for target in targets if target.startswith("sm_")]
    if "cuda" in backends and nvidia:
        try:
            library = _library(nvidia)
            for target in nvidia:
                wanted = tuple(case for case in cases if choose(case, target, "cuda"))
                tasks.append(("cuda", target, wanted, library))
        except (build.BuildError, RuntimeError) as error:
            left_out["cuda"] = str(error)
    if "triton" in backends:
        reason = _no_triton()
        if reason is None:
            tasks += [
                ("triton", target, (case,), None)
                for case in cases
                for target in targets
                if (target in nvidia or not case.fast) and choose(case, target, "triton")
            ]
        else:
            left_out["triton"] = reason
    if not tasks:
        why = [f"{name}: {reason}" for name, reason in left_out.items()]
        raise ProfileError("; ".join(why) or "the CUDA kernels are for NVIDIA GPUs only")
    rows: list[Row] = []
    for task, results in _run(tasks, shape, jobs, progress):
        backend, target, chosen, _ = task
        for case, result in zip(chosen, results, strict=True):
            chosen_gpus = [g for g in gpus_of(target) if gpus is None or g in gpus]
            rows.append(_row(case, backend, target, result, chosen_gpus))
    if library is not None:
        _add_arithmetic(rows, library)
    order = {case.id: index for index, case in enumerate(cases)}
    rows.sort(key=lambda row: (targets.index(row["target"]), row["backend"], order[row["case"]]))
    report = new_report("static", rows, nvcc=_nvcc_version() if library else None)
    return {**report, "shape": list(shape), "reach": REACH, "left_out": left_out}


def _no_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    from triton import knobs

    if knobs.runtime.interpret:
        return "TRITON_INTERPRET is set, and its interpreter compiles nothing: unset it"
    return None


def _library(targets: Sequence[str]) -> Path:
    """The CUDA library for the targets. Raises BuildError or RuntimeError: no compiler, no tool."""
    from fastdiff.profiling import sass

    sass.cuobjdump()
    return build.build(build.cuda_target([target.removeprefix("sm_") for target in targets]))


def _nvcc_version() -> str:
    match = re.search(r"release (\d+\.\d+)", find_compiler("nvcc").identity)
    return match[1] if match else "unknown"


def _inspect(task: Task, shape: tuple[int, ...]) -> list[dict[str, Any] | str]:
    """Figures of the task's cases, or a sentence in their place."""
    backend, target, cases, library = task
    if backend == "cuda":
        from fastdiff.profiling import cuda_code

        assert library is not None
        return cuda_code.inspect(library, target, cases)
    from fastdiff.profiling import triton_code

    (case,) = cases
    try:
        return [triton_code.inspect(case, target, shape)]
    except Exception as error:  # whatever the compiler raises is a fact about this kernel
        return [f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"]


def _run(
    tasks: Sequence[Task], shape: tuple[int, ...], jobs: int | None, progress: bool
) -> Iterator[tuple[Task, list[dict[str, Any] | str]]]:
    jobs = min(jobs or len(os.sched_getaffinity(0)), len(tasks))
    if jobs == 1 or len(tasks) <= _FEW:
        for task in track(tasks, "compiling", progress):
            yield task, _inspect(task, shape)
        return
    # Not fork: torch has threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        pending: dict[Future[list[dict[str, Any] | str]], Task] = {
            pool.submit(_inspect, task, shape): task for task in tasks
        }
        done = as_completed(pending)
        for _ in track(range(len(tasks)), "compiling", progress):
            future = next(done)
            yield pending[future], future.result()


def _row(case: Case, backend: str, target: str, result: Any, gpus: Sequence[Gpu]) -> Row:
    row: Row = {
        "case": case.id,
        "backend": backend,
        "target": target,
        "bytes": case.bytes_per_element,
    }
    if isinstance(result, str):
        return {**row, "error": result}
    path = result.pop("path")
    resources = (target, result["threads"], result["registers"], result["shared"])
    row |= result
    row |= {
        "occupancy": round(occupancy(*resources), 3),
        "occupancy_limit": occupancy_limit(*resources),
        "predictions": {},
    }
    classes: dict[str, float] = {}
    if isinstance(path, str):
        row["uncounted"] = path  # then memory is the only limit that is known
    else:
        classes = path.per_element(result["rounds"])
        row |= {
            "elements": path.elements,
            "instructions": round(sum(classes.values()), 3),
            "loop": round(sum(path.round.values()) / path.elements, 3),
            "once": sum(path.start.values()),
            "classes": {name: round(count, 3) for name, count in classes.items()},
            "accesses": {f"{kind} {bits}": n for (kind, bits), n in sorted(path.accesses.items())},
            "width": path.width,
            "at_least": path.at_least,
        }
    for gpu in gpus:
        prediction = predict(gpu, classes, case.bytes_per_element)
        row["predictions"][gpu.name] = {
            "bound": prediction.bound,
            "gelem_s": round(prediction.gelem_s, 1),
            "gb_s": round(prediction.gb_s),
            "limits": {name: round(limit, 1) for name, limit in prediction.limits.items()},
        }
    return row


def _add_arithmetic(rows: Sequence[Row], library: Path) -> None:
    """Counts in the library's PTX, which is the same for all its targets."""
    from fastdiff.profiling import cuda_code

    counts = cuda_code.arithmetic(library)
    for row in rows:
        if row["backend"] == "cuda" and "kernel" in row:
            row["arithmetic"] = counts[row["kernel"]]
