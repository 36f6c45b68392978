"""The drop-in for guided-diffusion against the papers' formulas in float64.

`Paper` is written from Ho et al. 2020 (H), Nichol & Dhariwal 2021 (N), Song et al. 2021 (S) and
Dhariwal & Nichol 2021 (D), in plain PyTorch of any dtype. It draws as upstream does: torch.randn
for x_T and float32 randn_like(x) at every step, also at t = 0 and with eta = 0.
"""

from __future__ import annotations

import copy
import enum
import math
import pickle

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiff as fd
from fastdiff.integrations import gaussian_diffusion as gd

MEANS = list(gd.ModelMeanType)
VARIANCES = list(gd.ModelVarType)
EPSILON, START_X, PREVIOUS_X = (
    gd.ModelMeanType.EPSILON, gd.ModelMeanType.START_X, gd.ModelMeanType.PREVIOUS_X,
)  # fmt: skip
SMALL, RANGE = gd.ModelVarType.FIXED_SMALL, gd.ModelVarType.LEARNED_RANGE
SHAPE = (3, 2, 4, 5)
# Gaussian data N(MU, S^2): the exact denoiser is linear, and the clamp at 1 is often active.
MU, S = 0.6, 0.7


def name_of(value):
    return value.name if hasattr(value, "name") else str(value)


class Paper:
    """A chain of the kept steps of T linear betas, with the exact denoiser of the data above."""

    def __init__(self, T, kept=None, mean=EPSILON, variance=SMALL, dtype=torch.float64):
        self.train_betas = np.linspace(0.1 / T, min(20 / T, 0.5), T)
        kept = np.arange(T) if kept is None else np.array(sorted(kept))
        self.kept, self.mean, self.variance, self.dtype = kept, mean, variance, dtype
        abar = np.cumprod(1 - self.train_betas)[kept]
        prev = np.append(1.0, abar[:-1])
        beta = 1 - abar / prev
        self.steps = len(kept)
        tilde = beta * (1 - prev) / (1 - abar)  # H eq. 7
        small = np.log(np.append(tilde[1], tilde[1:]))
        large = np.log(np.append(tilde[1], beta[1:]))
        gain = np.sqrt(abar) * S**2 / (abar * S**2 + 1 - abar)
        values = dict(
            abar=abar, prev=prev, next=np.append(abar[1:], 0.0), beta=beta, tilde=tilde,
            small=small, large=large, log_beta=np.log(beta), gain=gain,
            c1=np.sqrt(prev) * beta / (1 - abar), c2=np.sqrt(1 - beta) * (1 - prev) / (1 - abar),
            alpha=np.sqrt(abar), sigma=np.sqrt(1 - abar),
        )  # fmt: skip
        self.values = {k: torch.from_numpy(v).to(dtype) for k, v in values.items()}

    def at(self, name, t):
        return self.values[name][t].reshape(-1, 1, 1, 1)

    def output(self, x, t):
        """What the model says at index t of the kept steps, in the dtype of x."""
        alpha, sigma, gain, c1, c2 = (
            self.at(k, t).to(x.dtype) for k in ("alpha", "sigma", "gain", "c1", "c2")
        )
        x0 = MU + gain * (x - alpha * MU)
        out = {
            START_X: x0, EPSILON: (x - alpha * x0) / sigma, PREVIOUS_X: c1 * x0 + c2 * x,
        }[self.mean]  # fmt: skip
        if self.variance is RANGE:
            return torch.cat([out, torch.sin(3 * x)], dim=1)
        if self.variance is gd.ModelVarType.LEARNED:
            return torch.cat([out, torch.sin(3 * x) - 3], dim=1)
        return out

    def transition(self, output, x, t, clip=True, hook=None):
        """Mean, log-variance and x_0 of p(x_{t-1} | x_t)."""

        def at(name):
            return self.at(name, t)

        v = None
        if output.shape != x.shape:
            output, v = output.chunk(2, dim=1)
        x0 = {
            START_X: output,
            EPSILON: (x - at("sigma") * output) / at("alpha"),  # H eq. 15
            PREVIOUS_X: (output - at("c2") * x) / at("c1"),  # H eq. 7
        }[self.mean]
        x0 = x0 if hook is None else hook(x0)
        x0 = x0.clamp(-1, 1) if clip else x0
        mean = output if self.mean is PREVIOUS_X else at("c1") * x0 + at("c2") * x
        if self.variance is RANGE:  # N eq. 15
            log_variance = (v + 1) / 2 * at("log_beta") + (1 - v) / 2 * at("small")
        elif self.variance is gd.ModelVarType.LEARNED:
            log_variance = v
        else:
            log_variance = at("small" if self.variance is SMALL else "large") + 0 * x
        return mean, log_variance, x0

    def p_sample(self, x, t, clip=True, hook=None, cond=None, noise=None):
        mean, log_variance, x0 = self.transition(self.output(x, t), x, t, clip, hook)
        if cond is not None:  # D algorithm 1
            variance = log_variance.exp()
            if self.variance is SMALL:
                variance = self.at("tilde", t)
            mean = mean + variance * cond(x)
        keep = (t > 0).reshape(-1, 1, 1, 1)
        return mean + keep * (log_variance / 2).exp() * noise.to(self.dtype), x0

    def ddim_sample(self, x, t, clip=True, hook=None, cond=None, noise=None, eta=0.0):

        def at(name):
            return self.at(name, t)

        _, _, x0 = self.transition(self.output(x, t), x, t, clip, hook)
        if cond is not None:  # D algorithm 2
            eps = (x - at("alpha") * x0) / at("sigma") - at("sigma") * cond(x)
            x0 = (x - at("sigma") * eps) / at("alpha")
        eps = (x - at("alpha") * x0) / at("sigma")
        sigma = eta * ((1 - at("prev")) / (1 - at("abar")) * (1 - at("abar") / at("prev"))).sqrt()
        x_prev = at("prev").sqrt() * x0 + (1 - at("prev") - sigma**2).sqrt() * eps  # S eq. 12
        return x_prev + sigma * noise.to(self.dtype), x0

    def loop(self, step, **options):
        x = torch.randn(*SHAPE).to(self.dtype)
        for i in reversed(range(self.steps)):
            noise = torch.randn(SHAPE)
            x, x0 = step(self, x, torch.full((SHAPE[0],), i), noise=noise, **options)
        return x, x0

    def model(self, x, t):
        """The model as users have it: called with the training chain's t."""
        index = torch.from_numpy(np.searchsorted(self.kept, t.numpy()))
        assert (torch.from_numpy(self.kept)[index] == t).all()
        return self.output(x, index)

    def diffusion(self, loss=gd.LossType.MSE, **kwargs):
        return gd.SpacedDiffusion(
            self.kept.tolist(), betas=self.train_betas, model_mean_type=self.mean,
            model_var_type=self.variance, loss_type=loss, **kwargs,
        )  # fmt: skip


