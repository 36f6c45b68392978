"""Tracing whole functions: k-diffusion's replayed against their own code, and its noise."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastdiff as fd
from fastdiff.benchmarks import upstream as other_projects
from tests.conftest import load_helper

runs = load_helper("scheduler_runs")
K = other_projects.k_diffusion().sampling
SHAPE, draws, randn, relative = runs.SHAPE, runs.draws, runs.randn, runs.relative

BROWNIAN = ("dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde")
FUNCTIONS = {  # history tensors beside x at their most
    "euler": 0, "euler_ancestral": 0, "heun": 1, "dpm_2": 1, "dpm_2_ancestral": 1, "lms": 3,
    "dpmpp_2s_ancestral": 1, "dpmpp_sde": 1, "dpmpp_2m": 1, "dpmpp_2m_sde": 1, "dpmpp_3m_sde": 2,
}  # fmt: skip


def denoiser(x, sigma):
    s = torch.as_tensor(sigma).reshape(-1)[0].double()
    return torch.tanh(x / (1 + s)) * 0.8 + 0.1 * torch.sin(0.7 * x.roll(1, -1)) + 0.05 * s


class Path:
    """A Brownian motion from high to low times, drawn where it is asked for: as noise_sampler."""

    def __init__(self, draw):
        self.draw, self.value = draw, {}

    def __call__(self, begin, end):
        begin, end = float(begin), float(end)
        if not self.value:
            self.value[begin] = torch.zeros(SHAPE, dtype=torch.float64)
        lowest = min(self.value)
        if end < lowest:
            self.value[end] = self.value[lowest] + math.sqrt(lowest - end) * self.draw()
        return (self.value[end] - self.value[begin]) / math.sqrt(begin - end)


def replay_function(name, sigmas, **options):
    """(plan, its result, upstream's) on the same noise."""
    function = getattr(K, f"sample_{name}")
    plan = fd.trace(function, sigmas=sigmas, **options)
    x_T = randn(*SHAPE) * float(sigmas[0])
    noise = draws()
    if name in BROWNIAN:
        options = {**options, "noise_sampler": Path(lambda: next(noise))}
    with runs.Fed(lambda: next(noise)):
        expected = function(denoiser, x_T, sigmas, disable=True, **options)
    left = draws()
    # These draw before the first model call, needed or not.
    first = next(left) if name in ("euler", "heun", "dpm_2") else None
    run = fd.Sampler(plan, backend="reference").start(
        x_T, noise=lambda row, k: first if row < 0 else next(left)
    )
    while not run.done:
        run.step(denoiser(run.model_input, run.t))
    return plan, run.x, expected


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_sampling_function_equals_upstreams_own(name):
    sigmas = K.get_sigmas_karras(12, 0.03, 14.6).double()
    plan, actual, expected = replay_function(name, sigmas)
    assert relative(actual, expected) <= 1e-13
    assert plan.states - 1 == FUNCTIONS[name]
    assert plan.initial_scale == float(sigmas[0])
    twice = ("heun", "dpm_2", "dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde")
    assert plan.rows == (23 if name in twice else 12)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_ladder_and_options_of_a_sampling_function_are_replayed(data):
    name = data.draw(st.sampled_from(sorted(FUNCTIONS)))
    n = data.draw(st.integers(2, 10))
    sigmas = K.get_sigmas_karras(n, data.draw(st.floats(0.01, 0.3)), data.draw(st.floats(2, 80)))
    sigmas = sigmas.double()
    if data.draw(st.booleans()):
        sigmas = sigmas[:-1]
    offered = dict(
        eta=st.sampled_from([0.0, 0.6, 1.0]), s_noise=st.sampled_from([0.9, 1.0]),
        s_churn=st.sampled_from([0.0, 3.0, 40.0]), s_tmax=st.sampled_from([5.0, math.inf]),
        s_tmin=st.sampled_from([0.0, 0.5]), order=st.integers(1, 4),
        solver_type=st.sampled_from(["midpoint", "heun"]), r=st.sampled_from([0.3, 0.5]),
    )  # fmt: skip
    function = getattr(K, f"sample_{name}")
    parameters = function.__wrapped__.__code__.co_varnames
    options = {
        key: data.draw(values) for key, values in offered.items()
        if key in parameters[: function.__wrapped__.__code__.co_argcount]
    }  # fmt: skip
    if len(sigmas) < 2:
        return
    _, actual, expected = replay_function(name, sigmas, **options)
    # A step over a ratio r of noise levels leaves 1 - (1 - 1 / r) of its sample: r digits cancel.
    ratio = max([float(a / b) for a, b in itertools.pairwise(sigmas) if b > 0], default=1.0)
    assert relative(actual, expected) <= 1e-12 + 1e-15 * ratio


def test_a_repeated_noise_level_of_an_ancestral_function_is_replayed():
    sigmas = torch.tensor([10.0, 4.0, 4.0, 1.0, 0.0], dtype=torch.float64)
    for name in ("euler_ancestral", "dpm_2_ancestral"):
        _, actual, expected = replay_function(name, sigmas)
        assert relative(actual, expected) <= 1e-13


@settings(max_examples=60, deadline=None)
@given(
    queries=st.lists(
        st.tuples(st.integers(0, 12), st.integers(0, 12)).filter(lambda q: q[0] != q[1]),
        min_size=1, max_size=8,
    )
)  # fmt: skip
def test_increments_have_the_covariance_of_brownian_motion(queries):
    recorder = fd.tracing.Recorder("queries", open_loop=False)
    x = recorder.begin()
    vectors = []
    for begin, end in queries:
        recorder.call(x, t=0.0)
        vectors.append(recorder.brownian(begin**2 / 7, end**2 / 7).terms)
    assert max(len(row.draws) for row in recorder.rows) <= 3
    for (a, b), u in zip(queries, vectors, strict=True):
        for (c, d), v in zip(queries, vectors, strict=True):
            a_, b_, c_, d_ = (k**2 / 7 for k in (a, b, c, d))
            overlap = max(0.0, min(max(a_, b_), max(c_, d_)) - max(min(a_, b_), min(c_, d_)))
            sign = 1.0 if (b > a) == (d > c) else -1.0
            expected = sign * overlap / math.sqrt(abs(b_ - a_) * abs(d_ - c_))
            actual = sum(value * v.get(key, 0.0) for key, value in u.items())
            assert actual == pytest.approx(expected, abs=1e-14)


def test_the_two_draws_of_a_dpmpp_sde_step_overlap():
    sigmas = torch.tensor([10.0, 5.0, 2.0, 0.0], dtype=torch.float64)
    asked = []
    recorders = []

    def sampler(begin, end):
        if not recorders:
            recorders.append(fd.tracing.Recorder("noise", open_loop=False))
            recorders[0].call(recorders[0].begin(), t=0.0)
        asked.append((float(begin), float(end)))
        z = recorders[0].brownian(float(begin), float(end))
        assert z is not None
        return torch.zeros(SHAPE, dtype=torch.float64)

    K.sample_dpmpp_sde(denoiser, randn(*SHAPE), sigmas, disable=True, noise_sampler=sampler)
    first, second = asked[:2]
    middle = math.sqrt(10.0 * 5.0)
    assert first == pytest.approx((10.0, middle)) and second == pytest.approx((10.0, 5.0))
    recorder = recorders[0]
    u, v = (recorder.brownian(*query).terms for query in (first, second))
    covariance = sum(value * v.get(key, 0.0) for key, value in u.items())
    assert covariance == pytest.approx(math.sqrt((10 - middle) / 5), rel=1e-14)
    # One new draw a query: the plan draws as often as upstream asks.
    plan = fd.trace(K.sample_dpmpp_sde, sigmas=sigmas)
    assert plan.draws_noise.sum(axis=1).tolist() == [1, 1, 1, 1, 0]


def test_a_generator_makes_the_draws_of_churn_that_begins_late():
    """sample_euler draws before every call, used or not: so does its plan, the first included."""
    sigmas = torch.tensor([10.0, 4.0, 1.5, 0.5, 0.0])
    plan = fd.trace(K.sample_euler, sigmas=sigmas, s_churn=2.0, s_tmax=5.0)
    assert plan.first_drawn and plan.first_churn == 0.0
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1)) * 10.0
    generator = torch.Generator().manual_seed(7)
    got = fd.sample(lambda x, t: 0.5 * x, plan, x_T=x, generator=generator)
    torch.manual_seed(7)
    expected = K.sample_euler(
        lambda x, sigma: 0.5 * x, x, sigmas, s_churn=2.0, s_tmax=5.0, disable=True
    )
    assert relative(got, expected) < 1e-6
