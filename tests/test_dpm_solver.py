"""DPM-Solver: diffusers' and k-diffusion's own code in float64, orders, moments, history."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch

import fastdiff as fd
from fastdiff.benchmarks import upstream as other_projects
from fastdiff.solvers.dpm_solver import dpm_solver
from fastdiff.solvers.grid import grid
from tests.conftest import load_helper

up = load_helper("diffusers_float64")
mixture = load_helper("gaussian_mixture")
linear = load_helper("linear_moments")
k_diffusion = other_projects.k_diffusion()

T = 1000
BETAS = np.linspace(1e-4, 0.02, T)
SCHEDULE = fd.schedules.linear(T)
UPSTREAM = {
    "multistep": diffusers.DPMSolverMultistepScheduler,
    "singlestep": diffusers.DPMSolverSinglestepScheduler,
}
HEUN = {"solver_type": "heun"}
GENERATOR = torch.Generator().manual_seed(0)
X_T = torch.randn(2, 3, 5, 4, generator=GENERATOR, dtype=torch.float64)
NOISE = list(torch.randn(40, 2, 3, 5, 4, generator=GENERATOR, dtype=torch.float64))


def trajectory(plan, model=up.model, x_T=X_T):
    return fd.sample(
        model, plan, x_T=x_T, dtype=torch.float64, backend="reference", return_trajectory=True,
        noise=lambda row, draw: NOISE[row],
    )[1]  # fmt: skip


def agreement(method, steps, schedule=SCHEDULE, sigmas=None, config=None, **options):
    """Relative difference between a plan and diffusers' scheduler along the trajectory."""
    final = options.get("final", "zero")
    levels = grid(schedule, steps, sigmas=sigmas, final=final)
    renamed = {
        "order": "solver_order", "final": "final_sigmas_type", "algorithm_type": "algorithm_type",
        "solver_type": "solver_type", "prediction_type": "prediction_type",
        "lower_order_final": "lower_order_final", "euler_at_final": "euler_at_final",
    }  # fmt: skip
    theirs = {"trained_betas": BETAS, "lower_order_final": True}
    theirs |= {renamed[key]: value for key, value in options.items() if key in renamed}
    theirs |= {"use_karras_sigmas": True} if sigmas == "karras" else {}
    expected = up.run(
        UPSTREAM[method], X_T, steps, levels=torch.tensor(levels.ratio), noise=NOISE,
        **theirs | (config or {}),
    ).states  # fmt: skip
    got = trajectory(dpm_solver(schedule, steps, method=method, sigmas=sigmas, **options))
    # A multistep step of no length, which upstream makes NaN of.
    if method == "multistep" and levels.ratio[-1] == levels.ratio[-2]:
        assert torch.equal(got[-1], got[-2])
        got, expected = got[:-1], expected[:-1]
    return up.relative(got, expected)


def cases():
    """What diffusers has; its third order of sde-dpmsolver++ is tested with k-diffusion's, since
    its weight of D_2 does not vanish with h."""
    for method in ("multistep", "singlestep"):
        for order in (1, 2, 3):
            for solver_type in ("midpoint", "heun"):
                yield method, "dpmsolver++", order, solver_type
                yield method, "dpmsolver", order, solver_type
                if order < 3 or (method, solver_type) == ("singlestep", "midpoint"):
                    yield method, "sde-dpmsolver++", order, solver_type
                if order < 3 and method == "multistep":
                    yield method, "sde-dpmsolver", order, solver_type


