"""How accelerated schedulers behave between the ends of a run: what is refused, what is carried,
what a step launches, and many runs at once. Numbers over whole loops: test_diffusers.py."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import threading

import diffusers
import pytest
import torch

import fastdiff as fd
from fastdiff.integrations.diffusers import accelerate
from tests.conftest import load_helper

dc = load_helper("diffusers_cases")
Operations = load_helper("diffusers_operations").Operations
Case, FP32, FP64, BF16 = dc.Case, dc.FP32, dc.FP64, dc.BF16
pytestmark = [
    *load_helper("scheduler_runs").UPSTREAM_WARNINGS,
    pytest.mark.filterwarnings("ignore:Should have t[ab]"),  # torchsde, of rounded ends
]
SHAPE = dc.SHAPE
# Float32 loops of about ten steps, relative to the largest entry.
CLOSE = dict(rtol=1e-5, atol=1e-5)

DDIM = Case("DDIMScheduler", dict(clip_sample=False))
DDPM = Case("DDPMScheduler")
DPM = Case("DPMSolverMultistepScheduler")
SDE = Case("DPMSolverMultistepScheduler", dict(algorithm_type="sde-dpmsolver++"))
UNIPC = Case("UniPCMultistepScheduler")
EULER_A = Case("EulerAncestralDiscreteScheduler")
FLOW = Case("FlowMatchEulerDiscreteScheduler")
HEUN = Case("HeunDiscreteScheduler")
HISTORY = [DPM, UNIPC, HEUN, Case("LMSDiscreteScheduler"), Case("SASolverScheduler"),
           Case("PNDMScheduler", dict(skip_prk_steps=True))]  # fmt: skip


def pair(case, steps=10, **options):
    """Upstream's scheduler and ours, their timesteps set."""
    schedulers = [case.cls(**case.config), accelerate(case.cls, **options)(**case.config)]
    for scheduler in schedulers:
        scheduler.set_timesteps(steps)
    return schedulers


def assert_near(actual, expected):
    """Relative to the size of the images: samplers over sigma begin with large ones."""
    assert actual.dtype == expected.dtype
    size = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(actual / size, expected / size, **CLOSE)


def noise(seed=0, shape=SHAPE, dtype=FP32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=FP64).to(dtype)


def begin(scheduler, shape=SHAPE, dtype=FP32):
    return noise(0, shape, dtype) * float(getattr(scheduler, "init_noise_sigma", 1.0))


def advance(scheduler, x, t, **options):
    """One step of a pipeline's loop."""
    seen = dc._scaled(scheduler, x, t)
    return scheduler.step(dc.model(seen, t), t, x, return_dict=False, **options)[0]


def loop(scheduler, x=None, timesteps=None, generator=0, **options):
    x = begin(scheduler) if x is None else x
    if dc.takes(scheduler, "generator"):
        options["generator"] = torch.Generator().manual_seed(generator)
    for t in scheduler.timesteps if timesteps is None else timesteps:
        x = advance(scheduler, x, t, **options)
    return x


# What is refused, as upstream refuses it or before anything changes.


@pytest.mark.parametrize("case", [DDIM, DPM, UNIPC, FLOW, EULER_A, HEUN], ids=str)
def test_a_step_before_set_timesteps_raises_what_upstream_raises(case):
    raised = []
    for scheduler in (case.cls(**case.config), accelerate(case.cls)(**case.config)):
        with pytest.raises(Exception) as info:
            scheduler.step(noise(), torch.tensor(999.0 if case is FLOW else 999), noise())
            raise LookupError("this one is accepted before set_timesteps")
        raised.append(info.type)
    assert raised[0] is raised[1]


@pytest.mark.parametrize(
    "name",
    ["EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
     "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"],
)  # fmt: skip
@pytest.mark.parametrize("steps_before", [0, 1, 4])
def test_an_index_for_a_timestep_is_refused_as_upstream_does(name, steps_before):
    upstream, ours = pair(Case(name))
    last = int(upstream.timesteps[0])
    expected, x = loop(upstream), begin(ours)
    upstream.set_timesteps(10)
    generator = torch.Generator().manual_seed(0)
    for i, t in enumerate(ours.timesteps):
        if i == steps_before:
            for timestep in (3, torch.tensor(3), last, torch.tensor(last)):
                messages = []
                for scheduler in (upstream, ours):
                    with pytest.raises(ValueError) as info:
                        scheduler.step(noise(), timestep, noise())
                    messages.append(str(info.value))
                assert messages[0] == messages[1]
        x = advance(ours, x, t, generator=generator)
    assert_near(x, expected)


