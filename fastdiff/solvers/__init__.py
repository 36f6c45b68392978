"""Plan builders: the papers' formulas in float64, one family a file, no loop around a model.

ddpm, ddim       ancestral and implicit sampling of the chain, with learned variances and reversal
dpm_solver, unipc, sa_solver, deis    exponential integrators in log signal-to-noise
adams            pndm, plms, ipndm, lms: linear multistep
edm, dpmpp_sigma    k-diffusion's samplers at noise levels sigma: euler, heun, dpm_2, dpmpp_2m ...
flow             flow matching and rectified flow: Euler, Heun, SDEs
consistency      few-step samplers of distilled models: lcm, tcd, consistency_model
langevin         score networks: annealed Langevin dynamics, predictor-correctors of score SDEs

grid             the levels that a sampler visits; estimates, prediction: what a model says of them
"""

from .adams import ipndm, lms, plms, pndm
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
from .edm import dpm_2, dpm_2_ancestral, euler, euler_ancestral, heun
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
