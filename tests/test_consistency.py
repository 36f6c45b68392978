"""LCM, TCD and consistency models: diffusers' code, and exact moments on Gaussian data."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch

import fastdiff as fd
from fastdiff.solvers.consistency import consistency_model, lcm, tcd
from tests.conftest import load_helper

up = load_helper("diffusers_float64")

SCHEDULE = fd.schedules.scaled_linear(1000)
NOISE = up.randn(40, 2, 3, 4, seed=1)
PREDICTIONS = ["epsilon", "sample", "v_prediction"]


def compare(cls, plan, steps=None, *, x_T=None, model=up.model, tolerance=1e-12, **options):
    """The plan against diffusers in float64: t, the result, and how many draws are made."""
    x_T = up.randn(2, 3, 4) if x_T is None else x_T
    (*_, expected), t, draws = up.run(cls, x_T, steps, model=model, noise=NOISE, **options)
    got = fd.sample(model, plan, x_T=x_T, noise=lambda i, k: NOISE[i], backend="reference")
    np.testing.assert_allclose(plan.t, t, rtol=1e-12, atol=1e-10)
    assert up.relative(got, expected) < tolerance
    assert int(plan.consumes.sum()) == draws
    assert plan.states == 1


# Against diffusers.


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", [1, 4, 7, 50])
def test_lcm_is_diffusers(steps, prediction):
    plan = lcm(SCHEDULE, steps, prediction_type=prediction)
    if steps == 50:  # more draws than kept here: the timesteps only
        t = up.run(diffusers.LCMScheduler, up.randn(2, 3, 4), 50, noise=[NOISE[0]] * 50).t
        np.testing.assert_array_equal(plan.t, t)
        return
    compare(diffusers.LCMScheduler, plan, steps, prediction_type=prediction)


def test_lcm_options_are_diffusers():
    cls = diffusers.LCMScheduler
    plan = lcm(SCHEDULE, 6, original_inference_steps=30, strength=0.6, timestep_scaling=3.0)
    compare(
        cls, plan, 6, timestep_scaling=3.0,
        set_timesteps={"original_inference_steps": 30, "strength": 0.6},
    )  # fmt: skip
    times = [999, 500, 20, 3]
    compare(cls, lcm(SCHEDULE, timesteps=times), set_timesteps={"timesteps": times})
    compare(cls, lcm(SCHEDULE, 6, clip=(-0.7, 0.7)), 6, clip_sample=True, clip_sample_range=0.7)
    compare(
        cls, lcm(SCHEDULE, 6, thresholding=(0.9, 1.5)), 6, thresholding=True,
        dynamic_thresholding_ratio=0.9, sample_max_value=1.5,
        tolerance=1e-6,  # the bounds are float32
    )  # fmt: skip
    compare(
        cls, lcm(SCHEDULE.rescaled_zero_terminal_snr(), 4, prediction_type="v_prediction"), 4,
        rescale_betas_zero_snr=True, prediction_type="v_prediction",
    )  # fmt: skip


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", [1, 4, 9])
def test_tcd_is_diffusers(steps, prediction, eta):
    compare(
        diffusers.TCDScheduler, tcd(SCHEDULE, steps, eta=eta, prediction_type=prediction), steps,
        prediction_type=prediction, step={"eta": eta}, default_dtype=torch.float32,
    )  # fmt: skip


def test_tcd_options_are_diffusers():
    """default_dtype: s is the floor of a product that torch takes in float32."""
    cls, float32 = diffusers.TCDScheduler, {"default_dtype": torch.float32}
    plan = tcd(SCHEDULE, 6, original_inference_steps=None, strength=0.6)
    given = {"original_inference_steps": 100, "strength": 0.6}
    compare(cls, plan, 6, set_timesteps=given, **float32)
    times = [999, 700, 90, 50, 7]
    plan = tcd(SCHEDULE, timesteps=times, eta=0.3)
    compare(cls, plan, set_timesteps={"timesteps": times}, **float32)
    zero_snr = SCHEDULE.rescaled_zero_terminal_snr()
    compare(
        cls, tcd(zero_snr, 4, prediction_type="v_prediction"), 4, rescale_betas_zero_snr=True,
        prediction_type="v_prediction", **float32,
    )  # fmt: skip


def far_network(x, t):
    """Outputs that reach the clip bounds."""
    return 4 * up.model(x, t)


@pytest.mark.parametrize("clip", [None, (-1.0, 1.0)])
@pytest.mark.parametrize("steps", [1, 2, 5, 13])
def test_consistency_model_is_diffusers(steps, clip):
    compare(
        diffusers.CMStochasticIterativeScheduler, consistency_model(steps, clip=clip, s_noise=1.01),
        steps, x_T=80 * up.randn(2, 3, 4), model=far_network, clip_denoised=clip is not None,
        s_noise=1.01,
    )  # fmt: skip


def test_consistency_model_options_are_diffusers():
    cls, x_T = diffusers.CMStochasticIterativeScheduler, 80 * up.randn(2, 3, 4)
    times = [22, 0]
    compare(
        cls, consistency_model(timesteps=times), x_T=x_T, model=far_network,
        set_timesteps={"timesteps": times},
    )  # fmt: skip
    options = dict(num_train_timesteps=18, sigma_min=0.01, sigma_max=50.0, sigma_data=0.7, rho=5.0)
    plan = consistency_model(6, **options)
    compare(cls, plan, 6, x_T=x_T, model=far_network, **options)
    assert plan.initial_scale == 50.0
    # All levels: the last is sigma_min itself, of which upstream's rounding leaves 1e-10.
    compare(cls, consistency_model(40), 40, x_T=x_T, tolerance=1e-8)


def test_levels_may_be_given():
    """Algorithm 1 of the paper takes its own times."""
    ladder = fd.schedules.karras(40, 0.002, 80.0, append_zero=False)
    assert consistency_model(sigmas=ladder[[0, 22]]) == consistency_model(timesteps=[22, 0])


def test_draws_have_upstreams_dtype_and_count():
    """CM draws in the model output's dtype, also at the last call, where nothing is added."""
    plan = consistency_model(3)
    assert plan.draw_dtype == "model_output"
    assert plan.consumes.tolist() == [[True]] * 3
    assert plan.draws_noise.tolist() == [[True], [True], [False]]
    assert not consistency_model(1).consumes.any()
    assert lcm(SCHEDULE, 3).draw_dtype == "sample"


