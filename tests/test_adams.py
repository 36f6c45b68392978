"""PNDM, PLMS and improved PNDM: diffusers' code, orders of convergence, history."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch

import fastdiff as fd
from fastdiff.solvers.adams import ADAMS_BASHFORTH, ipndm, plms, pndm
from fastdiff.solvers.grid import grid
from tests.conftest import load_helper

up = load_helper("diffusers_float64")
mixture = load_helper("gaussian_mixture")

SCHEDULE = fd.schedules.linear(1000)
BETAS = {"beta_start": 1e-4, "beta_end": 0.02}
# A path whose lowest level has noise (sigma 0.14) and which is smooth from there on.
T = 1921
SMOOTH = fd.schedules.custom(np.r_[0.02, np.linspace(1e-4, 0.02, T - 1) * 1000 / T])


def replay(plan, x_T, model=up.model):
    return fd.sample(model, plan, x_T=x_T, backend="reference")


# Against diffusers, float64 throughout.


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("to_one", [False, True])
@pytest.mark.parametrize(
    ("steps", "spacing", "offset"),
    [(10, "leading", 0), (20, "leading", 1), (50, "leading", 1), (20, "trailing", 0)],
)
@pytest.mark.parametrize("builder", [pndm, plms])
def test_pseudo_methods_are_diffusers_pndm(builder, steps, spacing, offset, to_one, prediction):
    x_T = up.randn(2, 3, 4)
    (*_, expected), t, _ = up.run(
        diffusers.PNDMScheduler, x_T, steps, skip_prk_steps=builder is plms,
        timestep_spacing=spacing, steps_offset=offset, set_alpha_to_one=to_one,
        prediction_type=prediction, **BETAS,
    )  # fmt: skip
    plan = builder(
        SCHEDULE, steps, spacing=spacing, steps_offset=offset, set_alpha_to_one=to_one,
        prediction_type=prediction, combine="model_output",
    )  # fmt: skip
    np.testing.assert_array_equal(plan.t, t)
    assert plan.rows == steps + (9 if builder is pndm else 1)
    assert up.relative(replay(plan, x_T), expected) < 1e-12


def ipndm_path(sigma):
    """diffusers' IPNDM path at its own levels, noisiest first."""
    alpha = np.sqrt(1 - sigma**2)
    t = np.arctan2(sigma, alpha) / np.pi * 2
    return fd.schedules.GaussianPath(alpha[::-1], sigma[::-1], t[::-1])


@pytest.mark.parametrize("steps", [1, 3, 4, 12])
def test_ipndm_is_diffusers(steps):
    sigma = np.append(np.sin(np.linspace(0.97, 0.05, steps) * np.pi / 2) ** 2, 0.0)
    x_T = up.randn(2, 3, 4)
    (*_, expected), t, _ = up.run(diffusers.IPNDMScheduler, x_T, steps, trained_betas=list(sigma))
    plan = ipndm(ipndm_path(sigma[:-1]), steps, spacing="linspace", prediction_type="v_prediction")
    np.testing.assert_allclose(plan.t, t, rtol=1e-14)
    assert up.relative(replay(plan, x_T), expected) < 1e-12


def test_ipndm_from_pure_noise_is_diffusers_but_for_the_first_output():
    """At alpha = 0 x_0 is minus the v-output; diffusers drops it, as if it were 0."""
    x_T = up.randn(2, 3, 4)
    expected = up.run(diffusers.IPNDMScheduler, x_T, 9).states[-1]
    sigma = np.sin(np.linspace(1, 0, 10)[:-1] * np.pi / 2) ** 2
    plan = ipndm(ipndm_path(sigma), 9, spacing="linspace", prediction_type="v_prediction")

    def first_is_zero(x, t):
        return up.model(x, t) * (t < 1).reshape(-1, 1, 1)

    assert up.relative(replay(plan, x_T, first_is_zero), expected) < 1e-12
    x_0 = plan.x_start[0]
    assert x_0[plan.states] == -1.0 and np.count_nonzero(x_0) == 1


