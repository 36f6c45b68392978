"""Programs: every mode of running a plan gives the same bits, in the least memory and traffic."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiff as fd
from fastdiff.ops.exp import exp
from fastdiff.ops.quantile import threshold_of
from fastdiff.run import Run
from tests.conftest import load_helper

pytestmark = load_helper("scheduler_runs").UPSTREAM_WARNINGS

SHAPE = (2, 2, 3, 5)


def randn(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def random_plan(seed, rows, history, draws, inputs=False, clamp="none", learned=False, c_in=False):
    """Rows that keep, move, save, mix and forget states at random."""
    rng = np.random.default_rng(seed)
    N = 1 + history + inputs
    columns = N + 2 + draws

    def mixed(known, clamped=True):
        row = np.zeros(columns)
        row[:N] = known * rng.uniform(-0.5, 0.5, N) * (rng.random(N) < 0.6)
        row[0] = rng.uniform(0.3, 0.7)
        row[N] = rng.uniform(-0.5, 0.5) * (rng.random() < 0.8)
        row[N + 1] = rng.uniform(0.2, 0.5) * (clamped and clamp != "none" and rng.random() < 0.7)
        row[N + 2 :] = rng.uniform(0.1, 0.4, draws) * (rng.random(draws) < 0.7)
        return row

    A, x_start = np.zeros((rows, N, columns)), np.zeros((rows, columns))
    P = np.zeros((rows, columns - 1))
    known = np.zeros(N, bool)
    known[0] = True
    known[N - inputs :] = True
    for i in range(rows):
        A[i, 0] = mixed(known)
        x_start[i] = mixed(known)
        P[i] = np.delete(mixed(known, clamped=False), N + 1)
        after = known.copy()
        for k in range(1, 1 + history):
            kind = rng.choice(["forget", "keep", "move", "output", "mix", "mix"])
            if kind == "keep" and known[k]:
                A[i, k, k] = 1.0
            elif kind == "move":
                A[i, k, rng.choice(np.flatnonzero(known))] = 1.0
            elif kind == "output":
                A[i, k, N] = 1.0
            elif kind == "mix":
                A[i, k] = mixed(known)
            after[k] = bool(A[i, k].any())
        if inputs:
            A[i, N - 1, N - 1] = 1.0
        known = after
    steps = np.zeros((rows, draws, 2), np.int64)
    steps[:, :, 0] = np.arange(rows)[:, None]
    steps[:, :, 1] = [1, 3][:draws]
    clamped = clamp != "none"
    return fd.SolverPlan(
        name=f"random {seed}", A=A, x_start=x_start, t=np.arange(rows)[::-1], draws=steps,
        P=P if clamped else None, lo=np.full(rows, -0.4) if clamped else None,
        hi=np.full(rows, 0.5) if clamped else None,
        thresholding=(0.6, 1.2) if clamp == "threshold" else None,
        c_in=rng.uniform(0.5, 1.0, rows) if c_in else None, first_c_in=0.7 if c_in else 1.0,
        inputs=("mask",) if inputs else (),
        half_log_variance_min=np.full(rows, -1.0) if learned else None,
        half_log_variance_max=rng.uniform(-0.5, 0.5, rows) if learned else None,
    )  # fmt: skip


PLANS = st.builds(
    random_plan, st.integers(0, 10**6), rows=st.integers(1, 6), history=st.integers(0, 3),
    draws=st.integers(0, 2), inputs=st.booleans(),
    clamp=st.sampled_from(["none", "clamp", "threshold"]), learned=st.booleans(),
    c_in=st.booleans(),
)  # fmt: skip


def network(plan, x, t):
    """The model: any function of (x, t), with a variance where the plan learns it."""
    out = torch.sin(1.3 * x + 0.1 * t.to(x.dtype).view(-1, 1, 1, 1))
    return torch.cat([out, torch.cos(x)], 1) if plan.learned else out


def execute(
    plan, *, backend, dtype=torch.float32, borrow=False, reuse_output=False, guidance=None,
    preview=False, seed=3, **mode,
):  # fmt: skip
    """Copies of x after every step, of the previews, and the tensors that the steps returned."""
    x = randn(*SHAPE, seed=1, dtype=dtype)
    first = x.clone()
    options = dict(guidance_scale=guidance, preview=preview, seed=seed, **mode)
    run = Run(plan, x, backend=backend, borrow=borrow, **options)
    buffer = mask = None
    copies, previews, returned = [], [], []
    for i in range(plan.rows):
        output = network(plan, run.model_input, run.t)
        if reuse_output:
            # The model's one output buffer: everything it returned before is overwritten.
            buffer = output.clone() if buffer is None else buffer.copy_(output)
            output = buffer
        inputs = {}
        if plan.inputs:
            mask = torch.empty(SHAPE, dtype=dtype) if mask is None else mask
            inputs["mask"] = mask.copy_(randn(*SHAPE, seed=70 + i, dtype=dtype))
        given = x if borrow else None
        x = run.step(output, given, **inputs)
        if borrow and i == 0:
            assert torch.equal(given, first)  # never written to
        copies.append(x.clone())
        returned.append(x)
        if preview:
            previews.append(run.x_start.clone())
    return copies, previews, returned


def direct(plan, dtype, guidance=None, seed=3):
    """The plan's definition, state by state, in float64."""
    N = plan.states
    states = [randn(*SHAPE, seed=1, dtype=dtype).double(), *[None] * (N - 1)]
    c_in, results, previews = plan.first_c_in, [], []
    for i in range(plan.rows):
        x = c_in * states[0]
        t = torch.tensor([plan.t[i]])
        output = network(plan, x, t.expand(len(x)))
        o, v = output[:, :2], output[:, 2:] * 0.5 + 0.5
        if guidance is not None:
            o = o + guidance * (o - o)
        z = [
            fd.randn(SHAPE, seed=seed, step=int(step), stream=int(stream)).double()
            for step, stream in plan.draws[i]
        ]
        if plan.learned:
            scale = exp(v * plan.half_log_variance_max[i] + (1 - v) * plan.half_log_variance_min[i])
            z = [scale * one for one in z]
        if plan.inputs:
            states[-1] = randn(*SHAPE, seed=70 + i, dtype=dtype).double()

        def dot(row, values):
            total = torch.zeros(SHAPE, dtype=torch.float64)
            for a, value in zip(row, values, strict=True):
                total = total + a * value if a else total
            return total

        c = None
        if plan.P is not None:
            c = dot(plan.P[i], [*states, o, *z])
            if plan.thresholding is None:
                c = c.clamp(plan.lo[i], plan.hi[i])
            else:
                s = threshold_of(c, *plan.thresholding).double().view(-1, 1, 1, 1)
                c = c.clamp(-s, s) / s
        values = [*states, o, c, *z]
        previews.append(dot(plan.x_start[i], values))
        states = [dot(row, values) if row.any() else None for row in plan.A[i]]
        c_in = 1.0 if plan.c_in is None else plan.c_in[i]
        results.append(states[0])
    return results, previews


