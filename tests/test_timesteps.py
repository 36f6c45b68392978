"""Samplers of t: improved-diffusion's rules, computed here by hand."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

import fastdiff as fd
from fastdiff.training.timesteps import (
    LogitNormalSampler,
    LossSecondMomentResampler,
    UniformSampler,
    create_named_schedule_sampler,
)

CHAIN = fd.schedules.linear(8, 1e-2, 0.3)


def filled(history, **options):
    """A resampler that has seen history[t] of every t, oldest first."""
    sampler = LossSecondMomentResampler(CHAIN, history_per_term=3, **options)
    for losses in np.array(history).T:
        sampler.update_with_all_losses(range(8), losses)
    return sampler


def test_draws_are_numpys_as_upstream():
    np.random.seed(5)
    expected = np.random.choice(8, size=(1000,), p=np.full(8, 1 / 8))
    np.random.seed(5)
    t, weights = UniformSampler(CHAIN).sample(1000)
    assert t.dtype == torch.int64 and weights.dtype == torch.float32
    assert (t.numpy() == expected).all() and (weights == 1).all()
    state = np.random.get_state()[1].copy()
    one = UniformSampler(CHAIN).sample(50, generator=np.random.default_rng(3))[0]
    two = UniformSampler(CHAIN).sample(50, generator=np.random.default_rng(3))[0]
    assert torch.equal(one, two) and (np.random.get_state()[1] == state).all()


def test_second_moment_weights():
    """Nichol & Dhariwal 2021, eq. 18, mixed with 0.001 of the uniform distribution."""
    history = np.arange(1.0, 25.0).reshape(8, 3)
    sampler = filled(history)
    root = np.sqrt((history**2).mean(axis=1))
    expected = 0.999 * root / root.sum() + 0.001 / 8
    np.testing.assert_allclose(sampler.weights(), expected, rtol=1e-14)
    # The oldest goes first.
    sampler.update_with_all_losses([2, 2], [100.0, 200.0])
    history[2] = [history[2, 2], 100.0, 200.0]
    root = np.sqrt((history**2).mean(axis=1))
    np.testing.assert_allclose(sampler.weights(), 0.999 * root / root.sum() + 0.001 / 8, rtol=1e-14)


def test_uniform_until_every_t_has_its_history():
    sampler = LossSecondMomentResampler(CHAIN, history_per_term=2)
    sampler.update_with_all_losses([*range(8), *range(7)], [5.0] * 15)
    assert (sampler.weights() == 1).all()
    sampler.update_with_local_losses(torch.tensor([7]), torch.tensor([10.0]))
    assert sampler.weights()[7] > sampler.weights()[0]


def test_weights_undo_the_sampling():
    """The mean of weight * loss is that over all t; 20000 draws, six standard errors."""
    losses = np.linspace(0.5, 4.0, 8)
    sampler = filled(np.repeat(losses[:, None], 3, axis=1))
    t, weights = sampler.sample(20000, generator=np.random.default_rng(0))
    values = weights.double().numpy() * losses[t.numpy()]
    # p is nearly proportional to the loss, so weight * loss is nearly constant: that is the point.
    assert values.std() < 0.05
    assert values.mean() == pytest.approx(losses.mean(), abs=6 * values.std() / math.sqrt(20000))
    counts = np.bincount(t.numpy(), minlength=8) / 20000
    p = sampler.weights()
    np.testing.assert_allclose(counts, p, atol=6 * math.sqrt(0.25 / 20000))


class Given:
    """Stands in for a generator: draws what it is told, and keeps the probabilities."""

    def choice(self, count, size, p):
        self.p = p
        return np.arange(count)


@pytest.mark.parametrize("warm", [False, True])
def test_the_estimate_is_unbiased_for_any_losses(monkeypatch, warm):
    """E_t[weight L_t] = sum p_t weight_t L_t, exactly, of losses that are not those seen before."""
    seen = np.geomspace(1e-3, 50.0, 8)[:, None] * np.ones(3)
    sampler = filled(seen) if warm else LossSecondMomentResampler(CHAIN)
    draw = Given()
    monkeypatch.setattr(np.random, "choice", draw.choice)
    t, weights = sampler.sample(8)
    assert t.tolist() == list(range(8)) and (np.ptp(draw.p) > 0.1) == warm
    for losses in (np.arange(8.0), np.cos(np.arange(8.0)), np.eye(8)[3]):
        expected = float((draw.p * weights.double().numpy() * losses).sum())
        assert expected == pytest.approx(losses.mean(), rel=1e-6)  # weights are float32


def test_losses_that_are_all_zero_leave_it_uniform():
    assert (filled(np.zeros((8, 3))).weights() == 1).all()


def test_state_goes_on_elsewhere():
    sampler = filled(np.arange(1.0, 25.0).reshape(8, 3))
    other = LossSecondMomentResampler(CHAIN, history_per_term=3)
    other.load_state_dict(sampler.state_dict())
    for one in (sampler, other):
        one.update_with_all_losses([1], [7.0])
    np.testing.assert_array_equal(other.weights(), sampler.weights())


def test_logit_normal_masses_are_integrals_of_the_density():
    """Esser et al. 2024, eq. 19, integrated over ((i)/T, (i+1)/T] by the midpoint rule."""
    mean, std, T = -0.4, 0.7, 16
    sampler = LogitNormalSampler(fd.schedules.flow(T), mean, std)
    fine = 4000
    u = (np.arange(T * fine) + 0.5) / (T * fine)
    logit = np.log(u / (1 - u))
    density = np.exp(-((logit - mean) ** 2) / (2 * std**2)) / (std * math.sqrt(2 * math.pi))
    density = density / (u * (1 - u))
    masses = (density / (T * fine)).reshape(T, fine).sum(axis=1)
    np.testing.assert_allclose(sampler.weights(), masses, rtol=2e-6)
    assert sampler.weights().sum() == pytest.approx(1, abs=1e-14)
    _, weights = sampler.sample(10, generator=np.random.default_rng(0))
    assert (weights == 1).all()  # the density is the weighting


def test_logit_normal_tails_do_not_vanish():
    weights = LogitNormalSampler(fd.schedules.flow(1000), 0.0, 0.5).weights()
    assert (weights > 0).all()
    np.testing.assert_allclose(weights, weights[::-1], rtol=1e-9)


def test_samplers_by_name():
    for name, kind in (
        ("uniform", UniformSampler), ("loss-second-moment", LossSecondMomentResampler),
        ("logit-normal", LogitNormalSampler),
    ):  # fmt: skip
        assert type(create_named_schedule_sampler(name, CHAIN)) is kind
    with pytest.raises(ValueError, match="name must be one of uniform"):
        create_named_schedule_sampler("loss", CHAIN)


# This process and another one, with batches of 3 and 1.
SHARE = """
import datetime, json, sys
import torch, torch.distributed as dist
from fastdiff.schedules import linear
from fastdiff.training.timesteps import LossSecondMomentResampler

