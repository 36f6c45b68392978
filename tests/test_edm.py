"""Samplers in sigma space: upstream's code in float64, order, moments, least history."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

import fastdiff as fd
from fastdiff.benchmarks import upstream as other_projects
from fastdiff.solvers import dpmpp_sigma, edm
from fastdiff.solvers.sigma_space import Denoiser, Levels, Tape, ancestral, levels_of
from tests.conftest import load_helper

UP = other_projects.k_diffusion().sampling
mixture = load_helper("gaussian_mixture")

BUILDERS = {name: getattr(edm, name) for name in edm.FORMULAS}
BUILDERS |= {name: getattr(dpmpp_sigma, name) for name in dpmpp_sigma.FORMULAS}
LADDERS = [name for name in BUILDERS if name != "dpm_fast"]
BROWNIAN = ("dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde")
ETA = ("euler_ancestral", "dpm_2_ancestral", "dpmpp_2s_ancestral", *BROWNIAN)
SIGMAS = fd.schedules.karras(7, 0.03, 14.6)
SCHEDULE = fd.schedules.scaled_linear(1000)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(x, t):
    """Any smooth nonlinear F(x, t)."""
    return torch.sin(1.3 * x + 0.2 * t.view(-1, 1).log1p()) * 0.8 + 0.1 * x


def paper_denoiser(kind, sigma_data=0.5):
    """D(x; sigma) from F, written out of the papers."""
    s = sigma_data
    vp = lambda sigma: 1 / (sigma**2 + 1) ** 0.5  # noqa: E731

    def denoise(x, sigma):
        sigma = sigma.double()
        c = sigma.view(-1, 1)
        if kind == "sample":
            return network(x, sigma)
        if kind == "epsilon":
            return x - c * network(x * vp(c), sigma)
        if kind == "v_prediction":  # x_t = vp x, alpha = vp, sigma_t = c vp: alpha x_t - sigma_t v
            return vp(c) ** 2 * x - c * vp(c) * network(x * vp(c), sigma)
        norm = (c**2 + s**2) ** 0.5
        out = network(x / norm, 0.25 * sigma.log() + 10) * c * s / norm
        return s**2 / norm**2 * x + (out if kind == "edm" else -out)

    return denoise


def plan_model(kind):
    if kind in ("edm", "edm_v"):
        return lambda x, t: network(x, t + 10)
    return network


def upstream_run(name, denoise, x, sigmas, z, **options):
    """k-diffusion's function in float64, its draws taken from z in order."""
    draws = iter(z)
    kwargs = dict(options)
    if name in ETA or name == "dpm_fast":
        kwargs["noise_sampler"] = lambda a, b: next(draws)
    original, torch.randn_like = torch.randn_like, lambda x, **_: next(draws)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return getattr(UP, f"sample_{name}")(denoise, x, *sigmas, disable=True, **kwargs)
    finally:
        torch.randn_like = original
        torch.set_default_dtype(default)


