"""What a scheduler's own step does that a plan does not say: dtypes, draws, kinds of result."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["Draws", "Observed", "observe"]


@dataclass(frozen=True)
class Observed:
    """What one real step of upstream's code did on tiny tensors.

    Attributes:
        output_class: of the result with return_dict=True, and its fields.
        result_dtypes: of the tuple with return_dict=False.
        draw_dtype: of the random tensors that the step draws; None when it draws none.
        kept_dtype: the widest of the images that the scheduler keeps; None when it keeps none.
    """

    output_class: type | None
    fields: tuple[str, ...]
    result_dtypes: tuple[torch.dtype, ...]
    draw_dtype: torch.dtype | None
    kept_dtype: torch.dtype | None


class Draws(TorchFunctionMode):
    """Notes the dtypes of random tensors that this thread makes, without drawing them."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.randn:
            kwargs.pop("generator", None)
            result = torch.zeros(*args, **kwargs)
            self.dtypes.append(result.dtype)
            return result
        if func is torch.randn_like:
            result = torch.zeros_like(*args, **kwargs)
            self.dtypes.append(result.dtype)
            return result
        return func(*args, **kwargs)


def observe(
    scheduler: Any,
    timesteps: list[Any],
    sample: Tensor,
    output: Tensor,
    options: Mapping[str, Any],
    draws: bool,
) -> Observed:
    """Steps a copy of a scheduler (used up) on tensors of two elements a channel.

    Args:
        timesteps: what the caller passes, from the row on that will be stepped first.
        sample, output: for their dtypes, dimensions and channels.
        options: arguments of step beside them.
        draws: go on until a step draws.

    Raises:
        whatever upstream's step raises for such arguments.
    """
    small = [2] * (sample.dim() - 2)
    channels = 2 if sample.dim() > 1 else 1
    doubled = output.dim() > 1 and output.shape[1] == 2 * sample.shape[1]
    x = torch.ones([1, channels, *small][: sample.dim()], dtype=sample.dtype)
    o = torch.ones([1, channels * (1 + doubled), *small][: sample.dim()], dtype=output.dtype)
    if hasattr(scheduler, "noise_sampler"):
        scheduler.noise_sampler = lambda *_: torch.zeros_like(x)
    takes_dict = "return_dict" in inspect.signature(scheduler.step).parameters
    result: Any = None
    with torch.no_grad(), Draws() as drawn:
        for t in timesteps:
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(x, t)
            result = scheduler.step(o, t, x, **options)
            if drawn.dtypes or not draws:
                break
    draw_dtype = drawn.dtypes[0] if drawn.dtypes else None
    kept = _kept(scheduler, x.shape)
    if not takes_dict or isinstance(result, tuple):
        return Observed(None, (), tuple(value.dtype for value in result), draw_dtype, kept)
    filled = {name: value for name, value in result.items() if value is not None}
    dtypes = tuple(value.dtype for value in filled.values())
    return Observed(type(result), tuple(filled), dtypes, draw_dtype, kept)


def _kept(scheduler: Any, shape: torch.Size) -> torch.dtype | None:
    """The widest dtype of the images among a scheduler's attributes."""
    found = None
    for value in vars(scheduler).values():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, Tensor) and len(shape) > 1 and item.shape == shape:
                found = item.dtype if found is None else torch.promote_types(found, item.dtype)
    return found
