"""Flow samplers: diffusers' flow schedulers run in float64, the papers' formulas, exact data."""

from __future__ import annotations

import itertools
import math

import diffusers.schedulers.scheduling_flow_match_euler_discrete as upstream_euler
import diffusers.schedulers.scheduling_flow_match_heun_discrete as upstream_heun
import diffusers.schedulers.scheduling_ltx_euler_ancestral_rf as upstream_ltx
import numpy as np
import pytest
import torch

import fastdiff as fd
from fastdiff.solvers.flow import (
    flow_euler,
    flow_euler_ancestral,
    flow_heun,
    flow_sde,
    flow_sigmas,
)
from tests.conftest import load_helper

up = load_helper("diffusers_float64")
mixture = load_helper("gaussian_mixture")
BUILDERS = [flow_euler, flow_heun, flow_sde, flow_euler_ancestral]


X_T, DRAWS = up.randn(2, 3, 5), up.randn(40, 2, 3, 5, seed=1)


@pytest.fixture
def upstream(monkeypatch):
    """Runs a scheduler of diffusers in float64, closed loop, with DRAWS for its noise."""
    draws = iter(DRAWS)
    for module in (upstream_euler, upstream_heun, upstream_ltx):
        monkeypatch.setattr(module, "torch", up.Widened(torch))
        if hasattr(module, "np"):
            monkeypatch.setattr(module, "np", up.Widened(np))
        if hasattr(module, "randn_tensor"):
            monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: next(draws))

    def run(scheduler, calls=None, **step):
        x = X_T
        for t in scheduler.timesteps[:calls]:
            x = scheduler.step(up.model(x, t), t, x, **step)[0]
        assert x.dtype == torch.float64
        return x, len(DRAWS) - len(list(draws))

    return run


def ours(plan):
    """(sample, draws consumed) of a plan, with the same draws in the same order."""
    draws = iter(DRAWS)
    x = fd.sample(up.model, plan, x_T=X_T, noise=lambda *_: next(draws), backend="reference")
    return x, len(DRAWS) - len(list(draws))


def check(actual, expected, tolerance=1e-12):
    assert actual[1] == expected[1], "noise draws consumed"
    difference = (actual[0] - expected[0]).abs().max() / expected[0].abs().max()
    assert difference < tolerance, float(difference)


EULER = {
    "plain": ({}, {}, {}),
    "shift": (dict(shift=3.0), {}, dict(shift=3.0)),
    "mu": (dict(use_dynamic_shifting=True), dict(mu=0.8), dict(mu=0.8)),
    "mu, linear": (
        dict(use_dynamic_shifting=True, time_shift_type="linear"), dict(mu=2.2),
        dict(mu=2.2, time_shift="linear"),
    ),
    "terminal": (dict(shift=3.0, shift_terminal=0.1), {}, dict(shift=3.0, shift_terminal=0.1)),
    "karras": (dict(use_karras_sigmas=True), {}, dict(ladder="karras")),
    "exponential": (
        dict(use_exponential_sigmas=True, shift=2.0), {}, dict(ladder="exponential", shift=2.0),
    ),
    "beta": (dict(use_beta_sigmas=True), {}, dict(ladder="beta")),
    "training steps": (
        dict(num_train_timesteps=500), {}, dict(num_train_timesteps=500),
    ),
}  # fmt: skip


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("case", EULER)
def test_euler_is_diffusers_in_float64(upstream, case, stochastic):
    config, at_run, options = EULER[case]
    scheduler = upstream_euler.FlowMatchEulerDiscreteScheduler(
        stochastic_sampling=stochastic, **config
    )
    scheduler.set_timesteps(7, **at_run)
    sigmas = flow_sigmas(7, **options)
    assert np.abs(sigmas / np.maximum(scheduler.sigmas.numpy(), 1e-300) - 1)[:-1].max() < 1e-12
    T = config.get("num_train_timesteps", 1000)
    plan = flow_euler(sigmas, stochastic=stochastic, num_train_timesteps=T)
    assert plan.states == 1 and plan.rows == 7
    check(ours(plan), upstream(scheduler))


