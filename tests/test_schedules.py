"""Noise schedules, paths, sigma ladders, spacings against 50-digit arithmetic and closed forms."""

import copy
import dataclasses
import itertools
import pickle

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff import schedules
from fastdiff.schedules import GaussianPath, NoiseSchedule, space_timesteps, timestep_spacing

mp = mpmath.mp.clone()
mp.dps = 50

# Measured at most 3e-15 on these schedules: log abar, up to 12 in size, is rounded before exp.
TABLE_RTOL = 1e-14

TABLES = (
    "alphas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "alphas_cumprod_next",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "posterior_log_variance_clipped",
    "snr",
    "log_snr",
    "sigmas",
    "alpha_t",
    "sigma_t",
)


def exact_tables(betas):
    """The tables of DDPM section 2 and 3.2 in 50 digits; the posterior by Bayes' rule."""
    inf = mp.inf
    rows = {name: [] for name in TABLES}
    abar = [mp.mpf(1)]
    for beta in betas:
        abar.append(abar[-1] * (1 - mp.mpf(float(beta))))
    for t, beta in enumerate(map(mp.mpf, map(float, betas)), start=1):
        alpha, prev, now = 1 - beta, abar[t - 1], abar[t]
        row = {"alphas": alpha, "alphas_cumprod": now, "alphas_cumprod_prev": prev}
        row["alphas_cumprod_next"] = abar[t + 1] if t + 1 < len(abar) else mp.mpf(0)
        row["sqrt_alphas_cumprod"] = row["alpha_t"] = mp.sqrt(now)
        row["sqrt_one_minus_alphas_cumprod"] = row["sigma_t"] = mp.sqrt(1 - now)
        row["sqrt_recip_alphas_cumprod"] = mp.sqrt(1 / now) if now else inf
        row["sqrt_recipm1_alphas_cumprod"] = mp.sqrt(1 / now - 1) if now else inf
        row["sigmas"] = row["sqrt_recipm1_alphas_cumprod"]
        row["snr"] = now / (1 - now) if now < 1 else inf
        row["log_snr"] = (mp.log(row["snr"]) if now else -inf) if now < 1 else inf
        # x_{t-1} ~ N(sqrt(prev) x_0, 1 - prev) is seen through x_t ~ N(sqrt(alpha) x_{t-1}, beta):
        # precisions add, means are weighted by precision. Multiplied by beta (1 - prev).
        precision = alpha * (1 - prev) + beta
        point = prev == 1
        row["posterior_variance"] = mp.mpf(0) if point else beta * (1 - prev) / precision
        row["posterior_mean_coef1"] = mp.mpf(1) if point else mp.sqrt(prev) * beta / precision
        row["posterior_mean_coef2"] = (
            mp.mpf(0) if point else mp.sqrt(alpha) * (1 - prev) / precision
        )
        for name, value in row.items():
            rows[name].append(value)
    variance = list(rows["posterior_variance"])
    variance[0] = variance[min(1, len(variance) - 1)]
    floor = mp.mpf(1e-20)
    rows["posterior_log_variance_clipped"] = [mp.log(max(v, floor)) for v in variance]
    return {name: np.array([float(v) for v in row]) for name, row in rows.items()}


SCHEDULES = {
    "linear": lambda: schedules.linear(1000),
    "linear, T=1": lambda: schedules.linear(1),
    "linear, T=2": lambda: schedules.linear(2),
    "scaled_linear": lambda: schedules.scaled_linear(1000),
    "cosine": lambda: schedules.cosine(300),
    "cosine, max_beta 1": lambda: schedules.cosine(50, max_beta=1.0),
    "sigmoid": lambda: schedules.sigmoid(300),
    "zero terminal": lambda: schedules.custom([0.1, 0.5, 0.999, 1.0]),
    "T=1, zero terminal": lambda: schedules.custom([1.0]),
    "betas of 0": lambda: schedules.custom([0.0, 0.0, 0.3, 0.0, 0.2]),
    "tiny betas": lambda: schedules.custom([1e-18, 1e-15, 1e-12, 1e-9]),
}


@pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_every_table_matches_fifty_digit_arithmetic_and_bayes_rule(make):
    schedule = make()
    expected = exact_tables(schedule.betas)
    for name in TABLES:
        got = getattr(schedule, name)
        # log SNR crosses 0: there the error of log abar is absolute.
        atol = 1e-14 if name in ("log_snr", "posterior_log_variance_clipped") else 0
        np.testing.assert_allclose(got, expected[name], TABLE_RTOL, atol, err_msg=name)
        assert got.dtype == np.float64


def test_log_alphas_cumprod_does_not_gather_rounding_over_a_long_chain():
    schedule = schedules.linear(8000, 1e-6, 1e-3)
    total, totals = mp.mpf(0), []
    for beta in schedule.betas.tolist():
        total += mp.log1p(-mp.mpf(beta))
        totals.append(float(total))
    np.testing.assert_allclose(schedule.log_alphas_cumprod, totals, rtol=3e-16)


def test_linear_1000_has_the_published_end_points():
    schedule = schedules.linear(1000)
    assert schedule.betas[0] == 1e-4
    assert schedule.betas[-1] == 0.02
    assert schedule.alphas_cumprod[-1] == pytest.approx(4.0358e-05, rel=1e-5)
    # The sigma range of this chain and of Stable Diffusion's, as quoted in the field.
    assert schedule.sigmas[-1] == pytest.approx(157.407, abs=1e-3)
    assert schedules.scaled_linear(1000).sigmas[-1] == pytest.approx(14.6146, abs=1e-4)
    smallest = (0.00085 / 0.99915) ** 0.5
    assert schedules.scaled_linear(1000).sigmas[0] == pytest.approx(smallest, rel=1e-14)


def test_linear_endpoints_scale_with_the_number_of_steps():
    schedule = schedules.linear(250, scale_endpoints=True)
    np.testing.assert_allclose(schedule.betas[[0, -1]], [4e-4, 0.08], rtol=1e-15)
    assert schedules.linear(1000, scale_endpoints=True) == schedules.linear(1000)


def test_scaled_linear_is_linear_in_the_square_root():
    root = np.sqrt(schedules.scaled_linear(100, 0.01, 0.25).betas)
    np.testing.assert_allclose(root, 0.1 + 0.4 * np.arange(100) / 99, rtol=1e-15)


def test_cosine_betas_match_equation_17_in_fifty_digits():
    T, s = 100, mp.mpf(0.008)
    f = [mp.cos((mp.mpf(t) / T + s) / (1 + s) * mp.pi / 2) ** 2 for t in range(T + 1)]
    expected = [float(min(1 - f[t + 1] / f[t], mp.mpf(0.999))) for t in range(T)]
    np.testing.assert_allclose(schedules.cosine(T).betas, expected, rtol=2e-14)


@pytest.mark.parametrize("start, end, tau", [(-3, 3, 1), (0, 3, 0.3), (-3, 1, 2), (-600, 700, 1)])
def test_sigmoid_betas_match_the_definition_in_fifty_digits(start, end, tau):
    T, tau = 64, mp.mpf(tau)

    def sigmoid(v):
        return 1 / (1 + mp.exp(-v))

    with mp.workdps(400):  # the definition cancels
        v = [(start + mp.mpf(t) / T * (end - start)) / tau for t in range(T + 1)]
        last = sigmoid(mp.mpf(end) / tau)
        gamma = [(last - sigmoid(u)) / (last - sigmoid(mp.mpf(start) / tau)) for u in v]
        expected = [float(min(1 - gamma[t + 1] / gamma[t], mp.mpf(0.999))) for t in range(T)]
    got = schedules.sigmoid(T, start, end, float(tau)).betas
    # sinh and cosh magnify the rounding of v by |v|.
    np.testing.assert_allclose(got, expected, rtol=1e-14 + 4e-16 * (abs(start) + abs(end)))


def test_from_alphas_cumprod_recovers_the_chain():
    abar = schedules.cosine(200).alphas_cumprod
    schedule = schedules.from_alphas_cumprod(abar)
    np.testing.assert_allclose(schedule.alphas_cumprod, abar, rtol=4e-15)
    exact = [mp.mpf(1), *map(mp.mpf, abar.tolist())]
    betas = [float(1 - b / a) for a, b in itertools.pairwise(exact)]
    np.testing.assert_allclose(schedule.betas, betas, rtol=1e-11)  # 1 - b/a magnifies 1/beta


