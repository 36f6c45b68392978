"""Tracing: diffusers' schedulers replayed against their own code, and the entry point."""

from __future__ import annotations

import copy
import math
import threading

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import fastdiff as fd
from fastdiff.benchmarks import upstream as other_projects
from fastdiff.tracing import NotAffineError
from fastdiff.tracing.trace import TraceNotes, trace_scheduler
from tests.conftest import load_helper

runs = load_helper("scheduler_runs")
SHAPE, draws, randn, relative = runs.SHAPE, runs.draws, runs.randn, runs.relative
K = other_projects.k_diffusion().sampling
pytestmark = runs.UPSTREAM_WARNINGS

EPS32 = 2.0**-24


def model(x, t):
    """Any smooth nonlinear function of (x, t)."""
    return torch.tanh(0.7 * x + 0.1 * torch.sin(2.0 * x.roll(1, -1)) + float(t) / 3000)


def with_variance(x, t):
    return torch.cat([model(x, t), torch.cos(x)], 1)


def loops(name, config, steps, options, network=model):
    """(plan, growth, last x of upstream in float64, in float32, of the plan in float64, in
    float32); growth: how much larger than the result the largest sample on the way is."""
    results = []
    made = runs.scheduler(name, config, steps)
    plan = trace_scheduler(made, made.timesteps, options, fed=True)
    x_T = randn(*SHAPE).float().double() * plan.initial_scale
    for dtype in (torch.float64, torch.float32):
        noise = draws()
        made = runs.scheduler(name, config, steps)
        path = [*runs.steps_of(made, x_T.to(dtype), network, lambda n=noise: next(n), **options)]
        if dtype == torch.float64:
            growth = max(float(x.norm()) for x in [x_T, *path]) / float(path[-1].norm() + 1e-6)
        results.append(path[-1])
    for dtype in (torch.float64, torch.float32):
        noise = draws()
        run = fd.Sampler(plan, backend="reference").start(
            x_T.to(dtype), noise=lambda row, k, n=noise, dtype=dtype: next(n).to(dtype)
        )
        for t in made.timesteps:
            run.step(network(run.model_input, t).to(dtype))
        results.append(run.x)
    return plan, max(1.0, growth), *results


def float32_bound(plan, upstream32, exact):
    """Twice upstream's own error, and the rounding of the plan's coefficients."""
    sizes = [np.abs(plan.A).max(), 0.0 if plan.P is None else np.abs(plan.P).max()]
    return 2 * relative(upstream32, exact) + 4 * EPS32 * math.sqrt(plan.rows) * max(sizes)


# Those that compute in float32 whatever the sample's dtype is: tables, or the sample itself cast.
ROUNDING = {
    "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "EDMEulerScheduler",
    "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler",
    "DPMSolverMultistepScheduler", "LTXEulerAncestralRFScheduler",
}  # fmt: skip

