"""Log-density of sampling steps: torch.distributions, gradients, ratios of exactly 1."""

from __future__ import annotations

import pytest
import torch

import fastdiff as fd
from tests.conftest import load_helper

backends = load_helper("loss_backends")
operations = load_helper("diffusers_operations")

CHAIN = fd.schedules.linear(40, 1e-3, 0.2)
SHAPE = (3, 4, 5, 7)
PLANS = {
    "ddpm": fd.solvers.ddpm(CHAIN, 6),
    "ddpm, fixed large, v": fd.solvers.ddpm(
        CHAIN, 6, variance="fixed_large", prediction_type="v_prediction", clip=None
    ),
    "ddpm, learned": fd.solvers.ddpm(CHAIN, 6, variance="learned_range"),
    "ddim": fd.solvers.ddim(CHAIN, 6, eta=0.7),
    "ddim, unclipped": fd.solvers.ddim(CHAIN, 6, eta=1.0, clip=None),
    "flow_sde": fd.solvers.flow_sde(6),
    "dance_grpo": fd.solvers.flow_sde(6, method="dance_grpo"),
}
ALL = pytest.mark.parametrize("plan", PLANS.values(), ids=list(PLANS))
GUIDED = pytest.mark.parametrize("g", [None, 2.5], ids=["", "guided"])


@pytest.fixture(params=["reference", "native"])
def backend(request):
    name = backends.use(request.param)
    with fd.use_backend(name):
        yield name


def data(shape, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def output_of(plan, g=None, seed=2, dtype=torch.float64):
    batch = SHAPE[0] * (1 if g is None else 2)
    return data((batch, (2 if plan.learned else 1) * SHAPE[1], *SHAPE[2:]), seed, dtype)


def normal(plan, i, x, output, g=None):
    """The Gaussian that row i draws from: the plan's own float64 rows, in PyTorch."""
    channels = x.shape[1]
    o = output
    if g is not None:
        first, second = output.chunk(2)
        o = first + g * (second - first)
        o = torch.cat([o[:, :channels], second[:, channels:]], dim=1)
    o, v = o[:, :channels], o[:, channels:]
    a_x, a_o, a_c, sigma = plan.A[i, 0].tolist()
    mean = a_x * x + a_o * o
    if a_c:
        p_x, p_o = plan.P[i, :2].tolist()
        mean = mean + a_c * (p_x * x + p_o * o).clamp(plan.lo[i], plan.hi[i])
    scale = torch.full_like(mean, abs(sigma))
    if plan.learned:
        f = (v + 1) / 2
        low, high = plan.half_log_variance_min[i], plan.half_log_variance_max[i]
        scale = scale * (f * high + (1 - f) * low).exp()
    return torch.distributions.Normal(mean, scale)


@ALL
@GUIDED
def test_it_is_the_density_of_the_normal(backend, plan, g):
    x, output = data(SHAPE, 1), output_of(plan, g).requires_grad_()
    for i in (0, 3):
        law = normal(plan, i, x, output, g)
        x_next = (law.mean + 1.3 * law.stddev * data(SHAPE, 4)).detach()
        expected = law.log_prob(x_next).sum(dim=(1, 2, 3))
        actual = fd.training.log_prob(plan, i, x, output, x_next, guidance_scale=g)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
        got, want = (torch.autograd.grad(v.sum(), output)[0] for v in (actual, expected))
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
        mean = fd.training.log_prob(
            plan, i, x, output, x_next, guidance_scale=g, reduction="mean"
        )  # fmt: skip
        torch.testing.assert_close(mean, expected / 140, rtol=1e-9, atol=1e-9)


@ALL
def test_low_precision_in_float32_out(backend, plan):
    x, output = data(SHAPE, 1), output_of(plan)
    x_next = normal(plan, 2, x, output).sample()
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.bfloat16, 0)):
        leaf = output.to(dtype).requires_grad_()
        given = x.to(dtype), leaf, x_next.to(dtype)
        actual = fd.training.log_prob(plan, 2, *given)
        assert actual.dtype == torch.float32
        wide = leaf.detach().double().requires_grad_()
        law = normal(plan, 2, given[0].double(), wide)
        expected = law.log_prob(given[2].double()).sum(dim=(1, 2, 3))
        # of the rounded inputs: the sums are as exact as float32 sums of 140 terms
        torch.testing.assert_close(actual.double(), expected, rtol=2e-5, atol=1e-3)
        (gradient,) = torch.autograd.grad(actual.sum(), leaf)
        (exact,) = torch.autograd.grad(expected.sum(), wide)
        assert gradient.dtype == dtype
        torch.testing.assert_close(
            gradient.double(), exact, rtol=tolerance or 2**-8, atol=1e-4 * float(exact.abs().max())
        )


