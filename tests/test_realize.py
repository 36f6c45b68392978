"""Realization: random samplers against direct evaluation, and the least history."""

from __future__ import annotations

import importlib

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import fastdiff as fd
from fastdiff.benchmarks import upstream as other_projects
from fastdiff.ops.exp import exp
from fastdiff.ops.quantile import threshold_of
from fastdiff.tracing import NotAffineError, Recorder
from tests.conftest import load_helper

upstream = load_helper("diffusers_float64")
runs = load_helper("scheduler_runs")
pytestmark = runs.UPSTREAM_WARNINGS

SHAPE = (2, 2, 3, 3)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def model(x, t, channels=1):
    """Any smooth nonlinear function of (x, t)."""
    out = torch.tanh(0.7 * x + 0.3 * torch.sin(2.0 * x.roll(1, -1)) + 0.1 * t)
    return torch.cat([out, torch.cos(x + t)], 1) if channels == 2 else out


class Sampler:
    """A random linear time-varying sampler: numbers decided by a seed, run on any of the three
    kinds of images below."""

    def __init__(self, seed, calls, *, memory, draws, clamp, learned, churn, inputs):
        self.seed, self.calls, self.memory, self.draws = seed, calls, memory, draws
        self.clamp, self.learned, self.churn, self.inputs = clamp, learned, churn, inputs

    def run(self, images):
        rng = np.random.default_rng(self.seed)

        def combine(*terms):
            total = None
            for term in terms:
                a = float(rng.uniform(0.3, 1.0) * rng.choice([-1, 1]) / max(1, len(terms) - 1))
                total = a * term if total is None else total + a * term
            return total

        x = images.begin()
        past: list = []
        for i in range(self.calls):
            if self.churn and rng.random() < 0.5:
                # The very first one only adds noise: a plan's first_churn.
                x = x + float(rng.uniform(0.1, 0.5)) * images.churn()
            x, o = images.call(x, t=float(i) / 2, c_in=float(rng.uniform(0.5, 1.5)))
            z = [images.noise() for _ in range(int(rng.integers(0, self.draws + 1)))]
            if self.learned and z and rng.random() < 0.7:
                high = float(rng.uniform(-2, 0))
                z = [images.learned(one, -2.0, high) for one in z]
            given = [images.input("mask")] if self.inputs else []
            older = [past[k] for k in rng.permutation(len(past))[: int(rng.integers(0, 3))]]
            x_0 = combine(x, o, *older)
            kind = rng.choice(["none", "clamp"]) if self.clamp == "clamp" else self.clamp
            if kind == "clamp":
                x_0 = images.clamp(x_0, -0.4, float(rng.uniform(0.2, 0.6)))
            elif kind == "threshold":
                x_0 = images.threshold(x_0, 0.7, 1.5)
            images.preview(combine(x_0, o))
            older = [past[k] for k in rng.permutation(len(past))[: int(rng.integers(0, 3))]]
            kept = [x, o, x_0, *z][int(rng.integers(0, 3 + len(z)))]
            x = combine(x, x_0, *older, *z, *given)
            if rng.random() < 0.3:
                kept = combine(kept, x)
            past = [kept, *past][: self.memory]
        return images.finish(x)


class Forms:
    """On the Recorder."""

    def __init__(self, sampler, open_loop):
        self.recorder = Recorder("random", open_loop=open_loop, learned_variance=sampler.learned)

    def __getattr__(self, name):
        return getattr(self.recorder, name)


