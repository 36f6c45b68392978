"""The variational bound against the papers' formulas in float64, and against an exact model.

H: Ho et al. 2020. N: Nichol & Dhariwal 2021.
"""

from __future__ import annotations

import itertools
import math

import mpmath
import numpy as np
import pytest
import torch

import fastdiff as fd
from fastdiff.training import likelihood, tables

T = 30
SCHEDULE = fd.schedules.NoiseSchedule(np.linspace(0.01, 0.5, T), name="test")
VALUES = {
    name: torch.from_numpy(np.array(getattr(SCHEDULE, name)))
    for name in ("alpha_t", "sigma_t", "posterior_mean_coef1", "posterior_mean_coef2", "betas")
}
SHAPE = (4, 3, 5)
TIMES = torch.tensor([0, 1, 12, 29])
LN2 = math.log(2.0)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def at(name, t):
    return VALUES[name][t].reshape(-1, *[1] * (len(SHAPE) - 1))


def pair(t=TIMES, seed=0):
    """x_0 on the grid of 256 values, some of them at its ends, the noise and x_t, in float64."""
    x_start = (randn(*SHAPE, seed=seed) * 0.7).clamp(-1, 1)
    x_start = ((x_start + 1) * 127.5).round() / 127.5 - 1
    noise = randn(*SHAPE, seed=seed + 1)
    return x_start, noise, at("alpha_t", t) * x_start + at("sigma_t", t) * noise


def clipped_log_variance():
    """log beta~_t of H eq. 7 with the first entry replaced by the second (N section 3.1)."""
    abar = np.cumprod(1 - SCHEDULE.betas)
    before = np.append(1.0, abar[:-1])
    tilde = SCHEDULE.betas * (1 - before) / (1 - abar)
    return torch.from_numpy(np.log(np.append(tilde[1], tilde[1:])))


def predicted(output, x_t, t, prediction_type):
    alpha, sigma = at("alpha_t", t), at("sigma_t", t)
    return {
        "epsilon": (x_t - sigma * output) / alpha,
        "sample": output,
        "v_prediction": alpha * x_t - sigma * output,
        "flow": (x_t - sigma * output) / (alpha + sigma),
        "previous": (output - at("posterior_mean_coef2", t) * x_t) / at("posterior_mean_coef1", t),
    }[prediction_type]


def paper_bound(output, x_start, x_t, t, prediction_type, variance, clip):
    """H eqs. 5 and 13 in bits per dimension, plainly."""
    c1, c2 = at("posterior_mean_coef1", t), at("posterior_mean_coef2", t)
    output, *v = output.chunk(2, dim=1) if variance in tables.LEARNED else (output,)
    x0 = predicted(output, x_t, t, prediction_type)
    x0 = x0 if clip is None else x0.clamp(*clip)
    mean = output if prediction_type == "previous" else c1 * x0 + c2 * x_t
    small = clipped_log_variance()
    shape = (-1, *[1] * (len(SHAPE) - 1))
    low, high = small[t].reshape(shape), torch.log(VALUES["betas"])[t].reshape(shape)
    if variance == "learned":
        log_variance = v[0]
    elif variance == "learned_range":
        log_variance = (v[0] + 1) / 2 * high + (1 - v[0]) / 2 * low
    else:
        large = torch.where((t == 0).reshape(shape), low, high)
        log_variance = (low if variance == "fixed_small" else large) + 0 * mean
    true = torch.distributions.Normal(c1 * x_start + c2 * x_t, (low / 2).exp().expand_as(mean))
    model = torch.distributions.Normal(mean, (log_variance / 2).exp())
    kl = torch.distributions.kl_divergence(true, model)

    def cdf(value):
        z = (value - mean) / model.scale
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    upper = torch.where(x_start > 0.999, 1.0, cdf(x_start + 1 / 255))
    lower = torch.where(x_start < -0.999, 0.0, cdf(x_start - 1 / 255))
    first = (t == 0).reshape(shape)
    probability = torch.where(first, upper - lower, 1.0)  # elsewhere it may vanish
    terms = torch.where(first, -torch.log(probability), kl)
    return terms.flatten(1).mean(1) / LN2


