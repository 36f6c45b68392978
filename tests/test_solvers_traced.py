"""Every builder with a twin upstream: its plan is the plan traced from upstream's own code.

Two plans are the same sampler when they are the same map: both are driven with the same random
model outputs, noise and (where the caller may change the sample between calls) samples, in float64,
and must answer alike. Tables are rebuilt in float64 (tests/diffusers_float64.py), so that alike
means 1e-12.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import fastdiff as fd
from fastdiff import solvers
from fastdiff.benchmarks import upstream as other_projects
from fastdiff.tracing.trace import trace_scheduler
from tests.conftest import load_helper

up = load_helper("diffusers_float64")
k_diffusion = other_projects.k_diffusion().sampling

SCHEDULE = fd.schedules.linear(1000)
BETAS = np.linspace(1e-4, 0.02, 1000)
SIGMAS = fd.schedules.karras(9, 0.03, 14.6)


def answers(plan, o, z, v, x=None):
    """(R,) what every call makes of the sample, for outputs o (R,), draws z (R + 1, 4; the first
    before the first call), variances v (R,); x (R + 1,) replaces the sample before every call."""
    S, made = np.zeros(plan.states), []
    S[0] = plan.first_churn * z[0, 0] + 1.7
    for i in range(plan.rows):
        if x is not None:
            S[0] = x[i]
        draws = z[i + 1, : plan.n_draws].copy()
        if plan.learned:
            f = (v[i] + 1) / 2
            low, high = plan.half_log_variance_min[i], plan.half_log_variance_max[i]
            draws *= np.exp(f * high + (1 - f) * low)
        c = 0.0
        if plan.P is not None:
            c = np.clip(plan.P[i] @ [*S, o[i], *draws], plan.lo[i], plan.hi[i])
        S = plan.A[i] @ [*S, o[i], c, *draws]
        made.append(S[0])
    return np.array(made)


def compare(built, traced, closed=False, tolerance=1e-12, sign=1.0, history=True):
    """Maps, the history and draws at every row, what the model is shown; sign of the draws."""
    rng = np.random.default_rng(0)
    assert built.rows == traced.rows
    for _ in range(3):
        o, v = rng.normal(size=(2, built.rows))
        z = rng.normal(size=(built.rows + 1, 4))
        x = None if closed else rng.normal(size=built.rows + 1)
        got, expected = answers(built, o, sign * z, v, x), answers(traced, o, z, v, x)
        assert abs(got - expected).max() <= tolerance * abs(expected).max()
    assert not history or up.history(built) == up.history(traced)
    used = [plan.draws_noise.sum(axis=1) for plan in (built, traced)]
    np.testing.assert_array_equal(*used)
    shown = [[plan.first_c_in, *plan.c_in[:-1]] for plan in (built, traced)]
    np.testing.assert_allclose(*shown, rtol=1e-11)


@dataclass
class Twin:
    """A builder's plan, and the scheduler of diffusers that makes it.

    sigmas: replaces the scheduler's own, which differ from ours by the cancellation in 1 - abar.
    """

    scheduler: str
    build: Any
    config: dict[str, Any] = field(default_factory=dict)
    steps: int | None = 12
    options: dict[str, Any] = field(default_factory=dict)  # of set_timesteps
    step: dict[str, Any] = field(default_factory=dict)
    sigmas: Any = None
    default_dtype: torch.dtype = torch.float64
    calls: int | None = None  # of the timesteps

    def traced(self):
        cls = getattr(diffusers, self.scheduler)
        with up.float64(cls, self.default_dtype):
            scheduler = cls(**self.config)
            count = {} if self.steps is None else {"num_inference_steps": self.steps}
            scheduler.set_timesteps(**count, **self.options)
            if self.sigmas is not None:
                levels = torch.tensor(self.sigmas, dtype=torch.float64)
                torch.testing.assert_close(scheduler.sigmas, levels, rtol=1e-9, atol=1e-12)
                scheduler.sigmas = levels
            timesteps = scheduler.timesteps[: self.calls]
            return trace_scheduler(scheduler, timesteps, self.step, exact_tables=True)


def levels(final="zero", **options):
    return solvers.grid(SCHEDULE, 12, final=final, **options).ratio


CHAIN = {"trained_betas": BETAS}
MULTI, SINGLE = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"
SPACED = dict(ladder=None, spacing="linspace", prediction_type="epsilon")
FLOW = solvers.flow_sigmas(12, shift=3.0)


def dpm(scheduler=MULTI, sigmas=None, final="zero", **options):
    """DPM-Solver by diffusers' names."""
    config = CHAIN | options | {"lower_order_final": True, "final_sigmas_type": final}
    config |= {f"use_{sigmas}_sigmas": True} if sigmas else {}
    ours = options | {"order": options.get("solver_order", 2)}
    ours.pop("solver_order", None)
    method = "multistep" if scheduler == MULTI else "singlestep"
    return Twin(
        scheduler,
        lambda: solvers.dpm_solver(
            SCHEDULE, 12, sigmas=sigmas, final=final, method=method, **ours
        ),
        config, sigmas=levels(final, sigmas=sigmas),
    )  # fmt: skip


