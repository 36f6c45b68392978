"""Langevin samplers: the papers' algorithms in float64, diffusers' score-SDE schedulers, exact
Gaussian data, and the corrector's measured step size on every backend."""

from __future__ import annotations

import dataclasses
import math

import diffusers.schedulers.deprecated.scheduling_sde_vp as upstream_vp
import diffusers.schedulers.scheduling_sde_ve as upstream_ve
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiff as fd
from fastdiff.solvers.langevin import (
    ncsn,
    ncsnv2,
    ncsnv2_step_size,
    score_sde_ve,
    score_sde_vp,
)
from fastdiff.tracing.linear_form import NotAffineError
from fastdiff.tracing.record import Recorder
from tests.conftest import load_helper

mixture = load_helper("gaussian_mixture")
LADDER = fd.schedules.ve_geometric(4, 0.1, 2.0, append_zero=False)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X_T, DRAWS = randn(3, 2, 5), randn(120, 3, 2, 5, seed=1)


def network(x, t):
    """Any smooth nonlinear function; t is one number or one a sample."""
    t = torch.as_tensor(t, dtype=torch.float64).reshape(-1, *[1] * (x.dim() - 1))
    return torch.sin(1.3 * x + 0.1 * t) * 0.8 - 0.3 * x


def score(kind, x, t, alpha, sigma):
    """What the network says, as a score."""
    o = network(x, t)
    return {"score": o, "epsilon": -o / sigma, "sample": (alpha * o - x) / sigma**2}[kind]


def ours(plan, x=X_T):
    draws = iter(DRAWS)
    result = fd.sample(network, plan, x_T=x, noise=lambda *_: next(draws), backend="reference")
    return result, len(DRAWS) - len(list(draws))


def close(actual, expected, tolerance=1e-12):
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert (actual - expected).abs().max() < tolerance * expected.abs().max()


def corrected(x, s, z, snr, factor=1.0):
    """Algorithms 4 and 5 of Song et al. 2021, norms averaged over the batch."""
    g_norm = s.reshape(len(s), -1).norm(dim=1).mean()
    z_norm = z.reshape(len(z), -1).norm(dim=1).mean()
    eps = 2 * factor * (snr * z_norm / g_norm) ** 2
    return x + eps * s + torch.sqrt(2 * eps) * z


# Annealed Langevin dynamics.


@pytest.mark.parametrize("kind", ["score", "epsilon", "sample"])
@pytest.mark.parametrize("denoise", [False, True])
@pytest.mark.parametrize("improved", [False, True])
def test_annealed_langevin_is_the_papers_algorithm_1(improved, denoise, kind):
    T, epsilon, x, draws = 3, 0.002, X_T, iter(DRAWS)
    for sigma in LADDER:
        alpha = epsilon * sigma**2 / LADDER[-1] ** 2
        for _ in range(T):
            s = score(kind, x, sigma, 1.0, sigma)
            if improved:
                x = x + alpha * s + math.sqrt(2 * alpha) * next(draws)
            else:
                x = x + alpha / 2 * s + math.sqrt(alpha) * next(draws)
    if denoise:
        x = x + LADDER[-1] ** 2 * score(kind, x, LADDER[-1], 1.0, LADDER[-1])
    plan = (ncsnv2 if improved else ncsn)(
        LADDER, steps_per_level=T, step_size=epsilon, prediction_type=kind, denoise=denoise
    )
    assert plan.states == 1 and plan.rows == 12 + denoise and plan.initial_scale == LADDER[0]
    actual, used = ours(plan)
    assert used == 12
    close(actual, x)


def test_labels_of_a_path_are_the_models_t():
    path = fd.schedules.ve(LADDER, timesteps=[3, 2, 1, 0])
    plan = ncsn(path, steps_per_level=2, step_size=1e-3)
    assert plan.t.tolist() == [3, 3, 2, 2, 1, 1, 0, 0]
    assert plan.A.tolist() == ncsn(LADDER, steps_per_level=2, step_size=1e-3).A.tolist()


@pytest.mark.parametrize("L, sigma_max, published", [(232, 50.0, 6.2e-6), (500, 90.0, 3.3e-6)])
def test_step_size_is_that_of_the_paper(L, sigma_max, published):
    """NCSNv2, the settings for CIFAR-10 and CelebA, printed with two digits."""
    sigmas = fd.schedules.ve_geometric(L, 0.01, sigma_max, append_zero=False)
    epsilon = ncsnv2_step_size(sigmas, 5)
    assert float(f"{epsilon:.1e}") == published
    # And it is the minimum of the paper's ratio.
    gamma, a = (sigma_max / 0.01) ** (1 / (L - 1)), epsilon / 0.01**2 * np.array([0.98, 1, 1.02])
    ratio = (1 - a) ** 10 * (gamma**2 - 2 / (2 - a)) + 2 / (2 - a)
    assert ratio[1] < min(ratio[0], ratio[2]) and 1 < ratio[1] < 1.1
    assert ncsnv2(sigmas).about["step_size"] == f"{epsilon:.6g}"


