"""Visited levels: diffusers' own set_timesteps, and the properties of a grid."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest

import fastdiff as fd
from fastdiff.solvers.grid import Grid, grid, level, model_t

# diffusers hands torch tensors to NumPy in a way that NumPy 2 warns about.
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

T = 1000
BETAS = np.linspace(1e-4, 0.02, T)
SCHEDULE = fd.schedules.linear(T)
# diffusers computes abar in float32 (6e-8 * 1000 products at worst) and stores sigmas in float32.
FLOAT32_TABLES = 2e-4

DPM_LIKE = [
    diffusers.DPMSolverMultistepScheduler, diffusers.UniPCMultistepScheduler,
    diffusers.DEISMultistepScheduler, diffusers.SASolverScheduler,
]  # fmt: skip
EULER_LIKE = [
    diffusers.EulerDiscreteScheduler, diffusers.HeunDiscreteScheduler,
    diffusers.LMSDiscreteScheduler, diffusers.KDPM2DiscreteScheduler,
]  # fmt: skip


def upstream(cls, steps, **config):
    scheduler = cls(beta_start=1e-4, beta_end=0.02, **config)
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("steps", [1, 7, 20, 64])
@pytest.mark.parametrize("cls", DPM_LIKE)
def test_dpm_solver_convention_is_upstreams(cls, steps, spacing):
    theirs = upstream(cls, steps, timestep_spacing=spacing, steps_offset=1)
    final = "sigma_min" if cls in (diffusers.DEISMultistepScheduler, diffusers.SASolverScheduler) \
        else "zero"  # fmt: skip
    got = grid(SCHEDULE, steps, spacing=spacing, steps_offset=1, final=final)
    np.testing.assert_array_equal(got.t, theirs.timesteps.numpy())
    np.testing.assert_allclose(got.ratio, theirs.sigmas.numpy(), rtol=FLOAT32_TABLES)
    assert len(got) == steps and got.initial_scale == 1.0


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("steps", [2, 7, 20, 64])
@pytest.mark.parametrize("cls", EULER_LIKE)
def test_euler_convention_is_upstreams(cls, steps, spacing):
    theirs = upstream(cls, steps, timestep_spacing=spacing, steps_offset=1)
    sigmas, t = theirs.sigmas.numpy(), theirs.timesteps.numpy()
    stride = 2 if len(t) > steps else 1  # second-order schedulers list each level twice
    got = grid(SCHEDULE, steps, spacing=spacing, steps_offset=1, convention="euler")
    np.testing.assert_allclose(got.t, t[::stride], rtol=1e-6, atol=1e-4)
    np.testing.assert_allclose(got.ratio, [*sigmas[::stride][:steps], 0], rtol=FLOAT32_TABLES)


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_ddim_convention_is_upstreams(spacing):
    for steps in (5, 20, 50):
        theirs = upstream(diffusers.DDIMScheduler, steps, timestep_spacing=spacing)
        got = grid(SCHEDULE, steps, spacing=spacing, convention="ddim")
        np.testing.assert_array_equal(got.t, theirs.timesteps.numpy())
        np.testing.assert_array_equal(got.alpha[:-1], SCHEDULE.alpha_t[got.t.astype(int)])


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("ladder", ["karras", "exponential", "beta", "lu"])
def test_ladders_are_upstreams(ladder, final, steps):
    config = {"lu": "use_lu_lambdas"}.get(ladder, f"use_{ladder}_sigmas")
    theirs = upstream(
        diffusers.DPMSolverMultistepScheduler, steps, final_sigmas_type=final, **{config: True}
    )
    got = grid(SCHEDULE, steps, sigmas=ladder, final=final)
    np.testing.assert_allclose(got.ratio, theirs.sigmas.numpy(), rtol=FLOAT32_TABLES)
    # Truncation of a t that float32 tables put just below or above an integer differs by one.
    assert abs(got.t - theirs.timesteps.numpy()).max() <= 1
    assert (got.t == theirs.timesteps.numpy()).mean() >= 0.75
    if final == "sigma_min":
        assert got.ratio[-1] == got.ratio[-2]


@pytest.mark.parametrize("ladder", ["karras", "exponential", "beta"])
def test_ladders_of_the_euler_convention_have_real_t(ladder):
    theirs = upstream(diffusers.EulerDiscreteScheduler, 12, **{f"use_{ladder}_sigmas": True})
    got = grid(SCHEDULE, 12, sigmas=ladder, convention="euler")
    np.testing.assert_allclose(got.ratio, theirs.sigmas.numpy(), rtol=FLOAT32_TABLES)
    np.testing.assert_allclose(got.t, theirs.timesteps.numpy(), rtol=1e-4, atol=0.02)


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_lambda_min_leaves_out_the_noisiest_levels_as_upstream(spacing):
    theirs = diffusers.DPMSolverMultistepScheduler(
        beta_schedule="squaredcos_cap_v2", lambda_min_clipped=-5.1, timestep_spacing=spacing
    )
    theirs.set_timesteps(20)
    got = grid(fd.schedules.cosine(T), 20, spacing=spacing, lambda_min=-5.1)
    np.testing.assert_array_equal(got.t, theirs.timesteps.numpy())
    np.testing.assert_allclose(got.ratio, theirs.sigmas.numpy(), rtol=FLOAT32_TABLES)
    assert got.lambda_[0] >= -5.1


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_levels_are_upstreams(shift):
    theirs = diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, flow_shift=shift, prediction_type="flow_prediction"
    )
    theirs.set_timesteps(15)
    path = fd.schedules.flow(T, shift=shift)
    got = grid(path, 15)
    np.testing.assert_allclose(got.sigma, theirs.sigmas.numpy(), rtol=1e-6)
    np.testing.assert_allclose(got.t, got.sigma[:-1] * T, rtol=1e-14)
    np.testing.assert_allclose(got.alpha, 1 - got.sigma, rtol=1e-12, atol=1e-15)
    # Trailing begins with pure noise, alpha = 0.
    trailing = grid(path, 4, spacing="trailing")
    assert trailing.alpha[0] == 0 and trailing.lambda_[0] == -np.inf
    u = np.array([1, 0.75, 0.5, 0.25, 0])
    np.testing.assert_allclose(trailing.sigma, shift * u / (1 + (shift - 1) * u), rtol=1e-12)


def test_explicit_timesteps_and_sigmas():
    by_t = grid(SCHEDULE, timesteps=[900, 500, 20])
    np.testing.assert_array_equal(by_t.t, [900, 500, 20])
    np.testing.assert_array_equal(by_t.alpha, [*SCHEDULE.alpha_t[[900, 500, 20]], 1])
    np.testing.assert_array_equal(by_t.sigma, [*SCHEDULE.sigma_t[[900, 500, 20]], 0])
    by_sigma = grid(SCHEDULE, sigmas=by_t.ratio, convention="euler")
    np.testing.assert_allclose(by_sigma.t, by_t.t, rtol=1e-12)
    np.testing.assert_allclose(by_sigma.sigma, by_t.sigma, rtol=1e-12)
    both = grid(SCHEDULE, sigmas=by_t.ratio[:-1], timesteps=[3.5, 2.5, 1.5], final="sigma_min")
    np.testing.assert_array_equal(both.t, [3.5, 2.5, 1.5])
    assert both.sigma[-1] == SCHEDULE.sigma_t[0]
    between = grid(SCHEDULE, timesteps=[500.5])
    expected = (SCHEDULE.sigmas[500] + SCHEDULE.sigmas[501]) / 2
    np.testing.assert_allclose(between.ratio[0], expected, rtol=1e-12)
    spaced = SCHEDULE.spaced(50)
    assert set(grid(spaced, 10).t) <= set(spaced.timesteps)


def test_variance_exploding_paths_keep_sigma_as_t():
    path = fd.schedules.ve(fd.schedules.karras(200, 0.002, 80.0, append_zero=False))
    got = grid(path, 10, sigmas="karras", convention="euler")
    np.testing.assert_allclose(got.t, fd.schedules.karras(10, 0.002, 80.0)[:-1], rtol=1e-12)
    np.testing.assert_array_equal(got.alpha, 1.0)
    assert got.initial_scale == pytest.approx(80.0, rel=1e-12)
    assert grid(path, 5, sigmas="karras", sigma_max=10.0).sigma[0] == pytest.approx(10.0)


def test_level_and_model_t_invert_the_tables():
    for path in (SCHEDULE, fd.schedules.flow(50), fd.schedules.ve(np.geomspace(0.01, 50, 30)),
                 fd.schedules.GaussianPath(np.full(9, 0.5), np.arange(1.0, 10.0))):  # fmt: skip
        alpha, sigma = level(path, path.sigmas)
        np.testing.assert_allclose(alpha, path.alpha_t, rtol=1e-12)
        np.testing.assert_allclose(sigma, path.sigma_t, rtol=1e-12)
        np.testing.assert_allclose(model_t(path, path.sigmas), path.timesteps, rtol=1e-12)
    assert level(SCHEDULE, np.inf)[0] == 0 and level(SCHEDULE, 0.0)[0] == 1


def test_zero_terminal_snr_starts_at_alpha_0():
    schedule = SCHEDULE.rescaled_zero_terminal_snr()
    got = grid(schedule, 10, spacing="trailing")
    assert got.alpha[0] == 0 and got.sigma[0] == 1 and got.ratio[0] == np.inf
    assert np.isfinite(got.ratio[1:]).all()
    # A ladder starts at the highest finite level.
    assert grid(schedule, 10, sigmas="karras").ratio[0] == pytest.approx(schedule.sigmas[-2])


@pytest.mark.parametrize(
    ("arguments", "error", "names"),
    [
        (dict(schedule=BETAS, steps=5), TypeError, "schedule"),
        (dict(steps=0), ValueError, "steps"),
        (dict(steps=None), TypeError, "steps"),
        (dict(steps=2.5), TypeError, "steps"),
        (dict(steps=T + 1), ValueError, "steps"),
        (dict(steps=T), ValueError, "steps"),
        (dict(steps=T, spacing="leading"), ValueError, "steps"),
        (dict(steps=5, spacing="even"), ValueError, "spacing"),
        (dict(steps=5, final="one"), ValueError, "final"),
        (dict(steps=5, convention="heun"), ValueError, "convention"),
        (dict(steps=5, sigmas="linear"), ValueError, "sigmas"),
        (dict(steps=5, timesteps=[3, 2]), ValueError, "timesteps"),
        (dict(timesteps=[3, 3]), ValueError, "timesteps"),
        (dict(timesteps=[2, 3]), ValueError, "timesteps"),
        (dict(timesteps=[1000, 3]), ValueError, "timesteps"),
        (dict(timesteps=[5, 3], sigmas=[4.0, 2.0, 1.0]), ValueError, "timesteps"),
        (dict(sigmas=[1.0, 2.0]), ValueError, "sigmas"),
        (dict(sigmas=[1.0, -2.0]), ValueError, "sigmas"),
        (dict(sigmas=[1.0, 1e-9], final="sigma_min"), ValueError, "sigmas"),
        (dict(sigmas=[0.0]), ValueError, "sigmas"),
        (dict(steps=5, spacing="leading", steps_offset=900), ValueError, "steps_offset"),
        (dict(steps=5, lambda_min=9.0), ValueError, "lambda_min"),
        (dict(steps=5, lambda_min=-5.0, convention="euler"), ValueError, "lambda_min"),
        (dict(steps=5, sigmas="karras", sigma_min=-1.0), ValueError, "sigma_min"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(arguments, error, names):
    with pytest.raises(error, match=names):
        grid(**({"schedule": SCHEDULE} | arguments))


def test_a_grid_made_by_hand_is_checked():
    Grid(t=[2.0, 1.0], alpha=[0.1, 0.5, 1.0], sigma=[0.9, 0.5, 0.0])
    with pytest.raises(ValueError, match="alpha"):
        Grid(t=[2.0, 1.0], alpha=[0.1, 1.0], sigma=[0.9, 0.5, 0.0])
    with pytest.raises(ValueError, match="sigma"):
        Grid(t=[1.0], alpha=[0.1, 1.0], sigma=[-0.9, 0.0])
    with pytest.raises(ValueError, match="alpha"):
        Grid(t=[1.0], alpha=[0.0, 1.0], sigma=[0.0, 0.0])
