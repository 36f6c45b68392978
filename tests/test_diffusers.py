"""Accelerated schedulers of diffusers against diffusers' own, over the space of their options.

Accuracy is judged against upstream's own code in float64 with the same tables and noise: over a
full loop the rms error may be at most twice upstream's (and a rounding's more in float32).
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings

from fastdiff.integrations.diffusers import accelerate
from tests.conftest import load_helper

dc = load_helper("diffusers_cases")
FP32, FP64 = dc.FP32, dc.FP64
pytestmark = load_helper("scheduler_runs").UPSTREAM_WARNINGS

# Always the same examples, whatever ran before.
FIXED = settings(
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],  # a failing example is small enough as it is
)
# Upstream's numbers are then infinite on the way and finite again behind a clamp, or (indexing)
# take the first three channels of a model output with a variance: no linear form does that.
# A history that is too ill-conditioned to be condensed is left to upstream too.
UPSTREAM_ONLY = (
    "is not in the span of its history",
    "divide by 0.0",
    "divide by -0.0",
    "divide by -inf",
    "indexing takes images apart",
)


def allowed(case, upstream_error: float, plan, calls: int, size: float) -> float:
    """The rms error that a result of that rms size may have."""
    wide = torch.finfo(case.dtypes[0]).bits >= 32
    if plan is None or not wide:
        return 2 * upstream_error
    eps = torch.finfo(case.dtypes[0]).eps
    rounding = 4 * eps * math.sqrt(calls) * max(abs(plan.A).max(), 1.0) * max(size, 1.0)
    if case.dtypes[0] == FP64:
        # Upstream is its own reference there. The bound s of thresholding is a float32.
        rounding *= 64
        if plan.thresholding is not None:
            rounding += 8 * torch.finfo(FP32).eps * size
    return 2 * upstream_error + rounding


def agree(case) -> None:
    """Asserts that the accelerated scheduler does what upstream's does."""
    judged = compared(case)
    if all(error <= bound for error, _, bound in judged):
        return
    # In 16 bits the few elements where the model is steep decide: then over more samples.
    assert torch.finfo(case.dtypes[1]).bits == 16, judged
    pooled = [compared(dataclasses.replace(case, latent=k)) for k in range(1, 9)]
    for results in zip(*pooled, strict=True):
        error, upstream_error = (
            math.sqrt(sum(result[k] ** 2 for result in results)) for k in (0, 1)
        )
        assert error <= 2 * upstream_error, f"{case}: {judged}, then {pooled}"


def compared(case) -> list[tuple[float, float, float]]:
    """Asserts all but the accuracy, and returns that: for every result of the last step the rms
    error, upstream's and the allowed one."""
    upstream, reference = dc.upstream_and_reference(case)
    # Upstream itself keeps views of the outputs that it takes apart.
    ours = dc.run(case, accelerate(case.cls), reuse=not case.learned)
    finite = all(bool(torch.isfinite(x).all()) for x in upstream.results)
    if not finite and ours.error is not None and dc.runs_past_the_end(upstream.scheduler):
        return []  # upstream divides by the zeros behind its tables; ours stops there
    if upstream.error_at != ours.error_at and "scalar type" in str(upstream.error):
        assert case.dtypes[0] != case.dtypes[1] and ours.error is None
        return []  # upstream mixes dtypes in an operation that cannot; a plan can
    assert (type(ours.error), ours.error_at) == (type(upstream.error), upstream.error_at), (
        f"{case}: {ours.error!r}, but upstream {upstream.error!r}"
    )
    if upstream.error is not None:
        return []
    assert ours.kinds == upstream.kinds
    for mine, theirs in zip(ours.states, upstream.states, strict=True):
        assert torch.equal(mine, theirs), "random numbers were drawn that upstream does not draw"
    if not upstream.calls:
        return []
    plan = dc.plan_of(ours.scheduler)
    if plan is None and finite:
        reason = dc.reason_of(ours.scheduler)
        assert any(known in reason for known in UPSTREAM_ONLY), reason
    judged = []
    for mine, theirs, exact in zip(ours.results, upstream.results, reference.results, strict=True):
        assert mine.shape == theirs.shape
        if not torch.isfinite(theirs).all():
            # 16 bits overflow where float32 inside of the step does not.
            if min(torch.finfo(dtype).bits for dtype in case.dtypes) >= 32:
                assert torch.equal(torch.isnan(mine), torch.isnan(theirs))
            continue
        error, upstream_error = dc.rms(mine.double() - exact), dc.rms(theirs.double() - exact)
        bound = allowed(case, upstream_error, plan, upstream.calls, dc.rms(exact))
        judged.append((error, upstream_error, bound))
    return judged


