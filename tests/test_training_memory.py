"""What a training step takes from the allocator, measured: its outputs and the partial sums."""

from __future__ import annotations

import math

import pytest
import torch

import fastdiff as fd
from fastdiff.ops import bits
from fastdiff.ops.loss import partial_count
from tests.conftest import load_helper

backends = load_helper("loss_backends")
CHAIN = fd.schedules.linear(40, 1e-3, 0.3)
BITS = fd.binomial.BinomialSchedule.erasing(40)
PLAN = fd.solvers.ddpm(CHAIN, 6)
SHAPE = (4, 3, 64, 64)
T = torch.tensor([0, 7, 19, 30])
N = math.prod(SHAPE[1:])
# Some numbers a sample: t, weights, gradients of the losses. A picture is 24 kB at least.
SMALL = 128 * SHAPE[0]


def taken(step):
    """Bytes that `step` took from the allocator, the most at a time and those still held while its
    result lives. What was there before must stay."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        result = step()
    assert profile.profiler is not None
    events = profile.profiler.kineto_results.events()
    live = most = 0
    for event in events:
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    del result
    return most, live


def randn(shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_the_measure_is_of_the_peak():
    def chain():
        a = torch.ones(1000, dtype=torch.uint8)
        b = a + a
        del a
        c = b + b
        return c + c

    assert taken(chain) == (3000, 1000)


class Step:
    """x_t of the data, the loss, and its gradient by the model output, which is given."""

    def __init__(self, name, dtype):
        self.name, channels = name, 2 if name in ("hybrid", "vb_terms") else 1
        self.x = randn(SHAPE, 1).clamp(-1, 1).to(dtype)
        self.noise = randn(SHAPE, 2, dtype)
        shape = (SHAPE[0], SHAPE[1] * channels, *SHAPE[2:])
        self.output = randn(shape, 3, dtype).requires_grad_()

    def __call__(self, backend=None):
        x, o, name, options = self.x, self.output, self.name, dict(backend=backend)
        if name == "log_prob":
            value = fd.training.log_prob(PLAN, 2, x, o, self.noise, **options)
            value.mean().backward()
            return value
        if name == "bits":
            x_t = fd.binomial.q_sample(x, T, BITS, seed=3, step=1, **options)
            value = fd.binomial.bound(o, x, x_t, T, BITS, **options)
            value.mean().backward()
            return x_t, value
        seeded = dict(seed=3, step=1, **options)
        x_t = fd.q_sample(x, T, CHAIN, **seeded)
        if name == "hybrid":
            value = fd.training.hybrid_loss(o, x, x_t, T, CHAIN, **seeded)[0]
        elif name == "vb_terms":
            value = fd.training.vb_terms_bpd(
                o, x, x_t, T, CHAIN, variance="learned_range", **options
            )
        else:
            value = fd.training.loss(o, x, T, CHAIN, kind=name, weighting="min_snr", **seeded)
        value.mean().backward()
        return x_t, value

    def eager(self):
        """Of "mse", as it is written in PyTorch."""
        alpha, sigma = (
            torch.from_numpy(values.copy()).to(self.x)[T].view(-1, 1, 1, 1)
            for values in (CHAIN.alpha_t, CHAIN.sigma_t)
        )
        noise = torch.randn_like(self.x)
        x_t = alpha * self.x + sigma * noise
        value = ((noise - self.output) ** 2).mean(dim=(1, 2, 3))
        value.mean().backward()
        return x_t, value

    @property
    def allowed(self):
        """Bytes of what the step leaves, x_t and the gradient; and with the partial sums."""
        left = self.output.nbytes + (0 if self.name == "log_prob" else self.x.nbytes)
        terms = 2 if self.name == "hybrid" else 1
        count = bits.partial_count(N) if self.name == "bits" else partial_count(N)
        return left, left + 4 * SHAPE[0] * terms * count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "name", ["mse", "l1", "huber", "pseudo_huber", "hybrid", "vb_terms", "log_prob", "bits"]
)
def test_a_training_step_takes_its_outputs_and_the_partial_sums(name, dtype):
    """Beyond the model's: no noise, no error, no square is ever in memory."""
    native, step = backends.use("native"), Step(name, dtype)
    step(native)  # tables are made once
    step.output.grad = None
    left, most = step.allowed
    peak, held = taken(lambda: step(native))
    assert left <= held <= left + SMALL
    assert peak <= most + SMALL
    # The same as a chain of PyTorch's operations needs two tensors more at least.
    chains = [lambda: step("reference"), *([step.eager] if name == "mse" else [])]
    for chain in chains:
        step.output.grad = None
        assert taken(chain)[0] > most + SMALL + 2 * step.x.nbytes
