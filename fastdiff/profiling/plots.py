"""Pictures of a benchmark report: ratios to opponents, bandwidth by size, the step's share.

matplotlib (extra `plot`) is imported when something is drawn.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastdiff.files import write_atomic
from fastdiff.profiling.bench_report import selected, time_of
from fastdiff.profiling.roofline import require_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw"]

Row = dict[str, Any]

# Colours that colour-blind readers tell apart (Okabe and Ito), ours first.
OURS, LIMIT = "#0072B2", "#444444"
OTHERS = ("#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
GREY = "#888888"
_MINE = "ours: "
MOST_ROWS = 14  # of bars in one picture


def draw(report: dict[str, Any], folder: Path) -> list[Path]:
    """Writes the pictures that the report has figures for; their paths.

    speedups.png, bandwidth.png and share.png, from one-thread rows with warm memory.
    """
    require_matplotlib()
    written = []
    for name, figure in (
        ("speedups.png", _speedups(selected(report, "operations/*", 1, "warm"))),
        ("bandwidth.png", _bandwidth(selected(report, "scaling/size *", 1, "warm"))),
        ("share.png", _shares(selected(report, "share/*", 1, "warm"))),
    ):
        if figure is not None:
            about = f"{report['machine']['processor']}, one thread, torch "
            about += f"{report['versions']['torch']}, {report['date'][:10]}"
            figure.text(0.995, 0.004, about, ha="right", va="bottom", fontsize=7, color=GREY)
            data = io.BytesIO()
            figure.savefig(data, format="png", dpi=150, facecolor="white")
            written.append(write_atomic(folder / name, data.getvalue()))
    return written


def _figure(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure and its axes, without pyplot and its global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    figure.set_layout_engine("constrained", rect=(0, 0.16 / height, 1, 1 - 0.16 / height))
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    return figure, list(axes)


def _speedups(rows: list[Row]) -> Figure | None:
    """Bars: every opponent's time over ours, with the spread of rounds."""
    rows = [row for row in rows if row["opponents"]]
    main = [row for row in rows if " fp32 " in row["case"] and "16x4x64x64" in row["case"]]
    rows = (main or rows)[:MOST_ROWS]
    if not rows:
        return None
    bars = sum(len(row["opponents"]) for row in rows)
    figure, (axis,) = _figure(8, 0.8 + 0.2 * bars + 0.34 * len(rows))
    place = 0.0
    ticks: list[tuple[float, str]] = []
    for row in rows:
        axis.annotate(
            _label(row), (0, place), xycoords=("axes fraction", "data"), xytext=(4, 0),
            textcoords="offset points", va="center", fontsize=8.5, fontweight="bold", zorder=5,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )  # fmt: skip
        for name, figures in row["opponents"].items():
            place += 1
            low, middle, high = next(iter(figures["ratio"].values()))
            axis.barh(place, middle, height=0.82, color=_colour(name))
            spread = [[middle - low], [high - middle]]
            axis.errorbar(middle, place, xerr=spread, color=LIMIT, capsize=2, lw=0.8)
            axis.annotate(
                f"{middle:.1f}x", (high, place), xytext=(4, 0), textcoords="offset points",
                va="center", fontsize=7.5,
            )  # fmt: skip
            ticks.append((place, name))
        place += 1.7
    axis.axvline(1, color=OURS, lw=1.6)
    axis.annotate(
        "fastdiff", (1, 1), xycoords=("data", "axes fraction"), xytext=(0, 2),
        textcoords="offset points", color=OURS, fontsize=8.5, ha="center",
    )  # fmt: skip
    axis.set_yticks([p for p, _ in ticks], [name for _, name in ticks], fontsize=8)
    axis.set_ylim(place - 0.9, -0.8)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axis.margins(x=0.08)
    axis.set_xlabel("time over fastdiff's (new memory), median and p10..p90 of rounds", fontsize=8)
    return figure


def _colour(opponent: str) -> str:
    """By kind: compiled, eager, another library's own function."""
    kinds = ("eager", "compiled")
    return next((OTHERS[k] for k, kind in enumerate(kinds) if opponent.startswith(kind)), OTHERS[2])


def _label(row: Row) -> str:
    seconds = next(iter(row["ours"].values()))["seconds"][1]
    return f"{row['name']}: {time_of(seconds)}"