def unipc(final="zero", **options):
    ours = options | {"order": options.get("solver_order", 2)}
    ours.pop("solver_order", None)
    return Twin(
        "UniPCMultistepScheduler", lambda: solvers.unipc(SCHEDULE, 12, final=final, **ours),
        CHAIN | options | {"final_sigmas_type": final}, sigmas=levels(final),
    )  # fmt: skip


def sa(**options):
    return Twin(
        "SASolverScheduler", lambda: solvers.sa_solver(SCHEDULE, 12, **options), CHAIN | options,
        sigmas=levels("sigma_min"),
    )  # fmt: skip


def pndm(builder, **options):
    return Twin(
        "PNDMScheduler",
        lambda: builder(SCHEDULE, 10, combine="model_output", **options),
        CHAIN | options | {"skip_prk_steps": builder is solvers.plms}, steps=10,
    )  # fmt: skip


def ddim(clip=None, eta=0.0, **options):
    return Twin(
        "DDIMScheduler",
        lambda: solvers.ddim(
            SCHEDULE, 10, spacing="leading", clip=clip, eta=eta, use_clipped_model_output=False,
            **options,
        ),
        CHAIN | options | {"clip_sample": clip is not None}, steps=10, step={"eta": eta},
    )  # fmt: skip


def ddpm(clip=None, variance="fixed_small", **options):
    return Twin(
        "DDPMScheduler",
        lambda: solvers.ddpm(
            SCHEDULE, 10, spacing="leading", clip=clip, variance=variance, **options
        ),
        CHAIN | options | {"clip_sample": clip is not None, "variance_type": variance}, steps=10,
    )  # fmt: skip


def sigma_space(scheduler, builder, step=None, config=None, **options):
    return Twin(
        scheduler, lambda: builder(SCHEDULE, 12, **SPACED | options), CHAIN | (config or {}),
        step=step or {},
    )  # fmt: skip


def edm(scheduler, builder):
    """Of the scheduler's own Karras ladder."""
    sigmas = fd.schedules.karras(12, 0.002, 80.0)
    return Twin(scheduler, lambda: builder(sigmas, prediction_type="edm"))


