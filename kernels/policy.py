"""Launch parameters, from one table by GPU.

    placement(device).policy.noise        # what launches that make noise take on this device

A row is found by the GPU's name for the compiler ("sm_90", "gfx942"). `fastdiff profile --tune`
times candidates on the GPU that is there and keeps the best of them as a row of launch.json in the
cache directory; that file is read once, at the first launch, and its rows come before these.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastdiff.backends.build import cache_root
from fastdiff.files import write_atomic

__all__ = [
    "INTERPRETER", "ROWS", "UNKNOWN", "Parameters", "Placement", "Policy", "candidates", "keep",
    "placement", "policy_file", "policy_of", "target_name",
]  # fmt: skip

_LOG = logging.getLogger("fastdiff")


class Parameters(NamedTuple):
    """How the work of one launch is cut.

    elements: of a tile, in a thread: 8 is one 16-byte access of a 16-bit tensor, two of float32.
    warps: of a program whose sample is large enough.
    tiles: that a program works through, at most, once the GPU is full. What comes before the
        first load (row, coefficients, keys: about half a tile's instructions) is paid once a
        program, and a program with several tiles holds no more registers than one with one.
    """

    elements: int = 8
    warps: int = 4
    tiles: int = 4


@dataclass(frozen=True)
class Policy:
    """A row: parameters of launches that make noise and of those that only move and add.

    source: where the row comes from.
    registers: that a thread may have if an SM is to hold as many threads as it can, which light
        launches do with; None where the compiler is not told.
    """

    noise: Parameters
    plain: Parameters
    source: str
    registers: int | None = None


_NOISE = Parameters(tiles=4)
_PLAIN = Parameters(tiles=12)  # a tile is short, so the beginning counts for more


def _row(registers: int | None) -> Policy:
    return Policy(_NOISE, _PLAIN, "not measured; chosen by instructions and registers", registers)


# 64 Ki registers an SM by its most threads: 2048, 1536 (rounded down to what can be allocated).
ROWS = {
    "sm_75": _row(64),
    "sm_80": _row(32),
    "sm_86": _row(40),
    "sm_89": _row(40),
    "sm_90": _row(32),
    "sm_100": _row(32),
    "sm_103": _row(32),
    "sm_120": _row(40),
    "gfx90a": _row(None),
    "gfx942": _row(None),
    "gfx950": _row(None),
}
UNKNOWN = Policy(_NOISE, _PLAIN, "a GPU that no row is for")
# The interpreter's time is per program and operation, hardly per element.
_WHOLE = Parameters(elements=8, warps=128, tiles=1)
INTERPRETER = Policy(_WHOLE, _WHOLE, "the interpreter")

_CHOICES = {"elements": (8, 16), "warps": (2, 4, 8), "tiles": (1, 2, 3, 4, 6, 8, 12, 16)}


def candidates() -> Iterator[Parameters]:
    """All that launches can take: what tuning tries and a file may say."""
    return itertools.starmap(Parameters, itertools.product(*_CHOICES.values()))


def policy_file() -> Path:
    """Where the rows of this user's own GPUs are kept, whether or not it exists yet."""
    return cache_root() / "launch.json"


def _parameters(row: dict[str, Any], kind: str) -> Parameters:
    found = Parameters(**row[kind])
    if found not in candidates():
        raise ValueError(f"its {kind} parameters are not among those that launches can take")
    return found


@cache
def _own_rows() -> dict[str, Policy]:
    """The rows of the file; none of them, and one line in the log, where it cannot be used."""
    path = policy_file()
    try:
        text = path.read_text()
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        _LOG.warning("%s is ignored: it cannot be read (%s)", path, error)
        return {}
    try:
        return {
            name: Policy(
                _parameters(row, "noise"),
                _parameters(row, "plain"),
                str(row["source"]),
                ROWS.get(name, UNKNOWN).registers,
            )
            for name, row in json.loads(text).items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        _LOG.warning(
            "%s is ignored: it holds no launch parameters (%s: %s); delete it, or write it anew "
            "with `fastdiff profile --tune`",
            path, type(error).__name__, error,
        )  # fmt: skip
        return {}


def policy_of(name: str) -> Policy:
    """The row of a GPU by its name for the compiler ("sm_90"): the user's own, ours, or UNKNOWN."""
    return _own_rows().get(name) or ROWS.get(name, UNKNOWN)


class Placement(NamedTuple):
    """A device's row, its multiprocessors, and the threads that each of them holds at once."""

    policy: Policy
    multiprocessors: int
    threads: int


def target_name(device: torch.device) -> str:
    """The compiler's name for a GPU of this machine."""
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@cache
def placement(device: torch.device) -> Placement:
    """What tilings for tensors of this device go by; tensors on "meta" are for no GPU we know."""
    if device.type == "cpu":
        return Placement(INTERPRETER, 1, 1024)
    if device.type == "meta":
        return Placement(UNKNOWN, 1, 1024)
    properties = torch.cuda.get_device_properties(device)
    return Placement(
        policy_of(target_name(device)),
        properties.multi_processor_count,
        properties.max_threads_per_multi_processor,
    )


def keep(name: str, row: Policy) -> Path:
    """Writes a GPU's row to the file, beside those of others; launches take it from now on."""
    rows = {**_own_rows(), name: row}
    text = json.dumps(
        {
            gpu: {
                "noise": own.noise._asdict(),
                "plain": own.plain._asdict(),
                "source": own.source,
            }
            for gpu, own in rows.items()
        },
        indent=2,
    )
    path = policy_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text.encode())
    _own_rows.cache_clear()
    placement.cache_clear()
    return path