def _bandwidth(rows: list[Row]) -> Figure | None:
    """Lines: bytes a second against the size of the sample, with the limits of the same rounds."""
    families: dict[str, list[Row]] = {}
    for row in rows:
        found = re.fullmatch(r"size (.+) 2\^\d+", row["name"])
        if found:
            families.setdefault(found[1], []).append(row)
    if not families:
        return None
    figure, axes = _figure(4.6 * len(families) + 0.6, 3.8, len(families))
    for axis, (family, members) in zip(axes, families.items(), strict=True):
        members = sorted(members, key=lambda row: row["elements"])
        sizes = np.array([row["elements"] for row in members], float)
        _line(axis, sizes, members, "ours", next(iter(members[0]["ours"])), OURS, "o-", "fastdiff")
        for k, name in enumerate(dict.fromkeys(n for row in members for n in row["opponents"])):
            _line(axis, sizes, members, "opponents", name, OTHERS[k % len(OTHERS)], "s-", name)
        limits = [_limit(row) for row in members]
        axis.plot(sizes, limits, "--", color=LIMIT, lw=1.4, label="limit of the same rounds")
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes)
        axis.set_title(family, fontsize=10)
        axis.set_xlabel("elements of the sample", fontsize=8)
        axis.set_ylabel("GB/s, each tensor once", fontsize=8)
        axis.set_ylim(bottom=0)
        axis.grid(axis="y", color="#e4e4e4", lw=0.6)
        axis.set_axisbelow(True)
        axis.legend(fontsize=7, frameon=False)
    return figure


def _line(
    axis: Axes, sizes: np.ndarray, rows: list[Row], kind: str, name: str, colour: str, mark: str,
    label: str,
) -> None:  # fmt: skip
    there = [k for k, row in enumerate(rows) if name in row[kind]]
    spans = [[rows[k]["bytes"] / s / 1e9 for s in rows[k][kind][name]["seconds"]] for k in there]
    high, middle, low = np.array(spans).T
    axis.plot(sizes[there], middle, mark, color=colour, ms=3.5, lw=1.5, label=label)
    axis.fill_between(sizes[there], low, high, color=colour, alpha=0.18, lw=0)


def _limit(row: Row) -> float:
    """GB/s of the limit that binds."""
    binding = next(iter(row["of_limit"].values()))["limit"]
    return float(row["bytes"] / row["limits"][binding]["seconds"][1] / 1e9)


def _shares(rows: list[Row]) -> Figure | None:
    """Bars: what part of a step of the whole loop the sampler takes, on a logarithmic axis."""
    rows = [row for row in rows if "model" in row["beside"]]
    if not rows:
        return None
    bars = list(_share_bars(rows))
    shares = [100 * step / (model + step) for _, _, model, step in bars]
    left = 10 ** np.floor(np.log10(min(shares) / 2))
    figure, (axis,) = _figure(8, 0.8 + 0.24 * len(bars) + 0.3 * len(rows))
    place, last = -1.0, ""
    ticks: list[tuple[float, str]] = []
    for (pipeline, name, model, step), share in zip(bars, shares, strict=True):
        if pipeline != last:
            place, last = place + 0.7 if last else 0.0, pipeline
            axis.annotate(
                f"{pipeline}: the model takes {time_of(model)} a call", (0, place),
                xycoords=("axes fraction", "data"), xytext=(4, 0), textcoords="offset points",
                va="center", fontsize=8.5, fontweight="bold",
            )  # fmt: skip
            place += 1
        ours = name.startswith(_MINE)
        axis.barh(place, share - left, left=left, color=OURS if ours else OTHERS[0], height=0.82)
        axis.annotate(
            f"{share:.2g} %, {time_of(step)}", (share, place), xytext=(4, 0),
            textcoords="offset points", va="center", fontsize=7.5,
        )  # fmt: skip
        ticks.append((place, name.removeprefix(_MINE)))
        place += 1
    axis.set_yticks([p for p, _ in ticks], [label for _, label in ticks], fontsize=8)
    axis.set_ylim(place - 0.3, -0.8)
    axis.set_xscale("log")
    axis.set_xlim(left, 100)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    axis.set_xlabel("the sampler's share of a step of the whole loop", fontsize=8)
    return figure


def _share_bars(rows: list[Row]) -> Iterator[tuple[str, str, float, float]]:
    for row in rows:
        steps = row["work"].get("steps", 1)  # and as many calls of the model
        model = row["beside"]["model"]["seconds"][1] / steps
        for name, figures in row["opponents"].items():
            yield row["name"], name, model, figures["seconds"][1] / steps
        for name, figures in row["ours"].items():
            yield row["name"], _MINE + name, model, figures["seconds"][1] / steps
