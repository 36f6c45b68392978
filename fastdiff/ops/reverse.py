"""One reverse step at any t of a chain: p_mean_variance, p_sample, ddim_sample.

Thin functions over rows of the plans of fastdiff/solvers: the row of t in the plan over all T
steps, so a loop of p_sample with one seed equals fastdiff.sample with that plan bit for bit.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdiff.compiling import constant
from fastdiff.ops.call import call_step, compute_dtype, noise_from
from fastdiff.ops.checks import check_like, check_out, check_sample, resolve_rows, resolve_seed
from fastdiff.ops.exp import exp
from fastdiff.ops.forward import _check_one_noise, _check_schedule
from fastdiff.ops.held import held, remembered
from fastdiff.ops.step import StepSpec
from fastdiff.plan import SolverPlan
from fastdiff.program import uniform
from fastdiff.schedules import NoiseSchedule
from fastdiff.schedules._values import as_float
from fastdiff.solvers.checks import check_clip
from fastdiff.solvers.ddim import ddim
from fastdiff.solvers.ddpm import ddpm

__all__ = ["ddim_sample", "p_mean_variance", "p_sample"]

Clip = tuple[float, float] | None


@lru_cache(maxsize=64)
def _ddpm_plan(schedule: NoiseSchedule, prediction: str, variance: str, clip: Clip) -> SolverPlan:
    return ddpm(schedule, prediction_type=prediction, variance=variance, clip=clip)


@lru_cache(maxsize=64)
def _ddim_plan(
    schedule: NoiseSchedule, prediction: str, eta: float, clip: Clip, reclip: bool, reverse: bool
) -> SolverPlan:
    return ddim(
        schedule, prediction_type=prediction, eta=eta, clip=clip,
        use_clipped_model_output=reclip, reverse=reverse,
    )  # fmt: skip


class _Rows(NamedTuple):
    """What a call needs of a plan, as constants and tensors that torch.compile can hold."""

    spec: StepSpec
    rows: int
    noisy: bool
    table: Tensor
    draws: Tensor


def _plan(kind: str, schedule: NoiseSchedule, arguments: tuple[Any, ...]) -> SolverPlan:
    return (_ddpm_plan if kind == "ddpm" else _ddim_plan)(schedule, *arguments)


@constant
def _structure(
    fingerprint: str, kind: str, schedule: NoiseSchedule, arguments: tuple[Any, ...], preview: bool
) -> tuple[int, ...]:
    # The fingerprint makes a compiled graph guard on the schedule's content.
    plan = _plan(kind, schedule, arguments)
    spec = uniform(plan, preview).spec(plan, torch.float32)
    clamp = -1 if spec.clamp is None else spec.clamp
    noisy = int(plan.draws_noise.any())
    return plan.rows, plan.n_draws, noisy, int(plan.learned), clamp, *spec.outputs


def _by_t(plan: SolverPlan, rows: np.ndarray) -> Tensor:
    """Rows of the plan in the order of t: samplers go down, reverse samplers up."""
    return torch.from_numpy(np.array(rows[::-1] if plan.t[0] > plan.t[-1] else rows))


def _table(
    kind: str, schedule: NoiseSchedule, arguments: tuple[Any, ...], preview: bool,
    device: torch.device, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    plan = _plan(kind, schedule, arguments)
    return _by_t(plan, uniform(plan, preview).table(plan)).to(device=device, dtype=dtype)


def _draws(
    kind: str, schedule: NoiseSchedule, arguments: tuple[Any, ...], device: torch.device
) -> Tensor:
    plan = _plan(kind, schedule, arguments)
    return _by_t(plan, plan.draws).to(device)


@remembered
def _spec_of(
    kind: str, schedule: NoiseSchedule, arguments: tuple[Any, ...], preview: bool, fast: bool,
    dtype: torch.dtype,
) -> tuple[StepSpec, int, bool]:  # fmt: skip
    structure = _structure(schedule.fingerprint, kind, schedule, arguments, preview)
    rows, draws, noisy, learned, clamp, *outputs = structure
    spec = StepSpec(
        states=1, outputs=tuple(outputs), clamp=None if clamp < 0 else clamp,
        draws=draws, noise_dtype=dtype, learned=bool(learned), fast=fast,
    )  # fmt: skip
    return spec, rows, bool(noisy)


def _rows_of(
    kind: str, schedule: NoiseSchedule, arguments: tuple[Any, ...], preview: bool, fast: bool,
    x_t: Tensor,
) -> _Rows:  # fmt: skip
    device, dtype = x_t.device, x_t.dtype
    key = (kind, schedule, arguments)
    table = held(schedule.fingerprint, _table, *key, preview, device, compute_dtype(dtype))
    draws = held(schedule.fingerprint, _draws, *key, device)
    return _Rows(*_spec_of(*key, preview, fast, dtype), table, draws)


def _check_names(**names: object) -> None:
    """Before they become keys of a cache: what they must be is the plan builder's to say."""
    for argument, name in names.items():
        if not isinstance(name, str):
            raise TypeError(f"{argument} must be a string, not {type(name).__name__}")