def hook(x0):
    return 0.8 * x0 + 0.15


def cond(x, t=None):
    return -0.4 * (x - 0.3)


def rms(value):
    return float(value.double().square().mean().sqrt())


def assert_as_good_as_plain_float32(got, plain, exact, calls, largest):
    """rms error <= 2x that of plain float32 PyTorch, plus the rounding of a few operations a call.

    Coefficients, sums and the model's own float32 rounding differ between two right programs: 4
    ulp of the largest value in a step, accumulated like a random walk over the calls.
    """
    slack = 4 * 2**-24 * math.sqrt(calls) * largest
    assert rms(got - exact) <= 2 * rms(plain - exact) + slack


CHAINS = {"whole": (10, None), "spaced": (60, [0, 7, 15, 22, 30, 37, 45, 52, 59])}
CASES = [
    ("p", {}), ("ddim", dict(eta=0.0)), ("ddim", dict(eta=0.7)),
]  # fmt: skip


@pytest.mark.parametrize("hooks", ["", "denoised_fn", "cond_fn", "both"])
@pytest.mark.parametrize("clip", [True, False], ids=["clip", "free"])
@pytest.mark.parametrize("variance", VARIANCES, ids=name_of)
@pytest.mark.parametrize("mean", MEANS, ids=name_of)
@pytest.mark.parametrize("chain", CHAINS)
def test_loops_are_the_papers_with_upstreams_draws(chain, mean, variance, clip, hooks):
    T, kept = CHAINS[chain]
    options = dict(clip=clip, hook=hook if hooks in ("denoised_fn", "both") else None,
                   cond=cond if hooks in ("cond_fn", "both") else None)  # fmt: skip
    paper, plain = (
        Paper(T, kept, mean, variance, dtype) for dtype in (torch.float64, torch.float32)
    )
    diffusion = paper.diffusion()
    for kind, extra in CASES:
        step = Paper.p_sample if kind == "p" else Paper.ddim_sample
        torch.manual_seed(5)
        exact, exact_x0 = paper.loop(step, **options, **extra)
        state = torch.get_rng_state()
        torch.manual_seed(5)
        rough, rough_x0 = plain.loop(step, **options, **extra)
        torch.manual_seed(5)
        progressive = getattr(diffusion, f"{kind}_sample_loop_progressive")
        *_, out = progressive(
            paper.model, SHAPE, clip_denoised=clip, denoised_fn=options["hook"],
            cond_fn=options["cond"], device="cpu", **extra,
        )  # fmt: skip
        assert torch.equal(torch.get_rng_state(), state)  # as many draws
        assert out["sample"].dtype == torch.float32
        largest = 4.0
        calls = paper.steps
        assert_as_good_as_plain_float32(out["sample"], rough, exact, calls, largest)
        assert_as_good_as_plain_float32(out["pred_xstart"], rough_x0, exact_x0, calls, largest)


@pytest.mark.parametrize("variance", VARIANCES, ids=name_of)
@pytest.mark.parametrize("mean", MEANS, ids=name_of)
def test_p_mean_variance_is_the_papers_at_mixed_t(mean, variance):
    paper = Paper(20, None, mean, variance)
    x, t = 1.5 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)), [0, 7, 19]
    t = torch.tensor(t)
    got = paper.diffusion().p_mean_variance(paper.model, x, t, denoised_fn=hook)
    want, log_variance, x0 = paper.transition(paper.output(x, t).double(), x.double(), t, hook=hook)
    expected = log_variance.exp()
    if variance is SMALL:
        expected = paper.at("tilde", t) + 0 * log_variance
    assert all(value.shape == SHAPE and value.dtype == torch.float32 for value in got.values())
    # x_0 is x / alpha_t - ..: float32 rounding times 1 / alpha_T = 130.
    torch.testing.assert_close(got["mean"].double(), want, rtol=0, atol=1e-5)
    torch.testing.assert_close(got["pred_xstart"].double(), x0, rtol=0, atol=5e-5)
    torch.testing.assert_close(got["log_variance"].double(), log_variance, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got["variance"].double(), expected, rtol=5e-6, atol=0)


@pytest.mark.parametrize("method", ["p_sample", "ddim_sample", "ddim_reverse_sample"])
def test_every_sample_of_a_batch_has_its_own_t(assert_same_bits, method):
    paper = Paper(20, None, EPSILON, RANGE)
    diffusion, t = paper.diffusion(), torch.tensor([19, 0, 6])
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
    seed = {} if "reverse" in method else dict(seed=torch.tensor([5, 6, 7]))
    batch = getattr(diffusion, method)(paper.model, x, t, **seed)
    for b in range(3):
        one = {k: v[b : b + 1] for k, v in seed.items()}
        alone = getattr(diffusion, method)(paper.model, x[b : b + 1], t[b : b + 1], **one)
        for key in ("sample", "pred_xstart"):
            assert_same_bits(batch[key][b : b + 1], alone[key])


def test_reverse_ddim_is_the_papers_and_undoes_ddim():
    """Song et al. 2021, eq. 14 with the steps' roles exchanged; back by eq. 12 at the same eps."""
    paper = Paper(40)
    diffusion = paper.diffusion()
    x, t = MU + S * torch.randn(SHAPE), torch.tensor([0, 20, 39])
    got = diffusion.ddim_reverse_sample(paper.model, x, t, clip_denoised=False)
    _, _, x0 = paper.transition(paper.output(x.double(), t), x.double(), t, clip=False)
    eps = (x - paper.at("alpha", t) * x0) / paper.at("sigma", t)
    nxt = paper.at("next", t)
    want = nxt.sqrt() * x0 + (1 - nxt).sqrt() * eps
    torch.testing.assert_close(got["sample"].double(), want, rtol=0, atol=2e-5)
    kept = t[:2]
    eps = eps[:2].float()
    back = diffusion.ddim_sample(
        lambda *_: eps, got["sample"][:2], kept + 1, clip_denoised=False
    )["sample"]  # fmt: skip
    torch.testing.assert_close(back, x[:2], rtol=0, atol=2e-5)


