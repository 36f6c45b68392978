"""DDPM and DDIM plans: the papers' formulas, and Gaussian data with its exact denoiser."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import fastdiff as fd

T = 40
SCHEDULE = fd.schedules.linear(T, 2e-3, 0.3)
BETA = np.linspace(2e-3, 0.3, T)
ABAR = np.cumprod(1 - BETA)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def paper_x0(prediction, x, out, abar):
    """x_0 from the model's output; abar is that of x."""
    if prediction == "epsilon":
        return (x - np.sqrt(1 - abar) * out) / np.sqrt(abar)
    if prediction == "sample":
        return out
    return np.sqrt(abar) * x - np.sqrt(1 - abar) * out


def paper_ddpm(x, outputs, z, kept, prediction, variance, clip):
    """Algorithm 2 of Ho et al. on a subsequence (Nichol & Dhariwal, section 4), float64.

    `outputs(t, x)` is the model; learned variance takes a second output v.
    """
    states = []
    for i, t in enumerate(sorted(kept, reverse=True)):
        before = max((s for s in kept if s < t), default=None)
        abar, abar_prev = ABAR[t], 1.0 if before is None else ABAR[before]
        beta = 1 - abar / abar_prev
        out, v = outputs(t, x)
        x0 = paper_x0(prediction, x, out, abar)
        if clip is not None:
            x0 = np.clip(x0, *clip)
        mean = (np.sqrt(abar_prev) * beta * x0 + np.sqrt(1 - beta) * (1 - abar_prev) * x) / (
            1 - abar
        )
        tilde = beta * (1 - abar_prev) / (1 - abar)
        if variance == "fixed_small":
            sigma = np.sqrt(tilde)
        elif variance == "fixed_large":
            sigma = np.sqrt(beta)
        else:
            f = (v + 1) / 2
            sigma = np.exp(0.5 * (f * np.log(beta) + (1 - f) * np.log(max(tilde, 1e-300))))
        x = mean if before is None else mean + sigma * z[i]
        states.append(x)
    return states


def paper_ddim(x, outputs, z, kept, prediction, eta, clip, reclip):
    """Equation 12 of Song et al. on a subsequence, float64."""
    for i, t in enumerate(sorted(kept, reverse=True)):
        before = max((s for s in kept if s < t), default=None)
        abar, abar_prev = ABAR[t], 1.0 if before is None else ABAR[before]
        out, _ = outputs(t, x)
        x0 = paper_x0(prediction, x, out, abar)
        eps = (x - np.sqrt(abar) * x0) / np.sqrt(1 - abar)
        if clip is not None:
            x0 = np.clip(x0, *clip)
            if reclip:
                eps = (x - np.sqrt(abar) * x0) / np.sqrt(1 - abar)
        sigma = eta * np.sqrt((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev))
        x = np.sqrt(abar_prev) * x0 + np.sqrt(1 - abar_prev - sigma**2) * eps + sigma * z[i]
    return x


def network(t, x):
    """Any smooth nonlinear function of (x, t), for NumPy and for torch."""
    lib = torch if isinstance(x, torch.Tensor) else np
    return lib.sin(1.3 * x + 0.01 * t) * 0.8 + 0.1 * x, lib.cos(2.0 * x) * 0.9


KEPT = [0, 3, 4, 11, 20, 31, 39]


