"""Sigma ladders against closed forms and 50-digit arithmetic."""

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff import schedules
from fastdiff.schedules._beta_quantile import beta_quantile

mp = mpmath.mp.clone()
mp.dps = 50

LADDERS = [
    schedules.karras,
    schedules.exponential,
    schedules.ve_geometric,
    schedules.lu,
    schedules.polyexponential,
    schedules.beta,
]


@pytest.mark.parametrize("rho", [0.05, 1.0, 7.0, 300.0])
def test_karras_ladder_is_equation_5_in_fifty_digits(rho):
    n, low, high = 18, 0.002, 80.0
    with mp.workdps(200):  # for small rho the two ends are 92 digits apart
        r = mp.mpf(rho)
        a, b = mp.mpf(high) ** (1 / r), mp.mpf(low) ** (1 / r)
        expected = [float((a + mp.mpf(i) / (n - 1) * (b - a)) ** r) for i in range(n)]
    got = schedules.karras(n, low, high, rho, append_zero=False)
    np.testing.assert_allclose(got, expected, rtol=2e-14)


def test_large_rho_karras_tends_to_the_exponential_ladder():
    np.testing.assert_allclose(
        schedules.karras(30, 0.01, 100.0, 1e12), schedules.exponential(30, 0.01, 100.0), rtol=1e-10
    )


def test_geometric_ladders_have_a_constant_ratio():
    for ladder in (schedules.exponential, schedules.ve_geometric, schedules.lu):
        sigmas = ladder(10, 0.01, 1.0, append_zero=False)
        np.testing.assert_allclose(sigmas[1:] / sigmas[:-1], 0.01 ** (1 / 9), rtol=1e-14)


def test_polyexponential_ladder_is_a_power_in_log_sigma():
    got = np.log(schedules.polyexponential(5, np.exp(1.0), np.exp(17.0), 2.0, append_zero=False))
    np.testing.assert_allclose(got, [17, 10, 5, 2, 1], rtol=1e-14)


@pytest.mark.parametrize(
    "a, b, quantile",
    [
        (0.5, 0.5, lambda p: np.sin(np.pi * p / 2) ** 2),  # arcsine law
        (1.0, 1.0, lambda p: p),
        (3.0, 1.0, lambda p: p ** (1 / 3)),
        (1.0, 0.5, lambda p: 1 - (1 - p) ** 2),
        (100.0, 1.0, lambda p: p**0.01),
    ],
)
def test_beta_ladder_has_the_closed_form_quantiles(a, b, quantile):
    p = np.linspace(1, 0, 21)
    expected = 0.03 + quantile(p) * (14.6 - 0.03)
    got = schedules.beta(21, 0.03, 14.6, a, b, append_zero=False)
    np.testing.assert_allclose(got, expected, rtol=2e-14)


def test_beta_quantiles_end_at_zero_and_one_for_the_most_lopsided_shapes():
    for a, b in ((0.01, 100.0), (100.0, 0.01), (0.01, 0.01), (100.0, 100.0)):
        assert beta_quantile(np.array([0.0, 1.0]), a, b).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("a, b", [(0.6, 0.6), (2.0, 5.0), (0.3, 7.5), (40.0, 90.0)])
def test_beta_ladder_inverts_the_incomplete_beta_function(a, b):
    n = 12
    sigmas = schedules.beta(n, 1.0, 2.0, a, b, append_zero=False)
    cdf = [float(mp.betainc(a, b, 0, x, regularized=True)) for x in (sigmas - 1.0).tolist()]
    # x = sigma - 1 is known to 2e-16; the density is at most about 10 here.
    np.testing.assert_allclose(cdf, np.linspace(1, 0, n), atol=1e-13)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(LADDERS),
    st.integers(1, 60),
    st.floats(1e-4, 1.0),
    st.floats(1.1, 1e4),
    st.booleans(),
)
def test_ladders_descend_between_exact_ends(ladder, n, sigma_min, ratio, append_zero):
    sigma_max = sigma_min * ratio
    sigmas = ladder(n, sigma_min, sigma_max, append_zero=append_zero)
    assert sigmas.size == n + append_zero
    assert sigmas[0] == sigma_max
    assert (np.diff(sigmas) < 0).all()
    if append_zero:
        assert sigmas[-1] == 0
    if n > 1:
        assert sigmas[n - 1] == sigma_min


@pytest.mark.parametrize("ladder", LADDERS)
@pytest.mark.parametrize(
    "arguments, error, said",
    [
        ((0, 0.1, 1.0), ValueError, "n must be >= 1, got 0"),
        ((2.0, 0.1, 1.0), TypeError, "n must be an integer"),
        ((5, 0.0, 1.0), ValueError, "sigma_min must be > 0, got 0.0"),
        ((5, -1.0, 1.0), ValueError, "sigma_min must be > 0"),
        ((5, 1.0, 1.0), ValueError, "sigma_max must be > sigma_min"),
        ((5, float("nan"), 1.0), ValueError, "sigma_min must be finite"),
        ((5, 0.1, float("inf")), ValueError, "sigma_max must be finite"),
        ((5, "0.1", 1.0), TypeError, "sigma_min must be a real number"),
        ((5, 1.0, np.nextafter(1.0, 2.0)), ValueError, "cannot be told apart"),
    ],
)
def test_ladders_refuse_impossible_ends(ladder, arguments, error, said):
    with pytest.raises(error, match=said):
        ladder(*arguments)