@pytest.mark.parametrize("name", sorted(dc.SPACE))
def test_any_configuration_gives_upstreams_results(name):
    @settings(FIXED, max_examples=12)
    @given(dc.cases([name]))
    def check(case):
        agree(case)

    check()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(dc.SPACE))
def test_many_configurations_give_upstreams_results(name):
    @settings(FIXED, max_examples=150)
    @given(dc.cases([name]))
    def check(case):
        agree(case)

    check()


@pytest.mark.parametrize("dtypes", dc.DTYPES, ids=lambda pair: "-".join(map(str, pair)))
@pytest.mark.parametrize("case", dc.SEVERAL, ids=str)
def test_every_dtype_gives_upstreams_results(case, dtypes):
    agree(dataclasses.replace(case, dtypes=dtypes))


@pytest.mark.parametrize(
    "case",
    [
        dc.Case("DPMSolverSDEScheduler", dict(noise_sampler_seed=None), 1),
        # Repeated timesteps: upstream begins at the second of them and runs past the end.
        dc.Case("SASolverScheduler", dict(
            beta_schedule="squaredcos_cap_v2", timestep_spacing="leading", use_beta_sigmas=True,
            predictor_order=3), 17),
        # float32 history of 16-bit samples.
        dc.Case("FlowMatchHeunDiscreteScheduler", {}, 19, dtypes=(dc.FP16, dc.FP16)),
        dc.Case("FlowMatchHeunDiscreteScheduler", {}, 40, dtypes=(FP32, dc.BF16)),
        dc.Case("HeunDiscreteScheduler", dict(
            beta_end=0.02, timestep_spacing="trailing", use_exponential_sigmas=True), 32,
            dtypes=(dc.BF16, dc.BF16)),
        dc.Case("DDIMInverseScheduler", dict(prediction_type="sample", clip_sample_range=2.0,
            set_alpha_to_one=False), 7, dtypes=(dc.BF16, dc.BF16)),
        # Upstream cannot: it multiplies a float32 by a bfloat16 matrix.
        dc.Case("UniPCMultistepScheduler", dict(prediction_type="sample", solver_order=3), 7,
            dtypes=(FP32, dc.BF16)),
        dc.Case("SCMScheduler", {}, 2),
        dc.Case("SCMScheduler", {}, 12, dict(intermediate_timesteps=None)),
    ],
    ids=str,
)  # fmt: skip
def test_configurations_that_were_wrong_once(case):
    agree(case)


# Schedulers of which upstream has no tests, against their formulas in float64.


def shifted(sigma, shift):
    return shift * sigma / (1 + (shift - 1) * sigma)


def flow_levels(steps, shift):
    """Of FlowMatchEuler: evenly spaced between the shifted ends, then shifted (again)."""
    return np.append(shifted(np.linspace(1.0, shifted(1e-3, shift), steps), shift), 0.0)


def dpm_levels(steps, shift):
    """Of DPM-Solver with use_flow_sigmas."""
    return shifted(1 - np.linspace(1, 1e-3, steps + 1), shift)[::-1].copy()


def unipc_levels(steps, shift):
    """Of UniPC with use_flow_sigmas: as above from 1, which is left out."""
    s = shifted(np.linspace(1, 1e-3, steps + 1), shift)
    return np.concatenate([[1 - 1e-6], s[1:-1], [0.0]])


def flow_euler(x, s, v):
    for i in range(len(s) - 1):
        x = x + (s[i + 1] - s[i]) * v(x, s[i])
    return x


def flow_heun(x, s, v):
    for i in range(len(s) - 1):
        h, d = s[i + 1] - s[i], v(x, s[i])
        if s[i + 1] > 0:
            d = (d + v(x + h * d, s[i + 1])) / 2
        x = x + h * d
    return x


def log_snr_half(s):
    with np.errstate(divide="ignore"):
        return np.log((1 - s) / s)


def flow_dpmpp_2m(x, s, v):
    """Lu et al. 2022 (DPM-Solver++), algorithm 2 with alpha = 1 - sigma; the last step is Euler's
    since sigma ends at 0."""
    lam, before = log_snr_half(s), None
    for i in range(len(s) - 1):
        x0, h = x - s[i] * v(x, s[i]), lam[i + 1] - lam[i]
        d = x0
        if before is not None and s[i + 1] > 0:
            r = (lam[i] - lam[i - 1]) / h
            d = x0 + (x0 - before) / (2 * r)
        x = s[i + 1] / s[i] * x - (1 - s[i + 1]) * np.expm1(-h) * d
        before = x0
    return x