# Gaussian data N(mean, std^2) with its exact, affine consistency function: every marginal is
# right, whatever the number of steps, so the result is the data's distribution to rounding.

MEAN, STD = 0.7, 0.4


def variance(a, s):
    return a * a * STD * STD + s * s


def carried(begin, end):
    """(g, b) with x_end = g x + b along the probability flow between levels (alpha, sigma)."""
    g = np.sqrt(variance(*end) / variance(*begin))
    return g, MEAN * (end[0] - g * begin[0])


def moments(plan, levels, model):
    """Mean and variance of a plan's result, started from the exact marginal; model(i) gives
    (k, c) of the output o = k x + c at call i."""
    m, v = MEAN * levels[0][0], variance(*levels[0])
    for i in range(plan.rows):
        x, o, _, *z = plan.A[i, 0]
        k, c = model(i)
        g = x + o * k
        m, v = g * m + o * c, g * g * v + sum(weight**2 for weight in z)
    return m, v


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_lcm_samples_gaussian_data_exactly(steps):
    plan = lcm(SCHEDULE, steps, prediction_type="sample")
    at = plan.t.astype(int)
    levels = list(zip(SCHEDULE.alpha_t[at], SCHEDULE.sigma_t[at], strict=True))
    c_skip = 0.25 / ((10 * at) ** 2 + 0.25)
    c_out = 10 * at / np.sqrt((10 * at) ** 2 + 0.25)

    def model(i):
        g, b = carried(levels[i], (1.0, 0.0))
        return (g - c_skip[i]) / c_out[i], b / c_out[i]

    np.testing.assert_allclose(moments(plan, levels, model), (MEAN, STD**2), rtol=1e-12)


@pytest.mark.parametrize("steps", [2, 5, 10])
def test_consistency_model_samples_gaussian_data_exactly(steps):
    """Up to the noise of sigma_min, where its trajectories end."""
    plan = consistency_model(steps, clip=None)
    sigmas = np.exp(plan.t / 250)
    levels = [(1.0, sigma) for sigma in sigmas]
    c_skip = 0.25 / ((sigmas - 0.002) ** 2 + 0.25)
    c_out = 0.5 * (sigmas - 0.002) / np.sqrt(sigmas**2 + 0.25)

    def model(i):
        g, b = carried(levels[i], (1.0, 0.002))
        return (g - c_skip[i]) / c_out[i], b / c_out[i]

    expected = MEAN, STD**2 + 0.002**2
    np.testing.assert_allclose(moments(plan, levels, model), expected, rtol=1e-10)


