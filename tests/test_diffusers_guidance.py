"""accelerate(guidance_scale=, model_dtype=): what stands around the model, in the step's pass.

The usual loop is the one of pipelines: the sample twice, scale_model_input, the model, guidance,
step; with a model dtype the model alone is in it.
"""

from __future__ import annotations

import copy
import dataclasses
import pickle

import diffusers
import pytest
import torch

from fastdiff.integrations.diffusers import accelerate
from tests.conftest import load_helper

dc = load_helper("diffusers_cases")
Operations = load_helper("diffusers_operations").Operations
Case, FP32, FP64, BF16, SHAPE = dc.Case, dc.FP32, dc.FP64, dc.BF16, dc.SHAPE
pytestmark = [
    *load_helper("scheduler_runs").UPSTREAM_WARNINGS,
    pytest.mark.filterwarnings("ignore:Should have t[ab]"),  # torchsde, of rounded ends
]
G = 3.7
# Float32 loops of ten steps, relative to the largest entry; guidance makes a rounding G times it.
CLOSE = 2e-5

CASES = [
    Case("DDIMScheduler"),
    Case("DDIMScheduler", dict(clip_sample=False), options=dict(eta=0.5)),
    Case("DDPMScheduler"),
    Case("EulerDiscreteScheduler"),
    Case("EulerAncestralDiscreteScheduler"),
    Case("HeunDiscreteScheduler"),
    Case("LMSDiscreteScheduler"),
    Case("PNDMScheduler", dict(skip_prk_steps=True)),
    Case("DPMSolverMultistepScheduler"),
    Case("DPMSolverMultistepScheduler", dict(algorithm_type="sde-dpmsolver++")),
    Case("UniPCMultistepScheduler"),
    Case("FlowMatchEulerDiscreteScheduler"),
    Case("FlowMatchHeunDiscreteScheduler"),
    Case("EDMEulerScheduler"),
    Case("LCMScheduler"),
    Case("DPMSolverSDEScheduler", dict(noise_sampler_seed=3)),
]
LEARNED = Case("DDPMScheduler", dict(variance_type="learned_range"), learned=True)
THRESHOLDED = Case("DDPMScheduler", dict(thresholding=True))
EULER, UNIPC, DDIM = CASES[3], CASES[10], CASES[0]


def model(x, t, copies=1, learned=False):
    """A smooth model whose two halves see different conditions."""
    wide = x.double()
    batch = len(x) // copies
    condition = torch.arange(len(x), dtype=FP64) // batch
    shift = (0.4 * condition).reshape(-1, *[1] * (x.dim() - 1))
    out = torch.tanh(wide * 0.7 + 0.1 * torch.sin(2 * wide.roll(1, -1)) + shift + float(t) / 3000)
    if learned:
        out = torch.cat([out, torch.cos(3 * wide + shift)], 1)
    return out.to(x.dtype)


def begin(scheduler, dtype=FP32, latent=0):
    return dc.start(scheduler, dtype, latent)


def drawn(scheduler, case):
    options = dict(case.options)
    if dc.takes(scheduler, "generator"):
        options["generator"] = torch.Generator().manual_seed(5)
    return options


def usual(case, dtype=FP32, guidance=G, model_dtype=None, edit=None, latent=0):
    """The loop that people write around upstream's scheduler."""
    scheduler = case.cls(**case.config)
    scheduler.set_timesteps(case.steps)
    x, options = begin(scheduler, dtype, latent), drawn(scheduler, case)
    copies = 1 if guidance is None else 2
    if isinstance(guidance, torch.Tensor):
        guidance = guidance.to(dtype).reshape(-1, 1, 1, 1)
    for i, t in enumerate(scheduler.timesteps):
        seen = dc._scaled(scheduler, torch.cat([x] * copies), t).to(model_dtype or dtype)
        o = model(seen, t, copies, case.learned).to(dtype)
        if copies == 2:
            uncond, cond = o.chunk(2)
            o = uncond + guidance * (cond - uncond)
            if case.learned:
                o = torch.cat([o[:, :3], cond[:, 3:]], 1)
        x = scheduler.step(o, t, x, return_dict=False, **options)[0]
        assert x.dtype == dtype
        x = x if edit is None else edit(i, x)
    return x


def ours(case, **options):
    scheduler = accelerate(case.cls, **options)(**case.config)
    scheduler.set_timesteps(case.steps)
    return scheduler


