"""Calls of the pipelines in diffusers_pipelines.py, solvers for them, how results compare."""

from __future__ import annotations

import functools
import inspect
import pickle
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from fastdiff.integrations.diffusers.stepping import Stepper
from fastdiff.run import Run
from tests.conftest import load_helper

dp = load_helper("diffusers_pipelines")

# torchsde's tree, asked by diffusers for times that float32 rounds past its ends.
TREE = "ignore:Should have t[ab]:UserWarning"

# Largest difference over the largest value. A float32 step rounds each of its handful of products
# and sums (6e-8 each) in another order than upstream; over some ten calls the differences add up,
# and guidance (7.5 times a difference of two outputs) and the networks make them several times
# larger: 2e-6 was measured, and 1.1e-5 for DEIS on flow matching, all of it upstream's (against a
# float64 run: upstream 1.1e-5, fused 3e-7; it divides by alpha near 0 and takes the difference). A
# wrong coefficient or draw shows at 1e-3 and far above.
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


def copied_by_pickle(x: Any) -> Any:
    return pickle.loads(pickle.dumps(x))
