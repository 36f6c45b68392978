"""SA-Solver: diffusers' own code in float64, orders of convergence, moments, history."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch

import fastdiff as fd
from fastdiff.solvers.ddim import ddim
from fastdiff.solvers.grid import grid
from fastdiff.solvers.sa_solver import sa_solver
from tests.conftest import load_helper

up = load_helper("diffusers_float64")
mixture = load_helper("gaussian_mixture")
linear = load_helper("linear_moments")

T = 1000
BETAS = np.linspace(1e-4, 0.02, T)
SCHEDULE = fd.schedules.linear(T)
GENERATOR = torch.Generator().manual_seed(0)
X_T = torch.randn(2, 3, 5, 4, generator=GENERATOR, dtype=torch.float64)
NOISE = list(torch.randn(40, 2, 3, 5, 4, generator=GENERATOR, dtype=torch.float64))


def trajectory(plan, model=up.model, x_T=X_T):
    return fd.sample(
        model, plan, x_T=x_T, dtype=torch.float64, backend="reference", return_trajectory=True,
        noise=lambda row, draw: NOISE[row],
    )[1]  # fmt: skip


def agreement(steps, config=None, sigmas=None, **options):
    """Relative difference between a plan and diffusers' scheduler along the trajectory."""
    levels = grid(SCHEDULE, steps, final="sigma_min", sigmas=sigmas)
    theirs = {"trained_betas": BETAS} | options
    theirs.pop("thresholding", None)
    theirs |= config or {}
    theirs |= {"use_karras_sigmas": True} if sigmas == "karras" else {}
    theirs["tau_func"] = theirs.pop("tau", None)
    expected = up.run(
        diffusers.SASolverScheduler, X_T, steps, levels=torch.tensor(levels.ratio), noise=NOISE,
        **theirs,
    ).states  # fmt: skip
    return up.relative(trajectory(sa_solver(SCHEDULE, steps, sigmas=sigmas, **options)), expected)


@pytest.mark.parametrize("algorithm_type", ["data_prediction", "noise_prediction"])
@pytest.mark.parametrize("corrector", [1, 2, 3, 4])
@pytest.mark.parametrize("predictor", [1, 2, 3, 4])
def test_plans_are_diffusers_scheduler_in_float64(predictor, corrector, algorithm_type):
    options = dict(
        predictor_order=predictor, corrector_order=corrector, algorithm_type=algorithm_type
    )
    # Upstream sums its weights from powers of lambda itself, which cancel at orders 3 and 4.
    tolerance = 1e-12 if max(predictor, corrector) < 3 else 1e-10
    for steps in (1, 4, 12, 20):
        assert agreement(steps, **options) < tolerance
    assert agreement(12, tau=lambda t: 0.3 + float(t) / 2000, **options) < tolerance


@pytest.mark.parametrize("algorithm_type", ["data_prediction", "noise_prediction"])
def test_options_are_upstreams(algorithm_type):
    options = dict(algorithm_type=algorithm_type)
    assert agreement(12, lower_order_final=False, **options) < 1e-12
    assert agreement(12, sigmas="karras", **options) < 1e-12
    for prediction_type in ("sample", "v_prediction"):
        assert agreement(12, prediction_type=prediction_type, **options) < 1e-12


def test_thresholding_is_upstreams():
    config = dict(thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=1.5)
    # The bound s is float32 in fastdiff (ops/quantile.py), of relative error 6e-8.
    assert agreement(10, config=config, thresholding=(0.9, 1.5)) < 1e-7


