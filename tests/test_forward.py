"""q_sample, q_step, q_chain and the posterior against the papers' formulas in NumPy float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastdiff as fd

T = 50
SCHEDULE = fd.schedules.linear(T, 1e-3, 0.2)
SHORT = fd.schedules.linear(12, 1e-3, 0.2)  # for chains, slow in Triton's interpreter
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGER = {
    torch.float32: torch.int32, torch.float64: torch.int64,
    torch.bfloat16: torch.int16, torch.float16: torch.int16,
}  # fmt: skip
EPS = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float64: 2**-53}


class Paper:
    """Ho et al. 2020, section 2, written out again: betas to every quantity, float64."""

    beta = np.linspace(1e-3, 0.2, T)
    alpha = 1 - beta
    abar = np.cumprod(alpha)
    abar_prev = np.concatenate([[1.0], abar[:-1]])

    @classmethod
    def q_sample(cls, x0, t, z):
        return np.sqrt(cls.abar[t]) * x0 + np.sqrt(1 - cls.abar[t]) * z

    @classmethod
    def posterior(cls, x0, xt, t):
        mean = (
            np.sqrt(cls.abar_prev[t]) * cls.beta[t] / (1 - cls.abar[t]) * x0
            + np.sqrt(cls.alpha[t]) * (1 - cls.abar_prev[t]) / (1 - cls.abar[t]) * xt
        )
        return mean, cls.beta[t] * (1 - cls.abar_prev[t]) / (1 - cls.abar[t])


def data(shape, dtype=torch.float32, seed=0):
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def column(values, x):
    return np.asarray(values).reshape(-1, *[1] * (x.dim() - 1))


def assert_rounded(actual, expected, dtype, terms):
    """One rounding of the result to the dtype, and the roundings of the math (terms below 4)."""
    math_eps = EPS[torch.float64] if dtype == torch.float64 else EPS[torch.float32]
    bound = (
        np.abs(expected) * EPS[dtype]
        + 2.0**-25 * (dtype == torch.float16)
        + 4 * (2 * terms + 2) * math_eps
    )
    assert (np.abs(actual.double().numpy() - expected) <= bound).all()


def skip_float64(name, dtype):
    if dtype == torch.float64 and fd.backends.probe(name, torch.device("cpu"), dtype):
        pytest.skip("no float64 on this backend")


@pytest.mark.parametrize("dtype", DTYPES)
def test_q_sample_is_the_papers_formula(backend, dtype):
    skip_float64(backend, dtype)
    x, z, t = data((5, 3, 7), dtype), data((5, 3, 7), dtype, 1), torch.tensor([0, 1, 20, 48, 49])
    x_t, noise, v = fd.q_sample(x, t, SCHEDULE, noise=z, return_noise=True, target="v")
    tt = column(t, x).astype(int)
    x64, z64 = x.double().numpy(), z.double().numpy()
    assert_rounded(x_t, Paper.q_sample(x64, tt, z64), dtype, 2)
    assert torch.equal(noise, z)
    expected = np.sqrt(Paper.abar[tt]) * z64 - np.sqrt(1 - Paper.abar[tt]) * x64
    assert_rounded(v, expected, dtype, 2)


@pytest.mark.parametrize("target", ["epsilon", "sample", "v", "flow"])
def test_targets(backend, target):
    x, z = data((3, 10)), data((3, 10), seed=1)
    t = torch.tensor([0, 9, 49])
    result = fd.q_sample(x, t, SCHEDULE, noise=z, target=target)[1]
    a, s = (torch.from_numpy(np.array(v))[t][:, None].float() for v in
            (SCHEDULE.alpha_t, SCHEDULE.sigma_t))  # fmt: skip
    expected = {"epsilon": z, "sample": x, "v": -s * x + a * z, "flow": -x + z}[target]
    assert torch.equal(result, expected)


@pytest.mark.parametrize("schedule", [
    fd.schedules.flow(20, shift=3.0), fd.schedules.ve(np.geomspace(0.01, 50, 20)),
    fd.schedules.cosine(20).rescaled_zero_terminal_snr(),
])  # fmt: skip
def test_other_paths_use_their_own_scales(backend, schedule):
    x, z = data((20, 6)), data((20, 6), seed=1)
    x_t = fd.q_sample(x, torch.arange(20), schedule, noise=z).double().numpy()
    expected = schedule.alpha_t[:, None] * x.double().numpy() \
        + schedule.sigma_t[:, None] * z.double().numpy()  # fmt: skip
    np.testing.assert_allclose(x_t, expected, rtol=3e-7, atol=3e-7)
    if schedule.alpha_t[-1] == 0:
        assert torch.equal(torch.tensor(x_t[-1]).float(), z[-1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_posterior_is_the_papers_formula(backend, dtype):
    skip_float64(backend, dtype)
    x0, xt = data((4, 9), dtype), data((4, 9), dtype, 1)
    t = torch.tensor([0, 1, 25, 49])
    mean, variance, log_variance = fd.q_posterior_mean_variance(x0, xt, t, SCHEDULE)
    tt = t.numpy()[:, None]
    expected, var = Paper.posterior(x0.double().numpy(), xt.double().numpy(), tt)
    assert_rounded(mean, expected, dtype, 2)
    assert variance.shape == mean.shape and variance.stride()[1:] == (0,)
    got = variance.double().numpy()
    np.testing.assert_allclose(got, np.broadcast_to(var, got.shape), rtol=2 * EPS[dtype] + 1e-13)
    clipped = np.log(np.where(tt == 0, Paper.posterior(0, 0, 1)[1], var))
    np.testing.assert_allclose(
        log_variance.double().numpy(),
        np.broadcast_to(clipped, got.shape),
        rtol=2 * EPS[dtype] + 1e-13,
    )


def test_posterior_is_bayes_rule():
    """Product of the Gaussians q(x_t | x_{t-1}) and q(x_{t-1} | x_0), by precision."""
    rng = np.random.default_rng(0)
    for t in (1, 7, 30, 49):
        x0, xt = rng.normal(size=2)
        beta = float(SCHEDULE.betas[t])
        prior_mean, prior_var = math.sqrt(Paper.abar_prev[t]) * x0, 1 - Paper.abar_prev[t]
        precision = 1 / prior_var + (1 - beta) / beta
        expected = (prior_mean / prior_var + math.sqrt(1 - beta) * xt / beta) / precision
        mean, variance, _ = fd.q_posterior_mean_variance(
            torch.tensor([[x0]]), torch.tensor([[xt]]), t, SCHEDULE
        )
        assert mean.item() == pytest.approx(expected, rel=1e-12)
        assert variance.item() == pytest.approx(1 / precision, rel=1e-12)


def test_q_mean_variance(backend):
    x, t = data((3, 4)), torch.tensor([0, 10, 49])
    mean, variance, log_variance = fd.q_mean_variance(x, t, SCHEDULE)
    abar = Paper.abar[t.numpy()][:, None]
    np.testing.assert_allclose(mean.numpy(), np.sqrt(abar) * x.numpy(), rtol=3e-7)
    np.testing.assert_allclose(variance.numpy(), np.broadcast_to(1 - abar, (3, 4)), rtol=3e-7)
    np.testing.assert_allclose(log_variance.numpy(), np.broadcast_to(np.log(1 - abar), (3, 4)),
                               rtol=1e-6)  # fmt: skip


def test_the_chain_is_its_steps(backend, assert_same_bits):
    x = data((3, 2, 5))
    chain = fd.q_chain(x, SHORT, seed=9, sample_offset=2)
    assert chain.shape == (12, 3, 2, 5)
    for t in range(12):
        x = fd.q_step(x, t, SHORT, seed=9, sample_offset=2)
        assert_same_bits(chain[t], x)


def test_the_chain_in_low_precision_is_its_steps(backend, assert_same_bits):
    for dtype in (torch.bfloat16, torch.float16):
        x = data((2, 33), dtype)
        chain = fd.q_chain(x, SHORT, seed=9, at=[0, 3, 9])
        for t in range(10):
            x = fd.q_step(x, t, SHORT, seed=9)
            if t in (0, 3, 9):
                assert_same_bits(chain[[0, 3, 9].index(t)], x)


def test_the_chain_is_the_papers_recursion(backend):
    x, z = data((2, 6)), data((T, 2, 6), seed=3)
    chain = fd.q_chain(x, SCHEDULE, noise=z).double().numpy()
    state = x.double().numpy()
    for t in range(T):
        state = np.sqrt(1 - Paper.beta[t]) * state + np.sqrt(Paper.beta[t]) * z[t].double().numpy()
        np.testing.assert_allclose(chain[t], state, atol=3e-6)


def test_the_chain_has_the_closed_forms_distribution():
    """Mean and covariance of x_t over 2^16 chains are those of q(x_t | x_0)."""
    x = torch.full((1 << 16, 1), 1.5)
    for t, x_t in zip((0, 9, 49), fd.q_chain(x, SCHEDULE, seed=1, at=[0, 9, 49]), strict=True):
        mean, var = 1.5 * math.sqrt(Paper.abar[t]), 1 - Paper.abar[t]
        error = math.sqrt(var / x.shape[0])
        assert abs(x_t.mean().item() - mean) < 5 * error
        assert abs(x_t.var().item() - var) < 5 * var * math.sqrt(2 / x.shape[0])


def test_the_end_of_the_chain_is_the_prior():
    """x_T is N(0, I): its KL to the prior is the schedule's, and the moments agree."""
    schedule = fd.schedules.linear(1000)
    x = torch.full((1, 1 << 16), 0.7)
    x_T = fd.q_sample(x, 999, schedule, seed=5).double()
    assert abs(x_T.mean()) < 5 / 2**8 + 0.7 * schedule.alpha_t[-1]
    assert abs(x_T.var() - 1) < 5 * math.sqrt(2) / 2**8
    kl = schedule.prior_kl(0.7**2)
    a2, s2 = schedule.alphas_cumprod[-1], 1 - schedule.alphas_cumprod[-1]
    assert kl[-1] == pytest.approx(0.5 * (s2 + a2 * 0.49 - 1 - math.log(s2)), rel=1e-6)
    assert kl[-1] < 2e-5 and (np.diff(kl) < 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 3, 63, 1000])
