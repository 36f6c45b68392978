"""Both directions of the chain: every draw is one pass over memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastdiff.backends import operation
from fastdiff.binomial.arguments import (
    BITS,
    as_stored,
    beside,
    check_bits,
    check_model,
    check_prediction,
    check_schedule,
    check_seed,
    mixes,
    table_dtype,
)
from fastdiff.binomial.schedule import BinomialSchedule, table_of
from fastdiff.noise import STREAM_BITS_CHAIN, STREAM_BITS_Q_SAMPLE, STREAM_BITS_REVERSE
from fastdiff.ops.bits import bits_arguments
from fastdiff.ops.call import compute_dtype
from fastdiff.ops.checks import (
    FLOATING,
    check_int,
    check_sample,
    check_shape,
    check_uint32,
    index_views,
    resolve_rows,
    resolve_seed,
)
from fastdiff.ops.held import held
from fastdiff.ops.row import picked

__all__ = ["Model", "p_sample", "posterior", "q_sample", "q_step", "sample"]

Model = Callable[[Tensor, Tensor], Tensor]


def _draw(
    shape: Sequence[int],
    dtype: torch.dtype,
    table: Tensor,
    rows: Tensor,
    seed: int | Tensor,
    sample_offset: int,
    step: int,
    stream: int,
    backend: str | None,
    logits: Tensor | None = None,
    x: Tensor | None = None,
) -> Tensor:
    """One call of `bits` on checked arguments."""
    keys, low, offset = resolve_seed(seed, sample_offset, shape[0], table.device)
    out = torch.empty(tuple(shape), dtype=dtype, device=table.device)
    if out.numel() == 0:
        return out
    call = bits_arguments(
        as_stored(out), table, rows, keys=keys, counter=(low, offset, step, stream),
        logits=None if logits is None else logits.detach().contiguous(),
        x=None if x is None else beside(x, table.dtype),
    )  # fmt: skip
    operation("bits", out.device, table.dtype, backend)(*call)
    return out


def q_sample(
    x_start: Tensor,
    t: int | Tensor,
    schedule: BinomialSchedule,
    *,
    seed: int | Tensor,
    step: int = 0,
    sample_offset: int = 0,
    check: bool = False,
    backend: str | None = None,
) -> Tensor:
    """x_t ~ B(x_0 abar_t + (1 - abar_t) / 2), in one pass; of the shape and dtype of x_start.

    Args:
        x_start: bits (B, ...).
        t: int, or integer (B,) or (1,), in [0, T).
        seed: int in [0, 2^64) or int64 (B,).
        step: counter of the draw in [0, 2^32), usually the training iteration.
        sample_offset: entry b is sample sample_offset + b of the seed.
        check: refuse a t out of range on a GPU too, which synchronizes.

    Source: Sohl-Dickstein et al. 2015, appendix B.
    """
    return _forward(
        "x_t", x_start, "x_start", t, schedule, seed, check_uint32("step", step),
        STREAM_BITS_Q_SAMPLE, sample_offset, check, backend,
    )  # fmt: skip


def q_step(
    x_previous: Tensor,
    t: int,
    schedule: BinomialSchedule,
    *,
    seed: int | Tensor,
    sample_offset: int = 0,
    backend: str | None = None,
) -> Tensor:
    """x_t ~ B(x_{t-1} (1 - beta_t) + beta_t / 2): one step of the chain; arguments as in q_sample.

    t is one int, since it is also the counter of the draw: steps of one chain differ.
    """
    t = check_int("t", t)
    return _forward(
        "step", x_previous, "x_previous", t, schedule, seed, t, STREAM_BITS_CHAIN, sample_offset,
        False, backend,
    )  # fmt: skip


def _forward(
    kind: str,
    x: Tensor,
    name: str,
    t: int | Tensor,
    schedule: BinomialSchedule,
    seed: int | Tensor,
    step: int,
    stream: int,
    sample_offset: int,
    check: bool,
    backend: str | None,
) -> Tensor:
    check_bits(name, x)
    check_schedule(schedule)
    check_seed(seed)
    rows = resolve_rows(t, schedule.num_timesteps, x.shape[0], x.device, check)
    table = table_of(schedule, kind, x.device, table_dtype(x))
    return _draw(x.shape, x.dtype, table, rows, seed, sample_offset, step, stream, backend, x=x)


def posterior(
    x_start: Tensor, x_t: Tensor, t: int | Tensor, schedule: BinomialSchedule, *,
    check: bool = False,
) -> Tensor:  # fmt: skip
    """q(x_{t-1} = 1 | x_t, x_0) of every bit: (B, ...), float64 for float64 x_t, else float32."""
    check_bits("x_t", x_t)
    check_bits("x_start", x_start, "x_t", x_t)
    check_schedule(schedule)
    rows = resolve_rows(t, schedule.num_timesteps, x_t.shape[0], x_t.device, check)
    table = table_of(schedule, "sample", x_t.device, table_dtype(x_t))
    row = picked(table, rows)
    column = ((x_t != 0).long() * 2 + (x_start != 0)).reshape(x_t.shape[0], -1)
    return row.expand(x_t.shape[0], 4).gather(1, column).reshape(x_t.shape)


def p_sample(
    model_output: Tensor,
    x_t: Tensor,
    t: int,
    schedule: BinomialSchedule,
    *,
    seed: int | Tensor,
    sample_offset: int = 0,
    prediction_type: str = "sample",
    backend: str | None = None,
) -> Tensor:
    """x_{t-1} ~ p(x_{t-1} | x_t), in one pass; of the dtype of x_t.

    Args:
        model_output: floating (B, ...), logits: see the module.
        x_t: bits of that shape.
        t: one int in [0, T), since it is also the counter of the draw. Of t = 0 comes x_0.
        others: as in q_sample.
    """
    check_sample("model_output", model_output)
    check_bits("x_t", x_t, "model_output", model_output)
    check_schedule(schedule)
    check_prediction(prediction_type)
    check_seed(seed)
    t = check_int("t", t)
    rows = resolve_rows(t, schedule.num_timesteps, x_t.shape[0], x_t.device, False)
    table = table_of(schedule, prediction_type, x_t.device, table_dtype(model_output))
    dtype = torch.uint8 if mixes(x_t, table.dtype) else x_t.dtype
    return _draw(
        x_t.shape, dtype, table, rows, seed, sample_offset, t, STREAM_BITS_REVERSE, backend,
        logits=model_output, x=x_t if prediction_type == "sample" else None,
    ).to(x_t.dtype)  # fmt: skip


def sample(
    model: Model,
    schedule: BinomialSchedule,
    shape: Sequence[int],
    *,
    seed: int | Tensor,
    sample_offset: int = 0,
    prediction_type: str = "sample",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    backend: str | None = None,
) -> Tensor:
    """x_0 of the reverse chain from x_T ~ B(1/2): T calls model(x_t, t) -> logits.

    Args:
        model: x_t (B, ...) of `dtype`, t int64 (B,).
        shape: (B, ...).
        dtype: floating, uint8 or bool.
        others: as in p_sample. No gradient is kept.
    """
    check_model(model)
    sizes = check_shape(shape)
    check_schedule(schedule)
    check_prediction(prediction_type)
    check_seed(seed)
    if dtype not in BITS:
        raise TypeError(f"dtype must be floating, uint8 or bool, not {dtype}")
    where, steps = torch.device(device), schedule.num_timesteps
    compute = compute_dtype(dtype if dtype in FLOATING else torch.float32)
    first = held("", index_views, 1, where)[:1]
    with torch.no_grad():
        x = _draw(
            sizes, dtype, table_of(schedule, "end", where, compute), first, seed, sample_offset,
            steps, STREAM_BITS_REVERSE, backend,
        )  # fmt: skip
        for t in reversed(range(steps)):
            logits = model(x, torch.full((sizes[0],), t, device=where))
            x = p_sample(
                logits, x, t, schedule, seed=seed, sample_offset=sample_offset,
                prediction_type=prediction_type, backend=backend,
            )  # fmt: skip
    return x