def test_gaussian_data_come_out_as_they_are():
    """A linear denoiser makes x_0 Gaussian, with mean and variance by recursion in float64."""
    paper = Paper(50)
    values = {k: v.numpy() for k, v in paper.values.items()}
    mean, variance = 0.0, 1.0
    for t in reversed(range(50)):
        gain, alpha = values["gain"][t], values["alpha"][t]
        a = values["c1"][t] * gain + values["c2"][t]
        mean = a * mean + values["c1"][t] * (MU - gain * alpha * MU)
        variance = a * a * variance + (values["tilde"][t] if t else 0.0)
    torch.manual_seed(0)
    x = paper.diffusion().p_sample_loop(
        paper.model, (1, 1, 400, 500), clip_denoised=False, device="cpu"
    )
    # 200000 draws: standard errors of mean and variance are 0.0016 and 0.0015.
    assert float(x.mean()) == pytest.approx(mean, abs=0.007)
    assert float(x.var()) == pytest.approx(variance, abs=0.007)
    assert mean == pytest.approx(MU, abs=1e-4)


def test_deterministic_ddim_follows_the_flow_of_gaussian_data():
    """The ODE maps x_T to MU + S (x_T - alpha_T MU) / std(x_T); 1000 steps leave 1 % of error."""
    paper = Paper(1000)
    x_T = torch.randn(SHAPE, generator=torch.Generator().manual_seed(4))
    x = paper.diffusion().ddim_sample_loop(paper.model, SHAPE, noise=x_T, clip_denoised=False)
    alpha, sigma = (float(paper.values[k][-1]) for k in ("alpha", "sigma"))
    flow = MU + S * (x_T - alpha * MU) / math.sqrt(alpha**2 * S**2 + sigma**2)
    assert rms(x - flow) < 0.01


@pytest.mark.parametrize(("kind", "first"), [("p", "noise"), ("ddim", "gradient")])
def test_a_cond_fn_that_draws_draws_in_upstreams_order(kind, first):
    """p_sample draws its noise before condition_mean, ddim_sample after condition_score."""
    paper, t = Paper(10), torch.tensor([9, 1, 4])
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(8))
    torch.manual_seed(2)
    draws = [torch.randn(SHAPE), torch.randn(SHAPE)]
    noise, gradient = draws if first == "noise" else draws[::-1]
    step, extra = (paper.p_sample, {}) if kind == "p" else (paper.ddim_sample, dict(eta=0.5))
    want, _ = step(x.double(), t, cond=lambda x: gradient.double(), noise=noise, **extra)
    torch.manual_seed(2)
    got = getattr(paper.diffusion(), f"{kind}_sample")(
        paper.model, x, t, cond_fn=lambda x, t: torch.randn_like(x), **extra
    )["sample"]  # fmt: skip
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-5)


# Launches.


class Launches(TorchDispatchMode):
    """Names of the dispatched operations that do something: no views, no allocations."""

    FREE = (
        "detach", "select", "slice", "view", "expand", "empty", "new_empty", "alias", "split",
        "unbind", "promote_types",
    )  # fmt: skip

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split("::")[-1]
        if not any(name.startswith(free) for free in self.FREE):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


class Fixed:
    """A model, or a hook, that launches nothing."""

    def __init__(self, result):
        self.result = result

    def __call__(self, *_):
        return self.result


def launches(diffusion, method, hooks=(), **options):
    channels = 4 if "LEARNED" in diffusion.model_var_type.name else 2
    model = Fixed(torch.zeros(3, channels, 4, 5))
    fixed = {name: Fixed(torch.zeros(SHAPE)) for name in hooks}
    steps = getattr(diffusion, method)(model, SHAPE, device="cpu", **fixed, **options)
    next(steps)
    with Launches() as counted:
        next(steps)
        next(steps)
    half = len(counted.names) // 2
    assert counted.names[:half] == counted.names[half:]
    return sorted(counted.names[:half])


@pytest.mark.parametrize("kwargs", [{}, dict(rescale_timesteps=True)], ids=["t", "rescaled"])
@pytest.mark.parametrize("clip", [True, False], ids=["clip", "free"])
@pytest.mark.parametrize("variance", VARIANCES, ids=name_of)
@pytest.mark.parametrize("mean", MEANS, ids=name_of)
def test_a_step_is_one_launch_and_the_draw(mean, variance, clip, kwargs):
    diffusion = Paper(60, CHAINS["spaced"][1], mean, variance).diffusion(**kwargs)
    options = dict(clip_denoised=clip)
    for loop in ("p_sample_loop_progressive", "ddim_sample_loop_progressive"):
        assert launches(diffusion, loop, **options) == ["randn_like", "step"]
        assert launches(diffusion, loop, seed=3, **options) == ["step"]


@pytest.mark.parametrize(
    ("method", "variance", "mean", "hooks", "steps"),
    [
        ("p", SMALL, EPSILON, ["cond_fn"], 1),
        ("p", RANGE, EPSILON, ["cond_fn"], 2),
        ("ddim", RANGE, EPSILON, ["cond_fn"], 1),
        ("p", RANGE, EPSILON, ["denoised_fn"], 2),
        ("ddim", SMALL, EPSILON, ["denoised_fn", "cond_fn"], 2),
        ("p", SMALL, START_X, ["denoised_fn"], 1),
    ],
)
def test_hooks_split_a_step_as_little_as_they_must(method, variance, mean, hooks, steps):
    diffusion = Paper(60, CHAINS["spaced"][1], mean, variance).diffusion()
    names = launches(diffusion, f"{method}_sample_loop_progressive", hooks)
    assert names == ["randn_like", *["step"] * steps]


def test_a_single_step_reads_nothing_back():
    """The mapped t is one gather; nothing is copied or read."""
    diffusion = Paper(60, CHAINS["spaced"][1], EPSILON, RANGE).diffusion()
    model, x, t = Fixed(torch.zeros(3, 4, 4, 5)), torch.zeros(SHAPE), torch.tensor([8, 0, 3])
    diffusion.p_sample(model, x, t)
    with Launches() as counted:
        diffusion.p_sample(model, x, t)
    assert sorted(counted.names) == ["index.Tensor", "randn_like", "step"]


