"""Binomial (Bernoulli) diffusion: the chain of bits of Sohl-Dickstein et al. 2015, fused.

    q(x_t | x_{t-1}) = B(x_t; x_{t-1} (1 - beta_t) + beta_t / 2)         appendix B, forward kernel
    q(x_t | x_0)     = B(x_t; x_0 abar_t + (1 - abar_t) / 2),  abar_t = prod_{s<=t} (1 - beta_s)
    x_T -> B(1/2),  p(x_{t-1} | x_t) = B(x_{t-1}; f_b(x_t, t))           appendix B, reverse kernel

    schedule = fd.binomial.BinomialSchedule.erasing(200)
    x_t = fd.binomial.q_sample(x_start, t, schedule, seed=0)
    loss = fd.binomial.bound(model(x_t, t), x_start, x_t, t, schedule)         # bits, (B,)
    x = fd.binomial.sample(model, schedule, shape=(64, 20), seed=0)

Bits are tensors (B, ...) of 0 and 1, of any floating dtype, uint8 or bool; anything but 0 counts as
1. Index t = 0 .. T-1 stands for the paper's t + 1, as in NoiseSchedule. A model gives logits, one a
bit, which `prediction_type` says the meaning of:

    "sample"     of x_0 = 1; p = sum_j p(x_0 = j) q(x_{t-1} = 1 | x_t, x_0 = j) bit by bit
    "previous"   of x_{t-1} = 1: f_b = s(logit), as in the paper

Arithmetic: fastdiff/ops/bits.py; words: fastdiff/noise.py. Every draw is a function of the seed, so
backends, batch splits and orders give the same bits.
"""

from fastdiff.binomial.bound import Terms, bound, variational_bound
from fastdiff.binomial.chain import p_sample, posterior, q_sample, q_step, sample
from fastdiff.binomial.schedule import BinomialSchedule

__all__ = [
    "BinomialSchedule", "Terms", "bound", "p_sample", "posterior", "q_sample", "q_step", "sample",
    "variational_bound",
]  # fmt: skip
