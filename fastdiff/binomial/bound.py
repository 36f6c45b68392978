"""The variational bound on -log2 p(x_0), term by term and whole."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.backends import operation
from fastdiff.binomial.arguments import (
    beside,
    check_bits,
    check_model,
    check_prediction,
    check_schedule,
    table_dtype,
)
from fastdiff.binomial.chain import Model, q_sample
from fastdiff.binomial.schedule import BinomialSchedule, entropy, table_of
from fastdiff.ops.bits import bits_bound_arguments, partial_count
from fastdiff.ops.call import differentiated
from fastdiff.ops.checks import FLOATING, check_int, check_sample, resolve_rows

__all__ = ["Terms", "bound", "variational_bound"]


class _Bound(torch.autograd.Function):
    """bits_bound, and bits_bound_grad for its derivative by the logits."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, x_t: Tensor, x_start: Tensor, table: Tensor, rows: Tensor,
        mixture: bool, backend: str | None,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(logits, x_t, x_start, table, rows)
        ctx.mixture, ctx.backend = mixture, backend
        return _bound(logits, x_t, x_start, table, rows, mixture, backend)

    @staticmethod
    def backward(ctx: Any, gradients: Tensor) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("bound() has no second derivative: not with create_graph=True")
        logits, x_t, x_start, table, rows = ctx.saved_tensors
        out = torch.empty_like(logits)
        call = bits_bound_arguments(
            [out], logits, x_t, x_start, table, rows, mixture=ctx.mixture,
            gradients=gradients.contiguous(),
        )  # fmt: skip
        operation("bits_bound_grad", out.device, table.dtype, ctx.backend)(*call)
        return out, None, None, None, None, None, None


def _bound(
    logits: Tensor, x_t: Tensor, x_start: Tensor, table: Tensor, rows: Tensor, mixture: bool,
    backend: str | None,
) -> Tensor:  # fmt: skip
    batch = logits.shape[0]
    results = torch.empty(batch, dtype=table.dtype, device=logits.device)
    partials = results.new_empty(batch, partial_count(logits.numel() // batch))
    call = bits_bound_arguments(
        [results, partials], logits, x_t, x_start, table, rows, mixture=mixture
    )
    operation("bits_bound", logits.device, table.dtype, backend)(*call)
    return results


def bound(
    model_output: Tensor,
    x_start: Tensor,
    x_t: Tensor,
    t: int | Tensor,
    schedule: BinomialSchedule,
    *,
    prediction_type: str = "sample",
    check: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Term t of the bound on -log2 p(x_0), in bits: (B,), summed over the bits of a sample.

    KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), and -log2 p(x_0 | x_1) at t = 0. Differentiable
    once with respect to model_output, by one more pass. float32, float64 for float64 logits.

    Args:
        model_output: floating (B, ...), logits of x_0 or of x_{t-1}.
        x_start, x_t: bits of that shape.
        t: int, or integer (B,) or (1,), in [0, T).

    Of a model of x_0 a bit's probability is no less than exp(-87): a logit beyond that counts as
    it, its derivative apart. Source: Sohl-Dickstein et al. 2015, eq. 13.
    """
    check_sample("model_output", model_output)
    check_bits("x_t", x_t, "model_output", model_output)
    check_bits("x_start", x_start, "model_output", model_output)
    check_schedule(schedule)
    check_prediction(prediction_type)
    rows = resolve_rows(t, schedule.num_timesteps, x_t.shape[0], x_t.device, check)
    compute = table_dtype(model_output)
    if model_output.numel() == 0:
        return model_output.new_zeros(model_output.shape[0], dtype=compute)
    arguments = (
        model_output.contiguous(), beside(x_t, compute), beside(x_start, compute),
        table_of(schedule, "bound", x_t.device, compute), rows, prediction_type == "sample",
        backend,
    )  # fmt: skip
    if differentiated([model_output]):
        return _Bound.apply(*arguments)
    return _bound(*arguments)


class Terms(NamedTuple):
    """A bound on -log2 p(x_0) in bits, per sample."""

    total: Tensor  # (B,)
    terms: Tensor  # (T, B): bound() at every t
    prior: float  # KL(q(x_T | x_0) || B(1/2)), the same for every x_0


def variational_bound(
    model: Model,
    x_start: Tensor,
    schedule: BinomialSchedule,
    *,
    seed: int | Tensor,
    draws: int = 1,
    sample_offset: int = 0,
    prediction_type: str = "sample",
    last_step: str = "model",
    backend: str | None = None,
) -> Terms:
    """An upper bound on -log2 p(x_0), in bits: the paper's -K with one draw of x_t or more per t.

        -K = sum_t E KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) + H_p(x_T) - H_q(x_T | x_0)
             + (the term of the last step, from x_1 to x_0)

    Args:
        model: as in sample().
        draws: of x_t for every t; term t of draw k takes counter step k T + t of q_sample.
        last_step: "model": -log2 p(x_0 | x_1) by the model. "forward": H_q(x_1 | x_0), the
            paper's choice of p(x_0 | x_1) as the forward kernel turned round.

    Source: Sohl-Dickstein et al. 2015, eq. 14 and appendix A. No gradient is kept.
    """
    check_model(model)
    check_bits("x_start", x_start)
    check_schedule(schedule)
    check_prediction(prediction_type)
    if check_int("draws", draws) < 1:
        raise ValueError(f"draws must be at least 1, not {draws}")
    if last_step not in ("model", "forward"):
        raise ValueError(f"last_step must be model or forward, not {last_step!r}")
    batch, steps = x_start.shape[0], schedule.num_timesteps
    n = x_start.numel() // batch
    model_bits = x_start if x_start.dtype in FLOATING else x_start.float()
    rows = []
    with torch.no_grad():
        for t in range(steps):
            total = torch.zeros(batch, dtype=torch.float64, device=x_start.device)
            if t == 0 and last_step == "forward":
                beta = schedule.betas[:1] / 2
                value = n * float(entropy(beta, 1 - beta)[0]) / math.log(2)
                rows.append(torch.full_like(total, value))
                continue
            for draw in range(draws):
                x_t = q_sample(
                    model_bits, t, schedule, seed=seed, step=draw * steps + t,
                    sample_offset=sample_offset, backend=backend,
                )  # fmt: skip
                logits = model(x_t, torch.full((batch,), t, device=x_start.device))
                total = total + bound(
                    logits, x_start, x_t, t, schedule, prediction_type=prediction_type,
                    backend=backend,
                ).double()  # fmt: skip
            rows.append(total / draws)
    terms = torch.stack(rows)
    end = (1 - schedule.alphas_cumprod[-1:]) / 2
    prior = n * (1 - float(entropy(end, 1 - end)[0]) / math.log(2))
    return Terms(terms.sum(0) + prior, terms, prior)