def output_for(prediction_type, variance, x_start, noise, x_t, t):
    """What a model that is off by a tenth would say."""
    alpha, sigma = at("alpha_t", t), at("sigma_t", t)
    x0 = x_start + 0.1 * randn(*SHAPE, seed=7)
    eps = (x_t - alpha * x0) / sigma
    output = {
        "epsilon": eps, "sample": x0, "v_prediction": alpha * eps - sigma * x0, "flow": eps - x0,
        "previous": at("posterior_mean_coef1", t) * x0 + at("posterior_mean_coef2", t) * x_t,
    }[prediction_type]  # fmt: skip
    v = randn(*SHAPE, seed=8)
    if variance == "learned":
        return torch.cat([output, 0.5 * v - 2], dim=1)
    return torch.cat([output, v.clamp(-1, 1)], dim=1) if variance == "learned_range" else output


CASES = pytest.mark.parametrize(
    ("prediction_type", "variance", "clip"),
    list(itertools.product(tables.PREDICTION_TYPES, tables.VARIANCES, (None, (-0.8, 0.9)))),
)


@CASES
def test_terms_are_the_papers(prediction_type, variance, clip):
    x_start, noise, x_t = pair()
    output = output_for(prediction_type, variance, x_start, noise, x_t, TIMES)
    options = dict(prediction_type=prediction_type, variance=variance, clip=clip)
    want = paper_bound(output, x_start, x_t, TIMES, **options)
    got = likelihood.vb_terms_bpd(output, x_start, x_t, TIMES, SCHEDULE, **options)
    assert got.dtype == torch.float64 and got.shape == (4,)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    # float32: the data's rounding (2^-24) over the standard deviation of the narrowest posterior
    # (0.08) enters z of elements that cost a few nats.
    single = likelihood.vb_terms_bpd(
        output.float(), x_start.float(), x_t.float(), TIMES, SCHEDULE, **options
    )
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), want, rtol=3e-6, atol=3e-6)


@CASES
def test_x_start_comes_along(prediction_type, variance, clip):
    x_start, noise, x_t = pair()
    output = output_for(prediction_type, variance, x_start, noise, x_t, TIMES)
    options = dict(prediction_type=prediction_type, variance=variance, clip=clip)
    bound, x0 = likelihood.vb_terms_bpd(
        output, x_start, x_t, TIMES, SCHEDULE, return_x_start=True, **options
    )
    want = predicted(output[:, :3], x_t, TIMES, prediction_type)
    want = want if clip is None else want.clamp(*clip)
    torch.testing.assert_close(x0, want, rtol=1e-9, atol=1e-10)
    alone = likelihood.vb_terms_bpd(output, x_start, x_t, TIMES, SCHEDULE, **options)
    assert torch.equal(bound, alone)


@pytest.mark.parametrize("variance", tables.VARIANCES)
def test_gradients_are_the_papers(variance):
    x_start, noise, x_t = pair()
    output = output_for("epsilon", variance, x_start, noise, x_t, TIMES)
    # Where the prediction is at the clamp to rounding its derivative is not defined.
    options = dict(prediction_type="epsilon", variance=variance, clip=(-0.8123, 0.9321))
    given = [value.clone().requires_grad_() for value in (output, x_start, x_t)]
    weights = randn(4, seed=3)
    bound = likelihood.vb_terms_bpd(*given, TIMES, SCHEDULE, **options)
    got = torch.autograd.grad((bound * weights).sum(), given)
    want = torch.autograd.grad((paper_bound(*given, TIMES, **options) * weights).sum(), given)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-11)


@CASES
def test_gradcheck(prediction_type, variance, clip):
    """The fused pass, by the model output alone, with the likelihood of t = 0 among the terms."""
    x_start, noise, x_t = pair()
    output = output_for(prediction_type, variance, x_start, noise, x_t, TIMES)
    # Away from the kink of the clamp.
    options = dict(prediction_type=prediction_type, variance=variance)
    options["clip"] = None if clip is None else (-0.8123, 0.9321)
    assert torch.autograd.gradcheck(
        lambda output: likelihood.vb_terms_bpd(output, x_start, x_t, TIMES, SCHEDULE, **options),
        output.requires_grad_(),
    )