@pytest.mark.parametrize(
    ("kind", "mean", "variance", "hooks", "extra"),
    [
        ("p", START_X, RANGE, {}, {}),
        ("p", PREVIOUS_X, gd.ModelVarType.LEARNED, dict(denoised_fn=hook), {}),
        ("p", EPSILON, RANGE, dict(cond_fn=cond, denoised_fn=hook), {}),
        ("p", EPSILON, SMALL, dict(cond_fn=cond), {}),
        ("ddim", EPSILON, RANGE, dict(cond_fn=cond), {}),
        ("ddim", START_X, RANGE, {}, dict(eta=0.5)),
    ],
)
def test_every_backend_computes_the_same_bits(
    accelerated, assert_same_bits, kind, mean, variance, hooks, extra
):
    """Model outputs in bfloat16, so that outputs of one pass differ in dtype."""
    diffusion = Paper(10, None, mean, variance).diffusion()
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(SHAPE, generator=generator)
    channels = 4 if "LEARNED" in variance.name else 2
    model = Fixed(torch.randn(3, channels, 4, 5, generator=generator).bfloat16())
    results = []
    for name in (accelerated, "reference"):
        with fd.use_backend(name):
            step = getattr(diffusion, f"{kind}_sample")
            out = step(model, x, torch.tensor([9, 0, 4]), seed=3, **hooks, **extra)
        results.append([out["sample"], out["pred_xstart"]])
    assert_same_bits(*results)


def test_steps_compile_into_one_graph():
    paper = Paper(10, None, EPSILON, RANGE)
    diffusion, t = paper.diffusion(), torch.tensor([9, 0, 4])
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(8))

    def f(x, t):
        def model(x, t):
            return torch.cat([x, 0.1 * x], dim=1)

        noised = diffusion.q_sample(x, t, noise=x)
        return diffusion.ddim_sample(model, noised, t)["sample"]

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, t), f(x, t))


# Dtypes.


@pytest.mark.parametrize(
    ("x", "output", "sample"),
    [
        (torch.float16, torch.float16, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float64, torch.float32, torch.float64),
        (torch.float32, torch.float64, torch.float64),
    ],
)
def test_float_tables_promote_as_upstream(x, output, sample):
    given = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3)).to(x)
    t, paper = torch.tensor([1, 4, 9]), Paper(10, None, EPSILON)
    made = paper.output(given.double(), t).to(output)
    diffusion = paper.diffusion()
    torch.manual_seed(2)
    got = diffusion.p_sample(Fixed(made), given, t)
    torch.manual_seed(2)
    noise = torch.randn_like(given)
    mean, log_variance, x0 = paper.transition(made.double(), given.double(), t)
    want = mean + (log_variance / 2).exp() * noise.double()
    assert got["sample"].dtype == got["pred_xstart"].dtype == sample
    bound = 2e-5 if sample == torch.float32 else 1e-12
    torch.testing.assert_close(got["sample"].double(), want, rtol=0, atol=bound)
    torch.testing.assert_close(got["pred_xstart"].double(), x0, rtol=0, atol=bound)
    wide = torch.float64 if x == torch.float64 else torch.float32
    assert diffusion.q_sample(given, t).dtype == wide
    assert diffusion.q_posterior_mean_variance(given, given, t)[0].dtype == wide
    assert diffusion.q_mean_variance(given, t)[1].dtype == wide


def test_an_x_start_that_is_only_clamped_keeps_its_dtype():
    made = torch.linspace(-2, 2, 120, dtype=torch.bfloat16).reshape(SHAPE)
    t = torch.tensor([1, 4, 9])
    for mean in (START_X, EPSILON):
        diffusion = Paper(10, None, mean).diffusion()
        hooked = Fixed(made) if mean is EPSILON else None
        out = diffusion.ddim_sample(Fixed(made), torch.zeros(SHAPE), t, denoised_fn=hooked)
        assert torch.equal(out["pred_xstart"], made.clamp(-1, 1))
        assert out["pred_xstart"].dtype == torch.bfloat16 and out["sample"].dtype == torch.float32


# The forward process.


def test_q_and_predictions_are_the_papers():
    paper = Paper(30)
    diffusion, t = paper.diffusion(), torch.tensor([0, 11, 29])
    x0, noise = torch.randn(SHAPE), torch.randn(SHAPE)
    alpha, sigma = paper.at("alpha", t), paper.at("sigma", t)

    def close(got, want, atol=2e-6):
        torch.testing.assert_close(got.double(), want + 0 * x0.double(), rtol=2e-6, atol=atol)

    x_t = diffusion.q_sample(x0, t, noise=noise)
    close(x_t, alpha * x0 + sigma * noise)
    torch.manual_seed(1)
    drawn = diffusion.q_sample(x0, t)
    torch.manual_seed(1)
    assert torch.equal(drawn, diffusion.q_sample(x0, t, noise=torch.randn_like(x0)))
    mean, variance, log_variance = diffusion.q_mean_variance(x0, t)
    close(mean, alpha * x0)
    close(variance, sigma**2)
    close(log_variance, torch.log(sigma**2))
    mean, variance, log_variance = diffusion.q_posterior_mean_variance(x0, x_t, t)
    close(mean, paper.at("c1", t) * x0 + paper.at("c2", t) * x_t)
    close(variance, paper.at("tilde", t))
    close(log_variance, paper.at("small", t))
    # Divided by alpha_T = 0.0075 and sigma_1 = 0.06.
    close(diffusion._predict_xstart_from_eps(x_t, t, noise), x0, 5e-5)
    close(diffusion._predict_eps_from_xstart(x_t, t, x0), noise, 5e-6)
    close(diffusion._predict_xstart_from_xprev(x_t, t, mean), x0, 5e-4)


def test_attributes_are_float64_tables():
    """The last value shows which chain: 1 - abar_t / abar_prev over the kept steps (N eq. 19)."""
    T, kept = CHAINS["spaced"]
    paper = Paper(T, kept)
    d = paper.diffusion()
    v = {k: value.numpy() for k, value in paper.values.items()}
    want = dict(
        betas=v["beta"], alphas_cumprod=v["abar"], alphas_cumprod_prev=v["prev"],
        alphas_cumprod_next=v["next"], sqrt_alphas_cumprod=v["alpha"],
        sqrt_one_minus_alphas_cumprod=v["sigma"], sqrt_recip_alphas_cumprod=1 / v["alpha"],
        log_one_minus_alphas_cumprod=np.log(1 - v["abar"]),
        sqrt_recipm1_alphas_cumprod=v["sigma"] / v["alpha"], posterior_variance=v["tilde"],
        posterior_log_variance_clipped=v["small"], posterior_mean_coef1=v["c1"],
        posterior_mean_coef2=v["c2"],
    )  # fmt: skip
    for name, array in want.items():
        got = getattr(d, name)
        assert got.dtype == np.float64
        np.testing.assert_allclose(got, array, rtol=1e-11, atol=1e-15, err_msg=name)
    assert (d.num_timesteps, d.original_num_steps, d.timestep_map) == (len(kept), T, kept)
    assert d.use_timesteps == set(kept)