@pytest.mark.parametrize("eta", [0.0, 0.2, 0.7, 1.0])
def test_tcd_samples_gaussian_data_exactly(eta):
    """Up to the noise of the chain's first step."""
    plan = tcd(SCHEDULE, 5, eta=eta)
    a, s = SCHEDULE.alpha_t, SCHEDULE.sigma_t
    at = np.append(plan.t.astype(int), 0)
    target = np.floor(np.float32(1 - eta) * at[1:].astype(np.float32)).astype(int)
    levels = [(a[t], s[t]) for t in at[:-1]]

    def model(i):  # the epsilon that leads exactly to the level s of this call
        t, to = at[i], target[i]
        g, b = carried(levels[i], (a[to], s[to]))
        weight = s[to] - a[to] * s[t] / a[t]
        return (g - a[to] / a[t]) / weight, b / weight

    expected = MEAN * a[0], variance(a[0], s[0])
    np.testing.assert_allclose(moments(plan, levels, model), expected, rtol=1e-11)


def test_tcd_without_eta_is_ddim_to_the_chains_first_level():
    plan = tcd(SCHEDULE, timesteps=[900, 500, 100], eta=0.0)
    ddim = fd.solvers.ddim(SCHEDULE, timesteps=[900, 500, 100, 0], clip=None)
    np.testing.assert_allclose(plan.A, ddim.A[:3, :, :3], rtol=1e-9)


def test_boundary_condition_makes_the_clean_end_an_identity():
    """f(x, epsilon) = x: c_skip = 1, c_out = 0 at the lowest level."""
    plan = consistency_model(sigmas=[0.002], clip=None)
    np.testing.assert_array_equal(plan.A[0, 0], [1.0, 0.0, 0.0])
    plan = lcm(SCHEDULE, timesteps=[0], prediction_type="sample")
    np.testing.assert_array_equal(plan.A[0, 0], [1.0, 0.0, 0.0])


@pytest.mark.parametrize(
    ("builder", "arguments", "error", "names"),
    [
        (lcm, dict(), ValueError, "steps and timesteps"),
        (lcm, dict(steps=4, timesteps=[5]), ValueError, "steps and timesteps"),
        (lcm, dict(steps=51), ValueError, "steps must be <= 50"),
        (tcd, dict(steps=40, strength=0.5), ValueError, "steps must be <= 25"),
        (lcm, dict(steps=0), ValueError, "steps"),
        (lcm, dict(steps=2, original_inference_steps=1001), ValueError,
         "original_inference_steps"),
        (lcm, dict(steps=2, strength=0.0), ValueError, "strength"),
        (tcd, dict(timesteps=[5, 5]), ValueError, "timesteps"),
        (tcd, dict(timesteps=[1000]), ValueError, "timesteps"),
        (tcd, dict(timesteps=[5.5]), TypeError, "timesteps"),
        (tcd, dict(steps=2, eta=1.1), ValueError, "eta"),
        (tcd, dict(steps=2, eta="1"), TypeError, "eta"),
        (lcm, dict(steps=2, timestep_scaling=0), ValueError, "timestep_scaling"),
        (lcm, dict(steps=2, sigma_data=-1), ValueError, "sigma_data"),
        (lcm, dict(steps=2, clip=(0, 0)), ValueError, "clip"),
        (lcm, dict(steps=2, prediction_type="eps"), ValueError, "prediction_type"),
        (lcm, dict(schedule=fd.schedules.flow(10), steps=2), TypeError, "schedule"),
        (tcd, dict(schedule=SCHEDULE.rescaled_zero_terminal_snr(), steps=2), ValueError,
         "prediction_type"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(builder, arguments, error, names):
    with pytest.raises(error, match=names):
        builder(**({"schedule": SCHEDULE} | arguments))


@pytest.mark.parametrize(
    ("arguments", "error", "names"),
    [
        (dict(), ValueError, "steps, timesteps and sigmas"),
        (dict(steps=2, sigmas=[1.0]), ValueError, "steps, timesteps and sigmas"),
        (dict(steps=41), ValueError, "steps"),
        (dict(timesteps=[0, 22]), ValueError, "timesteps"),
        (dict(timesteps=[40, 0]), ValueError, "timesteps"),
        (dict(sigmas=[1.0, 2.0]), ValueError, "sigmas"),
        (dict(sigmas=[1.0, 0.001]), ValueError, "sigmas"),
        (dict(steps=2, sigma_min=0.0), ValueError, "sigma_min"),
        (dict(steps=2, sigma_max=0.001), ValueError, "sigma_max"),
        (dict(steps=2, sigma_data=0.0), ValueError, "sigma_data"),
        (dict(steps=2, rho=0.0), ValueError, "rho"),
        (dict(steps=2, s_noise=-1.0), ValueError, "s_noise"),
        (dict(steps=2, num_train_timesteps=1), ValueError, "num_train_timesteps"),
        (dict(steps=2, clip=2), TypeError, "clip"),
    ],
)  # fmt: skip
def test_bad_arguments_of_consistency_models_are_named(arguments, error, names):
    with pytest.raises(error, match=names):
        consistency_model(**arguments)
