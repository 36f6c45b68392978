"""UniPC: diffusers' own code in float64, orders of convergence, history."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch

import fastdiff as fd
from fastdiff.solvers.grid import grid
from fastdiff.solvers.unipc import unipc
from tests.conftest import load_helper

up = load_helper("diffusers_float64")
mixture = load_helper("gaussian_mixture")

T = 1000
BETAS = np.linspace(1e-4, 0.02, T)
SCHEDULE = fd.schedules.linear(T)
X_T = torch.randn(
    2, 3, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64
)  # fmt: skip


def trajectory(plan, model=up.model, x_T=X_T):
    return fd.sample(
        model, plan, x_T=x_T, dtype=torch.float64, backend="reference", return_trajectory=True
    )[1]


def agreement(steps, config=None, sigmas=None, **options):
    """Relative difference between a plan and diffusers' scheduler along the trajectory."""
    levels = grid(SCHEDULE, steps, final=options.get("final", "zero"), sigmas=sigmas)
    renamed = {"order": "solver_order", "final": "final_sigmas_type"}
    theirs = {renamed.get(key, key): value for key, value in options.items()}
    theirs |= {"use_karras_sigmas": True} if sigmas == "karras" else {}
    theirs.pop("thresholding", None)
    expected = up.run(
        diffusers.UniPCMultistepScheduler, X_T, steps, levels=torch.tensor(levels.ratio),
        trained_betas=BETAS, **theirs, **(config or {}),
    ).states  # fmt: skip
    return up.relative(trajectory(unipc(SCHEDULE, steps, sigmas=sigmas, **options)), expected)