def test_the_model_sees_the_training_chains_t():
    seen = []

    def model(x, t, **kwargs):
        seen.append((t.tolist(), t.dtype, kwargs))
        return x

    def cond_fn(x, t, **kwargs):
        return model(x, t, **kwargs)

    x, t = torch.zeros(3, 1), torch.tensor([8, 0, 3])
    kept = CHAINS["spaced"][1]
    picked = [kept[i] for i in t]
    scaled = (torch.tensor(picked).float() * (1000.0 / 60)).tolist()
    for rescale, want in ((False, picked), (True, scaled)):
        diffusion = Paper(60, kept).diffusion(rescale_timesteps=rescale)
        diffusion.p_sample(model, x, t, cond_fn=cond_fn, model_kwargs=dict(y=1))
        dtype = torch.float32 if rescale else torch.int64
        assert seen == [(want, dtype, dict(y=1))] * 2
        seen.clear()
        diffusion.ddim_sample_loop(model, (3, 1), device="cpu")
        every = reversed(scaled_all if rescale else kept) if (
            scaled_all := (torch.tensor(kept).float() * (1000.0 / 60)).tolist()
        ) else []  # fmt: skip
        assert seen == [([v] * 3, dtype, {}) for v in every]
        seen.clear()
    plain = gd.GaussianDiffusion(
        betas=Paper(60).train_betas, model_mean_type=EPSILON, model_var_type=SMALL,
        loss_type=gd.LossType.MSE, rescale_timesteps=True,
    )  # fmt: skip
    plain.p_sample(model, x, t)
    assert seen == [((t.float() * (1000.0 / 60)).tolist(), torch.float32, {})]


def test_the_enums_of_the_original_project_serve_too():
    class ModelMeanType(enum.Enum):
        START_X = "theirs"

    diffusion = gd.GaussianDiffusion(
        betas=fd.schedules.linear(10), model_mean_type=ModelMeanType.START_X,
        model_var_type=SMALL, loss_type=gd.LossType.KL,
    )  # fmt: skip
    assert diffusion.model_mean_type is START_X and diffusion.loss_type.is_vb()


def test_named_schedules_and_spacings():
    np.testing.assert_allclose(
        gd.get_named_beta_schedule("linear", 500), np.linspace(2e-4, 0.04, 500), rtol=1e-15
    )

    def f(u):
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    want = [min(1 - f((i + 1) / 40) / f(i / 40), 0.999) for i in range(40)]
    np.testing.assert_allclose(gd.get_named_beta_schedule("cosine", 40), want, rtol=1e-12)
    np.testing.assert_allclose(gd.betas_for_alpha_bar(40, f), want, rtol=1e-12)
    assert gd.betas_for_alpha_bar(2, f, max_beta=0.6)[-1] == 0.6
    assert gd.space_timesteps(1000, "ddim50") == set(range(0, 1000, 20))
    assert gd.space_timesteps(10, [2, 3]) == {0, 4, 5, 7, 9}
    assert gd.space_timesteps(10, "2,3") == {0, 4, 5, 7, 9}
    assert len(gd.space_timesteps(1000, "250")) == 250


# Seeds.


def test_seeded_loops_are_fastdiffs_sample(assert_same_bits):
    T, kept = CHAINS["spaced"]
    for variance, name in ((SMALL, "fixed_small"), (RANGE, "learned_range")):
        paper = Paper(T, kept, EPSILON, variance)
        diffusion = paper.diffusion()
        schedule = fd.schedules.custom(paper.train_betas)
        plan = fd.solvers.ddpm(schedule, timesteps=kept, variance=name)
        assert_same_bits(
            diffusion.p_sample_loop(paper.model, SHAPE, device="cpu", seed=7),
            fd.sample(paper.model, plan, SHAPE, seed=7),
        )
    seeds = torch.tensor([7, 8, 9])
    kwargs = dict(device="cpu", eta=0.5)
    given = diffusion.ddim_sample_loop(paper.model, SHAPE, seed=seeds, **kwargs)
    made_so = paper.diffusion(seed=seeds).ddim_sample_loop(paper.model, SHAPE, **kwargs)
    assert_same_bits(given, made_so)
    assert not torch.equal(given, paper.diffusion(seed=1).ddim_sample_loop(
        paper.model, SHAPE, **kwargs))  # fmt: skip


def test_seeds_leave_torchs_generator_alone():
    paper = Paper(10, None, EPSILON, RANGE)
    state = torch.get_rng_state()
    paper.diffusion().p_sample_loop(paper.model, SHAPE, device="cpu", seed=7, cond_fn=cond)
    assert torch.equal(torch.get_rng_state(), state)


# Losses.


def hybrid(paper, output, x0, x_t, t, clip=False):
    """The bound's term in bits per dimension: H eq. 5, and eq. 13 at t = 0."""
    mean, log_variance, _ = paper.transition(output, x_t, t, clip)
    true, true_log = paper.at("c1", t) * x0 + paper.at("c2", t) * x_t, paper.at("small", t)
    kl = 0.5 * (
        log_variance - true_log - 1 + (true_log - log_variance).exp()
        + (true - mean) ** 2 / log_variance.exp()
    )  # fmt: skip

    def cdf(v):
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))

    scale = (log_variance / 2).exp()
    upper = torch.where(x0 > 0.999, 1.0, cdf((x0 - mean + 1 / 255) / scale))
    lower = torch.where(x0 < -0.999, 0.0, cdf((x0 - mean - 1 / 255) / scale))
    nll = -torch.log((upper - lower).clamp(min=1e-12))
    terms = torch.where((t == 0).reshape(-1, 1, 1, 1), nll, kl)
    return terms.mean(dim=(1, 2, 3)) / math.log(2)