@pytest.mark.parametrize("variance", tables.VARIANCES)
def test_gradients_in_low_precision(variance):
    """Against float64 of the numbers as they were rounded; of v, as x_0 of epsilon has rounding
    times 1 / alpha_t, 60 at the last t."""
    options = dict(prediction_type="v_prediction", variance=variance)
    # (of the bound, of a gradient against the largest of its sample)
    for dtype, tolerances in ((torch.float32, (3e-6, 1e-5)), (torch.bfloat16, (3e-6, 2**-8))):
        x_start, noise, x_t = pair()
        output = output_for(*options.values(), x_start, noise, x_t, TIMES)
        given = [value.to(dtype) for value in (output, x_start, x_t)]
        found = []
        for values in (given, [value.double() for value in given]):
            leaf = values[0].clone().requires_grad_()
            bound = likelihood.vb_terms_bpd(leaf, *values[1:], TIMES, SCHEDULE, **options)
            found.append((bound, torch.autograd.grad(bound.sum(), leaf)[0]))
        (bound, gradient), (exact_bound, exact) = found
        assert bound.dtype == torch.float32 and gradient.dtype == dtype
        torch.testing.assert_close(
            bound.double(), exact_bound, rtol=tolerances[0], atol=tolerances[0]
        )
        error = (gradient.double() - exact).flatten(1).abs().amax(1)
        assert (error <= tolerances[1] * exact.flatten(1).abs().amax(1)).all()


def test_one_pass_gives_every_term_in_its_units():
    x_start, noise, x_t = pair()
    output = output_for("v_prediction", "learned_range", x_start, noise, x_t, TIMES)
    kind = tables.BoundKind(
        "v_prediction", "learned_range", (-1.0, 1.0), scale=7.0, in_bits=False, target_error=True,
        x_start_error=True,
    )  # fmt: skip
    error, bound, x_error = likelihood.bound_terms(
        SCHEDULE, kind, output, x_start, x_t, TIMES, noise=[noise]
    )
    v = at("alpha_t", TIMES) * noise - at("sigma_t", TIMES) * x_start
    mse = ((v - output[:, :3]) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(error, mse, rtol=1e-12, atol=0)
    bits = paper_bound(output, x_start, x_t, TIMES, "v_prediction", "learned_range", (-1, 1))
    torch.testing.assert_close(bound, 7.0 * 15 * LN2 * bits, rtol=1e-9, atol=0)
    x0 = predicted(output[:, :3], x_t, TIMES, "v_prediction").clamp(-1, 1)
    torch.testing.assert_close(
        x_error, ((x0 - x_start) ** 2).flatten(1).mean(1), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("prediction_type", tables.PREDICTION_TYPES)
def test_the_target_is_what_a_perfect_model_says(prediction_type):
    x_start, noise, x_t = pair()
    alpha, sigma = at("alpha_t", TIMES), at("sigma_t", TIMES)
    perfect = {
        "epsilon": noise, "sample": x_start, "v_prediction": alpha * noise - sigma * x_start,
        "flow": noise - x_start,
        "previous": at("posterior_mean_coef1", TIMES) * x_start
        + at("posterior_mean_coef2", TIMES) * x_t,
    }[prediction_type]  # fmt: skip
    kind = tables.BoundKind(prediction_type, bound=False, target_error=True)
    off = torch.tensor([0.0, 0.5, 1.0, 2.0], dtype=torch.float64)
    terms = likelihood.bound_terms(
        SCHEDULE, kind, perfect + off.reshape(-1, 1, 1), x_start, x_t, TIMES, noise=[noise]
    )
    torch.testing.assert_close(terms, off.square()[None], rtol=1e-12, atol=1e-28)


def test_extra_columns_replace_and_nan_is_refused():
    kind = tables.BoundKind("sample")
    weight = np.arange(T) / T
    table = tables.bound_table(SCHEDULE, kind, 10, {"bound_scale": weight})
    assert (table[:, tables.COLUMNS.index("bound_scale")] == weight).all()
    with pytest.raises(ValueError, match="error_scale undefined at t = 3"):
        tables.bound_table(
            SCHEDULE, kind, 10, {"error_scale": np.where(np.arange(T) == 3, np.nan, 1)}
        )


# Elementwise.


def test_normal_kl_is_that_of_torch_distributions():
    mean1, mean2 = randn(50, seed=1), randn(50, seed=2)
    log1, log2 = randn(50, seed=3), randn(50, seed=4)
    want = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean1, (log1 / 2).exp()),
        torch.distributions.Normal(mean2, (log2 / 2).exp()),
    )
    got = likelihood.normal_kl(mean1, log1, mean2, log2)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    # Equal variances: no cancellation of 1 - 1.
    tiny = likelihood.normal_kl(mean1 * 0, log1.float(), 1e-6, log1.float() + 1e-6)
    assert (tiny >= 0).all()


