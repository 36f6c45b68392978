"""Training on the fused operations: losses, weightings, bounds, log-densities of steps.

losses.py          loss, score_matching_loss, hybrid_loss, check_finite
preconditioned.py  the EDM network's scalings and loss
weighting.py       weights by noise level
timesteps.py       which t to train on
likelihood.py      the variational bound in bits per dimension
isotropic_limit.py  how near a schedule ends to N(0, I)
log_prob.py        log-density of a sampler's step (reinforcement learning)
tables.py          coefficients of the variational bound
"""

from fastdiff.training import weighting
from fastdiff.training.isotropic_limit import Isotropic, isotropic, plot_isotropic
from fastdiff.training.likelihood import (
    BitsPerDim,
    calc_bpd_loop,
    discretized_gaussian_log_likelihood,
    normal_kl,
    prior_bpd,
    vb_terms_bpd,
)
from fastdiff.training.log_prob import log_prob
from fastdiff.training.losses import (
    HybridLoss,
    check_finite,
    hybrid_loss,
    loss,
    score_matching_loss,
)
from fastdiff.training.preconditioned import Scalings, edm_scalings, preconditioned_loss
from fastdiff.training.timesteps import (
    LogitNormalSampler,
    LossAwareSampler,
    LossSecondMomentResampler,
    ScheduleSampler,
    UniformSampler,
    create_named_schedule_sampler,
)
from fastdiff.training.weighting import Weighting, weights

__all__ = [
    "BitsPerDim",
    "HybridLoss",
    "Isotropic",
    "LogitNormalSampler",
    "LossAwareSampler",
    "LossSecondMomentResampler",
    "Scalings",
    "ScheduleSampler",
    "UniformSampler",
    "Weighting",
    "calc_bpd_loop",
    "check_finite",
    "create_named_schedule_sampler",
    "discretized_gaussian_log_likelihood",
    "edm_scalings",
    "hybrid_loss",
    "isotropic",
    "log_prob",
    "loss",
    "normal_kl",
    "plot_isotropic",
    "preconditioned_loss",
    "prior_bpd",
    "score_matching_loss",
    "vb_terms_bpd",
    "weighting",
    "weights",
]