def flow_unipc_2(x, s, v):
    """Zhao et al. 2023 (UniPC), B2(h) = e^h - 1, order 2 on predictions of x_0; order 1 at both
    ends. m: predictions of x_0 at s[0], s[1], ..."""
    lam, m, last, order = log_snr_half(s), [], None, 1
    n = len(s) - 1
    for i in range(n):
        m.append(x - s[i] * v(x, s[i]))
        if i:  # the corrector of the step s[i-1] -> s[i], of the order of its predictor
            h = lam[i] - lam[i - 1]
            b1 = np.expm1(-h)
            if order == 1:
                correction = (m[i] - m[i - 1]) / 2
            else:
                r = (lam[i - 2] - lam[i - 1]) / h
                phi_2 = b1 / -h - 1
                phi_3 = phi_2 / -h - 1 / 2
                rho = np.linalg.solve([[1, 1], [r, 1]], [phi_2 / b1, 2 * phi_3 / b1])
                correction = rho[0] * (m[i - 2] - m[i - 1]) / r + rho[1] * (m[i] - m[i - 1])
            x = s[i] / s[i - 1] * last - (1 - s[i]) * b1 * (m[i - 1] + correction)
        order = 2 if 0 < i < n - 1 else 1
        last, h = x, lam[i + 1] - lam[i]
        b1 = np.expm1(-h)
        predicted = m[i]
        if order == 2:
            predicted = m[i] + (m[i - 1] - m[i]) / ((lam[i - 1] - lam[i]) / h) / 2
        x = s[i + 1] / s[i] * x - (1 - s[i + 1]) * b1 * predicted
    return x


FLOW = dict(use_flow_sigmas=True, prediction_type="flow_prediction")


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 5, 18])
@pytest.mark.parametrize(
    ("name", "oracle", "config", "levels"),
    [
        ("FlowMatchEulerDiscreteScheduler", flow_euler, {}, flow_levels),
        ("FlowMatchHeunDiscreteScheduler", flow_heun, {}, flow_levels),
        ("DPMSolverMultistepScheduler", flow_dpmpp_2m, FLOW, dpm_levels),
        ("UniPCMultistepScheduler", flow_unipc_2, FLOW, unipc_levels),
    ],
    ids=["euler", "heun", "dpm++2m", "unipc"],
)
def test_flow_schedulers_are_their_formulas(name, oracle, config, levels, steps, shift):
    if name == "FlowMatchHeunDiscreteScheduler" and steps == 1:
        pytest.skip("upstream's Heun needs two steps")
    config = config | {("flow_shift" if config else "shift"): shift}
    scheduler = accelerate(getattr(dc.diffusers, name))(**config)
    scheduler.set_timesteps(steps)
    s = levels(steps, shift)
    sigmas = scheduler.sigmas.double().numpy()
    if name == "FlowMatchHeunDiscreteScheduler":  # every level inside is there twice
        sigmas = np.append(sigmas[:1], sigmas[1:][::2])
    np.testing.assert_allclose(sigmas[: steps + 1], s, rtol=3e-7, atol=1e-9)

    def v(x, sigma):
        return torch.sin(1.3 * x + float(sigma)) * 0.8 + 0.1 * x

    start = torch.randn(dc.SHAPE, generator=torch.Generator().manual_seed(0), dtype=FP64)
    x = start
    for i, t in enumerate(scheduler.timesteps):
        at = scheduler.sigmas[i]
        x = scheduler.step(v(x, at), t, x, return_dict=False)[0]
    assert dc.plan_of(scheduler) is not None
    # Upstream's levels and log-SNR are rounded to float32; steps of log-SNR cancel digits.
    torch.testing.assert_close(x, oracle(start, s, v), rtol=0, atol=3e-6)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 7, 40])
def test_cogvideox_ddim_is_its_formula(prediction, steps):
    """x' = a x + b x_0, a = sqrt((1 - abar') / (1 - abar)), b = sqrt(abar') - sqrt(abar) a."""
    abar = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    abar = abar / (3 + (1 - 3) * abar)  # the SNR divided by snr_shift_scale = 3
    scheduler = accelerate(dc.diffusers.CogVideoXDDIMScheduler)(prediction_type=prediction)
    scheduler.set_timesteps(steps)
    start = x = torch.randn(dc.SHAPE, generator=torch.Generator().manual_seed(0), dtype=FP64)
    expected, ratio = start, 1000 // steps
    for k in reversed(range(steps)):
        t = k * ratio
        now, then = abar[t], abar[t - ratio] if k else 1.0
        output = dc.model(expected, t)
        if prediction == "epsilon":
            x0 = (expected - math.sqrt(1 - now) * output) / math.sqrt(now)
        else:
            x0 = math.sqrt(now) * expected - math.sqrt(1 - now) * output
        a = math.sqrt((1 - then) / (1 - now))
        expected = a * expected + (math.sqrt(then) - math.sqrt(now) * a) * x0
    for t in scheduler.timesteps:
        x = scheduler.step(dc.model(x, t), t, x, return_dict=False)[0]
    # 1 - abar cancels four digits of upstream's float32 table at the last step.
    torch.testing.assert_close(x, expected, rtol=2e-5, atol=2e-5)
