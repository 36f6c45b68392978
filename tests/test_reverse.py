"""p_sample, p_mean_variance, ddim_sample at any t: rows of the plans, and the papers' formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastdiff as fd

T = 30
SCHEDULE = fd.schedules.linear(T, 2e-3, 0.2)
BETA = np.linspace(2e-3, 0.2, T)
ABAR = np.cumprod(1 - BETA)
PREV = np.concatenate([[1.0], ABAR[:-1]])
TILDE = BETA * (1 - PREV) / (1 - ABAR)


def randn(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def paper_mean(x, out, t, clip=1.0):
    abar, prev = ABAR[t], PREV[t]
    x0 = np.clip((x - np.sqrt(1 - abar) * out) / np.sqrt(abar), -clip, clip)
    mean = (np.sqrt(prev) * BETA[t] * x0 + np.sqrt(1 - BETA[t]) * (1 - prev) * x) / (1 - abar)
    return mean, x0


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_p_mean_variance_is_the_papers(backend, variance):
    x, t = randn(4, 2, 5), torch.tensor([0, 1, 15, 29])
    output = randn(4, 4 if variance == "learned_range" else 2, 5, seed=1)
    mean, var, log_var, x_start = fd.p_mean_variance(output, x, t, SCHEDULE, variance=variance)
    tt = t.numpy()[:, None, None]
    expected, x0 = paper_mean(x.double().numpy(), output[:, :2].double().numpy(), tt)
    np.testing.assert_allclose(mean.numpy(), expected, atol=2e-6)
    np.testing.assert_allclose(x_start.numpy(), x0, atol=2e-6 * 30)
    clipped = np.log(np.where(np.arange(T) == 0, TILDE[1], TILDE))
    if variance == "fixed_small":
        want, want_log = TILDE[tt], clipped[tt]
    elif variance == "fixed_large":
        want_log = np.log(np.where(np.arange(T) == 0, TILDE[1], BETA))[tt]
        want = np.exp(want_log)
    else:
        f = (output[:, 2:].double().numpy() + 1) / 2
        want_log = f * np.log(BETA)[tt] + (1 - f) * clipped[tt]
        want = np.exp(want_log)
    shape = mean.shape
    np.testing.assert_allclose(log_var.numpy(), np.broadcast_to(want_log, shape), rtol=2e-6)
    np.testing.assert_allclose(var.numpy(), np.broadcast_to(want, shape), rtol=2e-5)


@pytest.mark.parametrize(
    ("dtype", "output_dtype", "bound"),
    [(torch.bfloat16, torch.bfloat16, 2**-8), (torch.float32, torch.bfloat16, 2**-20)],
)
def test_learned_variance_is_rounded_once(dtype, output_dtype, bound):
    x, output = randn(2, 3, 50, dtype=dtype), randn(2, 6, 50, seed=1, dtype=output_dtype)
    t = torch.tensor([4, 25])
    _, var, log_var, _ = fd.p_mean_variance(output, x, t, SCHEDULE, variance="learned_range")
    assert var.dtype == log_var.dtype == dtype
    f = (output[:, 3:].double().numpy() + 1) / 2
    tt = t.numpy()[:, None, None]
    want = f * np.log(BETA[tt]) + (1 - f) * np.log(TILDE[tt])
    np.testing.assert_allclose(log_var.double().numpy(), want, rtol=bound)
    np.testing.assert_allclose(var.double().numpy(), np.exp(want), rtol=bound * 1.1 + 8e-6)


def test_p_mean_variance_writes_where_it_is_told(backend, assert_same_bits):
    x, output, t = randn(2, 3, 5), randn(2, 6, 5, seed=1), torch.tensor([4, 25])
    expected = fd.p_mean_variance(output, x, t, SCHEDULE, variance="learned_range")
    got = fd.p_mean_variance(output, x, t, SCHEDULE, variance="learned_range", out=x)
    assert got[0] is x
    assert_same_bits(got, expected)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_p_sample_agrees_on_every_backend(accelerated, assert_same_bits, variance, dtype):
    channels = 6 if variance == "learned_range" else 3
    x, output = randn(4, 3, 7, dtype=dtype), randn(4, channels, 7, seed=1, dtype=dtype)
    options = dict(variance=variance, seed=2, return_x_start=True)
    t = torch.tensor([29, 0, 7, 7])
    assert_same_bits(
        fd.p_sample(output, x, t, SCHEDULE, backend=accelerated, **options),
        fd.p_sample(output, x, t, SCHEDULE, backend="reference", **options),
    )


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("reverse", [False, True])
def test_ddim_sample_agrees_on_every_backend(accelerated, assert_same_bits, eta, reverse):
    if reverse and eta:
        pytest.skip("the reverse ODE is deterministic")
    x, output, t = randn(3, 50), randn(3, 50, seed=1), torch.tensor([29, 0, 7])
    options = dict(eta=eta, reverse=reverse, seed=2)
    assert_same_bits(
        fd.ddim_sample(output, x, t, SCHEDULE, backend=accelerated, **options),
        fd.ddim_sample(output, x, t, SCHEDULE, backend="reference", **options),
    )


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_ddim_sample_is_the_papers(backend, prediction):
    """Equation 12 with sigma_t of equation 16, samples at different t in one batch."""
    x, output, z = randn(3, 40), randn(3, 40, seed=1), randn(3, 40, seed=2)
    t = torch.tensor([29, 0, 7])
    got = fd.ddim_sample(output, x, t, SCHEDULE, eta=0.5, prediction_type=prediction, noise=z,
                         clip=None).double().numpy()  # fmt: skip
    x, o, z = (v.double().numpy() for v in (x, output, z))
    abar, prev = ABAR[t.numpy()][:, None], PREV[t.numpy()][:, None]
    if prediction == "epsilon":
        x0 = (x - np.sqrt(1 - abar) * o) / np.sqrt(abar)
    else:
        x0 = o if prediction == "sample" else np.sqrt(abar) * x - np.sqrt(1 - abar) * o
    eps = (x - np.sqrt(abar) * x0) / np.sqrt(1 - abar)
    sigma = 0.5 * np.sqrt((1 - prev) / (1 - abar) * (1 - abar / prev))
    expected = np.sqrt(prev) * x0 + np.sqrt(1 - prev - sigma**2) * eps + sigma * z
    np.testing.assert_allclose(got, expected, atol=3e-5)


def test_p_sample_is_the_papers(backend):
    x, output, z = randn(3, 40), randn(3, 40, seed=1), randn(3, 40, seed=2)
    t = torch.tensor([29, 0, 7])
    got, x_start = fd.p_sample(output, x, t, SCHEDULE, noise=z, return_x_start=True)
    tt = t.numpy()[:, None]
    mean, x0 = paper_mean(x.double().numpy(), output.double().numpy(), tt)
    expected = mean + np.where(tt == 0, 0, np.sqrt(TILDE[tt])) * z.double().numpy()
    np.testing.assert_allclose(got.numpy(), expected, atol=2e-6)
    np.testing.assert_allclose(x_start.numpy(), x0, atol=5e-5)


def test_seeded_noise_is_the_plans_row(assert_same_bits):
    """Sample by sample: step T - 1 - t of stream 1."""
    x, output, t = randn(3, 21), randn(3, 21, seed=1), torch.tensor([29, 5, 7])
    z = torch.cat([
        fd.randn((1, 21), 9, sample_offset=b, step=T - 1 - int(v), stream=1)
        for b, v in enumerate(t)
    ])  # fmt: skip
    assert_same_bits(fd.p_sample(output, x, t, SCHEDULE, seed=9),
                     fd.p_sample(output, x, t, SCHEDULE, noise=z))  # fmt: skip


def test_a_list_is_a_clip(assert_same_bits):
    x, output = randn(3, 21), randn(3, 21, seed=1)
    assert_same_bits(
        fd.p_sample(output, x, 7, SCHEDULE, seed=9, clip=[-1, 1]),
        fd.p_sample(output, x, 7, SCHEDULE, seed=9),
    )


def test_p_sample_gradient_is_the_formulas():
    output = randn(2, 12, seed=1, dtype=torch.float64).reshape(2, 2, 6).requires_grad_()
    x = randn(2, 1, 6, dtype=torch.float64).requires_grad_()
    t = torch.tensor([3, 20])

    def f(output, x):
        return fd.p_sample(output, x, t, SCHEDULE, variance="learned_range", seed=1, clip=None)

    assert torch.autograd.gradcheck(f, (output, x))


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("change", "error", "names"),
    [
        (dict(model_output=torch.zeros(2, 4)), ValueError, "model_output"),
        (dict(model_output=torch.zeros(2, 3).double()), TypeError, "model_output"),
        (dict(variance="learned_range"), ValueError, "model_output"),
        (dict(variance="learned_range", model_output=torch.zeros(2), x_t=torch.zeros(2)),
         ValueError, "x_t"),
        (dict(x_t=None), TypeError, "x_t"),
        (dict(t=T), ValueError, "t must"),
        (dict(t=torch.tensor([0, T])), ValueError, "t must"),
        (dict(schedule=None), TypeError, "schedule"),
        (dict(prediction_type="x"), ValueError, "prediction_type"),
        (dict(variance="x"), ValueError, "variance"),
        (dict(clip=(1, 0)), ValueError, "clip"),
        (dict(clip=3), TypeError, "clip"),
        (dict(prediction_type=["epsilon"]), TypeError, "prediction_type"),
        (dict(variance=None), TypeError, "variance"),
        (dict(seed=None), ValueError, "seed, noise and generator"),
        (dict(out=torch.zeros(3, 2)), ValueError, "out"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(change, error, names):
    with pytest.raises(error, match=names):
        fd.p_sample(**(dict(model_output=X, x_t=X, t=0, schedule=SCHEDULE, seed=0) | change))