def gaussian_moments(plan, mean, std, alpha_sigma, start):
    """(m, v) of the result for x_T ~ N(start), data N(mean, std^2) and its exact score, through the
    rows of a plan without corrector; alpha_sigma gives the path at every row."""
    m, v = start
    for i in range(plan.rows):
        a, s = alpha_sigma[i]
        k = 1 / (a * a * std * std + s * s)
        cx, co, _, cz = (*plan.A[i, 0], 0.0)[:4]
        m, v = cx * m - co * k * (m - a * mean), (cx - co * k) ** 2 * v + cz**2
    return m, v


@pytest.mark.parametrize("improved", [False, True])
def test_langevin_on_gaussian_data_reaches_its_stationary_law(improved):
    """At one level of variance V the chain tends to N(mean, V / (1 - a / 2)), a = drift / V."""
    mean, std, sigma, epsilon = 0.7, 0.4, 0.3, 0.02
    plan = (ncsnv2 if improved else ncsn)(
        [sigma], steps_per_level=400, step_size=epsilon, **({"denoise": False} if improved else {})
    )
    V = std**2 + sigma**2
    m, v = gaussian_moments(plan, mean, std, [(1.0, sigma)] * 400, (5.0, 9.0))
    a = epsilon * (1.0 if improved else 0.5) / V
    assert m == pytest.approx(mean, abs=1e-6) and v == pytest.approx(V / (1 - a / 2), rel=1e-6)


def test_annealed_samples_have_the_moments_of_their_rows_and_of_the_data():
    mean, std, n = 0.7, 0.4, 1 << 12
    sigmas = fd.schedules.ve_geometric(20, 0.1, 5.0, append_zero=False)
    plan = ncsnv2(sigmas, steps_per_level=50)

    def model(x, t):
        return -(x - mean) / (std**2 + t.to(x.dtype)[:, None] ** 2)

    x = fd.sample(model, plan, shape=(n, 2), seed=3).double()
    path = [(1.0, sigma) for sigma in plan.t]
    m, v = gaussian_moments(plan, mean, std, path, (0.0, sigmas[0] ** 2))
    assert (x.mean(0) - m).abs().max() < 5 * math.sqrt(v / n)
    assert (x.var(0) - v).abs().max() < 5 * v * math.sqrt(2 / n)
    assert abs(m - mean) < 1e-6 and abs(v / std**2 - 1) < 0.05


# Predictor-corrector sampling of score SDEs.


