"""Attributes that upstream keeps images in, made from the history of a run when they are read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastdiff.run import Run
from fastdiff.tracing.linear_form import LinearForm
from fastdiff.tracing.realize import from_history
from fastdiff.tracing.trace import TraceNotes

__all__ = ["attribute"]


def attribute(name: str, notes: TraceNotes, run: Run, upstream: type) -> Any:
    """An attribute of the scheduler after the run's last step.

    Raises:
        AttributeError: the run carries less than upstream keeps, and not this; of a list, when
            such an item of it is read.
    """

    def made(value: Any) -> Any:
        if isinstance(value, list):
            items = []
            for item in value:
                try:
                    items.append(made(item))
                except AttributeError as error:
                    items.append(error)
            return _Carried(items)
        return image(value) if isinstance(value, LinearForm) else value

    def image(form: LinearForm) -> Tensor:
        assert notes.recorder is not None
        weights = from_history(notes.recorder, run.index - 1, form)
        if weights is None:
            raise AttributeError(
                f"{name} is not carried: the steps of this run need fewer tensors than "
                f"{upstream.__name__} keeps; use the scheduler of diffusers to read it"
            )
        states = [run.x, *run.history]
        total = torch.zeros_like(run.x)
        for k, weight in weights.items():
            held = states[k]
            assert held is not None
            total = total + weight * held
        return total

    return made(notes.attributes[run.index - 1].get(name))


class _Carried(list[Any]):
    """A list of images, of which reading one that the run does not carry raises AttributeError."""

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        for item in found if isinstance(index, slice) else [found]:
            if isinstance(item, AttributeError):
                raise item
        return found

    def __iter__(self) -> Iterator[Any]:
        return (self[k] for k in range(len(self)))

    def __reduce__(self) -> Any:
        return list, (list(self),)