def exact_log_likelihood(x, mean, log_scale):
    """H eq. 13 with the tanh CDF, in 2000 digits: no probability vanishes."""
    with mpmath.workdps(2000):
        scale = mpmath.exp(mpmath.mpf(log_scale))
        root = mpmath.sqrt(2 / mpmath.pi)

        def cdf(edge):
            z = (mpmath.mpf(x) - mpmath.mpf(mean) + edge) / scale
            return (1 + mpmath.tanh(root * (z + mpmath.mpf("0.044715") * z**3))) / 2

        half = mpmath.mpf(1) / 255
        upper = mpmath.mpf(1) if x > 0.999 else cdf(half)
        lower = mpmath.mpf(0) if x < -0.999 else cdf(-half)
        return float(mpmath.log(upper - lower))


@pytest.mark.parametrize(
    ("dtype", "rtol"),
    # float32: s = exp(-log_scale), z and z^3 are rounded a few times each before the exponent.
    [(torch.float64, 2e-13), (torch.float32, 2e-6)],
)
def test_tails_are_exact(dtype, rtol):
    points = [
        (x, mean, log_scale)
        for x in (-1.0, -0.9921568627450981, 0.003921568627450966, 1.0)
        for mean in (-1.3, -0.2, 0.005, 0.9)
        for log_scale in (-2.7, -1.0, 0.5, 2.0)
    ]
    x, mean, log_scale = (torch.tensor(v, dtype=dtype) for v in zip(*points, strict=True))
    given = zip(x.tolist(), mean.tolist(), log_scale.tolist(), strict=True)  # as rounded
    want = torch.tensor([exact_log_likelihood(*point) for point in given], dtype=torch.float64)
    got = likelihood.discretized_gaussian_log_likelihood(x, means=mean, log_scales=log_scale)
    assert got.dtype == dtype and want.min() < -1000  # far beyond 1e-12
    torch.testing.assert_close(got.double(), want, rtol=rtol, atol=rtol)
    floored = likelihood.discretized_gaussian_log_likelihood(
        x, means=mean, log_scales=log_scale, floor=tables.UPSTREAM_FLOOR
    )
    torch.testing.assert_close(floored, got.clamp(min=math.log(1e-12)), rtol=0, atol=2e-6)


def test_bins_are_a_distribution_and_half_precision_keeps_its_dtype():
    bins = torch.linspace(-1, 1, 256, dtype=torch.float64)
    means, scales = torch.full_like(bins, 0.3), torch.full_like(bins, math.log(0.2))
    log_p = likelihood.discretized_gaussian_log_likelihood(bins, means=means, log_scales=scales)
    assert float(log_p.exp().sum()) == pytest.approx(1.0, abs=1e-12)
    half = likelihood.discretized_gaussian_log_likelihood(
        *[bins.bfloat16()], means=means.bfloat16(), log_scales=scales.bfloat16()
    )
    assert half.dtype == torch.bfloat16


# The whole bound.