@pytest.mark.parametrize(("method", "algorithm_type", "order", "solver_type"), list(cases()))
def test_plans_are_diffusers_schedulers_in_float64(method, algorithm_type, order, solver_type):
    options = dict(algorithm_type=algorithm_type, order=order, solver_type=solver_type)
    for steps, final, sigmas in ((9, "zero", None), (14, "sigma_min", None), (20, "zero", "karras"),
                                 (20, "sigma_min", None)):  # fmt: skip
        if final == "zero" and not algorithm_type.endswith("++"):
            final = "sigma_min"  # upstream refuses zero
        assert agreement(method, steps, sigmas=sigmas, final=final, **options) < 1e-12


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("algorithm_type", ["dpmsolver++", "dpmsolver"])
def test_prediction_types_and_thresholding_are_upstreams(algorithm_type, prediction_type):
    options = dict(
        algorithm_type=algorithm_type, prediction_type=prediction_type, final="sigma_min"
    )
    assert agreement("multistep", 10, **options) < 1e-12
    config = dict(thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=1.5)
    options["thresholding"] = (0.9, 1.5)
    # The bound s is float32 in fastdiff (ops/quantile.py), of relative error 6e-8.
    assert agreement("multistep", 10, config=config, **options) < 1e-7


@pytest.mark.parametrize("euler", [False, True])
@pytest.mark.parametrize("lower", [False, True])
def test_orders_at_the_end_are_upstreams(lower, euler):
    for steps in (1, 2, 3, 10, 16):
        for order in (2, 3):
            options = dict(order=order, lower_order_final=lower, final="sigma_min")
            assert agreement("multistep", steps, euler_at_final=euler, **options) < 1e-12
            # Upstream turns lower_order_final on where the pattern does not fill the steps.
            assert agreement("singlestep", steps, **options) < 1e-12


@pytest.mark.parametrize("method", ["multistep", "singlestep"])
def test_flow_is_upstreams(method):
    config = dict(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction")
    path, steps = fd.schedules.flow(T, shift=3.0), 12
    levels = grid(path, steps)
    expected = up.run(
        UPSTREAM[method], X_T, steps, levels=torch.tensor(levels.sigma), lower_order_final=True,
        **config,
    ).states  # fmt: skip
    # Upstream truncates t to integers on the way to the model.
    plan = dpm_solver(
        path, sigmas=levels.ratio, timesteps=np.trunc(levels.t), method=method,
        prediction_type="flow",
    )  # fmt: skip
    assert up.relative(trajectory(plan), expected) < 1e-12


@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        ("sample_dpmpp_2m", dict(algorithm_type="dpmsolver++")),
        ("sample_dpmpp_2m_sde", dict(algorithm_type="sde-dpmsolver++")),
        ("sample_dpmpp_3m_sde", dict(algorithm_type="sde-dpmsolver++", order=3) | HEUN),
    ],
)  # fmt: skip
def test_variance_exploding_plans_are_k_diffusions(sampler, options):
    sigmas = fd.schedules.karras(20, 0.03, 14.0)
    path = fd.schedules.ve(sigmas[:-1])
    left = iter(NOISE)
    extra = {} if sampler == "sample_dpmpp_2m" else {"noise_sampler": lambda *_: next(left)}
    expected = getattr(k_diffusion.sampling, sampler)(
        lambda x, sigma, **_: up.model(x, sigma), 14.0 * X_T, torch.tensor(sigmas), disable=True,
        **extra,
    )  # fmt: skip
    plan = dpm_solver(
        path, sigmas=sigmas, prediction_type="sample", lower_order_final=False, **options
    )
    got = trajectory(plan, x_T=14.0 * X_T)[-1]
    assert up.relative([got], [expected]) < 1e-12
    assert plan.initial_scale == pytest.approx(14.0)


HIGH, LOW = 20.0, 0.1
PATH = fd.schedules.ve(np.geomspace(LOW, HIGH, 50))


def even(steps):
    """Levels even in lambda from HIGH to LOW."""
    sigmas = np.geomspace(HIGH, LOW, steps + 1)[:-1]
    return dict(sigmas=sigmas, final="sigma_min", prediction_type="sample", lower_order_final=False)


@pytest.fixture(scope="module")
def problem():
    generator = torch.Generator().manual_seed(0)
    x_T = HIGH * torch.randn(32, 2, generator=generator, dtype=torch.float64)
    return x_T, mixture.solve(x_T, (1, HIGH), (1, LOW))


