"""Drop-in for the gaussian_diffusion and respace modules of guided- and improved-diffusion.

from fastdiff.integrations import gaussian_diffusion as gd
from fastdiff.integrations.gaussian_diffusion import SpacedDiffusion, space_timesteps

Same names, arguments, results and random draws (Ho et al. 2020; Nichol & Dhariwal 2021; Dhariwal &
Nichol 2021). Coefficient tables go to a device once, and a sampling step without hooks is one pass
over memory besides the draw.
"""

from .diffusion import GaussianDiffusion
from .losses import discretized_gaussian_log_likelihood, mean_flat, normal_kl
from .respace import SpacedDiffusion, space_timesteps
from .types import (
    LossType,
    ModelMeanType,
    ModelVarType,
    betas_for_alpha_bar,
    get_named_beta_schedule,
)

__all__ = [
    "GaussianDiffusion",
    "LossType",
    "ModelMeanType",
    "ModelVarType",
    "SpacedDiffusion",
    "betas_for_alpha_bar",
    "discretized_gaussian_log_likelihood",
    "get_named_beta_schedule",
    "mean_flat",
    "normal_kl",
    "space_timesteps",
]