@pytest.mark.parametrize("case", [DPM, UNIPC, HEUN, SDE], ids=str)
def test_a_wrong_call_in_the_middle_of_a_run_leaves_it_unharmed(case):
    upstream, ours = pair(case)
    expected, x = loop(upstream), begin(ours)
    generator = torch.Generator().manual_seed(0)
    options = {"generator": generator} if dc.takes(ours, "generator") else {}
    for i, t in enumerate(ours.timesteps):
        if i in (3, 4):
            state = generator.get_state()
            index = ours.step_index
            for output, sample, named in (
                (noise(shape=(2, 3, 6, 4)), x, "output"),
                (noise(shape=(1, 3, 6, 5)), x, "output"),
                (noise(), x[:1], "x|sample|output"),
                (noise(shape=(1, 3, 6, 5)), x[:1], "x|sample|output"),
                (torch.ones(SHAPE, dtype=torch.int64), x, "output"),
                (noise(dtype=FP64), x, "output"),
                (noise().to("meta"), x, "output"),
            ):
                with pytest.raises((ValueError, TypeError), match=named):
                    ours.step(output, t, sample, **options)
            assert torch.equal(generator.get_state(), state) and ours.step_index == index
        x = advance(ours, x, t, **options)
    assert_near(x, expected)


@pytest.mark.parametrize("skip_prk_steps", [True, False])
def test_reordered_timesteps_with_history_raise_before_anything_changes(skip_prk_steps):
    """Of PNDM; the other schedulers with history count their steps, whatever is passed."""
    upstream, ours = pair(Case("PNDMScheduler", dict(skip_prk_steps=skip_prk_steps)))
    expected, x = loop(upstream), begin(ours)
    for i, t in enumerate(ours.timesteps):
        if i == 4:
            with pytest.raises(ValueError, match="order of set_timesteps"):
                ours.step(noise(), ours.timesteps[8], x)
        x = advance(ours, x, t)
    assert_near(x, expected)


@pytest.mark.parametrize("case", [DPM, HEUN, UNIPC], ids=str)
def test_schedulers_that_count_ignore_the_timestep_as_upstream_does(case):
    upstream, ours = pair(case)
    order = [0, 5, 5, 2, 9, 1, 3, 7, 8, 4]
    results = []
    for scheduler in (upstream, ours):
        timesteps = [scheduler.timesteps[k] for k in order]
        x = begin(scheduler)
        for t in timesteps:
            x = scheduler.step(dc.model(x, t), t, x, return_dict=False)[0]
        results.append(x)
    assert_near(results[1], results[0])


# Schedulers without memory.


@pytest.mark.parametrize("case", [DDIM, DDPM, Case("DDIMParallelScheduler")], ids=str)
def test_memoryless_schedulers_take_any_timestep_in_any_order(case):
    upstream, ours = pair(case)
    values = [900, 900, 300, torch.tensor(500), 0, ours.timesteps[4]]
    if case is not DDPM:  # that one looks for them in its timesteps
        values += [123, 7, 999]
    results = [loop(s, timesteps=values) for s in (upstream, ours)]
    assert_near(results[1], results[0])


def test_arguments_may_change_from_step_to_step_without_memory():
    upstream, ours = pair(DDIM)
    results = []
    for scheduler in (upstream, ours):
        x, generator = begin(scheduler), torch.Generator().manual_seed(1)
        for i, t in enumerate(scheduler.timesteps):
            options = dict(eta=0.1 * i, use_clipped_model_output=bool(i % 3 == 1))
            x = advance(scheduler, x, t, generator=generator, **options)
        results.append(x)
    assert_near(results[1], results[0])


def test_batches_may_change_from_step_to_step_without_memory():
    upstream, ours = pair(EULER_A)
    results = []
    for scheduler in (upstream, ours):
        x, generator = begin(scheduler), torch.Generator().manual_seed(1)
        for i, t in enumerate(scheduler.timesteps):
            x = torch.cat([x, x]) if i == 3 else x[:1] if i == 7 else x
            x = advance(scheduler, x, t, generator=generator)
        results.append(x)
    assert results[0].shape[0] == 1
    assert_near(results[1], results[0])