class Direct:
    """On tensors, with a model: what the plan's run must equal."""

    def __init__(self, sampler, open_loop, mask):
        self.channels = 2 if sampler.learned else 1
        self.open_loop, self.mask = open_loop, mask
        self.x_T = randn(*SHAPE, seed=1)
        self.states, self.previews, self.drawn, self.calls = [], [], {}, 0

    def changed(self, x, i):
        """What a callback does to the sample before call i."""
        return x + 0.3 * randn(*SHAPE, seed=50 + i) if self.open_loop else x

    def draw(self, row, k):
        return randn(*SHAPE, seed=1000 + 10 * row + k)

    def begin(self):
        return self.x_T

    def churn(self):
        return self.noise()

    def call(self, x, t, c_in):
        if self.calls:
            self.states.append(x)
        x = self.changed(x, self.calls)
        self.calls += 1
        self.output = model(c_in * x, t, self.channels)
        return x, self.output[:, : SHAPE[1]]

    def noise(self):
        row = self.calls - 1
        k = self.drawn[row] = self.drawn.get(row, -1) + 1
        return self.draw(row, k)

    def learned(self, z, low, high):
        f = self.output[:, SHAPE[1] :] * 0.5 + 0.5
        return z * exp(f * high + (1.0 - f) * low)

    def input(self, name):
        return self.given(self.calls - 1)

    def given(self, i):
        return self.mask * (1 + 0.1 * i)

    def clamp(self, x, lo, hi):
        return x.clamp(lo, hi)

    def threshold(self, x, ratio, largest):
        s = threshold_of(x, ratio, largest).double()[:, None, None, None]
        return x.clamp(-s, s) / s

    def preview(self, x):
        self.previews.append(x)

    def finish(self, x):
        self.states.append(x)
        return self


class Responses:
    """On a batch of one-pixel images, each of which has one input of the sampler at 1 and all
    others at 0: entry k of a result is its response to input k. Clamp nodes are inputs, and what
    they clamp is a result."""

    def __init__(self, open_loop, shape=(400,)):
        self.open_loop, self.shape = open_loop, shape
        self.owner = []  # the call that an input belongs to
        self.results = []  # (call, response)
        self.seen = []
        self.calls = 0
        self.given = {}

    def unit(self):
        self.owner.append(self.calls - 1)
        value = torch.zeros(self.shape, dtype=torch.float64)
        value[len(self.owner) - 1] = 1.0
        return value

    def begin(self):
        return self.unit()

    def call(self, x, t=0.0, c_in=1.0):
        self.result(x)
        self.seen.append(x.flatten())
        self.calls += 1
        return self.unit() if self.open_loop else x, self.unit()

    def result(self, x):
        self.results.append((self.calls - 1, x.flatten()))

    def noise(self):
        return self.unit()

    churn = noise

    def learned(self, z, low, high):
        return z

    def input(self, name):
        return self.unit()

    def clamp(self, x, *_):
        self.result(x)
        return self.unit()

    threshold = clamp

    def preview(self, x):
        pass

    def finish(self, x):
        self.result(x)
        self.calls += 1
        return self

    def ranks(self, tolerance=1e-8):
        """The rank of the Hankel matrix between every two calls: past inputs to later results."""
        found = []
        for i in range(self.calls - 2):
            past = [k for k, call in enumerate(self.owner) if call <= i]
            later = [x[past].numpy() for call, x in self.results if call > i]
            if self.open_loop:
                found.append(rank(later, tolerance))
            else:
                seen = [self.seen[i + 1][past].numpy()]
                found.append(rank(later + seen, tolerance) - rank(seen, tolerance))
        return found


def rank(rows, tolerance):
    rows = [row / np.linalg.norm(row) for row in rows if np.linalg.norm(row) > tolerance]
    if not rows:
        return 0
    sizes = np.linalg.svd(np.array(rows), compute_uv=False)
    return int((sizes > tolerance * sizes[0]).sum())


def carried(plan):
    """How many states beside x and the caller's inputs are held between every two calls."""
    history = slice(1, plan.states - len(plan.inputs))
    return [int(plan.A[i, history].any(axis=1).sum()) for i in range(plan.rows - 1)]


SAMPLERS = st.builds(
    Sampler, st.integers(0, 10**6), st.integers(1, 7), memory=st.integers(0, 3),
    draws=st.integers(0, 2), clamp=st.sampled_from(["none", "none", "clamp", "threshold"]),
    learned=st.booleans(), churn=st.booleans(), inputs=st.booleans(),
)  # fmt: skip