def test_sigmas_of_the_caller_are_shifted_like_diffusers(upstream):
    scheduler = upstream_euler.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    levels = np.linspace(1.0, 1 / 6, 6)
    mu = fd.schedules.resolution_mu(1024)
    scheduler.set_timesteps(sigmas=levels, mu=mu)
    check(ours(flow_euler(flow_sigmas(sigmas=levels, mu=mu))), upstream(scheduler))


def test_inverted_sigmas_are_diffusers_in_float64(upstream):
    scheduler = upstream_euler.FlowMatchEulerDiscreteScheduler(invert_sigmas=True, shift=2.0)
    scheduler.set_timesteps(6)
    plan = flow_euler(flow_sigmas(6, shift=2.0), invert_sigmas=True)
    np.testing.assert_allclose(plan.t, scheduler.timesteps, rtol=0, atol=1e-12)
    check(ours(plan), upstream(scheduler))


@pytest.mark.parametrize(
    "noise", [{}, dict(s_churn=3.0), dict(s_churn=9.0, s_tmin=0.2, s_tmax=0.9, s_noise=1.1)],
    ids=["no churn", "churn", "churn in a window"],
)  # fmt: skip
def test_heun_is_diffusers_in_float64(upstream, noise):
    scheduler = upstream_heun.FlowMatchHeunDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(6)
    plan = flow_heun(flow_sigmas(6, shift=3.0), **noise)
    np.testing.assert_allclose(plan.t, scheduler.timesteps, rtol=1e-14)
    check(ours(plan), upstream(scheduler, **noise))


@pytest.mark.parametrize("eta, s_noise", [(1.0, 1.0), (0.4, 0.8), (0.0, 1.0), (1.0, 0.0)])
def test_ancestral_is_diffusers_in_float64(upstream, eta, s_noise):
    scheduler = upstream_ltx.LTXEulerAncestralRFScheduler(eta=eta, s_noise=s_noise)
    sigmas = flow_sigmas(7, shift=2.0)
    scheduler.set_timesteps(sigmas=sigmas.tolist())
    plan = flow_euler_ancestral(sigmas, eta=eta, s_noise=s_noise)
    # Upstream adds 1e-12 to two denominators, (1 - sigma_d)^2 = 0.013 the smallest here.
    check(ours(plan), upstream(scheduler, calls=7), 1e-10 if eta and s_noise else 1e-12)


@pytest.mark.parametrize("method", ["flow_grpo", "dance_grpo", "cps"])
def test_sde_is_the_papers_formula(method):
    """Mean and noise as they are written in the papers, coefficient by coefficient."""
    sigmas, a = flow_sigmas(6, shift=3.0), 0.7
    x = X_T
    for i, (s, s_next) in enumerate(itertools.pairwise(sigmas)):
        o, dt = up.model(x, s * 1000), s_next - s
        if method == "cps":
            sigma = s_next * math.sin(a * math.pi / 2)
            mean = (1 - s_next) * (x - s * o)
            mean = mean + math.sqrt(s_next**2 - sigma**2) * (x + (1 - s) * o)
            x = mean + sigma * DRAWS[i]
            continue
        g = a * math.sqrt(s / (1 - (sigmas[1] if s == 1 else s))) if method == "flow_grpo" else a
        mean = x * (1 + g**2 / (2 * s) * dt) + o * (1 + g**2 * (1 - s) / (2 * s)) * dt
        x = mean + g * math.sqrt(-dt) * DRAWS[i]
    plan = flow_sde(sigmas, noise_level=a, method=method)
    assert plan.states == 1
    check(ours(plan), (x, 6))


def test_a_window_of_noise_leaves_the_rest_to_the_ode():
    sigmas = flow_sigmas(5)
    windowed = flow_sde(sigmas, noise_level=[0, 0.5, 0.5, 0, 0], method="flow_grpo")
    assert windowed.draws_noise[:, 0].tolist() == [False, True, True, False, False]
    ode = flow_euler(sigmas)
    for i in (0, 3, 4):
        np.testing.assert_array_equal(windowed.A[i, 0, :2], ode.A[i, 0, :2])
    quiet = flow_sde(sigmas, final_noise=False)
    assert quiet.draws_noise[:, 0].tolist() == [True] * 4 + [False]