@pytest.mark.parametrize("kind", ["sample", "epsilon", "v_prediction", "edm", "edm_v"])
@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("name", BUILDERS)
def test_builders_are_upstreams_code(name, zero, kind):
    """Closed loop in float64 to 1e-12; the SDE solvers with a draw for every query of the path."""
    sigmas = SIGMAS if zero else SIGMAS[:-1]
    options = {}
    if name in ("euler", "heun", "dpm_2"):
        options = dict(s_churn=4.0, s_tmin=0.1, s_tmax=10.0, s_noise=1.003)
    elif name in ETA:
        options = dict(eta=0.7, s_noise=0.9)
    if name == "dpmpp_sde":
        options["r"] = 0.4
    if name == "dpmpp_2m_sde":
        options["solver_type"] = "heun" if zero else "midpoint"
    x, z = randn(3, 5) * 14.6, randn(40, 3, 5, seed=1)
    churned = "s_churn" in options
    if name == "dpm_fast":
        given, arguments = (0.03, 14.6, 8), (0.03, 14.6, 8)
        options = dict(eta=0.7)
        levels, orders = dpmpp_sigma.fast_steps(*given)
        options_of_formula = dict(options, orders=orders)
    else:
        given, arguments = (torch.from_numpy(sigmas),), (sigmas,)
        levels, options_of_formula = sigmas, options
    expected = upstream_run(name, paper_denoiser(kind), x, given, z, **options)
    if name == "dpmpp_sde":  # unsplit: what upstream draws is a variable each
        tape = Tape(name, levels_of(levels), Denoiser(kind), split=False)
        plan = tape.finish(dpmpp_sigma.FORMULAS[name](tape, **options_of_formula))
    else:
        plan = BUILDERS[name](*arguments, prediction_type=kind, **options)
        tape = None
    # Upstream draws once a step, churned ones also where nothing is added; a plan's churn before
    # the first call is row -1.
    order = itertools.count()
    if churned:

        def noise(row, k):
            step, _ = (0, 0) if row < 0 else plan.draws[row, k]
            return z[step if name == "euler" else (step + 1) // 2]
    else:

        def noise(row, k):
            return z[next(order)]

    got = fd.sample(plan_model(kind), plan, x_T=x, noise=noise)
    np.testing.assert_allclose(got.numpy(), expected.numpy(), rtol=1e-12, atol=1e-12)


def reference_levels(ladder, n):
    """sigmas and timesteps of diffusers' EulerDiscreteScheduler."""
    diffusers = pytest.importorskip("diffusers")
    karras = {"use_karras_sigmas": True} if ladder == "karras" else {"timestep_spacing": ladder}
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=1e-4, beta_end=0.02, beta_schedule="linear", **karras
    )
    scheduler.set_timesteps(n)
    return scheduler.sigmas.numpy(), scheduler.timesteps.numpy()


@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
@pytest.mark.parametrize("ladder", ["linspace", "leading", "trailing", "karras"])
def test_levels_of_a_schedule_are_diffusers(ladder):
    schedule = fd.schedules.linear(1000)
    for n in (1, 7, 20):
        if n == 1 and ladder == "linspace":
            continue  # diffusers takes timestep 0 where we start from noise
        if n == 1 and ladder == "karras":
            continue
        sigmas, t = reference_levels(ladder, n)
        options = {} if ladder == "karras" else {"ladder": None, "spacing": ladder}
        plan = edm.euler(schedule, n, prediction_type="epsilon", **options)
        levels = levels_of(schedule, n, **options)
        np.testing.assert_allclose(levels.sigmas, sigmas, rtol=2e-4)  # its 1 - abar is float32
        np.testing.assert_allclose(plan.t, t, rtol=1e-4, atol=2e-2)
        np.testing.assert_allclose(
            [plan.first_c_in, *plan.c_in[:-1]], 1 / np.sqrt(levels.sigmas[:-1] ** 2 + 1), rtol=1e-15
        )
    assert levels_of(schedule, 5, final="sigma_min").sigmas[-1] == schedule.sigmas[0]


DIFFUSERS = {
    "EulerDiscreteScheduler": ("euler", {}),
    "EulerAncestralDiscreteScheduler": ("euler_ancestral", {}),
    "HeunDiscreteScheduler": ("heun", {}),
    "KDPM2DiscreteScheduler": ("dpm_2", {}),
    "KDPM2AncestralDiscreteScheduler": ("dpm_2_ancestral", {}),
    "LMSDiscreteScheduler": ("lms", {}),
    "EDMEulerScheduler": ("euler", {}),
}