@pytest.fixture
def double():
    """diffusers' score-SDE schedulers ask for no dtype: their tables take the default one."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("M", [0, 1, 2])
@pytest.mark.parametrize("steps, eps", [(2, 1e-5), (9, 1e-5), (30, 0.06)])
def test_ve_is_diffusers_in_float64(monkeypatch, double, steps, eps, M):
    """The loop of diffusers' ScoreSdeVePipeline: correct, correct, predict; the last mean.

    With a large sampling_eps two of the times fall on one discrete level.
    """
    draws = iter(DRAWS)
    monkeypatch.setattr(upstream_ve, "randn_tensor", lambda *_, **__: next(draws))
    scheduler = upstream_ve.ScoreSdeVeScheduler(
        snr=0.2, sigma_min=0.05, sigma_max=1.5, sampling_eps=eps
    )
    scheduler.set_timesteps(steps)
    scheduler.set_sigmas(steps)
    x = 1.5 * X_T
    for i, t in enumerate(scheduler.timesteps):
        sigma = scheduler.sigmas[i]
        for _ in range(M):
            x = scheduler.step_correct(network(x, sigma), x, return_dict=False)[0]
        x, mean = scheduler.step_pred(network(x, sigma), t, x, return_dict=False)
    plan = score_sde_ve(
        steps, sigma_min=0.05, sigma_max=1.5, snr=0.2, corrector_steps=M, sampling_eps=eps
    )
    assert plan.rows == steps * (1 + M) and plan.states == 1 and plan.initial_scale == 1.5
    actual, _ = ours(plan, 1.5 * X_T)
    close(actual, mean)


def test_vp_euler_maruyama_is_diffusers_in_float64(monkeypatch, double):
    draws = iter(DRAWS)
    monkeypatch.setattr(upstream_vp, "randn_tensor", lambda *_, **__: next(draws))
    scheduler = upstream_vp.ScoreSdeVpScheduler()
    scheduler.set_timesteps(25)
    x = X_T
    for t in scheduler.timesteps:
        x, _ = scheduler.step_pred(network(x, 999 * t), x, t)
    plan = score_sde_vp(
        25, predictor="euler_maruyama", prediction_type="epsilon", corrector_steps=0, denoise=False
    )
    actual, used = ours(plan)
    assert used == 25
    close(actual, x)


@pytest.mark.parametrize("kind", ["score", "epsilon"])
@pytest.mark.parametrize(
    "predictor", ["reverse_diffusion", "ancestral", "euler_maruyama", "probability_flow"]
)
def test_discrete_ladders_are_the_papers_algorithms_2_and_4(predictor, kind):
    x, draws, r = X_T, iter(DRAWS), 0.15
    for i, sigma in enumerate(LADDER):
        x = corrected(x, score(kind, x, sigma, 1.0, sigma), next(draws), r)
        down = LADDER[i + 1] if i < 3 else 0.0
        gap, s = sigma**2 - down**2, score(kind, x, sigma, 1.0, sigma)
        if predictor == "probability_flow":
            x = x + gap / 2 * s
            continue
        noise = math.sqrt(gap) * (down / sigma if predictor == "ancestral" else 1.0)
        x = x + gap * s + noise * next(draws)
    plan = score_sde_ve(
        LADDER, predictor=predictor, snr=r, prediction_type=kind, denoise=False
    )  # fmt: skip
    close(ours(plan)[0], x)


@pytest.mark.parametrize("kind", ["score", "epsilon"])
@pytest.mark.parametrize(
    "predictor", ["reverse_diffusion", "ancestral", "euler_maruyama", "probability_flow"]
)
def test_discrete_chains_are_the_papers_algorithms_3_and_5(predictor, kind):
    schedule = fd.schedules.linear(6, 0.01, 0.3)
    betas = np.linspace(0.01, 0.3, 6)
    abar, x, draws, r = np.cumprod(1 - betas), X_T, iter(DRAWS), 0.15
    for i in reversed(range(6)):
        beta, alpha, sigma = betas[i], math.sqrt(abar[i]), math.sqrt(1 - abar[i])
        x = corrected(x, score(kind, x, i, alpha, sigma), next(draws), r, 1 - beta)
        s = score(kind, x, i, alpha, sigma)
        if predictor == "ancestral":
            x = (x + beta * s) / math.sqrt(1 - beta)
        elif predictor == "euler_maruyama":
            x = x - (-0.5 * beta * x - beta * s)
        else:
            part = 0.5 if predictor == "probability_flow" else 1.0
            x = (2 - math.sqrt(1 - beta)) * x + part * beta * s
        if predictor != "probability_flow" and i > 0:
            x = x + math.sqrt(beta) * next(draws)
    plan = score_sde_vp(schedule, predictor=predictor, snr=r, prediction_type=kind)
    close(ours(plan)[0], x, 1e-11)


@pytest.mark.parametrize("sde", ["ve", "vp"])
@pytest.mark.parametrize(
    "predictor", ["reverse_diffusion", "ancestral", "euler_maruyama", "probability_flow"]
)
def test_predictors_converge_on_gaussian_data_with_order_1(sde, predictor):
    """Variance (and mean) of the result against the closed form of SDE and ODE."""
    mean, std, start = 0.7, 0.4, (1.3, 0.8)
    steps, errors = [200, 400, 800], []
    for N in steps:
        if sde == "ve":
            plan = score_sde_ve(
                N, sigma_min=1e-4, sigma_max=1.0, sampling_eps=1e-5, predictor=predictor,
                corrector_steps=0,
            )  # fmt: skip
            path = [(1.0, t) for t in plan.t]
        else:
            plan = score_sde_vp(
                N, beta_max=6.0, predictor=predictor, corrector_steps=0, timestep_scale=1.0,
                sampling_eps=1e-6,
            )  # fmt: skip
            log_alpha = -0.25 * plan.t**2 * 5.9 - 0.05 * plan.t
            path = list(zip(np.exp(log_alpha), np.sqrt(-np.expm1(2 * log_alpha)), strict=True))
        a, s = path[0]
        total = a * a * std * std + s * s
        ode = predictor == "probability_flow"
        g = std / math.sqrt(total) if ode else a * std * std / total
        goal = mean + g * (start[0] - a * mean), g * g * start[1]
        goal = goal if ode else (goal[0], goal[1] + std * std * s * s / total)
        errors.append(np.abs(np.subtract(gaussian_moments(plan, mean, std, path, start), goal)))
    for moment in (0, 1):
        found = np.array(errors)[:, moment]
        assert found[-1] < 1e-6 or mixture.slope(steps, found) == pytest.approx(1.0, abs=0.2), (
            moment, found,
        )  # fmt: skip


def test_corrected_samples_of_gaussian_data_have_its_moments():
    """Many elements a sample: the norms are sharp, and the corrector keeps the variance V of a
    level up to its step, V / (1 - eps / 2V) with eps = 2 r^2 V."""
    mean, std = 0.7, 0.4
    plan = score_sde_ve(60, sigma_min=0.02, sigma_max=3.0, corrector_steps=2, snr=0.1)

    def model(x, t):
        return -(x - mean) / (std**2 + t.to(x.dtype)[:, None] ** 2)

    x = fd.sample(model, plan, shape=(256, 256), seed=3).double()
    assert abs(x.mean() - mean) < 0.01
    assert abs(x.var() / std**2 - 1) < 0.06
    idle = np.where(plan.snr[:, None, None] > 0, [1, 0, 0, 0], plan.A)
    crude = dataclasses.replace(plan, snr=None, A=idle)
    x = fd.sample(model, crude, shape=(256, 256), seed=3).double()
    assert abs(x.var() / std**2 - 1) > 0.06


# The corrector's step, on every backend.


def corrector_plan():
    rec = Recorder("corrector")
    x = rec.begin()
    x, o = rec.call(x, t=2)
    x = rec.corrector(x, -2.0 * o, snr=0.3)
    x, o = rec.call(x, t=1)
    x = 0.5 * x + 0.1 * o + 0.2 * rec.noise()
    x, o = rec.call(x, t=0)
    x = rec.corrector(0.9 * x, o, snr=0.2)
    return rec.finish(x)


PLAN = corrector_plan()


def test_corrector_rows_hold_their_unscaled_coefficients(tmp_path):
    assert PLAN.snr.tolist() == [0.3, 0.0, 0.2] and PLAN.states == 1
    np.testing.assert_array_equal(PLAN.A[:, 0], [[1, -2, 0, 1], [0.5, 0.1, 0, 0.2], [0.9, 1, 0, 1]])
    assert "2 Langevin corrector steps" in str(PLAN)
    PLAN.save(tmp_path / "plan.npz")
    loaded = fd.SolverPlan.load(tmp_path / "plan.npz")
    assert loaded == PLAN and loaded.snr.tolist() == PLAN.snr.tolist()
    assert dataclasses.replace(PLAN, snr=None) != PLAN


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backends_agree_on_bits_with_the_reference(accelerated, assert_same_bits, guided, dtype):
    """Seeded noise; the norms are the same torch reductions for all of them."""
    options = dict(shape=(3, 2, 37), seed=7, dtype=dtype)
    options |= dict(guidance_scale=torch.tensor([1.0, 2.5, 4.0])) if guided else {}

    def model(x, t):
        return torch.sin(x.float() * 1.7 + torch.arange(len(x))[:, None, None]).to(x.dtype)

    expected = fd.sample(model, PLAN, backend="reference", **options)
    assert_same_bits(fd.sample(model, PLAN, backend=accelerated, **options), expected)


def test_seeded_correctors_are_those_given_the_same_noise(assert_same_bits):
    run, twin = (fd.Sampler(PLAN).start(shape=(3, 2, 9), seed=7, sample_offset=4) for _ in range(2))
    for i in range(3):
        output = network(run.model_input.double(), run.t).float()
        step, stream = PLAN.draws[i, 0]
        z = fd.randn((3, 2, 9), 7, sample_offset=4, step=int(step), stream=int(stream))
        assert_same_bits(run.step(output), twin.step(output, noise=[z]))


def test_step_size_follows_guided_output_and_batch_mean_of_norms():
    x, g = randn(3, 4, 5), torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64)
    outputs, z = randn(6, 4, 5, seed=2), randn(3, 4, 5, seed=3)
    run = fd.Sampler(PLAN, backend="reference").start(
        x, noise=lambda *_: z, guidance_scale=g, dtype=torch.float64
    )
    actual = run.step(outputs)
    o = outputs[:3] + g[:, None, None] * (outputs[3:] - outputs[:3])
    close(actual, corrected(x, -2.0 * o, z, 0.3))


def test_gradients_take_the_step_size_as_a_constant():
    x = randn(2, 3).requires_grad_()
    output, z = randn(2, 3, seed=1), randn(2, 3, seed=2)
    results = []
    for _ in range(2):
        run = fd.Sampler(PLAN, backend="reference").start(x, noise=lambda *_: z)
        o = output.clone().requires_grad_()
        results.append((run.step(o), o))
    (y, o), _ = results
    (gradient,) = torch.autograd.grad(y.sum(), o)
    eps = 2 * (0.3 * z.norm(dim=1).mean() / (2 * output.norm(dim=1).mean())) ** 2
    close(gradient, torch.full_like(gradient, float(-2 * eps)))


class NoReadback(TorchDispatchMode):
    """Refuses operations whose result the host has to wait for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "local_scalar_dense" not in str(func) and "nonzero" not in str(func), func
        return func(*args, **(kwargs or {}))


