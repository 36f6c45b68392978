"""A benchmark report as text for a terminal and as Markdown."""

from __future__ import annotations

import fnmatch
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from fastdiff.benchmarks.goals import GOALS, figures_of
from fastdiff.benchmarks.share import rule

__all__ = [
    "LOAD_PER_CORE",
    "goals_table",
    "header",
    "markdown",
    "markdown_table",
    "rate",
    "text",
    "time_of",
]

Row = dict[str, Any]
LOAD_PER_CORE = 0.7  # beyond this others disturb the figures
WIDTH = 120
NAME = 34
LEGEND = (
    "time     median over rounds, of one call; all contestants of a case take turns in a round",
    "x        its time over ours in the same round, median [p10..p90]; in the order of ours",
    "%        the limit's time over ours: 100 % is as fast as the machine, [p10..p90]. Of a kind",
    "         (the word before the colon) the fastest limit counts; over kinds the slowest binds",
    "memory   warm: glibc keeps freed memory; cold: glibc as it comes, a page fault every 4 KiB",
    "first    seconds of a first call that took long: compilation, as the compiler's cache was",
)


def time_of(seconds: float) -> str:
    """As in "14.2 µs", "5.20 ms", "1.20 s"."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def rate(per_second: float, unit: str) -> str:
    """As in "8.1 images/s", "1.2 Gelem/s"."""
    for scale, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if per_second >= scale and unit == "elem":
            return f"{per_second / scale:.3g} {prefix}{unit}/s"
    return f"{per_second:.3g} {unit}/s"


def _spread(values: Sequence[float]) -> str:
    low, middle, high = map(_ratio, values)
    return f"{middle}x [{low}..{high}]"


def _ratio(value: float) -> str:
    return (
        f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
    )


def _percent(values: Sequence[float]) -> str:
    low, middle, high = (100 * value for value in values)
    return f"{middle:.0f} % [{low:.0f}..{high:.0f}]"


def header(report: dict[str, Any]) -> list[str]:
    """What the figures were taken on, and what speaks against them."""
    machine, before, after = report["machine"], report["before"], report["after"] or {}
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        f"machine  {machine['processor']}, {machine['cores']} cores, {machine['system']}",
        f"kernels  {machine['cpu kernels']}; python {machine['python']}",
        f"with     {versions}; commit {report['commit'] or 'unknown'}",
        f"when     {report['date']}, load {before['load']} before and {after.get('load')} after, "
        f"clock {before['mhz']} MHz and {after.get('mhz')} MHz",
    ]
    loads = [value for value in (before["load"],) if value is not None]
    if loads and max(loads) > LOAD_PER_CORE * int(machine["cores"]):
        lines.append(
            f"WARNING  the load was {max(loads)} before anything ran: others use this machine, and "
            "figures with several threads mean little"
        )
    if report["interrupted"]:
        lines.append("WARNING  interrupted: the cases that follow are those that were measured")
    if report["smoke"]:
        lines.append("WARNING  a smoke run: tiny and uncompiled, no figure means anything")
    return [
        part
        for line in lines
        for part in textwrap.wrap(line, WIDTH, subsequent_indent=" " * 9, break_on_hyphens=False)
    ]


def text(report: dict[str, Any]) -> str:
    """The whole report for a terminal, at most 120 columns."""
    lines = header(report)
    rows: list[Row] = report["rows"]
    for group in dict.fromkeys(row["group"] for row in rows):
        lines += ["", f"== {group} " + "=" * (WIDTH - len(group) - 4)]
        for row in rows:
            if row["group"] == group:
                lines += ["", *_block(row)]
        if group == "share":
            lines += ["", *rule(row for row in rows if row["group"] == group)]
    goals = list(_goals(report))
    if goals:
        lines += ["", "== goals " + "=" * (WIDTH - 9), "", *goals]
    lines += ["", *LEGEND]
    return "\n".join(lines)


def _title(row: Row) -> str:
    threads = f"{row['threads']} thread" + ("s" if row["threads"] > 1 else "")
    return f"{row['name']}, {threads}, {row['memory']} memory"


def _block(row: Row) -> Iterator[str]:
    if row["status"] != "measured":
        yield f"{_title(row)}: {row['status']}"
        yield f"  {row['reason']}"[:WIDTH]
        return
    yield f"{_title(row)}, {row['rounds']} rounds"
    shares = row["of_limit"]
    for name, figures in row["ours"].items():
        note = ""
        if name in shares:
            note = f"{_percent(shares[name]['share'])} of {shares[name]['limit']}"
        yield _line(row, name, figures, note)
    for name, figures in row["opponents"].items():
        ratios = [_spread(values) for values in figures["ratio"].values()]
        yield _line(row, name, figures, "".join(f"{ratio:<23}" for ratio in ratios[:2]))
    for name, figures in row["limits"].items():
        yield _line(row, name, figures, "limit")
    for name, figures in row["beside"].items():
        note = _shares(row, figures) if name == "model" else _beside(row, name, figures)
        yield _line(row, name, figures, note)
    for what in ("absent", "wrong"):
        for name, reason in row[what].items():
            yield f"  {what:<7}{name}: {reason}"[:WIDTH]
    slow = [f"{k} {v:.1f} s" for k, v in row["first_call_seconds"].items() if v > 0.5]
    if slow:
        yield f"  first  {', '.join(slow)}"[:WIDTH]


def _shares(row: Row, model: Row) -> str:
    """What part of the whole each contestant is beside the model."""
    whole = model["seconds"][1]
    parts = [
        f"{name} {100 * other['seconds'][1] / (whole + other['seconds'][1]):.2g} %"
        for name, other in (*row["ours"].items(), *row["opponents"].items())
    ]
    return "share of the whole: " + ", ".join(parts)


def _beside(row: Row, name: str, figures: Row) -> str:
    """Its time over the first opponent's; over ours where it is our own float32."""
    other = "fastdiff in place" if name == "float32 in place" else next(iter(row["opponents"]), "")
    taken = (row["ours"] | row["opponents"]).get(other)
    return (
        f"{figures['seconds'][1] / taken['seconds'][1]:.2g} times that of {other}" if taken else ""
    )