@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("kind", DIFFUSERS)
def test_builders_are_diffusers_schedulers(kind, prediction):
    """Stepped around a model with scale_model_input, to the float32 that they compute sigmas in."""
    diffusers = pytest.importorskip("diffusers")
    name, options = DIFFUSERS[kind]
    edm_kind = kind == "EDMEulerScheduler"
    scheduler = getattr(diffusers, kind)(prediction_type=prediction)
    scheduler.set_timesteps(6)
    sigmas = scheduler.sigmas.double().numpy()
    if kind in (
        "HeunDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",
    ):
        sigmas = np.unique(sigmas)[::-1]  # every level stands twice
    step_options = {}
    if name == "euler":
        options = dict(s_churn=2.0, s_noise=1.01, churn_after_model=True)
        step_options = dict(s_churn=2.0, s_noise=1.01)
    model = {
        (False, "epsilon"): dict(prediction_type="epsilon"),
        (False, "v_prediction"): dict(prediction_type="v_prediction"),
        (True, "epsilon"): dict(prediction_type="edm"),
        (True, "v_prediction"): dict(prediction_type="edm_v"),
    }[edm_kind, prediction]
    plan = BUILDERS[name](sigmas, **model, **options)
    calls = itertools.count()

    def F(x):
        return torch.sin(1.3 * x + 0.3 * next(calls)) * 0.8

    x = sample = randn(3, 5).float() * float(sigmas[0])
    generator = torch.Generator().manual_seed(4)
    if name == "euler" or "Ancestral" in kind:
        step_options["generator"] = generator
    for t in scheduler.timesteps:
        output = F(scheduler.scale_model_input(sample, t))
        sample = scheduler.step(output, t, sample, **step_options).prev_sample
    calls = itertools.count()
    noise = {"generator": torch.Generator().manual_seed(4)} if plan.draws_noise.any() else {}
    got = fd.sample(lambda x, t: F(x), plan, x_T=x, **noise)
    # Rounding of x at sigma_max ~ 14 to 160 in float32, and of the schedulers' float32 tables.
    scale = float(sigmas[0]) * 2e-6
    np.testing.assert_allclose(got.numpy(), sample.numpy(), rtol=2e-5, atol=scale)


# Orders of convergence. The start of a multistep method is of lower order, once.
ORDERS = {
    "euler": ({}, 1), "heun": ({}, 2), "dpm_2": ({}, 2), "dpmpp_2m": ({}, 2),
    "lms": ({"order": 2}, 2), "dpmpp_2s_ancestral": ({"eta": 0.0}, 2),
    "dpmpp_sde": ({"eta": 0.0}, 2), "dpmpp_2m_sde": ({"eta": 0.0}, 2),
    "dpmpp_3m_sde": ({"eta": 0.0}, 2), "euler_ancestral": ({"eta": 0.0}, 1),
    "dpm_2_ancestral": ({"eta": 0.0}, 2),
}  # fmt: skip


@pytest.mark.parametrize("name", ORDERS)
def test_deterministic_solvers_converge_at_their_order(name):
    options, order = ORDERS[name]
    high, low = 6.0, 0.15
    x = mixture.denoised(randn(64, 2), 1.0, 1.0) + high * randn(64, 2, seed=1)
    goal = mixture.solve(x, (1.0, high), (1.0, low))
    steps, errors = [40, 80, 160, 320], []
    for n in steps:
        sigmas = fd.schedules.exponential(n + 1, low, high, append_zero=False)
        plan = BUILDERS[name](sigmas, **options)
        got = fd.sample(lambda x, t: mixture.denoised(x, 1.0, t), plan, x_T=x)
        errors.append(float((got - goal).square().mean().sqrt()))
    slope = mixture.slope(steps, errors)
    assert order - 0.2 < slope < order + 1.2, (slope, errors)
    assert errors[-1] < (0.02 if order == 1 else 1e-3)


def test_dpm_fast_converges_faster_than_second_order():
    high, low = 6.0, 0.15
    x = 6.0 * randn(64, 2, seed=1)
    goal = mixture.solve(x, (1.0, high), (1.0, low))
    steps, errors = [31, 61, 121, 241], []  # all of order 3 but one first-order step
    for n in steps:
        plan = dpmpp_sigma.dpm_fast(low, high, n)
        assert plan.rows == n
        got = fd.sample(lambda x, t: mixture.denoised(x, 1.0, t), plan, x_T=x)
        errors.append(float((got - goal).square().mean().sqrt()))
    # The one Euler step, of size h, is what remains: h^2.
    assert mixture.slope(steps, errors) > 1.8
    plan = dpmpp_sigma.dpm_fast(low, high, 240)
    got = fd.sample(lambda x, t: mixture.denoised(x, 1.0, t), plan, x_T=x)
    assert float((got - goal).square().mean().sqrt()) < 1e-3


