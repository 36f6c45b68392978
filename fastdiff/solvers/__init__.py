"""Plan builders: the papers' formulas in float64, one family a file, no loop around a model.

    ddpm, ddim       ancestral and implicit sampling of the chain, learned variances, inversion
    dpm_solver       DPM-Solver and DPM-Solver++, single- and multistep, ODE and SDE
    unipc, sa_solver, deis    exponential multistep methods in log signal-to-noise
    adams            pndm, plms, ipndm: pseudo numerical methods
    edm              euler, heun, dpm_2, lms and ancestral forms, at noise levels sigma
    dpmpp_sigma      dpmpp_2m, dpmpp_sde .. and dpm_fast, at noise levels sigma, as k-diffusion's
    flow             flow matching and rectified flow: Euler, Heun, SDEs
    consistency      few-step samplers of distilled models: lcm, tcd, consistency_model
    langevin         score networks: annealed Langevin dynamics, predictor-correctors of score SDEs

What they share: grid the levels that a sampler visits, sigma_space those of edm and dpmpp_sigma,
prediction what a model's output says of x_0 and epsilon, weights the integrals of multistep
methods, subsequence the kept steps of a chain, checks of options.
"""

from .adams import ipndm, plms, pndm
from .consistency import consistency_model, lcm, tcd
from .ddim import ddim
from .ddpm import ddpm
from .deis import deis
from .dpm_solver import dpm_solver
from .dpmpp_sigma import (
    dpm_fast,
    dpmpp_2m,
    dpmpp_2m_sde,
    dpmpp_2s_ancestral,
    dpmpp_3m_sde,
    dpmpp_sde,
)
from .edm import dpm_2, dpm_2_ancestral, euler, euler_ancestral, heun, lms
from .flow import flow_euler, flow_euler_ancestral, flow_heun, flow_sde, flow_sigmas
from .grid import Grid, grid
from .langevin import ncsn, ncsnv2, ncsnv2_step_size, score_sde_ve, score_sde_vp
from .sa_solver import sa_solver
from .sigma_space import Denoiser
from .unipc import unipc

__all__ = [
    "Denoiser",
    "Grid",
    "consistency_model",
    "ddim",
    "ddpm",
    "deis",
    "dpm_2",
    "dpm_2_ancestral",
    "dpm_fast",
    "dpm_solver",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "dpmpp_2s_ancestral",
    "dpmpp_3m_sde",
    "dpmpp_sde",
    "euler",
    "euler_ancestral",
    "flow_euler",
    "flow_euler_ancestral",
    "flow_heun",
    "flow_sde",
    "flow_sigmas",
    "grid",
    "heun",
    "ipndm",
    "lcm",
    "lms",
    "ncsn",
    "ncsnv2",
    "ncsnv2_step_size",
    "plms",
    "pndm",
    "sa_solver",
    "score_sde_ve",
    "score_sde_vp",
    "tcd",
    "unipc",
]