@ALL
def test_gradients_of_everything(backend, plan):
    shape = (2, 2, 3)
    x, x_next = data(shape, 1).requires_grad_(), data(shape, 2).requires_grad_()
    output = data((2, 4 if plan.learned else 2, 3), 3).requires_grad_()
    rows = torch.tensor([1, 3])
    assert torch.autograd.gradcheck(
        lambda o: fd.training.log_prob(plan, rows, x.detach(), o, x_next.detach()), (output,)
    )
    assert torch.autograd.gradcheck(
        lambda *v: fd.training.log_prob(plan, rows, v[0], v[1], v[2]), (x, output, x_next)
    )


def model(plan):
    def f(x, t):
        o = torch.sin(3 * x) + 0.01 * t.reshape(-1, *[1] * (x.dim() - 1)).to(x.dtype)
        return torch.cat([o, torch.cos(x)], dim=1) if plan.learned else o

    return f


@ALL
@GUIDED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("in_place", [False, True], ids=["", "in_place"])
def test_a_trajectory_evaluated_again_has_a_ratio_of_one(
    backend, plan, g, dtype, in_place, assert_same_bits
):
    """While sampling, and afterwards row by row and for samples of mixed rows at once; the samples
    are those of a run without it."""
    guidance = None if g is None else torch.tensor([g, 1.0, -0.5])
    f = model(plan)
    options = {"seed": 5, "dtype": dtype, "guidance_scale": guidance, "in_place": in_place}
    run = fd.Sampler(plan).start(shape=SHAPE, **options)
    plain = fd.Sampler(plan).start(shape=SHAPE, **options)
    calls, total = [], torch.zeros(SHAPE[0])
    while not run.done:
        i, x = run.index, run.x.clone()
        output = f(run.model_input, run.t)
        if g is not None:  # halves that differ
            output = output + torch.arange(2).repeat_interleave(3).reshape(-1, 1, 1, 1) * 0.125
        x_next = run.step(output, log_prob=True)
        assert_same_bits(x_next, plain.step(output))
        assert_same_bits(run.model_input, plain.model_input)
        assert plain.log_prob is None
        calls.append((i, x, output, x_next.clone(), run.log_prob))
        total += run.log_prob
    again = torch.zeros(SHAPE[0])
    for i, x, output, x_next, sampled in calls:
        value = fd.training.log_prob(plan, i, x, output, x_next, guidance_scale=guidance)
        assert_same_bits(value, sampled)
        again += value
    assert torch.equal((again - total).exp(), torch.ones(SHAPE[0]))
    assert total.abs().min() > 0
    # sample b at row b + 1
    picked = [calls[b + 1] for b in range(3)]
    parts = [torch.stack([c[k][b] for b, c in enumerate(picked)]) for k in (1, 3)]
    output = torch.stack([c[2][b] for b, c in enumerate(picked)])
    if g is not None:
        output = torch.cat([output, torch.stack([c[2][b + 3] for b, c in enumerate(picked)])])
    mixed = fd.training.log_prob(
        plan, torch.tensor([1, 2, 3]), parts[0], output, parts[1], guidance_scale=guidance
    )
    assert_same_bits(mixed, torch.stack([c[4][b] for b, c in enumerate(picked)]))


@pytest.mark.parametrize("name", ["ddpm", "ddpm, learned"])
def test_every_source_of_noise_and_a_preview(backend, name, assert_same_bits):
    plan = PLANS[name]
    x = data(SHAPE, 1, torch.float32)
    output = output_of(plan, dtype=torch.float32)
    sources = (
        lambda: {"seed": torch.tensor([3, 5, 2**60])},
        lambda: {"generator": torch.Generator().manual_seed(4)},
        lambda: {"noise": lambda row, draw: data(SHAPE, 10 + row, torch.float32)},
        lambda: {"seed": 1, "preview": True},
        lambda: {"seed": 1, "sample_offset": 7, "model_dtype": torch.bfloat16},
    )
    for source in sources:
        a, b = (fd.Sampler(plan).start(x, **source()) for _ in range(2))
        for i in range(2):
            before = a.x.clone()
            x_next = a.step(output, log_prob=True)
            assert_same_bits(x_next, b.step(output))
            assert_same_bits(a.model_input, b.model_input)
            if a.x_start is not None:
                assert_same_bits(a.x_start, b.x_start)
            expected = fd.training.log_prob(plan, i, before, output, x_next)
            assert_same_bits(a.log_prob, expected)
    low = fd.Sampler(plan).start(x, seed=1)
    x_next = low.step(output, log_prob=True, result_dtype=torch.bfloat16)
    assert x_next.dtype == torch.bfloat16
    assert_same_bits(low.log_prob, fd.training.log_prob(plan, 0, x, output, x_next))


@ALL
@pytest.mark.parametrize("backend", ["native"], indirect=True)
def test_a_step_and_its_density_are_one_operation(backend, plan):
    run = fd.Sampler(plan).start(data(SHAPE, 1, torch.float32), seed=3)
    output = output_of(plan, dtype=torch.float32)
    with operations.Operations() as seen:
        run.step(output, log_prob=True)
    assert seen.names == ["fastdiff_native.loss"]