def replay(plan, direct, open_loop):
    """The largest difference between the plan's run and direct evaluation, along the run."""
    run = fd.Sampler(plan, backend="reference").start(direct.x_T, noise=direct.draw, preview=True)
    worst = 0.0
    for i in range(plan.rows):
        inputs = {name: direct.given(i) for name in plan.inputs}
        c_in = plan.first_c_in if i == 0 else plan.c_in[i - 1]
        x = direct.changed(run.x, i)
        output = model(c_in * x, plan.t[i], direct.channels)
        run.step(output, x if open_loop else None, **inputs)
        scale = max(1.0, float(direct.states[i].abs().max()))
        worst = max(worst, float((run.x - direct.states[i]).abs().max()) / scale)
        if "preview" not in plan.about:
            worst = max(worst, float((run.x_start - direct.previews[i]).abs().max()) / scale)
    return worst


@pytest.mark.parametrize("open_loop", [True, False], ids=["open", "closed"])
@settings(max_examples=120, deadline=None)
@given(sampler=SAMPLERS)
def test_random_samplers_replay_and_carry_the_least_history(open_loop, sampler):
    try:
        plan = sampler.run(Forms(sampler, open_loop))
    except NotAffineError as error:
        assume("states and" not in str(error))  # more than kernels serve
        assume("some of a step's draws" not in str(error))
        raise
    direct = sampler.run(Direct(sampler, open_loop, mask=randn(*SHAPE, seed=9)))
    assert replay(plan, direct, open_loop) <= 1e-12
    assert carried(plan) == sampler.run(Responses(open_loop)).ranks()


# diffusers' schedulers, 12 inference steps: the ranks that tracing gave by hand once, before there
# was a realizer (12 = twelve model calls without history).

NONE, HEUN = [0] * 11, [1, 0] * 11
ONE = [1] * 10 + [0]
ADAMS = [1, 2, 3, 3, 3, 3, 3, 3, 3, 2, 1]
THIRD = [1, 2, 2, 2, 2, 2, 2, 2, 1, 1, 0]
PRK = [2, 3, 2, 1, 3, 4, 3, 2, 4, 5, 4, 3, 3, 3, 3, 3, 3, 2, 1, 0]
SIGMA_MIN = dict(final_sigmas_type="sigma_min")
SCHEDULERS = [
    ("DDIMScheduler", {}, NONE),
    ("DDPMScheduler", {}, NONE),
    ("EulerDiscreteScheduler", {}, NONE),
    ("EulerAncestralDiscreteScheduler", {}, NONE),
    ("HeunDiscreteScheduler", {}, HEUN),
    ("LMSDiscreteScheduler", {}, ADAMS),
    ("PNDMScheduler", {}, PRK),
    ("IPNDMScheduler", {}, ADAMS),
    ("DPMSolverMultistepScheduler", {}, ONE),
    ("DPMSolverMultistepScheduler", dict(solver_order=3), THIRD),
    ("DPMSolverMultistepScheduler", dict(algorithm_type="sde-dpmsolver++"), ONE),
    ("DPMSolverMultistepScheduler", dict(algorithm_type="dpmsolver", solver_order=3, **SIGMA_MIN),
     THIRD),
    ("DPMSolverSinglestepScheduler", {}, [1, 0] * 5 + [0]),
    ("DEISMultistepScheduler", {}, ONE),
    ("UniPCMultistepScheduler", {}, [2] * 9 + [1, 0]),
    ("UniPCMultistepScheduler", dict(solver_order=3), [2] + [3] * 7 + [2, 1, 0]),
    ("UniPCMultistepScheduler", dict(solver_order=3, predict_x0=False, **SIGMA_MIN),
     [2] + [3] * 7 + [2, 2, 1]),
    ("SASolverScheduler", {}, [2] * 10 + [1]),
    ("LCMScheduler", {}, NONE),
    ("TCDScheduler", {}, NONE),
    ("KDPM2DiscreteScheduler", {}, HEUN),
    ("KDPM2AncestralDiscreteScheduler", {}, HEUN),
    ("FlowMatchEulerDiscreteScheduler", {}, NONE),
    ("FlowMatchHeunDiscreteScheduler", {}, HEUN),
    ("EDMDPMSolverMultistepScheduler", {}, ONE),
    ("DPMSolverMultistepInverseScheduler", {}, ONE),
    ("UnCLIPScheduler", {}, NONE),
    ("CogVideoXDDIMScheduler", {}, NONE),
]  # fmt: skip