def _line(row: Row, name: str, figures: Row, note: str) -> str:
    seconds = figures["seconds"][1]
    rates = ""
    if name in row["ours"] or name in row["opponents"]:
        rates = ", ".join(_rates(row, seconds))
    return f"  {name[:NAME]:<{NAME}}{time_of(seconds):>9} {rates:>21}  {note}"[:WIDTH].rstrip()


def _rates(row: Row, seconds: float) -> Iterator[str]:
    if row["work"]:
        for unit, count in row["work"].items():
            if unit == "steps":
                yield f"{time_of(seconds / count)}/step"
            else:
                yield rate(count / seconds, unit)
    elif row["elements"] > 1:
        yield rate(row["elements"] / seconds, "elem").replace("elem/s", "/s")
        yield f"{row['bytes'] / seconds / 1e9:.3g} GB/s"


def selected(
    report: dict[str, Any],
    pattern: str = "*",
    threads: int | None = None,
    memory: str | None = None,
) -> list[Row]:
    """The measured rows of some cases."""
    return [
        row
        for row in report["rows"]
        if row["status"] == "measured"
        and fnmatch.fnmatchcase(row["case"], pattern)
        and threads in (None, row["threads"])
        and memory in (None, row["memory"])
    ]


def markdown_table(rows: Sequence[Row]) -> str:
    """One line a case: our times, their share of the limit, every opponent's ratio to ours, and the
    time of what stands beside them. Times are of a step where a call is many; beside that are the
    model's too."""
    opponents = list(dict.fromkeys(name for row in rows for name in row["opponents"]))
    several = len({(row["threads"], row["memory"]) for row in rows}) > 1
    beside = list(dict.fromkeys(name for row in rows for name in row["beside"]))
    step = all("steps" in row["work"] for row in rows)
    ours = " / ".join(dict.fromkeys(name for row in rows for name in list(row["ours"])[:2]))
    limited = any(row["of_limit"] for row in rows)
    titles = [
        "case", f"{ours}, a step" if step else "fastdiff", *(["of the limit"] if limited else []),
        *opponents, *beside,
    ]  # fmt: skip
    lines = [_cells(titles), _cells(["---"] * len(titles))]
    for row in rows:
        name = row["name"]
        if several:
            threads = f"{row['threads']} thread" + ("s" if row["threads"] > 1 else "")
            name += f", {threads}, {row['memory']}"
        steps = row["work"]["steps"] if step else 1
        seconds = [figures["seconds"][1] for figures in list(row["ours"].values())[:2]]
        times = " / ".join(time_of(value / steps) for value in seconds)
        if "images" in row["work"]:
            times += f" ({rate(row['work']['images'] / seconds[0], 'images')})"
        cells = [name, times, *([_limit_cell(row)] if limited else [])]
        for opponent in opponents:
            figures = row["opponents"].get(opponent)
            ratios = list(figures["ratio"].values())[:2] if figures else []
            cells.append(" / ".join(f"{_ratio(ratio[1])}x" for ratio in ratios))
        for name in beside:
            taken = row["beside"][name]["seconds"][1] if name in row["beside"] else 0.0
            cells.append(time_of(taken / (steps if name == "model" else 1)) if taken else "")
        lines.append(_cells(cells))
    return "\n".join(lines)