def test_narrow_betas_are_widened_exactly():
    betas = np.linspace(1e-4, 0.02, 10, dtype=np.float32)
    assert (NoiseSchedule(betas).betas == betas.astype(np.float64)).all()


def test_a_sub_chain_whose_betas_round_to_one_keeps_its_small_alphas():
    abar = np.array([0.5, 1e-20, 1e-45])
    schedule = schedules.from_alphas_cumprod(abar)
    assert schedule.betas[1] == 1.0
    np.testing.assert_allclose(schedule.alphas, [0.5, 2e-20, 1e-25], rtol=1e-13)
    np.testing.assert_allclose(schedule.snr, [1.0, 1e-20, 1e-45], rtol=1e-13)
    coef2 = np.sqrt([2e-20 * 0.25, 1e-25])
    np.testing.assert_allclose(schedule.posterior_mean_coef2[1:], coef2, rtol=1e-13)


def test_underflow_and_infinity_raise_no_floating_point_errors():
    with np.errstate(all="raise"):
        schedule = schedules.custom(np.full(1000, 0.999))
        assert schedule.log_snr[-1] == pytest.approx(1000 * np.log(0.001), rel=1e-12)
        assert schedule.alphas_cumprod[-1] == 0
        assert schedule.sigmas[-1] == np.inf
        for name in TABLES:
            assert not np.isnan(getattr(schedule, name)).any(), name


# Zero terminal SNR.


@pytest.mark.parametrize("make", [schedules.linear, schedules.scaled_linear, schedules.cosine])
def test_rescaling_to_zero_terminal_snr_is_algorithm_1(make):
    schedule = make(1000)
    rescaled = schedule.rescaled_zero_terminal_snr()
    abar = [mp.mpf(1)]
    for beta in schedule.betas.tolist():
        abar.append(abar[-1] * (1 - mp.mpf(beta)))
    root = [mp.sqrt(a) for a in abar[1:]]
    scale = root[0] / (root[0] - root[-1])
    expected = np.array([float(((a - root[-1]) * scale) ** 2) for a in root])
    # Where abar_t is close to abar_T the difference magnifies the error of log abar, about 2e-15.
    np.testing.assert_allclose(rescaled.alphas_cumprod, expected, rtol=3e-13)
    assert rescaled.alphas_cumprod[-1] == 0
    assert rescaled.betas[-1] == 1
    assert rescaled.betas[0] == pytest.approx(schedule.betas[0], rel=1e-15)
    assert (rescaled.timesteps == schedule.timesteps).all()


def test_zero_terminal_snr_is_exact_and_infinite_where_it_should_be():
    schedule = schedules.linear(1000).rescaled_zero_terminal_snr()
    assert schedule.alpha_t[-1] == 0
    assert schedule.sigma_t[-1] == 1
    assert schedule.snr[-1] == 0
    assert schedule.log_snr[-1] == -np.inf
    assert schedule.sqrt_recip_alphas_cumprod[-1] == np.inf
    assert schedule.sigmas[-1] == np.inf
    # x_T says nothing about x_{T-1}: the posterior is the marginal given x_0.
    assert schedule.posterior_mean_coef1[-1] == schedule.alpha_t[-2]
    assert schedule.posterior_mean_coef2[-1] == 0
    assert schedule.posterior_variance[-1] == pytest.approx(schedule.sigma_t[-2] ** 2, rel=1e-15)
    again = schedule.rescaled_zero_terminal_snr()
    np.testing.assert_allclose(again.alphas_cumprod, schedule.alphas_cumprod, rtol=1e-14)


@pytest.mark.parametrize("betas", [[0.5], [0.5, 0.0], [0.5, 0.2, 0.0]])
def test_rescaling_is_refused_where_algorithm_1_divides_by_zero(betas):
    with pytest.raises(ValueError, match="rescaled_zero_terminal_snr needs"):
        schedules.custom(betas).rescaled_zero_terminal_snr()


