"""Accelerated pipelines of diffusers and what a caller does around their steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiff.integrations.diffusers import accelerate
from tests.conftest import load_helper

dp, calls = load_helper("diffusers_pipelines"), load_helper("diffusers_calls")
fused, run, difference, rms = calls.fused, calls.run, calls.difference, calls.rms
in_dtype, solver = calls.in_dtype, calls.solver
FLOAT32, BFLOAT16, TREE = calls.FLOAT32, calls.BFLOAT16, calls.TREE
PIPELINES, SOLVERS = calls.PIPELINES, calls.SOLVERS
SD = calls.SD

# diffusers hands torch tensors to NumPy in a way that NumPy 2 warns about.
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")


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


@pytest.mark.parametrize("options", (dict(), dict(seed=3), dict(float32_latents=True)))
@pytest.mark.parametrize("case", ("UniPC", "2M SDE"))
def test_inference_mode(case: str, options: dict[str, Any], fused: list[int]) -> None:
    pipeline = accelerate(dp.stable_diffusion(scheduler=solver(case)), **options)
    with torch.inference_mode():
        inside = run(pipeline, **SD)
    assert difference(run(pipeline, **SD), inside.clone()) <= FLOAT32
    assert fused == [*range(8), *range(8)]