def test_ipndm_on_a_ladder_is_the_formula():
    plan = ipndm(SCHEDULE, 8, sigmas="karras", order=3, final="sigma_min")
    levels = grid(SCHEDULE, 8, sigmas="karras", final="sigma_min", convention="euler")
    alpha, sigma = levels.alpha, levels.sigma
    x_T = up.randn(2, 3, 4)
    x, slopes = x_T, []
    for i, t in enumerate(levels.t):
        slopes = [up.model(x, torch.full((2,), t, dtype=torch.float64)), *slopes][:3]
        e = sum(b * d for b, d in zip(ADAMS_BASHFORTH[len(slopes) - 1], slopes, strict=True))
        x_0 = (x - sigma[i] * e) / alpha[i]
        x = alpha[i + 1] * x_0 + sigma[i + 1] * e
    assert up.relative(replay(plan, x_T), x) < 1e-12


def test_pseudo_steps_run_between_the_kept_timesteps():
    """Also where they are not a constant stride apart (diffusers then steps by T // steps)."""
    levels = grid(SCHEDULE, 7, spacing="linspace", convention="ddim", final="sigma_min")
    plan = plms(SCHEDULE, 7, spacing="linspace")
    np.testing.assert_array_equal(plan.t, [levels.t[0], levels.t[1], *levels.t[1:]])
    ratio = levels.alpha[3:] / levels.alpha[2:-1]
    np.testing.assert_allclose(plan.A[3:, 0, 0], ratio, rtol=1e-12)


# Order of convergence on a Gaussian mixture with its exact denoiser.


