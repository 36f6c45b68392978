"""The variational bound on log p(x_0), term by term in bits per dimension.

    -log p(x_0) <= L_T + sum_{t>1} L_{t-1} + L_0                       (Ho et al. 2020, eq. 5)
    L_T     = KL(q(x_T | x_0) || N(0, I))                              prior_bpd
    L_{t-1} = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))            vb_terms_bpd, t > 0
    L_0     = -log p(x_0 | x_1), 256 bins on [-1, 1] (eq. 13)          vb_terms_bpd, t = 0

A term is one pass over memory (fastdiff/ops/loss.py), whatever the variance: fixed, learned, or
learned in a range (Nichol & Dhariwal 2021).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdiff.ops.call import call_step, compute_dtype, noise_from, pack_table
from fastdiff.ops.call_loss import call_loss
from fastdiff.ops.checks import check_floating, check_like, check_sample, resolve_rows
from fastdiff.ops.exp import exp
from fastdiff.ops.forward import _check_one_noise, _check_schedule, q_sample
from fastdiff.ops.held import held
from fastdiff.ops.loss import ERROR, LossSpec, pairwise_sum
from fastdiff.ops.loss_terms import discretized_nll
from fastdiff.ops.reverse import _check_model_output
from fastdiff.ops.step import StepSpec
from fastdiff.ops.tables import per_sample
from fastdiff.progress import track
from fastdiff.schedules import NoiseSchedule
from fastdiff.schedules._values import FloatArray, as_flag, as_int
from fastdiff.solvers.checks import check_clip, check_positive
from fastdiff.training.isotropic_limit import warn_unless_isotropic
from fastdiff.training.tables import (
    OUTPUT,
    BoundKind,
    bound_spec,
    pack_columns,
    table_of,
    x_start_columns,
)

__all__ = [
    "BitsPerDim", "bound_terms", "calc_bpd_loop", "discretized_gaussian_log_likelihood",
    "normal_kl", "prior_bpd", "prior_term", "vb_terms_bpd",
]  # fmt: skip


def normal_kl(
    mean1: Tensor | float, logvar1: Tensor | float, mean2: Tensor | float, logvar2: Tensor | float
) -> Tensor:
    """KL(N(mean1, e^logvar1) || N(mean2, e^logvar2)) per element in nats; shapes broadcast.

        0.5 (logvar2 - logvar1 - 1 + e^(logvar1 - logvar2) + (mean1 - mean2)^2 e^-logvar2)

    Raises TypeError when none of the four is a tensor, or a tensor is not floating.
    """
    given = {"mean1": mean1, "logvar1": logvar1, "mean2": mean2, "logvar2": logvar2}
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    if not tensors:
        raise TypeError("mean1, logvar1, mean2 or logvar2 must be a tensor, not all numbers")
    for name, value in tensors.items():
        check_floating(name, value.dtype)
    like = next(iter(tensors.values()))
    log1, log2 = (
        v if isinstance(v, Tensor) else torch.tensor(v, dtype=like.dtype, device=like.device)
        for v in (logvar1, logvar2)
    )
    distance = (mean1 - mean2) ** 2 * torch.exp(-log2)
    return 0.5 * (log2 - log1 + torch.expm1(log1 - log2) + distance)


def discretized_gaussian_log_likelihood(
    x: Tensor, *, means: Tensor, log_scales: Tensor, floor: float = math.inf
) -> Tensor:
    """log of the probability of the bin of x under N(means, e^(2 log_scales)), elementwise, nats.

    Ho et al. 2020, eq. 13: 256 bins of width 2/255 on [-1, 1], the outer two open, the normal CDF
    by its tanh approximation (Page 1977). Exact in the tails, where differences of that CDF vanish.

    Args:
        x, means, log_scales: floating, one shape. float64 where one of them is, else float32 math.
        floor: the result is at least -floor, in nats.

    Raises TypeError for what is not floating, ValueError unless the three shapes agree, or where
    floor is not > 0.
    """
    for name, value in (("x", x), ("means", means), ("log_scales", log_scales)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, not {type(value).__name__}")
        check_floating(name, value.dtype)
    if not x.shape == means.shape == log_scales.shape:
        raise ValueError(
            "x, means and log_scales must have one shape, not "
            f"{tuple(x.shape)}, {tuple(means.shape)}, {tuple(log_scales.shape)}"
        )
    most = _check_floor(floor)
    dtype = torch.promote_types(torch.promote_types(x.dtype, means.dtype), log_scales.dtype)
    compute = compute_dtype(dtype)
    x, means, log_scales = (value.to(compute) for value in (x, means, log_scales))
    limit = torch.full((), most, dtype=compute, device=x.device)
    return -discretized_nll(x, x - means, exp(-log_scales), limit).to(dtype)


def _check_floor(floor: float) -> float:
    return math.inf if floor == math.inf else check_positive("floor", floor)


def bound_terms(
    schedule: NoiseSchedule,
    kind: BoundKind,
    model_output: Tensor,
    x_start: Tensor,
    x_t: Tensor,
    rows: Tensor,
    *,
    noise: Sequence[Tensor] = (),
    backend: str | None = None,
) -> Tensor:
    """The terms that `kind` names, in the order target error, bound, error of x_0: (K, B).

    One pass, on checked arguments; differentiable.

    Args:
        rows: int64 (B,) or (1,), t.
        noise: [z] where the target is made of it.
    """
    elements = x_t.numel() // x_t.shape[0]
    dtype = compute_dtype(model_output.dtype)
    table = table_of(schedule, kind, elements, x_t.device, dtype)
    return call_loss(
        bound_spec(kind), [model_output], x_start, x_t, table, rows, noise=noise, backend=backend
    )


def vb_terms_bpd(
    model_output: Tensor,
    x_start: Tensor,
    x_t: Tensor,
    t: int | Tensor,
    schedule: NoiseSchedule,
    *,
    prediction_type: str = "epsilon",
    variance: str = "fixed_small",
    clip: tuple[float, float] | None = (-1.0, 1.0),
    floor: float = math.inf,
    return_x_start: bool = False,
    check: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """One term of the variational bound in bits per dimension, one pass; see the module.

    KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), and -log p(x_0 | x_1) at t = 0 (Ho et al. 2020,
    eqs. 5, 8, 13). The log-variance of q is the clipped one, that of t = 1 at t = 0.

    Args:
        model_output: (B, ...), with twice the channels (dim 1) where the variance is learned.
        x_start, x_t: (B, ...), x_0 in [-1, 1] on a grid of 256 values.
        t: int, or integer tensor (B,) or (1,), index into the schedule.
        schedule: the chain.
        prediction_type: "epsilon", "sample", "v_prediction", "flow", or "previous": the output is
            the mean of x_{t-1}, and clip concerns the returned x_0 only.
        variance: "fixed_small" (the posterior's), "fixed_large" (beta_t), "learned" (the further
            channels are its logarithm) or "learned_range" (Nichol & Dhariwal 2021, eq. 15).
        clip: bounds of the predicted x_0, or None.
        floor: the most that an element costs at t = 0 in nats; DDPM's code has -log(1e-12).
        return_x_start: also return the (clipped) prediction of x_0, from a pass of its own.
        check, backend: as in q_sample.

    Returns:
        (B,) float32, float64 for float64 data; differentiable. With return_x_start also (B, ...)
        in x_t's dtype.

    Warns:
        UserWarning: as `isotropic`.

    Raises:
        ValueError, TypeError: naming the argument; before anything runs.
    """
    kind = _bound_kind(schedule, prediction_type, variance, clip, floor)
    rows = _check_pair(x_start, x_t, t, schedule, check)
    _check_model_output(model_output, x_t, kind.learned)
    warn_unless_isotropic(schedule)
    terms = bound_terms(schedule, kind, model_output, x_start, x_t, rows, backend=backend)
    if not return_x_start:
        return terms[0]
    table = held(
        schedule.fingerprint, _x_start_table, schedule, prediction_type, kind.clip, x_t.device,
        compute_dtype(x_t.dtype),
    )  # fmt: skip
    mask = 2 if prediction_type == "sample" else 3
    predicted = call_step(
        [x_t], StepSpec(states=1, outputs=(4,), clamp=mask, learned=kind.learned), table, rows,
        model_outputs=[model_output], backend=backend,
    )[0]  # fmt: skip
    return terms[0], predicted


def _bound_kind(
    schedule: NoiseSchedule,
    prediction_type: str,
    variance: str,
    clip: tuple[float, float] | None,
    floor: float,
) -> BoundKind:
    _check_schedule(schedule, chain=True)
    kind = BoundKind(prediction_type, variance, check_clip(clip), floor=_check_floor(floor))
    bound_spec(kind)  # refuses
    return kind


def _check_pair(
    x_start: Tensor, x_t: Tensor, t: int | Tensor, schedule: NoiseSchedule, check: bool
) -> Tensor:
    """t as rows."""
    check_sample("x_start", x_start)
    check_like("x_t", x_t, "x_start", x_start)
    return resolve_rows(t, schedule.num_timesteps, x_t.shape[0], x_t.device, check)


def _x_start_table(
    schedule: NoiseSchedule,
    prediction_type: str,
    clip: tuple[float, float] | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """The step that gives the predicted x_0 alone: columns x_t, o, c."""
    p, q = x_start_columns(schedule, prediction_type)
    zero = np.zeros_like(p)
    lo, hi = clip or (-math.inf, math.inf)
    table = pack_table(
        schedule.num_timesteps, [np.stack([zero, zero, zero + 1.0], axis=1)],
        np.stack([p, q], axis=1), {"lo": lo, "hi": hi},
    )  # fmt: skip
    return torch.from_numpy(table).to(device=device, dtype=dtype)


def prior_bpd(x_start: Tensor, schedule: NoiseSchedule, *, backend: str | None = None) -> Tensor:
    """KL(q(x_T | x_0) || N(0, I)) in bits per dimension: L_T of Ho et al. 2020, eq. 5.

    No model can lower it: it measures how far the schedule ends from noise (see `isotropic`).

    Args:
        x_start: x_0, (B, ...).

    Returns:
        (B,) float32, float64 for float64 data; one pass, differentiable.

    Warns:
        UserWarning: as `isotropic`.
    """
    check_sample("x_start", x_start)
    _check_schedule(schedule, chain=True)
    warn_unless_isotropic(schedule)
    return prior_term(x_start, schedule, backend=backend)


def prior_term(x_start: Tensor, schedule: NoiseSchedule, *, backend: str | None = None) -> Tensor:
    """prior_bpd without its checks and its warning."""
    elements = x_start.numel() // x_start.shape[0]
    table = held(
        schedule.fingerprint, _prior_table, schedule, elements, x_start.device,
        compute_dtype(x_start.dtype),
    )  # fmt: skip
    rows = resolve_rows(0, 1, x_start.shape[0], x_start.device, False)
    # The square of alpha_T x_0, with x_0 where losses have the model's output.
    spec = LossSpec(ERROR, error=OUTPUT)
    return call_loss(spec, [x_start], None, None, table, rows, backend=backend)[0]


def _prior_table(
    schedule: NoiseSchedule, elements: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    columns: dict[str, FloatArray | float] = {
        "e_o": schedule.alpha_t[-1:],
        "error_scale": 0.5 / math.log(2.0) / max(elements, 1),
        # What a zero costs: 0.5 (-abar - log(1 - abar)).
        "error_offset": schedule.prior_kl(0.0)[-1:] / math.log(2.0),
    }
    return torch.from_numpy(pack_columns(1, columns)).to(device=device, dtype=dtype)


class BitsPerDim(NamedTuple):
    """The bound of every sample and its parts, in bits per dimension.

    Attributes:
        total_bpd: (B,), prior_bpd and all of vb.
        prior_bpd: (B,), L_T.
        vb: (B, T), the terms of all t, the noisiest first.
        xstart_mse: (B, T), mean squared error of the predicted x_0 (clipped).
        mse: (B, T), that of the noise that this x_0 stands for.
    """

    total_bpd: Tensor
    prior_bpd: Tensor
    vb: Tensor
    xstart_mse: Tensor
    mse: Tensor


@torch.no_grad()
def calc_bpd_loop(
    model: Callable[[Tensor, Tensor], Tensor],
    x_start: Tensor,
    schedule: NoiseSchedule,
    *,
    prediction_type: str = "epsilon",
    variance: str = "fixed_small",
    clip: tuple[float, float] | None = (-1.0, 1.0),
    floor: float = math.inf,
    seed: int | Tensor | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    sample_offset: int = 0,
    batch_t: int = 1,
    progress: bool = False,
    backend: str | None = None,
) -> BitsPerDim:
    """The whole variational bound of data, by one model call for every t (Ho et al. 2020, eq. 5).

    x_t of every t is drawn anew from q(x_t | x_0). The bound's term and the error of x_0 come from
    one pass; the error of epsilon is SNR(t) times the latter, because x_t holds the noise.

    Args:
        model: model(x_t, t) -> output, x_t (B, ...), t (B,) the schedule's timesteps: int64, or
            float32 where some are not whole. Called from t = T - 1 down to 0, without gradients.
        x_start: x_0, (B, ...), best in float32: x_t has its dtype.
        seed: noise of q_sample's stream with step = t, see q_sample.
        noise: (T, B, ...) by t instead.
        generator: torch.randn for every t, from T - 1 down.
        sample_offset: global index of the first sample (int seeds only): a data set in several
            calls has the bits that it has in one.
        batch_t: how many t one model call takes: x_t is then (k B, ...), the samples of the first t
            first. The result has the same bits if the model treats its samples alike in any batch.
        progress: show a progress bar on stderr.
        prediction_type, variance, clip, floor, backend: as in vb_terms_bpd.

    Returns:
        float32, float64 for float64 data.

    Warns:
        UserWarning: as `isotropic`.

    Raises:
        ValueError, TypeError: naming the argument; before the model runs.
    """
    if not callable(model):
        raise TypeError(f"model must be callable, not {type(model).__name__}")
    kind = _bound_kind(schedule, prediction_type, variance, clip, floor)
    kind = kind._replace(x_start_error=True)
    check_sample("x_start", x_start)
    _check_one_noise(seed, noise, generator)
    T, B, device = schedule.num_timesteps, x_start.shape[0], x_start.device
    if noise is not None:
        check_like("noise", noise, "x_start of every t", x_start.expand(T, *x_start.shape))
    batch_t = min(as_int("batch_t", batch_t, 1), T)
    as_flag("progress", progress)
    # What is not defined is refused before the model runs.
    table_of(schedule, kind, x_start.numel() // B, device, compute_dtype(x_start.dtype))
    warn_unless_isotropic(schedule)

    down = torch.arange(T - 1, -1, -1, device=device)
    seen = held(schedule.fingerprint, _model_times, schedule, device)[down]
    rows = down.repeat_interleave(B)
    x_t = torch.empty((batch_t * B, *x_start.shape[1:]), dtype=x_start.dtype, device=device)
    found = []
    for first in track(range(0, T, batch_t), "bits per dimension", enabled=progress):
        count = min(batch_t, T - first)
        for k in range(count):
            t = T - 1 - first - k
            drawn = noise_from(None if noise is None else noise[t], generator, x_start, backend)
            q_sample(
                x_start, t, schedule, seed=seed, noise=drawn[0] if drawn else None, step=t,
                sample_offset=sample_offset, out=x_t[k * B : (k + 1) * B], backend=backend,
            )  # fmt: skip
        given = x_t[: count * B]
        output = model(given, seen[first : first + count].repeat_interleave(B))
        _check_model_output(output, given, kind.learned)
        for k in range(count):
            here = slice(k * B, (k + 1) * B)
            at = rows[(first + k) * B : (first + k + 1) * B]
            found.append(
                bound_terms(schedule, kind, output[here], x_start, given[here], at, backend=backend)
            )
    vb, xstart_mse = torch.stack(found, dim=2)
    prior = prior_term(x_start, schedule, backend=backend)
    (snr,) = per_sample(schedule, ("snr",), down, xstart_mse[0])
    # A fixed order of the sum: the same bits for any split of the batch.
    return BitsPerDim(pairwise_sum(vb) + prior, prior, vb, xstart_mse, xstart_mse * snr)


def _model_times(schedule: NoiseSchedule, device: torch.device) -> Tensor:
    times = torch.from_numpy(np.array(schedule.timesteps))
    return (times.float() if times.is_floating_point() else times).to(device)