@pytest.mark.parametrize("loss", list(gd.LossType), ids=name_of)
@pytest.mark.parametrize("variance", VARIANCES, ids=name_of)
@pytest.mark.parametrize("mean", MEANS, ids=name_of)
def test_training_losses_are_the_papers(mean, variance, loss):
    paper = Paper(30, None, mean, variance)
    generator = torch.Generator().manual_seed(6)
    x0 = torch.randn(SHAPE, generator=generator, dtype=torch.float64).clamp(-1, 1)
    noise = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    t = torch.tensor([0, 11, 29])
    got = paper.diffusion(loss).training_losses(paper.model, x0, t, noise=noise)
    x_t = paper.at("alpha", t) * x0 + paper.at("sigma", t) * noise
    output = paper.output(x_t, t)
    bound = hybrid(paper, output, x0, x_t, t)
    if loss.is_vb():
        want = dict(loss=bound * 30 if loss is gd.LossType.RESCALED_KL else bound)
    else:
        target = {
            EPSILON: noise, START_X: x0,
            PREVIOUS_X: paper.at("c1", t) * x0 + paper.at("c2", t) * x_t,
        }[mean]  # fmt: skip
        want = dict(mse=((target - output[:, :2]) ** 2).mean(dim=(1, 2, 3)))
        if "LEARNED" in variance.name:
            want["vb"] = bound * 30 / 1000 if loss is gd.LossType.RESCALED_MSE else bound
        want["loss"] = sum(want.values())
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("loss", list(gd.LossType), ids=name_of)
@pytest.mark.parametrize("variance", [SMALL, RANGE], ids=name_of)
def test_a_loss_is_one_launch_beside_the_draw_and_x_t(variance, loss):
    diffusion = Paper(30, None, EPSILON, variance).diffusion(loss)
    channels = 4 if variance is RANGE else 2
    model, x0, t = (
        Fixed(torch.zeros(3, channels, 4, 5)),
        torch.zeros(SHAPE),
        torch.tensor([0, 9, 4]),
    )
    diffusion.training_losses(model, x0, t)
    with Launches() as counted:
        diffusion.training_losses(model, x0, t)
    parts = ["add.Tensor"] if variance is RANGE and not loss.is_vb() else []
    assert sorted(counted.names) == [*parts, "loss", "randn_like", "step"]


@pytest.mark.parametrize("loss", list(gd.LossType), ids=name_of)
@pytest.mark.parametrize("variance", VARIANCES, ids=name_of)
@pytest.mark.parametrize("mean", MEANS, ids=name_of)
def test_losses_have_the_papers_gradients(mean, variance, loss):
    """By the model's output, in the fused pass, and by x_0, through x_t and the target."""
    paper = Paper(30, None, mean, variance)
    generator = torch.Generator().manual_seed(6)
    x0 = torch.rand(SHAPE, generator=generator, dtype=torch.float64) * 1.8 - 0.9
    noise = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    channels = 4 if "LEARNED" in variance.name else 2
    t = torch.tensor([0, 11, 29])
    # Near the data, as differences of the plain CDF lose digits in its tails.
    output = paper.output(paper.at("alpha", t) * x0 + paper.at("sigma", t) * noise, t)
    output = output + 0.02 * torch.randn(output.shape, generator=generator, dtype=torch.float64)
    weights = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)

    def papers(output, x0):
        x_t = paper.at("alpha", t) * x0 + paper.at("sigma", t) * noise
        frozen = output
        if not loss.is_vb() and channels == 4:
            frozen = torch.cat([output[:, :2].detach(), output[:, 2:]], dim=1)
        bound = hybrid(paper, frozen, x0, x_t, t)
        if loss.is_vb():
            return bound * (30 if loss is gd.LossType.RESCALED_KL else 1)
        target = {
            EPSILON: noise, START_X: x0,
            PREVIOUS_X: paper.at("c1", t) * x0 + paper.at("c2", t) * x_t,
        }[mean]  # fmt: skip
        mse = ((target - output[:, :2]) ** 2).mean(dim=(1, 2, 3))
        scale = 30 / 1000 if loss is gd.LossType.RESCALED_MSE else 1.0
        return mse + scale * bound if channels == 4 else mse

    def ours(output, x0):
        diffusion = paper.diffusion(loss)
        return diffusion.training_losses(Fixed(output), x0, t, noise=noise)["loss"]

    for wanted in ((True, False), (True, True)):
        found = []
        for losses in (ours, papers):
            given = [v.clone().requires_grad_(w) for v, w in zip((output, x0), wanted, strict=True)]
            leaves = [v for v in given if v.requires_grad]
            total = (losses(*given) * weights).sum()
            found.append(torch.autograd.grad(total, leaves, allow_unused=True))
        for got, want in zip(*found, strict=True):
            if want is None:
                assert got is None or (got == 0).all()
            else:
                # x_0 of x_t and x_0 itself cancel, to rounding of terms of size 1.
                torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-12)


def test_half_precision_losses_have_upstreams_dtypes():
    """A squared error has the dtype of its tensors; tables lift what meets them to float32."""
    x0, t = torch.zeros(SHAPE, dtype=torch.bfloat16), torch.tensor([0, 11, 29])
    for mean, mse in ((EPSILON, torch.bfloat16), (START_X, torch.bfloat16),
                      (PREVIOUS_X, torch.float32)):  # fmt: skip
        diffusion = Paper(30, None, mean, RANGE).diffusion()
        output = torch.zeros(3, 4, 4, 5, dtype=torch.bfloat16)
        terms = diffusion.training_losses(Fixed(output), x0, t)
        assert {name: value.dtype for name, value in terms.items()} == {
            "mse": mse, "vb": torch.float32, "loss": torch.float32,
        }  # fmt: skip


def test_samples_of_one_number_have_losses_of_their_own():
    diffusion = Paper(12).diffusion()
    x0, noise, t = torch.rand(3), torch.randn(3), torch.tensor([0, 5, 11])

    def losses(shape):
        given = x0.view(shape), t, None, noise.view(shape)
        return diffusion.training_losses(lambda x, t: 0.5 * x, *given)["loss"]

    assert losses((3,)).shape == (3,)
    assert torch.equal(losses((3,)), losses((3, 1)))


def test_the_bound_of_a_learned_variance_does_not_train_the_mean():
    """Nichol & Dhariwal 2021, section 3.1: stop-gradient on the mean."""
    diffusion = Paper(30, None, EPSILON, RANGE).diffusion(gd.LossType.RESCALED_MSE)
    out = torch.randn(3, 4, 4, 5, requires_grad=True)
    terms = diffusion.training_losses(
        lambda x, t: out, torch.rand(SHAPE), torch.tensor([0, 11, 29])
    )
    (gradient,) = torch.autograd.grad(terms["vb"].sum(), out)
    assert (gradient[:, :2] == 0).all() and (gradient[:, 2:] != 0).all()