def _check_model_output(model_output: Tensor, x_t: Tensor, learned: bool) -> None:
    if not learned:
        check_like("model_output", model_output, "x_t", x_t)
        return
    if x_t.dim() < 2:
        raise ValueError("x_t must be (B, C, ...): a learned variance doubles the channels")
    expected = x_t.new_empty((1,)).expand(x_t.shape[0], 2 * x_t.shape[1], *x_t.shape[2:])
    check_like("model_output", model_output, "x_t with twice the channels", expected)


def _reverse_step(
    kind: str,
    schedule: NoiseSchedule,
    arguments: tuple[Any, ...],
    model_output: Tensor,
    x_t: Tensor,
    t: int | Tensor,
    seed: int | Tensor | None,
    noise: Tensor | None,
    generator: torch.Generator | None,
    sample_offset: int,
    return_x_start: bool,
    out: Tensor | None,
    fast: bool,
    check: bool,
    backend: str | None,
) -> Tensor | tuple[Tensor, Tensor]:
    _check_schedule(schedule, chain=True)
    _check_names(prediction_type=arguments[0])
    check_sample("x_t", x_t)
    plan = _rows_of(kind, schedule, arguments, return_x_start, fast, x_t)
    _check_model_output(model_output, x_t, plan.spec.learned)
    if plan.noisy or any(v is not None for v in (seed, noise, generator)):
        _check_one_noise(seed, noise, generator)
    if noise is not None:
        check_like("noise", noise, "x_t", x_t)
    rows = resolve_rows(t, plan.rows, x_t.shape[0], x_t.device, check)
    keys, low, offset = resolve_seed(
        0 if seed is None else seed, sample_offset, x_t.shape[0], x_t.device
    )
    inputs = [x_t, model_output] + ([] if noise is None else [noise])
    outputs = None
    if out is not None:
        check_out("out", out, "x_t", x_t, x_t.dtype, inputs)
        outputs = [out] + ([torch.empty_like(x_t)] if return_x_start else [])
    results = call_step(
        [x_t], plan.spec, plan.table, rows, model_outputs=[model_output],
        noise=noise_from(noise, generator, x_t, backend)[: plan.spec.draws], keys=keys,
        draws=plan.draws, counter=(low, offset, 0, 0), out=outputs, backend=backend,
    )  # fmt: skip
    return (results[0], results[1]) if return_x_start else results[0]