MODES = {
    "in place": dict(in_place=True),
    "fresh outputs": dict(outputs_are_fresh=True),
    "fresh outputs, in place": dict(outputs_are_fresh=True, in_place=True),
    "borrowed": dict(borrow=True),
    "borrowed, fresh outputs": dict(borrow=True, outputs_are_fresh=True),
    "preview": dict(preview=True),
    "preview, in place": dict(preview=True, in_place=True),
    "preview, borrowed": dict(preview=True, borrow=True),
    "one output buffer": dict(reuse_output=True),
    "one output buffer, in place": dict(reuse_output=True, in_place=True),
    "one output buffer, borrowed, preview": dict(reuse_output=True, borrow=True, preview=True),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["reference", "native"])
@settings(max_examples=60, deadline=None)
@given(plan=PLANS, guided=st.booleans(), double=st.booleans())
def test_every_mode_gives_the_same_bits(kind, assert_same_bits, plan, guided, double):
    options = dict(backend=kind, guidance=1.7 if guided else None)
    options["dtype"] = torch.float64 if double else torch.float32
    plain, _, _ = execute(plan, **options)
    shown, previews, _ = execute(plan, preview=True, **options)
    assert_same_bits(shown, plain)
    exact, exact_previews = direct(plan, options["dtype"], options["guidance"])
    limit = 1e-12 if double else 2e-5
    for actual, expected in zip([*plain, *previews], [*exact, *exact_previews], strict=True):
        assert (actual.double() - expected).abs().max() <= limit * max(1, expected.abs().max())
    for mode in MODES.values():
        copies, seen, returned = execute(plan, **options, **mode)
        assert_same_bits(copies, plain)
        if seen:
            assert_same_bits(seen, previews)
        if not mode.get("in_place"):  # what steps return is never written to again
            assert_same_bits(returned, plain)


class Allocations(TorchDispatchMode):
    """Counts tensors of at least `size` elements that operations return in new memory."""

    def __init__(self, size):
        super().__init__()
        self.size, self.count = size, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        for value in result if isinstance(result, list | tuple) else [result]:
            if isinstance(value, torch.Tensor) and value.numel() >= self.size:
                self.count += value.untyped_storage().data_ptr() not in known
        return result