def test_calc_bpd_loop_sums_the_papers_bound():
    paper = Paper(12)
    x0 = torch.randn(SHAPE, dtype=torch.float64).clamp(-1, 1)
    torch.manual_seed(3)
    got = paper.diffusion().calc_bpd_loop(paper.model, x0)
    torch.manual_seed(3)
    vb, x0_mse, mse = [], [], []
    for i in reversed(range(12)):
        t, noise = torch.full((3,), i), torch.randn_like(x0)
        x_t = paper.at("alpha", t) * x0 + paper.at("sigma", t) * noise
        output = paper.output(x_t, t)
        vb.append(hybrid(paper, output, x0, x_t, t, clip=True))
        guess = paper.transition(output, x_t, t)[2]
        eps = (x_t - paper.at("alpha", t) * guess) / paper.at("sigma", t)
        x0_mse.append(((guess - x0) ** 2).mean(dim=(1, 2, 3)))
        mse.append(((eps - noise) ** 2).mean(dim=(1, 2, 3)))
    abar = paper.values["abar"][-1]
    prior = 0.5 * (abar * x0**2 - abar - torch.log(1 - abar)).mean(dim=(1, 2, 3)) / math.log(2)
    want = dict(
        vb=torch.stack(vb, 1), xstart_mse=torch.stack(x0_mse, 1), mse=torch.stack(mse, 1),
        prior_bpd=prior, total_bpd=sum(vb) + prior,
    )  # fmt: skip
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-8, atol=1e-11, msg=name)


@pytest.mark.parametrize("name", ["_vb_terms_bpd", "p_mean_variance"])
@pytest.mark.parametrize("loss", [gd.LossType.RESCALED_MSE, gd.LossType.RESCALED_KL], ids=name_of)
def test_losses_of_subclasses_are_composed_of_their_methods(loss, name):
    calls = []

    def override(self, *args, **kwargs):
        calls.append(name)
        return getattr(gd.GaussianDiffusion, name)(self, *args, **kwargs)

    whole = Paper(12, None, EPSILON, RANGE)
    own = type("Own", (gd.GaussianDiffusion,), {name: override})
    diffusions = [
        kind(betas=whole.train_betas, model_mean_type=EPSILON, model_var_type=RANGE, loss_type=loss)
        for kind in (own, gd.GaussianDiffusion)
    ]
    x0 = torch.rand(SHAPE, dtype=torch.float64)
    noise, t = torch.randn(SHAPE, dtype=torch.float64), torch.tensor([0, 5, 11])
    got, want = (
        diffusion.training_losses(whole.output, x0, t, noise=noise) for diffusion in diffusions
    )
    assert calls == [name] and got.keys() == want.keys()
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=1e-10, atol=0)
    torch.manual_seed(0)
    got = diffusions[0].calc_bpd_loop(whole.output, x0)
    torch.manual_seed(0)
    want = diffusions[1].calc_bpd_loop(whole.output, x0)
    assert len(calls) == 13
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=1e-10, atol=1e-12)


def test_normal_kl_and_discretized_likelihood():
    """KL(N(1, 4) || N(0, 1)) = (4 + 1 - 1 - ln 4) / 2; the bins of one Gaussian sum to 1."""
    kl = gd.normal_kl(torch.tensor(1.0).double(), math.log(4.0), 0.0, 0.0)
    assert float(kl) == pytest.approx(2 - math.log(2), rel=1e-12)
    bins = torch.linspace(-1, 1, 256, dtype=torch.float64)
    means, scales = torch.full_like(bins, 0.3), torch.full_like(bins, math.log(0.2))
    log_p = gd.discretized_gaussian_log_likelihood(bins, means=means, log_scales=scales)
    assert float(log_p.exp().sum()) == pytest.approx(1.0, abs=1e-9)


# Hooks in subclasses, copies, gradients.


def test_methods_of_subclasses_are_honoured():
    """Overriding a method with one that calls its original changes nothing but rounding."""
    calls = []

    class Own(gd.SpacedDiffusion):
        def p_mean_variance(self, model, *args, **kwargs):
            calls.append("p_mean_variance")
            return super().p_mean_variance(model, *args, **kwargs)

        def condition_score(self, cond_fn, *args, **kwargs):
            calls.append("condition_score")
            return super().condition_score(cond_fn, *args, **kwargs)

        def condition_mean(self, cond_fn, *args, **kwargs):
            calls.append("condition_mean")
            return super().condition_mean(cond_fn, *args, **kwargs)

    T, kept = CHAINS["spaced"]
    paper = Paper(T, kept, EPSILON, RANGE)
    fused = paper.diffusion()
    own = Own(kept, betas=paper.train_betas, model_mean_type=EPSILON, model_var_type=RANGE,
              loss_type=gd.LossType.MSE)  # fmt: skip
    for loop, name in (("p_sample_loop", "mean"), ("ddim_sample_loop", "score")):
        for seed in (None, 4):
            results = []
            for diffusion in (fused, own):
                torch.manual_seed(1)
                results.append(getattr(diffusion, loop)(
                    paper.model, SHAPE, cond_fn=cond, denoised_fn=hook, device="cpu", seed=seed,
                ))  # fmt: skip
            torch.testing.assert_close(*results, rtol=0, atol=1e-4)
            assert calls == ["p_mean_variance", f"condition_{name}"] * len(kept)
            calls.clear()


def test_copies_and_pickles_sample_the_same(assert_same_bits):
    paper = Paper(10, None, EPSILON, RANGE)
    diffusion = paper.diffusion()
    want = diffusion.p_sample_loop(paper.model, SHAPE, device="cpu", seed=1)
    for other in (copy.deepcopy(diffusion), pickle.loads(pickle.dumps(diffusion))):
        assert_same_bits(other.p_sample_loop(paper.model, SHAPE, device="cpu", seed=1), want)


def test_gradients_of_x_start_and_sample_are_the_formulas():
    paper = Paper(10, None, EPSILON, RANGE)
    diffusion, t = paper.diffusion(), torch.tensor([1, 9])
    x = torch.randn(2, 2, 1, 2, dtype=torch.float64, requires_grad=True)

    def f(x):
        out = diffusion.p_sample(paper.model, x, t, clip_denoised=False, cond_fn=cond, seed=3)
        return out["sample"], out["pred_xstart"]

    assert torch.autograd.gradcheck(f, (x,))


def test_loops_run_the_model_without_gradients_and_leave_the_mode_alone():
    seen = []

    def model(x, t):
        seen.append(torch.is_grad_enabled())
        return x

    for _ in Paper(4).diffusion().p_sample_loop_progressive(model, SHAPE, device="cpu"):
        assert torch.is_grad_enabled()
    assert seen == [False] * 4