# Beginning a run.


@pytest.mark.parametrize("case", dc.SEVERAL, ids=str)
def test_set_timesteps_forgets_a_run_and_shape_dtype_and_steps_may_differ(case):
    upstream, ours = pair(case, 12)
    x = begin(ours)
    for t in list(ours.timesteps)[:5]:
        x = advance(ours, x, t)
    for steps, shape, dtype in ((9, (1, 3, 4, 4), FP64), (12, SHAPE, FP32), (7, (4, 2, 8), FP32)):
        results = []
        for scheduler in (upstream, ours):
            torch.manual_seed(5)  # of Brownian trees
            scheduler.set_timesteps(steps)
            if hasattr(scheduler, "noise_sampler"):
                scheduler.noise_sampler = None  # upstream keeps one for the old shape
            results.append(loop(scheduler, begin(scheduler, shape, dtype), **case.options))
        assert_near(results[1], results[0])


@pytest.mark.parametrize("first", [0, 4, 8])
@pytest.mark.parametrize("case", [DPM, UNIPC, FLOW, HEUN, EULER_A, DDIM], ids=str)
def test_a_run_may_begin_in_the_middle(case, first):
    results = []
    for begin_index in (True, False):
        upstream, ours = pair(case)
        for scheduler in (upstream, ours):
            if begin_index and hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(first)
            results.append(loop(scheduler, noise(), scheduler.timesteps[first:]))
            if hasattr(scheduler, "begin_index") and begin_index:
                assert scheduler.begin_index == first
    assert_near(results[1], results[0])
    assert_near(results[3], results[2])


# Noise.


@pytest.mark.parametrize("case", [DDPM, SDE, EULER_A, Case("LCMScheduler")], ids=str)
def test_generators_one_a_sample_draw_as_upstream_does(case):
    results = []
    for scheduler in pair(case):
        generators = [torch.Generator().manual_seed(k) for k in (3, 4)]
        x = begin(scheduler)
        for t in scheduler.timesteps:
            x = advance(scheduler, x, t, generator=generators)
        results.append((x, [g.get_state() for g in generators]))
    assert_near(results[1][0], results[0][0])
    for mine, theirs in zip(results[1][1], results[0][1], strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    "case", [Case("DDIMScheduler", {}, options=dict(eta=1.0)), SDE], ids=str
)  # fmt: skip
def test_variance_noise_is_used_as_given(case):
    upstream, ours = pair(case)
    results = []
    for scheduler in (upstream, ours):
        x = begin(scheduler)
        for i, t in enumerate(scheduler.timesteps):
            x = advance(scheduler, x, t, variance_noise=noise(100 + i), **case.options)
        results.append(x)
    assert_near(results[1], results[0])
    with pytest.raises(ValueError, match="variance_noise"):
        fresh = pair(DDIM)[1]
        fresh.step(noise(), fresh.timesteps[0], noise(), eta=1.0, variance_noise=noise(),
                   generator=torch.Generator())  # fmt: skip


SEEDED = [
    DDPM,
    SDE,
    EULER_A,
    Case("LCMScheduler"),
    Case("SASolverScheduler"),
    Case("KDPM2AncestralDiscreteScheduler"),
    Case("CosineDPMSolverMultistepScheduler"),
]


@pytest.mark.parametrize("case", SEEDED, ids=str)
def test_seeded_noise_does_not_depend_on_the_batch(case):
    def run(x, **options):
        return loop(pair(case, **options)[1], x)

    x = begin(pair(case)[1], (4, 3, 4, 4))
    whole = run(x, seed=11)
    assert torch.equal(run(x[2:], seed=11, sample_offset=2), whole[2:])
    assert not torch.equal(run(x[2:], seed=11), whole[2:])
    seeds = torch.tensor([5, 6, 7, 8])
    each = run(x, seed=seeds)
    assert torch.equal(run(x[[2]], seed=seeds[2:3]), each[[2]])
    assert torch.equal(run(x[[1, 3]], seed=seeds[[1, 3]]), each[[1, 3]])


