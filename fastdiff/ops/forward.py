"""The forward process and its posterior: q_sample, q_step, q_chain, q_posterior_mean_variance.

Each is one pass over memory: q_sample, q_step and the posterior mean are rows of the fused step,
the chain is an operation of its own. `t` counts from 0: x_t of index t has been noised t + 1 times.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastdiff.backends import operation
from fastdiff.noise import STREAM_CHAIN, STREAM_Q_SAMPLE
from fastdiff.ops.call import call_step, compute_dtype, noise_from, row_major, written
from fastdiff.ops.checks import (
    check_int,
    check_like,
    check_out,
    check_sample,
    check_uint32,
    resolve_rows,
    resolve_seed,
)
from fastdiff.ops.held import held, remembered
from fastdiff.ops.step import StepSpec
from fastdiff.ops.tables import per_sample, table_of
from fastdiff.schedules import GaussianPath, NoiseSchedule, Schedule

__all__ = [
    "q_chain",
    "q_mean_variance",
    "q_posterior_mean_variance",
    "q_sample",
    "q_step",
]

TARGETS = ("epsilon", "sample", "v", "flow")


def _check_schedule(schedule: object, chain: bool = False) -> None:
    allowed = NoiseSchedule if chain else (NoiseSchedule, GaussianPath)
    if not isinstance(schedule, allowed):
        what = "a NoiseSchedule" if chain else "a schedule of fastdiff.schedules"
        raise TypeError(f"schedule must be {what}, not {type(schedule).__name__}")


def _check_one_noise(seed: object, noise: object, generator: object) -> None:
    if seed is not None and noise is None and generator is None:
        return
    given = [
        name
        for name, value in (("seed", seed), ("noise", noise), ("generator", generator))
        if value is not None
    ]
    if len(given) != 1:
        raise ValueError(
            "exactly one of seed, noise and generator must be given, "
            f"not {' and '.join(given) or 'none'}"
        )
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, not {type(generator).__name__}")


def _chain_draws(count: int, device: torch.device) -> Tensor:
    """(step, stream) = (t, STREAM_CHAIN) of every t: int64 (T, 1, 2)."""
    steps = torch.arange(count, device="cpu")
    draws = torch.stack([steps, torch.full_like(steps, STREAM_CHAIN)], dim=1)
    return draws[:, None, :].contiguous().to(device)


@remembered
def _q_sample_spec(kind: str, dtype: torch.dtype, fast: bool) -> StepSpec:
    # Columns S0, o, c, z0.
    masks = {"x_t": 9, "noise": 8, "epsilon": 8, "sample": 1, "v": 9, "flow": 9}
    outputs = tuple(masks[name] for name in kind.split("+"))
    return StepSpec(states=1, outputs=outputs, draws=1, noise_dtype=dtype, fast=fast)


def q_sample(
    x_start: Tensor,
    t: int | Tensor,
    schedule: Schedule,
    *,
    seed: int | Tensor | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    step: int = 0,
    sample_offset: int = 0,
    return_noise: bool = False,
    target: str | None = None,
    out: Tensor | None = None,
    fast: bool = False,
    check: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Draws x_t from q(x_t | x_0) in one pass over memory.

        x_t = alpha_t x_0 + sigma_t z,    alpha_t = sqrt(abar_t), sigma_t = sqrt(1 - abar_t)

    (Ho et al. 2020, eq. 4; Sohl-Dickstein et al. 2015.) Variance-exploding and flow paths use
    their own (alpha_t, sigma_t).

    Args:
        x_start: data x_0, (B, ...), float32, bfloat16, float16 or float64.
        t: int, or integer tensor (B,) or (1,), index into the schedule.
        schedule: any schedule of fastdiff.schedules.
        seed: z comes from the noise contract: an int in [0, 2^64), or int64 (B,) with one seed per
            sample. The same seed and `step` give the same noise.
        noise: z itself, the shape of x_start.
        generator: z = torch.randn(...) of x_start's shape and dtype on the generator's device.
        step: noise counter in [0, 2^32), usually the training iteration.
        sample_offset: global index of the first sample of this batch (int seeds only).
        return_noise: also return z, written in the same pass.
        target: also return a training target: "epsilon" (z), "sample" (x_0),
            "v" (alpha_t z - sigma_t x_0; Salimans & Ho 2022) or "flow" (z - x_0; Lipman 2023).
        out: tensor for x_t; may be x_start itself.
        fast: on a GPU, approximate transcendental functions in the noise (within 4e-4).
        check: read t back from a GPU and refuse values out of range (synchronizes).
        backend: "reference", "native" or "triton"; default automatic.

    Returns:
        x_t, or a tuple (x_t[, noise][, target]); shape, dtype and memory layout of x_start.

    Raises:
        ValueError, TypeError: naming the argument; before anything runs or is written.
    """
    check_sample("x_start", x_start)
    _check_schedule(schedule)
    _check_one_noise(seed, noise, generator)
    step = check_uint32("step", step)
    if target is not None and target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}, not {target!r}")
    if noise is not None:
        check_like("noise", noise, "x_start", x_start)
    rows = resolve_rows(t, schedule.num_timesteps, x_start.shape[0], x_start.device, check)
    keys, low, offset = None, 0, 0
    if seed is not None:
        keys, low, offset = resolve_seed(seed, sample_offset, x_start.shape[0], x_start.device)
    kind = "x_t" + ("+noise" if return_noise else "") + (f"+{target}" if target else "")
    spec = _q_sample_spec(kind, x_start.dtype, fast)
    if out is not None:
        inputs = [x_start] if noise is None else [x_start, noise]
        check_out("out", out, "x_start", x_start, x_start.dtype, inputs)
    table = table_of(schedule, kind, x_start)
    outputs = None
    if out is not None:
        outputs = [out] + [torch.empty_like(x_start) for _ in spec.outputs[1:]]
    results = call_step(
        [x_start], spec, table, rows, noise=noise_from(noise, generator, x_start, backend),
        keys=keys,
        counter=(low, offset, step, STREAM_Q_SAMPLE), out=outputs, backend=backend,
    )  # fmt: skip
    return results[0] if len(results) == 1 else tuple(results)