def test_the_device_is_the_models():
    model = torch.nn.Conv2d(2, 2, 1)
    diffusion = Paper(4).diffusion()

    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x, t):
            return self.inner(x)

    x = diffusion.p_sample_loop(Wrapped(), SHAPE)
    assert x.device.type == "cpu" and x.shape == SHAPE and not x.requires_grad
    with pytest.raises(ValueError, match="device"):
        diffusion.p_sample_loop(lambda x, t: x, SHAPE)


# Errors.

GOOD = dict(model=lambda x, t: x, x=torch.zeros(2, 3), t=torch.tensor([0, 9]))


@pytest.mark.parametrize(
    ("change", "error", "names"),
    [
        (dict(model=3), TypeError, "model"),
        (dict(model=lambda x, t: x[:1]), ValueError, "result of model"),
        (dict(model=lambda x, t: x.long()), TypeError, "result of model"),
        (dict(model=lambda x, t: None), TypeError, "result of model"),
        (dict(x=[1.0]), TypeError, "x must"),
        (dict(x=torch.zeros(2, 3).long()), TypeError, "x must"),
        (dict(t=3), TypeError, "t must"),
        (dict(t=torch.tensor([0.0, 1.0])), TypeError, "t must"),
        (dict(t=torch.tensor([0])), ValueError, "t must"),
        (dict(t=torch.tensor([0, 10])), ValueError, "t must"),
        (dict(t=torch.tensor([-1, 0])), ValueError, "t must"),
        (dict(clip_denoised=2), TypeError, "clip_denoised"),
        (dict(denoised_fn=1), TypeError, "denoised_fn"),
        (dict(denoised_fn=lambda x: x[:1]), ValueError, "denoised_fn"),
        (dict(cond_fn=1), TypeError, "cond_fn"),
        (dict(cond_fn=lambda x, t: x.new_zeros(3, 3)), ValueError, "cond_fn"),
        (dict(model_kwargs=[1]), TypeError, "model_kwargs"),
        (dict(eta=-1.0), ValueError, "eta"),
        (dict(eta=5.0), ValueError, "eta"),
        (dict(eta="1"), TypeError, "eta"),
        (dict(seed=-1), ValueError, "seed"),
        (dict(seed=torch.tensor([1])), ValueError, "seed"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(change, error, names):
    called = []
    arguments = GOOD | change
    if "model" not in change:
        arguments["model"] = lambda x, t: (called.append(1), x)[1]
    with pytest.raises(error, match=names):
        Paper(10).diffusion().ddim_sample(**arguments)
    assert not called or "_fn" in names  # a hook's result is known after the model ran


@pytest.mark.parametrize(
    ("change", "error", "names"),
    [
        (dict(betas=[0.1, 0.0]), ValueError, "betas"),
        (dict(betas=[0.1, 1.5]), ValueError, "betas"),
        (dict(betas=[[0.1]]), ValueError, "betas"),
        (dict(betas=[0.1, math.nan]), ValueError, "betas"),
        (dict(model_mean_type="epsilon"), TypeError, "model_mean_type"),
        (dict(model_var_type=EPSILON), TypeError, "model_var_type"),
        (dict(loss_type=None), TypeError, "loss_type"),
        (dict(rescale_timesteps=1.5), TypeError, "rescale_timesteps"),
        (dict(seed=-1), ValueError, "seed"),
        (dict(seed="1"), TypeError, "seed"),
        (dict(use_timesteps=[]), ValueError, "spec"),
        (dict(use_timesteps=[2]), ValueError, "spec"),
    ],
)
def test_bad_constructions_are_named(change, error, names):
    arguments = dict(betas=[0.1, 0.2], model_mean_type=EPSILON, model_var_type=SMALL,
                     loss_type=gd.LossType.MSE)  # fmt: skip
    kind = gd.SpacedDiffusion if "use_timesteps" in change else gd.GaussianDiffusion
    with pytest.raises(error, match=names):
        kind(**arguments | change)


def test_other_bad_calls_are_named():
    diffusion = Paper(10).diffusion()
    x, t = torch.zeros(2, 3), torch.tensor([0, 1])
    for error, names, call in [
        (ValueError, "noise", lambda: diffusion.q_sample(x, t, noise=x[:1])),
        (ValueError, "x_start", lambda: diffusion.q_posterior_mean_variance(x[:1], x, t)),
        (ValueError, "eta", lambda: diffusion.ddim_reverse_sample(GOOD["model"], x, t, eta=0.5)),
        (ValueError, "noise", lambda: diffusion.p_sample_loop(GOOD["model"], (2, 2), noise=x)),
        (TypeError, "shape", lambda: diffusion.p_sample_loop(GOOD["model"], 3, device="cpu")),
        (ValueError, "schedule_name", lambda: gd.get_named_beta_schedule("quad", 10)),
        (TypeError, "alpha_bar", lambda: gd.betas_for_alpha_bar(10, 0.5)),
        (ValueError, "section_counts", lambda: gd.space_timesteps(10, "x")),
        (ValueError, "shape", lambda: gd.discretized_gaussian_log_likelihood(
            x, means=x, log_scales=x[:1])),
        (TypeError, "tensor", lambda: gd.normal_kl(0.0, 0.0, 0.0, 0.0)),
    ]:  # fmt: skip
        with pytest.raises(error, match=names):
            call()


def test_steps_without_signal_are_refused_where_they_are_undefined():
    """abar_T = 0: epsilon says nothing of x_0, START_X does."""
    betas, t = [0.1, 0.3, 1.0], torch.tensor([2])
    x, made = torch.full((1, 4), 0.5), torch.full((1, 4), 0.25)
    kwargs = dict(betas=betas, model_var_type=SMALL, loss_type=gd.LossType.MSE)
    with pytest.raises(ValueError, match="betas leave no signal at t = 2"):
        gd.GaussianDiffusion(model_mean_type=EPSILON, **kwargs).p_sample(Fixed(made), x, t)
    diffusion = gd.GaussianDiffusion(model_mean_type=START_X, **kwargs)
    # x_T is all noise: eps = x, and x_{T-1} = alpha x_0 + sigma x.
    out = diffusion.ddim_sample(Fixed(made), x, t)["sample"]
    want = math.sqrt(0.63) * 0.25 + math.sqrt(0.37) * 0.5
    torch.testing.assert_close(out, torch.full((1, 4), want), rtol=1e-6, atol=0)