def shared(rank, store):
    dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2,
                            timeout=datetime.timedelta(seconds=100))
    try:
        sampler = LossSecondMomentResampler(linear(4, 0.1, 0.3), history_per_term=1)
        t = torch.tensor([[2, 0, 1], [3]][rank])
        sampler.update_with_local_losses(t, torch.tensor([[4.0, 0.1, 2.0], [3.0]][rank]))
    finally:
        dist.destroy_process_group()
    return sampler.weights().tolist()
"""


def test_processes_share_their_losses(tmp_path):
    store = str(tmp_path / "store")
    other = subprocess.Popen(
        [sys.executable, "-c", SHARE + "print(json.dumps(shared(1, sys.argv[1])))", store],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    names: dict = {}
    exec(SHARE, names)
    mine = names["shared"](0, store)
    assert mine == json.loads(other.communicate(timeout=100)[0])
    losses = np.array([np.float32(0.1), 2.0, 4.0, 3.0], dtype=np.float64)
    expected = 0.999 * losses / losses.sum() + 0.001 / 4
    np.testing.assert_allclose(mine, expected, rtol=1e-14)


@pytest.mark.parametrize(
    ("act", "error", "names"),
    [
        (lambda: UniformSampler(CHAIN).sample(0), ValueError, "batch_size"),
        (lambda: UniformSampler(CHAIN).sample(2, generator=3), TypeError, "generator"),
        (lambda: LogitNormalSampler(CHAIN, std=0.0), ValueError, "std"),
        (lambda: LossSecondMomentResampler(CHAIN, 0), ValueError, "history_per_term"),
        (lambda: LossSecondMomentResampler(CHAIN, 1, 0.0), ValueError, "uniform_prob"),
        (lambda: filled(np.ones((8, 3))).update_with_all_losses([8], [1.0]), ValueError, "ts"),
        (
            lambda: filled(np.ones((8, 3))).update_with_local_losses(
                torch.zeros(2), torch.zeros(2)
            ),
            ValueError, "local_ts",
        ),
        (
            lambda: filled(np.ones((8, 3))).update_with_local_losses(
                torch.tensor([1]), torch.zeros(2)
            ),
            ValueError, "local_losses",
        ),
        (
            lambda: filled(np.ones((8, 3))).update_with_local_losses(
                torch.tensor([True]), torch.zeros(1)
            ),
            ValueError, "local_ts must be an integer tensor",
        ),
        (lambda: filled(np.ones((8, 3))).load_state_dict({}), ValueError, "state"),
        (
            lambda: LossSecondMomentResampler(CHAIN).load_state_dict(
                filled(np.ones((8, 3))).state_dict()
            ),
            ValueError, "'history' must be",
        ),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(act, error, names):
    with pytest.raises(error, match=names):
        act()


def test_a_loss_that_is_not_finite_is_refused_and_nothing_taken():
    sampler = filled(np.ones((8, 3)))
    before = sampler.weights()
    with pytest.raises(ValueError, match="losses must be finite, not nan at t = 2"):
        sampler.update_with_all_losses([1, 2], [9.0, math.nan])
    np.testing.assert_array_equal(sampler.weights(), before)