@pytest.mark.parametrize("case", dc.SEVERAL, ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_the_reference_backend_gives_the_same_bits(case, dtype, assert_same_bits):
    def run(backend):
        ours = pair(case, seed=3, backend=backend)[1]
        return loop(ours, begin(ours, dtype=dtype), **case.options)

    assert_same_bits(run("native"), run("reference"))


# What upstream's step must do itself.


def test_a_tensor_as_an_extra_argument_runs_upstreams_step_and_says_so_once(caplog):
    upstream, ours = pair(FLOW)
    x = noise(shape=(2, 6, 4))
    tokens = ours.timesteps[:1].expand(2, 6).clone()
    with caplog.at_level(logging.WARNING, "fastdiff"):
        results = [
            [s.step(noise(9, (2, 6, 4)), s.timesteps[0], x, per_token_timesteps=tokens)[0]
             for _ in range(3)][-1]
            for s in (upstream, ours)
        ]  # fmt: skip
    assert torch.equal(results[0], results[1])
    said = [r for r in caplog.records if "per_token_timesteps" in r.getMessage()]
    assert len(said) == 1


class Halved(diffusers.DPMSolverMultistepScheduler):
    """Affine: is traced through."""

    def convert_model_output(self, model_output, *args, **kwargs):
        return super().convert_model_output(0.5 * model_output, *args, **kwargs)


@pytest.mark.parametrize(
    "case",
    [DDIM, *HISTORY, Case("LCMScheduler"), Case("KDPM2DiscreteScheduler")],
    ids=lambda case: case.name,
)
def test_what_a_run_leaves_behind_does_not_cost_a_second_trace(case):
    scheduler, plans = accelerate(case.cls(**case.config)), []
    for _ in range(2):
        scheduler.set_timesteps(7)
        loop(scheduler)
        plans.append(dc.plan_of(scheduler))
    assert plans[0] is not None and plans[0] is plans[1]


class Squashed(diffusers.DPMSolverMultistepScheduler):
    """Not affine: runs upstream's own step."""

    def convert_model_output(self, model_output, *args, **kwargs):
        return torch.tanh(super().convert_model_output(model_output, *args, **kwargs))


def test_a_subclass_is_traced_through(caplog):
    with caplog.at_level(logging.WARNING, "fastdiff"):
        upstream, ours = Halved(), accelerate(Halved())
        results = []
        for scheduler in (upstream, ours):
            scheduler.set_timesteps(10)
            results.append(loop(scheduler))
    assert_near(results[1], results[0])
    assert dc.plan_of(ours) is not None and not caplog.records
    plain = DPM.cls()
    plain.set_timesteps(10)
    assert not torch.allclose(loop(plain), results[0], rtol=1e-2)


def test_a_subclass_that_is_not_affine_runs_its_own_step_and_says_so_once(caplog):
    upstream, ours = Squashed(), accelerate(Squashed())
    with caplog.at_level(logging.WARNING, "fastdiff"):
        for _ in range(2):
            results = []
            for scheduler in (upstream, ours):
                scheduler.set_timesteps(10)
                results.append(loop(scheduler))
            assert torch.equal(results[1], results[0])
    assert len(caplog.records) == 1 and "tanh" in caplog.records[0].getMessage()


# Attributes that people read between steps.

KEPT = ("model_outputs", "last_sample", "ets", "step_index", "lower_order_nums", "counter",
        "state_in_first_order", "sample", "begin_index", "num_inference_steps", "this_order",
        "prev_derivative", "derivatives", "cur_sample")  # fmt: skip


@pytest.mark.parametrize("case", dc.SEVERAL, ids=str)
def test_attributes_read_between_steps_are_upstreams(case):
    upstream, ours = pair(case)
    xs = [begin(s, dtype=FP64) for s in (upstream, ours)]
    generators = [torch.Generator().manual_seed(0) for _ in xs]
    if hasattr(ours, "noise_sampler"):
        pytest.skip("Brownian trees are made of the global generator")
    compared = 0
    for t in upstream.timesteps[:-1]:
        for k, scheduler in enumerate((upstream, ours)):
            options = dict(case.options)
            if dc.takes(scheduler, "generator"):
                options["generator"] = generators[k]
            xs[k] = advance(scheduler, xs[k], t, **options)
        for name in KEPT:
            if not hasattr(upstream, name):
                continue
            compared += same_where_carried(ours, upstream, name)
    assert compared


def same_where_carried(ours, upstream, name):
    """Number of tensors and numbers compared; reading what the plan does not need says so."""
    theirs = getattr(upstream, name)
    if isinstance(theirs, list):
        mine, compared = getattr(ours, name), 0
        assert len(mine) == len(theirs), name
        for k, item in enumerate(theirs):
            try:
                compared += same(mine[k], item, name)
            except AttributeError as error:
                assert "not carried" in str(error), name
        return compared
    try:
        return same(getattr(ours, name), theirs, name)
    except AttributeError as error:
        assert "not carried" in str(error), name
        return 0


@pytest.mark.parametrize(
    "case",
    [DPM, SDE, Case("EDMDPMSolverMultistepScheduler"), Case("DEISMultistepScheduler")],
    ids=str,
)
def test_the_last_model_output_can_be_read_all_the_time(case):
    upstream, ours = pair(case)
    x, generators = begin(ours, dtype=FP64), [torch.Generator().manual_seed(0) for _ in range(2)]
    for t in ours.timesteps[:-2]:  # the last but one step needs no history after it
        options = [{"generator": g} if dc.takes(ours, "generator") else {} for g in generators]
        advance(upstream, x, t, **options[0])
        x = advance(ours, x, t, **options[1])
        assert_near(ours.model_outputs[-1], upstream.model_outputs[-1])
    with pytest.raises(AttributeError, match="not carried"):
        list(ours.model_outputs)


def same(mine, theirs, name):
    """Number of tensors compared."""
    if isinstance(theirs, list):
        assert len(mine) == len(theirs), name
        return sum(same(a, b, name) for a, b in zip(mine, theirs, strict=True))
    if isinstance(theirs, torch.Tensor) and theirs.dim():
        # Upstream's own tables and casts are float32.
        torch.testing.assert_close(mine.double(), theirs.double(), rtol=1e-5, atol=1e-5, msg=name)
        return 1
    assert (mine is None) == (theirs is None), name
    assert mine == theirs, name
    return 1


# Tensors of all kinds.


@pytest.mark.parametrize("case", [DDIM, DPM, UNIPC, FLOW, DDPM], ids=str)
def test_gradients_pass_through_a_step(case):
    grads = []
    for scheduler in pair(case):
        weight = torch.tensor(0.7, requires_grad=True)
        x, generator = begin(scheduler), torch.Generator().manual_seed(0)
        options = {"generator": generator} if dc.takes(scheduler, "generator") else {}
        for t in scheduler.timesteps[:4]:
            x = scheduler.step(weight * torch.tanh(x), t, x, return_dict=False, **options)[0]
        x.square().mean().backward()
        grads.append(weight.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", [DDIM, DPM, UNIPC, FLOW, DDPM, HEUN], ids=str)
def test_inference_mode_and_layouts_do_not_change_the_bits(case, assert_same_bits):
    plain = loop(pair(case, seed=1)[1])
    with torch.inference_mode():
        assert_same_bits(loop(pair(case, seed=1)[1]).clone(), plain)
    ours = pair(case, seed=1)[1]
    x = begin(ours).to(memory_format=torch.channels_last)
    for t in ours.timesteps:
        output = dc.model(dc._scaled(ours, x, t), t)
        spread = torch.empty(*SHAPE, 2)[..., 0].copy_(output)  # every other element
        x = ours.step(spread, t, x, return_dict=False)[0]
        assert x.shape == SHAPE
    assert_same_bits(x.contiguous(), plain)


@pytest.mark.parametrize("case", dc.SEVERAL, ids=str)
def test_float32_latents_cost_one_rounding(case):
    """16-bit samples kept in float32: nearer to float64 than without by more than twice, where the
    model sees the rounding of its input only."""
    case = dataclasses.replace(case, dtypes=(BF16, BF16), steps=30)
    upstream, reference = dc.upstream_and_reference(case)
    ours = dc.run(case, accelerate(case.cls, float32_latents=True), reuse=True)
    assert ours.error is None and ours.kinds == upstream.kinds
    error = dc.rms(ours.x.double() - reference.x)
    assert error <= dc.rms(upstream.x.double() - reference.x)
    plain = dc.run(case, accelerate(case.cls))
    assert error <= 1.2 * dc.rms(plain.x.double() - reference.x)


@pytest.mark.parametrize("case", [DPM, UNIPC, HEUN, *HISTORY[3:]], ids=str)
def test_outputs_that_stay_are_kept_and_not_copied(case, assert_same_bits):
    copied, kept = pair(case)[1], pair(case, outputs_are_fresh=True)[1]
    assert_same_bits(loop(kept), loop(copied))


# Launches.


@pytest.mark.parametrize("seeded", [True, False], ids=["seed", "generator"])
@pytest.mark.parametrize(("case", "draws"), dc.TOP, ids=str)
def test_a_step_is_one_operation_and_no_copy(case, draws, seeded):
    ours = pair(case, 12, **({"seed": 0} if seeded else {}))[1]
    if hasattr(ours, "set_begin_index"):
        ours.set_begin_index(0)
    options = dict(case.options)
    if dc.takes(ours, "generator"):
        options["generator"] = torch.Generator().manual_seed(0)
    x, counted = begin(ours), 0
    for i, t in enumerate(ours.timesteps):
        output = dc.model(x, t, case.learned)
        drawn = options["generator"].get_state() if "generator" in options else None
        with torch.no_grad(), Operations() as seen:
            x = ours.step(output, t, x, return_dict=False, **options)[0]
        if i == 0:
            continue
        steps = [name for name in seen.names if name.startswith("fastdiff")]
        others = [name for name in seen.names if not name.startswith("fastdiff")]
        assert len(steps) == 1, seen.names
        noise_drawn = drawn is not None and not torch.equal(options["generator"].get_state(), drawn)
        assert others == (["aten.randn"] if noise_drawn else [])
        counted += noise_drawn
    assert bool(counted) == (draws and not seeded)


# Many runs at once.


def test_threads_with_schedulers_of_one_class_do_not_disturb_each_other():
    jobs = [(case, steps, seed) for case in (DPM, UNIPC, DDPM, SDE, HEUN) for steps, seed in
            ((6, 1), (9, 2))]  # fmt: skip
    expected = [loop(pair(case, steps)[0], generator=seed) for case, steps, seed in jobs]
    got, barrier = [None] * len(jobs), threading.Barrier(len(jobs))

    def work(k):
        case, steps, seed = jobs[k]
        barrier.wait()
        for _ in range(3):
            got[k] = loop(pair(case, steps)[1], generator=seed)

    run_all(work, len(jobs))
    for mine, theirs in zip(got, expected, strict=True):
        assert_near(mine, theirs)


def run_all(work, count):
    failures = []

    def guarded(k):
        try:
            work(k)
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=guarded, args=(k,)) for k in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_threads_share_one_plan(assert_same_bits):
    sampler = fd.Sampler(fd.trace(SDE.cls(**SDE.config), steps=10))
    jobs = [(seed, shape, dtype) for seed in (1, 2) for shape in (SHAPE, (1, 7)) for dtype in
            (FP32, FP64, BF16)]  # fmt: skip

    def model(x, t):
        return torch.tanh(x)

    expected = [sampler(model, shape, seed=s, dtype=d) for s, shape, d in jobs]
    got, barrier = [None] * len(jobs), threading.Barrier(len(jobs))

    def work(k):
        seed, shape, dtype = jobs[k]
        barrier.wait()
        for _ in range(3):
            got[k] = sampler(model, shape, seed=seed, dtype=dtype)

    run_all(work, len(jobs))
    assert_same_bits(got, expected)


def test_tasks_interleave_their_steps():
    cases = [DPM, UNIPC, DDPM, SDE, HEUN, DPM]
    expected = [loop(pair(case)[0], generator=k) for k, case in enumerate(cases)]

    async def task(k, case):
        ours = pair(case)[1]
        x, generator = begin(ours), torch.Generator().manual_seed(k)
        options = {"generator": generator} if dc.takes(ours, "generator") else {}
        for t in ours.timesteps:
            x = advance(ours, x, t, **options)
            await asyncio.sleep(0)
        return x

    async def every():
        return await asyncio.gather(*(task(k, case) for k, case in enumerate(cases)))

    for mine, theirs in zip(asyncio.run(every()), expected, strict=True):
        assert_near(mine, theirs)