def test_rescaling_keeps_the_relative_precision_of_small_noise_levels():
    schedule = schedules.linear(1000, 1e-6, 2e-6)
    abar, root = mp.mpf(1), []
    for beta in schedule.betas.tolist():
        abar *= 1 - mp.mpf(beta)
        root.append(mp.sqrt(abar))
    scale = root[0] / (root[0] - root[-1])
    expected = [float(mp.sqrt(1 - ((a - root[-1]) * scale) ** 2)) for a in root]
    got = schedule.rescaled_zero_terminal_snr().sigma_t
    np.testing.assert_allclose(got, expected, rtol=1e-14)


def test_rescaling_keeps_levels_that_are_all_nearly_pure_noise_apart():
    schedule = schedules.custom([0.5, *[0.999] * 20]).rescaled_zero_terminal_snr()
    # abar falls by 1000 a step, so subtracting the last sqrt matters only at the end.
    assert schedule.alphas_cumprod[-2] == pytest.approx(0.5e-57 * (1 - 0.001**0.5) ** 2, rel=1e-12)


# Sub-chains.


@st.composite
def chains(draw):
    beta = st.floats(1e-6, 0.999)
    betas = draw(st.lists(beta, min_size=1, max_size=40))
    kept = draw(st.sets(st.integers(0, len(betas) - 1), min_size=1))
    return betas, sorted(kept)


@settings(max_examples=150, deadline=None)
@given(chains())
def test_spacing_a_chain_keeps_its_marginals_and_stays_a_chain(chain):
    betas, kept = chain
    full = schedules.custom(betas, timesteps=10 * np.arange(len(betas)) + 3)
    short = full.spaced(kept)
    assert (short.timesteps == 10 * np.array(kept) + 3).all()
    assert (short.alpha_t == full.alpha_t[kept]).all()
    assert (short.sigma_t == full.sigma_t[kept]).all()
    # Its betas alone, multiplied up exactly, give the same marginals (where they can say 1 - beta).
    says = np.minimum.accumulate(short.alphas) > 1e-3
    product, products = mp.mpf(1), []
    for beta in short.betas.tolist():
        product *= 1 - mp.mpf(beta)
        products.append(float(product))
    np.testing.assert_allclose(
        np.array(products)[says], full.alphas_cumprod[kept][says], rtol=1e-12
    )
    np.testing.assert_allclose(np.cumprod(short.alphas), short.alphas_cumprod, rtol=1e-12)


@settings(max_examples=100, deadline=None)
@given(chains())
def test_the_posterior_composes_with_the_marginal_of_x_t(chain):
    schedule = schedules.custom(chain[0])
    alpha, sigma = schedule.alpha_t, schedule.sigma_t
    prev_alpha, prev_sigma = np.r_[1.0, alpha[:-1]], np.r_[0.0, sigma[:-1]]
    coef1, coef2 = schedule.posterior_mean_coef1, schedule.posterior_mean_coef2
    # Integrating q(x_{t-1} | x_t, x_0) over q(x_t | x_0) must give q(x_{t-1} | x_0).
    np.testing.assert_allclose(coef1 + coef2 * alpha, prev_alpha, rtol=1e-12)
    variance = schedule.posterior_variance + (coef2 * sigma) ** 2
    np.testing.assert_allclose(variance, prev_sigma**2, rtol=1e-12)
    assert (np.diff(schedule.alphas_cumprod) < 0).all()
    assert (np.diff(schedule.log_snr) < 0).all()
    assert np.isfinite(schedule.posterior_log_variance_clipped).all()


def test_spaced_schedule_takes_counts_strings_and_indices():
    full = schedules.linear(1000)
    assert full.spaced("ddim50").timesteps.tolist() == list(range(0, 1000, 20))
    assert (full.spaced(250).timesteps == space_timesteps(1000, 250)).all()
    assert (full.spaced("10,15,20").timesteps == space_timesteps(1000, [10, 15, 20])).all()
    # A sequence is indices, in any order: what timestep_spacing returns descends.
    assert full.spaced(timestep_spacing(1000, 4, "trailing")) == full.spaced([249, 499, 749, 999])
    assert full.spaced(1000) == full
    assert full.spaced("ddim50").spaced([1, 3]).timesteps.tolist() == [20, 60]
    abar = full.alphas_cumprod
    assert full.spaced([10, 500]).betas[1] == pytest.approx(1 - abar[500] / abar[10], rel=1e-13)