def errors(builder, steps, kind="epsilon", **options):
    """Relative errors of the results against the probability-flow ODE."""
    found = []
    for n in steps:  # even steps from near T down to the schedule's first level
        timesteps = [(T - 1) // n * i for i in range(n, 0, -1)]
        plan = builder(SMOOTH, timesteps=timesteps, prediction_type=kind, **options)
        at = plan.t.astype(int)
        levels = np.stack([SMOOTH.alpha_t[at], SMOOTH.sigma_t[at]], axis=1)
        calls = iter(levels)

        def model(x, t, calls=calls):
            return mixture.output(kind, x, *next(calls))

        x_T = up.randn(16, 2, seed=3)
        end = (SMOOTH.alpha_t[0], SMOOTH.sigma_t[0])
        expected = mixture.solve(x_T, tuple(levels[0]), end, 1e-10)
        found.append(up.relative(replay(plan, x_T, model), expected))
    return found


@pytest.mark.parametrize(
    ("builder", "options", "order"),
    [
        (pndm, {}, 2), (plms, {"order": 2}, 2), (plms, {"order": 4}, 2),
        (plms, {"kind": "v_prediction"}, 2),
        (plms, {"kind": "v_prediction", "combine": "model_output"}, 1),
        (ipndm, {"order": 1, "final": "sigma_min"}, 1),
        (ipndm, {"order": 2, "final": "sigma_min"}, 2),
        (ipndm, {"order": 4, "final": "sigma_min", "kind": "sample"}, 2),
    ],
)  # fmt: skip
def test_pseudo_methods_are_of_second_order(builder, options, order):
    """As Liu et al. 2022 prove; of first order where outputs are averaged that are not epsilon.

    Higher-order slopes start above 2 and come down to it.
    """
    steps = [40, 120]
    slope = mixture.slope(steps, errors(builder, steps, **options))
    assert order - 0.15 < slope < order + 0.4


# History.


def test_history_is_the_least():
    runge_kutta = [2, 3, 2, 1, 3, 4, 3, 2, 4, 5, 4, 3, 3, 3, 3, 3, 3, 2, 1, 0]
    four = [1, 2, 3, 3, 3, 3, 3, 3, 3, 2, 1]
    assert up.history(pndm(SCHEDULE, 12)) == runge_kutta
    assert up.history(ipndm(SCHEDULE, 12)) == four
    # x_T and its slope before the first step is repeated, then one slope more at every call.
    assert up.history(plms(SCHEDULE, 12, set_alpha_to_one=True)) == [2, 1, 2, *[3] * 7, 2, 1]
    assert up.history(plms(SCHEDULE, 12, order=2, set_alpha_to_one=True)) == [2, *[1] * 11]
    for builder in (plms, ipndm):
        plan = builder(SCHEDULE, 20)
        assert plan.states == 4
        reads, writes = plan.traffic(10)
        assert len(reads) == 5 and len(writes) == 2  # three slopes, x, o; x and the new slope


def test_runge_kutta_warm_up_is_well_conditioned():
    """History that cancels would show in float32: 70 times larger coefficients were seen."""
    plan = pndm(SCHEDULE, 30)
    assert abs(plan.A).max() < 3
    x_T = up.randn(2, 3, 16, 16)
    expected = replay(plan, x_T)
    got = fd.sample(up.model, plan, x_T=x_T.float(), backend="reference")
    assert up.relative(got.double(), expected) < 1e-6


def test_epsilon_history_is_the_models_own_output():
    plan = ipndm(SCHEDULE, 12)
    new = plan.A[5, 1:]
    assert any(np.count_nonzero(row) == 1 and row[plan.states] == 1.0 for row in new)


# Ends, options, errors.


def test_first_order_methods_are_ddim():
    expected = fd.solvers.ddim(SCHEDULE, 10, clip=None, spacing="leading")
    got = ipndm(SCHEDULE, 10, order=1)
    np.testing.assert_allclose(got.A, expected.A[:, :, :3], rtol=1e-9, atol=1e-13)
    single = plms(SCHEDULE, timesteps=[600], set_alpha_to_one=True)
    expected = fd.solvers.ddim(SCHEDULE, timesteps=[600], clip=None)
    np.testing.assert_allclose(single.A, expected.A[:, :, :3], rtol=1e-9)


@pytest.mark.parametrize("builder", [pndm, plms, ipndm])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_clipping_bounds_x_0_and_derives_epsilon_from_it(builder, prediction):
    """A model whose x_0 is far outside is as good as one that says the bound."""
    plan = builder(SCHEDULE, 8, prediction_type=prediction, clip=(-0.5, 0.5))
    plain = builder(SCHEDULE, 8, prediction_type=prediction)

    def says(x_0):
        calls = iter(range(plan.rows))

        def model(x, t):
            i = next(calls)
            at = round(plan.t[i])
            a, s = SCHEDULE.alpha_t[at], SCHEDULE.sigma_t[at]
            eps = (x - a * x_0) / s
            return {"sample": 0 * x + x_0, "epsilon": eps, "v_prediction": a * eps - s * x_0}[
                prediction
            ]

        return model

    x_T = up.randn(2, 3, 4)
    got, expected = replay(plan, x_T, says(3.0)), replay(plain, x_T, says(0.5))
    assert up.relative(got, expected) < 1e-9


def test_zero_terminal_snr_is_refused_where_it_is_not_defined():
    schedule = fd.schedules.linear(100).rescaled_zero_terminal_snr()
    for builder in (pndm, plms):
        with pytest.raises(ValueError, match="schedule has alpha_t = 0"):
            builder(schedule, 10, spacing="trailing", prediction_type="v_prediction")
    with pytest.raises(ValueError, match="prediction_type"):
        ipndm(schedule, 10, spacing="trailing")
    plan = ipndm(schedule, 10, spacing="trailing", prediction_type="v_prediction")
    assert torch.isfinite(replay(plan, up.randn(2, 3))).all()


@pytest.mark.parametrize(
    ("builder", "arguments", "error", "names"),
    [
        (pndm, dict(steps=3), ValueError, "steps"),
        (plms, dict(steps=0), ValueError, "steps"),
        (plms, dict(order=1), ValueError, "order"),
        (ipndm, dict(order=5), ValueError, "order"),
        (pndm, dict(combine="x_0"), ValueError, "combine"),
        (plms, dict(combine="model_output", prediction_type="sample", clip=(-1, 1)), ValueError,
         "combine"),
        (plms, dict(set_alpha_to_one=1), TypeError, "set_alpha_to_one"),
        (ipndm, dict(clip=(1, 0)), ValueError, "clip"),
        (ipndm, dict(spacing="even"), ValueError, "spacing"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(builder, arguments, error, names):
    with pytest.raises(error, match=names):
        builder(**({"schedule": SCHEDULE, "steps": 10} | arguments))
