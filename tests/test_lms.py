"""Linear multistep on a schedule: diffusers' code in float64, order of convergence, options."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch

import fastdiff as fd
from fastdiff.solvers.edm import lms
from fastdiff.solvers.grid import level
from tests.conftest import load_helper

up = load_helper("diffusers_float64")
mixture = load_helper("gaussian_mixture")

SCHEDULE = fd.schedules.linear(1000)
BETAS = {"beta_start": 1e-4, "beta_end": 0.02}


def replay(plan, x_T, model=up.model):
    return fd.sample(model, plan, x_T=x_T, backend="reference")


@pytest.mark.parametrize(
    ("prediction", "ladder"),
    [
        ("epsilon", None), ("sample", None), ("v_prediction", None),
        ("epsilon", "karras"), ("sample", "exponential"), ("v_prediction", "beta"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_lms_is_diffusers(spacing, ladder, prediction):
    steps, x_T = 9, 100 * up.randn(2, 3, 4)
    config = {} if ladder is None else {f"use_{ladder}_sigmas": True}
    (*_, expected), t, _ = up.run(
        diffusers.LMSDiscreteScheduler, x_T, steps, timestep_spacing=spacing,
        prediction_type=prediction, **config, **BETAS,
    )  # fmt: skip
    plan = lms(SCHEDULE, steps, spacing=spacing, ladder=ladder, prediction_type=prediction)
    np.testing.assert_allclose(plan.t, t, rtol=1e-12, atol=1e-10)
    assert up.relative(replay(plan, x_T), expected) < 1e-12


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_lms_of_lower_order_is_diffusers(order):
    x_T = 100 * up.randn(2, 3, 4)
    expected = up.run(
        diffusers.LMSDiscreteScheduler, x_T, 12, step={"order": order}, **BETAS
    ).states[-1]  # fmt: skip
    plan = lms(SCHEDULE, 12, order=order, ladder=None, prediction_type="epsilon")
    assert up.relative(replay(plan, x_T), expected) < 1e-12
    assert plan.states == order


@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # diffusers under NumPy 2
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_lms_starts_from_diffusers_scale_and_shows_the_model_unit_variance(spacing):
    ends = 1e-4, 0.002  # little noise at the end, sigma = 1.3, so that the rules differ
    scheduler = diffusers.LMSDiscreteScheduler(1000, *ends, timestep_spacing=spacing)
    scheduler.set_timesteps(20)
    schedule = fd.schedules.linear(1000, *ends)
    plan = lms(schedule, 20, ladder=None, spacing=spacing, prediction_type="epsilon")
    assert plan.initial_scale == pytest.approx(float(scheduler.init_noise_sigma), rel=1e-4)
    sigmas = scheduler.sigmas.double().numpy()
    c_in = np.append(plan.first_c_in, plan.c_in[:-1])
    np.testing.assert_allclose(c_in, 1 / np.sqrt(sigmas[:-1] ** 2 + 1), rtol=1e-4)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_lms_converges_at_its_order(order):
    """Levels whose first steps are short, so that the low-order start does not show. An array of
    sigmas with the network's schedule."""
    schedule, steps, errors = fd.schedules.linear(1921), [80, 160], []
    for n in steps:
        sigmas = np.append(2 * (1 - (np.arange(n) / n) ** 2) ** 2, 0.0)
        plan = lms(sigmas, schedule=schedule, prediction_type="epsilon", order=order)
        levels = np.stack(level(schedule, sigmas[:-1]), axis=1)
        calls = iter(levels)

        def model(x, t, calls=calls):
            return mixture.output("epsilon", x, *next(calls))

        x_T = up.randn(16, 2, seed=3)
        expected = mixture.solve(x_T, tuple(levels[0]), (1.0, 1e-7), 1e-10)
        errors.append(up.relative(replay(plan, x_T / levels[0, 0], model), expected))
    assert mixture.slope(steps, errors) == pytest.approx(order, abs=0.2)


def test_levels_may_be_explicit_timesteps_or_sigmas_of_a_schedule():
    by_t = lms(SCHEDULE, timesteps=[900, 500, 100], prediction_type="flow")
    sigmas = np.append(SCHEDULE.sigmas[[900, 500, 100]], 0.0)
    by_sigma = lms(sigmas, schedule=SCHEDULE, prediction_type="flow")
    np.testing.assert_array_equal(by_t.t, [900, 500, 100])
    np.testing.assert_allclose(by_sigma.t, by_t.t, rtol=1e-12)
    np.testing.assert_allclose(by_sigma.A, by_t.A, rtol=1e-12, atol=1e-14)
    assert by_t.initial_scale == pytest.approx(SCHEDULE.sigmas[900], rel=1e-14)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_clipping_bounds_x_0_and_derives_epsilon_from_it(prediction):
    """A model whose x_0 is far outside is as good as one that says the bound."""
    plan = lms(SCHEDULE, 8, prediction_type=prediction, clip=(-0.5, 0.5))
    plain = lms(SCHEDULE, 8, prediction_type=prediction)
    c_in = [plan.first_c_in, *plan.c_in[:-1]]

    def says(x_0):
        calls = iter(c_in)

        def model(x, t):
            a = next(calls)
            s = (1 - a * a) ** 0.5
            x_0s = torch.full_like(x, x_0)
            eps = (x - a * x_0s) / s
            return {"sample": x_0s, "epsilon": eps, "v_prediction": a * eps - s * x_0s}[prediction]

        return model

    x_T = up.randn(2, 3, 4) * plan.initial_scale
    got, expected = replay(plan, x_T, says(3.0)), replay(plain, x_T, says(0.5))
    assert up.relative(got, expected) < 1e-9


def test_a_step_costs_five_tensors():
    """Reads three slopes, x and o; writes x and the new slope."""
    plan = lms(SCHEDULE, 20, prediction_type="epsilon")
    reads, writes = plan.traffic(10)
    assert plan.states == 4 and len(reads) == 5 and len(writes) == 2
