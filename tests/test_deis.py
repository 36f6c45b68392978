"""DEIS: diffusers' code, order of convergence, the weights' integrals, history."""

from __future__ import annotations

import diffusers
import mpmath
import numpy as np
import pytest

import fastdiff as fd
from fastdiff.solvers.deis import deis, deis_weights
from fastdiff.solvers.grid import grid, level
from tests.conftest import load_helper

up = load_helper("diffusers_float64")
mixture = load_helper("gaussian_mixture")

SCHEDULE = fd.schedules.linear(1000)
BETAS = {"beta_start": 1e-4, "beta_end": 0.02}


def replay(plan, x_T, model=up.model, **options):
    return fd.sample(model, plan, x_T=x_T, backend="reference", **options)


def diffusers_deis(x_T, steps, order, **config):
    cls = diffusers.DEISMultistepScheduler
    (*_, x), t, _ = up.run(cls, x_T, steps, solver_order=order, **BETAS, **config)
    return x, t


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(
    ("steps", "spacing", "offset"),
    [(1, "linspace", 0), (9, "linspace", 0), (20, "leading", 1), (20, "trailing", 0)],
)
def test_deis_is_diffusers(steps, spacing, offset, prediction, order):
    x_T = up.randn(2, 3, 4)
    expected, t = diffusers_deis(
        x_T, steps, order, timestep_spacing=spacing, steps_offset=offset,
        prediction_type=prediction,
    )  # fmt: skip
    plan = deis(
        SCHEDULE, steps, order=order, spacing=spacing, steps_offset=offset,
        prediction_type=prediction,
    )  # fmt: skip
    np.testing.assert_array_equal(plan.t, t)
    assert up.relative(replay(plan, x_T), expected) < 1e-12


@pytest.mark.parametrize("lower_order_final", [True, False])
def test_the_last_orders_are_diffusers(lower_order_final):
    x_T = up.randn(2, 3, 4)
    for steps in (3, 14, 15):
        expected, _ = diffusers_deis(x_T, steps, 3, lower_order_final=lower_order_final)
        plan = deis(SCHEDULE, steps, order=3, lower_order_final=lower_order_final)
        assert up.relative(replay(plan, x_T), expected) < 1e-12


# diffusers' third order cancels where levels are close, as the beta ladder's are at its ends.
@pytest.mark.parametrize(
    ("ladder", "tolerance"), [("karras", 1e-12), ("exponential", 1e-12), ("beta", 2e-10)]
)
def test_ladders_are_diffusers(ladder, tolerance):
    """Their last step, to the level that the ladder ends at, changes nothing."""
    x_T = up.randn(2, 3, 4)
    for steps, order in ((8, 2), (20, 3)):
        expected, t = diffusers_deis(x_T, steps, order, **{f"use_{ladder}_sigmas": True})
        plan = deis(SCHEDULE, steps, order=order, sigmas=ladder)
        np.testing.assert_array_equal(plan.t, t)
        assert up.relative(replay(plan, x_T), expected) < tolerance
        assert np.count_nonzero(plan.A[-1, 0]) == 1 and plan.A[-1, 0, 0] == 1.0


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_is_diffusers_up_to_its_last_step(shift):
    """diffusers repeats the last level, 1 / steps or so, where ours goes on to the path's first;
    and it truncates t."""

    def whole_t(x, t):
        return up.model(x, t.floor())

    x_T = up.randn(2, 3, 4)
    expected, _ = diffusers_deis(
        x_T, 12, 3, use_flow_sigmas=True, flow_shift=shift, prediction_type="flow_prediction",
        model=whole_t,
    )  # fmt: skip
    path = fd.schedules.flow(1000, shift=shift)
    plan = deis(path, 12, order=3, prediction_type="flow")
    _, trajectory = replay(plan, x_T, whole_t, return_trajectory=True)
    assert up.relative(trajectory[-2], expected) < 1e-12


def test_thresholding_is_diffusers():
    """To float32, in which the bound of every sample is kept."""
    x_T = up.randn(3, 3, 4)
    options = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5}
    expected, _ = diffusers_deis(x_T, 17, 3, **options)
    plain, _ = diffusers_deis(x_T, 17, 3)
    got = replay(deis(SCHEDULE, 17, order=3, thresholding=(0.9, 1.5)), x_T)
    assert up.relative(got, expected) < 1e-6 < 0.1 < up.relative(plain, expected)


def test_clipping_is_thresholding_at_one():
    """s = 1 always: x_0 in [-1, 1], epsilon derived from it."""
    x_T = up.randn(3, 3, 4)
    expected = replay(deis(SCHEDULE, 10, thresholding=(1.0, 1.0)), x_T)
    assert up.relative(replay(deis(SCHEDULE, 10, clip=(-1, 1)), x_T), expected) < 1e-12