def traced(name, steps=12, **config):
    return fd.trace(getattr(diffusers, name)(**config), steps=steps)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("DDIMScheduler", {}),
        ("DPMSolverMultistepScheduler", {}),
        ("DPMSolverMultistepScheduler", dict(solver_order=3)),
        ("UniPCMultistepScheduler", {}),
        ("UniPCMultistepScheduler", dict(solver_order=3)),
        ("HeunDiscreteScheduler", {}),
        ("KDPM2DiscreteScheduler", {}),
        ("PNDMScheduler", dict(skip_prk_steps=True)),
        ("LMSDiscreteScheduler", {}),
        ("DPMSolverSinglestepScheduler", dict(solver_order=3)),
    ],
)
def test_the_steps_of_a_run_in_place_allocate_nothing(name, config):
    check_that_steps_stay_in_memory(traced(name, **config))


@pytest.mark.parametrize("seed", range(8))
def test_the_steps_of_any_run_in_place_allocate_nothing(seed):
    check_that_steps_stay_in_memory(random_plan(seed, rows=40, history=3, draws=1))


def check_that_steps_stay_in_memory(plan):
    run = fd.Sampler(plan).start(randn(*SHAPE), in_place=True, seed=0)
    memory = {t.data_ptr() for t in (run.x, *run.history)}
    assert len(memory) == plan.states
    buffer = randn(*SHAPE, seed=5)
    with Allocations(1) as counted:
        while not run.done:
            run.step(buffer)
            assert {t.data_ptr() for t in (run.x, *run.history)} == memory
    assert counted.count == 0


def sizes(plan, fresh=False):
    return [tuple(map(len, plan.traffic(i, outputs_are_fresh=fresh))) for i in range(plan.rows)]


def test_the_traffic_of_dpm_solver_is_that_counted_by_hand():
    plan = traced("DPMSolverMultistepScheduler")
    assert plan.traffic(0) == (["x", "o"], ["x", "s1"])  # first order; its x_0 is kept
    for i in range(1, 10):
        assert plan.traffic(i) == (["x", "s1", "o"], ["x", "s1"])
    assert plan.traffic(10) == (["x", "s1", "o"], ["x"])  # the last step is of first order
    assert plan.traffic(11) == (["x", "o"], ["x"])
    # x_0 is no tensor that the model made, so nothing is saved when its outputs are fresh.
    assert sizes(plan, fresh=True) == sizes(plan)


def test_the_traffic_of_unipc_is_that_counted_by_hand():
    plan = traced("UniPCMultistepScheduler")
    # x, the model's output, the sample and x_0 of the step before; x, the corrected sample, x_0.
    assert sizes(plan) == [(2, 2), *[(4, 3)] * 8, (4, 2), (3, 1), (2, 1)]
    assert plan.traffic(5) == (["x", "s1", "s2", "o"], ["x", "s1", "s2"])
    # The first sample is its own history and needs no copy; x_0 is made from the output.
    assert sizes(plan, fresh=True)[1:] == sizes(plan)[1:]


def test_the_traffic_of_heun_is_that_counted_by_hand():
    plan = traced("HeunDiscreteScheduler")
    # x + h d / 2 is saved; with epsilon prediction the second half needs no x beside it.
    assert sizes(plan) == [(2, 2), (2, 1)] * 11 + [(2, 1)]
    assert plan.traffic(0) == (["x", "o"], ["x", "s1"])
    assert plan.traffic(1) == (["s1", "o"], ["x"])
    velocity = traced("HeunDiscreteScheduler", prediction_type="v_prediction")
    assert sizes(velocity) == [(2, 2), (3, 1)] * 11 + [(2, 1)]


def test_the_traffic_of_linear_multistep_is_that_counted_by_hand():
    plan = traced("PNDMScheduler", skip_prk_steps=True)
    # Four outputs in (o and three kept), the new one kept: a copy, if the model reuses its buffer.
    assert [plan.traffic(i)[1] for i in range(4, 9)] == [["x", s] for s in ("s2", "s1", "s3") * 2][
        :5
    ]
    assert sizes(plan)[4:9] == [(5, 2)] * 5
    assert sizes(plan, fresh=True)[4:9] == [(5, 1)] * 5
    # Towards the end fewer sums of outputs are needed than outputs.
    assert sizes(plan)[9:] == [(5, 3), (4, 2), (3, 1), (1, 1)]
    kept = traced("LMSDiscreteScheduler")
    assert sizes(kept)[3:9] == [(5, 2)] * 6