def coefficients(plan, model, draws=None):
    """The result as a linear form (x_T, draws ...) for a model that is linear: (1 + D,)."""
    keys = sorted({tuple(d) for row in plan.draws[plan.draws_noise] for d in [row]})
    if plan.first_churn:
        keys = [("first", 0), *keys]
    index = {key: k + 1 for k, key in enumerate(keys)}
    basis = torch.eye(len(keys) + 1, dtype=torch.float64)

    def noise(row, k):
        key = ("first", 0) if row < 0 else tuple(plan.draws[row, k])
        return basis[index[key]].expand(1, -1) if key in index else torch.zeros_like(basis[:1])

    return fd.sample(model, plan, x_T=basis[:1], noise=noise)[0].numpy(), keys


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("euler", {"s_churn": 5.0}), ("heun", {"s_churn": 5.0}), ("dpm_2", {"s_churn": 5.0}),
        *((name, {"eta": eta}) for name in ETA for eta in (1.0, 0.5)),
    ],
)  # fmt: skip
def test_stochastic_solvers_keep_the_variance_of_gaussian_data(name, options):
    """N(0, s^2) data has D = s^2 x / (s^2 + sigma^2); x ~ N(0, s^2 + sigma^2) at every level, which
    the plan's variance (exact, from its coefficients) approaches as steps grow."""
    s, high, low = 0.6, 8.0, 0.05
    errors, steps = [], [40, 80, 160]

    def model(x, t):
        return s**2 / (s**2 + t.view(-1, 1) ** 2) * x

    for n in steps:
        plan = BUILDERS[name](fd.schedules.exponential(n, low, high, append_zero=False), **options)
        c, _ = coefficients(plan, model)
        variance = c[0] ** 2 * (s**2 + high**2) + (c[1:] ** 2).sum()
        errors.append(abs(variance / (s**2 + low**2) - 1))
    assert errors[-1] < (0.1 if name == "euler" else 0.05)
    assert mixture.slope(steps, errors) > 0.85, errors


def test_a_split_brownian_path_has_the_covariance_of_its_queries():
    """Coefficients over independent increments, against those over the queries themselves and
    their covariance sqrt(|first| / |whole|)."""
    sigmas, r = SIGMAS[:-1], 0.3

    def model(x, t):
        return x / (1 + t.view(-1, 1) ** 2)

    split = dpmpp_sigma.dpmpp_sde(sigmas, r=r)
    independent, _ = coefficients(split, model)
    tape = Tape("queries", Levels(sigmas), Denoiser(), split=False)
    queries, keys = coefficients(
        tape.finish(dpmpp_sigma.FORMULAS["dpmpp_sde"](tape, eta=1.0, s_noise=1.0, r=r)), model
    )
    covariance = np.eye(len(keys))
    for i, (a, b) in enumerate(itertools.pairwise(sigmas)):
        middle = a ** (1 - r) * b**r
        first, whole = keys.index((2 * i, 1)), keys.index((2 * i + 1, 1))
        covariance[first, whole] = covariance[whole, first] = math.sqrt((a - middle) / (a - b))
    assert queries[0] == pytest.approx(independent[0], rel=1e-12)
    expected = queries[1:] @ covariance @ queries[1:]
    assert (independent[1:] ** 2).sum() == pytest.approx(expected, rel=1e-12)
    assert (queries[1:] ** 2).sum() < 0.9 * expected  # the overlap matters


def carried(plan):
    """History tensors that every row leaves to the next."""
    return [int(row[1:].any(axis=1).sum()) for row in plan.A[:-1]]


def test_plans_carry_the_least_history():
    """Ranks of facts measured on the schedulers themselves (12 steps)."""
    sigmas = fd.schedules.karras(12, 0.03, 14.6)
    alternating = [1, 0] * 11
    expected = {
        "euler": [0] * 11, "euler_ancestral": [0] * 11, "heun": alternating, "dpm_2": alternating,
        "dpm_2_ancestral": alternating, "lms": [1, 2, 3, 3, 3, 3, 3, 3, 3, 2, 1],
        "dpmpp_2s_ancestral": alternating, "dpmpp_sde": alternating,
        "dpmpp_2m": [1] * 10 + [0], "dpmpp_2m_sde": [1] * 10 + [0],
        "dpmpp_3m_sde": [1] + [2] * 8 + [1, 0],
    }  # fmt: skip
    for name, ranks in expected.items():
        plan = BUILDERS[name](sigmas)
        assert carried(plan) == ranks, name
        assert plan.states - 1 == max(ranks)
    # DPM-2 keeps x itself, which costs nothing; the step to 0 is the model's output.
    assert edm.dpm_2(sigmas).traffic(0) == (["x", "o"], ["x"])
    assert edm.heun(sigmas).traffic(1) == (["x", "s1", "o"], ["x"])
    assert edm.euler(sigmas).traffic(11) == (["o"], ["x"])
    assert dpmpp_sigma.dpmpp_2m(sigmas).traffic(5, outputs_are_fresh=True) == (
        ["x", "s1", "o"], ["x"]
    )  # fmt: skip