@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize("algorithm_type", ["dpmsolver++", "dpmsolver"])
@pytest.mark.parametrize(
    ("method", "order", "converges"),
    # Order 3 multistep has half the second derivative, as published: see dpm_solver().
    [("multistep", 1, 1), ("multistep", 2, 2), ("multistep", 3, 2), ("singlestep", 2, 2),
     ("singlestep", 3, 3)],
)  # fmt: skip
def test_order_of_convergence(problem, method, order, converges, algorithm_type, solver_type):
    x_T, exact = problem
    steps, errors = [60, 120, 240], []
    for n in steps:
        plan = dpm_solver(
            PATH, order=order, method=method, algorithm_type=algorithm_type,
            solver_type=solver_type, **even(n),
        )  # fmt: skip
        x = fd.sample(
            lambda x, t: mixture.output("sample", x, 1.0, t), plan, x_T=x_T, dtype=torch.float64,
            backend="reference",
        )  # fmt: skip
        errors.append(float((x - exact).abs().max()))
    assert mixture.slope(steps, errors) == pytest.approx(converges, abs=0.25), errors


@pytest.mark.parametrize(
    ("options", "converges", "last"),
    [
        (dict(algorithm_type="sde-dpmsolver++", order=1), 1, 0.03),
        (dict(algorithm_type="sde-dpmsolver++", order=2), 2, 2e-4),
        (dict(algorithm_type="sde-dpmsolver++", order=2, solver_type="heun"), 2, 4e-4),
        (dict(algorithm_type="sde-dpmsolver++", order=3), 2, 2e-4),
        (dict(algorithm_type="sde-dpmsolver++", order=2, method="singlestep"), 1, 0.05),
        (dict(algorithm_type="sde-dpmsolver", order=1), 1, 2e-3),
        (dict(algorithm_type="sde-dpmsolver", order=2), 2, 2e-4),
        (dict(algorithm_type="sde-dpmsolver", order=2, solver_type="heun"), 2, 2e-4),
    ],
)
def test_moments_of_gaussian_data_converge(options, converges, last):
    """From the exact marginal at HIGH to that at LOW: the mean is kept, the variance converges."""
    mean, std = 0.7, 0.4
    steps, errors = [48, 96, 192], []
    for n in steps:
        plan = dpm_solver(PATH, **options, **even(n))
        sigma = np.geomspace(HIGH, LOW, n + 1)[:-1]
        m, v = linear.moments(plan, np.ones(n), sigma, mean, std, data=True)
        assert abs(m - mean) < 1e-12
        errors.append(abs(v / (std**2 + LOW**2) - 1))
    assert mixture.slope(steps, errors) == pytest.approx(converges, abs=0.25), errors
    assert errors[-1] < last


@pytest.mark.parametrize(
    ("options", "ranks"),
    [
        (dict(), [1] * 10 + [0]),
        (dict(order=3), [1, 2, 2, 2, 2, 2, 2, 2, 1, 1, 0]),
        (dict(algorithm_type="sde-dpmsolver++"), [1] * 10 + [0]),
        (dict(algorithm_type="dpmsolver", order=3, final="sigma_min"),
         [1, 2, 2, 2, 2, 2, 2, 2, 1, 1, 0]),
        (dict(method="singlestep"), [1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 0]),
        (dict(order=1), [0] * 11),
    ],
)  # fmt: skip
def test_history_is_the_least(options, ranks):
    plan = dpm_solver(SCHEDULE, 12, **options)
    assert plan.states - 1 == max(ranks)
    assert plan.A[:-1, 1:].any(axis=2).sum(axis=1).tolist() == ranks


def test_traffic_of_the_second_order_multistep_is_five_tensors():
    """Reads x, o and one past x_0; writes x and the new one."""
    reads, writes = dpm_solver(SCHEDULE, 20).traffic(10)
    assert sorted(reads) == ["o", "s1", "x"] and sorted(writes) == ["s1", "x"]