def test_an_exact_model_of_gaussian_data_reaches_their_entropy():
    """Of N(0, s^2) data every p(x_{t-1} | x_t) is known and Gaussian, so the bound is tight:

    E[bound] = entropy of the data, 0.5 log2(2 pi e s^2), minus the log of the bin's width
             + KL(q(x_T) || N(0, 1))

    The bins are narrow (1/23 of the standard deviation of x_0 given x_1) and end at 5 s. What the
    tanh CDF costs against the normal one (Page 1977) is an integral over that narrow normal.
    """
    s = 0.2
    alpha, sigma = SCHEDULE.alpha_t, SCHEDULE.sigma_t
    spread = alpha**2 * s**2 + sigma**2
    gain, left = alpha * s**2 / spread, s**2 * sigma**2 / spread  # of x_0 given x_t
    variance = SCHEDULE.posterior_variance + SCHEDULE.posterior_mean_coef1**2 * left

    def model(x, t, factor=1.0):
        g, log_variance = (
            torch.from_numpy(v)[t].float().reshape(-1, 1) for v in (gain, np.log(variance * factor))
        )
        return torch.cat([g * x, log_variance.expand_as(x)], dim=1)  # fmt: skip

    u = np.linspace(-9, 9, 20001)
    weight = np.exp(-(u**2) / 2) / math.sqrt(2 * math.pi) * (u[1] - u[0])
    scale = math.sqrt(left[0])
    first = likelihood.discretized_gaussian_log_likelihood(
        torch.from_numpy(scale * u * 0), means=torch.from_numpy(scale * u),
        log_scales=torch.full((len(u),), math.log(scale), dtype=torch.float64),
    ).numpy()  # fmt: skip
    density = -0.5 * math.log(2 * math.pi * math.e * scale**2) + math.log(2 / 255)
    cdf_cost = density - float((weight * first).sum())  # nats
    assert 0 < cdf_cost < 1e-3
    entropy = 0.5 * math.log2(2 * math.pi * math.e * s**2) - math.log2(2 / 255)
    prior = 0.5 * (spread[-1] - 1 - math.log(spread[-1])) / LN2
    expected = entropy + prior + cdf_cost / LN2

    x_start = s * fd.randn((192, 1024), seed=1)
    options = dict(prediction_type="sample", variance="learned", clip=None)
    found = likelihood.calc_bpd_loop(model, x_start, SCHEDULE, seed=2, **options).total_bpd.double()
    error = float(found.std()) / math.sqrt(len(found))  # samples are independent
    assert error < 0.004
    assert float(found.mean()) == pytest.approx(expected, abs=4 * error)
    # A variance 1.3 times too large in every step costs 0.5 (1/1.3 - 1 + log 1.3) nats in each.
    worse = likelihood.calc_bpd_loop(
        lambda x, t: model(x, t, 1.3), x_start, SCHEDULE, seed=2, **options
    ).total_bpd.double()
    excess = 0.5 * T * (1 / 1.3 - 1 + math.log(1.3)) / LN2
    assert float(worse.mean() - found.mean()) == pytest.approx(excess, abs=4 * error)


@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
def test_a_compiled_term_has_the_same_bits(assert_same_bits, variance):
    x_start, noise, x_t = pair()
    output = output_for("epsilon", variance, x_start, noise, x_t, TIMES)
    given = [value.float() for value in (output, x_start, x_t)]

    def term(output, x_start, x_t, t):
        return likelihood.vb_terms_bpd(output, x_start, x_t, t, SCHEDULE, variance=variance)

    results = []
    for function in (torch.compile(term, fullgraph=True, backend="aot_eager"), term):
        leaf = given[0].clone().requires_grad_()
        bound = function(leaf, *given[1:], TIMES)
        results.append([bound.detach(), *torch.autograd.grad(bound.sum(), leaf)])
    assert_same_bits(*results)


def half_model(x, t):
    """Learned range; elementwise, so the same in any batch."""
    return torch.cat([0.5 * x, 0.1 * x - t.reshape(-1, 1, 1) / T], dim=1)


OPTIONS = dict(prediction_type="epsilon", variance="learned_range")


def test_the_bits_do_not_depend_on_batches(assert_same_bits):
    x_start = pair()[0].float()
    whole = likelihood.calc_bpd_loop(half_model, x_start, SCHEDULE, seed=5, **OPTIONS)
    for batch_t in (2, 7, 100):
        again = likelihood.calc_bpd_loop(
            half_model, x_start, SCHEDULE, seed=5, batch_t=batch_t, **OPTIONS
        )
        assert_same_bits(list(again), list(whole))
    for start, stop in ((0, 1), (1, 4)):
        part = likelihood.calc_bpd_loop(
            half_model, x_start[start:stop], SCHEDULE, seed=5, sample_offset=start, batch_t=3,
            **OPTIONS,
        )  # fmt: skip
        assert_same_bits(list(part), [value[start:stop] for value in whole])