@pytest.mark.parametrize("name", LADDERS)
def test_repeated_sigmas_are_steps_of_no_length(name):
    """A level that stands twice adds a call and changes nothing but the noise."""
    options = {"eta": 0.0} if name in ETA else {}
    x = randn(3, 5) * 14.6
    once = fd.sample(network, BUILDERS[name](SIGMAS, **options), x_T=x)
    twice = np.insert(SIGMAS, 3, SIGMAS[3])
    got = fd.sample(network, BUILDERS[name](twice, **options), x_T=x)
    torch.testing.assert_close(got, once, rtol=1e-12, atol=1e-12)


def test_clipping_is_of_the_denoised_sample():
    sigmas = torch.from_numpy(SIGMAS.copy())
    x = randn(3, 5) * 14.6

    def clipped(x, sigma):
        return paper_denoiser("epsilon")(x, sigma).clamp(-0.5, 0.5)

    for name in ("euler", "heun", "lms", "dpmpp_2m", "dpm_2"):
        plan = BUILDERS[name](SIGMAS, prediction_type="epsilon", clip=(-0.5, 0.5))
        expected = upstream_run(name, clipped, x, (sigmas,), randn(20, 3, 5))
        got = fd.sample(network, plan, x_T=x)
        np.testing.assert_allclose(got.numpy(), expected.numpy(), rtol=1e-12, atol=1e-12)


def test_times_and_scalings_of_a_schedule():
    """t is interpolated over log sigma; ve and flow paths give their own alpha as c_in."""
    denoiser = Denoiser("epsilon", schedule=SCHEDULE)
    table = SCHEDULE.sigmas
    assert denoiser.t(float(table[417])) == pytest.approx(417, abs=1e-9)
    assert denoiser.t(float(np.sqrt(table[417] * table[418]))) == pytest.approx(417.5, abs=1e-9)
    assert denoiser.t(1e9) == 999 and denoiser.t(1e-9) == 0
    nearest = Denoiser("epsilon", schedule=SCHEDULE, quantize=True)
    assert nearest.t(float(table[417] ** 0.6 * table[418] ** 0.4)) == 417
    assert denoiser.scalings(2.0) == pytest.approx((1.0, -2.0, 1 / math.sqrt(5)))
    ve = fd.schedules.ve(fd.schedules.karras(10, 0.01, 50.0, append_zero=False))
    assert Denoiser("epsilon", schedule=ve).scalings(2.0) == (1.0, -2.0, 1.0)
    plan = edm.heun(ve, 5, prediction_type="epsilon")
    np.testing.assert_allclose(plan.t[::2], fd.schedules.karras(5, 0.01, 50.0)[:-1], rtol=1e-12)
    flow = Denoiser("epsilon", schedule=fd.schedules.flow(100))
    assert flow.scalings(3.0) == pytest.approx((1.0, -3.0, 0.25))
    # A plan over all training levels asks for the model's own t.
    plan = edm.euler(SCHEDULE, 10, ladder=None, spacing="trailing", prediction_type="v_prediction")
    assert plan.t.tolist() == [999 - 100 * i for i in range(10)]
    assert plan.initial_scale == pytest.approx(table[-1], rel=1e-15)


