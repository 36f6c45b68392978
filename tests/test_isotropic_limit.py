"""The way to the isotropic limit against KL divergences of torch.distributions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import fastdiff as fd
from fastdiff.training import isotropic_limit as module
from fastdiff.training.isotropic_limit import isotropic, plot_isotropic, warn_unless_isotropic
from fastdiff.training.likelihood import prior_bpd

CHAIN = fd.schedules.linear(50, 2e-3, 0.4)
Normal = torch.distributions.Normal


def divergence(schedule, data, std):
    """Mean over the elements of KL(q(x_t | x_0) || N(0, std^2)) in bits, for every t."""
    alpha, sigma = (torch.from_numpy(np.array(v)) for v in (schedule.alpha_t, schedule.sigma_t))
    q = Normal(alpha[:, None] * data.double().flatten(), sigma[:, None])
    limit = Normal(torch.zeros((), dtype=torch.float64), std)
    return torch.distributions.kl_divergence(q, limit).mean(1).numpy() / math.log(2.0)


@pytest.mark.parametrize(
    ("schedule", "std"),
    [
        (CHAIN, 1.0),
        (fd.schedules.cosine(30), 1.0),
        (fd.schedules.flow(20), 1.0),
        (fd.schedules.ve(np.geomspace(0.01, 200.0, 25)), 200.0),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_bits_are_the_divergence(schedule, std):
    data = torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(1)) * 0.8 + 0.2
    found = isotropic(schedule, data)
    np.testing.assert_allclose(found.bits, divergence(schedule, data, std), rtol=1e-9, atol=1e-13)
    assert found.bits.dtype == np.float64 and found.limit_std == std
    np.testing.assert_array_equal(found.mean_scale, schedule.alpha_t)
    np.testing.assert_allclose(found.variance, schedule.sigma_t**2, rtol=1e-15)
    assert (np.diff(found.bits) < 0).all()  # every step goes there


def test_moments_stand_for_data():
    data = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    mean, variance = float(data.mean()), float(data.var(unbiased=False))
    from_data = isotropic(CHAIN, data)
    for given in (float((data**2).mean()), (mean, variance)):
        np.testing.assert_allclose(isotropic(CHAIN, given).bits, from_data.bits, rtol=1e-12)
    assert isotropic(CHAIN).second_moment == 1.0


def test_the_last_entry_is_the_prior_term():
    data = torch.rand(4, 9, dtype=torch.float64)
    prior = prior_bpd(data, CHAIN)
    assert float(isotropic(CHAIN, data).bits[-1]) == pytest.approx(float(prior.mean()), rel=1e-12)


def test_a_warning_once_where_the_prior_term_shows():
    # abar_T = 0.36 at T = 50: DDPM's betas are for a thousand steps.
    short = fd.schedules.linear(50, 1e-4, 0.04)
    with pytest.warns(UserWarning, match="signal-to-noise ratio of 0.5"):
        isotropic(short)
    isotropic(short)  # once
    warn_unless_isotropic(short)
    other = fd.schedules.linear(51, 1e-4, 0.04)
    with pytest.warns(UserWarning, match="0.005"):
        warn_unless_isotropic(other)


def test_the_threshold_is_half_of_the_second_decimal():
    """Bits of the prior term for data of second moment 1 about 0.72 abar_T: 0.0069 is the edge."""
    for abar, warns in ((0.0066, False), (0.0072, True)):
        chain = fd.schedules.NoiseSchedule([1 - abar])
        if warns:
            with pytest.warns(UserWarning):
                isotropic(chain)
        else:
            isotropic(chain)
    assert module.VISIBLE_BITS == 0.005


def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    path = plot_isotropic({"linear": CHAIN, "cosine": fd.schedules.cosine(40)}, tmp_path / "a.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    figure = module._drawn(
        [("linear", isotropic(CHAIN)), ("flow", isotropic(fd.schedules.flow(9)))]
    )
    bits, mean, variance = figure.axes
    np.testing.assert_array_equal(bits.lines[0].get_ydata(), isotropic(CHAIN).bits)
    np.testing.assert_array_equal(mean.lines[0].get_ydata(), CHAIN.alpha_t)
    np.testing.assert_array_equal(variance.lines[0].get_ydata(), isotropic(CHAIN).variance)
    assert bits.get_yscale() == "log"
    assert not np.isfinite(bits.lines[1].get_ydata()[-1])  # the flow arrives: no logarithm of 0
    assert [text.get_text() for text in bits.get_legend().get_texts()] == ["linear", "flow"]


@pytest.mark.parametrize(
    ("act", "error", "names"),
    [
        (lambda p: isotropic("linear"), TypeError, "schedule"),
        (lambda p: isotropic(CHAIN, -1.0), ValueError, "data"),
        (lambda p: isotropic(CHAIN, (0.0, -1.0)), ValueError, "data"),
        (lambda p: isotropic(CHAIN, (0.0, 1.0, 2.0)), ValueError, "data"),
        (lambda p: isotropic(CHAIN, "x"), TypeError, "data"),
        (lambda p: isotropic(CHAIN, torch.zeros(2, 0)), ValueError, "data"),
        (lambda p: plot_isotropic([], p / "a.png"), ValueError, "schedules"),
        (lambda p: plot_isotropic(3, p / "a.png"), TypeError, "schedules"),
        (lambda p: plot_isotropic([CHAIN], p / "no" / "a.png"), ValueError, "path"),
        (lambda p: plot_isotropic([CHAIN, 3], p / "a.png"), TypeError, "schedule"),
    ],
)
def test_bad_arguments_are_named_and_nothing_is_written(tmp_path, act, error, names):
    with pytest.raises(error, match=names):
        act(tmp_path)
    assert not list(tmp_path.iterdir())