CHURN = dict(s_churn=4.0, s_tmin=0.1, s_tmax=10.0, s_noise=1.003)
V = {"prediction_type": "v_prediction"}
TWINS = {
    "ddim": ddim(), "ddim clip": ddim(clip=(-1, 1)), "ddim eta": ddim(eta=0.4),
    "ddim v clip, eta": ddim(clip=(-1, 1), eta=1.0, **V),
    "ddpm": ddpm(), "ddpm clip": ddpm(clip=(-1, 1)), "ddpm large": ddpm(variance="fixed_large"),
    "ddpm learned": ddpm(variance="learned_range"), "ddpm v": ddpm(**V),
    "pndm": pndm(solvers.pndm), "pndm v": pndm(solvers.pndm, **V),
    "plms": pndm(solvers.plms), "plms to one": pndm(solvers.plms, set_alpha_to_one=True),
    "dpm++ 1": dpm(solver_order=1), "dpm++": dpm(), "dpm++ heun": dpm(solver_type="heun"),
    "dpm++ 3 karras": dpm(solver_order=3, sigmas="karras"), "dpm++ v": dpm(**V),
    "dpm 3": dpm(algorithm_type="dpmsolver", solver_order=3, final="sigma_min"),
    "sde dpm++": dpm(algorithm_type="sde-dpmsolver++"),
    "sde dpm": dpm(algorithm_type="sde-dpmsolver", final="sigma_min"),
    "single": dpm(SINGLE), "single 3": dpm(SINGLE, solver_order=3),
    "single dpm 3": dpm(SINGLE, solver_order=3, algorithm_type="dpmsolver", final="sigma_min"),
    "unipc": unipc(), "unipc 3": unipc(solver_order=3), "unipc v": unipc(**V),
    "unipc bh1": unipc("sigma_min", solver_type="bh1"),
    "unipc eps 3": unipc("sigma_min", solver_order=3, predict_x0=False),
    "sa": sa(), "sa noise": sa(algorithm_type="noise_prediction"),
    "sa 3, 1": sa(predictor_order=3, corrector_order=1),
    "deis": Twin(
        "DEISMultistepScheduler", lambda: solvers.deis(SCHEDULE, 12), CHAIN,
        sigmas=levels("sigma_min"),
    ),
    "deis 3": Twin(
        "DEISMultistepScheduler", lambda: solvers.deis(SCHEDULE, 12, order=3),
        CHAIN | {"solver_order": 3}, sigmas=levels("sigma_min"),
    ),
    "lms": sigma_space("LMSDiscreteScheduler", solvers.lms),
    "lms 3": sigma_space("LMSDiscreteScheduler", solvers.lms, {"order": 3}, order=3),
    "euler": sigma_space("EulerDiscreteScheduler", solvers.euler),
    "euler churn": sigma_space(
        "EulerDiscreteScheduler", solvers.euler, CHURN, churn_after_model=True, **CHURN
    ),
    "euler karras": sigma_space(
        "EulerDiscreteScheduler", solvers.euler, config={"use_karras_sigmas": True}, ladder="karras"
    ),
    "euler leading": sigma_space(
        "EulerDiscreteScheduler", solvers.euler, config={"timestep_spacing": "leading"},
        spacing="leading",
    ),
    "euler ancestral": sigma_space("EulerAncestralDiscreteScheduler", solvers.euler_ancestral),
    "heun": sigma_space("HeunDiscreteScheduler", solvers.heun),
    "dpm 2": sigma_space("KDPM2DiscreteScheduler", solvers.dpm_2),
    "dpm 2 ancestral": sigma_space("KDPM2AncestralDiscreteScheduler", solvers.dpm_2_ancestral),
    "dpm++ sde": sigma_space("DPMSolverSDEScheduler", solvers.dpmpp_sde),
    "edm euler": edm("EDMEulerScheduler", solvers.euler),
    "edm dpm++": edm("EDMDPMSolverMultistepScheduler", solvers.dpmpp_2m),
    "lcm": Twin("LCMScheduler", lambda: solvers.lcm(SCHEDULE, 5), CHAIN, steps=5),
    "tcd": Twin(
        "TCDScheduler", lambda: solvers.tcd(SCHEDULE, 5), CHAIN, steps=5,
        default_dtype=torch.float32,  # s is the floor of a product that torch takes in float32
    ),
    "consistency model": Twin(
        "CMStochasticIterativeScheduler", lambda: solvers.consistency_model(5), steps=5
    ),
    "flow euler": Twin(
        "FlowMatchEulerDiscreteScheduler", lambda: solvers.flow_euler(FLOW), {"shift": 3.0}
    ),
    "flow euler stochastic": Twin(
        "FlowMatchEulerDiscreteScheduler", lambda: solvers.flow_euler(FLOW, stochastic=True),
        {"shift": 3.0, "stochastic_sampling": True},
    ),
    "flow heun": Twin(
        "FlowMatchHeunDiscreteScheduler", lambda: solvers.flow_heun(FLOW), {"shift": 3.0}
    ),
    "flow heun churn": Twin(
        "FlowMatchHeunDiscreteScheduler", lambda: solvers.flow_heun(FLOW, s_churn=3.0),
        {"shift": 3.0}, step={"s_churn": 3.0},
    ),
    "flow ancestral": Twin(
        "LTXEulerAncestralRFScheduler", lambda: solvers.flow_euler_ancestral(FLOW), steps=None,
        options={"sigmas": FLOW.tolist()}, calls=12,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TWINS)
def test_builders_are_the_traced_schedulers(name):
    built, traced = TWINS[name].build(), TWINS[name].traced()
    # LTX's scheduler adds 1e-12 to two denominators, the smallest of them 0.004. Of a Brownian
    # path over sigma, upstream's noise has the other sign.
    tolerance = 1e-9 if name == "flow ancestral" else 1e-12
    compare(built, traced, tolerance=tolerance, sign=-1.0 if name == "dpm++ sde" else 1.0)
    # The midpoint that upstream interpolates in log sigma is a level, of which we know t.
    between = name == "dpm 2 ancestral"
    np.testing.assert_allclose(built.t, traced.t, rtol=1e-5 if between else 1e-12, atol=1e-9)
    if "eta" not in name:  # diffusers' DDIM draws at its last step too, for nothing
        np.testing.assert_array_equal(built.consumes.sum(axis=1), traced.consumes.sum(axis=1))
    if "edm" not in name:  # of an array of sigmas it is the first, upstream's sqrt(sigma^2 + 1)
        np.testing.assert_allclose(built.initial_scale, traced.initial_scale, rtol=1e-11)


ETA = dict(eta=0.7, s_noise=0.9)
FUNCTIONS = {
    "euler": CHURN, "heun": CHURN, "dpm_2": CHURN, "lms": dict(order=4), "dpmpp_2m": {},
    "euler_ancestral": ETA, "dpm_2_ancestral": ETA, "dpmpp_2s_ancestral": ETA,
    "dpmpp_sde": ETA | {"r": 0.4}, "dpmpp_2m_sde": ETA, "dpmpp_3m_sde": ETA,
}  # fmt: skip


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_builders_are_the_traced_functions_of_k_diffusion(name, zero):
    sigmas = SIGMAS if zero else SIGMAS[:-1]
    traced = fd.trace(getattr(k_diffusion, f"sample_{name}"), sigmas=sigmas, **FUNCTIONS[name])
    compare(getattr(solvers, name)(sigmas, **FUNCTIONS[name]), traced, closed=True)


@pytest.mark.parametrize("n", [5, 6, 7])
def test_dpm_fast_is_k_diffusions(n):
    def sample(model, x, sigmas, noise_sampler, disable):
        high, low = sigmas.tolist()
        return k_diffusion.sample_dpm_fast(
            model, x, low, high, n, eta=0.7, noise_sampler=noise_sampler, disable=disable
        )

    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # of upstream's own tensors
    try:
        traced = fd.trace(sample, sigmas=[14.6, 0.03])
    finally:
        torch.set_default_dtype(default)
    built = solvers.dpm_fast(0.03, 14.6, n, eta=0.7)
    compare(built, traced, closed=True, history=False)
    # In a loop that nobody interrupts the sample itself says some of what is carried.
    assert all(a >= b for a, b in zip(up.history(built), up.history(traced), strict=True))