def test_the_bits_do_not_depend_on_threads_either(assert_same_bits):
    """Of samples long enough to be shared out, in batches and parts of batches."""
    chain = SCHEDULE.spaced([0, 10, 29])
    x_start = fd.randn((3, 70001), 1).clamp(-1, 1)

    def bits(start, stop, batch_t):
        return list(
            likelihood.calc_bpd_loop(
                lambda x, t: torch.sin(x) - t[:, None] / T, x_start[start:stop], chain, seed=5,
                sample_offset=start, batch_t=batch_t,
            )
        )  # fmt: skip

    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found += [bits(0, 3, 1), bits(0, 3, 2)]
            parts = [bits(0, 1, 1), bits(1, 3, 3)]
            found.append([torch.cat(pieces) for pieces in zip(*parts, strict=True)])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert_same_bits(other, found[0])


def test_the_parts_are_those_of_their_functions():
    x_start = pair()[0]
    got = likelihood.calc_bpd_loop(half_model, x_start, SCHEDULE, seed=5, **OPTIONS)
    assert all(v.dtype == torch.float64 for v in got)
    for column, t in enumerate(reversed(range(T))):
        x_t, noise = fd.q_sample(x_start, t, SCHEDULE, seed=5, step=t, return_noise=True)
        output = half_model(x_t, torch.full((4,), t))
        vb, x0 = likelihood.vb_terms_bpd(
            output, x_start, x_t, t, SCHEDULE, return_x_start=True, **OPTIONS
        )
        eps = (x_t - SCHEDULE.alpha_t[t] * x0) / SCHEDULE.sigma_t[t]
        for name, value in (
            ("vb", vb), ("xstart_mse", ((x0 - x_start) ** 2).flatten(1).mean(1)),
            ("mse", ((eps - noise) ** 2).flatten(1).mean(1)),
        ):  # fmt: skip
            torch.testing.assert_close(
                getattr(got, name)[:, column], value, rtol=1e-10, atol=1e-13, msg=name
            )
    abar = SCHEDULE.alphas_cumprod[-1]
    per_element = 0.5 * (abar * x_start**2 - abar - math.log1p(-abar)) / LN2  # H eq. 5, L_T
    torch.testing.assert_close(got.prior_bpd, per_element.flatten(1).mean(1), rtol=1e-12, atol=0)
    total = got.vb.sum(1) + got.prior_bpd
    torch.testing.assert_close(got.total_bpd, total, rtol=1e-13, atol=0)