def q_step(
    x_prev: Tensor,
    t: int | Tensor,
    schedule: NoiseSchedule,
    *,
    seed: int | Tensor | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    sample_offset: int = 0,
    out: Tensor | None = None,
    fast: bool = False,
    check: bool = False,
    backend: str | None = None,
) -> Tensor:
    """One step of the forward chain: x_t from q(x_t | x_{t-1}) in one pass.

        x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) z          (Ho et al. 2020, eq. 2)

    Seeded noise is stream 4, step t, so T calls equal one q_chain bit for bit. Arguments, dtypes
    and errors as in q_sample.
    """
    check_sample("x_prev", x_prev)
    _check_schedule(schedule, chain=True)
    _check_one_noise(seed, noise, generator)
    if noise is not None:
        check_like("noise", noise, "x_prev", x_prev)
    rows = resolve_rows(t, schedule.num_timesteps, x_prev.shape[0], x_prev.device, check)
    keys, low, offset = None, 0, 0
    if seed is not None:
        keys, low, offset = resolve_seed(seed, sample_offset, x_prev.shape[0], x_prev.device)
    if out is not None:
        inputs = [x_prev] if noise is None else [x_prev, noise]
        check_out("out", out, "x_prev", x_prev, x_prev.dtype, inputs)
    spec = StepSpec(states=1, outputs=(9,), draws=1, noise_dtype=x_prev.dtype, fast=fast)
    return call_step(
        [x_prev], spec,
        table_of(schedule, "step", x_prev), rows,
        noise=noise_from(noise, generator, x_prev, backend), keys=keys,
        draws=held("", _chain_draws, schedule.num_timesteps, x_prev.device),
        counter=(low, offset, 0, 0), out=None if out is None else [out], backend=backend,
    )[0]  # fmt: skip


def q_chain(
    x_start: Tensor,
    schedule: NoiseSchedule,
    *,
    seed: int | Tensor | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    sample_offset: int = 0,
    at: Sequence[int] | None = None,
    out: Tensor | None = None,
    fast: bool = False,
    backend: str | None = None,
) -> Tensor:
    """The whole forward chain x_1 .. x_T from q(x_{1:T} | x_0), reading x_0 once.

        q(x_{1:T} | x_0) = prod_t q(x_t | x_{t-1})               (Ho et al. 2020, eq. 2)

    Args:
        x_start: data x_0, (B, ...).
        schedule: NoiseSchedule of T steps.
        seed, sample_offset: noise of stream 4, step t; see q_sample.
        noise: (T, B, ...) instead of a seed.
        generator: noise = torch.randn((T, B, ...)) of x_start's dtype on the generator's device.
        at: the indices t to keep, strictly increasing; all T by default. Others before the last of
            them are passed through in registers and never stored.
        out: (len(at), B, ...) contiguous, the dtype of x_start.

    Returns:
        (len(at), B, ...): x of every kept t, rounded to x_start's dtype after every step. Not
        differentiable; use q_step for gradients.
    """
    check_sample("x_start", x_start)
    _check_schedule(schedule, chain=True)
    _check_one_noise(seed, noise, generator)
    count = schedule.num_timesteps
    kept = list(range(count))
    if at is not None:
        kept = [check_int("at", t, "a sequence of ints") for t in at]
    if not kept or any(not 0 <= t < count for t in kept) or kept != sorted(set(kept)):
        raise ValueError(f"at must be strictly increasing indices in [0, {count}), not {at!r}")
    keys, low, offset = None, 0, 0
    if seed is not None:
        keys, low, offset = resolve_seed(seed, sample_offset, x_start.shape[0], x_start.device)
    if noise is not None:
        check_like(
            "noise", noise, "x_start repeated T times", x_start.expand(count, *x_start.shape)
        )
    for name, value in (("x_start", x_start), ("noise", noise)):
        if value is not None and value.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} requires grad: q_chain is not differentiable, use q_step")
    shape = (len(kept), *x_start.shape)
    if out is None:
        out = torch.empty(shape, dtype=x_start.dtype, device=x_start.device)
    else:
        inputs = [x_start] if noise is None else [x_start, noise]
        check_out(
            "out", out, "(len(at), *x_start.shape)", x_start.expand(shape), x_start.dtype, inputs
        )
    target = row_major(out)
    drawn = noise_from(noise, generator, x_start, backend, (count, *x_start.shape))
    place, steps = (x_start.device, compute_dtype(x_start.dtype)), kept[-1] + 1
    operation("chain", *place, backend)(
        x_start.contiguous(), drawn[0][:steps].contiguous() if drawn else None,
        held(schedule.fingerprint, _chain_table, schedule, *place)[:steps],
        held("", _chain_slots, tuple(kept), x_start.device), keys, low, offset, fast, target,
    )  # fmt: skip
    if target is not out:
        out.copy_(target)
    written([out])
    return out