@pytest.mark.parametrize("clip", [None, (-1.0, 1.0), (-0.5, 2.0)])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_ddpm_is_the_papers_algorithm(prediction, variance, clip):
    plan = fd.solvers.ddpm(
        SCHEDULE, timesteps=KEPT, prediction_type=prediction, variance=variance, clip=clip
    )
    x_T, z = randn(3, 2, 5), randn(len(KEPT), 3, 2, 5, seed=1)

    def model(x, t):
        out, v = network(t.view(-1, 1, 1).to(x.dtype), x)
        return torch.cat([out, v], dim=1) if variance == "learned_range" else out

    got, trajectory = fd.sample(
        model, plan, x_T=x_T, noise=lambda i, k: z[i], return_trajectory=True
    )
    expected = paper_ddpm(x_T.numpy(), network, z.numpy(), KEPT, prediction, variance, clip)
    for step, state in enumerate(expected):
        np.testing.assert_allclose(trajectory[step + 1].numpy(), state, rtol=1e-11, atol=1e-11)
    # And in float32 on the native kernels, to float32's rounding of 7 steps.
    got32 = fd.sample(model, plan, x_T=x_T.float(), noise=lambda i, k: z[i].float())
    np.testing.assert_allclose(got32.numpy(), got.numpy(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("clip", [None, (-1.0, 1.0)])
@pytest.mark.parametrize("reclip", [True, False])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_ddim_is_the_papers_equation(prediction, eta, reclip, clip):
    plan = fd.solvers.ddim(
        SCHEDULE, timesteps=KEPT, prediction_type=prediction, eta=eta, clip=clip,
        use_clipped_model_output=reclip,
    )  # fmt: skip
    x_T, z = randn(3, 2, 5), randn(len(KEPT), 3, 2, 5, seed=1)

    def model(x, t):
        return network(t.view(-1, 1, 1).double(), x)[0]

    got = fd.sample(model, plan, x_T=x_T, noise=lambda i, k: z[i])
    expected = paper_ddim(x_T.numpy(), network, z.numpy(), KEPT, prediction, eta, clip, reclip)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-11, atol=1e-11)


def test_ddim_with_eta_1_is_ddpm():
    """Song et al. 2021, section 4.1; without clipping the plans are the same numbers."""
    a = fd.solvers.ddim(SCHEDULE, 10, eta=1.0, clip=None)
    b = fd.solvers.ddpm(SCHEDULE, 10, clip=None)
    np.testing.assert_allclose(a.A, b.A, rtol=1e-9, atol=1e-12)


def test_reverse_ddim_undoes_ddim():
    """With the exact (linear) epsilon of a Gaussian, inversion and sampling are inverse maps up to
    the step: the residual falls with the number of steps."""
    schedule = fd.schedules.linear(1000)
    errors = []
    for steps in (50, 100, 200):
        down = fd.solvers.ddim(schedule, steps, clip=None, spacing="leading")
        up = fd.solvers.ddim(schedule, steps, clip=None, spacing="leading", reverse=True)
        x0 = randn(4, 3)
        model = gaussian_epsilon(schedule, 0.3, 0.5)
        noise = fd.sample(model, up, x_T=x0)
        errors.append(float((fd.sample(model, down, x_T=noise) - x0).abs().max()))
    assert errors[0] > 1.7 * errors[1] > 1.7**2 * errors[2]


def gaussian_epsilon(schedule, mean, std):
    """The exact denoiser of data N(mean, std^2), as epsilon: E[eps | x_t] in closed form."""
    alpha = torch.from_numpy(np.array(schedule.alpha_t))
    sigma = torch.from_numpy(np.array(schedule.sigma_t))

    def model(x, t):
        a, s = alpha[t].view(-1, 1), sigma[t].view(-1, 1)
        return s * (x - a * mean) / (a**2 * std**2 + s**2)

    return model


def moments_of(plan, schedule, mean, std, start=(0.0, 1.0)):
    """(m, v): what a plan makes of x_T ~ N(start) for N(mean, std^2) data, exactly.

    With the exact, linear denoiser every step maps Gaussians to Gaussians: x' = g x + b + noise of
    its coefficient, propagated here through the plan's own rows.
    """
    m, v = start
    for i in range(plan.rows):
        t = int(plan.t[i])
        a, s = schedule.alpha_t[t], schedule.sigma_t[t]
        k = s / (a * a * std * std + s * s)
        cx, co, _, cz = (*plan.A[i, 0], 0.0)[:4]  # no noise column without noise
        g, b = cx + co * k, -co * k * a * mean
        m, v = g * m + b, g * g * v + cz * cz
    return m, v


def exact_ode(a, s, mean, std, m, v):
    """The probability flow keeps quantiles: x_0 = mean + std / std_T (x_T - a mean)."""
    g = std / math.sqrt(a * a * std * std + s * s)
    return mean + g * (m - a * mean), g * g * v


def exact_sde(a, s, mean, std, m, v):
    """Ancestral sampling in the limit draws x_0 from p(x_0 | x_T), by Gaussian conditioning."""
    total = a * a * std * std + s * s
    g = a * std * std / total
    return mean + g * (m - a * mean), std * std * s * s / total + g * g * v


@pytest.mark.parametrize(
    ("builder", "exact"),
    [(fd.solvers.ddim, exact_ode), (fd.solvers.ddpm, exact_sde)],
    ids=["ddim", "ddpm"],
)
def test_gaussian_data_converges_at_the_known_order(builder, exact):
    """Mean and variance of the result converge to the closed form as the first power of 1/steps.

    The chain ends at alpha_T = 0.36 and x_T has a wrong mean, so that both moments of the result
    depend on every step.
    """
    schedule = fd.schedules.linear(4096, 1e-5, 1e-3)
    mean, std, start = 0.7, 0.4, (1.3, 1.0)
    goal = exact(schedule.alpha_t[-1], schedule.sigma_t[-1], mean, std, *start)
    steps = np.array([32, 64, 128, 256])
    plans = [builder(schedule, int(n), clip=None) for n in steps]
    errors = np.abs([np.subtract(moments_of(p, schedule, mean, std, start), goal) for p in plans])
    for moment in (0, 1):
        if exact is exact_sde and moment == 0:
            # Every ancestral step has the exact conditional mean, so their chain has it too.
            assert errors[:, 0].max() < 1e-12
            continue
        slope = -np.polyfit(np.log(steps), np.log(errors[:, moment]), 1)[0]
        assert slope == pytest.approx(1.0, abs=0.15), (moment, slope, errors)
    assert errors[-1].max() < 0.01


@pytest.mark.parametrize("builder", [fd.solvers.ddim, fd.solvers.ddpm], ids=["ddim", "ddpm"])
def test_sampling_gaussian_data_reaches_its_distribution(builder):
    """The engine's samples have the mean and covariance that the plan's rows predict."""
    schedule = fd.schedules.linear(1000)
    plan = builder(schedule, 250, clip=None)
    mean, std, n = 0.7, 0.4, 1 << 14

    def model(x, t):
        return gaussian_epsilon(schedule, mean, std)(x.double(), t).float()

    x = fd.sample(model, plan, shape=(n, 2), seed=3).double().numpy()
    m, v = moments_of(plan, schedule, mean, std)
    assert abs(x.mean(0) - m).max() < 5 * math.sqrt(v / n)
    cov = np.cov(x.T)
    assert abs(np.diag(cov) - v).max() < 5 * v * math.sqrt(2 / n)
    assert abs(cov[0, 1]) < 5 * v / math.sqrt(n)
    assert abs(m - mean) < 0.02 and abs(v - std**2) < 0.02


def test_zero_terminal_snr_works_where_it_is_defined():
    schedule = fd.schedules.linear(20).rescaled_zero_terminal_snr()
    for builder in (fd.solvers.ddim, fd.solvers.ddpm):
        with pytest.raises(ValueError, match="prediction_type"):
            builder(schedule)
        plan = builder(schedule, prediction_type="v_prediction")
        x = fd.sample(lambda x, t: -x, plan, shape=(2, 4), seed=0)
        assert torch.isfinite(x).all()


@pytest.mark.parametrize("steps", ["250", "10,15,20", "ddim50", 7, None])
def test_steps_name_a_subsequence(steps):
    schedule = fd.schedules.linear(1000)
    plan = fd.solvers.ddpm(schedule, steps)
    expected = {"250": 250, "10,15,20": 45, "ddim50": 50, 7: 7, None: 1000}[steps]
    assert plan.rows == expected and (np.diff(plan.t) < 0).all()


@pytest.mark.parametrize(
    ("arguments", "error", "names"),
    [
        (dict(steps=0), ValueError, "steps"),
        (dict(steps=T + 1), ValueError, "steps"),
        (dict(steps=5, timesteps=[1, 2]), ValueError, "steps and timesteps"),
        (dict(timesteps=[1, 1]), ValueError, "timesteps"),
        (dict(timesteps=[]), ValueError, "timesteps"),
        (dict(timesteps=[-1, 5]), ValueError, "timesteps"),
        (dict(schedule=fd.schedules.custom([0.0, 0.1, 0.2])), ValueError, "schedule"),
        (dict(prediction_type="eps"), ValueError, "prediction_type"),
        (dict(clip=(1, -1)), ValueError, "clip"),
        (dict(clip=1.0), TypeError, "clip"),
        (dict(clip=(float("nan"), 1)), ValueError, "clip"),
        (dict(spacing="even", steps=5), ValueError, "spacing"),
        (dict(schedule=BETA), TypeError, "schedule"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(arguments, error, names):
    for builder in (fd.solvers.ddim, fd.solvers.ddpm):
        with pytest.raises(error, match=names):
            builder(**({"schedule": SCHEDULE} | arguments))


def test_bad_arguments_of_one_builder():
    with pytest.raises(ValueError, match="variance"):
        fd.solvers.ddpm(SCHEDULE, variance="learned")
    for eta, error in ((-0.1, ValueError), (float("nan"), ValueError), ("1", TypeError)):
        with pytest.raises(error, match="eta"):
            fd.solvers.ddim(SCHEDULE, eta=eta)
    assert fd.solvers.ddim(SCHEDULE, eta=np.float32(0.5)) == fd.solvers.ddim(SCHEDULE, eta=0.5)
    with pytest.raises(ValueError, match="eta"):
        fd.solvers.ddim(SCHEDULE, eta=0.5, reverse=True)
    with pytest.raises(ValueError, match="eta"):
        fd.solvers.ddim(SCHEDULE, eta=50.0)
    for flag in ("reverse", "use_clipped_model_output"):
        with pytest.raises(TypeError, match=flag):
            fd.solvers.ddim(SCHEDULE, **{flag: "no"})
