"""What the CPU kernels and the drop-ins are meant to reach, as figures of the cases: one list that
`fastdiff bench` and README.md show beside what was measured.

A goal names cases and how a figure of theirs is compared. Where one is missed the reason is written
here, with the measurement that shows it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["GOALS", "Goal", "figures_of"]

Row = dict[str, Any]
REPEATS = 0.03  # medians of interleaved rounds of equal work differ by as much
_LATENTS, _PICTURES = "16x4x64x64", "64x3x256x256"
_HOST = "1x1x2x2"


@dataclass(frozen=True)
class Goal:
    """One row of the table of goals; cases of one thread in warm memory.

    Attributes:
        what: printed.
        cases: ids of benchmarks/registry.py.
        figure: "x OPPONENT" its time over ours; "limit" our share of the limit that binds; "G/s"
            elements; "us" microseconds a step; "trace" the making of a plan over a stock run;
            "x float32" our own time for float32 over this.
        least, most: the bound that the figure must keep.
        ours: the contestants that count, the best of them.
        why: why it is missed, where it is.
    """

    what: str
    cases: tuple[str, ...]
    figure: str
    least: float | None = None
    most: float | None = None
    ours: tuple[str, ...] = ("fastdiff", "fastdiff in place")
    why: str = ""

    def met(self, value: float) -> bool:
        return (self.least is None or value >= self.least) and (
            self.most is None or value <= self.most
        )


def _both(operation: str, dtype: str = "fp32") -> tuple[str, ...]:
    return tuple(f"operations/{operation} {dtype} {size}" for size in (_LATENTS, _PICTURES))


def _training(what: str) -> tuple[str, ...]:
    return tuple(f"training/{what} fp32 {size}" for size in (_LATENTS, _PICTURES))


_LOSSES = ("fastdiff", "fastdiff, noise kept")
_ACCELERATED = ("accelerated", "accelerated, seed=")
_FOUR = tuple(f"schedulers/{name} {_HOST}" for name in ("DDIM", "DDPM", "DPM++ 2M", "UniPC"))
_OTHERS = tuple(
    f"schedulers/{name} {_HOST}"
    for name in (
        "FlowMatchEuler", "Euler", "EulerAncestral", "LCM", "PNDM PLMS", "Heun", "FlowMatchHeun",
        "DEIS", "DPM++ singlestep", "TCD", "LMS", "SA-Solver", "KDPM2",
    )
)  # fmt: skip

GOALS = (
    Goal("normals", _both("normals"), "G/s", 1.2),
    Goal("normals", _both("normals"), "x torch normal_ in place", 5),
    Goal("q_sample, seeded", _both("q_sample"), "x eager", 6),
    Goal("q_sample, seeded", _both("q_sample"), "x compiled, torch's generator", 5),
    Goal("q_sample, seeded", _both("q_sample"), "x compiled reference", 2.5),
    Goal("DDPM step", _both("ddpm"), "x eager", 10),
    Goal("DDPM step", _both("ddpm"), "x compiled, torch's generator", 5),
    Goal("DDIM step with guidance", _both("ddim+guidance"), "x eager", 5),
    Goal("DDIM step with guidance", _both("ddim+guidance"), "limit", 0.9),
    *(
        Goal(
            f"{what}, bfloat16", _both(name, "bf16"), "x float32", 1 - REPEATS,
            ours=("fastdiff in place",),
        )
        for what, name in (
            ("normals", "normals"), ("q_sample", "q_sample"), ("DDPM step", "ddpm"),
            ("DDIM step with guidance", "ddim+guidance"),
        )
    ),
    Goal(
        "accelerated step, host time", _FOUR, "x stock", 10, ours=_ACCELERATED,
        why="of an accelerated step more than half is the one operation and the scheduler's own "
        "bookkeeping (`limits/one element`: the operation of a step beside one multiplication), "
        "and a tenth of stock DDIM's step is less than that operation alone",
    ),
    Goal("accelerated step, host time", _FOUR, "us", most=15, ours=_ACCELERATED),
    Goal(
        "accelerated step, host time", _OTHERS, "x stock", 1, ours=_ACCELERATED,
        why="FlowMatchEuler's stock step is three multiplications and additions, which cost what "
        "one operation of a step with its arguments costs (`limits/one element`); from some ten "
        "thousand elements on its accelerated step is the faster one",
    ),
    Goal("a trace over a stock run", _FOUR, "trace", most=3, ours=_ACCELERATED),
    Goal(
        "loop around a model of no time", ("loops/policy, DDPM 100, model left out",), "us",
        most=10, ours=("fd.sample",),
    ),
    *(
        Goal(
            f"q_sample and loss{gradient}", _training(f"q_sample and loss{gradient}"), "x eager", 5,
            ours=_LOSSES,
            why="in cache the normals alone, which the loss makes again, take two tenths of the "
            "time of torch's whole chain, and Python with autograd one tenth; in bfloat16 and "
            "beyond the cache it is met",
        )
        for gradient in ("", ", gradient")
    ),
    *(
        Goal(f"vb terms{gradient}", _training(f"vb terms{gradient}"), "x eager", 15)
        for gradient in ("", ", gradient")
    ),
)  # fmt: skip


def figures_of(goal: Goal, rows: list[Row]) -> Iterator[tuple[str, float]]:
    """(case, figure) of every case of the goal that the report has."""
    found = {
        row["case"]: row
        for row in rows
        if row["status"] == "measured" and row["threads"] == 1 and row["memory"] == "warm"
    }
    for case in goal.cases:
        row = found.get(case)
        value = None if row is None else _figure(goal, row)
        if value is not None:
            yield case, value


def _figure(goal: Goal, row: Row) -> float | None:
    ours = {name: row["ours"][name]["seconds"][1] for name in goal.ours if name in row["ours"]}
    if not ours:
        return None
    best = min(ours.values())
    if goal.figure == "G/s":
        return float(row["elements"] / best / 1e9)
    if goal.figure == "us":
        return float(best / row["work"]["steps"] * 1e6)
    if goal.figure == "limit":
        return max(row["of_limit"][name]["share"][1] for name in ours if name in row["of_limit"])
    if goal.figure == "trace":
        traces = [f["seconds"][1] for name, f in row["beside"].items() if name.startswith("trace")]
        return traces[0] / row["opponents"]["stock"]["seconds"][1] if traces else None
    if goal.figure == "x float32":
        return float(row["beside"]["float32 in place"]["seconds"][1] / best)
    opponent = row["opponents"].get(goal.figure.removeprefix("x "))
    return None if opponent is None else max(opponent["ratio"][name][1] for name in ours)
