"""The accelerated scheduler of a pipeline as an object: swapped, saved, copied, put aside."""

from __future__ import annotations

import copy
import inspect
import json
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from fastdiff.integrations.diffusers import accelerate
from tests.conftest import load_helper

dp, calls = load_helper("diffusers_pipelines"), load_helper("diffusers_calls")
fused, run, difference, rms = calls.fused, calls.run, calls.difference, calls.rms
solver, copied_by_pickle = calls.solver, calls.copied_by_pickle
FLOAT32, BFLOAT16, TREE = calls.FLOAT32, calls.BFLOAT16, calls.TREE
PIPELINES, SOLVERS = calls.PIPELINES, calls.SOLVERS
SD = calls.SD

# diffusers hands torch tensors to NumPy in a way that NumPy 2 warns about.
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")


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


@pytest.mark.parametrize("options", (dict(seed=3), dict(float32_latents=True)))
@pytest.mark.parametrize("case", ("UniPC", "2M SDE", "PNDM", "Heun"))
def test_a_copy_keeps_the_options_of_accelerate(case: str, options: dict[str, Any]) -> None:
    def steps(scheduler: Any, x: Tensor, begin: int, end: int | None) -> Tensor:
        for i, t in enumerate(scheduler.timesteps[begin:end]):
            generated = "generator" in inspect.signature(scheduler.step).parameters
            drawn = {"generator": dp.generator(begin + i)} if generated else {}
            output = torch.sin(scheduler.scale_model_input(x, t))
            x = scheduler.step(output, t, x, **drawn).prev_sample
        return x

    scheduler = accelerate(solver(case), **options)
    scheduler.set_timesteps(8)
    x = torch.randn(2, 3, 4, 4, generator=dp.generator(1)) * scheduler.init_noise_sigma
    middle = steps(scheduler, x.bfloat16(), 0, 4)
    deep, pickled = copy.deepcopy(scheduler), copied_by_pickle(scheduler)
    expected = steps(scheduler, middle, 4, None)
    assert torch.equal(steps(deep, middle, 4, None), expected)
    actual = steps(pickled, middle, 4, None)
    if "seed" in options:
        assert torch.equal(actual, expected)
    # What was pickled does not know the tensor that its float32 sample was handed out as.
    assert rms(actual - expected) <= BFLOAT16 * rms(expected)


def test_a_copied_pipeline_samples_alike(fused: list[int]) -> None:
    pipeline = accelerate(dp.stable_diffusion(scheduler=solver("2M Karras")))
    expected = run(pipeline, **SD)
    other = copy.deepcopy(pipeline)
    assert torch.equal(run(other, **SD), expected)
    assert fused == [*range(8), *range(8)]
    assert other.scheduler is not pipeline.scheduler


@pytest.mark.parametrize("case", ("UniPC", "PNDM", "Heun", "Euler ancestral"))
def test_views_that_take_turns_with_one_scheduler(case: str, fused: list[int]) -> None:
    """Panorama puts the scheduler's __dict__ aside and back, once a view and step."""
    pipeline = dp.stable_diffusion("StableDiffusionPanoramaPipeline", solver(case))
    call = {**SD, "height": 512, "width": 576, "num_inference_steps": 4}  # two views of 64 x 64
    expected = run(pipeline, **call)
    accelerate(pipeline)
    assert difference(run(pipeline, **call), expected) <= FLOAT32
    calls = len(pipeline.scheduler.timesteps)
    assert fused == [row for row in range(calls) for _ in range(2)]


def test_a_scheduler_accelerated_in_the_middle_of_a_run() -> None:
    """Upstream's history is kept by upstream's step; an accelerated one's stays where it is."""

    def model(x: Tensor) -> Tensor:
        return torch.sin(2 * x) + 0.1 * x

    def steps(scheduler: Any, x: Tensor, begin: int, end: int | None) -> Tensor:
        for t in scheduler.timesteps[begin:end]:
            x = scheduler.step(model(x), t, x).prev_sample
        return x

    stock = solver("UniPC")
    stock.set_timesteps(8)
    x = torch.randn(2, 3, 4, 4, generator=dp.generator(1))
    middle = steps(stock, x, 0, 4)
    ours = accelerate(copy.deepcopy(stock))
    expected = steps(stock, middle, 4, None)
    assert torch.equal(steps(ours, middle, 4, None), expected)
    ours.set_timesteps(8)
    middle = steps(ours, x, 0, 4)
    anew = accelerate(ours, seed=1)
    with pytest.raises(ValueError, match="accelerated anew in the middle of a run"):
        steps(anew, middle, 4, 5)
    assert difference(steps(ours, middle, 4, None), expected) <= FLOAT32
    anew.set_timesteps(8)
    assert difference(steps(anew, x, 0, None), expected) <= FLOAT32