FLOW = dict(use_flow_sigmas=True, prediction_type="flow_prediction")
DEFAULTS = [
    ("DDIMScheduler", {}, {}),
    ("DDIMScheduler", {}, dict(eta=0.5)),
    ("DDIMScheduler", {}, dict(eta=0.5, use_clipped_model_output=True)),
    ("DDIMScheduler", dict(thresholding=True, prediction_type="v_prediction"), dict(eta=0.5)),
    ("DDIMParallelScheduler", {}, {}),
    ("DDIMInverseScheduler", {}, {}),
    ("DDPMScheduler", {}, {}),
    ("DDPMScheduler", dict(variance_type="learned_range"), {}),
    ("DDPMScheduler", dict(thresholding=True, clip_sample=False), {}),
    ("DDPMParallelScheduler", {}, {}),
    ("EulerDiscreteScheduler", {}, {}),
    ("EulerDiscreteScheduler", {}, dict(s_churn=3.0)),
    ("EulerAncestralDiscreteScheduler", {}, {}),
    ("HeunDiscreteScheduler", {}, {}),
    ("LMSDiscreteScheduler", {}, {}),
    ("PNDMScheduler", {}, {}),
    ("PNDMScheduler", dict(skip_prk_steps=True), {}),
    ("IPNDMScheduler", {}, {}),
    ("DPMSolverMultistepScheduler", {}, {}),
    ("DPMSolverMultistepScheduler", dict(solver_order=3, use_karras_sigmas=True), {}),
    ("DPMSolverMultistepScheduler", dict(algorithm_type="sde-dpmsolver++"), {}),
    ("DPMSolverMultistepScheduler", FLOW, {}),
    ("DPMSolverMultistepInverseScheduler", {}, {}),
    ("DPMSolverSinglestepScheduler", {}, {}),
    ("DPMSolverSinglestepScheduler", dict(solver_order=3), {}),
    ("DEISMultistepScheduler", dict(solver_order=3), {}),
    ("UniPCMultistepScheduler", {}, {}),
    ("UniPCMultistepScheduler", dict(solver_order=3), {}),
    ("UniPCMultistepScheduler", FLOW, {}),
    ("SASolverScheduler", {}, {}),
    ("KDPM2DiscreteScheduler", {}, {}),
    ("KDPM2AncestralDiscreteScheduler", {}, {}),
    ("EDMDPMSolverMultistepScheduler", dict(solver_order=3), {}),
    ("EDMEulerScheduler", {}, {}),
    ("EDMEulerScheduler", {}, dict(s_churn=3.0)),
    ("LCMScheduler", {}, {}),
    ("TCDScheduler", {}, {}),
    ("CMStochasticIterativeScheduler", {}, {}),
    ("FlowMatchEulerDiscreteScheduler", {}, {}),
    ("FlowMatchEulerDiscreteScheduler", dict(stochastic_sampling=True), {}),
    ("FlowMatchHeunDiscreteScheduler", {}, {}),
    ("FlowMatchHeunDiscreteScheduler", {}, dict(s_churn=3.0)),
    ("FlowMatchLCMScheduler", {}, {}),
    ("CosineDPMSolverMultistepScheduler", {}, {}),
    ("DPMSolverSDEScheduler", {}, {}),
    ("UnCLIPScheduler", {}, {}),
    ("UnCLIPScheduler", dict(variance_type="learned_range"), {}),
    ("LTXEulerAncestralRFScheduler", {}, {}),
    ("CogVideoXDDIMScheduler", {}, {}),
]  # fmt: skip


def label(case):
    name, *more = case
    return "-".join([name, *(f"{k}={v}" for part in more for k, v in part.items())])


@pytest.mark.parametrize("case", DEFAULTS, ids=label)
def test_a_loop_equals_upstreams_own(case):
    name, config, options = case
    network = with_variance if config.get("variance_type") == "learned_range" else model
    plan, _, exact, upstream32, replayed, replayed32 = loops(name, config, 25, options, network)
    assert relative(replayed, exact) <= (1e-6 if name in ROUNDING else 1e-14)
    assert relative(replayed32, exact) <= float32_bound(plan, upstream32, exact)


@st.composite
def configurations(draw):
    """(name, config, steps, options of step) over what diffusers' schedulers offer."""
    name = draw(st.sampled_from(sorted({name for name, _, _ in DEFAULTS})))
    cls = getattr(diffusers, name)
    keys = set(cls._get_init_keys(cls))
    flow = "use_flow_sigmas" in keys and draw(st.integers(0, 7)) == 0
    space = dict(
        prediction_type=st.sampled_from(["epsilon", "sample", "v_prediction"]),
        timestep_spacing=st.sampled_from(["linspace", "leading", "trailing"]),
        solver_order=st.integers(1, 3),
        algorithm_type=st.sampled_from(
            ["dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"]
        ),
        solver_type=st.sampled_from(["midpoint", "heun", "logrho", "bh1", "bh2"]),
        final_sigmas_type=st.sampled_from(["zero", "sigma_min"]),
        lower_order_final=st.booleans(),
        euler_at_final=st.booleans(),
        predict_x0=st.booleans(),
        thresholding=st.booleans(),
        clip_sample=st.booleans(),
        clip_sample_range=st.sampled_from([0.5, 1.0]),
        rescale_betas_zero_snr=st.booleans(),
        set_alpha_to_one=st.booleans(),
        skip_prk_steps=st.booleans(),
        steps_offset=st.integers(0, 1),
        beta_schedule=st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
        variance_type=st.sampled_from(["fixed_small", "fixed_small_log", "fixed_large"]),
        predictor_order=st.integers(1, 3),
        corrector_order=st.integers(1, 3),
        interpolation_type=st.sampled_from(["linear", "log_linear"]),
        stochastic_sampling=st.booleans(),
        shift=st.sampled_from([1.0, 3.0]),
        invert_sigmas=st.booleans(),
        eta=st.sampled_from([0.0, 0.7, 1.0]),
        s_noise=st.sampled_from([0.9, 1.0]),
    )  # fmt: skip
    config = {
        key: draw(values)
        for key, values in space.items()
        if key in keys and draw(st.integers(0, 2)) > 0
    }
    sigmas = [
        key for key in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
        if key in keys
    ]  # fmt: skip
    if sigmas and draw(st.booleans()):
        config[draw(st.sampled_from(sigmas))] = True
    if flow:
        config = {k: v for k, v in config.items() if not k.startswith("use_")} | FLOW
    offered = dict(
        eta=st.sampled_from([0.0, 0.3, 1.0]),
        use_clipped_model_output=st.booleans(),
        s_churn=st.sampled_from([0.0, 2.0]),
        s_tmin=st.sampled_from([0.0, 0.5]),
        s_noise=st.sampled_from([1.0, 1.003]),
    )
    parameters = cls.step.__code__.co_varnames[: cls.step.__code__.co_argcount]
    options = {
        key: draw(values) for key, values in offered.items()
        if key in parameters and draw(st.booleans())
    }  # fmt: skip
    return name, config, draw(st.integers(1, 40)), options


