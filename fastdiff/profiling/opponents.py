"""What people run instead of a fused launch: operations one at a time, and torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff.ops.bits import bits, bits_bound, bits_bound_grad
from fastdiff.ops.chain import chain
from fastdiff.ops.loss import loss, loss_grad
from fastdiff.ops.randn import randn
from fastdiff.ops.step import step
from fastdiff.profiling.cases import Case

__all__ = ["compiled_reference", "eager"]

Call = Callable[[], object]
_REFERENCE: dict[str, Callable[..., None]] = {
    "randn": randn, "step": step, "chain": chain, "loss": loss, "loss_grad": loss_grad,
    "bits": bits, "bits_bound": bits_bound, "bits_bound_grad": bits_bound_grad,
}  # fmt: skip


def eager(case: Case, arguments: Sequence[Any]) -> Callable[..., Tensor] | None:
    """The case's update as a function of its tensors, an operation at a time.

    Coefficients are Python numbers, which is the fastest way of writing it, and noise is torch's.
    None for a case that has no such form here. The numbers do not matter for the time.
    """
    a, b, c, sigma, guidance = 0.9, 0.3, 0.2, 0.1, 7.5

    def clipped(x: Tensor, output: Tensor) -> Tensor:
        x_start = ((x - b * output) / a).clamp(-1, 1)
        return c * x_start + a * x + sigma * torch.randn_like(x)

    def posterior(x: Tensor, y: Tensor) -> Tensor:
        return (c + b * x) * (1 - y) + (b + b * x) * y

    def divergence(logits: Tensor, x_t: Tensor, x_start: Tensor) -> Tensor:
        q, p = posterior(x_t, x_start), posterior(x_t, logits.sigmoid())
        kl = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
        return kl.flatten(1).sum(1)

    forms: dict[str, Callable[..., Tensor]] = {
        "randn": torch.randn_like,
        "q_sample": lambda x: a * x + b * torch.randn_like(x),
        "q_posterior": lambda x, y: a * x + b * y,
        "ddpm": lambda x, output: a * x + b * output + sigma * torch.randn_like(x),
        "ddpm_clipped": clipped,
        "ddim": lambda x, output: a * ((x - b * output) / a) + c * output,
        "ddim_guided": lambda x, u, o: (
            a * ((x - b * (u + guidance * (o - u))) / a) + c * (u + guidance * (o - u))
        ),
        "mse": lambda output: (torch.randn_like(output) - output).square().flatten(1).mean(1),
        "mse_grad": lambda output: a * (output - torch.randn_like(output)),
        "bits_q_sample": lambda x: torch.bernoulli(c + b * x),
        "bits_reverse": lambda logits, x: torch.bernoulli(posterior(x, logits.sigmoid())),
        "bits_bound": divergence,
    }
    return None if case.mixed else forms.get(case.name)


def inputs(case: Case, arguments: Sequence[Any]) -> list[Tensor]:
    """The tensors that `eager` takes."""
    if case.op == "randn":
        return [arguments[0]]
    return case.reads(arguments)


def compiled_reference(case: Case) -> Callable[..., None]:
    """torch.compile of the definition: one fused pass too, made by Inductor."""
    torch._dynamo.reset()
    return torch.compile(_REFERENCE[case.op], fullgraph=True)
