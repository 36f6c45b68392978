"""Tables of README.md made from a benchmark report, so that no figure there is typed by hand.

    <!-- bench operations/*fp32* threads=1 memory=warm -->
    ... rewritten ...
    <!-- end bench -->

The words after `bench` are a glob of case ids and filters; `<!-- bench machine -->` holds what the
figures were taken on, `<!-- bench goals -->` what they are meant to reach and did.
"""

from __future__ import annotations

import re
from typing import Any

from fastdiff.profiling.bench_report import goals_table, header, markdown_table, selected

__all__ = ["rewritten"]

_BLOCK = re.compile(
    r"(?P<begin><!-- bench (?P<words>[^\n]*?) -->\n)(?P<old>.*?)(?P<end><!-- end bench -->)",
    re.DOTALL,
)


def rewritten(text: str, report: dict[str, Any]) -> str:
    """The text with every marked block made anew from the report.

    Raises:
        ValueError: there is no marked block, one cannot be understood, or no case matches it.
    """
    if not _BLOCK.search(text):
        raise ValueError("there is no <!-- bench ... --> block to rewrite")
    if report["smoke"]:
        raise ValueError("the report is of a smoke run: its figures mean nothing")
    return _BLOCK.sub(lambda found: _block(found, report), text)


def _block(found: re.Match[str], report: dict[str, Any]) -> str:
    words = found["words"].split()
    if words == ["machine"]:
        body = "\n".join(["```", *header(report), "```"])
    elif words == ["goals"]:
        body = goals_table(report)
    else:
        body = markdown_table(_rows(words, report))
    return f"{found['begin']}{body}\n{found['end']}"


def _rows(words: list[str], report: dict[str, Any]) -> list[dict[str, Any]]:
    pattern, *filters = words
    threads, memory = None, None
    for word in filters:
        name, _, value = word.partition("=")
        if name == "threads" and value.isdecimal():
            threads = int(value)
        elif name == "memory" and value in ("warm", "cold"):
            memory = value
        else:
            raise ValueError(f"{word!r} is not threads=N or memory=warm|cold")
    rows = selected(report, pattern, threads, memory)
    if not rows:
        raise ValueError(f"the report has no case for <!-- bench {' '.join(words)} -->")
    return rows