def _chain_slots(kept: tuple[int, ...], device: torch.device) -> Tensor:
    """Where x of every t up to the last goes: its position in `kept`, or -1."""
    slots = np.full(kept[-1] + 1, -1, np.int64)
    slots[list(kept)] = np.arange(len(kept))
    return torch.from_numpy(slots).to(device)


def _chain_table(schedule: NoiseSchedule, device: torch.device, dtype: torch.dtype) -> Tensor:
    rows = np.stack([np.sqrt(schedule.alphas), np.sqrt(schedule.betas)], axis=1)
    return torch.from_numpy(rows).to(device=device, dtype=dtype)


def q_mean_variance(
    x_start: Tensor,
    t: int | Tensor,
    schedule: Schedule,
    *,
    out: Tensor | None = None,
    check: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and log-variance of q(x_t | x_0) = N(alpha_t x_0, sigma_t^2 I).

    (Ho et al. 2020, eq. 4.) Variance and log-variance are per-sample numbers expanded to the shape
    of x_start without memory of their own. `out` takes the mean. Arguments and errors as in
    q_sample.
    """
    check_sample("x_start", x_start)
    _check_schedule(schedule)
    rows = resolve_rows(t, schedule.num_timesteps, x_start.shape[0], x_start.device, check)
    if out is not None:
        check_out("out", out, "x_start", x_start, x_start.dtype, [x_start])
    mean = call_step(
        [x_start], StepSpec(states=1, outputs=(1,)), table_of(schedule, "mean", x_start), rows,
        out=None if out is None else [out], backend=backend,
    )[0]  # fmt: skip
    variance, log_variance = per_sample(schedule, ("variance", "log_variance"), rows, x_start)
    return mean, variance, log_variance


_POSTERIOR = StepSpec(states=2, outputs=(3,))


def q_posterior_mean_variance(
    x_start: Tensor,
    x_t: Tensor,
    t: int | Tensor,
    schedule: NoiseSchedule,
    *,
    out: Tensor | None = None,
    check: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and clipped log-variance of q(x_{t-1} | x_t, x_0).

        mean = c1_t x_0 + c2_t x_t,   c1_t = beta_t sqrt(abar_{t-1}) / (1 - abar_t),
        c2_t = (1 - abar_{t-1}) sqrt(alpha_t) / (1 - abar_t)
        variance = beta_t (1 - abar_{t-1}) / (1 - abar_t)              (Ho et al. 2020, eqs. 6, 7)

    The log-variance at t = 0 is that of t = 1, because the variance there is 0 (Nichol & Dhariwal
    2021). Variance and log-variance are per-sample numbers expanded to the shape of x_t without
    memory of their own.

    Args:
        x_start, x_t: (B, ...), one shape and device; the mean has x_t's dtype.
        out: tensor for the mean; may be one of the inputs.
        t, schedule, check, backend: as in q_sample.
    """
    check_sample("x_start", x_start)
    check_like("x_t", x_t, "x_start", x_start)
    _check_schedule(schedule, chain=True)
    rows = resolve_rows(t, schedule.num_timesteps, x_t.shape[0], x_t.device, check)
    if out is not None:
        check_out("out", out, "x_t", x_t, x_t.dtype, [x_start, x_t])
    mean = call_step(
        [x_start, x_t], _POSTERIOR,
        table_of(schedule, "posterior", x_t), rows,
        out_dtypes=[x_t.dtype], out=None if out is None else [out], backend=backend,
    )[0]  # fmt: skip
    variance, log_variance = per_sample(
        schedule, ("posterior_variance", "posterior_log_variance_clipped"), rows, x_t
    )
    return mean, variance, log_variance