def test_ancestral_steps_do_not_cancel():
    mpmath = pytest.importorskip("mpmath")
    with mpmath.workdps(40):
        for sigma, sigma_next, eta in ((14.6, 14.59, 1.0), (1.0, 1e-6, 1.0), (3.0, 1.0, 0.5)):
            a, b, e = (mpmath.mpf(value) for value in (sigma, sigma_next, eta))
            up = min(b, e * mpmath.sqrt(b**2 * (a**2 - b**2) / a**2))
            down = mpmath.sqrt(b**2 - up**2)
            got = ancestral(sigma, sigma_next, eta)
            assert got == pytest.approx((float(down), float(up)), rel=1e-14)
    assert ancestral(2.0, 1.0, 5.0) == (0.0, 1.0)
    assert ancestral(2.0, 0.0, 1.0) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("arguments", "error", "names"),
    [
        (dict(sigmas=[1.0]), ValueError, "sigmas"),
        (dict(sigmas=[]), ValueError, "sigmas"),
        (dict(sigmas=[1.0, math.nan]), ValueError, "sigmas"),
        (dict(sigmas=[math.inf, 1.0]), ValueError, "sigmas"),
        (dict(sigmas=[1.0, 0.0, 0.0]), ValueError, "sigmas"),
        (dict(sigmas=[1.0, -1.0]), ValueError, "sigmas"),
        (dict(sigmas="sigmas"), (TypeError, ValueError), "sigmas"),
        (dict(steps=5), ValueError, "steps"),
        (dict(sigmas=SCHEDULE), ValueError, "steps"),
        (dict(sigmas=SCHEDULE, steps=0), ValueError, "steps"),
        (dict(sigmas=SCHEDULE, steps=5, ladder="even"), ValueError, "ladder"),
        (dict(sigmas=SCHEDULE, steps=5, spacing="even"), ValueError, "spacing"),
        (dict(sigmas=SCHEDULE, steps=5, final="one"), ValueError, "final"),
        (dict(sigmas=SCHEDULE, steps=5, timesteps=[5, 3]), ValueError, "timesteps"),
        (dict(sigmas=SCHEDULE, steps=5, schedule=SCHEDULE), ValueError, "schedule"),
        (dict(ladder="karras"), ValueError, "ladder"),
        (
            dict(sigmas=SCHEDULE.rescaled_zero_terminal_snr(), steps=5, ladder=None,
                 spacing="trailing"),
            ValueError, "terminal SNR",
        ),
        (dict(prediction_type="eps"), ValueError, "prediction_type"),
        (dict(scaling="vpp"), ValueError, "scaling"),
        (dict(sigma_data=0.0, prediction_type="edm"), ValueError, "sigma_data"),
        (dict(quantize=1), TypeError, "quantize"),
        (dict(clip=(1, -1)), ValueError, "clip"),
        (dict(denoiser=1), TypeError, "denoiser"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(arguments, error, names):
    for name in LADDERS:
        with pytest.raises(error, match=names):
            BUILDERS[name](**({"sigmas": SIGMAS} | arguments))


def test_bad_arguments_of_single_builders():
    for name in ETA:
        with pytest.raises(ValueError, match="eta"):
            BUILDERS[name](SIGMAS, eta=-0.5)
        with pytest.raises(ValueError, match="sigmas must descend"):
            BUILDERS[name]([1.0, 2.0, 3.0])
    for name in ("euler", "heun", "dpm_2"):
        with pytest.raises(ValueError, match="s_churn"):
            BUILDERS[name](SIGMAS, s_churn=-1.0)
        for bound in ("s_tmin", "s_tmax"):
            with pytest.raises(ValueError, match=bound):
                BUILDERS[name](SIGMAS, s_churn=1.0, **{bound: math.nan})
    for order, error in ((0, ValueError), (8, ValueError), (2.5, TypeError)):
        with pytest.raises(error, match="order"):
            edm.lms(SIGMAS, order=order)
    with pytest.raises(TypeError, match="churn_after_model"):
        edm.euler(SIGMAS, churn_after_model=1)
    for r in (0.0, 1.5, -1.0):
        with pytest.raises(ValueError, match="r must"):
            dpmpp_sigma.dpmpp_sde(SIGMAS, r=r)
    with pytest.raises(ValueError, match="solver_type"):
        dpmpp_sigma.dpmpp_2m_sde(SIGMAS, solver_type="euler")
    with pytest.raises(ValueError, match="sigma_min"):
        dpmpp_sigma.dpm_fast(0.0, 1.0, 5)
    with pytest.raises(ValueError, match="n must"):
        dpmpp_sigma.dpm_fast(0.1, 1.0, 0)
