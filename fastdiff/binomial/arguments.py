"""Checks of what users pass, and bits as kernels read them."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.binomial.schedule import BinomialSchedule
from fastdiff.ops.call import compute_dtype
from fastdiff.ops.checks import FLOATING, check_sample

__all__ = [
    "BITS", "as_stored", "beside", "check_bits", "check_model", "check_prediction",
    "check_schedule", "check_seed", "mixes", "table_dtype",
]  # fmt: skip

BITS = (*FLOATING, torch.uint8, torch.bool)
PREDICTIONS = ("sample", "previous")


def check_schedule(schedule: object) -> None:
    if not isinstance(schedule, BinomialSchedule):
        raise TypeError(f"schedule must be a BinomialSchedule, not {type(schedule).__name__}")


def check_prediction(prediction_type: object) -> None:
    if prediction_type not in PREDICTIONS:
        raise ValueError(
            f"prediction_type must be one of {', '.join(PREDICTIONS)}, not {prediction_type!r}"
        )


def check_model(model: object) -> None:
    if not callable(model):
        raise TypeError(f"model must be callable, not {type(model).__name__}")


def check_bits(name: str, value: object, like_name: str = "", like: Tensor | None = None) -> None:
    """Bits (B, ...), B >= 1; with `like`, of its shape and device."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, not {type(value).__name__}")
    if value.dtype not in BITS:
        raise TypeError(f"{name} must be floating, uint8 or bool, not {value.dtype}")
    if value.layout != torch.strided:
        raise ValueError(f"{name} must be a dense (strided) tensor, not {value.layout}")
    check_sample(name, torch.empty(value.shape, dtype=torch.float16, device="meta"))
    if like is None:
        return
    if value.shape != like.shape:
        raise ValueError(
            f"{name} must have the shape of {like_name}, {tuple(like.shape)}, "
            f"not {tuple(value.shape)}"
        )
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device}, but {like_name} is on {like.device}")


def check_seed(seed: object) -> None:
    if seed is None:
        raise TypeError("seed must be given: an int or an int64 tensor (B,)")


def as_stored(value: Tensor) -> Tensor:
    """Contiguous, and bool as the uint8 that it is in memory."""
    value = value.detach().contiguous()
    return value.view(torch.uint8) if value.dtype == torch.bool else value


def mixes(value: Tensor, compute: torch.dtype) -> bool:
    """Whether of bits and a table one is float64 and one is not, which no kernel reads."""
    wide = value.dtype == torch.float64, compute == torch.float64
    return value.is_floating_point() and wide[0] != wide[1]


def beside(value: Tensor, compute: torch.dtype) -> Tensor:
    """Bits as a kernel reads them beside a table of dtype `compute`."""
    return as_stored(value != 0 if mixes(value, compute) else value)


def table_dtype(value: Tensor) -> torch.dtype:
    """float64 where that is the dtype of the data, else float32."""
    return compute_dtype(value.dtype if value.dtype in FLOATING else torch.float32)
