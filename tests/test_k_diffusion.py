"""The k-diffusion drop-in against the installed k_diffusion.sampling: results, draws, callbacks."""

from __future__ import annotations

import inspect
import math
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiff as fd
from fastdiff.benchmarks import upstream as other_projects
from fastdiff.integrations import k_diffusion as K
from fastdiff.integrations.k_diffusion import driver
from fastdiff.solvers import dpmpp_sigma, edm

upstream = other_projects.k_diffusion()
UP = upstream.sampling

# torchsde, on a query at the rounded end of its interval; upstream's own calls do the same.
pytestmark = pytest.mark.filterwarnings("ignore:Should have:UserWarning")

CHURNED = ("euler", "heun", "dpm_2")
ANCESTRAL = ("euler_ancestral", "dpm_2_ancestral", "dpmpp_2s_ancestral")
BROWNIAN = ("dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde")
LADDERS = (*CHURNED, *ANCESTRAL, *BROWNIAN, "lms", "dpmpp_2m")


def pair(name):
    return getattr(UP, f"sample_{name}"), getattr(K, f"sample_{name}")


def model(x, sigma, shift=0.0):
    """A smooth nonlinear denoiser."""
    s = sigma.view(-1, *[1] * (x.dim() - 1)).to(x.dtype)
    return torch.sin(1.3 * x / (1 + s)) * 0.8 + 0.1 * torch.cos(0.7 * x) + shift


def rms(a, b):
    return float((a.double() - b.double()).square().mean().sqrt())


def start(dtype, shape=(2, 3, 8, 8), sigma=12.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * sigma).to(dtype)


@contextmanager
def draws_without_rounding(monkeypatch):
    """randn_like gives multiples of 1/32 in [-4, 4]: the same numbers in every dtype."""
    generator = torch.Generator().manual_seed(5)

    def randn_like(x, dtype=None, **_):
        z = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        return (z.clamp(-3.9, 3.9) * 32).round().div(32).to(dtype or x.dtype)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn_like", randn_like)
        yield lambda x: lambda sigma, sigma_next: randn_like(x)


@st.composite
def cases(draw):
    name = draw(st.sampled_from(LADDERS))
    # Upstream's 2m_sde and 3m_sde fail on a single step to 0.
    n = draw(st.integers(2 if name.endswith("m_sde") else 1, 9))
    low, high = draw(st.floats(0.01, 0.3)), draw(st.floats(2.0, 80.0))
    ladder = draw(st.sampled_from(("karras", "exponential", "polyexponential", "vp")))
    if ladder == "vp":
        sigmas = K.get_sigmas_vp(n)
    else:
        sigmas = getattr(K, f"get_sigmas_{ladder}")(n, low, high)
    if n > 1 and draw(st.booleans()):
        sigmas = sigmas[:-1]
    options = {}
    if name in CHURNED:
        options["s_churn"] = draw(st.sampled_from((0.0, 1.0, 40.0)))
        options["s_tmin"] = draw(st.sampled_from((0.0, 0.5)))
        options["s_tmax"] = draw(st.sampled_from((math.inf, 10.0)))
        options["s_noise"] = draw(st.sampled_from((1.0, 1.003)))
    elif name in (*ANCESTRAL, *BROWNIAN):
        options["eta"] = draw(st.sampled_from((1.0, 0.0, 0.4)))
        options["s_noise"] = draw(st.sampled_from((1.0, 0.9)))
    if name == "dpmpp_sde":
        options["r"] = draw(st.sampled_from((0.5, 0.3, 1.0)))
    if name == "dpmpp_2m_sde":
        options["solver_type"] = draw(st.sampled_from(("midpoint", "heun")))
    if name == "lms":
        options["order"] = draw(st.integers(1, 6))
    dtype = draw(st.sampled_from((torch.float32, torch.float64, torch.float16, torch.bfloat16)))
    return name, sigmas, options, dtype


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(cases())
def test_results_are_as_close_to_float64_as_upstreams(case):
    name, sigmas, options, dtype = case
    theirs, ours = pair(name)
    # Upstream's sigma_down^2 = sigma_next^2 - sigma_up^2 cancels where a step is long; in float32
    # it is 0 in the end, and other noise is drawn.
    longest = float((sigmas[:-1] / sigmas[1:]).where(sigmas[1:] > 0, 1).max())
    assume(longest < 1000)
    x = start(dtype, sigma=float(sigmas[0]))

    def run(sampler, x, sigmas):
        with draws_without_rounding(pytest.MonkeyPatch()) as noise_sampler:
            more = {"noise_sampler": noise_sampler(x)} if name in BROWNIAN else {}
            return sampler(model, x, sigmas, disable=True, **options, **more)

    plan = driver.compile_script(
        name, driver.read_sigmas(sigmas), driver.network_of(model).denoiser, False,
        tuple(full_options(name, options).items()),
    ).plan  # fmt: skip
    largest = max(1.0, float(np.abs(plan.A).max()))
    truth = run(theirs, x.double(), sigmas.double())
    if dtype == torch.float64:
        got = run(ours, x, sigmas.double())
        bound = 1e-12 * largest * max(1.0, rms(truth, 0 * truth))
        assert rms(got, truth) <= bound * (longest**2 if "eta" in options else 1.0)
        return
    got, expected = run(ours, x, sigmas), run(theirs, x, sigmas)
    assert got.dtype == expected.dtype and got.shape == expected.shape
    bound = 2 * rms(expected, truth)
    if dtype == torch.float32:
        bound += 4 * torch.finfo(dtype).eps * math.sqrt(plan.rows) * largest
    assert rms(got, truth) <= bound