@pytest.mark.parametrize("predict_x0", [True, False])
@pytest.mark.parametrize("solver_type", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_plans_are_diffusers_scheduler_in_float64(order, solver_type, predict_x0):
    # With bh1 upstream's step to sigma = 0 is NaN: inf times 0.
    to_zero = predict_x0 and solver_type == "bh2"
    final = "zero" if to_zero else "sigma_min"
    options = dict(order=order, solver_type=solver_type, predict_x0=predict_x0)
    for steps in (1, 3, 12, 20):
        assert agreement(steps, final=final, **options) < 1e-12
    assert agreement(12, final=final, disable_corrector=[0, 4, 5], **options) < 1e-12
    # An order-4 step to the last level extrapolates far: the plan's coefficients reach 157.
    tolerance = 1e-12 if order < 4 else 1e-11
    assert agreement(12, final="sigma_min", lower_order_final=False, **options) < tolerance
    if to_zero:
        assert agreement(12, sigmas="karras", **options) < 1e-12


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("predict_x0", [True, False])
def test_prediction_types_are_upstreams(predict_x0, prediction_type):
    options = dict(predict_x0=predict_x0, prediction_type=prediction_type, final="sigma_min")
    assert agreement(10, **options) < 1e-12


def test_thresholding_is_upstreams():
    config = dict(thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=1.5)
    # The bound s is float32 in fastdiff (ops/quantile.py), of relative error 6e-8.
    assert agreement(10, config=config, thresholding=(0.9, 1.5)) < 1e-7


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_flow_is_upstreams(shift, order):
    steps = 12
    sigma = np.linspace(1, 1 / T, steps + 1)[:-1]
    sigma = shift * sigma / (1 + (shift - 1) * sigma)
    sigma[0] -= 1e-6  # where upstream begins, so that alpha is not 0
    expected = up.run(
        diffusers.UniPCMultistepScheduler, X_T, steps, levels=torch.tensor(np.append(sigma, 0.0)),
        use_flow_sigmas=True, flow_shift=shift, prediction_type="flow_prediction",
        solver_order=order,
    ).states  # fmt: skip
    plan = unipc(  # upstream truncates t to integers on the way to the model
        fd.schedules.flow(T), sigmas=sigma / (1 - sigma), timesteps=np.trunc(sigma * T),
        order=order, prediction_type="flow",
    )  # fmt: skip
    assert up.relative(trajectory(plan), expected) < 1e-12


HIGH, LOW = 20.0, 0.1
PATH = fd.schedules.ve(np.geomspace(LOW, HIGH, 50))


@pytest.fixture(scope="module")
def problem():
    generator = torch.Generator().manual_seed(0)
    x_T = HIGH * torch.randn(32, 2, generator=generator, dtype=torch.float64)
    return x_T, mixture.solve(x_T, (1, HIGH), (1, LOW))


@pytest.mark.parametrize("predict_x0", [True, False])
@pytest.mark.parametrize("solver_type", ["bh1", "bh2"])
@pytest.mark.parametrize(
    ("order", "corrected", "converges"),
    # Order 3 alone starts with a first-order step, whose error is of order h^2 in the end.
    [(1, False, 1), (1, True, 2), (2, False, 2), (2, True, 3), (3, True, 3.7)],
)
def test_the_corrector_raises_the_order_by_one(
    problem, order, corrected, converges, solver_type, predict_x0
):
    x_T, exact = problem
    steps, errors = [60, 120, 240], []
    for n in steps:
        plan = unipc(
            PATH, sigmas=np.geomspace(HIGH, LOW, n + 1)[:-1], final="sigma_min", order=order,
            solver_type=solver_type, predict_x0=predict_x0, prediction_type="sample",
            lower_order_final=False, disable_corrector=() if corrected else range(n),
        )  # fmt: skip
        x = fd.sample(
            lambda x, t: mixture.output("sample", x, 1.0, t), plan, x_T=x_T, dtype=torch.float64,
            backend="reference",
        )  # fmt: skip
        errors.append(float((x - exact).abs().max()))
    assert mixture.slope(steps, errors) == pytest.approx(converges, abs=0.25), errors


@pytest.mark.parametrize(
    ("options", "ranks"),
    [
        (dict(), [2, 2, 2, 2, 2, 2, 2, 2, 2, 1, 0]),
        (dict(order=3), [2, 3, 3, 3, 3, 3, 3, 3, 2, 1, 0]),
        (dict(order=3, predict_x0=False, final="sigma_min"), [2, 3, 3, 3, 3, 3, 3, 3, 2, 2, 1]),
        (dict(disable_corrector=range(12)), [1] * 10 + [0]),
    ],
)
def test_history_is_the_least(options, ranks):
    plan = unipc(SCHEDULE, 12, **options)
    assert plan.states - 1 == max(ranks)
    assert plan.A[:-1, 1:].any(axis=2).sum(axis=1).tolist() == ranks


def test_traffic_of_the_second_order_is_seven_tensors():
    reads, writes = unipc(SCHEDULE, 20).traffic(10)
    assert sorted(reads) == ["o", "s1", "s2", "x"] and sorted(writes) == ["s1", "s2", "x"]


@pytest.mark.parametrize("solver_type", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_a_constant_x_0_is_integrated_exactly_from_alpha_0(final, order, solver_type):
    """Zero terminal SNR and flow at sigma = 1 start at lambda = -inf."""
    for schedule in (SCHEDULE.rescaled_zero_terminal_snr(), fd.schedules.flow(T)):
        plan = unipc(
            schedule, 8, order=order, solver_type=solver_type, prediction_type="sample",
            final=final, spacing="trailing",
        )  # fmt: skip
        x = trajectory(plan, model=lambda x, t: torch.full_like(x, 0.3))[-1]
        alpha, sigma = (1.0, 0.0) if final == "zero" else (schedule.alpha_t[0], schedule.sigma_t[0])
        torch.testing.assert_close(x, 0.3 * alpha + sigma * X_T, rtol=1e-12, atol=1e-13)


def test_the_noise_form_ends_at_sigma_0_and_a_repeated_level_changes_nothing():
    plan = unipc(SCHEDULE, 10, predict_x0=False, order=1, disable_corrector=range(10))
    np.testing.assert_allclose(plan.A[-1, 0], plan.x_start[-1], rtol=1e-14)
    ladder = unipc(SCHEDULE, 10, sigmas="karras", final="sigma_min", disable_corrector=range(10))
    assert ladder.A[-1, 0].tolist() == np.eye(ladder.A.shape[2])[0].tolist()


@pytest.mark.parametrize(
    ("arguments", "error", "names"),
    [
        (dict(order=0), ValueError, "order"),
        (dict(order=5), ValueError, "order"),
        (dict(solver_type="heun"), ValueError, "solver_type"),
        (dict(predict_x0="yes"), TypeError, "predict_x0"),
        (dict(prediction_type="x0"), ValueError, "prediction_type"),
        (dict(disable_corrector=[-1]), ValueError, "disable_corrector"),
        (dict(disable_corrector=[0.5]), TypeError, "disable_corrector"),
        (dict(clip=1.0), TypeError, "clip"),
        (dict(steps=None), TypeError, "steps"),
        (dict(final="none"), ValueError, "final"),
    ],
)
def test_bad_arguments_are_named(arguments, error, names):
    with pytest.raises(error, match=names):
        unipc(**({"schedule": SCHEDULE, "steps": 10} | arguments))