def test_flow_is_upstreams():
    config = dict(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction")
    levels = grid(fd.schedules.flow(T, shift=3.0), 12)
    sigma = np.append(levels.sigma[:-1], levels.sigma[-2])  # upstream repeats the last level
    expected = up.run(
        diffusers.SASolverScheduler, X_T, 12, levels=torch.tensor(sigma), noise=NOISE, **config
    ).states
    plan = sa_solver(  # and truncates t to integers on the way to the model
        fd.schedules.flow(T, shift=3.0), sigmas=levels.ratio[:-1], timesteps=np.trunc(levels.t),
        prediction_type="flow",
    )  # fmt: skip
    assert up.relative(trajectory(plan)[:-1], expected[:-1]) < 1e-12


def test_order_1_without_a_corrector_is_ddim():
    """tau = 0 is deterministic DDIM (Xue et al. 2023)."""
    kept = [900, 700, 500, 300, 100]
    a = sa_solver(
        SCHEDULE, timesteps=kept, predictor_order=1, corrector_order=0, tau=0.0, final="zero"
    )
    b = ddim(SCHEDULE, timesteps=kept, clip=None)
    np.testing.assert_allclose(a.A[:, 0, :3], b.A[:, 0, :3], rtol=1e-12, atol=1e-13)
    assert not a.draws_noise.any()


def test_every_call_draws_as_upstream_does():
    """Also where tau is 0: a generator's later draws depend on it."""
    plan = sa_solver(SCHEDULE, 10)
    assert plan.consumes.shape == (10, 1) and plan.consumes.all()
    used = (plan.t >= 200) & (plan.t <= 800)
    assert plan.draws_noise[:, 0].tolist() == used.tolist() and plan.draw_dtype == "model_output"


HIGH, LOW = 20.0, 0.1
PATH = fd.schedules.ve(np.geomspace(LOW, HIGH, 50))


def even(steps):
    """Levels even in lambda from HIGH to LOW."""
    return dict(
        sigmas=np.geomspace(HIGH, LOW, steps + 1)[:-1], prediction_type="sample",
        lower_order_final=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def problem():
    generator = torch.Generator().manual_seed(0)
    x_T = HIGH * torch.randn(32, 2, generator=generator, dtype=torch.float64)
    return x_T, mixture.solve(x_T, (1, HIGH), (1, LOW))


@pytest.mark.parametrize("algorithm_type", ["data_prediction", "noise_prediction"])
@pytest.mark.parametrize(
    ("predictor", "corrector", "converges"),
    [(1, 0, 1), (2, 0, 2), (1, 2, 2), (2, 2, 2), (1, 3, 2), (2, 3, 3)],
)
def test_order_of_convergence_without_noise(
    problem, predictor, corrector, converges, algorithm_type
):
    x_T, exact = problem
    steps, errors = [60, 120, 240], []
    for n in steps:
        plan = sa_solver(
            PATH, predictor_order=predictor, corrector_order=corrector, tau=0,
            algorithm_type=algorithm_type, **even(n),
        )  # fmt: skip
        x = fd.sample(
            lambda x, t: mixture.output("sample", x, 1.0, t), plan, x_T=x_T, dtype=torch.float64,
            backend="reference",
        )  # fmt: skip
        errors.append(float((x - exact).abs().max()))
    assert mixture.slope(steps, errors) == pytest.approx(converges, abs=0.25), errors


@pytest.mark.parametrize("algorithm_type", ["data_prediction", "noise_prediction"])
@pytest.mark.parametrize(
    ("predictor", "corrector", "tau", "converges"),
    [(1, 0, 1.0, 1), (1, 2, 0.5, 2), (2, 0, 1.0, 2), (2, 2, 0.5, 2)],
)
def test_moments_of_gaussian_data_converge(predictor, corrector, tau, converges, algorithm_type):
    """From the exact marginal at HIGH to that at LOW: the mean is kept, the variance converges."""
    mean, std = 0.7, 0.4
    steps, errors = [48, 96, 192], []
    for n in steps:
        plan = sa_solver(
            PATH, predictor_order=predictor, corrector_order=corrector, tau=tau,
            algorithm_type=algorithm_type, **even(n),
        )  # fmt: skip
        sigma = np.geomspace(HIGH, LOW, n + 1)[:-1]
        m, v = linear.moments(plan, np.ones(n), sigma, mean, std, data=True)
        assert abs(m - mean) < 1e-11
        errors.append(abs(v / (std**2 + LOW**2) - 1))
    assert mixture.slope(steps, errors) == pytest.approx(converges, abs=0.25), errors
    assert errors[-1] < (0.03 if converges == 1 else 1e-3)


@pytest.mark.parametrize(
    ("options", "ranks"),
    [
        (dict(), [2] * 10 + [1]),
        (dict(corrector_order=0), [1] * 10 + [0]),
        (dict(predictor_order=1, corrector_order=0), [0] * 11),
    ],
)
def test_history_is_the_least(options, ranks):
    plan = sa_solver(SCHEDULE, 12, **options)
    assert plan.states - 1 == max(ranks)
    assert plan.A[:-1, 1:].any(axis=2).sum(axis=1).tolist() == ranks


@pytest.mark.parametrize("predictor", [1, 2, 3])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_a_constant_x_0_is_integrated_exactly_from_alpha_0(final, predictor):
    """Zero terminal SNR and flow at sigma = 1 start at lambda = -inf."""
    for schedule in (SCHEDULE.rescaled_zero_terminal_snr(), fd.schedules.flow(T)):
        plan = sa_solver(
            schedule, 8, predictor_order=predictor, corrector_order=3, tau=0.0, final=final,
            prediction_type="sample", spacing="trailing",
        )  # fmt: skip
        x = trajectory(plan, model=lambda x, t: torch.full_like(x, 0.3))[-1]
        alpha, sigma = (1.0, 0.0) if final == "zero" else (schedule.alpha_t[0], schedule.sigma_t[0])
        torch.testing.assert_close(x, 0.3 * alpha + sigma * X_T, rtol=1e-12, atol=1e-13)
        noisy = sa_solver(schedule, 8, tau=1.0, prediction_type="sample", spacing="trailing")
        assert torch.isfinite(trajectory(noisy)[-1]).all()


@pytest.mark.parametrize(
    ("arguments", "error", "names"),
    [
        (dict(predictor_order=0), ValueError, "predictor_order"),
        (dict(corrector_order=5), ValueError, "corrector_order"),
        (dict(algorithm_type="dpmsolver"), ValueError, "algorithm_type"),
        (dict(tau=-1.0), ValueError, "tau"),
        (dict(tau="1"), TypeError, "tau"),
        (dict(tau=lambda t: float("nan")), ValueError, "tau"),
        (dict(algorithm_type="noise_prediction", tau=1.0, final="zero"), ValueError, "final"),
        (dict(prediction_type="x0"), ValueError, "prediction_type"),
        (dict(lower_order_final=2), TypeError, "lower_order_final"),
        (dict(steps=-1), ValueError, "steps"),
    ],
)
def test_bad_arguments_are_named(arguments, error, names):
    with pytest.raises(error, match=names):
        sa_solver(**({"schedule": SCHEDULE, "steps": 10} | arguments))
