"""The operations on bits among the cases, as fd.binomial calls them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastdiff.binomial.schedule import BinomialSchedule, table_of
from fastdiff.noise import STREAM_BITS_Q_SAMPLE, STREAM_BITS_REVERSE
from fastdiff.ops.bits import bits_arguments, bits_bound_arguments, partial_count

if TYPE_CHECKING:
    from fastdiff.profiling.cases import Case

__all__ = ["ABOUT", "arguments"]

# What is computed, in a word for the reader.
ABOUT = {
    "bits_q_sample": "bits of q(x_t | x_0), its own t for every sample",
    "bits_reverse": "reverse step of bits, from the logits of x_0",
    "bits_bound": "KL(q(x_{t-1} | x_t, x_0) || p) of bits, from the logits of x_0",
}


def arguments(
    case: Case,
    shape: tuple[int, ...],
    rows: Tensor,
    seed: int,
    tensor: Callable[..., Tensor],
) -> tuple[Any, ...]:
    """The arguments of a case's `bits`, `bits_bound` or `bits_bound_grad`; see Case.arguments.

    tensor(*size) makes tensors of normals; a bit is set where one is positive.
    """

    def bits() -> Tensor:
        return (tensor(*shape) > 0).to(case.dtype)

    def table(kind: str) -> Tensor:
        return table_of(BinomialSchedule.erasing(1000), kind, rows.device, torch.float32)

    x = bits()
    if case.name == "bits_q_sample":
        return bits_arguments(
            torch.empty_like(x), table("x_t"), rows, x=x, counter=(seed, 0, 7, STREAM_BITS_Q_SAMPLE)
        )
    logits = tensor(*shape)
    if case.name == "bits_reverse":
        return bits_arguments(
            torch.empty_like(x), table("sample"), rows, logits=logits, x=x,
            counter=(seed, 0, 7, STREAM_BITS_REVERSE),
        )  # fmt: skip
    results = torch.ones(shape[0], device=rows.device)
    gradient = case.op == "bits_bound_grad"
    if gradient:
        outputs = [torch.empty_like(logits)]
    else:
        outputs = [results, results.new_empty(shape[0], partial_count(x[0].numel()))]
    return bits_bound_arguments(
        outputs, logits, x, bits(), table("bound"), rows, mixture=True,
        gradients=results if gradient else None,
    )  # fmt: skip
