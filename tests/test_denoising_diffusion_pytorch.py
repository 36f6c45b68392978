"""The accelerated GaussianDiffusion against the class of the installed package, same draws."""

from __future__ import annotations

import collections
import copy
import io
import random
import sys

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff.benchmarks import upstream as other_projects
from fastdiff.integrations.denoising_diffusion_pytorch import accelerate

ddp = other_projects.denoising_diffusion_pytorch()
upstream = sys.modules["denoising_diffusion_pytorch.denoising_diffusion_pytorch"]

SHAPE = (3, 2, 4, 6)
OBJECTIVES = ("pred_noise", "pred_x0", "pred_v")


class Model(nn.Module):
    """A small non-linear network of (x, t, x_self_cond), the same in float32 and float64."""

    random_or_learned_sinusoidal_cond = False

    def __init__(self, self_condition=False, channels=2, out_dim=None):
        super().__init__()
        self.channels, self.self_condition = channels, self_condition
        self.out_dim = out_dim or channels
        self.conv = nn.Conv2d(channels, self.out_dim, 3, padding=1)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.conv.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)

    def forward(self, x, t, x_self_cond=None):
        x = x if x_self_cond is None else x + 0.3 * x_self_cond
        return self.conv(torch.tanh(x)) * (1 + 0.01 * t.to(x.dtype).reshape(-1, 1, 1, 1))


def make(self_condition=False, **options):
    options = dict(image_size=SHAPE[2:], timesteps=20) | options
    return ddp.GaussianDiffusion(Model(self_condition), **options)


def rms(value):
    return float(value.double().square().mean().sqrt())


def assert_as_good(got, plain, exact, calls):
    """rms error <= 2x upstream's own float32 error, plus 4 ulp a call of values up to 4."""
    assert got.dtype == plain.dtype and got.shape == plain.shape
    assert rms(got - exact) <= 2 * rms(plain - exact) + 16 * 2**-24 * calls**0.5