def test_noise_may_come_from_a_generator_or_a_tensor(assert_same_bits):
    x_start = pair()[0].float()
    drawn = likelihood.calc_bpd_loop(
        half_model, x_start, SCHEDULE, generator=torch.Generator().manual_seed(4), batch_t=4,
        **OPTIONS,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(4)
    noise = torch.stack([torch.randn(SHAPE, generator=generator) for _ in range(T)]).flip(0)
    given = likelihood.calc_bpd_loop(half_model, x_start, SCHEDULE, noise=noise, **OPTIONS)
    assert_same_bits(list(drawn), list(given))


def test_the_model_is_called_with_its_own_t_and_without_gradients():
    calls = []
    chain = fd.schedules.cosine(100).spaced([3, 40, 99])

    def model(x, t):
        calls.append((t.tolist(), torch.is_grad_enabled()))
        return x * scale

    scale = torch.ones((), requires_grad=True)
    x_start = torch.zeros(2, 5)
    found = likelihood.calc_bpd_loop(model, x_start, chain, seed=0, batch_t=2)
    assert calls == [([99, 99, 40, 40], False), ([3, 3], False)]
    assert not found.total_bpd.requires_grad


@pytest.mark.parametrize("learned", [False, True])
def test_backends_give_the_same_bits(accelerated, assert_same_bits, learned):
    variance = "learned_range" if learned else "fixed_large"
    x_start, noise, x_t = (value.float() for value in pair())
    output = output_for("epsilon", variance, *pair(), TIMES).float()
    kind = tables.BoundKind("epsilon", variance, (-0.9, 0.9), target_error=True, x_start_error=True)
    results = [
        likelihood.bound_terms(
            SCHEDULE, kind, output, x_start, x_t, TIMES, noise=[noise], backend=name
        )
        for name in (accelerated, "reference")
    ]
    assert_same_bits(*results)


# Warnings and refusals.


def test_a_chain_that_does_not_end_in_noise_is_pointed_out_once():
    short = fd.schedules.linear(40, 1e-4, 0.02)
    x_start = torch.zeros(1, 4)
    with pytest.warns(UserWarning, match="signal-to-noise ratio of 2:"):
        likelihood.prior_bpd(x_start, short)
    likelihood.prior_bpd(x_start, short)  # a second warning would be an error here


def call(**change):
    x_start, _, x_t = (value.float() for value in pair())
    given = dict(
        model_output=torch.zeros(SHAPE), x_start=x_start, x_t=x_t, t=TIMES, schedule=SCHEDULE
    )
    return likelihood.vb_terms_bpd(**given | change)


def loop(**change):
    given = dict(model=lambda x, t: x, x_start=torch.zeros(SHAPE), schedule=SCHEDULE, seed=0)
    return likelihood.calc_bpd_loop(**given | change)


ZERO_SNR = SCHEDULE.rescaled_zero_terminal_snr()


@pytest.mark.parametrize(
    ("function", "change", "error", "names"),
    [
        (call, dict(model_output=torch.zeros(4, 3, 6)), ValueError, "model_output"),
        (call, dict(variance="learned"), ValueError, "twice the channels"),
        (call, dict(x_t=torch.zeros(4, 3, 6)), ValueError, "x_t"),
        (call, dict(x_start=torch.zeros(0, 3, 5)), ValueError, "x_start"),
        (call, dict(x_start=torch.zeros(SHAPE, dtype=torch.int64)), TypeError, "x_start"),
        (call, dict(t=30), ValueError, r"t must be in \[0, 30\)"),
        (call, dict(t=torch.tensor([0.0])), TypeError, "t must be"),
        (call, dict(schedule=fd.schedules.flow(10)), TypeError, "schedule"),
        (call, dict(prediction_type="noise"), ValueError, "prediction_type"),
        (call, dict(variance="fixed"), ValueError, "variance"),
        (call, dict(clip=(1.0, -1.0)), ValueError, "clip"),
        (call, dict(floor=0.0), ValueError, "floor"),
        (call, dict(floor="1"), TypeError, "floor must be a real number"),
        (call, dict(schedule=ZERO_SNR), ValueError, "alpha_t is 0"),
        (loop, dict(model=None), TypeError, "model"),
        (loop, dict(model=lambda x, t: x[:, :1]), ValueError, "model_output"),
        (loop, dict(seed=None), ValueError, "seed, noise and generator"),
        (loop, dict(seed=None, noise=torch.zeros(SHAPE)), ValueError, "noise"),
        (loop, dict(batch_t=0), ValueError, "batch_t"),
        (loop, dict(progress=1), TypeError, "progress"),
        (loop, dict(variance=3), ValueError, "variance"),
    ],
)
def test_bad_arguments_are_named(function, change, error, names):
    with pytest.raises(error, match=names):
        function(**change)


def test_elementwise_functions_take_floating_tensors():
    """normal_kl took a number's dtype from an integer tensor beside it: 0.5 became 0."""
    x = torch.zeros(3)
    with pytest.raises(TypeError, match="mean1 must be one of float32"):
        likelihood.normal_kl(x.long(), 0.5, 0.0, 0.0)
    with pytest.raises(TypeError, match="must be a tensor, not all numbers"):
        likelihood.normal_kl(0.0, 0.5, 0.0, 0.0)
    for name in ("x", "means", "log_scales"):
        given = dict(x=x, means=x, log_scales=x)
        with pytest.raises(TypeError, match=f"{name} must be a torch.Tensor, not float"):
            likelihood.discretized_gaussian_log_likelihood(**given | {name: 0.0})
        with pytest.raises(TypeError, match=f"{name} must be one of float32"):
            likelihood.discretized_gaussian_log_likelihood(**given | {name: x.long()})


def test_what_is_undefined_is_refused_before_the_model_runs():
    def model(x, t):
        raise AssertionError("called")

    with pytest.raises(ValueError, match="alpha_t is 0"):
        loop(model=model, schedule=ZERO_SNR)
    still = fd.schedules.NoiseSchedule([0.0, 0.3, 0.999])
    with pytest.raises(ValueError, match=r"betas\[0\] = 0"):
        loop(model=model, schedule=still, variance="fixed_large")
