"""accelerate() inside whole pipelines of diffusers: the same images, every step fused."""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import pytest
import torch

from fastdiff.integrations.diffusers import accelerate
from tests.conftest import load_helper

dp, calls = load_helper("diffusers_pipelines"), load_helper("diffusers_calls")
fused, run, difference, rms = calls.fused, calls.run, calls.difference, calls.rms
in_dtype, solver = calls.in_dtype, calls.solver
FLOAT32, BFLOAT16, TREE = calls.FLOAT32, calls.BFLOAT16, calls.TREE
PIPELINES, SOLVERS = calls.PIPELINES, calls.SOLVERS
SD, TEXT, LATENT = calls.SD, calls.TEXT, calls.LATENT

# diffusers hands torch tensors to NumPy in a way that NumPy 2 warns about.
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")


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


@pytest.mark.filterwarnings(TREE)
@pytest.mark.parametrize("case", SOLVERS)
def test_every_solver_agrees_in_stable_diffusion(case: str, fused: list[int]) -> None:
    pipeline = dp.stable_diffusion(scheduler=solver(case))
    expected = run(pipeline, **SD)
    pipeline.scheduler = accelerate(pipeline.scheduler)
    actual = run(pipeline, **SD)
    assert fused == list(range(SOLVERS[case][2]))
    assert difference(actual, expected) <= FLOAT32


@pytest.mark.filterwarnings(TREE, "ignore:The configuration file of this:FutureWarning")
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


@pytest.mark.parametrize("name", ("CogVideoXDPMScheduler", "CogVideoXDDIMScheduler"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_cogvideox_agrees(name: str, dtype: torch.dtype, fused: list[int]) -> None:
    """Its DPM scheduler is handed its history and two timesteps by the pipeline."""
    pipeline = dp.cogvideox(getattr(diffusers, name)()).to(dtype)
    call = in_dtype(TEXT, dtype) | LATENT
    call |= dict(num_inference_steps=6, num_frames=5, height=32, width=32)
    expected = run(pipeline, **call)
    accelerate(pipeline)
    actual = run(pipeline, **call)
    assert len(fused) == 6
    tolerance = FLOAT32 if dtype == torch.float32 else BFLOAT16
    assert rms(actual - expected) <= tolerance * rms(expected)


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
    assert len(fused) == SOLVERS[case][2]
    # The network's own rounding is most of it, and differs from run to run by about this much.
    assert 0 < ours <= 1.25 * stock


@pytest.mark.parametrize("case", DETERMINISTIC)
def test_float32_latents_lower_the_error_of_bfloat16(case: str, fused: list[int]) -> None:
    stock, ours = bfloat16_runs(solver(case), float32_latents=True)
    assert len(fused) == SOLVERS[case][2]
    assert 0 < ours <= stock