@pytest.mark.parametrize("builder, order", [(flow_euler, 1), (flow_heun, 2)])
def test_order_of_convergence_on_a_mixture(builder, order):
    begin, end = 0.97, 0.03
    start = up.randn(16, 2, seed=2)
    exact = mixture.solve(start, (1 - begin, begin), (1 - end, end), 1e-11)
    steps, errors = [32, 64, 128], []
    for n in steps:
        plan = builder(np.linspace(begin, end, n + 1))

        def model(x, t):
            sigma = t / 1000
            return mixture.output("flow", x, 1 - sigma, sigma)

        x = fd.sample(model, plan, x_T=start, backend="reference")
        errors.append(float((x - exact).abs().max()))
    assert mixture.slope(steps, errors) == pytest.approx(order, abs=0.15), errors


def moments(plan, mean, std, start):
    """(m, v) of the result for x_T ~ N(start) and data N(mean, std^2), propagated through the rows:
    v(x, s) = k (x - a mean) - mean, k = ((s - a std^2) / (a^2 std^2 + s^2)), is linear in x."""
    m, variance = start
    for i in range(plan.rows):
        s = plan.t[i] / 1000
        a = 1 - s
        k = (s - a * std**2) / (a**2 * std**2 + s**2)
        cx, co, _, cz = plan.A[i, 0]
        m = cx * m + co * (k * (m - a * mean) - mean)
        variance = (cx + co * k) ** 2 * variance + cz**2
    return np.array([m, variance])


@pytest.mark.parametrize("method", ["flow_grpo", "dance_grpo", "cps", "ancestral", "stochastic"])
def test_stochastic_samplers_keep_the_marginals(method):
    """On Gaussian data mean and variance at the last level tend to those of the path, with the
    first power of the step (weak order 1)."""
    mean, std, begin, end = 0.7, 0.4, 0.9, 0.1
    start = ((1 - begin) * mean, (1 - begin) ** 2 * std**2 + begin**2)
    goal = np.array([(1 - end) * mean, (1 - end) ** 2 * std**2 + end**2])
    steps, errors = [64, 128, 256, 512], []
    for n in steps:
        sigmas = np.linspace(begin, end, n + 1)
        if method == "ancestral":
            plan = flow_euler_ancestral(sigmas)
        elif method == "stochastic":
            plan = flow_euler(sigmas, stochastic=True)
        else:
            level = 0.7 if method != "cps" else 0.7 / math.sqrt(n)
            plan = flow_sde(sigmas, method=method, noise_level=level)
        errors.append(np.abs(moments(plan, mean, std, start) - goal))
    errors = np.array(errors)
    assert errors[:, 0].max() < 1e-12 or mixture.slope(steps, errors[:, 0]) > 0.9
    if method == "stochastic":
        # It forgets x at every step and so never spreads: a sampler of consistency models.
        assert errors[-1, 1] > 0.05
    else:
        assert mixture.slope(steps, errors[:, 1]) == pytest.approx(1.0, abs=0.15), errors


@pytest.mark.parametrize(
    "build",
    [
        lambda s: flow_sde(s, method="cps", noise_level=0.6), flow_euler_ancestral, flow_euler,
        lambda s: flow_euler_ancestral(s, eta=0.3), lambda s: flow_euler(s, stochastic=True),
    ],
    ids=["cps", "ancestral", "euler", "ancestral 0.3", "stochastic"],
)  # fmt: skip
def test_coefficients_are_preserved_for_data_at_a_point(build):
    """With x_0 known exactly, every step lands on x = (1 - sigma) x_0 + sigma * unit normal."""
    sigmas = flow_sigmas(9, shift=2.0)
    plan = build(sigmas)
    for i in range(plan.rows):
        s, s_next = sigmas[i], sigmas[i + 1]
        row = plan.A[i, 0]
        cx, co, cz = row[0], row[1], row[3] if len(row) > 3 else 0.0
        # x = (1 - s) x_0 + s eps and o = eps - x_0
        assert cx * (1 - s) - co == pytest.approx(1 - s_next, abs=1e-14)
        assert (cx * s + co) ** 2 + cz**2 == pytest.approx(s_next**2, abs=1e-14)