def upstream_serves(name, config, steps, options):
    """Whether diffusers itself runs this configuration to a finite result."""
    noise = draws()
    try:
        made = runs.scheduler(name, config, steps)
        *_, x = runs.steps_of(
            made, randn(*SHAPE) * float(made.init_noise_sigma), model, lambda: next(noise),
            **options,
        )  # fmt: skip
    except (
        ValueError,
        NotImplementedError,
        IndexError,
        ImportError,
        RuntimeError,
        TypeError,
        AttributeError,
        KeyError,
        UnboundLocalError,
        AssertionError,
        ZeroDivisionError,
    ):
        return False
    return bool(torch.isfinite(x).all())


def largest_inverse_alpha(name, config):
    """1 / alpha_T, by which (x - sigma epsilon) / alpha magnifies rounding, upstream's own too."""
    table = getattr(runs.scheduler(name, config), "alphas_cumprod", None)
    return 1.0 if table is None else float(table[table > 0].min() ** -0.5)


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=configurations())
def test_any_configuration_that_upstream_runs_is_replayed(case):
    name, config, _, _ = case
    assume(upstream_serves(*case))
    try:
        plan, growth, exact, upstream32, replayed, replayed32 = loops(*case)
    except NotAffineError as error:
        # Infinities that upstream clamps to the bounds, at the terminal step without any signal.
        assert config.get("rescale_betas_zero_snr") and "divide by 0.0" in str(error)
        return
    growth = max(growth, float(np.abs(plan.A).max()), largest_inverse_alpha(name, config))
    limit = 1e-6 * growth if name in ROUNDING else 1e-12 + 1e-13 * growth
    assert relative(replayed, exact) <= limit
    assert relative(replayed32, exact) <= float32_bound(plan, upstream32, exact)


ZERO_SNR = dict(rescale_betas_zero_snr=True, use_exponential_sigmas=True)
UNIPC = dict(predict_x0=False, final_sigmas_type="sigma_min", **ZERO_SNR)
COSINE = dict(corrector_order=4, beta_schedule="squaredcos_cap_v2")
STEEP = [  # first noise levels of 4e3 and 2e4: (name, config, steps, most that is carried)
    ("UniPCMultistepScheduler", dict(solver_order=3, **UNIPC), 8, 3),
    ("UniPCMultistepScheduler", dict(solver_order=4, solver_type="bh1", **UNIPC), 10, 4),
    ("UniPCMultistepScheduler", dict(solver_order=4, solver_type="bh1",
        beta_schedule="scaled_linear", prediction_type="v_prediction", **UNIPC), 15, 4),
    ("UniPCMultistepScheduler", dict(solver_order=4, beta_schedule="scaled_linear",
        prediction_type="sample", **UNIPC), 12, 4),
    ("SASolverScheduler", dict(algorithm_type="data_prediction", lower_order_final=True, **COSINE),
     20, 3),
    ("SASolverScheduler", dict(predictor_order=3, algorithm_type="noise_prediction", **COSINE),
     10, 3),
    ("SASolverScheduler", dict(predictor_order=4, corrector_order=4, prediction_type="sample",
        algorithm_type="noise_prediction", timestep_spacing="linspace",
        use_exponential_sigmas=True), 30, 4),
]  # fmt: skip


