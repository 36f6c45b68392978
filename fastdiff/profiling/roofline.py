"""The roofline of a static report: instructions against bytes, a panel for each GPU.

matplotlib (extra `plot`) is imported when something is drawn.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdiff.files import write_atomic
from fastdiff.profiling.bound import REACH
from fastdiff.profiling.gpus import ARCHITECTURES, GPUS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw", "require_matplotlib"]

Row = Mapping[str, Any]
Point = tuple[float, float, Row]

# Colours that colour-blind readers tell apart (Okabe and Ito), and a mark for each backend.
_COLOURS = {"fp16": "#E69F00", "fp32": "#0072B2", "fp32+bf16": "#009E73", "bf16": "#D55E00"}
_MARKS = {"triton": "o", "cuda": "s"}
_MOST_PANELS = 12


def require_matplotlib() -> None:
    """Raises ModuleNotFoundError, saying what to install, where there is no matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "pictures need matplotlib: pip install matplotlib, or fastdiff[plot]"
        ) from None


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Writes the picture as PNG: a panel for the first GPU of each target of the report.

    With one target, for every GPU of it.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in report["rows"] if "classes" in row]
    panels: dict[str, list[Row]] = {}
    targets = dict.fromkeys(row["target"] for row in rows)
    for target in targets:
        mine = [row for row in rows if row["target"] == target]
        names = list(mine[0]["predictions"])
        for name in names if len(targets) == 1 else names[:1]:
            panels[name] = mine
    panels = dict(list(panels.items())[:_MOST_PANELS])
    columns = math.ceil(math.sqrt(len(panels)))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(7.6 * columns, 5.8 * lines + 0.9), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    drawn = []
    for index, (name, mine) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(lines, columns, index)
        drawn.append((axes, _panel(axes, name, mine)))
    figure.suptitle(
        f"What compiled kernels should reach: memory, or {REACH:g} of the issue rate "
        "(dashed: all of it)",
        fontsize=13,
    )
    figure.legend(handles=_legend(rows), loc="outside lower center", ncols=7, frameon=False)
    figure.draw_without_rendering()  # labels keep distances in pixels
    for axes, points in drawn:
        _labels(axes, points)
    data = io.BytesIO()
    figure.savefig(data, format="png")
    write_atomic(path, data.getvalue())


def _legend(rows: Sequence[Row]) -> list[Any]:
    from matplotlib.lines import Line2D

    def mark(label: str, colour: str, shape: str, filled: bool = True) -> Line2D:
        return Line2D(
            [], [], linestyle="none", marker=shape, color=colour, label=label,
            markerfacecolor=colour if filled else "none", markersize=7,
        )  # fmt: skip

    dtypes = {_dtype(row) for row in rows}
    handles = [mark(name, colour, "D") for name, colour in _COLOURS.items() if name in dtypes]
    handles += [mark(f"exact, {name}", "#444444", shape) for name, shape in _MARKS.items()]
    return [*handles, mark("fast", "#444444", "o", filled=False)]


def _dtype(row: Row) -> str:
    return str(row["case"].split()[1])


def _panel(axes: Axes, name: str, rows: Sequence[Row]) -> list[Point]:
    """Instructions a byte against instructions a second; the roofs are memory and issue."""
    gpu = next(gpu for gpu in GPUS if gpu.name == name)
    pipes = ARCHITECTURES[gpu.target].pipes
    pipe, lanes = ("issue", 128.0) if "issue" in pipes else ("vector", 64.0)
    peak = gpu.multiprocessors * gpu.clock * lanes / 1000  # 10^12 instructions a second
    points = []
    for row in rows:
        used = pipes[pipe]
        count = sum(value for kind, value in row["classes"].items() if kind in used)
        speed = row["predictions"][name]["gelem_s"] * count / 1000
        points.append((count / row["bytes"], speed, row))
    low, high = min(x for x, *_ in points) / 1.6, max(x for x, *_ in points) * 1.9
    ridge = [low, peak * REACH / gpu.copy, high]
    roof = [min(gpu.copy * x, peak * REACH) for x in ridge]
    axes.fill_between(ridge, roof, peak * 100, color="#f3f3f3", zorder=0)
    axes.plot(ridge, roof, color="#222222", linewidth=1.6, zorder=2)
    axes.axhline(peak, color="#222222", linewidth=0.9, linestyle=(0, (5, 4)), zorder=1)
    for x, y, row in sorted(points, key=lambda point: list(_COLOURS).index(_dtype(point[2]))):
        colour = _COLOURS[_dtype(row)]
        fast = row["case"].endswith(" fast")
        axes.plot(
            x, y, marker=_MARKS[row["backend"]], markersize=6, color=colour, linestyle="none",
            markerfacecolor="white" if fast else colour, alpha=0.9, zorder=3,
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlim=(low, high))
    axes.set_ylim(min(y for _, y, _ in points) / 1.7, peak * 9)  # room for labels above
    axes.text(
        high / 1.05, peak * REACH * 1.03, f"{REACH:g} x {pipe}", ha="right", va="bottom", fontsize=8
    )
    slope_x = (low * max(low * 1.3, min(ridge[1], high))) ** 0.5
    axes.annotate(
        f"memory, {gpu.copy:g} TB/s", (slope_x, gpu.copy * slope_x), xytext=(10, -12),
        textcoords="offset points", fontsize=8,
    )  # fmt: skip
    axes.set_title(f"{name} ({gpu.target})", fontsize=11)
    axes.set_xlabel(f"{'vector ' if pipe == 'vector' else ''}instructions a byte", fontsize=9)
    axes.set_ylabel("10$^{12}$ instructions a second", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6, zorder=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return points


def _labels(axes: Axes, points: Sequence[Point]) -> None:
    """Names each operation once, at the first of its points, along the top of the panel."""
    named: dict[str, tuple[float, float]] = {}
    for x, y, row in points:
        label = row["case"].split()[0] + (" fast" if row["case"].endswith(" fast") else "")
        named.setdefault(label, (x, y))
    order = sorted(named.items(), key=lambda item: item[1])
    pixels = [axes.transData.transform(place)[0] for _, place in order]
    apart, right = 15.0, axes.bbox.x1 - 8
    # Pushed apart to the right, then back from the edge.
    for index in range(1, len(pixels)):
        pixels[index] = max(pixels[index], pixels[index - 1] + apart)
    for index in reversed(range(len(pixels))):
        pixels[index] = min(pixels[index], right - apart * (len(pixels) - 1 - index))
    for (label, place), pixel in zip(order, pixels, strict=True):
        x = axes.transData.inverted().transform((pixel, 0))[0]
        axes.annotate(
            label, place, xytext=(x, 0.985), textcoords=("data", "axes fraction"), rotation=90,
            va="top", ha="center", fontsize=8, color="#222222", annotation_clip=False,
            arrowprops={
                "arrowstyle": "-", "color": "#aaaaaa", "linewidth": 0.6, "relpos": (0.5, 0),
                "shrinkA": 1, "shrinkB": 4,
            },
        )  # fmt: skip
