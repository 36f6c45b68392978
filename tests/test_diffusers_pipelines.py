"""accelerate() inside whole pipelines of diffusers: the same images, every step fused."""

from __future__ import annotations

import copy
import functools
import inspect
import json
import pickle
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from fastdiff.integrations.diffusers import accelerate
from fastdiff.integrations.diffusers.stepping import Stepper
from fastdiff.run import Run
from tests.conftest import load_helper

dp = load_helper("diffusers_pipelines")

# diffusers hands torch tensors to NumPy in a way that NumPy 2 warns about.
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

# torchsde's tree, asked by diffusers for times that float32 rounds past its ends.
TREE = "ignore:Should have t[ab]:UserWarning"

# Largest difference over the largest value. A float32 step rounds each of its handful of products
# and sums (6e-8 each) in another order than upstream; over some ten calls the differences add up,
# and guidance (7.5 times a difference of two outputs) and the networks make them several times
# larger. A wrong coefficient or draw shows at 1e-3 and far above.
FLOAT32 = 2e-5
# Rounding one value to bfloat16 is 2^-9 = 2e-3 relative. Two runs round at other places in every
# step, and the network's own bfloat16 rounding differs from there on; a wrong draw makes
# it 1. Root mean square over root mean square.
BFLOAT16 = 0.05


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows that fused steps ran, in order; a step of upstream's own fails the test."""
    rows: list[int] = []
    advance = Run.advance

    def counted(run: Run, *args: Any) -> Tensor:
        rows.append(run.index)
        return advance(run, *args)

    def fell_back(*args: Any) -> None:
        raise AssertionError(f"a step ran as upstream's own: {args[-1]}")

    monkeypatch.setattr(Run, "advance", counted)
    monkeypatch.setattr(Stepper, "_upstream_step", fell_back)
    return rows


def run(pipeline: Any, seed: int | None = 0, **call: Any) -> Tensor:
    """The first result of a pipeline as a tensor."""
    if seed is not None:
        call["generator"] = dp.generator(seed)
    return torch.as_tensor(pipeline(**call)[0])