@pytest.mark.parametrize("case", STEEP, ids=range(len(STEEP)))
def test_steep_ladders_are_replayed_with_the_least_history(case):
    name, config, steps, carried = case
    plan, _, exact, _, replayed, _ = loops(name, config, steps, {})
    assert plan.states - 1 == carried
    assert relative(replayed, exact) <= 1e-9


# The entry point: errors, identity, files.


def test_a_class_is_refused():
    with pytest.raises(TypeError, match=r"instance: DDIMScheduler\(\.\.\.\)"):
        fd.trace(diffusers.DDIMScheduler, steps=5)
    with pytest.raises(TypeError, match="must be a scheduler or a function, not int"):
        fd.trace(3, steps=5)


@pytest.mark.parametrize("steps", [0, -1, 2.5, "5", True])
def test_a_number_of_steps_that_is_none_is_refused(steps):
    with pytest.raises(ValueError, match=f"steps must be a positive integer, not {steps!r}"):
        fd.trace(diffusers.DDIMScheduler(), steps=steps)


def test_unknown_options_are_refused_by_name():
    with pytest.raises(TypeError, match="s_churn is an argument neither of DDIMScheduler"):
        fd.trace(diffusers.DDIMScheduler(), steps=5, s_churn=1.0)
    with pytest.raises(TypeError, match=r"DDIMScheduler\.set_timesteps takes no sigmas"):
        fd.trace(diffusers.DDIMScheduler(), sigmas=[3.0, 1.0])
    with pytest.raises(TypeError, match="unexpected keyword argument 's_churns'"):
        fd.trace(K.sample_euler, sigmas=[3.0, 1.0, 0.0], s_churns=1.0)


def test_a_function_needs_noise_levels():
    with pytest.raises(ValueError, match="sigmas must be given"):
        fd.trace(K.sample_euler)
    with pytest.raises(ValueError, match="exclude each other"):
        fd.trace(K.sample_euler, 5, sigmas=[3.0, 1.0])
    for sigmas in ([3.0], [[3.0, 1.0]], [3.0, math.nan], [math.inf, 1.0]):
        with pytest.raises(ValueError, match="sigmas must be at least two finite numbers"):
            fd.trace(K.sample_euler, sigmas=sigmas)


# Their constructors set 1000 timesteps.
SET = ("Heun", "KDPM2", "KDPM2Ancestral", "LMS")
SET = {f"{name}DiscreteScheduler" for name in SET} | {"IPNDMScheduler", "DPMSolverSDEScheduler"}


@pytest.mark.parametrize("name", sorted({name for name, _, _ in DEFAULTS} - SET))
def test_timesteps_that_are_not_set_are_refused(name):
    with pytest.raises(ValueError, match=r"steps must be given: .* timesteps are not set"):
        fd.trace(runs.scheduler(name, {}))


def test_timesteps_that_are_set_serve():
    made = runs.scheduler("DDIMScheduler", {}, 7)
    assert fd.trace(made) == fd.trace(diffusers.DDIMScheduler(), steps=7)
    made = runs.scheduler("DDPMScheduler", {})
    made.set_timesteps(timesteps=[900, 500, 20])
    custom = fd.trace(runs.scheduler("DDPMScheduler", {}), timesteps=[900, 500, 20])
    assert fd.trace(made) == custom
    made = runs.scheduler("DDIMScheduler", {}, 7)
    assert custom.t.tolist() == [900.0, 500.0, 20.0]
    assert fd.trace(diffusers.DDIMScheduler(), steps=np.int64(7)) == fd.trace(made)


class Squares(diffusers.DDIMScheduler):
    def step(self, model_output, timestep, sample, **options):
        return super().step(model_output, timestep, sample + 0.0 * sample**2, **options)


class Absolute(diffusers.DDIMScheduler):
    def step(self, model_output, timestep, sample, **options):
        return super().step(model_output, timestep, torch.abs(sample), **options)


