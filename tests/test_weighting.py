"""Weights by noise level: the papers' formulas, and one objective whatever the target."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastdiff as fd
from fastdiff.training.weighting import (
    EDM,
    NAMES,
    P2,
    TARGETS,
    Constant,
    CosMap,
    LogitNormal,
    MinSNR,
    SigmaSquared,
    Sigmoid,
    TruncatedSNR,
)

CHAIN = fd.schedules.linear(100)
FLOW = fd.schedules.flow(50)
VE = fd.schedules.ve(np.geomspace(0.01, 50.0, 30))
SCHEDULES = pytest.mark.parametrize("schedule", [CHAIN, FLOW, VE], ids=lambda s: s.name)
ABAR = CHAIN.alphas_cumprod
SNR = ABAR / (1 - ABAR)


def close(actual, expected):
    assert actual.dtype == np.float64
    np.testing.assert_allclose(actual, np.broadcast_to(expected, actual.shape), rtol=1e-12)


def test_min_snr_of_the_three_predictions_of_a_chain():
    for gamma in (1.0, 5.0):
        clipped = np.minimum(SNR, gamma)
        close(MinSNR(gamma)(CHAIN, "sample"), clipped)
        close(MinSNR(gamma)(CHAIN, "epsilon"), clipped / SNR)
        close(MinSNR(gamma)(CHAIN, "v"), clipped / (SNR + 1))
    assert (SNR > 5).any() and (SNR < 1).any()


def test_truncated_snr():
    close(TruncatedSNR()(CHAIN, "sample"), np.maximum(SNR, 1))
    close(TruncatedSNR()(CHAIN, "epsilon"), np.maximum(1, 1 / SNR))
    # max(snr, 1) on x_0 is max(1, 1/snr) on epsilon, and on v: x_0's error is sqrt(1 - abar) of v's
    close(TruncatedSNR()(CHAIN, "v"), np.maximum(SNR, 1) * (1 - ABAR))


def test_p2():
    close(P2()(CHAIN), 1 / (1 + SNR))
    close(P2(0.5, 2.0)(CHAIN), (0.5 + SNR) ** -2)
    close(P2(gamma=0.0)(CHAIN), 1.0)


def test_sigmoid_is_of_the_log_snr():
    for bias in (-3.0, 0.0, 2.0):
        w = Sigmoid(bias)(CHAIN)
        close(np.log(w / (1 - w)), bias - np.log(SNR))
    # Hoogeboom et al.: exp(b) sigmoid(log snr - b) on x_0 is the same objective
    close(Sigmoid(1.0)(CHAIN, "sample"), np.e / (1 + np.exp(1 - np.log(SNR))))


def test_sigmoid_with_the_step_of_log_snr_is_an_integral_over_it():
    """Kingma & Gao: the objective is then that of log snr, whatever the schedule. The cost here
    vanishes at both ends of the chains."""
    level = np.linspace(-15, 15, 200001)
    cost = np.exp(-((level - 1) ** 2) / 6)
    integral = (cost / (1 + np.exp(level - 0.5))).sum() * (level[1] - level[0])

    def weighting(schedule):
        return -np.gradient(schedule.log_snr) * Sigmoid(0.5)(schedule, "epsilon")

    for schedule in (fd.schedules.linear(1000), fd.schedules.cosine(1000)):
        w = fd.training.weights(weighting, schedule)
        total = (w * np.exp(-((schedule.log_snr - 1) ** 2) / 6)).sum()
        assert total == pytest.approx(integral, rel=1e-4)
        plain = (Sigmoid(0.5)(schedule) * np.exp(-((schedule.log_snr - 1) ** 2) / 6)).mean()
        assert abs(plain / integral - 1) > 0.1  # without it the schedule decides


def test_edm_is_the_inverse_square_of_c_out():
    sigma = VE.sigma_t
    for sigma_data in (0.5, 1.3):
        expected = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
        close(EDM(sigma_data)(VE, "sample"), expected)
        c_out = fd.training.edm_scalings(torch.from_numpy(np.array(sigma)), sigma_data).c_out
        close(EDM(sigma_data)(VE, "sample"), c_out.numpy() ** -2.0)
    level = np.sqrt(1 / SNR)
    close(EDM(0.5)(CHAIN, "sample"), (level**2 + 0.25) / (0.5 * level) ** 2)


def test_sigma_squared_is_of_the_score():
    close(SigmaSquared()(VE, "score"), VE.sigma_t**2)
    close(SigmaSquared()(CHAIN, "score"), 1 - ABAR)
    close(SigmaSquared()(CHAIN, "epsilon"), 1.0)


def test_logit_normal_is_the_density_of_a_sigmoid_of_a_normal():
    t = torch.from_numpy(np.array(FLOW.sigma_t))
    for mean, std in ((0.0, 1.0), (-0.5, 0.7)):
        normal = torch.distributions.Normal(
            torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
        )
        logit_normal = torch.distributions.TransformedDistribution(
            normal, torch.distributions.SigmoidTransform()
        )
        expected = logit_normal.log_prob(t[:-1]).exp().numpy()
        w = LogitNormal(mean, std)(FLOW, "flow")
        np.testing.assert_allclose(w[:-1], expected, rtol=1e-9)
        assert w[-1] == 0.0  # t = 1
        assert LogitNormal(mean, std)(FLOW, "epsilon")[-1] == 0.0


def test_cosmap():
    # the density of t = 1 - 1 / (tan(pi u / 2) + 1), u uniform: du/dt by differences
    u = np.linspace(0.01, 0.99, 2001)
    t = 1 - 1 / (np.tan(np.pi * u / 2) + 1)
    path = fd.schedules.GaussianPath(1 - t[1:-1], t[1:-1])
    density = (u[2:] - u[:-2]) / (t[2:] - t[:-2])
    np.testing.assert_allclose(CosMap()(path, "flow"), density, rtol=1e-5)


@SCHEDULES
@pytest.mark.parametrize(
    "weighting", [make() for make in NAMES.values() if make is not Constant], ids=repr
)
def test_an_objective_does_not_depend_on_the_target(schedule, weighting):
    """One wrong prediction of x_0 at the same x_t, as an error of every target."""
    inside = (schedule.alpha_t > 0) & (schedule.sigma_t > 0)
    alpha, sigma = schedule.alpha_t[inside], schedule.sigma_t[inside]
    if not inside.all():  # epsilon says nothing of x_0 where alpha is 0
        schedule = fd.schedules.GaussianPath(alpha, sigma)
    x_0, z, wrong = 0.3, -1.1, 0.7
    x_t = alpha * x_0 + sigma * z

    def quantities(x):
        noise = (x_t - alpha * x) / sigma
        return {
            "sample": x, "epsilon": noise, "v": alpha * noise - sigma * x, "flow": noise - x,
            "score": -noise / sigma,
        }  # fmt: skip

    true, found = quantities(x_0), quantities(wrong)
    costs = [weighting(schedule, name) * (true[name] - found[name]) ** 2 for name in TARGETS]
    for cost in costs[1:]:
        # the differences above cancel to about 1e-16 / sigma
        np.testing.assert_allclose(cost, costs[0], rtol=1e-8)


def test_end_points():
    chain = CHAIN.rescaled_zero_terminal_snr()
    assert chain.snr[-1] == 0
    close(MinSNR()(chain, "epsilon")[-1:], 1.0)
    close(MinSNR()(chain, "v")[-1:], 0.0)
    with pytest.raises(ValueError, match=r"TruncatedSNR\(\) of 'epsilon'.*\[99\] = inf"):
        TruncatedSNR()(chain, "epsilon")
    clean = fd.schedules.GaussianPath([1.0, 0.5], [0.0, 0.5])
    close(MinSNR(4.0)(clean, "sample"), [4.0, 1.0])
    close(MinSNR(4.0)(clean, "flow"), [0.0, 0.25])


def test_names_parameters_and_functions():
    for name, make in NAMES.items():
        assert np.array_equal(
            fd.training.weights(name, CHAIN, "v"), fd.training.weights(make(), CHAIN, "v")
        )
    assert np.array_equal(fd.training.weights(None, CHAIN), np.ones(100))
    assert np.array_equal(fd.training.weights(lambda s: s.betas, CHAIN), CHAIN.betas)
    assert MinSNR(5) == MinSNR() and MinSNR(4) != MinSNR() and EDM(1) != Sigmoid(1)
    assert len({MinSNR(), MinSNR(5.0), P2(), Sigmoid(0)}) == 3


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: MinSNR(0), ValueError, "gamma must be > 0"),
        (lambda: MinSNR(float("nan")), ValueError, "gamma must be finite"),
        (lambda: P2(k=0), ValueError, "k must be > 0"),
        (lambda: P2(gamma=-1), ValueError, "gamma must be >= 0"),
        (lambda: Sigmoid("a"), TypeError, "bias must be a real number"),
        (lambda: EDM(-1), ValueError, "sigma_data must be > 0"),
        (lambda: LogitNormal(std=0), ValueError, "std must be > 0"),
        (lambda: MinSNR()(CHAIN, "noise"), ValueError, "target must be one of"),
        (lambda: fd.training.weights("snr", CHAIN), ValueError, "weighting must be one of"),
        (lambda: fd.training.weights(2.0, CHAIN), TypeError, "weighting must be a name"),
        (lambda: fd.training.weights(MinSNR, CHAIN), TypeError, "weighting must be a name"),
        (
            lambda: fd.training.weights(lambda s: [1.0], CHAIN), ValueError,
            r"weighting\(schedule\) must have 100 entries",
        ),
        (
            lambda: fd.training.weights(lambda s: -s.betas, CHAIN), ValueError,
            "must be finite and >= 0",
        ),
    ],
)  # fmt: skip
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()