def test_samples_of_gaussian_data_have_its_moments():
    mean, std, n = 0.7, 0.4, 1 << 14
    plan = flow_sde(flow_sigmas(100), method="cps", noise_level=0.3)

    def model(x, t):
        s = t.to(x.dtype)[:, None] / 1000
        a = 1 - s
        return (s - a * std**2) / (a**2 * std**2 + s**2) * (x - a * mean) - mean

    x = fd.sample(model, plan, shape=(n, 2), seed=3).double()
    m, v = moments(plan, mean, std, (0.0, 1.0))
    assert (x.mean(0) - m).abs().max() < 5 * math.sqrt(v / n)
    assert (x.var(0) - v).abs().max() < 5 * v * math.sqrt(2 / n)
    assert abs(m - mean) < 0.01 and abs(v - std**2) < 0.02


@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize("kind", ["sample", "epsilon"])
def test_prediction_types_agree(builder, kind):
    """A model of x_0 or of eps gives what the same model gives as v."""
    sigmas = flow_sigmas(6)[1:]

    def velocity(x, t):
        return mixture.output("flow", x, 1 - t / 1000, t / 1000)

    def model(x, t):
        return mixture.output(kind, x, 1 - t / 1000, t / 1000)

    def run(plan, model):
        draws = iter(up.randn(20, 4, 2, seed=4))
        x = up.randn(4, 2)
        return fd.sample(model, plan, x_T=x, noise=lambda *_: next(draws), backend="reference")

    expected = run(builder(sigmas), velocity)
    actual = run(builder(sigmas, prediction_type=kind), model)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("builder", BUILDERS)
def test_clipping_bounds_the_estimate(builder):
    """Bounds that never bind change nothing; tight ones bound the result of the last step."""
    sigmas = flow_sigmas(6)
    options = dict(final_noise=False) if builder is flow_sde else {}
    loose, plain = builder(sigmas, clip=(-50, 50), **options), builder(sigmas, **options)
    torch.testing.assert_close(ours(loose)[0], ours(plain)[0], rtol=1e-12, atol=1e-12)
    if builder is not flow_sde:  # Euler-Maruyama adds the score's part to x_0
        x, _ = ours(builder(sigmas, clip=(-0.1, 0.2)))
        assert x.min() >= -0.1 and x.max() <= 0.2 and (x == 0.2).any()
    assert loose.states == plain.states


def test_heun_carries_one_tensor_through_every_other_call():
    plan = flow_heun(6, s_churn=1.0)
    assert plan.states == 2 and plan.rows == 11
    carried = (plan.A[:, 1] != 0).any(axis=1)
    assert carried.tolist() == [True, False] * 5 + [False]
    assert flow_heun(6).traffic(0) == (["x", "o"], ["x", "s1"])
    assert flow_heun(6).traffic(1) == (["s1", "o"], ["x"])


@pytest.mark.parametrize("builder", BUILDERS)
def test_a_repeated_level_is_no_step(builder):
    plan = builder([1.0, 1.0, 0.5, 0.5, 0.0])
    assert np.isfinite(plan.A).all()
    x, _ = ours(plan)
    assert torch.isfinite(x).all()
    if builder in (flow_euler, flow_euler_ancestral):
        np.testing.assert_array_equal(plan.A[0, 0, :3], [1, 0, 0])
        np.testing.assert_array_equal(plan.A[2, 0, :3], [1, 0, 0])