@ALL
def test_a_step_that_carries_gradients_counts_its_sample_as_given(backend, plan):
    x, output = data(SHAPE, 1), output_of(plan).requires_grad_()
    run = fd.Sampler(plan).start(x, seed=3)
    x_next = run.step(output, log_prob=True)
    assert x_next.requires_grad
    law = normal(plan, 0, x, output)
    (gradient,) = torch.autograd.grad(run.log_prob.sum(), output, retain_graph=True)
    expected = torch.autograd.grad(law.log_prob(x_next.detach()).sum(), output)[0]
    torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-8)


def test_rows_without_noise_are_point_masses(backend):
    for plan in (PLANS["ddpm"], PLANS["ddpm, learned"], PLANS["ddim"]):
        assert plan.A[-1, 0, -1] == 0
        x, output = data(SHAPE, 1, torch.float32), output_of(plan, dtype=torch.float32)
        output.requires_grad_()
        value = fd.training.log_prob(plan, 5, x, output, data(SHAPE, 3, torch.float32))
        assert torch.equal(value, torch.zeros(3))
        (gradient,) = torch.autograd.grad(value.sum(), output)
        assert not gradient.any()
        with torch.no_grad():
            run = fd.Sampler(plan).start(x, seed=0)
            run.index = 5
            run.step(output, log_prob=True)
        assert torch.equal(run.log_prob, torch.zeros(3))


def test_a_model_that_returns_its_input(backend, assert_same_bits):
    plan = PLANS["ddim"]
    options = {"seed": 1, "dtype": torch.float32, "model_dtype": torch.bfloat16, "preview": True}
    run = fd.Sampler(plan).start(shape=SHAPE, **options)
    x, output = run.x.clone(), run.model_input.clone()
    x_next = run.step(run.model_input, log_prob=True)
    assert_same_bits(run.log_prob, fd.training.log_prob(plan, 0, x, output, x_next))


def test_compiled_and_guarded(assert_same_bits):
    name = backends.use("native")
    x, x_next = data(SHAPE, 1, torch.float32), data(SHAPE, 2, torch.float32)

    def f(plan, i, output):
        return fd.training.log_prob(plan, i, x, output, x_next, backend=name)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for plan in (PLANS["ddpm"], PLANS["ddim, unclipped"]):
        output = output_of(plan, dtype=torch.float32).requires_grad_()
        for i in (1, 2, torch.tensor([0, 1, 2])):
            a, b = compiled(plan, i, output), f(plan, i, output)
            assert_same_bits(a, b)
            assert_same_bits(*(torch.autograd.grad(v.sum(), output) for v in (a, b)))


X, Y = data((2, 6), 1), data((2, 6), 2)
DDPM = PLANS["ddpm"]
log_prob = fd.training.log_prob


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: log_prob(CHAIN, 0, X, Y, X), TypeError, "plan must be a SolverPlan"),
        (
            lambda: log_prob(fd.solvers.ddim(CHAIN, 5), 0, X, Y, X), ValueError,
            "plan .* has no log-density of its steps: it has 0 draws",
        ),
        (
            lambda: log_prob(fd.solvers.dpmpp_2m_sde(CHAIN, 5), 0, X, Y, X), ValueError,
            "it has 2 states",
        ),
        (
            lambda: fd.Sampler(fd.solvers.ddim(CHAIN, 5)).start(X).step(Y, log_prob=True),
            ValueError, "has no log-density",
        ),
        (lambda: log_prob(DDPM, 6, X, Y, X), ValueError, r"i must be in \[0, 6\)"),
        (lambda: log_prob(DDPM, 1.0, X, Y, X), TypeError, "i must be an int"),
        (lambda: log_prob(DDPM, 0, X, Y[:, :5], X), ValueError, "model_output must have the shape"),
        (
            lambda: log_prob(DDPM, 0, X, Y, X, guidance_scale=2.0), ValueError,
            "model_output must have the shape of 2 x the batch",
        ),
        (lambda: log_prob(DDPM, 0, X, Y, X[:1]), ValueError, "x_next must have the shape of x"),
        (lambda: log_prob(DDPM, 0, X, Y.float(), X), TypeError, "model_output is torch.float32"),
        (lambda: log_prob(DDPM, 0, X, Y, X, reduction="none"), ValueError, "reduction must be one"),
        (
            lambda: log_prob(PLANS["ddpm, learned"], 0, X[:, 0], Y[:, 0], X[:, 0]), ValueError,
            "a learned variance doubles the channels",
        ),
    ],
)  # fmt: skip
def test_refusals(call, error, message):
    with pytest.raises(error, match=message), fd.use_backend("reference"):
        call()
