"""fastdiff: diffusion samplers as data, run by fused kernels.

import fastdiff as fd
schedule = fd.schedules.linear(1000)
plan = fd.solvers.ddim(schedule, steps=50)
x = fd.sample(model, plan, shape=(16, 3, 64, 64), seed=0)
"""

__version__ = "0.1.0"

from fastdiff import (
    backends,
    binomial,
    integrations,
    noise,
    ops,
    schedules,
    solvers,
    tracing,
    training,
)  # fmt: skip
from fastdiff.backends import BackendError, use_backend
from fastdiff.capture import CapturedLoop
from fastdiff.engine import Sampler, StepState, sample
from fastdiff.ops.draw import randn
from fastdiff.ops.forward import (
    q_chain,
    q_mean_variance,
    q_posterior_mean_variance,
    q_sample,
    q_step,
)
from fastdiff.ops.reverse import ddim_sample, p_mean_variance, p_sample
from fastdiff.plan import SolverPlan
from fastdiff.run import Run
from fastdiff.schedules import NoiseSchedule
from fastdiff.tracing import NotAffineError, trace

__all__ = [
    "BackendError",
    "CapturedLoop",
    "NoiseSchedule",
    "NotAffineError",
    "Run",
    "Sampler",
    "SolverPlan",
    "StepState",
    "backends",
    "binomial",
    "ddim_sample",
    "integrations",
    "noise",
    "ops",
    "p_mean_variance",
    "p_sample",
    "q_chain",
    "q_mean_variance",
    "q_posterior_mean_variance",
    "q_sample",
    "q_step",
    "randn",
    "sample",
    "schedules",
    "solvers",
    "trace",
    "tracing",
    "training",
    "use_backend",
]