def full_options(name, options):
    """The options as the drop-in hands them to the formula: all of them, in order."""
    defaults = {
        key: parameter.default
        for key, parameter in inspect.signature(getattr(fd.solvers, name)).parameters.items()
        if parameter.kind == parameter.KEYWORD_ONLY and key != "churn_after_model"
    }
    return defaults | options


@pytest.mark.parametrize("name", LADDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_same_manual_seed_gives_upstreams_result(name, dtype):
    """Default noise: same draws at the same moments, unused ones too; the generator ends alike."""
    sigmas = K.get_sigmas_karras(7, 0.05, 12.0)
    options = {"s_churn": 3.0, "s_tmax": 5.0} if name in CHURNED else {}
    results = []
    for sampler in pair(name):
        torch.manual_seed(3)
        x = sampler(model, start(dtype), sigmas, disable=True, **options)
        results.append((x, torch.rand(4)))
    (expected, after), (got, ours_after) = results
    assert torch.equal(after, ours_after)
    assert got.dtype == expected.dtype == (
        dtype if name in ("dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde") else torch.float32
    )  # fmt: skip
    assert rms(got, expected) < (2e-6 if dtype == torch.float32 else 4e-3)


def test_a_models_own_draws_interleave_as_upstream():
    """A model that draws itself (dropout) sees the generator where upstream's would."""

    def noisy(x, sigma):
        return model(x, sigma) + 0.1 * torch.randn(x.shape)

    sigmas = K.get_sigmas_karras(5, 0.05, 12.0)
    for name in (*CHURNED, *ANCESTRAL):
        results = []
        for sampler in pair(name):
            torch.manual_seed(3)
            results.append(sampler(noisy, start(torch.float32), sigmas, disable=True))
        assert rms(*results) < 2e-6, name


@pytest.mark.parametrize("name", LADDERS)
def test_callbacks_and_noise_samplers_get_what_upstream_gives(name):
    sigmas = K.get_sigmas_karras(5, 0.05, 12.0)
    options = {"s_churn": 2.0} if name in CHURNED else {}
    logs = []
    for sampler in pair(name):
        torch.manual_seed(3)
        states, asked, times = [], [], []
        more = {}
        if name in (*ANCESTRAL, *BROWNIAN):

            def noise_sampler(sigma, sigma_next, asked=asked):
                asked.append((sigma, sigma_next))
                return torch.randn(2, 3, 8, 8)

            more["noise_sampler"] = noise_sampler

        def watched(x, sigma, times=times, **kwargs):
            times.append((x.dtype, sigma))
            return model(x, sigma, **kwargs)

        sampler(
            watched, start(torch.float32), sigmas, extra_args={"shift": 0.25},
            callback=states.append, disable=True, **options, **more,
        )  # fmt: skip
        logs.append((states, asked, times))
    (states, asked, times), (ours, ours_asked, ours_times) = logs
    assert len(states) == len(ours) == 5
    for expected, got in zip(states, ours, strict=True):
        assert expected.keys() == got.keys() and expected["i"] == got["i"]
        for key in ("sigma", "sigma_hat"):
            assert torch.equal(expected[key], got[key]) and got[key].dtype == torch.float32
        for key in ("x", "denoised"):
            torch.testing.assert_close(got[key], expected[key], rtol=1e-4, atol=1e-5)
    assert [tuple(map(float, pair)) for pair in asked] == [
        tuple(map(float, pair)) for pair in ours_asked
    ]
    assert all(isinstance(value, torch.Tensor) for pair in ours_asked for value in pair)
    for (dtype, sigma), (our_dtype, our_sigma) in zip(times, ours_times, strict=True):
        assert dtype == our_dtype and sigma.dtype == our_sigma.dtype
        # Upstream's sigma_down^2 = sigma_next^2 - sigma_up^2 cancels in float32.
        torch.testing.assert_close(our_sigma, sigma, rtol=1e-5, atol=0)


def test_brownian_trees_are_upstreams_bit_for_bit():
    x = start(torch.float32)
    for seed in (None, 7, [1, 2]):
        results = []
        for module in (UP, K):
            torch.manual_seed(11)
            sampler = module.BrownianTreeNoiseSampler(x, 0.05, 12.0, seed=seed)
            pairs = [(12.0, 5.0), (5.0, 1.0), (12.0, 1.0), (1.0, 0.05), (0.5, 4.0)]
            results.append(torch.stack([sampler(*pair) for pair in pairs]))
        assert torch.equal(*results)
    with pytest.raises(ValueError, match="seed"):
        K.BrownianTreeNoiseSampler(x, 0.05, 12.0, seed=[1, 2, 3])


@pytest.mark.parametrize("n", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("options", [{}, {"eta": 0.7, "s_noise": 0.9}])
def test_dpm_fast_is_upstreams(n, options):
    theirs, ours = pair("dpm_fast")
    results, states = [], []
    for sampler in (theirs, ours):
        torch.manual_seed(3)
        seen = []
        x = sampler(
            model, start(torch.float32), 0.05, 12.0, n, disable=True, callback=seen.append,
            **options,
        )  # fmt: skip
        results.append((x, torch.rand(2)))
        states.append(seen)
    assert torch.equal(results[0][1], results[1][1])
    # Steps of n = 1, 2 go from 12 to 0.05 at once, where upstream's expm1 loses 3 digits.
    assert rms(results[0][0], results[1][0]) < (2e-5 if n < 3 else 3e-6)
    assert len(states[0]) == len(states[1])
    for expected, got in zip(*states, strict=True):
        assert expected.keys() == got.keys() and expected["i"] == got["i"]
        for key in ("sigma", "sigma_hat", "t", "t_up"):
            assert torch.equal(expected[key], got[key])


@pytest.mark.parametrize(
    "options",
    [
        {}, {"order": 2}, {"rtol": 0.01, "atol": 0.001}, {"eta": 0.5}, {"h_init": 2.0},
        {"order": 2, "pcoeff": 0.2, "dcoeff": 0.1, "eta": 0.5},
    ],
)  # fmt: skip
def test_dpm_adaptive_takes_upstreams_steps(options):
    """In float64 (upstream makes its levels in the default dtype): same decisions, same results."""
    results, states = [], []
    old = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        for sampler in pair("dpm_adaptive"):
            torch.manual_seed(3)
            seen = []
            x, info = sampler(
                model, start(torch.float64), 0.05, 12.0, disable=True, callback=seen.append,
                return_info=True, **options,
            )  # fmt: skip
            results.append((x, info, torch.rand(2)))
            states.append(seen)
    finally:
        torch.set_default_dtype(old)
    (expected, info, after), (got, our_info, our_after) = results
    assert info == our_info and torch.equal(after, our_after)
    assert rms(got, expected) < 1e-12
    for theirs, ours in zip(*states, strict=True):
        assert theirs.keys() == ours.keys()
        for key, value in theirs.items():
            torch.testing.assert_close(
                torch.as_tensor(ours[key]), torch.as_tensor(value), rtol=1e-9, atol=1e-9
            )
    x = K.sample_dpm_adaptive(model, start(torch.float32), 0.05, 12.0, disable=True)
    assert x.dtype == torch.float32
    x16 = K.sample_dpm_adaptive(model, start(torch.float16), 0.05, 12.0, disable=True)
    assert x16.dtype == torch.float16 and rms(x16, x) < 0.01


def test_dpm_adaptive_stops_where_the_error_is_no_number():
    with pytest.raises(RuntimeError, match="not a number"):
        K.sample_dpm_adaptive(
            lambda x, s: x * math.nan, start(torch.float32), 0.05, 12.0, disable=True
        )


class Inner(torch.nn.Module):
    """A network that keeps what it was asked."""

    def __init__(self, channels=3, overwrite=False):
        super().__init__()
        self.alphas_cumprod = torch.tensor(fd.schedules.scaled_linear(1000).alphas_cumprod.copy())
        self.alphas_cumprod = self.alphas_cumprod.float()
        self.channels, self.seen = channels, []
        self.buffer = torch.empty(2, channels, 8, 8) if overwrite else None

    def forward(self, x, t, shift=0.0):
        self.seen.append((x.clone(), t.clone()))
        out = torch.sin(x + 0.001 * t.view(-1, 1, 1, 1)) * 0.9 + shift
        if self.channels == 6:
            out = torch.cat([out, torch.cos(x)], dim=1)
        if self.buffer is not None:
            self.buffer.copy_(out)
            return self.buffer
        return out

    def apply_model(self, x, t, cond=0.0):
        return self(x, t, shift=0.25)


WRAPPERS = {
    "CompVis": lambda inner: upstream.external.CompVisDenoiser(inner),
    "CompVis quantized": lambda inner: upstream.external.CompVisDenoiser(inner, quantize=True),
    "CompVis v": lambda inner: upstream.external.CompVisVDenoiser(inner),
    "OpenAI": lambda inner: upstream.external.OpenAIDenoiser(inner, inner),
    "v": lambda inner: upstream.external.VDenoiser(inner),
    "eps": lambda inner: upstream.external.DiscreteEpsDDPMDenoiser(
        inner, inner.alphas_cumprod, False
    ),
}


@pytest.mark.filterwarnings("ignore:To copy construct:UserWarning")
@pytest.mark.parametrize("kind", WRAPPERS)
@pytest.mark.parametrize(
    "name", ["euler", "heun", "lms", "dpmpp_2m", "dpmpp_2s_ancestral", "dpm_fast", "dpm_adaptive"]
)
def test_wrappers_are_seen_through(kind, name):
    """The inner model sees what upstream shows it, and no pass but the step's own scales it."""
    extra_args = {"cond": 0.0} if kind == "CompVis v" else {}
    results = []
    for sampler in pair(name):
        inner = Inner(6 if kind == "OpenAI" else 3)
        wrapper = WRAPPERS[kind](inner)
        torch.manual_seed(3)
        states = []
        levels = (0.05, 12.0) if "dpm_" in name else (K.get_sigmas_karras(6, 0.05, 12.0),)
        levels += (7,) if name == "dpm_fast" else ()
        x = sampler(
            wrapper, start(torch.float32), *levels, disable=True, callback=states.append,
            extra_args=extra_args,
        )  # fmt: skip
        results.append((x, inner.seen, states))
    (expected, seen, states), (got, our_seen, our_states) = results
    assert driver.network_of(wrapper).wrapped
    assert len(seen) == len(our_seen)
    # Errors of upstream's float32 are multiplied by sigma in epsilon's D = x - sigma eps; adaptive
    # steps carry theirs into the levels.
    loose = 10 if name == "dpm_adaptive" else 1
    for (x, t), (our_x, our_t) in zip(seen, our_seen, strict=True):
        torch.testing.assert_close(our_x, x, rtol=1e-4 * loose, atol=5e-5 * loose)
        torch.testing.assert_close(our_t, t, rtol=1e-4 * loose, atol=1e-3 * loose)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    for theirs, ours in zip(states, our_states, strict=True):
        torch.testing.assert_close(
            ours["denoised"], theirs["denoised"], rtol=1e-4 * loose, atol=5e-4 * loose
        )


def test_changed_wrappers_are_black_boxes():
    class Own(upstream.external.CompVisDenoiser):
        def forward(self, input, sigma, **kwargs):
            return super().forward(input, sigma, **kwargs) * 0.5

    plain = upstream.external.CompVisDenoiser(Inner())
    assert driver.network_of(plain).wrapped
    hooked = upstream.external.CompVisDenoiser(Inner())
    hooked.register_forward_hook(lambda module, args, output: output * 0.5)
    other_data = upstream.external.CompVisDenoiser(Inner())
    other_data.sigma_data = 0.5
    sigmas = K.get_sigmas_karras(5, 0.05, 12.0)
    for wrapper in (Own(Inner()), hooked, other_data):
        assert not driver.network_of(wrapper).wrapped
        expected, got = (
            sampler(wrapper, start(torch.float32), sigmas, disable=True)
            for sampler in pair("dpmpp_2m")
        )
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(TypeError, match="model"):
        K.sample_euler(3, start(torch.float32), sigmas)


@pytest.mark.parametrize("name", [*LADDERS, "dpm_fast", "dpm_adaptive"])
def test_a_reused_output_buffer_changes_nothing(name):
    levels = (0.05, 12.0) if name.startswith("dpm_") and name not in LADDERS else (
        K.get_sigmas_karras(6, 0.05, 12.0),
    )  # fmt: skip
    levels += (7,) if name == "dpm_fast" else ()
    results = []
    for overwrite in (False, True):
        torch.manual_seed(3)
        inner = Inner(overwrite=overwrite)
        results.append(pair(name)[1](inner, start(torch.float32), *levels, disable=True))
    assert torch.equal(*results)


@pytest.mark.parametrize("name", [n for n in LADDERS if n not in ("lms", "dpmpp_2m")])
def test_a_seed_is_the_plans_own_noise(name):
    """seed= gives the builder's plan run with that seed, bit for bit, in any batch split."""
    sigmas = K.get_sigmas_karras(6, 0.05, 12.0)
    options = {"s_churn": 3.0} if name in CHURNED else {}
    sampler = pair(name)[1]
    x = start(torch.float32)
    state = torch.random.get_rng_state()
    got = sampler(model, x, sigmas, disable=True, seed=5, **options)
    assert torch.equal(torch.random.get_rng_state(), state)
    builder = getattr(edm, name, None) or getattr(dpmpp_sigma, name)
    plan = builder(sigmas.double().numpy(), **options)
    expected = fd.sample(lambda x, t: model(x, t), plan, x_T=x, seed=5)
    assert torch.equal(got, expected)
    seeds = torch.tensor([8, 5])
    both = sampler(model, x, sigmas, disable=True, seed=seeds, **options)
    last = sampler(model, x[1:], sigmas, disable=True, seed=seeds[1:], **options)
    assert torch.equal(both[1:], last)
    assert rms(both[:1], got[:1]) > 0.1


def test_a_seeded_dpmpp_sde_has_the_moments_of_brownian_noise():
    """With a constant denoiser the result is linear in the draws: its variance must be that of
    upstream's, whose draws come from one Brownian tree."""
    sigmas = K.get_sigmas_karras(4, 0.5, 8.0)[:-1]
    zeros = torch.zeros(1 << 14, 4)
    kept = {"model": lambda x, sigma: 0.5 * x, "x": zeros, "sigmas": sigmas, "disable": True}
    torch.manual_seed(0)
    theirs = UP.sample_dpmpp_sde(**kept)
    ours = K.sample_dpmpp_sde(**kept, seed=1)
    again = K.sample_dpmpp_sde(**kept, noise_sampler=lambda a, b: torch.randn_like(zeros))
    spread = theirs.std() * 4 / math.sqrt(2 * zeros.numel())
    assert abs(ours.std() - theirs.std()) < spread
    assert abs(ours.mean()) < 5 * ours.std() / math.sqrt(zeros.numel())
    # Independent draws, which noise_sampler allows, are not a Brownian path: the test can tell.
    assert abs(again.std() - theirs.std()) > 3 * spread


def test_one_step_operation_a_call_and_nothing_is_read_back():
    class Count(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    x, calls = start(torch.float32), []

    def counted(x, sigma):
        calls.append(sigma)
        with torch.utils._python_dispatch._disable_current_modes():
            return model(x, sigma)

    sigmas = K.get_sigmas_karras(6, 0.05, 12.0)
    for name in ("euler", "heun", "lms", "dpmpp_2m", "euler_ancestral", "dpmpp_2m_sde"):
        calls.clear()
        seed = {} if name in ("lms", "dpmpp_2m") else {"seed": 1}
        with Count() as count:
            pair(name)[1](counted, x, sigmas, disable=True, **seed)
        assert sum("step" in op for op in count.names) == len(calls)
        assert sum("_local_scalar_dense" in op for op in count.names) == 0
    before = driver.compile_script.cache_info().hits
    K.sample_dpmpp_2m(model, x, sigmas.clone(), disable=True)
    assert driver.compile_script.cache_info().hits == before + 1


def test_ladders_are_upstreams():
    for n in (1, 2, 10):
        for name, arguments in (
            ("karras", (0.03, 14.6)), ("karras", (0.03, 14.6, 3.0)), ("exponential", (0.03, 14.6)),
            ("polyexponential", (0.03, 14.6, 1.5)), ("vp", ()), ("vp", (10.0, 0.2, 1e-2)),
        ):  # fmt: skip
            expected = getattr(UP, f"get_sigmas_{name}")(n, *arguments)
            got = getattr(K, f"get_sigmas_{name}")(n, *arguments)
            assert got.dtype == expected.dtype and float(got[-1]) == 0
            # vp: upstream's exp(..) - 1 cancels in float32.
            torch.testing.assert_close(got, expected, rtol=2e-6, atol=1e-5 if name == "vp" else 0)
    assert torch.equal(K.append_zero(torch.ones(2)), UP.append_zero(torch.ones(2)))


@pytest.mark.parametrize(
    ("name", "arguments", "total"),
    [
        ("heun", (K.get_sigmas_karras(5, 0.05, 12.0),), "5/5"),
        ("dpm_fast", (0.05, 12.0, 8), "8/8"),
        ("dpm_adaptive", (0.05, 12.0), "it ["),
    ],
)  # fmt: skip
def test_progress_is_tqdms(name, arguments, total, capsys):
    for sampler in pair(name):
        sampler(model, start(torch.float32), *arguments, disable=False)
        assert total in capsys.readouterr().err
        sampler(model, start(torch.float32), *arguments, disable=True)
        assert capsys.readouterr().err == ""


def test_signatures_are_upstreams():
    for name in [*LADDERS, "dpm_fast", "dpm_adaptive"]:
        theirs, ours = (inspect.signature(sampler).parameters for sampler in pair(name))
        shared = [key for key in ours if key != "seed"]
        assert shared == list(theirs)
        for key in shared:
            assert ours[key].default == theirs[key].default, (name, key)
    for name in ("karras", "exponential", "polyexponential", "vp"):
        theirs, ours = (
            inspect.signature(getattr(module, f"get_sigmas_{name}")).parameters
            for module in (UP, K)
        )
        assert [(key, p.default) for key, p in theirs.items()] == [
            (key, p.default) for key, p in ours.items()
        ]


def test_inputs_are_left_alone_and_strange_ones_work():
    sigmas = K.get_sigmas_karras(5, 0.05, 12.0)
    x = start(torch.float32).to(memory_format=torch.channels_last)
    kept = x.clone()
    got = K.sample_dpmpp_2m(model, x, sigmas, disable=True)
    assert torch.equal(x, kept)
    contiguous = K.sample_dpmpp_2m(model, x.contiguous(), sigmas, disable=True)
    assert torch.equal(got, contiguous)
    assert K.sample_euler(model, x, sigmas[:1]) is x
    torch.manual_seed(3)
    expected = UP.sample_euler_ancestral(model, x, sigmas, disable=True)
    torch.manual_seed(3)
    got = K.sample_euler_ancestral(model, x, sigmas, disable=True)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    # float64 sigmas widen a float32 sample, a float32 denoiser widens a float16 one, as upstream.
    for name in ("euler", "dpmpp_2m", "heun"):
        for dtype, out, ladder in (
            (torch.float32, torch.float32, torch.float64),
            (torch.float16, torch.float32, torch.float32),
        ):
            expected, got = (
                sampler(
                    lambda x, s, out=out: model(x.to(out), s).to(out), start(dtype),
                    sigmas.to(ladder), disable=True,
                )
                for sampler in pair(name)
            )  # fmt: skip
            assert got.dtype == expected.dtype
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("call", "error", "names"),
    [
        (lambda x, s: K.sample_euler(model, x, [1.0, 0.0]), TypeError, "sigmas"),
        (lambda x, s: K.sample_euler(model, x, s[None]), ValueError, "sigmas"),
        (lambda x, s: K.sample_euler(model, x, s * math.nan), ValueError, "sigmas"),
        (lambda x, s: K.sample_euler(model, x, s.flip(0)), ValueError, "sigmas"),
        (lambda x, s: K.sample_euler(model, x.int(), s), TypeError, "x"),
        (lambda x, s: K.sample_euler(model, x, s, s_churn=-1.0), ValueError, "s_churn"),
        (lambda x, s: K.sample_euler_ancestral(model, x, s, eta=-1), ValueError, "eta"),
        (lambda x, s: K.sample_euler_ancestral(model, x, s[:-1].flip(0)), ValueError, "sigmas"),
        (lambda x, s: K.sample_lms(model, x, s, order=0), ValueError, "order"),
        (lambda x, s: K.sample_dpmpp_sde(model, x, s, r=0.0), ValueError, "r must"),
        (lambda x, s: K.sample_dpmpp_sde(model, x, s, r=2.0, seed=1), ValueError, "r must"),
        (lambda x, s: K.sample_dpmpp_2m_sde(model, x, s, solver_type="a"), ValueError, "solver"),
        (
            lambda x, s: K.sample_euler_ancestral(model, x, s, noise_sampler=len, seed=1),
            ValueError, "seed and noise_sampler",
        ),
        (lambda x, s: K.sample_euler_ancestral(model, x, s, noise_sampler=1), TypeError, "noise"),
        (
            lambda x, s: K.sample_dpmpp_2s_ancestral(model, x, s, noise_sampler=lambda a, b: 0.0),
            TypeError, "noise_sampler must return",
        ),
        (
            lambda x, s: K.sample_dpmpp_2m_sde(model, x, s, noise_sampler=lambda a, b: x[:1]),
            ValueError, "noise_sampler must return",
        ),
        (lambda x, s: K.sample_dpm_fast(model, x, 0.0, 1.0, 5), ValueError, "sigma_min"),
        (lambda x, s: K.sample_dpm_fast(model, x, 0.1, 1.0, 0), ValueError, "n must"),
        (lambda x, s: K.sample_dpm_adaptive(model, x, 0.0, 1.0), ValueError, "sigma_min"),
        (lambda x, s: K.sample_dpm_adaptive(model, x, 0.1, 1.0, order=4), ValueError, "order"),
        (lambda x, s: K.sample_dpm_adaptive(model, x, 1.0, 0.1, eta=1.0), ValueError, "eta"),
        (lambda x, s: K.sample_dpm_adaptive(lambda x, s: x[:1], x, 0.1, 1.0), ValueError, "model"),
        (lambda x, s: K.sample_dpm_adaptive(model, x, 0.1, 1.0, seed=-1), ValueError, "seed"),
        (lambda x, s: K.sample_euler(lambda x, s: x[:1], x, s), ValueError, "model must return"),
        (lambda x, s: K.sample_euler(lambda x, s: 0.0, x, s), TypeError, "model must return"),
        (lambda x, s: K.sample_euler(model, x, s, seed=-1), ValueError, "seed"),
        (lambda x, s: K.sample_euler(model, x, s, s_tmin=math.nan), ValueError, "s_tmin"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(call, error, names):
    with pytest.raises(error, match=names):
        call(start(torch.float32), K.get_sigmas_karras(4, 0.05, 12.0))
