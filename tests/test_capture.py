"""Captured loops: the bits of the ordinary loop, from values that lie in the loop's own memory.

A CUDA graph repeats launches on the memory they were recorded with. `Recording` does the same on
the CPU: it keeps the operations of a body with their arguments and runs them again, so a value
that was read on the host while recording stays what it was, as it would in a graph.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiff as fd
from fastdiff import capture, program
from fastdiff.ops.step import step as definition

SCHEDULE = fd.schedules.linear(100, 1e-3, 0.1)
OTHER = fd.schedules.cosine(100)
SIGMAS = fd.schedules.sigmas.karras(6, 0.05, 8.0)
SHAPE = (3, 2, 4, 4)


def model(x, t):
    t = t.view(-1, *[1] * (x.dim() - 1)).to(x.dtype)
    halves = torch.arange(x.shape[0], device=x.device).view(-1, *[1] * (x.dim() - 1)) >= 3
    return torch.sin(1.7 * x + 0.01 * t) * (0.7 + 0.2 * halves).to(x.dtype)


def learned(x, t):
    return torch.cat([model(x, t), torch.cos(x)], 1)


class Recording(TorchDispatchMode):
    """The operations of a body, to be run again on the same memory."""

    def __init__(self, body):
        super().__init__()
        self.operations = []
        with torch.no_grad(), self:
            body()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, result))
        return result

    def replay(self):
        for func, args, kwargs, recorded in self.operations:
            if func.is_view or func.name().startswith("aten::empty"):
                continue
            result = func(*args, **kwargs)
            for old, new in zip(tensors(recorded), tensors(result), strict=True):
                if new.untyped_storage().data_ptr() != old.untyped_storage().data_ptr():
                    old.copy_(new)


def tensors(value):
    values = value if isinstance(value, tuple | list) else [value]
    return [v for v in values if isinstance(v, torch.Tensor)]


def captured(plan, network=model, recorded=True, backend=None, **options):
    loop = fd.Sampler(plan, backend=backend).capture(network, SHAPE, **options)
    if recorded:
        loop._graph = Recording(loop._body)
    return loop


PLANS = {
    "ddim": (fd.solvers.ddim(SCHEDULE, 5), fd.solvers.ddim(OTHER, 5, clip=(-0.5, 0.5))),
    "ddim, eta": (
        fd.solvers.ddim(SCHEDULE, 5, eta=1.0, clip=None),
        fd.solvers.ddim(OTHER, timesteps=[3, 20, 41, 62, 90], eta=0.3, clip=None),
    ),
    "ddpm": (fd.solvers.ddpm(SCHEDULE, 5), fd.solvers.ddpm(OTHER, 5, variance="fixed_large")),
    "dpm++ 2m": (fd.solvers.dpm_solver(SCHEDULE, 6), fd.solvers.dpm_solver(OTHER, 6)),
    "unipc": (
        fd.solvers.unipc(SCHEDULE, 6),
        fd.solvers.unipc(fd.schedules.linear(100, 2e-3, 0.08), 6),
    ),
    "thresholding": (
        fd.solvers.dpm_solver(SCHEDULE, 5, thresholding=(0.8, 1.5)),
        fd.solvers.dpm_solver(OTHER, 5, thresholding=(0.8, 1.5)),
    ),
    "heun": (fd.solvers.heun(SIGMAS), fd.solvers.heun(2 * SIGMAS)),
    "heun, churned": (
        fd.solvers.heun(SIGMAS, s_churn=3.0),
        fd.solvers.heun(1.5 * SIGMAS, s_churn=2.0, s_noise=1.01),
    ),
    "flow": (
        fd.solvers.flow_euler(fd.solvers.flow_sigmas(5)),
        fd.solvers.flow_euler(fd.solvers.flow_sigmas(5, shift=3.0)),
    ),
    "langevin": (
        fd.solvers.score_sde_ve(4, sigma_max=5.0, snr=0.16),
        fd.solvers.score_sde_ve(4, sigma_max=9.0, snr=0.1),
    ),
    "learned variance": (
        fd.solvers.ddpm(SCHEDULE, 5, variance="learned_range"),
        fd.solvers.ddpm(OTHER, 5, variance="learned_range"),
    ),
}


def network_of(plan):
    return learned if plan.learned else model


@pytest.mark.parametrize("recorded", [False, True], ids=["eager", "recorded"])
@pytest.mark.parametrize("kind", PLANS)
def test_a_loop_gives_the_bits_of_sample_for_every_new_value(assert_same_bits, kind, recorded):
    plan, other = PLANS[kind]
    network = network_of(plan)
    loop = captured(plan, network, recorded)
    x_T = 3.0 * fd.randn(SHAPE, 77)
    for call in (
        dict(seed=4), dict(seed=4, sample_offset=9), dict(seed=4, plan=other), dict(seed=2**63 + 5),
        dict(seed=torch.tensor([5, 2**40, 7])), dict(seed=1, x_T=x_T), dict(seed=4),
        dict(seed=1, x_T=x_T, plan=other),
    ):  # fmt: skip
        options = dict(call)
        wanted = options.pop("plan", plan)
        if "x_T" not in options:
            options["shape"] = SHAPE
        assert_same_bits(loop(**call), fd.sample(network, wanted, **options))


OPTIONS = {
    "bfloat16 model": dict(model_dtype=torch.bfloat16),
    "bfloat16": dict(dtype=torch.bfloat16),
    "float16, float32 model": dict(dtype=torch.float16, model_dtype=torch.float32),
    "float64": dict(dtype=torch.float64),
    "noise in bfloat16": dict(noise_dtype=torch.bfloat16),
    "fresh outputs": dict(outputs_are_fresh=True),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", ["ddpm", "unipc", "heun, churned"])
def test_dtypes_and_options_are_those_of_sample(assert_same_bits, kind, options):
    plan, other = PLANS[kind]
    loop = captured(plan, **options)
    for seed, wanted in ((1, plan), (2, other), (3, plan)):
        assert_same_bits(
            loop(seed=seed, plan=wanted), fd.sample(model, wanted, SHAPE, seed=seed, **options)
        )


@pytest.mark.parametrize("kind", ["ddim, eta", "dpm++ 2m", "heun, churned", "langevin",
                                  "learned variance"])  # fmt: skip
def test_guidance_is_a_value_of_the_replay(assert_same_bits, kind):
    plan, other = PLANS[kind]
    network = network_of(plan)
    loop = captured(plan, network, guidance_scale=7.5, model_dtype=torch.bfloat16)
    options = dict(shape=SHAPE, model_dtype=torch.bfloat16)
    for seed, scale in ((1, 3.0), (2, 1e-3), (3, torch.tensor(2.0))):
        assert_same_bits(
            loop(seed=seed, guidance_scale=scale, plan=other),
            fd.sample(network, other, seed=seed, guidance_scale=scale, **options),
        )
    expected = fd.sample(network, plan, seed=1, guidance_scale=7.5, **options)
    assert_same_bits(loop(seed=1), expected)  # the capture's own when none is given


def test_a_guidance_scale_per_sample_has_room_when_captured_so(assert_same_bits):
    plan = PLANS["ddim"][0]
    scales = torch.tensor([1.0, 2.5, 7.0])
    loop = captured(plan, guidance_scale=scales)
    for scale in (2 * scales, 4.0, scales):
        assert_same_bits(
            loop(seed=1, guidance_scale=scale),
            fd.sample(model, plan, SHAPE, seed=1, guidance_scale=scale),
        )
    assert_same_bits(loop(seed=1), fd.sample(model, plan, SHAPE, seed=1, guidance_scale=scales))


@pytest.mark.parametrize("kind", ["ddpm", "heun, churned"])
def test_every_backend_captures_the_same_bits(accelerated, assert_same_bits, kind):
    for options in (dict(), dict(guidance_scale=2.5, model_dtype=torch.bfloat16)):
        plan, other = PLANS[kind]
        loop = captured(plan, backend=accelerated, **options)
        for wanted in (other, plan):
            assert_same_bits(
                loop(seed=6, plan=wanted),
                fd.sample(model, wanted, SHAPE, seed=6, backend="reference", **options),
            )


def test_a_compiled_model_is_captured_like_any_other(assert_same_bits):
    compiled = torch.compile(model, backend="aot_eager")
    plan = PLANS["unipc"][0]
    loop = captured(plan, compiled, recorded=False)
    assert_same_bits(loop(seed=3), fd.sample(model, plan, SHAPE, seed=3))


def test_results_are_copies_unless_asked_otherwise(assert_same_bits):
    loop = captured(PLANS["dpm++ 2m"][0])
    first = loop(seed=0)
    kept = first.clone()
    second = loop(seed=1, clone=False)
    assert second is loop.x and not torch.equal(first, second)
    assert_same_bits(first, kept)
    # The loop's own memory may be where the next call starts from.
    expected = fd.sample(model, loop.plan, x_T=second.clone())
    assert_same_bits(loop(x_T=loop.x), expected)
    assert loop.steps == 6 and loop.shape == SHAPE


def test_x_T_is_never_written_to():
    x_T = fd.randn(SHAPE, 7)
    kept = x_T.clone()
    captured(PLANS["ddpm"][0])(seed=0, x_T=x_T)
    assert torch.equal(x_T, kept)


def test_a_model_that_writes_to_its_arguments_harms_no_replay(assert_same_bits):
    def careless(x, t):
        output = model(x, t)
        t += 1
        x.mul_(0.5)
        return output

    plan = PLANS["ddpm"][0]
    loop = captured(plan, careless, model_dtype=torch.bfloat16)
    expected = fd.sample(model, plan, SHAPE, seed=0, model_dtype=torch.bfloat16)
    for _ in range(2):
        assert_same_bits(loop(seed=0), expected)


def test_loops_work_inside_and_outside_of_inference_mode(assert_same_bits):
    plan = PLANS["unipc"][0]
    expected = fd.sample(model, plan, SHAPE, seed=0)
    with torch.inference_mode():
        loop = captured(plan, recorded=False)
        assert_same_bits(loop(seed=0), expected)
    assert_same_bits(loop(seed=0), expected)
    with torch.inference_mode():
        assert_same_bits(loop(seed=0), expected)


# What a replay costs: on the host, so far as no GPU is needed to see it.


class Seen(TorchDispatchMode):
    """Names of the operations that do something, and the memory that operations write to."""

    def __init__(self):
        super().__init__()
        self.names, self.written = [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.names.append(func.name().removesuffix(".out"))
        everything = dict(zip((a.name for a in func._schema.arguments), args, strict=False))
        everything |= kwargs or {}
        for argument in func._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = tensors(everything.get(argument.name))
                self.written |= {t.untyped_storage().data_ptr() for t in given}
        return result


def static_model(guided=False, learned=False):
    """A model that does nothing: it returns memory of its own."""
    shape = [SHAPE[0] * (1 + guided), SHAPE[1] * (1 + learned), *SHAPE[2:]]
    output = torch.full(shape, 0.25)
    return lambda x, t: output


IN_ONE_LAUNCH = [kind for kind in PLANS if kind not in ("thresholding", "langevin")]


@pytest.mark.parametrize("guidance", [None, 2.0])
@pytest.mark.parametrize("kind", IN_ONE_LAUNCH)
def test_a_step_is_one_operation_and_nothing_else(kind, guidance):
    plan = PLANS[kind][0]
    still = static_model(guidance is not None, plan.learned)
    loop = captured(plan, still, False, guidance_scale=guidance)
    loop(seed=0)
    with Seen() as seen, torch.no_grad():
        loop._body()
    step = fd.backends.operation("step", torch.device("cpu"), torch.float32).name()
    before = 2 if plan.first_churn else 1  # x_T or noise, and the churn
    assert seen.names == ["aten::copy_", *[step] * (before + plan.rows)]


# What waits for a GPU when the tensor is there; a number as a tensor is copied to it.
READS = {
    "aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::is_nonzero", "aten::equal",
    "aten::scalar_tensor", "aten::lift_fresh", "aten::lift_fresh_copy",
}  # fmt: skip


@pytest.mark.parametrize("opened", [False, True], ids=["kernels", "definition"])
@pytest.mark.parametrize("kind", PLANS)
def test_no_step_reads_the_device_or_copies_to_it(kind, opened):
    plan = PLANS[kind][0]
    loop = captured(plan, static_model(True, plan.learned), False, guidance_scale=2.0)
    if opened:
        loop._run._operation = definition
    with Seen() as seen, torch.no_grad():
        loop._body()
    assert not READS & set(seen.names)
    if not opened:
        assert len([name for name in seen.names if name.endswith("::step")]) >= plan.rows


@pytest.mark.parametrize("kind", PLANS)
def test_an_ordinary_loop_uploads_nothing_once_it_has_run(kind):
    plan = PLANS[kind][0]
    still = static_model(True, plan.learned)
    fd.sample(still, plan, SHAPE, seed=0, guidance_scale=2.0)
    with Seen() as seen:
        fd.sample(still, plan, SHAPE, seed=1, guidance_scale=3.0)
    assert not READS & set(seen.names)
    # A copy from the host would show as one: float64 tables become float32 ones.
    assert kind == "thresholding" or "aten::_to_copy" not in seen.names


def test_a_replay_writes_only_to_the_loop_s_own_memory():
    plan, other = PLANS["unipc"]
    loop = captured(plan, static_model(True), False, guidance_scale=2.0)
    loop(seed=0, plan=other)  # uploads its tables, once
    run = loop._run
    own = [run.keys, run.guidance, run.start_row, run.tables.values, run.tables.draws,
           run.tables.t, run._times, run.model_input, run.x, *run.history]  # fmt: skip
    own = {t.untyped_storage().data_ptr() for t in own}
    for call in (
        dict(seed=1), dict(seed=2, guidance_scale=5.0, plan=other), dict(seed=4, sample_offset=2),
        dict(seed=3, x_T=fd.randn(SHAPE, 1)), dict(seed=torch.arange(3), plan=other),
    ) * 2:  # fmt: skip
        with Seen() as seen:
            loop(**call, clone=False)
        assert seen.written <= own
        assert not READS & set(seen.names)
        # The plan's values, draws and t; keys, scale and x_T; the run's own t.
        assert seen.names.count("aten::copy_") <= 7


# Refusals: before anything runs or is written.


def refused(loop, error, names, **call):
    before = loop.x.clone()
    values = loop._run.tables.values.clone()
    with pytest.raises(error, match=names):
        loop(**call)
    assert torch.equal(loop.x, before) and torch.equal(loop._run.tables.values, values)


@pytest.mark.parametrize(
    ("call", "error", "names"),
    [
        (dict(), ValueError, "seed must be given"),
        (dict(x_T=torch.zeros(SHAPE)), ValueError, "seed must be given"),
        (dict(seed=-1), ValueError, "seed"),
        (dict(seed=1.5), TypeError, "seed"),
        (dict(seed=torch.arange(2)), ValueError, "seed tensor"),
        (dict(seed=torch.arange(3), sample_offset=1), ValueError, "sample_offset"),
        (dict(seed=0, sample_offset=-1), ValueError, "sample_offset"),
        (dict(seed=0, x_T=torch.zeros(2, 2, 4, 4)), ValueError, "x_T must have the shape"),
        (dict(seed=0, x_T=torch.zeros(SHAPE).bfloat16()), TypeError, "x_T must be torch.float32"),
        (dict(seed=0, x_T=torch.zeros(SHAPE).double()), TypeError, "x_T"),
        (dict(seed=0, x_T=torch.zeros(SHAPE, device="meta")), ValueError, "x_T is on meta"),
        (dict(seed=0, guidance_scale=2.0), ValueError, "captured without guidance"),
        (dict(seed=0, plan=SCHEDULE), TypeError, "plan must be a SolverPlan"),
    ],
)
def test_bad_arguments_are_named_before_anything_runs(call, error, names):
    loop = fd.Sampler(PLANS["ddpm"][0]).capture(lambda x, t: pytest.fail("it ran"), SHAPE)
    refused(loop, error, names, **call)


@pytest.mark.parametrize(
    ("scale", "names"),
    [(torch.ones(3), "one number"), (float("nan"), "finite"), (torch.ones(2), "shape")],
)
def test_a_bad_guidance_scale_is_named(scale, names):
    refused(captured(PLANS["ddim"][0], guidance_scale=2.0), ValueError, names, seed=0,
            guidance_scale=scale)  # fmt: skip


@pytest.mark.parametrize(
    ("plan", "other", "why"),
    [
        ("ddim", fd.solvers.ddim(SCHEDULE, 6), "it has 6 model calls, not 5"),
        ("ddim", fd.solvers.dpm_solver(SCHEDULE, 5), "it has 2 states, not 1"),
        ("ddim", fd.solvers.ddpm(SCHEDULE, 5), "draws a call"),
        ("ddim, eta", fd.solvers.ddim(SCHEDULE, 5, eta=0.5), "call 0 reads"),
        ("ddpm", fd.solvers.ddpm(SCHEDULE, 5, variance="learned_range"), "learns its variance"),
        ("thresholding", fd.solvers.dpm_solver(SCHEDULE, 5, thresholding=(0.9, 1.5)),
         r"thresholding is \(0.9, 1.5\)"),
        ("heun", fd.solvers.heun(SIGMAS, s_churn=3.0), "draws a call|churns"),
        ("flow", fd.solvers.ddim(SCHEDULE, 5, clip=None), "dtype of t"),
        ("langevin", fd.solvers.score_sde_ve(2, sigma_max=5.0, corrector_steps=3), "corrector"),
    ],
)  # fmt: skip
def test_a_plan_of_another_structure_is_refused_with_the_reason(plan, other, why):
    plan = PLANS[plan][0]
    refused(captured(plan, network_of(plan), False), ValueError, why, seed=0, plan=other)


def test_zeros_may_appear_in_a_replay_but_not_vanish(assert_same_bits):
    full = fd.solvers.dpm_solver(SCHEDULE, 5)
    A = full.A.copy()
    A[2, 0, 0] = 0.0
    sparse = fd.SolverPlan("sparse", A, full.x_start, full.t, full.draws)
    assert_same_bits(captured(full)(seed=0, plan=sparse), fd.sample(model, sparse, SHAPE, seed=0))
    A = full.A.copy()
    A[:, 0, 0] = 0.0
    sparse = fd.SolverPlan("sparser", A, full.x_start, full.t, full.draws)
    refused(captured(sparse), ValueError, "call 0 uses a coefficient that was zero", seed=0,
            plan=full)  # fmt: skip


def test_captures_that_cannot_be_are_refused():
    sampler = fd.Sampler(PLANS["ddpm"][0])
    for options, error, names in (
        (dict(generator=torch.Generator()), TypeError, "generator cannot be captured"),
        (dict(noise=lambda i, k: None), TypeError, "noise cannot be captured"),
        (dict(graph=True), ValueError, "graph must not be True on cpu"),
        (dict(dtype=torch.int32), TypeError, "dtype"),
        (dict(model_dtype=torch.int32), TypeError, "model_dtype"),
        (dict(guidance_scale="7"), TypeError, "guidance_scale"),
    ):
        with pytest.raises(error, match=names):
            sampler.capture(model, SHAPE, **options)
    with pytest.raises(TypeError, match="model"):
        sampler.capture(None, SHAPE)
    with pytest.raises(ValueError, match="shape"):
        sampler.capture(model, (0, 3))


def test_copies_from_the_host_are_refused_in_words_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    program.check_not_capturing("on the CPU it is no matter", torch.device("cpu"))
    plan = fd.solvers.ddim(SCHEDULE, 3)
    mode = program.Mode()
    with pytest.raises(RuntimeError, match="run the loop once before"):
        plan.on(torch.device("cuda"), torch.float32, mode)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with contextlib.suppress(RuntimeError, AssertionError):  # no CUDA here
        plan.on(torch.device("cuda"), torch.float32, mode)


@pytest.fixture
def stand_ins(monkeypatch):
    """torch.cuda's graphs replaced by Recording, so that the capture itself runs here."""

    class Graph:
        def replay(self):
            self.recording.replay()

    class Capture:
        def __init__(self, graph, stream):
            assert stream is streams[0] is not current, "not the stream that has warmed up"
            self.graph = graph

        def __enter__(self):
            self.graph.recording = Recording(lambda: None)
            self.graph.recording.__enter__()

        def __exit__(self, *error):
            self.graph.recording.__exit__(*error)

    class Stream:
        def wait_stream(self, other):
            pass

    current, streams = Stream(), []

    def on_stream(stream):
        streams.append(stream)
        return contextlib.nullcontext()

    for name, value in {
        "Stream": Stream, "current_stream": lambda: current, "CUDAGraph": Graph,
        "graph": Capture, "stream": on_stream, "device": lambda _: contextlib.nullcontext(),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)