def p_sample(
    model_output: Tensor,
    x_t: Tensor,
    t: int | Tensor,
    schedule: NoiseSchedule,
    *,
    prediction_type: str = "epsilon",
    variance: str = "fixed_small",
    clip: Clip = (-1.0, 1.0),
    seed: int | Tensor | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    sample_offset: int = 0,
    return_x_start: bool = False,
    out: Tensor | None = None,
    fast: bool = False,
    check: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Draws x_{t-1} from p(x_{t-1} | x_t), one pass (Ho et al. 2020, algorithm 2, line 4).

    No noise is added at t = 0. Seeded noise is stream 1, step T - 1 - t: the plan's row.

    Args:
        model_output: (B, ...), with twice the channels (dim 1) for variance="learned_range".
        x_t: (B, ...).
        t: index into the schedule, int or integer (B,) or (1,); may differ between samples.
        schedule: the chain stepped through; for fewer steps, schedule.spaced(...).
        prediction_type, variance, clip: as in fastdiff.solvers.ddpm.
        seed, noise, generator, sample_offset, out, fast, check, backend: as in q_sample.
        return_x_start: also return the (clipped) x_0, from the same pass.
    """
    _check_names(variance=variance)
    return _reverse_step(
        "ddpm", schedule, (prediction_type, variance, check_clip(clip)), model_output, x_t, t, seed,
        noise, generator, sample_offset, return_x_start, out, fast, check, backend,
    )  # fmt: skip


def ddim_sample(
    model_output: Tensor,
    x_t: Tensor,
    t: int | Tensor,
    schedule: NoiseSchedule,
    *,
    eta: float = 0.0,
    prediction_type: str = "epsilon",
    clip: Clip = (-1.0, 1.0),
    use_clipped_model_output: bool = True,
    reverse: bool = False,
    seed: int | Tensor | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    sample_offset: int = 0,
    return_x_start: bool = False,
    out: Tensor | None = None,
    fast: bool = False,
    check: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """One DDIM step from t to t - 1 (or t + 1 in reverse) of the chain (Song et al. 2021, eq. 12).

    Noise is needed when eta > 0 only. Arguments as in p_sample and fastdiff.solvers.ddim.
    """
    bounds = check_clip(clip)
    return _reverse_step(
        "ddim", schedule,
        (prediction_type, as_float("eta", eta), bounds, use_clipped_model_output, reverse),
        model_output, x_t, t, seed, noise, generator, sample_offset, return_x_start, out, fast,
        check, backend,
    )  # fmt: skip


def p_mean_variance(
    model_output: Tensor,
    x_t: Tensor,
    t: int | Tensor,
    schedule: NoiseSchedule,
    *,
    prediction_type: str = "epsilon",
    variance: str = "fixed_small",
    clip: Clip = (-1.0, 1.0),
    out: Tensor | None = None,
    check: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean, variance, log-variance of p(x_{t-1} | x_t) and the predicted x_0.

    Mean and x_0 come from one pass; `out` takes the mean. Variance and log-variance are per-sample
    numbers expanded to the shape of x_t; with variance="learned_range" they are full tensors made
    by a few PyTorch operations (Nichol & Dhariwal 2021, eq. 15), in the arithmetic of the step.
    Arguments as in p_sample.
    """
    _check_schedule(schedule, chain=True)
    check_sample("x_t", x_t)
    _check_names(prediction_type=prediction_type, variance=variance)
    arguments = (prediction_type, variance, check_clip(clip))
    # The plan's rows with x_0 as second output; the noise column, last, is masked off.
    plan = _rows_of("ddpm", schedule, arguments, True, False, x_t)
    learned = plan.spec.learned
    _check_model_output(model_output, x_t, learned)
    spec = replace(plan.spec, outputs=tuple(mask & 7 for mask in plan.spec.outputs))
    rows = resolve_rows(t, plan.rows, x_t.shape[0], x_t.device, check)
    outputs = None
    if out is not None:
        check_out("out", out, "x_t", x_t, x_t.dtype, [x_t, model_output])
        outputs = [out, torch.empty_like(x_t)]
    # Before `out` overwrites an input.
    compute = compute_dtype(x_t.dtype)
    v = model_output[:, x_t.shape[1] :].to(compute) if learned else None
    mean, x_start = call_step(
        [x_t], spec, plan.table, rows, model_outputs=[model_output], draws=plan.draws, out=outputs,
        backend=backend,
    )  # fmt: skip
    bounds = held(
        schedule.fingerprint, _uploaded_variances, schedule, variance, x_t.device, compute
    )
    inside = (rows >= 0) & (rows < plan.rows)
    picked = torch.where(inside[:, None], bounds[torch.where(inside, rows, 0)], torch.nan)
    low, high = (picked[:, k].reshape(-1, *[1] * (x_t.dim() - 1)) for k in (0, 1))
    if v is None:
        low, high = (value.to(x_t.dtype).expand(x_t.shape) for value in (low, high))
        return mean, low, high, x_start
    f = v * 0.5 + 0.5
    log_variance = f * high + (1.0 - f) * low
    return mean, exp(log_variance).to(x_t.dtype), log_variance.to(x_t.dtype), x_start


def _uploaded_variances(
    schedule: NoiseSchedule, variance: str, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """(T, 2): variance and log-variance at t, or the log bounds of a learned range."""
    small_log = schedule.posterior_log_variance_clipped
    if variance == "fixed_small":
        columns = [schedule.posterior_variance, small_log]
    elif variance == "fixed_large":
        large_log = np.append(small_log[:1], np.log(schedule.betas[1:]))
        columns = [np.exp(large_log), large_log]
    else:
        columns = [small_log, np.log(schedule.betas)]
    return torch.from_numpy(np.stack(columns, axis=1)).to(device=device, dtype=dtype)