def test_a_corrector_step_reads_nothing_back():
    run = fd.Sampler(PLAN, backend="reference").start(shape=(2, 8), seed=0)
    output = torch.ones(2, 8)
    with NoReadback(), pytest.raises(AssertionError, match="local_scalar"):
        output.sum().item()
    with NoReadback():
        run.step(output)


def test_a_score_of_zero_gives_nan():
    run = fd.Sampler(PLAN).start(torch.zeros(2, 4), seed=0)
    assert run.step(torch.zeros(2, 4)).isnan().all()


def test_misused_correctors_are_refused():
    rec = Recorder("corrector")
    x = rec.begin()
    x, o = rec.call(x, t=0)
    with pytest.raises(ValueError, match="snr"):
        rec.corrector(x, o, snr=0.0)
    with pytest.raises(NotAffineError, match="output of this call"):
        rec.corrector(x, o + x, snr=0.1)
    y = rec.corrector(x, o, snr=0.1)
    with pytest.raises(ValueError, match="one corrector"):
        rec.corrector(x, o, snr=0.1)
    with pytest.raises(NotAffineError, match="last thing"):
        rec.finish(2.0 * y)
    for snr in ([-0.1, 0, 0], [0.1, 0], [math.nan, 0, 0]):
        with pytest.raises(ValueError, match="snr"):
            dataclasses.replace(PLAN, snr=np.array(snr))
    A = np.array(PLAN.A)
    A[0, 0, 1] = 0.0
    with pytest.raises(ValueError, match="corrector row must use"):
        dataclasses.replace(PLAN, A=A)


