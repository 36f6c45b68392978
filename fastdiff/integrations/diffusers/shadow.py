"""Copies of schedulers that may be used up, and what is said when a step is not fused."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor

__all__ = ["attributes_of", "copied", "said"]

log = logging.getLogger("fastdiff")
_said: set[tuple[type, str]] = set()


def attributes_of(scheduler: Any) -> dict[str, Any]:
    """A scheduler's own attributes, lists apart from it."""
    return _apart(vars(scheduler))


def copied(upstream: Any, attributes: dict[str, Any]) -> Any:
    """A scheduler of upstream's class with these attributes, its tensors on the host."""
    shadow = upstream.__new__(upstream)
    for name, value in _apart(attributes).items():
        vars(shadow)[name] = value.cpu() if isinstance(value, Tensor) else value
    return shadow


def said(upstream: type, reason: str) -> None:
    """Logs, once, that upstream's own step runs and why."""
    if (upstream, reason) not in _said:
        _said.add((upstream, reason))
        log.warning("%s runs on its own step: %s", upstream.__name__, reason)


def _apart(attributes: dict[str, Any]) -> dict[str, Any]:
    return {
        name: list(value) if isinstance(value, list) else value
        for name, value in attributes.items() if not name.startswith("_fastdiff")
    }  # fmt: skip
