"""Gradients of the operations: first, second, forward mode, and what would break them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad

import fastdiff as fd

T = 50
SCHEDULE = fd.schedules.linear(T, 1e-3, 0.2)


def data(shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def test_gradients_are_the_coefficients(backend):
    x = data((2, 5)).requires_grad_()
    z = data((2, 5), seed=1).requires_grad_()
    t = torch.tensor([4, 40])
    x_t = fd.q_sample(x, t, SCHEDULE, noise=z)
    assert torch.equal(x_t, fd.q_sample(x.detach(), t, SCHEDULE, noise=z.detach()))
    gx, gz = torch.autograd.grad(x_t.sum(), [x, z])
    a = torch.from_numpy(np.array(SCHEDULE.alpha_t)).float()[t][:, None].expand(2, 5)
    s = torch.from_numpy(np.array(SCHEDULE.sigma_t)).float()[t][:, None].expand(2, 5)
    assert torch.equal(gx, a) and torch.equal(gz, s)
    seeded = fd.q_sample(x, t, SCHEDULE, seed=1)
    assert torch.equal(torch.autograd.grad(seeded.sum(), x)[0], a)


def test_overwriting_a_tensor_that_a_gradient_needs_is_noticed(backend):
    w = torch.ones(2, 5, requires_grad=True)
    buffer = data((2, 5))
    for overwrite in (
        lambda: fd.randn((2, 5), 0, out=buffer),
        lambda: fd.q_sample(data((2, 5)), 3, SCHEDULE, seed=0, out=buffer),
        lambda: fd.q_chain(data((5,)).view(1, 5), SCHEDULE, seed=0, at=[1, 4],
                           out=buffer.view(2, 1, 5)),
    ):  # fmt: skip
        h = (w * buffer).sum()
        overwrite()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            h.backward()


def test_out_is_refused_where_a_gradient_is_wanted():
    x = data((2, 5)).requires_grad_()
    with pytest.raises(ValueError, match="out must not be given where a gradient is wanted"):
        fd.q_sample(x, 3, SCHEDULE, seed=0, out=torch.empty(2, 5))
    with torch.no_grad():
        fd.q_sample(x, 3, SCHEDULE, seed=0, out=torch.empty(2, 5))


def test_second_derivatives():
    x = data((2, 3), torch.float64).requires_grad_()
    z = data((2, 3), torch.float64, 1).requires_grad_()

    def f(x, z):
        return fd.q_sample(x, torch.tensor([4, 40]), SCHEDULE, noise=z) ** 3

    assert torch.autograd.gradcheck(f, (x, z)) and torch.autograd.gradgradcheck(f, (x, z))


def test_gradients_are_the_same_when_they_will_be_differentiated():
    """Inputs that depend on each other, as a model's output depends on x_t."""
    x = data((2, 3), torch.float64).requires_grad_()
    t = torch.tensor([4, 40])
    calls = (
        lambda: fd.p_sample(torch.sin(x), x, t, SCHEDULE, seed=0, clip=None),
        lambda: fd.q_posterior_mean_variance(x, x, t, SCHEDULE)[0],
        lambda: fd.q_sample(x, t, SCHEDULE, noise=2 * x),
    )
    for call in calls:
        (plain,) = torch.autograd.grad((call() ** 2).sum(), x)
        (again,) = torch.autograd.grad((call() ** 2).sum(), x, create_graph=True)
        (expected,) = torch.autograd.grad((reference_of(call) ** 2).sum(), x)
        torch.testing.assert_close(plain, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(again, expected, rtol=1e-12, atol=1e-12)
        (second,) = torch.autograd.grad(again.sum(), x)
        (first,) = torch.autograd.grad((reference_of(call) ** 2).sum(), x, create_graph=True)
        (expected,) = torch.autograd.grad(first.sum(), x)
        torch.testing.assert_close(second, expected, rtol=1e-10, atol=1e-10)


def reference_of(call):
    """The same call with plain PyTorch's own autograd through the definition."""
    with forward_ad.dual_level():  # forward mode takes the definition, without the wrapper
        return call()


def test_forward_mode_derivatives(backend):
    x, direction = data((2, 5)), data((2, 5), seed=1)
    t = torch.tensor([4, 40])
    value, tangent = torch.func.jvp(
        lambda x: fd.q_sample(x, t, SCHEDULE, seed=0), (x,), (direction,)
    )
    assert torch.equal(value, fd.q_sample(x, t, SCHEDULE, seed=0))
    a = torch.from_numpy(np.array(SCHEDULE.alpha_t)).float()[t][:, None]
    torch.testing.assert_close(tangent, a * direction)


def test_forward_mode_derivatives_of_a_run():
    """d x_0 / d scale through every step, forward, equals the backward derivative."""
    plan = fd.solvers.ddim(SCHEDULE, 5, clip=None)

    def final(scale):
        run = fd.Sampler(plan).start(shape=(1, 4), seed=0, dtype=torch.float64)
        while not run.done:
            run.step(scale * torch.sin(run.model_input))
        return run.x.sum()

    scale = torch.tensor(0.7, dtype=torch.float64)
    _, tangent = torch.func.jvp(final, (scale,), (torch.ones_like(scale),))
    leaf = scale.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(final(leaf), leaf)
    torch.testing.assert_close(tangent, gradient)