@pytest.mark.parametrize(("order", "kind"), [(1, "epsilon"), (2, "v_prediction"), (3, "sample")])
def test_deis_converges_at_its_order(order, kind):
    """Levels whose first steps are short, so that the low-order start does not show."""
    schedule = fd.schedules.custom(np.r_[0.02, np.linspace(1e-4, 0.02, 999)])
    begin, end = 8.0, schedule.sigmas[0]
    steps, errors = [40, 80], []
    x_T = up.randn(16, 2, seed=3)
    first = tuple(float(value) for value in level(schedule, begin))
    expected = mixture.solve(x_T, first, (schedule.alpha_t[0], schedule.sigma_t[0]), 1e-10)
    for n in steps:
        sigmas = begin * (end / begin) ** ((np.arange(n) / n) ** 2)
        plan = deis(
            schedule, sigmas=sigmas, order=order, prediction_type=kind, lower_order_final=False
        )
        levels = iter(np.stack(level(schedule, sigmas), axis=1))
        got = replay(plan, x_T, lambda x, t, at=levels: mixture.output(kind, x, *next(at)))
        errors.append(up.relative(got, expected))
    assert mixture.slope(steps, errors) == pytest.approx(order, abs=0.2)
    assert errors[-1] < {1: 2e-2, 2: 1e-3, 3: 1e-4}[order]


@pytest.mark.parametrize(
    "rho",
    [
        [9.0, 3.0], [9.0, 5.0, 2.0], [80.0, 78.0, 77.9, 60.0], [0.3, 0.1, 0.01, 1e-4],
        [1.0, 0.999, 0.998, 0.9975], [157.0, 40.0, 5.0, 0.05],
    ],
)  # fmt: skip
def test_weights_are_the_integrals(rho):
    """int of Lagrange polynomials in log rho, against 40 digits; the last rho is the end."""
    log_rho = np.log(rho)
    nodes, end = [mpmath.mpf(v) for v in log_rho[:-1]], mpmath.mpf(log_rho[-1])
    got = deis_weights(log_rho[:-1], log_rho[-1])
    for j, weight in enumerate(got):
        others = [node for k, node in enumerate(nodes) if k != j]

        def integrand(u, j=j, others=others):
            basis = mpmath.fprod([(u - o) / (nodes[j] - o) for o in others])
            return basis * mpmath.e**u

        with mpmath.workdps(40):
            exact = float(mpmath.quad(integrand, [nodes[-1], end]))
        assert weight == pytest.approx(exact, rel=1e-12)
    assert sum(got) == pytest.approx(rho[-1] - rho[-2], rel=1e-10)


def test_history_is_the_least():
    assert up.history(deis(SCHEDULE, 12)) == [1] * 10 + [0]
    assert up.history(deis(SCHEDULE, 12, order=3)) == [1] + [2] * 7 + [1, 1, 0]
    assert up.history(deis(SCHEDULE, 12, order=1)) == [0] * 11
    plan = deis(SCHEDULE, 20, order=3)
    assert plan.states == 3
    reads, writes = plan.traffic(10)
    assert reads == ["x", "s1", "s2", "o"] and len(writes) == 2
    assert len(plan.traffic(10, outputs_are_fresh=True)[1]) == 1  # epsilon is the output itself


def test_first_order_is_ddim():
    plan = deis(SCHEDULE, timesteps=[900, 500, 100], order=1, final="zero")
    expected = fd.solvers.ddim(SCHEDULE, timesteps=[900, 500, 100], clip=None)
    np.testing.assert_allclose(plan.A, expected.A[:, :, :3], rtol=1e-10)


def test_a_step_to_x_0_itself_is_of_first_order():
    plan = deis(SCHEDULE, 20, order=3, final="zero")
    levels = grid(SCHEDULE, 20)
    np.testing.assert_allclose(
        plan.A[-1, 0], [1 / levels.alpha[-2], 0, 0, -levels.ratio[-2], 0], rtol=1e-12
    )
    assert up.history(plan)[-1] == 0


@pytest.mark.parametrize(
    ("arguments", "error", "names"),
    [
        (dict(steps=0), ValueError, "steps"),
        (dict(order=4), ValueError, "order"),
        (dict(order=0), ValueError, "order"),
        (dict(prediction_type="score"), ValueError, "prediction_type"),
        (dict(clip=(1, -1)), ValueError, "clip"),
        (dict(clip=(-1, 1), thresholding=(0.9, 1.0)), ValueError, "clip and thresholding"),
        (dict(thresholding=(1.5, 1.0)), ValueError, "thresholding"),
        (dict(thresholding=0.9), TypeError, "thresholding"),
        (dict(lower_order_final=1), TypeError, "lower_order_final"),
        (dict(final="one"), ValueError, "final"),
        (dict(sigmas="flow"), ValueError, "sigmas"),
        (dict(schedule=fd.schedules.linear(50).rescaled_zero_terminal_snr(),
              prediction_type="v_prediction", spacing="trailing"), ValueError, "schedule"),
        (dict(schedule=np.ones(3)), TypeError, "schedule"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(arguments, error, names):
    with pytest.raises(error, match=names):
        deis(**({"schedule": SCHEDULE, "steps": 10} | arguments))