@pytest.mark.parametrize("which", ["stochastic", "ancestral", "heun"])
def test_a_generator_draws_what_diffusers_draws(which):
    """float32 with the same torch.Generator: upstream's rounding is the difference."""
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    sigmas, step = flow_sigmas(6, shift=3.0), {}
    if which == "stochastic":
        scheduler = upstream_euler.FlowMatchEulerDiscreteScheduler(
            stochastic_sampling=True, shift=3.0
        )
        scheduler.set_timesteps(6)
        plan = flow_euler(sigmas, stochastic=True)
    elif which == "ancestral":
        scheduler = upstream_ltx.LTXEulerAncestralRFScheduler()
        scheduler.set_timesteps(sigmas=sigmas.tolist())
        plan = flow_euler_ancestral(sigmas)
    else:
        scheduler, step = upstream_heun.FlowMatchHeunDiscreteScheduler(shift=3.0), {"s_churn": 2.0}
        scheduler.set_timesteps(6)
        plan = flow_heun(sigmas, **step)

    def model(x, t):
        return up.model(x, t).float()

    x = X_T.float()
    for t in scheduler.timesteps[: plan.rows]:
        x = scheduler.step(model(x, t), t, x, generator=generators[0], **step)[0]
    actual = fd.sample(model, plan, x_T=X_T.float(), generator=generators[1])
    assert torch.equal(generators[0].get_state(), generators[1].get_state())
    torch.testing.assert_close(actual, x, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("call", "error", "name"),
    [
        (lambda: flow_sigmas(), ValueError, "steps and sigmas"),
        (lambda: flow_sigmas(5, sigmas=[1.0]), ValueError, "steps and sigmas"),
        (lambda: flow_sigmas(0), ValueError, "steps"),
        (lambda: flow_sigmas(5, shift=0), ValueError, "shift"),
        (lambda: flow_sigmas(5, mu=1.0, shift=2.0), ValueError, "shift"),
        (lambda: flow_sigmas(5, mu=-1.0, time_shift="linear"), ValueError, "mu"),
        (lambda: flow_sigmas(5, time_shift="cubic"), ValueError, "time_shift"),
        (lambda: flow_sigmas(5, shift_terminal=1.0), ValueError, "shift_terminal"),
        (lambda: flow_sigmas(1, shift_terminal=0.1), ValueError, "shift_terminal"),
        (lambda: flow_sigmas(5, ladder="lu"), ValueError, "ladder"),
        (lambda: flow_euler([1.0]), ValueError, "sigmas"),
        (lambda: flow_euler([1.0, 1.1]), ValueError, "sigmas"),
        (lambda: flow_euler([0.5, 0.7, 0]), ValueError, "sigmas"),
        (lambda: flow_euler([0.5, 0.0, 0.0]), ValueError, "sigmas"),
        (lambda: flow_euler([0.5, float("nan")]), ValueError, "sigmas"),
        (lambda: flow_euler(5, prediction_type="v"), ValueError, "prediction_type"),
        (lambda: flow_euler(5, prediction_type="epsilon"), ValueError, "prediction_type"),
        (lambda: flow_euler(5, timesteps=[1, 2]), ValueError, "timesteps"),
        (lambda: flow_euler(5, clip=(1, -1)), ValueError, "clip"),
        (lambda: flow_euler(5, stochastic=1), TypeError, "stochastic"),
        (lambda: flow_euler(5.5), TypeError, "steps"),
        (
            lambda: flow_euler([0.9, 0], invert_sigmas=True, prediction_type="sample"),
            ValueError, "invert_sigmas",
        ),
        (lambda: flow_heun(5, s_churn=-1), ValueError, "s_churn"),
        (lambda: flow_heun(5, s_tmin=0.5, s_tmax=0.1), ValueError, "s_tmin"),
        (lambda: flow_sde(5, method="ddim"), ValueError, "method"),
        (lambda: flow_sde(5, noise_level=[0.1, 0.2]), ValueError, "noise_level"),
        (lambda: flow_sde(5, noise_level=-0.1), ValueError, "noise_level"),
        (lambda: flow_sde(5, method="cps", noise_level=1.1), ValueError, "noise_level"),
        (lambda: flow_euler_ancestral(5, eta=1.5), ValueError, "eta"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(call, error, name):
    with pytest.raises(error, match=name):
        call()