@pytest.mark.parametrize("method", ["multistep", "singlestep"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_a_constant_x_0_is_integrated_exactly_from_alpha_0(final, order, method):
    """Zero terminal SNR and flow at sigma = 1 start at lambda = -inf."""
    for schedule in (SCHEDULE.rescaled_zero_terminal_snr(), fd.schedules.flow(T)):
        plan = dpm_solver(
            schedule, 8, order=order, method=method, prediction_type="sample", final=final,
            spacing="trailing",
        )  # fmt: skip
        x = trajectory(plan, model=lambda x, t: torch.full_like(x, 0.3))[-1]
        alpha, sigma = (1.0, 0.0) if final == "zero" else (schedule.alpha_t[0], schedule.sigma_t[0])
        torch.testing.assert_close(x, 0.3 * alpha + sigma * X_T, rtol=1e-12, atol=1e-13)


def test_the_noise_form_ends_at_sigma_0_with_x_0():
    """sigma_t (e^h - 1) has the limit alpha_t sigma_s / alpha_s: the last step returns x_0."""
    plan = dpm_solver(SCHEDULE, 10, algorithm_type="dpmsolver")
    np.testing.assert_allclose(plan.A[-1, 0], plan.x_start[-1], rtol=1e-14)


def test_every_call_of_the_sde_draws_as_upstream_does():
    """Also the last, whose noise has no coefficient: a generator's later draws depend on it."""
    for method, dtype in (("multistep", "float32"), ("singlestep", "model_output")):
        plan = dpm_solver(SCHEDULE, 10, algorithm_type="sde-dpmsolver++", method=method)
        assert plan.consumes.shape == (10, 1) and plan.consumes.all()
        assert not plan.draws_noise[-1] and plan.draws_noise[:-1].all()
        assert plan.draw_dtype == dtype
        assert plan.draws[:, 0].tolist() == [[i, 1] for i in range(10)]


def test_clip_bounds_x_0():
    plan = dpm_solver(SCHEDULE, 10, prediction_type="sample", clip=(-0.5, 0.25))
    x = trajectory(plan, model=lambda x, t: 3 * x)[-1]
    assert x.min() == -0.5 and x.max() == 0.25


@pytest.mark.parametrize(
    ("arguments", "error", "names"),
    [
        (dict(order=4), ValueError, "order"),
        (dict(order=3, algorithm_type="sde-dpmsolver", final="sigma_min"), ValueError, "order"),
        (dict(algorithm_type="deis"), ValueError, "algorithm_type"),
        (dict(solver_type="bh2"), ValueError, "solver_type"),
        (dict(method="three"), ValueError, "method"),
        (dict(method="singlestep", algorithm_type="sde-dpmsolver"), ValueError, "algorithm_type"),
        (dict(algorithm_type="sde-dpmsolver"), ValueError, "final"),
        (dict(prediction_type="eps"), ValueError, "prediction_type"),
        (dict(clip=(1, -1)), ValueError, "clip"),
        (dict(clip=(-1, 1), thresholding=(0.9, 1.0)), ValueError, "clip and thresholding"),
        (dict(thresholding=(2.0, 1.0)), ValueError, "thresholding"),
        (dict(lower_order_final=1), TypeError, "lower_order_final"),
        (dict(steps=0), ValueError, "steps"),
        (dict(schedule=BETAS), TypeError, "schedule"),
        (dict(sigma=3), TypeError, "sigma"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(arguments, error, names):
    with pytest.raises(error, match=names):
        dpm_solver(**({"schedule": SCHEDULE, "steps": 10} | arguments))


def test_zero_terminal_snr_is_refused_where_it_is_not_defined():
    schedule = SCHEDULE.rescaled_zero_terminal_snr()
    with pytest.raises(ValueError, match="prediction_type"):
        dpm_solver(schedule, 5, spacing="trailing")
    with pytest.raises(ValueError, match="alpha_t = 0"):
        dpm_solver(
            schedule, 5, spacing="trailing", algorithm_type="dpmsolver",
            prediction_type="v_prediction",
        )  # fmt: skip