class _Reached(NamedTuple):
    """A goal and what was measured, in words."""

    what: str
    figure: str
    wanted: str
    measured: str
    verdict: str
    why: str


def _reached(report: dict[str, Any]) -> Iterator[_Reached]:
    for goal in GOALS:
        figures = list(figures_of(goal, report["rows"]))
        if not figures:
            continue
        met = all(goal.met(value) for _, value in figures)
        wanted = f"at least {goal.least:g}" if goal.least is not None else f"at most {goal.most:g}"
        measured = ", ".join(_goal_figure(case, value) for case, value in figures)
        figure = _UNITS.get(goal.figure, goal.figure)
        verdict, why = ("yes", "") if met else ("no", goal.why)
        yield _Reached(goal.what, figure, wanted, measured, verdict, why)


def goals_table(report: dict[str, Any]) -> str:
    """What the cases are meant to reach and what they did, as Markdown; "" without such cases."""
    rows = list(_reached(report))
    if not rows:
        return ""
    reasons = {why: n for n, why in enumerate(dict.fromkeys(row.why for row in rows if row.why), 1)}
    lines = [_cells(["what", "figure", "wanted", "measured", "met"]), _cells(["---"] * 5)]
    for row in rows:
        verdict = f"{row.verdict} ({reasons[row.why]})" if row.why else row.verdict
        lines.append(_cells([*row[:4], verdict]))
    return "\n".join([*lines, *(f"\n({n}) {why}" for why, n in reasons.items())])


def _goals(report: dict[str, Any]) -> Iterator[str]:
    """The same for a terminal."""
    for row in _reached(report):
        line = f"{row.what}, {row.figure}, {row.wanted}: {row.measured}; met: {row.verdict}"
        line += f", because {row.why}" if row.why else ""
        yield from textwrap.wrap(line, WIDTH, subsequent_indent="  ", break_on_hyphens=False)


_UNITS = {
    "x float32": "times as fast as float32", "limit": "share of the limit", "us": "µs a step",
    "trace": "of a stock run's time",
}  # fmt: skip


def _goal_figure(case: str, value: float) -> str:
    name = case.split("/", 1)[1]
    if name.endswith(" 1x1x2x2"):
        return f"{name.removesuffix(' 1x1x2x2')} {_ratio(value)}"
    return f"{_ratio(value)} ({name.split()[-1]})" if "x" in name.split()[-1] else _ratio(value)


def _limit_cell(row: Row) -> str:
    shares = list(row["of_limit"].values())[:2]
    if not shares:
        return ""
    percents = " / ".join(f"{100 * share['share'][1]:.0f} %" for share in shares)
    return f"{percents}, {shares[0]['limit'].split(':')[0]}"


def _cells(words: Iterable[str]) -> str:
    return "| " + " | ".join(word.replace("|", "\\|") for word in words) + " |"


def markdown(report: dict[str, Any]) -> str:
    """The whole report as Markdown: a table a group, then what could not be compared."""
    lines = ["# Benchmarks", "", *(f"    {line}" for line in header(report)), ""]
    lines += [
        "Times are ours, returning new memory / in place where a case has both. Ratios are the",
        "opponent's time over each of them in the same round (medians). The share of the limit",
        "says how near the machine's own speed that is, and which limit binds.",
    ]
    rows = selected(report)
    for group in dict.fromkeys(row["group"] for row in rows):
        mine = [row for row in rows if row["group"] == group]
        lines += ["", f"## {group}", "", markdown_table(mine)]
        if group == "share":
            lines += ["", *(f"- {line}" for line in rule(mine))]
    goals = goals_table(report)
    if goals:
        lines += ["", "## Goals", "", goals]
    notes = dict.fromkeys(_notes(report["rows"]))
    if notes:
        lines += ["", "## Not compared", "", *(f"- {note}" for note in notes)]
    return "\n".join(lines) + "\n"


def _notes(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        if row["status"] != "measured":
            yield f"{row['case']}: {row['status']}: {row['reason']}"
            continue
        for name, reason in row["absent"].items():
            yield f"{row['group']}, {name}: {reason}"
        for name, reason in row["wrong"].items():
            yield f"{row['case']}, {name}: WRONG RESULT: {reason}"
