"""Where a step stands among the scheduler's timesteps."""

from __future__ import annotations

from typing import Any

from torch import Tensor

__all__ = ["Places"]


class Places:
    """The places of one scheduler's steps.

    Attributes:
        counted: whether upstream counts its steps or goes by the value of the timestep.
        foreign: timesteps that set_timesteps() did not make; they stand at -1, -2, ...
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.counted = "_step_index" in vars(scheduler)
        self.foreign: list[float] = []
        self._timesteps: Tensor | None = None
        self._values: list[float] = []

    def first(self, timestep: Any) -> int:
        """Where upstream's own count begins, which it then does."""
        scheduler = self.scheduler
        if hasattr(scheduler, "_init_step_index"):
            scheduler._init_step_index(timestep)
        elif scheduler._begin_index is None:
            scheduler._step_index = scheduler.index_for_timestep(timestep)
        else:
            scheduler._step_index = scheduler._begin_index
        place: int = scheduler._step_index
        return place

    def of(self, timestep: Any, expected: int) -> int:
        """Where a timestep stands, read from a device only if it must be; the expected place if
        there are several."""
        timesteps: Tensor = self.scheduler.timesteps
        if timesteps is not self._timesteps:
            self._timesteps, self._values = timesteps, timesteps.tolist()
        if isinstance(timestep, Tensor) and timestep.numel() == 1:
            offset = timestep.data_ptr() - timesteps.data_ptr()
            place = offset // timesteps.element_size()
            alike = timestep.dtype == timesteps.dtype and timestep.device == timesteps.device
            if alike and 0 <= place < len(self._values):
                return place
        value = float(timestep)
        if 0 <= expected < len(self._values) and self._values[expected] == value:
            return expected
        if value in self._values:
            return self._values.index(value)
        if value not in self.foreign:
            self.foreign.append(value)
        return -1 - self.foreign.index(value)