@pytest.mark.parametrize(
    ("call", "error", "name"),
    [
        (lambda: ncsn([1.0, 1.0]), ValueError, "sigmas"),
        (lambda: ncsn([1.0, 0.0]), ValueError, "sigmas"),
        (lambda: ncsn(fd.schedules.flow(5)), ValueError, "sigmas"),
        (lambda: ncsn(LADDER, steps_per_level=0), ValueError, "steps_per_level"),
        (lambda: ncsn(LADDER, step_size=0.0), ValueError, "step_size"),
        (lambda: ncsn(LADDER, step_size=0.0401), ValueError, "step_size"),
        (lambda: ncsnv2(LADDER, step_size=0.0201), ValueError, "step_size"),
        (lambda: ncsnv2([3.0, 2.0, 0.1]), ValueError, "geometric"),
        (lambda: ncsnv2_step_size([1.0], 5), ValueError, "sigmas"),
        (lambda: ncsn(LADDER, prediction_type="eps"), ValueError, "prediction_type"),
        (lambda: score_sde_ve(0), ValueError, "sigmas"),
        (lambda: score_sde_ve("10"), ValueError, "sigmas"),
        (lambda: score_sde_ve(5, sigma_max=0.001), ValueError, "sigma_max"),
        (lambda: score_sde_ve(5, sampling_eps=0), ValueError, "sampling_eps"),
        (lambda: score_sde_ve(5, predictor="heun"), ValueError, "predictor"),
        (lambda: score_sde_ve(5, snr=0), ValueError, "snr"),
        (lambda: score_sde_ve(5, corrector_steps=-1), ValueError, "corrector_steps"),
        (lambda: score_sde_ve(5, prediction_type="sample"), ValueError, "prediction_type"),
        (lambda: score_sde_vp(5), ValueError, "beta_max"),
        (lambda: score_sde_vp(LADDER), TypeError, "schedule"),
        (
            lambda: score_sde_vp(fd.schedules.linear(9).rescaled_zero_terminal_snr()),
            ValueError, "schedule",
        ),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(call, error, name):
    with pytest.raises(error, match=name):
        call()