class Quantile(diffusers.DDIMScheduler):
    def step(self, model_output, timestep, sample, **options):
        scale = torch.quantile(sample.abs(), 0.9)
        return super().step(model_output, timestep, sample / scale, **options)


class Decides(diffusers.DDIMScheduler):
    def step(self, model_output, timestep, sample, **options):
        if (sample > 3).any():
            raise ValueError("never")
        return super().step(model_output, timestep, sample, **options)


class Products(diffusers.DDIMScheduler):
    def step(self, model_output, timestep, sample, **options):
        return super().step(model_output * sample, timestep, sample, **options)


class Random(diffusers.DDIMScheduler):
    def step(self, model_output, timestep, sample, **options):
        return super().step(model_output * torch.rand(()), timestep, sample, **options)


class Shifts(diffusers.DDIMScheduler):
    def step(self, model_output, timestep, sample, **options):
        return super().step(model_output, timestep, sample + 1.0, **options)


@pytest.mark.parametrize(
    ("cls", "operation"),
    [(Squares, "power"), (Absolute, "torch.abs"), (Quantile, "Tensor.abs"),
     (Decides, "comparison"), (Products, "multiply"), (Random, "torch.rand"), (Shifts, "add")],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_schedulers_that_are_not_affine_are_refused(cls, operation):
    with pytest.raises(NotAffineError) as caught:
        fd.trace(cls(clip_sample=False), steps=3)
    assert caught.value.operation == operation
    if operation != "add":  # a constant shows at the end only
        first = cls.step.__code__.co_firstlineno
        file, _, line = caught.value.where.rpartition(":")
        assert file == __file__ and first < int(line) <= first + 3
    assert isinstance(torch.randn(1, 3, 5, 7), torch.Tensor)  # interception is over


def test_schedulers_of_adaptive_steps_are_refused():
    with pytest.raises(NotAffineError):
        fd.trace(
            lambda model, x, sigmas: K.sample_dpm_adaptive(model, x, 0.1, 10.0, disable=True),
            sigmas=[10.0, 0.1],
        )


def snapshot(value):
    """Everything in an object, comparable by ==."""
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), str(value.device), repr(value.tolist()))  # NaN == NaN
    if isinstance(value, np.ndarray):
        return (str(value.dtype), repr(value.tolist()))
    if isinstance(value, dict):
        return {k: snapshot(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [snapshot(v) for v in value]
    return value


@pytest.mark.parametrize("case", DEFAULTS, ids=label)
def test_tracing_leaves_the_scheduler_alone_and_repeats(case, tmp_path):
    name, config, options = case
    made = runs.scheduler(name, config, 9)
    before = snapshot(vars(made))
    plan = fd.trace(made, **options)
    after = snapshot(vars(made))
    assert after == before
    again = fd.trace(runs.scheduler(name, config), steps=9, **options)
    assert again == plan and hash(again) == hash(plan)
    assert fd.trace(runs.scheduler(name, config), steps=8, **options) != plan
    plan.save(tmp_path / "plan.npz")
    loaded = fd.SolverPlan.load(tmp_path / "plan.npz")
    assert loaded == plan and loaded.about == plan.about and str(loaded) == str(plan)
    assert np.isfinite(plan.A).all() and name in plan.name


def test_queries_of_a_brownian_tree_are_noted():
    made = runs.scheduler("DPMSolverSDEScheduler", {}, 4)
    notes = TraceNotes()
    plan = trace_scheduler(copy.deepcopy(made), made.timesteps, fed=True, notes=notes)
    assert sorted(notes.queries) == [(i, 0) for i in range(6)]
    assert plan.rows == 7 and plan.draws_noise[:6].all()
    assert all(begin > end for begin, end in notes.queries.values())
    independent = fd.trace(made)
    assert independent.draws_noise[:6].all() and independent.n_draws == 1


def test_many_images_in_other_threads_do_not_disturb_a_trace():
    stop, wrong = threading.Event(), []

    def draw():
        while not stop.is_set():
            z = torch.randn(1, 3, 5, 7)
            if type(z) is not torch.Tensor:
                wrong.append(z)

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        plans = [fd.trace(diffusers.DDPMScheduler(), steps=20) for _ in range(3)]
    finally:
        stop.set()
        thread.join()
    assert not wrong and plans[0] == plans[1] == plans[2]
    assert plans[0].draws_noise[:, 0].tolist() == [True] * 19 + [False]