def test_backends_agree_on_seeded_noise(accelerated, assert_same_bits, dtype, n):
    skip_float64(accelerated, dtype)
    x, t = data((4, n), dtype), torch.tensor([0, 3, 30, 49])

    def run(backend):
        return fd.q_sample(
            x, t, SCHEDULE, seed=3, step=8, sample_offset=6, return_noise=True, target="v",
            backend=backend,
        )  # fmt: skip

    assert_same_bits(run(accelerated), run("reference"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_seeded_noise_is_randn_of_that_seed(backend, assert_same_bits, dtype):
    skip_float64(backend, dtype)
    x = data((3, 41), dtype)
    z = fd.randn((3, 41), 12, sample_offset=4, step=6, stream=2, dtype=dtype)
    fused = fd.q_sample(x, 7, SCHEDULE, seed=12, sample_offset=4, step=6)
    assert_same_bits(fused, fd.q_sample(x, 7, SCHEDULE, noise=z))
    z = fd.randn((3, 41), 12, step=7, stream=4, dtype=dtype)
    assert_same_bits(fd.q_step(x, 7, SCHEDULE, seed=12), fd.q_step(x, 7, SCHEDULE, noise=z))


def test_a_generator_draws_as_torch_randn_does(backend):
    x = data((2, 5))
    drawn = fd.q_sample(x, 3, SCHEDULE, generator=torch.Generator().manual_seed(8))
    z = torch.randn((2, 5), generator=torch.Generator().manual_seed(8))
    assert torch.equal(drawn, fd.q_sample(x, 3, SCHEDULE, noise=z))


def test_the_chain_takes_a_generator(backend):
    x = data((2, 5))
    drawn = fd.q_chain(x, SCHEDULE, generator=torch.Generator().manual_seed(8), at=[0, 9])
    z = torch.randn((T, 2, 5), generator=torch.Generator().manual_seed(8))
    assert torch.equal(drawn, fd.q_chain(x, SCHEDULE, noise=z, at=[0, 9]))


def test_a_refused_call_does_not_move_the_generator():
    generator = torch.Generator().manual_seed(8)
    before = generator.get_state()
    with pytest.raises(fd.BackendError):
        fd.q_sample(data((2, 5), torch.float64), 3, SCHEDULE, generator=generator, backend="triton")
    assert torch.equal(generator.get_state(), before)


def test_layouts_keep_the_bits(backend, assert_same_bits):
    x = data((2, 3, 4, 5))
    expected = fd.q_sample(x, 5, SCHEDULE, seed=1)
    last = x.to(memory_format=torch.channels_last)
    result = fd.q_sample(last, 5, SCHEDULE, seed=1)
    assert result.stride() == last.stride()
    assert_same_bits(result, expected)
    strided = torch.zeros(2, 3, 4, 10)
    strided[..., ::2] = x
    assert_same_bits(fd.q_sample(strided[..., ::2], 5, SCHEDULE, seed=1), expected)
    flat = torch.zeros(x.numel() + 3)
    for offset in (1, 2, 3):
        view = flat[offset : offset + x.numel()].view(x.shape)
        view.copy_(x)
        assert_same_bits(fd.q_sample(view, 5, SCHEDULE, seed=1), expected)


def test_out_is_written_whole_and_alone(backend, assert_same_bits):
    x = data((2, 3, 37))
    expected = fd.q_sample(x, 5, SCHEDULE, seed=1)
    room = torch.full((x.numel() + 10,), torch.nan)
    out = room[5:-5].view(x.shape)
    assert fd.q_sample(x, 5, SCHEDULE, seed=1, out=out) is out
    assert_same_bits(out, expected)
    assert torch.isnan(room[:5]).all() and torch.isnan(room[-5:]).all()
    last = torch.full((2, 3, 1, 37), torch.nan).to(memory_format=torch.channels_last)
    fd.q_sample(x.view(2, 3, 1, 37), 5, SCHEDULE, seed=1, out=last)
    assert_same_bits(last.reshape(x.shape), expected)
    fd.q_sample(x, 5, SCHEDULE, seed=1, out=x)
    assert_same_bits(x, expected)


def test_nan_stays_in_its_element(backend):
    x = data((2, 9))
    x[1, 4] = torch.nan
    x_t = fd.q_sample(x, 5, SCHEDULE, seed=1)
    assert torch.isnan(x_t).nonzero().tolist() == [[1, 4]]


def test_a_column_with_coefficient_zero_is_not_read(backend):
    """At zero terminal SNR x_T is the noise whatever x_0 is."""
    schedule = fd.schedules.linear(10).rescaled_zero_terminal_snr()
    x = torch.full((2, 8), torch.nan)
    x_t = fd.q_sample(x, torch.tensor([9, 9]), schedule, seed=1)
    assert torch.equal(x_t, fd.randn((2, 8), 1, stream=2))


def test_out_of_range_t_gives_nan_where_it_cannot_be_read(backend):
    """What a kernel does with a t on a device: here through the operation itself."""
    from fastdiff.ops import tables
    from fastdiff.ops.call import call_step
    from fastdiff.ops.step import StepSpec

    x = data((3, 6))
    table = tables.uploaded(SCHEDULE, "x_t", x.device, torch.float32)
    spec = StepSpec(states=1, outputs=(9,), draws=1)
    rows = torch.tensor([T, 3, -1])
    (x_t,) = call_step([x], spec, table, rows, counter=(1, 0, 0, 2))
    assert torch.isnan(x_t[[0, 2]]).all()
    assert torch.equal(x_t[1:2], fd.q_sample(x[1:2], 3, SCHEDULE, seed=1, sample_offset=1))


def test_t_on_any_stride(backend, assert_same_bits):
    """An expanded t, a strided one and one of another integer dtype are what they say."""
    x = data((6, 9))
    for t in (
        torch.tensor([7]).expand(6), torch.arange(12)[::2], torch.arange(6, dtype=torch.int32),
        torch.arange(6).view(2, 3).t().flatten(),
    ):  # fmt: skip
        same = torch.tensor(t.tolist())
        assert_same_bits(
            fd.q_sample(x, t, SCHEDULE, seed=1), fd.q_sample(x, same, SCHEDULE, seed=1)
        )
    for t in (7, np.int64(7), np.uint8(7)):
        assert_same_bits(
            fd.q_sample(x, t, SCHEDULE, seed=np.int64(1)),
            fd.q_sample(x, torch.full((6,), 7), SCHEDULE, seed=1),
        )


def test_the_runs_own_t_can_be_used_for_inpainting(assert_same_bits):
    run = fd.Sampler(fd.solvers.ddpm(SCHEDULE)).start(shape=(3, 5), seed=0)
    x = data((3, 5))
    expected = fd.q_sample(x, torch.full((3,), T - 1), SCHEDULE, seed=1)
    assert_same_bits(fd.q_sample(x, run.t, SCHEDULE, seed=1), expected)


def test_more_than_2_to_31_elements_have_the_right_shape_and_dtype():
    x = torch.empty((3, 1 << 30), device="meta", dtype=torch.bfloat16)
    assert fd.q_sample(x, 5, SCHEDULE, seed=0, backend="reference").shape == x.shape


@pytest.mark.slow
def test_more_than_2_to_31_elements_are_right(assert_same_bits):
    """The tail of a 2^31 + 2^20 element sample equals the same elements made alone."""
    n = (1 << 31) + (1 << 20)
    x = torch.zeros((1, n), dtype=torch.bfloat16)
    fd.q_sample(x, 49, SCHEDULE, seed=3, out=x)
    tail = torch.empty((1, 1 << 20), dtype=torch.bfloat16)
    fd.backends.operation("randn", tail.device, torch.float32)(
        tail, None, 3, 0, 0, 2, (1 << 31) // 4, False
    )
    expected = fd.q_sample(torch.zeros_like(tail), 49, SCHEDULE, noise=tail)
    assert_same_bits(x[:, 1 << 31 :], expected)


# Refusals.

X = torch.zeros(4, 3)
GOOD = dict(x_start=X, t=torch.tensor([0, 1, 2, 3]), schedule=SCHEDULE, seed=0)


@pytest.mark.parametrize(
    ("change", "error", "names"),
    [
        (dict(x_start=[1.0]), TypeError, "x_start"),
        (dict(x_start=torch.zeros(4, 3, dtype=torch.int32)), TypeError, "x_start"),
        (dict(x_start=torch.tensor(1.0)), ValueError, "x_start"),
        (dict(x_start=torch.zeros(0, 3)), ValueError, "x_start"),
        (dict(x_start=torch.zeros(4, 3).to_sparse()), ValueError, "x_start"),
        (dict(t=torch.tensor([0, 1, 2])), ValueError, "t must"),
        (dict(t=torch.tensor([0.0, 1.0, 2.0, 3.0])), TypeError, "t must"),
        (dict(t=torch.tensor([0, 1, 2, T])), ValueError, "t must"),
        (dict(t=torch.tensor([0, -1, 2, 3])), ValueError, "t must"),
        (dict(t=T), ValueError, "t must"),
        (dict(t=-1), ValueError, "t must"),
        (dict(t="5"), TypeError, "t must"),
        (dict(t=True), TypeError, "t must"),
        (dict(schedule=np.linspace(0, 1, 10)), TypeError, "schedule"),
        (dict(seed=None), ValueError, "seed, noise and generator"),
        (dict(noise=X), ValueError, "seed, noise and generator"),
        (dict(seed=None, noise=torch.zeros(4, 4)), ValueError, "noise"),
        (dict(seed=None, noise=torch.zeros(4, 3, dtype=torch.float64)), TypeError, "noise"),
        (dict(seed=None, noise=torch.zeros(4, 3, dtype=torch.int64)), TypeError, "noise"),
        (dict(seed=None, noise=torch.zeros(4, 3, device="meta")), ValueError, "noise"),
        (dict(seed=None, generator=1), TypeError, "generator"),
        (dict(step=-1), ValueError, "step"),
        (dict(sample_offset="1"), TypeError, "sample_offset"),
        (dict(target="noise"), ValueError, "target"),
        (dict(out=torch.zeros(4, 2)), ValueError, "out"),
        (dict(out=torch.zeros(4, 3, dtype=torch.bfloat16)), TypeError, "out"),
        (dict(out=torch.zeros(1, 3).expand(4, 3)), ValueError, "out"),
        (dict(backend="gpu"), ValueError, "backend"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named_and_nothing_is_written(change, error, names):
    out = torch.full((4, 3), 7.0)
    with pytest.raises(error, match=names):
        fd.q_sample(**(GOOD | {"out": out} | change))
    assert (out == 7).all()


def test_out_may_not_overlap_an_input_in_part():
    room = torch.zeros(20)
    with pytest.raises(ValueError, match="out overlaps"):
        fd.q_sample(room[:12].view(4, 3), 0, SCHEDULE, seed=0, out=room[2:14].view(4, 3))


@pytest.mark.parametrize("at", [[], [3, 1], [1, 1], [T], [-1], [1.5]])
def test_chain_indices_are_checked(at):
    with pytest.raises((ValueError, TypeError), match="at must"):
        fd.q_chain(X, SCHEDULE, seed=0, at=at)


@pytest.mark.parametrize("name", ["x_start", "noise"])
def test_the_chain_refuses_gradients(name):
    arguments = {"x_start": torch.zeros(2, 3), "noise": torch.zeros(T, 2, 3)}
    arguments[name].requires_grad_()
    with pytest.raises(ValueError, match=f"{name} requires grad"):
        fd.q_chain(schedule=SCHEDULE, **arguments)


def test_posterior_needs_a_chain():
    with pytest.raises(TypeError, match="schedule must be a NoiseSchedule"):
        fd.q_posterior_mean_variance(X, X, 0, fd.schedules.flow(10))


@settings(deadline=None, max_examples=80)
@given(data_=st.data())
def test_any_shape_dtype_and_layout(data_):
    """Native and reference agree as integers on whatever a user may hand over."""
    dims = data_.draw(st.lists(st.integers(1, 7), min_size=1, max_size=5))
    dtype = data_.draw(st.sampled_from(DTYPES))
    x = data(dims, dtype, data_.draw(st.integers(0, 9)))
    if data_.draw(st.booleans()):
        order = data_.draw(st.permutations(range(1, x.dim())))
        x = x.permute(0, *order)
    if x.dim() > 1 and data_.draw(st.booleans()):
        x = x[..., :: data_.draw(st.integers(1, 3))]
    batch = x.shape[0]
    t = data_.draw(st.one_of(
        st.integers(0, T - 1),
        st.lists(st.integers(0, T - 1), min_size=batch, max_size=batch).map(torch.tensor),
    ))  # fmt: skip
    options = {"seed": data_.draw(st.integers(0, (1 << 64) - 1)),
               "target": data_.draw(st.sampled_from([None, "epsilon", "sample", "v", "flow"])),
               "return_noise": data_.draw(st.booleans())}  # fmt: skip
    native = fd.q_sample(x, t, SCHEDULE, backend="native", **options)
    reference = fd.q_sample(x, t, SCHEDULE, backend="reference", **options)
    if isinstance(native, torch.Tensor):
        native, reference = (native,), (reference,)
    for a, b in zip(native, reference, strict=True):
        assert a.dtype == dtype and a.shape == x.shape
        assert torch.equal(a.view(INTEGER[dtype]), b.view(INTEGER[dtype]))