class Widened(TorchDispatchMode):
    """Draws in float32, widened: upstream in float64 on the same noise."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.randn.default, torch.ops.aten.randn_like.default):
            shape = args[0] if function is torch.ops.aten.randn.default else args[0].shape
            return torch.randn(shape, dtype=torch.float32).double()
        return function(*args, **(kwargs or {}))


def exactly(diffusion, call):
    """`call` with the diffusion in float64: buffers as they are, widened."""
    wide = copy.deepcopy(diffusion).double()
    torch.manual_seed(3)
    with Widened():
        return call(wide)


def seeded(diffusion, call):
    torch.manual_seed(3)
    random.seed(3)
    return call(diffusion), torch.get_rng_state()


@pytest.mark.parametrize("self_condition", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid"])
def test_p_sample_loop_is_upstreams(schedule, objective, self_condition):
    plain = make(self_condition=self_condition, objective=objective, beta_schedule=schedule,
                 timesteps=60)  # fmt: skip

    def call(d):
        return d.p_sample_loop(SHAPE)

    (want, state), (got, got_state) = seeded(plain, call), seeded(accelerate(plain), call)
    assert torch.equal(state, got_state)
    assert_as_good(got, want, exactly(plain, call), 60)


@pytest.mark.parametrize("eta", [0.0, 0.8])
@pytest.mark.parametrize("self_condition", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid"])
def test_ddim_sample_is_upstreams(schedule, objective, self_condition, eta):
    plain = make(self_condition=self_condition, objective=objective, beta_schedule=schedule,
                 timesteps=60, sampling_timesteps=11, ddim_sampling_eta=eta)  # fmt: skip

    def call(d):
        return d.ddim_sample(SHAPE, return_all_timesteps=True)

    (want, state), (got, got_state) = seeded(plain, call), seeded(accelerate(plain), call)
    assert torch.equal(state, got_state)
    assert got.shape == (3, 12, 2, 4, 6)
    assert_as_good(got, want, exactly(plain, call), 11)


def test_sample_and_interpolate_go_through_the_fused_steps():
    plain = make(timesteps=50, sampling_timesteps=7)
    image = torch.rand(SHAPE)
    for call in (
        lambda d: d.sample(3),
        lambda d: d.interpolate(image, image.flip(0), t=20, lam=0.3),
    ):
        (want, state), (got, got_state) = seeded(plain, call), seeded(accelerate(plain), call)
        assert torch.equal(state, got_state)
        assert_as_good(got, want, exactly(plain, call), 20)


@pytest.mark.parametrize("options", [
    {}, dict(self_condition=True), dict(offset_noise_strength=0.1), dict(immiscible=True),
    dict(min_snr_loss_weight=True), dict(auto_normalize=False),
])  # fmt: skip
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses_and_gradients_are_upstreams(objective, options):
    plain = make(objective=objective, timesteps=50, **options)
    fused, image = accelerate(plain), torch.rand(SHAPE)
    results = []
    for diffusion in (plain, fused):
        loss, state = seeded(diffusion, lambda d: d(image))
        plain.zero_grad()
        loss.backward()
        results.append((loss.detach(), plain.model.conv.weight.grad.clone(), state))
    (want, gradient, state), (got, got_gradient, got_state) = results
    assert torch.equal(state, got_state)
    torch.testing.assert_close(got, want, rtol=2e-6, atol=0)
    torch.testing.assert_close(got_gradient, gradient, rtol=2e-5, atol=2e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses_of_every_sample_are_upstreams(objective, dtype):
    plain = make(objective=objective, timesteps=50, min_snr_loss_weight=True)
    plain.model.to(dtype)
    x, t = torch.rand(SHAPE).to(dtype), torch.tensor([0, 49, 13])
    noise = torch.randn(SHAPE).to(dtype)
    want, got = (
        d.p_losses(x, t, noise=noise.clone(), offset_noise_strength=0.0, loss_reduction="none")
        for d in (plain, accelerate(plain))
    )
    assert got.dtype == want.dtype and got.shape == (3,)
    # Upstream's float32 buffers enter both; sums and squares of float32 round differently.
    tolerance = 2e-6 if dtype == torch.float32 else 1e-14
    torch.testing.assert_close(got, want, rtol=tolerance, atol=0)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_predictions_and_moments_are_upstreams_at_mixed_t(objective, clip):
    plain = make(objective=objective, timesteps=50)
    fused = accelerate(plain)
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(SHAPE, generator=generator) for _ in range(2))
    t = torch.tensor([0, 49, 13])
    calls = dict(
        predict_start_from_noise=lambda d: d.predict_start_from_noise(x, t, y),
        predict_noise_from_start=lambda d: d.predict_noise_from_start(x, t, y),
        predict_v=lambda d: d.predict_v(x, t, y),
        predict_start_from_v=lambda d: d.predict_start_from_v(x, t, y),
        q_sample=lambda d: d.q_sample(x, t, noise=y),
        q_posterior=lambda d: d.q_posterior(x_start=x, x_t=y, t=t),
        predictions=lambda d: d.model_predictions(x, t, clip_x_start=clip),
        rederived=lambda d: d.model_predictions(
            x, t, clip_x_start=clip, rederive_pred_noise=True),
        p_mean_variance=lambda d: d.p_mean_variance(x, t, clip_denoised=clip),
    )  # fmt: skip
    for name, call in calls.items():
        want, got = call(plain), call(fused)
        assert type(got) is type(want), name
        pairs = [(got, want)] if isinstance(got, torch.Tensor) else zip(got, want, strict=True)
        for a, b in pairs:
            assert a.shape == b.shape and a.dtype == b.dtype, name
            # Sums of terms that are up to 30 times the result, each rounded.
            torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6 * float(b.detach().abs().max()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_promote_as_upstreams(dtype):
    plain = make(timesteps=50)
    fused, x, t = accelerate(plain), torch.randn(SHAPE).to(dtype), torch.tensor([0, 49, 13])
    for call in (
        lambda d: d.q_sample(x, t, noise=x.flip(0)),
        lambda d: d.predict_v(x, t, x.flip(0)),
        lambda d: d.q_posterior(x, x.flip(0), t)[0],
    ):
        got, want = call(fused), call(plain)
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_what_does_not_fit_a_step_is_upstreams_code():
    """Broadcasting noise, integer data, one t for all: whatever upstream accepts."""
    plain = make(timesteps=50)
    fused, x, t = accelerate(plain), torch.randn(SHAPE), torch.tensor([0, 49, 13])
    for call in (
        lambda d: d.q_sample(x, t, noise=torch.ones(3, 1, 1, 1)),
        lambda d: d.predict_v(x, t[:1], x),
        lambda d: d.q_posterior(x.long(), x, t)[0],
    ):
        assert torch.equal(call(fused), call(plain))


def test_it_is_the_same_module():
    plain = make()
    fused = accelerate(plain)
    assert isinstance(fused, ddp.GaussianDiffusion)
    assert type(fused).__name__ == "GaussianDiffusion"
    assert type(fused).__module__ == type(plain).__module__
    assert fused.state_dict().keys() == plain.state_dict().keys()
    assert all(a is b for a, b in zip(fused.parameters(), plain.parameters(), strict=True))
    assert fused.model is plain.model and accelerate(fused) is fused
    fused.objective = "pred_x0"
    fused.eval()
    assert plain.objective == "pred_x0" and not plain.training


def test_new_buffers_are_followed():
    """load_state_dict writes in place, double() replaces."""
    fused, other = accelerate(make(timesteps=50)), make(timesteps=50, beta_schedule="cosine")
    x, t = torch.randn(SHAPE), torch.tensor([0, 49, 13])
    fused.q_sample(x, t)
    fused.load_state_dict(other.state_dict())
    got, want = (d.q_sample(x, t, noise=x.flip(0)) for d in (fused, other))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    fused.double()
    fused.alphas_cumprod.mul_(1.0)
    fused.sqrt_alphas_cumprod.fill_(0.25)
    fused.sqrt_one_minus_alphas_cumprod.fill_(0.5)
    got = fused.q_sample(x.double(), t, noise=x.double())
    torch.testing.assert_close(got, 0.75 * x.double(), rtol=1e-15, atol=1e-15)


def test_sampling_first_does_not_spoil_training():
    """Tables made in inference mode would be refused by autograd."""
    fused = accelerate(make(timesteps=5))
    fused.p_sample_loop(SHAPE)
    x = torch.rand(SHAPE, requires_grad=True)
    fused.q_sample(x, torch.tensor([0, 1, 2]), noise=torch.zeros(SHAPE)).sum().backward()
    want = fused.sqrt_alphas_cumprod[:3].reshape(-1, 1, 1, 1).expand(SHAPE)
    torch.testing.assert_close(x.grad, want, rtol=1e-6, atol=0)


def test_copies_and_saved_modules_stay_fast():
    fused = accelerate(make(timesteps=5))
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    want, _ = seeded(fused, lambda d: d.p_sample_loop(SHAPE))
    for other in (copy.deepcopy(fused), torch.load(file, weights_only=False)):
        assert type(other) is type(fused) and other.model is not fused.model
        got, _ = seeded(other, lambda d: d.p_sample_loop(SHAPE))
        assert torch.equal(got, want)


class Launches(TorchDispatchMode):
    FREE = (
        "detach", "select", "slice", "view", "empty", "new_empty", "alias", "unsqueeze", "expand",
        "split",
    )  # fmt: skip

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split("::")[-1]
        if not any(name.startswith(free) for free in self.FREE):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


class Still(Model):
    def forward(self, x, t, x_self_cond=None):
        return self.answer


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_step_is_one_launch_and_the_draw(objective):
    model = Still()
    model.answer = torch.zeros(SHAPE)
    fused = accelerate(ddp.GaussianDiffusion(
        model, image_size=SHAPE[2:], timesteps=50, sampling_timesteps=9, objective=objective,
    ))  # fmt: skip
    x = torch.randn(SHAPE)
    fused.p_sample(x, 3)
    with Launches() as counted:
        fused.p_sample(x, 3)
    # full: the batch's t.
    assert counted.names == ["full", "randn_like", "step"]
    counts = []
    for steps in (9, 10):
        fused.sampling_timesteps = steps
        fused.ddim_sample(SHAPE)  # its table is made
        with Launches() as counted:
            fused.ddim_sample(SHAPE)
        counts.append(collections.Counter(counted.names))
    assert counts[1] - counts[0] == dict(step=1, randn_like=1)  # what one more step takes
    assert counts[0]["step"] == 9 and counts[0]["randn_like"] == 8


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_loss_is_one_launch_the_draw_x_t_and_the_weight(objective):
    model = Still()
    model.answer = torch.zeros(SHAPE)
    fused = accelerate(ddp.GaussianDiffusion(
        model, image_size=SHAPE[2:], timesteps=50, objective=objective,
    ))  # fmt: skip
    x, t = torch.rand(SHAPE), torch.tensor([0, 49, 13])
    fused.p_losses(x, t)
    with Launches() as counted:
        fused.p_losses(x, t, loss_reduction="none")
    assert counted.names == ["randn_like", "step", "loss", "gather", "mul.Tensor"]


def test_overridden_methods_keep_upstreams_loops():
    """LearnedGaussianDiffusion has its own p_mean_variance: p_sample goes through it."""
    plain = ddp.LearnedGaussianDiffusion(
        Model(out_dim=4), image_size=SHAPE[2:], timesteps=30, objective="pred_noise",
    )  # fmt: skip
    fused = accelerate(plain)
    assert type(fused).p_sample is type(plain).p_sample
    assert type(fused).p_mean_variance is type(plain).p_mean_variance
    assert type(fused).q_sample is not type(plain).q_sample

    def call(d):
        return d.p_sample_loop(SHAPE)

    (want, state), (got, got_state) = seeded(plain, call), seeded(fused, call)
    assert torch.equal(state, got_state)
    assert_as_good(got, want, exactly(plain, call), 30)


def test_errors_name_what_is_wrong():
    with pytest.raises(TypeError, match="diffusion must be a GaussianDiffusion"):
        accelerate(nn.Linear(2, 2))
    fused, x = accelerate(make(timesteps=50)), torch.zeros(SHAPE)
    with pytest.raises(ValueError, match="t must"):
        fused.q_sample(x, torch.tensor([0, 50, 3]))
    with pytest.raises(ValueError, match="t must"):
        fused.p_sample(x, 50)
    fused.model.forward = lambda *args: x[:1]
    with pytest.raises(ValueError, match="result of model"):
        fused.p_sample(x, 5)
