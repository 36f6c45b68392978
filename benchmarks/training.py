"""Losses and bounds of training against the chains of operations that people run today.

Opponents are the formulas as GaussianDiffusion classes evaluate them (tables gathered per call),
and torch.compile of those. A case is the forward pass alone, or with the gradient by the model's
output. Ours makes the noise of the loss again from its seed, or keeps it as the opponents do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastdiff as fd
from fastdiff.benchmarks import limits
from fastdiff.benchmarks.contestants import MAIN, SCHEDULE, SLOW, Compiled, drawn, gathered
from fastdiff.benchmarks.limits import data
from fastdiff.benchmarks.registry import Call, Case, Contest, register, shape_of
from fastdiff.noise import STREAM_Q_SAMPLE

ROW = 500  # of every sample
FLOAT, BFLOAT = torch.float32, torch.bfloat16


def mean_flat(x: Tensor) -> Tensor:
    return x.mean(dim=list(range(1, x.dim())))


def eager_loss(output: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """L_simple, and the x_t that the model had."""
    noise = torch.randn_like(x)
    x_t = gathered("sqrt_alphas_cumprod", t, x) * x
    x_t = (x_t + gathered("sqrt_one_minus_alphas_cumprod", t, x) * noise).to(x.dtype)
    return mean_flat((noise - output) ** 2), x_t


def plain_loss(output: Tensor, noise: Tensor) -> tuple[Tensor]:
    return (mean_flat((noise - output) ** 2),)


def our_loss(output: Tensor, x: Tensor, t: Tensor) -> tuple[Any, Any]:
    x_t = fd.q_sample(x, t, SCHEDULE, seed=1)
    return fd.training.loss(output, x, t, SCHEDULE, seed=1), x_t


def our_kept(output: Tensor, x: Tensor, t: Tensor) -> tuple[Any, Any]:
    x_t, noise = fd.q_sample(x, t, SCHEDULE, seed=1, return_noise=True)
    return fd.training.loss(output, x, t, SCHEDULE, noise=noise), x_t


def _cdf(x: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def predicted(epsilon: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """x_0."""
    x_start = gathered("sqrt_recip_alphas_cumprod", t, x_t) * x_t
    return x_start - gathered("sqrt_recipm1_alphas_cumprod", t, x_t) * epsilon


def eager_bound(output: Tensor, x: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor]:
    """A term of the bound in bits per dimension, the variance learned in a range; both the KL and
    the likelihood, chosen by t, as the classes do."""
    epsilon, v = output.chunk(2, dim=1)
    low = gathered("posterior_log_variance_clipped", t, x)
    high = gathered("log_betas", t, x)
    fraction = (v + 1) / 2
    log_variance = fraction * high + (1 - fraction) * low
    x_start = predicted(epsilon, x_t, t).clamp(-1, 1)
    c1, c2 = (gathered(f"posterior_mean_coef{k}", t, x) for k in (1, 2))
    mean, true = c1 * x_start + c2 * x_t, c1 * x + c2 * x_t
    kl = -1.0 + log_variance - low + torch.exp(low - log_variance)
    kl = 0.5 * (kl + (true - mean) ** 2 * torch.exp(-log_variance))
    inverse = torch.exp(-0.5 * log_variance)
    upper, lower = (_cdf(inverse * (x - mean + side / 255)) for side in (1.0, -1.0))
    inner = torch.where(x > 0.999, 1.0 - lower, upper - lower)
    likelihood = -torch.where(x < -0.999, upper, inner).clamp(min=1e-12).log()
    bits = [mean_flat(term) / math.log(2.0) for term in (kl, likelihood)]
    return (torch.where(t == 0, bits[1], bits[0]),)


def our_bound(output: Tensor, x: Tensor, x_t: Tensor, t: Tensor) -> tuple[Any]:
    found = fd.training.vb_terms_bpd(
        output, x, x_t, t, SCHEDULE, variance="learned_range", clip=(-1.0, 1.0)
    )
    return (found,)


Losses = Callable[..., tuple[Tensor, ...]]  # those of the samples, and what else is made


def gradient_of(function: Losses, output: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """The gradient of the sum of the losses by the model's output."""
    with torch.enable_grad():
        return torch.autograd.grad(function(output, *others)[0].sum(), output)


def taken(backward: bool, function: Losses) -> Losses:
    return partial(gradient_of, function) if backward else function


def add_compiled(
    extra: Compiled, name: str, backward: bool, function: Losses, output: Tensor, *others: Tensor,
    **options: bool,
) -> None:  # fmt: skip
    """The compiled losses; their gradient is compiled with them when it is wanted."""
    extra.add(name, function, output, *others, **options)
    if backward and name in extra.calls:
        losses = extra.calls[name]
        extra.calls[name] = lambda: gradient_of(lambda _: losses(), output)


