"""Training losses against plain float64 computations written from the papers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.adamw import adamw

import fastdiff as fd
from fastdiff.ops.call_loss import call_loss
from fastdiff.ops.loss import BOUND, COLUMNS, ERROR, X_START, LossSpec
from fastdiff.training.tables import PREDICTION_TYPES
from fastdiff.training.weighting import MinSNR
from tests.conftest import load_helper

backends = load_helper("loss_backends")
CHAIN = fd.schedules.linear(40, 1e-3, 0.2)
FLOW = fd.schedules.flow(20)
SIZES = (3, 4, 5, 7)  # 140 elements a sample
T = torch.tensor([0, 7, 19])


@pytest.fixture(params=["reference", "native"])
def backend(request):
    name = backends.use(request.param)
    with fd.use_backend(name):
        yield name


def data(shape, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def at(values, t=T, dims=4):
    return torch.from_numpy(np.array(values))[t].reshape(-1, *[1] * (dims - 1))


RHO = {
    "mse": lambda e, d: e**2,
    "l1": lambda e, d: e.abs(),
    "huber": lambda e, d: torch.where(e.abs() <= d, e**2 / 2, d * (e.abs() - d / 2)),
    "pseudo_huber": lambda e, d: (e**2 + d**2).sqrt() - d,
}


def plain_target(target, x, z, schedule):
    alpha, sigma = at(schedule.alpha_t), at(schedule.sigma_t)
    return {
        "epsilon": z, "sample": x, "v": alpha * z - sigma * x, "flow": z - x, "score": -z / sigma,
    }[target]  # fmt: skip


@pytest.mark.parametrize("schedule", [CHAIN, FLOW], ids=["chain", "flow"])
@pytest.mark.parametrize("kind", list(RHO))
@pytest.mark.parametrize("target", ["epsilon", "sample", "v", "flow", "score"])
def test_every_target_and_kind_is_the_papers(backend, schedule, target, kind):
    delta = 0.7
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 3e-6)):
        x, o = data(SIZES, 1, dtype), data(SIZES, 2, dtype).requires_grad_()
        z = fd.q_sample(x, T, schedule, seed=9, step=4, return_noise=True)[1]
        loss = fd.training.loss(
            o, x, T, schedule, target=target, seed=9, step=4, kind=kind, delta=delta
        )
        assert loss.dtype == dtype and loss.shape == (3,)
        wide = o.detach().double().requires_grad_()
        e = plain_target(target, x.double(), z.double(), schedule) - wide
        expected = RHO[kind](e, delta).mean(dim=(1, 2, 3))
        torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=0)
        weight = torch.tensor([1.0, -2.0, 0.5], dtype=dtype)
        (gradient,) = torch.autograd.grad((loss * weight).sum(), o)
        (exact,) = torch.autograd.grad((expected * weight).sum(), wide)
        # a gradient is as exact as e, whose terms are up to 1 / sigma_t
        torch.testing.assert_close(
            gradient.double(), exact, rtol=tolerance, atol=tolerance * float(exact.abs().max())
        )


def test_bfloat16_and_mixed_dtypes(backend):
    """Math and result in float32; noise as q_sample rounded it, the gradient rounded once."""
    x, o = data(SIZES, 1, torch.bfloat16), data(SIZES, 2, torch.bfloat16).requires_grad_()
    z = fd.q_sample(x, T, CHAIN, seed=9, return_noise=True)[1]
    loss = fd.training.loss(o, x, T, CHAIN, target="v", seed=9)
    assert loss.dtype == torch.float32 and z.dtype == torch.bfloat16
    wide = o.detach().double().requires_grad_()
    e = plain_target("v", x.double(), z.double(), CHAIN) - wide
    expected = (e**2).mean(dim=(1, 2, 3))
    torch.testing.assert_close(loss.double(), expected, rtol=3e-6, atol=0)
    (gradient,) = torch.autograd.grad(loss.sum(), o)
    (exact,) = torch.autograd.grad(expected.sum(), wide)
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient.double(), exact, rtol=2**-8, atol=1e-9)
    # float32 data under a bfloat16 model: float32 noise
    x = x.float()
    z = fd.q_sample(x, T, CHAIN, seed=9, return_noise=True)[1]
    loss = fd.training.loss(o, x, T, CHAIN, seed=9)
    expected = ((z.double() - wide) ** 2).mean(dim=(1, 2, 3))
    torch.testing.assert_close(loss.double(), expected, rtol=3e-6, atol=0)


def test_sources_of_noise_agree(backend, assert_same_bits):
    x, o = data(SIZES, 1, torch.float32), data(SIZES, 2, torch.float32)
    for target in ("epsilon", "v"):
        x_t, z = fd.q_sample(x, T, CHAIN, seed=5, step=2, sample_offset=3, return_noise=True)
        options = {"target": target, "weighting": "min_snr"}
        seeded = fd.training.loss(o, x, T, CHAIN, seed=5, step=2, sample_offset=3, **options)
        assert_same_bits(fd.training.loss(o, x, T, CHAIN, noise=z, **options), seeded)
        other = fd.training.loss(o, x, T, CHAIN, seed=6, step=2, sample_offset=3, **options)
        assert not torch.equal(other, seeded)
        told = fd.training.loss(o, x, T, CHAIN, x_t=x_t, **options)
        torch.testing.assert_close(told, seeded, rtol=1e-4, atol=0)
    seeds = torch.tensor([4, 2**62, 7])
    z = fd.q_sample(x, T, CHAIN, seed=seeds, return_noise=True)[1]
    assert_same_bits(
        fd.training.loss(o, x, T, CHAIN, seed=seeds), fd.training.loss(o, x, T, CHAIN, noise=z)
    )


@pytest.mark.parametrize("target", ["epsilon", "sample", "v", "flow", "score"])
def test_x_t_tells_the_noise(target):
    x, o = data(SIZES, 1), data(SIZES, 2)
    x_t = fd.q_sample(x, T, CHAIN, seed=5)
    a, b = ({"x_t": x_t}, {"seed": 5})
    options = {"target": target, "kind": "huber", "backend": "reference"}
    torch.testing.assert_close(
        fd.training.loss(o, x, T, CHAIN, **a, **options),
        fd.training.loss(o, x, T, CHAIN, **b, **options), rtol=1e-10, atol=0,
    )  # fmt: skip


def test_weightings_multiply(backend):
    x, o = data(SIZES, 1), data(SIZES, 2)
    plain = fd.training.loss(o, x, T, CHAIN, target="v", seed=1)
    for weighting in ("min_snr", MinSNR(1.5), "p2", lambda schedule: schedule.betas):
        w = torch.from_numpy(fd.training.weights(weighting, CHAIN, "v").copy())[T]
        weighted = fd.training.loss(o, x, T, CHAIN, target="v", seed=1, weighting=weighting)
        torch.testing.assert_close(weighted, plain * w, rtol=1e-12, atol=0)
    total = fd.training.loss(o, x, T, CHAIN, target="v", seed=1, reduction="sum")
    torch.testing.assert_close(total, plain * 140, rtol=1e-12, atol=0)


def test_the_pseudo_huber_metric_of_a_norm(backend):
    """Song & Dhariwal 2024, eq. 8: sqrt(||a - b||^2 + c^2) - c, as loss() says to make it."""
    x, o, c = data(SIZES, 1), data(SIZES, 2).requires_grad_(), 0.03
    squares = fd.training.loss(o, x, T, CHAIN, target="sample", reduction="sum")
    got = (squares + c * c).sqrt() - c
    norms = torch.linalg.vector_norm((x - o).flatten(1), dim=1)
    want = (norms**2 + c * c).sqrt() - c
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(v.sum(), o, retain_graph=True)[0] for v in (got, want)]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=0)


def test_a_target_of_ones_own(backend):
    x, o, own = data(SIZES, 1), data(SIZES, 2), data(SIZES, 3)
    loss = fd.training.loss(o, x, 3, CHAIN, target=own, kind="l1")
    torch.testing.assert_close(loss, (own - o).abs().mean(dim=(1, 2, 3)))
    with pytest.raises(ValueError, match=r"weighting MinSNR.* needs a target by name"):
        fd.training.loss(o, x, 3, CHAIN, target=own, weighting="min_snr")


def test_score_matching(backend):
    """lambda(sigma) / 2 ||s + z / sigma||^2, which lambda = sigma^2 makes ||sigma s + z||^2 / 2."""
    path = fd.schedules.ve(np.geomspace(0.01, 50.0, 20))
    x, s = data(SIZES, 1), data(SIZES, 2).requires_grad_()
    z = fd.q_sample(x, T, path, seed=2, return_noise=True)[1]
    sigma = at(path.sigma_t)
    loss = fd.training.score_matching_loss(s, x, T, path, seed=2)
    expected = 0.5 * ((sigma * s + z) ** 2).sum(dim=(1, 2, 3))
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    got, want = (torch.autograd.grad(v.sum(), s)[0] for v in (loss, expected))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    unweighted = fd.training.score_matching_loss(s, x, T, path, seed=2, weighting=None)
    torch.testing.assert_close(
        unweighted, 0.5 * ((s + z / sigma) ** 2).sum(dim=(1, 2, 3)), rtol=1e-12, atol=0
    )
    # x~ - x_0 = sigma z: as the paper writes it
    noisy = fd.q_sample(x, T, path, seed=2)
    torch.testing.assert_close(
        unweighted, 0.5 * ((s + (noisy - x) / sigma**2) ** 2).sum(dim=(1, 2, 3)), rtol=1e-9, atol=0
    )


@pytest.mark.parametrize("shape", [(3,), (1,)])
def test_the_preconditioned_loss_is_edms(backend, shape):
    """lambda ||D - x_0||^2 with D, c_skip, c_out and lambda of Karras et al., table 1."""
    sigma, s = torch.tensor([0.02, 1.0, 30.0], dtype=torch.float64)[: shape[0]], 0.5
    x, f = data(SIZES, 1), data(SIZES, 2).requires_grad_()
    z = fd.randn(SIZES, 8, step=6, stream=2, dtype=torch.float64)
    level = sigma.reshape(-1, 1, 1, 1)
    y = x + level * z
    c_skip = s**2 / (level**2 + s**2)
    c_out = level * s / (level**2 + s**2).sqrt()
    weight = (level**2 + s**2) / (level * s) ** 2
    expected = (weight * (c_skip * y + c_out * f - x) ** 2).mean(dim=(1, 2, 3))
    loss = fd.training.preconditioned_loss(f, x, sigma, seed=8, step=6)
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=0)
    got, want = (torch.autograd.grad(v.sum(), f)[0] for v in (loss, expected))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
    low = fd.training.preconditioned_loss(
        f.float(), x.float(), sigma.float(), noise=z.float(), reduction="sum"
    )
    torch.testing.assert_close(low.double(), expected * 140, rtol=3e-6, atol=0)
    made = fd.training.edm_scalings(sigma)
    torch.testing.assert_close(made.c_skip, c_skip.flatten(), rtol=1e-14, atol=0)
    torch.testing.assert_close(made.c_out, c_out.flatten(), rtol=1e-14, atol=0)
    torch.testing.assert_close(made.c_in, (sigma**2 + 0.25) ** -0.5, rtol=1e-14, atol=0)
    torch.testing.assert_close(made.c_noise, sigma.log() / 4, rtol=1e-14, atol=0)


def plain_hybrid(o, x, x_t, z, t, variance, prediction_type, weight):
    """Nichol & Dhariwal 2021 in plain float64: L_simple and lambda T times a term in bits, the
    mean of the second held fast; t > 0, where it is a KL."""
    alpha, sigma = at(CHAIN.alpha_t, t), at(CHAIN.sigma_t, t)
    channels = x.shape[1]
    mean_out, v = o[:, :channels], o[:, channels:]
    c1, c2 = at(CHAIN.posterior_mean_coef1, t), at(CHAIN.posterior_mean_coef2, t)
    target = {
        "epsilon": z, "sample": x, "v_prediction": alpha * z - sigma * x, "flow": z - x,
        "previous": c1 * x + c2 * x_t,
    }[prediction_type]  # fmt: skip
    mse = ((target - mean_out) ** 2).mean(dim=(1, 2, 3))
    held = mean_out.detach()
    x_start = {
        "epsilon": (x_t - sigma * held) / alpha, "sample": held,
        "v_prediction": alpha * x_t - sigma * held, "flow": (x_t - sigma * held) / (alpha + sigma),
        "previous": (held - c2 * x_t) / c1,
    }[prediction_type]  # fmt: skip
    small, large = at(CHAIN.posterior_log_variance_clipped, t), at(np.log(CHAIN.betas), t)
    f = (v + 1) / 2
    log_variance = f * large + (1 - f) * small if variance == "learned_range" else v
    true = torch.distributions.Normal(c1 * x + c2 * x_t, (small / 2).exp())
    model = torch.distributions.Normal(c1 * x_start + c2 * x_t, (log_variance / 2).exp())
    bits = torch.distributions.kl_divergence(true, model).mean(dim=(1, 2, 3)) / math.log(2.0)
    return mse, weight * len(CHAIN) * bits


@pytest.mark.parametrize("variance", ["learned_range", "learned"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_hybrid_loss_is_nichols(backend, prediction_type, variance):
    t = torch.tensor([2, 7, 19])
    x, o = data(SIZES, 1), data((3, 8, 5, 7), 2).requires_grad_()
    x_t, z = fd.q_sample(x, t, CHAIN, seed=3, return_noise=True)
    terms = fd.training.hybrid_loss(
        o, x, x_t, t, CHAIN, prediction_type=prediction_type, variance=variance, seed=3,
        vlb_weight=0.01,
    )  # fmt: skip
    mse, vb = plain_hybrid(o, x, x_t, z, t, variance, prediction_type, 0.01)
    torch.testing.assert_close(terms.mse, mse, rtol=1e-12, atol=0)
    torch.testing.assert_close(terms.vb, vb, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(terms.loss, mse + vb, rtol=1e-9, atol=0)
    got, want = (torch.autograd.grad(v.sum(), o)[0] for v in (terms.loss, mse + vb))
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)
    assert want[:, 4:].abs().min() > 0  # the bound's part


def test_the_hybrid_loss_in_low_precision(backend):
    """Against float64 of the numbers as they were rounded."""
    t = torch.tensor([0, 7, 19])  # t = 0 is the likelihood of 256 bins
    x = (data(SIZES, 1).clamp(-1, 1) * 127.5).round() / 127.5
    # (of the losses, of a gradient against the largest of its sample)
    for dtype, tolerances in ((torch.float32, (1e-5, 1e-5)), (torch.bfloat16, (1e-5, 2**-8))):
        x_start, z, o = x.to(dtype), data(SIZES, 4, dtype), data((3, 8, 5, 7), 2, dtype)
        x_t = fd.q_sample(x_start, t, CHAIN, noise=z)
        found = []
        for given in ((o, x_start, x_t, z), [v.double() for v in (o, x_start, x_t, z)]):
            leaf = given[0].clone().requires_grad_()
            terms = fd.training.hybrid_loss(
                leaf, *given[1:3], t, CHAIN, noise=given[3], vlb_weight=1.0
            )
            found.append((terms, torch.autograd.grad(terms.loss.sum(), leaf)[0]))
        (terms, gradient), (exact_terms, exact) = found
        assert terms.loss.dtype == torch.float32 and gradient.dtype == dtype
        for a, b in zip(terms, exact_terms, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=tolerances[0], atol=0)
        error = (gradient.double() - exact).flatten(1).abs().amax(1)
        assert (error <= tolerances[1] * exact.flatten(1).abs().amax(1)).all()


# Derivatives.


def columns(dtype=torch.float64, **values):
    table = torch.zeros(4, len(COLUMNS), dtype=dtype)
    rows = torch.tensor([1.0, 0.8, 1.3, 0.6], dtype=dtype)  # every row differs
    for name, value in values.items():
        table[:, COLUMNS.index(name)] = value * (1.0 if name in ("lo", "hi", "floor") else rows)
    return table


EVERYTHING = columns(
    lo=-0.9, hi=0.8, p_y=0.4, p_o=-0.7, e_x=0.3, e_y=-0.2, e_o=1.1, e_c=0.5, e_z=-0.6,
    error_scale=0.4, delta=0.8, d_x=0.9, d_y=-0.5, d_o=0.3, d_c=-0.8, l0=-0.4, l1=0.3,
    true_log_variance=-0.6, true_inverse_variance=1.7, half_inverse_variance=0.6, inverse_std=1.1,
    floor=27.0, sigma=0.7, bound_scale=0.6, bound_offset=0.2, x_start_scale=0.8,
)  # fmt: skip
SPECS = {
    "mse": LossSpec(ERROR, error=31, clamp=3, rho=0),
    "l1": LossSpec(ERROR, error=7, rho=1),
    "pseudo-huber": LossSpec(ERROR, error=23, rho=3),
    "huber": LossSpec(ERROR, error=7, rho=2),
    "bound": LossSpec(BOUND, bound=15, clamp=3),
    "likelihood": LossSpec(BOUND, bound=7, learned=True),
    "learned": LossSpec(ERROR | BOUND | X_START, error=31, bound=15, clamp=3, learned=True),
    "density": LossSpec(BOUND, bound=15, clamp=2, density=True, learned=True),
}


@pytest.mark.parametrize("guided", [False, True], ids=["", "guided"])
@pytest.mark.parametrize("name", SPECS)
def test_gradcheck(backend, name, guided):
    """Of model outputs alone (the fused pass), of all tensors (the definition), and twice."""
    spec, rows = SPECS[name], torch.tensor([2, 0])
    channels = 4 if spec.learned else 2
    outputs = [data((2, channels, 3), k).requires_grad_() for k in range(1 + guided)]
    x, y, z = (data((2, 2, 3), 5 + k) for k in range(3))
    scale = torch.tensor([1.5, -0.3]) if guided else None
    table = EVERYTHING.clone()
    table[:, COLUMNS.index("discretized")] = name == "likelihood"

    def f(*tensors):
        *given, x, y, z = tensors
        return call_loss(spec, given, x, y, table, rows, noise=[z], guidance_scale=scale)

    assert torch.autograd.gradcheck(f, (*outputs, x, y, z))
    everything = (*outputs, *(v.requires_grad_() for v in (x, y, z)))
    assert torch.autograd.gradcheck(f, everything)
    if name == "pseudo-huber":
        assert torch.autograd.gradgradcheck(f, everything)
        assert torch.autograd.gradgradcheck(f, (*outputs, x.detach(), y.detach(), z.detach()))


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_gradcheck_of_hybrid_losses(backend, prediction_type):
    """By what each part trains: the bound the variance alone, the error the prediction alone."""
    x, x_t, z, mean, v = (0.5 * data((3, 2, 3), k) for k in range(5))

    def parts(mean, v):
        return fd.training.hybrid_loss(
            torch.cat([mean, v], dim=1), x, x_t, T, CHAIN, prediction_type=prediction_type, noise=z
        )

    mean, v = (value.requires_grad_() for value in (mean, v))
    assert torch.autograd.gradcheck(lambda mean: parts(mean, v.detach()).mse, mean)
    assert torch.autograd.gradcheck(lambda v: parts(mean.detach(), v).vb, v)
    by_v, by_mean = (
        torch.autograd.grad(getattr(parts(mean, v), part).sum(), leaf)[0]
        for part, leaf in (("mse", v), ("vb", mean))
    )
    assert not by_v.any() and not by_mean.any()


@pytest.mark.parametrize("learned", [False, True])
def test_fused_gradients_are_the_definitions(backend, learned):
    """The fused pass against autograd through the definition, in float32, seeded."""
    spec = LossSpec(
        ERROR | BOUND, error=31, bound=15, clamp=3, learned=learned, frozen=learned
    )  # fmt: skip
    o = data((2, 4 if learned else 2, 30), 1, torch.float32).requires_grad_()
    x, y = data((2, 2, 30), 2, torch.float32), data((2, 2, 30), 3, torch.float32)
    table, rows = EVERYTHING.float(), torch.tensor([1, 3])

    def f():
        return call_loss(spec, [o], x, y, table, rows, counter=(7, 0, 1, 2))

    weights = torch.tensor([[1.0, 2.0], [-0.5, 3.0]])
    (fused,) = torch.autograd.grad((f() * weights).sum(), o)
    (plain,) = torch.autograd.grad((f() * weights).sum(), o, create_graph=True)
    assert plain.requires_grad or not plain.abs().sum()
    torch.testing.assert_close(fused, plain, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_taken_again_is_the_same(backend, assert_same_bits, dtype):
    """The first one, on a CPU in float32, is made of slopes that it uses up."""
    x, o = (data(SIZES, k, dtype) for k in (1, 2))
    o.requires_grad_()
    loss = fd.training.loss(o, x, T, CHAIN, seed=torch.arange(SIZES[0]), target="v", kind="huber")
    weights = torch.linspace(-1, 2, SIZES[0])
    first, again = (torch.autograd.grad(loss, o, weights, retain_graph=True)[0] for _ in range(2))
    assert_same_bits(first, again)
    assert first.data_ptr() != again.data_ptr()


def test_forward_mode(backend):
    o, x, direction = (data((2, 6), k) for k in range(3))

    def f(o):
        return fd.training.loss(o, x, 3, CHAIN, seed=1, target="v", kind="pseudo_huber")

    value, tangent = torch.func.jvp(f, (o,), (direction,))
    leaf = o.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(f(leaf).sum(), leaf)
    torch.testing.assert_close(value, f(o))
    torch.testing.assert_close(tangent, (gradient * direction).sum(dim=1))


def test_functional_gradients(backend):
    """torch.func.grad, of the loss and of the noising before it."""
    x, weight = data((2, 6), 1), torch.tensor(0.5, dtype=torch.float64)

    def f(weight, x):
        x_t = fd.q_sample(x, T[:2], CHAIN, seed=1)
        return fd.training.loss(weight * x_t, x, T[:2], CHAIN, seed=1).sum()

    leaves = [v.clone().requires_grad_() for v in (weight, x)]
    expected = torch.autograd.grad(f(*leaves), leaves)
    torch.testing.assert_close(torch.func.grad(f, argnums=(0, 1))(weight, x), expected)


def test_memory_layouts_keep_the_bits(backend, assert_same_bits):
    x, o = data(SIZES, 1, torch.float32), data(SIZES, 2, torch.float32).requires_grad_()
    plain = fd.training.loss(o, x, T, CHAIN, seed=1)
    (expected,) = torch.autograd.grad(plain.sum(), o)
    last = o.detach().to(memory_format=torch.channels_last).requires_grad_()
    loss = fd.training.loss(
        last, x.to(memory_format=torch.channels_last), T, CHAIN, seed=1
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(loss.sum(), last)
    assert_same_bits(loss, plain)
    assert_same_bits(gradient, expected)
    assert gradient.is_contiguous(memory_format=torch.channels_last)


def test_nothing_of_a_samples_size_is_kept_but_inputs():
    """In a type whose slopes are not kept in place of the gradient."""
    x, o = (data((3, 2000), k, torch.bfloat16) for k in (1, 2))  # more than a table has
    o.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor
    ):
        fd.training.loss(o, x, T, CHAIN, target="v", seed=1, backend="reference")
    large = {tensor.data_ptr() for tensor in kept if tensor.numel() >= x.numel()}
    assert large == {x.data_ptr(), o.data_ptr()}


# torch.compile.


def test_a_compiled_training_step(backend, assert_same_bits):
    model = torch.nn.Linear(7, 7)
    x = data(SIZES, 1, torch.float32)

    def step(x, t, k):
        x_t = fd.q_sample(x, t, CHAIN, seed=1, step=k)
        return fd.training.loss(
            model(x_t), x, t, CHAIN, target="v", seed=1, step=k, weighting="min_snr", kind="huber"
        )

    # The reference is slow to trace: Dynamo alone.
    counter = CompileCounterWithBackend("aot_eager" if backend == "native" else "eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for k in (3, 4, 5):
        found = []
        for f in (step, compiled):
            loss = f(x, T, k)
            found.append([loss, *torch.autograd.grad(loss.sum(), list(model.parameters()))])
        assert_same_bits(*found)
    assert counter.frame_count <= 2  # once as a constant, once for any step


@pytest.mark.skipif(
    not hasattr(torch._dynamo.config, "trace_autograd_ops"),
    reason="this torch compiles no backward inside a function",
)
def test_a_whole_training_step_is_one_graph(assert_same_bits):
    """x_t, model, loss, backward and AdamW; the optimizers' own step() breaks every graph."""
    x = data(SIZES, 1, torch.float32)
    counter, found = CompileCounterWithBackend("aot_eager"), []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Linear(7, 7)
        weights = list(model.parameters())
        moments = [[torch.zeros_like(w) for w in weights] for _ in range(2)]
        counts = [torch.zeros(()) for _ in weights]

        def step(t, k, model=model, weights=weights, moments=moments, counts=counts):
            x_t = fd.q_sample(x, t, CHAIN, seed=1, step=k)
            losses = fd.training.loss(model(x_t), x, t, CHAIN, target="v", seed=1, step=k)
            gradients = torch.autograd.grad(losses.mean(), weights)
            with torch.no_grad():
                adamw(
                    weights, list(gradients), *moments, [], counts, foreach=False, amsgrad=False,
                    beta1=0.9, beta2=0.99, lr=0.125, weight_decay=0.0, eps=1e-8, maximize=False,
                )  # fmt: skip
            return losses.detach()

        run = torch.compile(step, fullgraph=True, backend=counter) if compiled else step
        with torch._dynamo.config.patch(trace_autograd_ops=True):
            first, _, last = [run(T, k) for k in (3, 4, 5)]
        found.append((first, last, weights))
    (eager_first, eager_last, eager), (first, last, weights) = found
    assert_same_bits(first, eager_first)
    # The bias corrections 1 - beta^k are a tensor's in the graph, a Python float's outside.
    torch.testing.assert_close(weights, eager, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(last, eager_last, rtol=1e-5, atol=0)
    assert not torch.equal(last, first)
    assert counter.frame_count <= 2


def test_compiled_code_runs_the_fused_passes_both_ways():
    name = backends.use("native")
    x, o = data(SIZES, 1, torch.float32), data(SIZES, 2, torch.float32).requires_grad_()
    compiled = torch.compile(
        lambda o: fd.training.loss(o, x, T, CHAIN, seed=1, backend=name).sum(), fullgraph=True
    )
    compiled(o).backward()
    with torch.profiler.profile() as profile:
        compiled(o).backward()
    ran = {event.key for event in profile.key_averages()}
    assert {"fastdiff_native::loss", "fastdiff_native::loss_grad"} <= ran


def test_a_weighting_made_in_compiled_code_keeps_its_parameters(assert_same_bits):
    """It had those of its class: torch.compile forgets attributes on the way to the table."""
    x, o = data(SIZES, 1, torch.float32), data(SIZES, 2, torch.float32)
    w = torch.from_numpy(MinSNR(1.5)(CHAIN).copy()).float()[T]
    assert not torch.equal(w, torch.from_numpy(MinSNR()(CHAIN)).float()[T])

    def f(o):
        return fd.training.loss(o, x, T, CHAIN, seed=1, weighting=MinSNR(1.5))

    weighted = torch.compile(f, fullgraph=True, backend="eager")(o)
    assert_same_bits(weighted, f(o))
    plain = fd.training.loss(o, x, T, CHAIN, seed=1)
    torch.testing.assert_close(weighted, plain * w, rtol=1e-6, atol=0)


def test_tensors_without_values():
    """Shapes and dtypes alone, as export and memory planners ask."""
    with FakeTensorMode():
        x, t = torch.empty(SIZES, dtype=torch.bfloat16), torch.empty(3, dtype=torch.int64)
        for loss in (
            fd.training.loss(x, x, t, CHAIN, seed=0),
            fd.training.score_matching_loss(x, x, t, CHAIN, seed=0),
            fd.training.preconditioned_loss(x, x, torch.empty(3), seed=0),
            fd.training.hybrid_loss(torch.cat([x, x], 1), x, x, t, CHAIN, seed=0).loss,
        ):
            assert loss.shape == (3,) and loss.dtype == torch.float32


# Refusals.

X, Y = data((2, 6), 1), data((2, 6), 2)


def loss(*args, **options):
    return fd.training.loss(*args, **{"backend": "reference"} | options)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: loss(1.0, X, 3, CHAIN, seed=0), TypeError, "model_output must be a torch.Tensor"),
        (lambda: loss(Y, X[:, :5], 3, CHAIN, seed=0), ValueError, "x_start must have the shape"),
        (lambda: loss(Y, X.float(), 3, CHAIN, seed=0), TypeError, "x_start is torch.float32"),
        (lambda: loss(Y, X, 40, CHAIN, seed=0), ValueError, "t must be in"),
        (lambda: loss(Y, X, 3, CHAIN.betas, seed=0), TypeError, "schedule must be a schedule"),
        (lambda: loss(Y, X, 3, CHAIN, seed=0, target="noise"), ValueError, "target must be one of"),
        (lambda: loss(Y, X, 3, CHAIN, target=X[:1]), ValueError, "target must have the shape"),
        (lambda: loss(Y, X, 3, CHAIN, seed=0, kind="l2"), ValueError, "kind must be one of"),
        (lambda: loss(Y, X, 3, CHAIN, seed=0, delta=0), ValueError, "delta must be > 0"),
        (lambda: loss(Y, X, 3, CHAIN, seed=0, reduction="none"), ValueError, "reduction must be"),
        (lambda: loss(Y, X, 3, CHAIN), ValueError, "exactly one of seed, noise and x_t"),
        (
            lambda: loss(Y, X, 3, CHAIN, seed=0, noise=X), ValueError,
            "exactly one of seed, noise and x_t must be given, not seed and noise",
        ),
        (lambda: loss(Y, X, 3, CHAIN, noise=X[0]), ValueError, "noise must have the shape"),
        (lambda: loss(Y, X, 3, CHAIN, x_t=X[0]), ValueError, "x_t must have the shape"),
        (lambda: loss(Y, X, 3, CHAIN, seed=-1), ValueError, "seed must be in"),
        (lambda: loss(Y, X, 3, CHAIN, seed=0, step=-1), ValueError, "step must be in"),
        (lambda: loss(Y, X, 3, CHAIN, seed=0, weighting="x"), ValueError, "weighting must be one"),
        (
            lambda: loss(Y, X, 1, fd.schedules.ve([0.0, 1.0]), seed=0, target="score"), ValueError,
            r"target 'score' is undefined, e_z must be finite, got .*\[0\] = -inf",
        ),
        (
            lambda: fd.training.preconditioned_loss(Y, X, torch.tensor([1, 2]), seed=0), TypeError,
            "sigma must be a floating tensor",
        ),
        (
            lambda: fd.training.preconditioned_loss(Y, X, torch.rand(3), seed=0), ValueError,
            "sigma must have shape",
        ),
        (
            lambda: fd.training.preconditioned_loss(Y, X, torch.zeros(2), seed=0), ValueError,
            "sigma must be finite and > 0",
        ),
        (
            lambda: fd.training.hybrid_loss(Y, X, X, 3, CHAIN, seed=0), ValueError,
            "model_output must have the shape of x_t with twice the channels",
        ),
        (
            lambda: fd.training.hybrid_loss(Y, X, X, 3, FLOW, seed=0), TypeError,
            "schedule must be a NoiseSchedule",
        ),
        (
            lambda: fd.training.hybrid_loss(
                torch.cat([Y, Y], 1), X, X, 3, CHAIN, variance="fixed_small", seed=0
            ), ValueError, "variance must be one of learned, learned_range",
        ),
        (
            lambda: fd.training.hybrid_loss(torch.cat([Y, Y], 1), X, X, 3, CHAIN), ValueError,
            "exactly one of seed and noise",
        ),
        (lambda: fd.training.check_finite([1.0], 3), TypeError, "loss must be a torch.Tensor"),
        (lambda: fd.training.check_finite(X, 3), ValueError, r"loss must have shape \(B,\)"),
        (
            lambda: fd.training.check_finite(X[0], torch.tensor([1, 2])), ValueError,
            r"t must have shape \(6,\) or \(1,\), not \(2,\)",
        ),
        (
            lambda: fd.training.hybrid_loss(torch.cat([Y, Y], 1), X, X, 40, CHAIN, seed=0),
            ValueError, r"t must be in \[0, 40\), not 40",
        ),
        (
            lambda: fd.training.hybrid_loss(
                torch.cat([Y, Y], 1), X, X, 3, CHAIN, seed=0, prediction_type="score"
            ), ValueError, "prediction_type must be one of epsilon",
        ),
        (
            lambda: fd.training.score_matching_loss(Y, X, torch.tensor([0, 40]), CHAIN, seed=0),
            ValueError, r"t must be in \[0, 40\), but has 0 to 40",
        ),
    ],
)  # fmt: skip
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_check_finite_names_the_first_bad_sample():
    values = torch.tensor([1.0, 2.0, math.nan, math.inf])
    t = torch.tensor([4, 5, 6, 7])
    assert fd.training.check_finite(values[:2], t[:2]) is not None
    with pytest.raises(FloatingPointError, match=r"loss\[2\] is nan at t = 6; 2 of 4 samples"):
        fd.training.check_finite(values, t)
    with pytest.raises(FloatingPointError, match=r"loss\[0\] is inf at t = 9"):
        fd.training.check_finite(values[3:], 9)
    # a bad sample harms no other
    x, o = data((3, 5), 1), data((3, 5), 2)
    o[1, 2] = math.inf
    loss = fd.training.loss(o, x, T, CHAIN, seed=1, backend="reference")
    assert loss.isfinite().tolist() == [True, False, True]
    with pytest.raises(FloatingPointError, match=r"loss\[1\] is inf at t = 7"):
        fd.training.check_finite(loss, T)