def test_a_capture_warms_up_records_once_and_then_only_replays(stand_ins, assert_same_bits):
    plan, other = PLANS["unipc"]
    calls = []

    def counted(x, t):
        calls.append(t)
        return model(x, t)

    loop = captured(plan, counted, recorded=False)
    loop._graph = capture._record(loop._body, torch.device("cpu"))
    assert len(calls) == 3 * plan.rows
    for wanted in (other, plan):
        assert_same_bits(loop(seed=3, plan=wanted), fd.sample(model, wanted, SHAPE, seed=3))
    assert len(calls) == 3 * plan.rows


def test_a_model_that_cannot_be_captured_is_told_why(stand_ins):
    calls = []

    def waiting(x, t):
        calls.append(t)
        if len(calls) > 2 * 5:
            raise RuntimeError("operation not permitted when stream is capturing")
        return model(x, t)

    loop = captured(PLANS["ddim"][0], waiting, recorded=False)
    with pytest.raises(RuntimeError, match="the model must not wait for the device") as raised:
        capture._record(loop._body, torch.device("cpu"))
    assert "not permitted" in str(raised.value.__cause__)


# On a GPU, in a process of its own: in this one Triton is its interpreter.


@pytest.mark.gpu
@pytest.mark.parametrize("check", ["replays", "ordinary_loops", "cold_plans"])
def test_on_a_gpu(check):
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    variables["PYTHONPATH"] = str(Path(__file__).parent.parent)
    code = f"from tests import test_capture; test_capture.gpu_{check}()"
    process = subprocess.run(
        [sys.executable, "-c", code], env=variables, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr


@contextlib.contextmanager
def waiting_refused():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def agree(actual, expected):
    return torch.equal(actual.view(torch.int32), expected.view(torch.int32))


def gpu_replays():
    """Replays of a graph take new values, give the bits of sample() and wait for nothing."""
    for kind, (plan, other) in PLANS.items():
        for guidance in (None, 7.5):
            network, options = network_of(plan), dict(device="cuda", model_dtype=torch.bfloat16)
            loop = fd.Sampler(plan).capture(network, SHAPE, guidance_scale=guidance, **options)
            assert loop._graph is not None
            calls = [dict(seed=4), dict(seed=5, sample_offset=3, plan=other), dict(seed=6),
                     dict(seed=7, x_T=fd.randn(SHAPE, 1, device="cuda"))]  # fmt: skip
            if guidance is not None:
                calls[2]["guidance_scale"] = 2.0
            loop(seed=0, plan=other)  # uploads its tables
            with waiting_refused():
                results = [loop(**call) for call in calls]
            for call, result in zip(calls, results, strict=True):
                given = dict(guidance_scale=guidance) | options | call
                wanted = given.pop("plan", plan)
                given |= {} if "x_T" in given else dict(shape=SHAPE)
                assert agree(result, fd.sample(network, wanted, **given)), (kind, call)


def gpu_ordinary_loops():
    """Once warm, sample() waits for nothing and can be captured by its caller."""
    for kind, (plan, _) in PLANS.items():
        network, options = network_of(plan), dict(seed=3, device="cuda", guidance_scale=2.0)
        expected = fd.sample(network, plan, SHAPE, **options)
        with waiting_refused():
            again = fd.sample(network, plan, SHAPE, **options)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            x = fd.sample(network, plan, SHAPE, **options)
        graph.replay()
        assert agree(again, expected) and agree(x, expected), kind


def gpu_cold_plans():
    """What would break a capture says so."""
    plan = fd.solvers.ddim(SCHEDULE, 7)
    fd.randn(SHAPE, 0, device="cuda")
    for options, names in (
        (dict(seed=0), "run the loop once before"),
        (dict(seed=torch.arange(3)), "seed"),
        (dict(seed=0, guidance_scale=torch.ones(3)), "guidance_scale"),
    ):
        with pytest.raises(RuntimeError, match=names), torch.cuda.graph(torch.cuda.CUDAGraph()):
            x_T = torch.empty(SHAPE, device="cuda")
            fd.sample(model, plan, x_T=x_T, **options)