def fused(
    case, dtype=FP32, guidance=G, model_dtype=None, edit=None, latent=0, scheduler=None, **options
):
    """The loop that accelerate() leaves over."""
    if scheduler is None:
        scheduler = ours(case, guidance_scale=guidance, model_dtype=model_dtype, **options)
    x, given = begin(scheduler, dtype, latent), drawn(scheduler, case)
    copies = 1 if guidance is None else 2
    for i, t in enumerate(scheduler.timesteps):
        seen = scheduler.scale_model_input(x, t)
        assert seen.shape == (copies * SHAPE[0], *SHAPE[1:])
        assert seen.dtype == (model_dtype or dtype)
        output = model(seen, t, copies, case.learned)
        x = scheduler.step(output, t, x, return_dict=False, **given)[0]
        assert x.dtype == dtype and x.shape == SHAPE
        x = x if edit is None else edit(i, x)
    return x


def assert_near(actual, expected, close=CLOSE):
    assert actual.dtype == expected.dtype
    assert float((actual - expected).abs().max()) <= close * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("case", [*CASES, LEARNED, THRESHOLDED], ids=str)
def test_guidance_gives_the_samples_of_the_usual_loop(case):
    torch.manual_seed(2)
    expected = usual(case)
    torch.manual_seed(2)
    scheduler = ours(case, guidance_scale=G)
    assert_near(fused(case, scheduler=scheduler), expected)
    assert dc.plan_of(scheduler) is not None
    assert not torch.allclose(usual(case, guidance=1.0), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("case", [DDIM, EULER, UNIPC, CASES[11], CASES[5]], ids=str)
def test_a_guidance_scale_for_each_sample(case):
    scales = torch.tensor([1.5, 6.0])
    actual = fused(case, guidance=scales)
    assert_near(actual, usual(case, guidance=scales))
    scalar = fused(case, guidance=6.0)
    assert torch.equal(actual[1], scalar[1]) and not torch.equal(actual[0], scalar[0])


def errors(case, dtype, guidance, model_dtype):
    """Rms errors of the usual loop and of the fused one against float64, over several samples."""
    sums = [0.0, 0.0]
    for latent in range(4):
        exact = usual(case, FP64, guidance, latent=latent)
        for k, loop in enumerate((usual, fused)):
            actual = loop(case, dtype, guidance, model_dtype, latent=latent)
            sums[k] += dc.rms(actual - exact) ** 2
    return [value**0.5 for value in sums]


DETERMINISTIC = [
    case for case in CASES
    if case.name in ("EulerDiscreteScheduler", "HeunDiscreteScheduler", "UniPCMultistepScheduler",
                     "FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepScheduler")
    and "algorithm_type" not in case.config
] + [DDIM]  # fmt: skip


@pytest.mark.parametrize("guidance", [G, None])
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("case", DETERMINISTIC, ids=str)
def test_low_precision_is_at_least_as_exact_as_the_usual_loop(case, dtype, guidance):
    theirs, mine = errors(case, dtype, guidance, BF16)
    # The model's own rounding is the most of it in float32 samples; it differs from run to run.
    assert 0 < mine <= 1.25 * theirs


@pytest.mark.parametrize("case", DETERMINISTIC, ids=str)
def test_float32_samples_around_a_bfloat16_model_lose_less_than_bfloat16_samples(case):
    assert errors(case, FP32, G, BF16)[1] < errors(case, BF16, G, BF16)[1]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_random_draws_are_those_of_the_usual_loop_in_the_models_dtype(case):
    """Float32 samples around a bfloat16 model: nothing but the model is in bfloat16."""
    torch.manual_seed(2)
    expected = usual(case, FP32, G, BF16)
    torch.manual_seed(2)
    actual = fused(case, FP32, G, BF16)
    # An input at the middle between two bfloat16 numbers may be rounded either way.
    assert dc.rms(actual - expected) <= 0.02 * max(1.0, dc.rms(expected))


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("case", [EULER, UNIPC, CASES[5], CASES[9], LEARNED], ids=str)
def test_the_input_written_by_a_step_has_the_bits_of_the_one_made_by_torch(
    case, backend, assert_same_bits
):
    """A sample that is edited, in place or replaced by a copy, is the one the model sees."""
    options = dict(guidance=G, model_dtype=BF16, seed=4, backend=backend)
    plain = fused(case, **options)
    assert_same_bits(fused(case, edit=lambda i, x: x.clone(), **options), plain)
    assert_same_bits(fused(case, edit=lambda i, x: x.mul_(1.0), **options), plain)


def halved(i, x):
    if i in (2, 5):
        x[:, 0].mul_(0.5)
    return x


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("guidance", [G, None])
@pytest.mark.parametrize("case", [DDIM, EULER, UNIPC, CASES[11], CASES[5]], ids=str)
def test_samples_edited_in_place_are_taken_as_they_are(case, guidance, inference):
    expected = usual(case, guidance=guidance, edit=halved)
    with torch.inference_mode(inference):
        actual = fused(case, guidance=guidance, model_dtype=FP32, edit=halved).clone()
    assert_near(actual, expected)
    assert not torch.allclose(usual(case, guidance=guidance), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("case", [EULER, UNIPC], ids=str)
def test_float32_latents_see_edits_in_place_under_inference_mode(case):
    def loop(edit):
        scheduler = ours(case, float32_latents=True)
        x = begin(scheduler, BF16)
        for i, t in enumerate(scheduler.timesteps):
            x = scheduler.step(model(x, t), t, x, return_dict=False)[0]
            x = edit(i, x)
        return x.clone()

    expected = loop(halved)
    with torch.inference_mode():
        assert torch.equal(loop(halved), expected)
    assert not torch.equal(loop(lambda i, x: x), expected)


def test_a_model_input_is_the_callers():
    """Steps leave it as it is, and what the caller writes to it reaches no later one."""
    scheduler = ours(EULER, guidance_scale=G, model_dtype=BF16)
    x, kept = begin(scheduler), []
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t)
        kept.append((seen, seen.clone()))
        x = scheduler.step(model(seen, t, 2), t, x, return_dict=False)[0]
    assert all(torch.equal(seen, copied) for seen, copied in kept)
    assert_near(x, fused(EULER, FP32, G, BF16), 0.0)
    scheduler.set_timesteps(4)
    x = begin(scheduler)
    x = scheduler.step(model(torch.cat([x, x]), 0, 2), scheduler.timesteps[0], x)[0]
    t = scheduler.timesteps[1]
    first = scheduler.scale_model_input(x, t)
    copied = first.clone()
    first.zero_()
    assert torch.equal(scheduler.scale_model_input(x, t), copied)


# Launches.


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("case", [*CASES[:-1], LEARNED], ids=str)
def test_a_step_and_the_next_model_input_are_one_operation(case, inference):
    scheduler = ours(case, guidance_scale=G, model_dtype=BF16, seed=0)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    x = begin(scheduler)
    seen = scheduler.scale_model_input(x, scheduler.timesteps[0])
    with torch.inference_mode(inference), torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            output = model(seen, t, 2, case.learned)
            with Operations() as dispatched:
                x = scheduler.step(output, t, x, return_dict=False, **case.options)[0]
                if i + 1 < len(scheduler.timesteps):
                    seen = scheduler.scale_model_input(x, scheduler.timesteps[i + 1])
            if i:
                assert dispatched.names == ["fastdiff_native.step"]


# Upstream's own step, and steps that are plans of their own.


class Squashed(diffusers.EulerDiscreteScheduler):
    """Not affine: runs upstream's own step."""

    def step(self, model_output, timestep, sample, return_dict=True):
        return super().step(torch.tanh(model_output), timestep, sample, return_dict=return_dict)


@pytest.mark.parametrize("scales", [G, torch.tensor([1.5, 6.0])], ids=["one", "each"])
@pytest.mark.parametrize("dtype", [FP32, FP64])
def test_upstreams_own_step_gets_guided_outputs(dtype, scales, monkeypatch):
    monkeypatch.setattr(diffusers, "SquashedScheduler", Squashed, raising=False)
    case = Case("SquashedScheduler")
    expected = usual(case, dtype, scales)
    scheduler = ours(case, guidance_scale=scales)
    actual = fused(case, dtype, scales, scheduler=scheduler)
    assert dc.plan_of(scheduler) is None and "tanh" in dc.reason_of(scheduler)
    # The scale is a float32, as inside of a step.
    assert_near(actual, expected, CLOSE if dtype == FP32 else 1e-6)


class SquashedDDPM(diffusers.DDPMScheduler):
    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        return super().step(torch.tanh(model_output), timestep, sample, generator, return_dict)


def test_upstreams_own_step_gets_the_variance_of_the_conditional_half(monkeypatch):
    monkeypatch.setattr(diffusers, "SquashedDDPM", SquashedDDPM, raising=False)
    case = dataclasses.replace(LEARNED, name="SquashedDDPM")
    scheduler = ours(case, guidance_scale=G)
    assert_near(fused(case, scheduler=scheduler), usual(case))
    assert dc.plan_of(scheduler) is None and "tanh" in dc.reason_of(scheduler)


def test_float64_samples_around_a_float32_model():
    scheduler = ours(EULER, guidance_scale=G, model_dtype=FP32)
    actual = fused(EULER, FP64, G, FP32, scheduler=scheduler)
    assert dc.plan_of(scheduler) is None and "float64" in dc.reason_of(scheduler)
    assert_near(actual, usual(EULER, FP64, G, FP32), 1e-6)


def test_steps_that_are_plans_of_their_own_are_guided():
    """CogVideoXDPM is handed its history by the caller."""
    results = []
    for make in (diffusers.CogVideoXDPMScheduler,
                 accelerate(diffusers.CogVideoXDPMScheduler, guidance_scale=G)):  # fmt: skip
        scheduler = make()
        scheduler.set_timesteps(8)
        x, old, ts = begin(scheduler), None, list(scheduler.timesteps)
        generator = torch.Generator().manual_seed(1)
        for i, t in enumerate(ts):
            if results:
                output = model(scheduler.scale_model_input(x, t), t, 2)
            else:
                uncond, cond = model(torch.cat([x, x]), t, 2).chunk(2)
                output = uncond + G * (cond - uncond)
            x, old = scheduler.step(
                output, old, t, ts[i - 1] if i else None, x, generator=generator, return_dict=False
            )
        results.append(x)
    assert_near(results[1], results[0])


# Copies, another scale, errors.


@pytest.mark.parametrize("how", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
@pytest.mark.parametrize("case", [EULER, UNIPC, CASES[5]], ids=str)
def test_a_copy_goes_on_from_the_middle(case, how):
    scheduler = ours(case, guidance_scale=torch.tensor([1.5, 6.0]), model_dtype=BF16)
    x = begin(scheduler)
    for i, t in enumerate(scheduler.timesteps):
        if i == 4:
            copied, y = how(scheduler), x
        x = scheduler.step(model(scheduler.scale_model_input(x, t), t, 2), t, x, return_dict=False)[
            0
        ]
    for t in scheduler.timesteps[4:]:
        y = copied.step(model(copied.scale_model_input(y, t), t, 2), t, y, return_dict=False)[0]
    assert torch.equal(x, y)


def test_another_scale_for_the_next_run():
    scheduler = ours(UNIPC, guidance_scale=2.0)
    first = fused(UNIPC, guidance=2.0, scheduler=scheduler)
    scheduler = accelerate(scheduler, guidance_scale=5.0)
    scheduler.set_timesteps(UNIPC.steps)
    second = fused(UNIPC, guidance=5.0, scheduler=scheduler)
    assert_near(second, usual(UNIPC, guidance=5.0))
    assert_near(first, usual(UNIPC, guidance=2.0))


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        (dict(float32_latents=True, model_dtype=BF16), ValueError, "float32_latents"),
        (dict(float32_latents=True, guidance_scale=G), ValueError, "float32_latents"),
        (dict(guidance_scale=float("nan")), ValueError, "guidance_scale"),
        (dict(guidance_scale="7"), TypeError, "guidance_scale"),
        (dict(guidance_scale=torch.ones(2, 1)), ValueError, "guidance_scale"),
        (dict(guidance_scale=torch.ones(2, dtype=torch.int64)), TypeError, "guidance_scale"),
        (dict(model_dtype=torch.int8), TypeError, "model_dtype"),
        (dict(model_dtype="bfloat16"), TypeError, "model_dtype"),
    ],
)
def test_options_that_cannot_be_are_refused(options, error, named):
    with pytest.raises(error, match=named):
        accelerate(diffusers.DDIMScheduler, **options)