def scheduler(name, config, steps=12):
    if "clip_sample" in getattr(diffusers, name)._get_init_keys(getattr(diffusers, name)):
        config = {"clip_sample": False, **config}
    return runs.scheduler(name, config, steps)


def responses_of(name, config):
    """Upstream's own code in float64, run on unit inputs."""
    images = Responses(open_loop=True, shape=(140, 1, 1, 1))
    images.begin()
    with upstream.float64(getattr(diffusers, name)), runs.Fed(images.noise):
        stepped = scheduler(name, config)
        x = torch.zeros(images.shape, dtype=torch.float64)
        for t in stepped.timesteps:
            x, output = images.call(x)
            if hasattr(stepped, "scale_model_input"):
                stepped.scale_model_input(x, t)
            x = stepped.step(output, t, x, return_dict=False)[0]
    return images.finish(x)


@pytest.mark.parametrize(
    ("name", "config", "expected"), SCHEDULERS,
    ids=[f"{name}-{'-'.join(map(str, config.values()))}" for name, config, _ in SCHEDULERS],
)  # fmt: skip
def test_schedulers_carry_the_least_history(name, config, expected):
    plan = fd.trace(scheduler(name, config))
    assert carried(plan) == expected
    assert responses_of(name, config).ranks(tolerance=1e-6) == expected


def test_the_history_of_a_runge_kutta_warm_up_is_well_conditioned():
    plan = fd.trace(scheduler("PNDMScheduler", {}, steps=30))
    assert plan.states - 1 == 5
    assert np.abs(plan.A).max() < 3
    assert np.abs(plan.A).max() == pytest.approx(1.37, abs=0.01)


K = other_projects.k_diffusion().sampling
LADDER = K.get_sigmas_karras(8, 0.05, 20.0).double()
FUNCTIONS = {  # k-diffusion's, closed loop, 8 steps
    "euler": [0] * 7, "euler_ancestral": [0] * 7, "heun": [1, 0] * 7, "dpm_2": [1, 0] * 7,
    "dpm_2_ancestral": [1, 0] * 7, "lms": [1, 2, 3, 3, 3, 2, 1],
    "dpmpp_2s_ancestral": [1, 0] * 7, "dpmpp_sde": [1, 0] * 7, "dpmpp_2m": [1] * 6 + [0],
    "dpmpp_2m_sde": [1] * 6 + [0], "dpmpp_3m_sde": [1, 2, 2, 2, 2, 1, 0],
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_sampling_functions_carry_the_least_history(name):
    function = getattr(K, f"sample_{name}")
    images = Responses(open_loop=False, shape=(80,))
    options = {}
    if name.endswith("_sde"):
        known = {}

        def increments(begin, end):
            """Independent increments: the second draw of a step goes on from the first."""
            begin, end = float(begin), float(end)
            lowest = min(known, default=begin)
            if end not in known:
                known.setdefault(begin, 0.0)
                known[end] = known[lowest] + (lowest - end) ** 0.5 * images.unit()
            return (known[end] - known[begin]) / (begin - end) ** 0.5

        options["noise_sampler"] = increments
    with runs.Fed(images.unit):
        x = function(
            lambda x, sigma: images.call(x)[1], images.begin(), LADDER, disable=True, **options
        )
    ranks = images.finish(x).ranks()
    assert carried(fd.trace(function, sigmas=LADDER)) == ranks == FUNCTIONS[name]


def test_a_plan_that_is_not_what_was_recorded_is_refused(monkeypatch):
    realize = importlib.import_module("fastdiff.tracing.realize")

    solve = realize.solve
    worse = lambda *a: {k: v * (1 + 1e-8) for k, v in solve(*a).items()}  # noqa: E731
    monkeypatch.setattr(realize, "solve", worse)
    with pytest.raises(NotAffineError, match="needs more than float64 to be computed"):
        fd.trace(scheduler("DPMSolverMultistepScheduler", dict(solver_order=3)))