def _close(actual: Tensor, expected: Tensor, dtype: torch.dtype, growth: float = 1.0) -> None:
    """To the rounding of the chain of operations, in which a bfloat16 tensor is on the way.

    Args:
        growth: how much larger than the result what it is the difference of can be.
    """
    tolerance = (2e-5 if dtype == FLOAT else 4e-2) * growth
    scale = float(expected.float().abs().max())
    torch.testing.assert_close(
        actual.float(), expected.float(), rtol=tolerance, atol=tolerance * scale
    )


def q_sample_and_loss(backward: bool, text: str, dtype: torch.dtype, compiles: bool) -> Contest:
    shape = shape_of(text)
    x, output, t = data(shape, 0, dtype), data(shape, 1, dtype), torch.full(shape[:1], ROW)
    output.requires_grad_(backward)

    again, kept = taken(backward, our_loss), taken(backward, our_kept)
    ours: dict[str, Call] = {
        "fastdiff": lambda: again(output, x, t),
        "fastdiff, noise kept": lambda: kept(output, x, t),
    }
    eager = taken(backward, eager_loss)
    opponents: dict[str, Call] = {"eager": lambda: eager(output, x, t)}
    extra = Compiled(compiles, dtype)
    add_compiled(
        extra, "compiled, torch's generator", backward, eager_loss, output, x, t,
        fallback_random=True,
    )  # fmt: skip
    opponents |= extra.calls

    def check(name: str) -> None:
        if name in ours:
            noise = fd.randn(shape, 1, stream=STREAM_Q_SAMPLE, dtype=dtype)
            actual = ours[name]()
        else:
            noise = drawn(lambda: torch.randn_like(x))
            actual = drawn(opponents[name])
        definition = taken(backward, partial(plain_loss, noise=noise.double()))
        leaf = output.detach().double().requires_grad_(backward)
        _close(actual[0], definition(leaf)[0], dtype)

    passes = 2 + 2 + (3 if backward else 0)  # x and x_t; x or nothing, and the output; gradient
    return Contest(
        ours, check, opponents, extra.absent, slow=SLOW,
        limits=limits.noise(shape, dtype) | limits.memory(passes * x.nbytes) | limits.call(),
        elements=x.numel(), bytes=passes * x.nbytes,
    )  # fmt: skip


def bound(backward: bool, text: str, dtype: torch.dtype, compiles: bool) -> Contest:
    shape = shape_of(text)
    x = data(shape, 0, dtype, 0.4).clamp_(-1, 1)
    t = torch.full(shape[:1], ROW)
    x_t: Any = fd.q_sample(x, t, SCHEDULE, seed=1)
    output: Tensor = data((shape[0], 2 * shape[1], *shape[2:]), 1, dtype)
    output.requires_grad_(backward)
    others: tuple[Tensor, Tensor, Tensor] = (x, x_t, t)

    ours, eager = taken(backward, our_bound), taken(backward, eager_bound)
    opponents: dict[str, Call] = {"eager": lambda: eager(output, *others)}
    extra = Compiled(compiles, dtype)
    add_compiled(extra, "compiled eager", backward, eager_bound, output, *others)
    opponents |= extra.calls

    def check(name: str) -> None:
        tensors = [tensor.detach().double() for tensor in (output, x, x_t)]
        tensors[0].requires_grad_(backward)
        expected = taken(backward, eager_bound)(*tensors, t)[0]
        actual = (ours(output, *others) if name == "fastdiff" else opponents[name]())[0]
        growth = 1.0
        if (
            name != "fastdiff"
        ):  # differences of means of which all but c1 (x_0 - prediction) cancels
            growth = float(SCHEDULE.posterior_mean_coef2[ROW] / SCHEDULE.posterior_mean_coef1[ROW])
        if backward:  # a prediction beside the clamp's bound has a gradient or none by its rounding
            x_start = predicted(tensors[0].detach().chunk(2, dim=1)[0], tensors[2], t)
            sure = ((x_start.abs() - 1).abs() > 1e-3).repeat(1, 2, *[1] * (x.dim() - 2))
            actual, expected = actual * sure, expected * sure
        _close(actual, expected, dtype, growth)

    passes = 4 + (2 + 4 if backward else 0)  # x, x_t and the output's two halves; those again, and
    return Contest(  # its gradient
        {"fastdiff": lambda: ours(output, *others)}, check, opponents, extra.absent, slow=SLOW,
        limits=limits.memory(passes * x.nbytes) | limits.call(),
        elements=x.numel(), bytes=passes * x.nbytes,
    )  # fmt: skip


for _kind, _make in (("q_sample and loss", q_sample_and_loss), ("vb terms", bound)):
    for _backward in (False, True):
        for _text in MAIN:
            for _dtype, _label in ((FLOAT, "fp32"), (BFLOAT, "bf16")):
                _name = f"{_kind}{', gradient' if _backward else ''} {_label} {_text}"
                _build = partial(_make, _backward, _text, _dtype, _dtype == FLOAT)
                _quick = _text == MAIN[1] and _dtype == FLOAT and _backward
                register(Case("training", _name, _build, _quick))