def test_what_cannot_be_guided_is_refused():
    pipeline = diffusers.DDIMPipeline(unet=None, scheduler=diffusers.DDIMScheduler())
    with pytest.raises(ValueError, match="guidance_scale must be None for a pipeline"):
        accelerate(pipeline, guidance_scale=G)
    with pytest.raises(ValueError, match="KarrasVeScheduler has none"):
        accelerate(diffusers.KarrasVeScheduler, guidance_scale=G)


@pytest.mark.parametrize("steps_before", [0, 3])
@pytest.mark.parametrize("case", [DDIM, EULER, UNIPC], ids=str)
def test_an_output_that_is_not_doubled_is_refused_and_harms_nothing(case, steps_before):
    scheduler = ours(case, guidance_scale=G)
    x = begin(scheduler)
    for i, t in enumerate(scheduler.timesteps):
        seen = scheduler.scale_model_input(x, t)
        if i == steps_before:
            for wrong in (x, torch.cat([x, x, x]), seen[..., :-1]):
                with pytest.raises(ValueError, match="output"):
                    scheduler.step(wrong, t, x)
        x = scheduler.step(model(seen, t, 2), t, x, return_dict=False)[0]
    assert_near(x, fused(case), 0.0)


def test_scales_for_another_batch_are_refused():
    scheduler = ours(EULER, guidance_scale=torch.ones(3))
    x, t = begin(scheduler), scheduler.timesteps[0]
    with pytest.raises(ValueError, match="guidance_scale must be a number or have shape"):
        scheduler.step(torch.cat([x, x]), t, x)