@pytest.mark.parametrize(
    "spec, error, said",
    [
        (0, ValueError, "spec must keep at least one"),
        (11, ValueError, "spec must fit: 11 timesteps in a section of 10"),
        ("ddim7", ValueError, "gives exactly 7"),
        ("ten", ValueError, "spec must look like"),
        ([], ValueError, "spec must be a non-empty 1-D array"),
        ([[1]], ValueError, "spec must be a non-empty 1-D array"),
        ([1, 1], ValueError, "spec must not repeat an index"),
        ([-1, 3], ValueError, r"spec must hold indices in \[0, 9\], got spec\[0\] = -1"),
        ([3, 10], ValueError, r"spec must hold indices in \[0, 9\]"),
        ([0.0, 1.0], TypeError, "spec must hold integers"),
        (None, TypeError, "spec must be an integer"),
        (True, TypeError, "spec must be an integer"),
    ],
)
def test_spaced_schedule_refuses_what_is_not_a_sub_chain(spec, error, said):
    with pytest.raises(error, match=said):
        schedules.linear(10).spaced(spec)


# Values that do not change.


@pytest.mark.parametrize(
    "schedule",
    [schedules.linear(5), schedules.cosine(50).spaced(7), schedules.flow(5), schedules.ve([1, 2])],
    ids=["chain", "sub-chain", "flow", "ve"],
)
def test_schedules_are_immutable_values(schedule):
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.alpha_t = np.ones(5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.name = "other"
    for name in ("alpha_t", "sigma_t", "timesteps", "sigmas", "snr", "log_snr"):
        array = getattr(schedule, name)
        assert array is getattr(schedule, name)
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 7
        with pytest.raises(ValueError, match="WRITEABLE"):
            array.setflags(write=True)
    for twin in (pickle.loads(pickle.dumps(schedule)), copy.deepcopy(schedule)):
        assert twin == schedule
        assert hash(twin) == hash(schedule)
        assert twin.name == schedule.name
        assert not twin.alpha_t.flags.writeable


def test_schedules_do_not_follow_the_arrays_they_were_made_from():
    betas = np.array([0.1, 0.2])
    schedule = NoiseSchedule(betas)
    betas[:] = 0.5
    assert schedule.betas.tolist() == [0.1, 0.2]


def test_equality_is_by_content_and_ignores_the_name():
    one = schedules.linear(10)
    assert one == schedules.custom(np.linspace(1e-4, 0.02, 10), name="mine")
    assert len({one, schedules.linear(10), schedules.linear(11)}) == 2
    assert one != schedules.linear(10, 1e-4, 0.021)
    assert one != schedules.custom(one.betas, timesteps=np.arange(1, 11))
    assert one != schedules.custom(one.betas, timesteps=np.arange(10.0))
    assert one != "linear"
    assert schedules.custom([0.0, 0.1]) == schedules.custom([-0.0, 0.1])


def test_repr_tells_what_the_schedule_is():
    assert repr(schedules.linear(1000)) == (
        "NoiseSchedule('linear', T=1000, betas 0.0001 .. 0.02, "
        "alphas_cumprod 0.9999 .. 4.03583e-05, timesteps 0 .. 999)"
    )
    assert "'linear, 50 of 1000', T=50" in repr(schedules.linear(1000).spaced(50))
    assert repr(schedules.flow(4)) == (
        "GaussianPath('flow', T=4, alpha_t 0.75 .. 0, sigma_t 0.25 .. 1, timesteps 250 .. 1000)"
    )


# Flow and variance-exploding paths.


def test_flow_is_the_straight_path_with_training_timesteps():
    path = schedules.flow(1000)
    i = np.arange(1, 1001)
    assert (path.sigma_t == i / 1000).all()
    np.testing.assert_allclose(path.alpha_t, (1000 - i) / 1000, rtol=1e-15)
    np.testing.assert_allclose(path.timesteps, i, rtol=1e-15)
    np.testing.assert_allclose(
        schedules.flow(4, num_train_timesteps=100).timesteps, [25, 50, 75, 100]
    )
    assert path.snr[499] == 1
    assert path.sigmas[-1] == np.inf
    assert path.log_snr[-1] == -np.inf
    assert len(path) == path.num_timesteps == 1000


@pytest.mark.parametrize("s", [0.25, 1.0, 3.0, 1e9])
def test_static_shift_is_equation_23_and_moves_log_snr_by_a_constant(s):
    path, plain = schedules.flow(100, shift=s), schedules.flow(100)
    exact = [mp.mpf(i) / 100 for i in range(1, 101)]
    sigma = [s * x / (1 + (mp.mpf(s) - 1) * x) for x in exact]
    np.testing.assert_allclose(path.sigma_t, [float(x) for x in sigma], rtol=1e-15)
    np.testing.assert_allclose(path.alpha_t, [float(1 - x) for x in sigma], rtol=1e-15)
    # SD3 section 5.3.2: the shift is 2 log s on the log-SNR.
    np.testing.assert_allclose(
        path.log_snr[:-1], plain.log_snr[:-1] - 2 * np.log(s), rtol=1e-13, atol=1e-13
    )
    np.testing.assert_allclose(
        schedules.flow_shift(plain.sigma_t, shift=s), path.sigma_t, rtol=1e-15
    )


@pytest.mark.parametrize("mu", [-2.0, 0.0, 0.63, 1.15])
def test_mu_shift_is_the_exponential_time_shift(mu):
    exact = [mp.mpf(i) / 28 for i in range(1, 29)]
    expected = [float(mp.exp(mu) / (mp.exp(mu) + (1 / x - 1))) for x in exact]
    np.testing.assert_allclose(schedules.flow(28, mu=mu).sigma_t, expected, rtol=2e-15)
    assert schedules.flow_shift([0.0, 1.0], mu=mu).tolist() == [0.0, 1.0]


def test_resolution_mu_is_a_line_through_its_two_points():
    assert schedules.resolution_mu(256) == 0.5
    assert schedules.resolution_mu(4096) == 1.15
    assert schedules.resolution_mu(2176) == pytest.approx(0.825, rel=1e-15)
    assert schedules.resolution_mu(6016) == pytest.approx(1.475, rel=1e-15)
    assert schedules.resolution_mu(3, 1, 5, 10.0, 20.0) == 15.0


def test_variance_exploding_path_takes_a_ladder_either_way_up():
    up = schedules.ve([0.5, 2.0, 8.0])
    assert up.alpha_t.tolist() == [1, 1, 1]
    assert up.sigma_t.tolist() == up.timesteps.tolist() == up.sigmas.tolist() == [0.5, 2.0, 8.0]
    np.testing.assert_allclose(up.snr, [4, 0.25, 1 / 64], rtol=1e-15)
    np.testing.assert_allclose(up.log_snr, -2 * np.log([0.5, 2, 8]), rtol=1e-15)
    assert schedules.ve([8.0, 2.0, 0.5]) == up
    labelled = schedules.ve([8.0, 2.0, 0.5], timesteps=[30, 20, 10])
    assert labelled.timesteps.tolist() == [10, 20, 30]
    ladder = schedules.ve(schedules.karras(10, 0.002, 80.0))
    assert ladder.sigma_t[0] == 0
    assert ladder.snr[0] == ladder.log_snr[0] == np.inf


def test_the_variance_exploding_view_of_a_chain_has_the_same_snr():
    chain = schedules.linear(100)
    view = schedules.ve(chain.sigmas, chain.timesteps)
    np.testing.assert_allclose(view.snr, chain.snr, rtol=1e-14)
    general = GaussianPath(chain.alpha_t, chain.sigma_t, chain.timesteps)
    np.testing.assert_allclose(general.sigmas, chain.sigmas, rtol=1e-14)
    np.testing.assert_allclose(general.log_snr, chain.log_snr, rtol=1e-13, atol=1e-14)


# Errors.

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "call, error, said",
    [
        (lambda: NoiseSchedule([]), ValueError, r"betas must be a non-empty 1-D array, got shape"),
        (lambda: NoiseSchedule(0.1), ValueError, r"betas .* got shape \(\)"),
        (lambda: NoiseSchedule([[0.1]]), ValueError, r"betas .* got shape \(1, 1\)"),
        (lambda: NoiseSchedule([0.1, NAN]), ValueError, r"betas must not be NaN, got betas\[1\]"),
        (lambda: NoiseSchedule([0.1, 1.5]), ValueError, r"betas must be in \[0, 1\), got .* 1.5"),
        (lambda: NoiseSchedule([0.1, INF]), ValueError, r"betas must be in \[0, 1\)"),
        (lambda: NoiseSchedule([-1e-9]), ValueError, r"betas must be in \[0, 1\)"),
        (
            lambda: NoiseSchedule([1.0, 0.1]),
            ValueError,
            r"only the last may be 1\), got betas\[0\]",
        ),
        (lambda: NoiseSchedule(["a"]), TypeError, "betas must hold real numbers"),
        (lambda: NoiseSchedule([0.1j]), TypeError, "betas must hold real numbers"),
        (lambda: NoiseSchedule([True]), TypeError, "betas must hold real numbers"),
        (lambda: NoiseSchedule([[0.1], [0.1, 0.2]]), TypeError, "betas must be a 1-D array"),
        (lambda: NoiseSchedule([0.1], [1, 2]), ValueError, "timesteps must have 1 entries, got 2"),
        (lambda: NoiseSchedule([0.1, 0.2], [2, 2]), ValueError, "timesteps must strictly increase"),
        (lambda: NoiseSchedule([0.1], [INF]), ValueError, "timesteps must be finite"),
        (lambda: NoiseSchedule([0.1], name=3), TypeError, "name must be a string"),
        (
            lambda: NoiseSchedule([0.1, 0.2], log_alphas_cumprod=[-0.1, -0.3]),
            ValueError,
            "log_alphas_cumprod must agree with betas",
        ),
        (
            lambda: NoiseSchedule([0.1, 0.2], log_alphas_cumprod=[-0.1, -0.05]),
            ValueError,
            "log_alphas_cumprod must not increase",
        ),
        (lambda: schedules.from_alphas_cumprod([0.5, 0.6]), ValueError, "must never increase"),
        (lambda: schedules.from_alphas_cumprod([1.1]), ValueError, r"alphas_cumprod must be in"),
        (lambda: schedules.from_alphas_cumprod([0.0, 0.0]), ValueError, "only the last may be 0"),
        (lambda: schedules.from_alphas_cumprod([NAN]), ValueError, "alphas_cumprod must not be"),
        (lambda: schedules.linear(0), ValueError, "T must be >= 1, got 0"),
        (lambda: schedules.linear(1000.0), TypeError, "T must be an integer"),
        (lambda: schedules.linear(True), TypeError, "T must be an integer"),
        (lambda: schedules.linear(10, -0.1), ValueError, "beta_start must be in"),
        (lambda: schedules.linear(10, 0.1, 0.05), ValueError, "beta_end must be in"),
        (lambda: schedules.linear(10, scale_endpoints=True), ValueError, "beta_end .* 1000/T"),
        (lambda: schedules.linear(10, scale_endpoints=2), TypeError, "scale_endpoints must be"),
        (lambda: schedules.scaled_linear(10, NAN), ValueError, "beta_start must be finite"),
        (lambda: schedules.cosine(10, s=-1), ValueError, "s must be >= 0"),
        (lambda: schedules.cosine(10, max_beta=1.1), ValueError, "max_beta must be in"),
        (lambda: schedules.sigmoid(10, 3, -3), ValueError, "start must be < end"),
        (lambda: schedules.sigmoid(10, tau=0), ValueError, "tau must be > 0"),
        (lambda: schedules.sigmoid(10, -800), ValueError, "start must be within 700 tau"),
        (lambda: schedules.ve([1.0, 3.0, 2.0]), ValueError, "sigmas must be strictly monotone"),
        (lambda: schedules.ve([1.0, 1.0]), ValueError, "sigmas must be strictly monotone"),
        (lambda: schedules.ve([-1.0, 1.0]), ValueError, "sigmas must be finite and >= 0"),
        (lambda: schedules.ve([1.0, NAN]), ValueError, "sigmas must not be NaN"),
        (lambda: schedules.ve([1.0, 2.0], [0]), ValueError, "timesteps must have 2 entries"),
        (lambda: schedules.ve([1.0, 2.0], [1, 0]), ValueError, "timesteps must strictly"),
        (lambda: GaussianPath([1.0], [1.0, 2.0]), ValueError, "sigma_t must have 1 entries"),
        (lambda: GaussianPath([0.0], [0.0]), ValueError, "sigma_t must be > 0 where alpha_t"),
        (lambda: GaussianPath([-1.0], [1.0]), ValueError, "alpha_t must be finite and >= 0"),
        (lambda: GaussianPath([1, 1], [2, 1]), ValueError, "sigma_t must strictly increase over"),
        (lambda: schedules.flow(0), ValueError, "num_timesteps must be >= 1"),
        (lambda: schedules.flow(10, shift=0), ValueError, "shift must be > 0"),
        (lambda: schedules.flow(10, shift=2, mu=1), ValueError, "shift and mu exclude"),
        (lambda: schedules.flow(10, mu=INF), ValueError, "mu must be finite"),
        (lambda: schedules.flow(10, mu=600), ValueError, "mu=600 is too strong"),
        (lambda: schedules.flow_shift([1.5], shift=2), ValueError, r"sigmas must be in \[0, 1\]"),
        (lambda: schedules.resolution_mu(0), ValueError, "tokens must be >= 1"),
        (lambda: schedules.resolution_mu(9, 256, 256), ValueError, "max_tokens must be >= 257"),
        (lambda: schedules.karras(5, 0.1, 1.0, 0.0), ValueError, "rho must be > 0"),
        (lambda: schedules.polyexponential(5, 0.1, 1.0, NAN), ValueError, "rho must be finite"),
        (lambda: schedules.beta(5, 0.1, 1.0, 101), ValueError, r"alpha must be in \(0, 100\]"),
        (lambda: schedules.beta(5, 0.1, 1.0, 1, 0), ValueError, "beta must be > 0"),
        (lambda: schedules.lu(5, 0.1, 1.0, append_zero=1), TypeError, "append_zero must be True"),
        (lambda: timestep_spacing(0, 1), ValueError, "T must be >= 1"),
        (lambda: timestep_spacing(10, 0), ValueError, r"steps must be in \[1, 10\], got 0"),
        (lambda: timestep_spacing(10, 11), ValueError, r"steps must be in \[1, 10\], got 11"),
        (lambda: timestep_spacing(10, 5, "karras"), ValueError, "spacing must be one of leading"),
        (lambda: timestep_spacing(10, 10, steps_offset=1), ValueError, "steps_offset must be <= 0"),
        (lambda: timestep_spacing(10, 5, steps_offset=-1), ValueError, "steps_offset must be >= 0"),
        (lambda: space_timesteps(10, "5,x"), ValueError, "section_counts must look like"),
        (lambda: space_timesteps(10, "-1"), ValueError, "section_counts must look like"),
        (lambda: space_timesteps(10, ""), ValueError, "section_counts must look like"),
        (lambda: space_timesteps(10, []), ValueError, "section_counts must keep at least one"),
        (lambda: space_timesteps(10, [1.5]), TypeError, r"section_counts\[0\] must be an integer"),
        (lambda: space_timesteps(10, "6,1"), ValueError, "6 timesteps in a section of 5"),
        (lambda: space_timesteps(10, "ddim6"), ValueError, "no integer stride"),
        (lambda: space_timesteps(10, "ddim0"), ValueError, "no integer stride"),
    ],
)
def test_bad_arguments_are_named(call, error, said):
    with pytest.raises(error, match=said):
        call()


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(), min_size=1, max_size=8).filter(
        lambda b: not all(0 <= x < 1 for x in b[:-1]) or not 0 <= b[-1] <= 1
    )
)
def test_no_chain_is_made_from_betas_out_of_range(betas):
    with pytest.raises(ValueError, match="betas"):
        NoiseSchedule(betas)