def difference(actual: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest value."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert torch.isfinite(expected).all() and expected.abs().max() > 0
    return float((actual.double() - expected.double()).abs().max() / expected.abs().max())


def rms(x: Tensor) -> float:
    return float(x.double().pow(2).mean().sqrt())


def in_dtype(call: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in call.items()
    }


SIZE = dict(height=16, width=16)
LATENT = dict(output_type="latent")
TEXT = dp.text_inputs()
POOLED = dp.text_inputs(pooled=True)
PIPELINES: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddpm": (dp.ddpm, dict(num_inference_steps=6, output_type="pt")),
    "ddim": (dp.ddim, dict(num_inference_steps=6, output_type="pt", eta=0.0)),
    "ddim eta": (dp.ddim, dict(num_inference_steps=6, output_type="pt", eta=0.5)),
    "ddim clipped": (
        dp.ddim, dict(num_inference_steps=6, output_type="pt", use_clipped_model_output=True)
    ),
    "consistency": (dp.consistency, dict(num_inference_steps=3, output_type="pt")),
    "text to image": (
        dp.stable_diffusion, dict(TEXT, num_inference_steps=6, output_type="pt", eta=0.3, **SIZE)
    ),
    "image to image": (
        functools.partial(dp.stable_diffusion, "StableDiffusionImg2ImgPipeline"),
        dict(TEXT, num_inference_steps=8, image=dp.image(), strength=0.6, **LATENT),
    ),
    "inpainting": (
        functools.partial(dp.stable_diffusion, "StableDiffusionInpaintPipeline"),
        dict(
            TEXT, num_inference_steps=8, image=dp.image(), mask_image=dp.image()[:, :1],
            strength=0.8, **LATENT, **SIZE,
        ),
    ),
    "xl": (
        dp.stable_diffusion_xl, dict(POOLED, num_inference_steps=6, **LATENT, **SIZE)
    ),
    "latent consistency": (
        dp.latent_consistency,
        dict(dp.text_inputs(negative=False), num_inference_steps=4, **LATENT, **SIZE),
    ),
    "learned variance, thresholding": (
        dp.deepfloyd_if,
        dict(TEXT, num_inference_steps=6, output_type="pt", height=8, width=8),
    ),
    "dit": (dp.dit, dict(class_labels=[3, 5], num_inference_steps=6, output_type="pt")),
    "sd3": (dp.stable_diffusion_3, dict(POOLED, num_inference_steps=6, **LATENT, **SIZE)),
    "flux": (
        dp.flux,
        dict(dp.text_inputs(pooled=True, negative=False), num_inference_steps=6, **LATENT, **SIZE),
    ),
    "wan": (
        dp.wan, dict(TEXT, num_inference_steps=7, num_frames=5, height=32, width=32, **LATENT)
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PIPELINES)
def test_an_accelerated_pipeline_makes_the_same_images(case: str, fused: list[int]) -> None:
    build, call = PIPELINES[case]
    pipeline = build()
    expected = run(pipeline, **call)
    assert not fused
    assert accelerate(pipeline) is pipeline
    first = run(pipeline, **call)
    # An image as input is noised to int(strength * steps) steps before the end and starts there.
    steps = int(call["num_inference_steps"] * call.get("strength", 1.0))
    assert fused == list(range(steps))
    assert difference(first, expected) <= FLOAT32
    assert torch.equal(run(pipeline, **call), first)  # the plan from the cache; no state is left
    assert difference(run(pipeline, seed=1, **call), first) > 1e-2


@pytest.mark.parametrize("case", PIPELINES)
def test_an_accelerated_pipeline_makes_the_same_images_in_bfloat16(
    case: str, fused: list[int]
) -> None:
    build, call = PIPELINES[case]
    pipeline, call = build().to(torch.bfloat16), in_dtype(call, torch.bfloat16)
    expected = run(pipeline, **call)
    accelerate(pipeline)
    actual = run(pipeline, **call)
    assert fused and actual.dtype == expected.dtype
    assert rms(actual - expected) <= BFLOAT16 * rms(expected)


SOLVERS: dict[str, tuple[str, dict[str, Any], int]] = {  # class, configuration, calls in 8 steps
    "PNDM": ("PNDMScheduler", dict(skip_prk_steps=True), 9),
    "PNDM, Runge-Kutta first": ("PNDMScheduler", dict(), 17),
    "DDPM": ("DDPMScheduler", dict(), 8),
    "2M Karras": ("DPMSolverMultistepScheduler", dict(use_karras_sigmas=True), 8),
    "2M SDE": ("DPMSolverMultistepScheduler", dict(algorithm_type="sde-dpmsolver++"), 8),
    "singlestep": ("DPMSolverSinglestepScheduler", dict(), 8),
    "SDE": ("DPMSolverSDEScheduler", dict(noise_sampler_seed=7), 15),
    "Euler": ("EulerDiscreteScheduler", dict(), 8),
    "Euler v": ("EulerDiscreteScheduler", dict(prediction_type="v_prediction"), 8),
    "Euler ancestral": ("EulerAncestralDiscreteScheduler", dict(), 8),
    "UniPC": ("UniPCMultistepScheduler", dict(), 8),
    "UniPC of third order": ("UniPCMultistepScheduler", dict(solver_order=3), 8),
    "LMS": ("LMSDiscreteScheduler", dict(), 8),
    "Heun": ("HeunDiscreteScheduler", dict(), 15),
    "KDPM2": ("KDPM2DiscreteScheduler", dict(), 15),
    "KDPM2 ancestral": ("KDPM2AncestralDiscreteScheduler", dict(), 15),
    "DEIS": ("DEISMultistepScheduler", dict(), 8),
    "SA": ("SASolverScheduler", dict(), 8),
    "TCD": ("TCDScheduler", dict(), 8),
    "LCM": ("LCMScheduler", dict(), 8),
}


def solver(case: str) -> Any:
    """A scheduler with the settings that Stable Diffusion asks for."""
    name, config, _ = SOLVERS[case]
    kind = getattr(diffusers, name)
    fit = dict(dp.SD_TABLES, steps_offset=1, clip_sample=False)
    accepted = inspect.signature(kind).parameters
    return kind(**{key: value for key, value in fit.items() if key in accepted}, **config)


SD = dict(TEXT, num_inference_steps=8, guidance_scale=7.5, **LATENT, **SIZE)


@pytest.mark.filterwarnings(TREE)
@pytest.mark.parametrize("case", SOLVERS)
def test_every_solver_agrees_in_stable_diffusion(case: str, fused: list[int]) -> None:
    pipeline = dp.stable_diffusion(scheduler=solver(case))
    expected = run(pipeline, **SD)
    pipeline.scheduler = accelerate(pipeline.scheduler)
    actual = run(pipeline, **SD)
    assert fused == list(range(SOLVERS[case][2]))
    assert difference(actual, expected) <= FLOAT32


@pytest.mark.filterwarnings(TREE)
@pytest.mark.parametrize("case", SOLVERS)
@pytest.mark.parametrize("kind", ("image to image", "inpainting"))
def test_every_solver_agrees_from_a_noised_image(kind: str, case: str, fused: list[int]) -> None:
    """Runs that begin in the middle of the timesteps; inpainting blends the latents every step."""
    build, call = PIPELINES[kind]
    pipeline = build(scheduler=solver(case))
    expected = run(pipeline, **call)
    accelerate(pipeline)
    actual = run(pipeline, **call)
    assert 4 <= len(fused) < SOLVERS[case][2] and fused == list(range(len(fused)))
    assert difference(actual, expected) <= FLOAT32


FLOW = dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
FLOWS: dict[str, tuple[str, dict[str, Any], int]] = {
    "Euler": ("FlowMatchEulerDiscreteScheduler", dict(shift=3.0), 6),
    "stochastic Euler": (
        "FlowMatchEulerDiscreteScheduler", dict(shift=3.0, stochastic_sampling=True), 6
    ),
    "Heun": ("FlowMatchHeunDiscreteScheduler", dict(shift=3.0), 11),
    "2M": ("DPMSolverMultistepScheduler", FLOW, 6),
    "2M SDE": ("DPMSolverMultistepScheduler", dict(FLOW, algorithm_type="sde-dpmsolver++"), 6),
    "UniPC of third order": ("UniPCMultistepScheduler", dict(FLOW, solver_order=3), 6),
    "DEIS": ("DEISMultistepScheduler", FLOW, 6),
}  # fmt: skip


@pytest.mark.parametrize("case", FLOWS)
@pytest.mark.parametrize("kind", ("sd3", "wan"))
def test_every_solver_of_flow_matching_agrees(kind: str, case: str, fused: list[int]) -> None:
    name, config, calls = FLOWS[case]
    build, call = PIPELINES[kind]
    pipeline, call = build(), call | dict(num_inference_steps=6)
    pipeline.scheduler = getattr(diffusers, name)(**config)
    results = []
    with torch.random.fork_rng(devices=[]):
        for _ in range(2):
            torch.manual_seed(4)  # these pipelines give the scheduler no generator
            results.append(run(pipeline, **call))
            accelerate(pipeline)
    assert fused == list(range(calls))
    assert difference(results[1], results[0]) <= FLOAT32


# Those that keep up with a bfloat16 run of upstream on a common measure: no noise of another dtype.
DETERMINISTIC = ("PNDM", "2M Karras", "singlestep", "Euler", "UniPC", "LMS", "Heun", "DEIS")


def bfloat16_runs(scheduler: Any, **options: Any) -> tuple[float, float]:
    """Errors of upstream's and of the accelerated bfloat16 run against float32 with the same
    weights, latents and prompts: rms over four images."""
    low = dp.stable_diffusion(scheduler=scheduler).to(torch.bfloat16)
    high = copy.deepcopy(low).to(torch.float32)
    latents = torch.randn(4, 4, 8, 8, generator=dp.generator(3)).to(torch.bfloat16)
    call = {**SD, **dp.text_inputs(4, dtype=torch.bfloat16), "latents": latents}
    exact = run(high, **in_dtype(call, torch.float32))
    stock = rms(run(low, **call) - exact)
    accelerate(low, **options)
    return stock, rms(run(low, **call) - exact)


@pytest.mark.parametrize("case", DETERMINISTIC)
def test_in_bfloat16_the_error_is_not_larger_than_upstreams(case: str, fused: list[int]) -> None:
    stock, ours = bfloat16_runs(solver(case))
    print(case, stock, ours)
    assert len(fused) == SOLVERS[case][2]
    # The network's own rounding is most of it, and differs from run to run by about this much.
    assert 0 < ours <= 1.25 * stock


@pytest.mark.parametrize("case", DETERMINISTIC)
def test_float32_latents_lower_the_error_of_bfloat16(case: str, fused: list[int]) -> None:
    stock, ours = bfloat16_runs(solver(case), float32_latents=True)
    print(case, stock, ours)
    assert len(fused) == SOLVERS[case][2]
    assert 0 < ours <= stock


# What a caller may do around the steps.


def scaled(at: int, factor: float, in_place: bool = False) -> Any:
    """A callback that scales the latents after step `at`."""

    def callback(_: Any, step: int, __: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == at:
            if in_place:
                values["latents"] *= factor
            else:
                values["latents"] = values["latents"] * factor
        return values

    return callback


@pytest.mark.parametrize("in_place", (False, True))
@pytest.mark.parametrize("float32_latents", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("case", ("UniPC", "2M Karras", "PNDM", "Heun"))
def test_a_callback_may_edit_the_latents(
    case: str, dtype: torch.dtype, float32_latents: bool, in_place: bool, fused: list[int]
) -> None:
    pipeline = dp.stable_diffusion(scheduler=solver(case)).to(dtype)
    call = in_dtype(SD, dtype) | {"callback_on_step_end": scaled(3, 0.5, in_place)}
    expected = run(pipeline, **call)
    unedited = run(pipeline, **in_dtype(SD, dtype))
    accelerate(pipeline, float32_latents=float32_latents)
    actual = run(pipeline, **call)
    assert fused
    assert rms(unedited - expected) > 2 * BFLOAT16 * rms(expected)
    tolerance = FLOAT32 if dtype == torch.float32 else BFLOAT16
    assert rms(actual - expected) <= tolerance * rms(expected)


@pytest.mark.parametrize("float32_latents", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_latents_kept_by_a_callback_are_not_written_again(
    dtype: torch.dtype, float32_latents: bool
) -> None:
    kept: list[tuple[Tensor, Tensor]] = []

    def keep(_: Any, __: int, ___: Any, values: dict[str, Any]) -> dict[str, Any]:
        kept.append((values["latents"], values["latents"].clone()))
        return {}

    for case in ("UniPC", "Euler ancestral"):
        kept.clear()
        pipeline = dp.stable_diffusion(scheduler=solver(case)).to(dtype)
        accelerate(pipeline, float32_latents=float32_latents)
        run(pipeline, callback_on_step_end=keep, **in_dtype(SD, dtype))
        assert len(kept) == 8
        assert all(torch.equal(now, then) for now, then in kept)


def test_an_interrupted_or_failed_run_leaves_nothing_behind(fused: list[int]) -> None:
    pipeline = dp.stable_diffusion(scheduler=solver("UniPC"))
    accelerate(pipeline)
    expected = run(pipeline, **SD)

    def interrupt(pipe: Any, step: int, _: Any, values: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step == 3
        return values

    def fail(*_: Any) -> None:
        raise RuntimeError("stopped")

    run(pipeline, callback_on_step_end=interrupt, **SD)
    assert len(fused) == 8 + 4
    assert torch.equal(run(pipeline, **SD), expected)
    with pytest.raises(RuntimeError, match="stopped"):
        run(pipeline, callback_on_step_end=fail, **SD)
    assert torch.equal(run(pipeline, **SD), expected)


@pytest.mark.parametrize(
    ("case", "custom"),
    (
        ("2M SDE", dict(timesteps=[999, 850, 700, 400, 200, 60])),
        ("Euler", dict(timesteps=[981, 800, 500, 150, 20])),
        ("Euler", dict(sigmas=[14.6, 8.0, 3.0, 1.2, 0.4, 0.0])),
        ("DDPM", dict(timesteps=[900, 640, 333, 100, 7])),
        ("LCM", dict(timesteps=[979, 739, 499, 259])),
    ),
)
def test_custom_timesteps_and_sigmas(case: str, custom: dict[str, Any], fused: list[int]) -> None:
    pipeline = dp.stable_diffusion(scheduler=solver(case))
    call = {k: v for k, v in SD.items() if k != "num_inference_steps"} | custom
    expected = run(pipeline, **call)
    accelerate(pipeline)
    actual = run(pipeline, **call)
    assert fused == list(range(len(pipeline.scheduler.timesteps)))
    assert difference(actual, expected) <= FLOAT32
    assert difference(run(pipeline, **SD), actual) > 1e-2


@pytest.mark.parametrize("case", ("sd3", "flux"))
def test_custom_sigmas_of_flow_matching(case: str, fused: list[int]) -> None:
    build, call = PIPELINES[case]
    pipeline, call = build(), call | dict(sigmas=[1.0, 0.8, 0.55, 0.3, 0.1], num_inference_steps=5)
    expected = run(pipeline, **call)
    accelerate(pipeline)
    assert difference(run(pipeline, **call), expected) <= FLOAT32
    assert len(fused) == 5


@pytest.mark.parametrize("case", ("UniPC", "PNDM", "Euler ancestral", "2M SDE"))
def test_later_calls_of_other_sizes_batches_steps_and_dtypes(case: str, fused: list[int]) -> None:
    stock = dp.stable_diffusion(scheduler=solver(case))
    ours = accelerate(dp.stable_diffusion(scheduler=solver(case)))
    for change in (
        dict(),
        dict(height=24, width=8),
        dp.text_inputs(3),
        dict(num_inference_steps=5),
        dict(guidance_scale=1.0),
        torch.bfloat16,
        torch.float64,
        torch.float32,
        dict(),
    ):
        if isinstance(change, torch.dtype):
            dtype, call = change, in_dtype(SD, change)
            stock, ours = stock.to(dtype), ours.to(dtype)
        else:
            dtype, call = torch.float32, {**SD, **change}
        if dtype == torch.bfloat16:
            assert rms(run(ours, **call) - run(stock, **call)) <= BFLOAT16 * rms(run(stock, **call))
            stock = dp.stable_diffusion(scheduler=solver(case))  # its weights are rounded
            ours = accelerate(dp.stable_diffusion(scheduler=ours.scheduler))
        else:
            assert difference(run(ours, **call), run(stock, **call)) <= FLOAT32
    assert len(fused) >= 9 * 5


@pytest.mark.parametrize("case", ("DDIM", "Euler ancestral", "2M SDE", "KDPM2 ancestral", "LCM"))
def test_a_list_of_generators_draws_for_every_image_alone(case: str, fused: list[int]) -> None:
    scheduler = None if case == "DDIM" else solver(case)
    pipeline = dp.stable_diffusion(scheduler=scheduler)
    call = {**SD, **dp.text_inputs(2), "eta": 1.0}
    expected = run(pipeline, None, **call, generator=[dp.generator(1), dp.generator(2)])
    accelerate(pipeline)
    actual = run(pipeline, None, **call, generator=[dp.generator(1), dp.generator(2)])
    assert fused
    assert difference(actual, expected) <= FLOAT32
    alone = run(pipeline, 1, **{**SD, "eta": 1.0})
    assert difference(actual[:1], alone) <= FLOAT32


@pytest.mark.filterwarnings(TREE)
def test_the_generator_is_left_where_upstream_leaves_it() -> None:
    for case in SOLVERS:
        pipeline = dp.stable_diffusion(scheduler=solver(case))
        left = []
        for _ in range(2):
            generator = dp.generator(5)
            run(pipeline, None, generator=generator, **SD)
            left.append(generator.get_state())
            accelerate(pipeline)
        assert torch.equal(*left), case


@pytest.mark.filterwarnings(TREE)
@pytest.mark.parametrize("case", ("Euler ancestral", "2M SDE", "SDE", "KDPM2 ancestral", "LCM"))
def test_a_seed_makes_the_same_image_alone_and_in_a_batch(case: str, fused: list[int]) -> None:
    pipeline = dp.stable_diffusion(scheduler=solver(case))
    latents = torch.randn(3, 4, 8, 8, generator=dp.generator(3))
    texts = dp.text_inputs(3)
    accelerate(pipeline, seed=11)
    batch = run(pipeline, None, **{**SD, **texts, "latents": latents})
    assert torch.equal(run(pipeline, 8, **{**SD, **texts, "latents": latents}), batch)
    for entry in range(3):
        accelerate(pipeline, seed=11, sample_offset=entry)
        here = slice(entry, entry + 1)
        one = {name: value[here] for name, value in texts.items()}
        alone = run(pipeline, None, **{**SD, **one, "latents": latents[here]})
        assert difference(alone, batch[here]) <= FLOAT32  # the network's sums differ by batch size
    accelerate(pipeline, seed=torch.tensor([4, 5, 6]))
    other = run(pipeline, None, **{**SD, **texts, "latents": latents})
    accelerate(pipeline, seed=5)
    one = {name: value[1:2] for name, value in texts.items()}
    alone = run(pipeline, None, **{**SD, **one, "latents": latents[1:2]})
    assert difference(alone, other[1:2]) <= FLOAT32
    assert difference(other, batch) > 1e-2


def test_a_base_and_a_refiner_share_one_schedule(fused: list[int]) -> None:
    """XL with denoising_end and denoising_start: the first and the last part of the timesteps."""

    def both(base: Any, refiner: Any) -> Tensor:
        call = {**PIPELINES["xl"][1], "num_inference_steps": 10}
        middle = run(base, denoising_end=0.6, **call)
        del call["height"], call["width"]
        return run(refiner, denoising_start=0.6, image=middle, **call)

    pipelines = (
        dp.stable_diffusion_xl(),
        dp.stable_diffusion_xl("StableDiffusionXLImg2ImgPipeline"),
    )
    expected = both(*pipelines)
    for pipeline in pipelines:
        accelerate(pipeline)
    assert difference(both(*pipelines), expected) <= FLOAT32
    assert len(fused) == 10 and fused.count(0) == 2


# The accelerated scheduler as an object.


def test_swapping_the_scheduler_in_and_out(fused: list[int]) -> None:
    pipeline = dp.ddim()
    call = dict(num_inference_steps=6, eta=0.5, output_type="pt")
    stock, expected = pipeline.scheduler, run(pipeline, **call)
    pipeline.scheduler = accelerate(pipeline.scheduler)
    assert isinstance(pipeline.scheduler, diffusers.DDIMScheduler)
    assert difference(run(pipeline, **call), expected) <= FLOAT32
    assert len(fused) == 6
    pipeline.scheduler = stock
    assert torch.equal(run(pipeline, **call), expected) and len(fused) == 6
    Scheduler = accelerate(diffusers.DDIMScheduler)
    pipeline.scheduler = Scheduler.from_config(stock.config)
    assert difference(run(pipeline, **call), expected) <= FLOAT32
    assert len(fused) == 12
    # Another class from an accelerated one's configuration is upstream's own until accelerated.
    pipeline.scheduler = diffusers.DDPMScheduler.from_config(pipeline.scheduler.config)
    assert type(pipeline.scheduler) is diffusers.DDPMScheduler
    assert accelerate(stock).compatibles == stock.compatibles


def test_a_saved_pipeline_names_upstreams_class_and_needs_no_fastdiff(
    tmp_path: Any, fused: list[int]
) -> None:
    for build, call in (PIPELINES["ddim eta"], (dp.stable_diffusion, SD)):
        folder = tmp_path / build.__name__
        pipeline = build()
        expected = run(pipeline, **call)
        accelerate(pipeline)
        pipeline.save_pretrained(folder)
        index = json.loads((folder / "model_index.json").read_text())
        assert index["scheduler"] == ["diffusers", "DDIMScheduler"]
        texts = [path.read_text() for path in folder.rglob("*.json")]
        assert texts and not any("fastdiff" in text for text in texts)
        absent = {name: None for name, part in pipeline.components.items() if part is None}
        loaded = type(pipeline).from_pretrained(folder, local_files_only=True, **absent)
        assert type(dp.quiet(loaded)) is type(pipeline)
        assert type(loaded.scheduler) is diffusers.DDIMScheduler
        # Loaded weights may lie at other addresses, where convolutions add in another order.
        assert difference(run(loaded, **call), expected) <= FLOAT32 and not fused
        accelerate(loaded)
        assert difference(run(loaded, **call), expected) <= FLOAT32
        Scheduler = accelerate(diffusers.DDIMScheduler)
        loaded.scheduler = Scheduler.from_pretrained(folder, subfolder="scheduler")
        assert difference(run(loaded, **call), expected) <= FLOAT32
        assert fused.count(0) == 2
        fused.clear()


def test_a_pipeline_made_from_an_accelerated_one_keeps_its_scheduler(fused: list[int]) -> None:
    stock = dp.stable_diffusion(scheduler=solver("UniPC"))
    call = PIPELINES["image to image"][1]
    expected = run(dp.quiet(diffusers.AutoPipelineForImage2Image.from_pipe(stock)), **call)
    made = diffusers.AutoPipelineForImage2Image.from_pipe(accelerate(stock))
    assert difference(run(dp.quiet(made), **call), expected) <= FLOAT32
    assert len(fused) == 4


def test_signatures_are_upstreams() -> None:
    for name in {name for name, _, _ in SOLVERS.values()} | {"FlowMatchEulerDiscreteScheduler"}:
        upstream = getattr(diffusers, name)
        ours = accelerate(upstream)
        assert ours.__name__ == name and issubclass(ours, upstream)
        for method in ("__init__", "step", "set_timesteps", "scale_model_input", "add_noise"):
            if hasattr(upstream, method):
                theirs = inspect.signature(getattr(upstream, method))
                assert inspect.signature(getattr(ours, method)) == theirs, (name, method)


def copied_by_pickle(x: Any) -> Any:
    return pickle.loads(pickle.dumps(x))


@pytest.mark.filterwarnings(TREE)
@pytest.mark.parametrize(
    ("copied", "case"),
    # Upstream's own SDE keeps a tree, and SA a function, that cannot be copied or pickled.
    [(copy.deepcopy, case) for case in SOLVERS if case != "SDE"]
    + [(copied_by_pickle, case) for case in SOLVERS if case not in ("SDE", "SA")],
)
def test_a_copy_continues_where_the_scheduler_stood(case: str, copied: Any) -> None:
    """Copies made before, in the middle of and after a run go on as copies of upstream's do."""

    def model(x: Tensor, t: Tensor) -> Tensor:
        return torch.sin(2 * x + 0.003 * t.float()) + 0.1 * x

    def steps(scheduler: Any, x: Tensor, begin: int, end: int | None) -> Tensor:
        for i, t in enumerate(scheduler.timesteps[begin:end]):
            generated = "generator" in inspect.signature(scheduler.step).parameters
            options = {"generator": dp.generator(begin + i)} if generated else {}
            output = model(scheduler.scale_model_input(x, t), t)
            x = scheduler.step(output, t, x, **options).prev_sample
        return x

    stock, ours = solver(case), copied(accelerate(solver(case)))
    x = torch.randn(2, 3, 4, 4, generator=dp.generator(1))
    for scheduler in (stock, ours):
        scheduler.set_timesteps(8)
    for begin in (1, 4, 5):
        results = []
        for scheduler in (stock, ours):
            scheduler.set_timesteps(8)
            middle = steps(scheduler, x * scheduler.init_noise_sigma, 0, begin)
            other = copied(scheduler)
            assert type(other) is type(scheduler)
            result = steps(scheduler, middle, begin, None)
            assert torch.equal(steps(other, middle, begin, None), result), case
            results.append(result)
        assert difference(results[1], results[0]) <= FLOAT32
    again = copied(ours)
    again.set_timesteps(8)
    results = [steps(again, x * again.init_noise_sigma, 0, None)]
    stock.set_timesteps(8)
    assert difference(results[0], steps(stock, x * stock.init_noise_sigma, 0, None)) <= FLOAT32


def test_a_copied_pipeline_samples_alike(fused: list[int]) -> None:
    pipeline = accelerate(dp.stable_diffusion(scheduler=solver("2M Karras")))
    expected = run(pipeline, **SD)
    other = copy.deepcopy(pipeline)
    assert torch.equal(run(other, **SD), expected)
    assert fused == [*range(8), *range(8)]
    assert other.scheduler is not pipeline.scheduler
