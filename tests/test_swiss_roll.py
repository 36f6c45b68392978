"""The swiss roll: its bound against torch's distributions, and what learning betas brings."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.distributions import Normal, kl_divergence

import fastdiff as fd
from fastdiff.models import swiss_roll
from fastdiff.models.problem import FitConfig
from fastdiff.models.swiss_roll import Batch, SwissRoll, SwissRollConfig

SMALL = SwissRollConfig(timesteps=20, batch_size=400, fit=FitConfig(steps=1500, learning_rate=4e-3))


@pytest.fixture(scope="module")
def learned():
    return swiss_roll.train(SMALL)


def test_points_lie_around_the_curve():
    x = swiss_roll.data(5000, seed=1)
    assert torch.equal(x[:7], swiss_roll.data(7, seed=1))
    assert not torch.equal(x, swiss_roll.data(5000, seed=1, step=1))
    # The distance from a line of a point with normal noise has mean sigma sqrt(2 / pi).
    expected = swiss_roll.THICKNESS * math.sqrt(2 / math.pi)
    assert float(swiss_roll.distance(x).mean()) == pytest.approx(expected, rel=0.05)
    assert (x.std(0) - 0.9).abs().max() < 0.1


def test_a_term_is_the_divergence_of_its_distributions():
    """Posterior and model as torch's Normal, in float64, from the paper's definitions."""
    problem = SwissRoll(SwissRollConfig(timesteps=5, width=8))
    torch.manual_seed(0)
    model = problem.model()
    chain = model.chain()
    x_start = swiss_roll.data(6, seed=2)
    betas, known, before = chain.betas, chain.alphas_cumprod, chain.alphas_cumprod_before
    prior = kl_divergence(
        Normal(known[-1].sqrt() * x_start, (1 - known[-1]).sqrt()),
        Normal(torch.zeros(2, dtype=torch.float64), 1.0),
    ).sum(1)
    for t in range(5):
        with torch.no_grad():
            found = problem.terms(model, Batch(x_start, torch.full((6,), t)), 3, 4)
        z = fd.randn((6, 2), 3, step=4, stream=fd.noise.STREAM_Q_SAMPLE)
        x_t = (known[t].sqrt() * x_start + (1 - known[t]).sqrt() * z).detach()
        output = model(x_t.float(), torch.full((6,), t)).detach().double()
        epsilon, v = output.chunk(2, dim=1)
        estimate = (x_t - (1 - known[t]).sqrt() * epsilon) / known[t].sqrt()

        def mean(x_0, t=t, x_t=x_t):
            c1 = before[t].sqrt() * betas[t] / (1 - known[t])
            c2 = (1 - betas[t]).sqrt() * (1 - before[t]) / (1 - known[t])
            return c1 * x_0 + c2 * x_t

        variance = betas[t] * (1 - before[t]) / (1 - known[t])
        smallest = variance if t else betas[1] * (1 - before[1]) / (1 - known[1])
        share = (v + 1) / 2
        deviation = torch.exp(0.5 * (share * betas[t].log() + (1 - share) * smallest.log()))
        p = Normal(mean(estimate), deviation)
        if t:
            term = kl_divergence(Normal(mean(x_start.double()), variance.sqrt()), p).sum(1)
        else:
            term = -p.log_prob(x_start.double()).sum(1)
        torch.testing.assert_close(found.double(), 5 * term + prior, rtol=1e-4, atol=1e-4)


def test_the_derivative_by_the_betas_goes_through_every_coefficient():
    """Against differences of the loss with the noise held."""
    problem = SwissRoll(SwissRollConfig(timesteps=6, width=8, batch_size=60))
    torch.manual_seed(1)
    model = problem.model()
    batch = problem.batch(0)
    problem.loss(model, batch, 0).backward()
    found = model.beta_logits.grad.clone()
    step = 1e-3
    for k in range(5):
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                model.beta_logits[k] += sign * step
                ends.append(float(problem.loss(model, batch, 0)))
                model.beta_logits[k] -= sign * step
        difference = (ends[0] - ends[1]) / (2 * step)
        assert float(found[k]) == pytest.approx(difference, rel=2e-2, abs=2e-2)


def test_it_beats_a_normal_distribution_and_samples_the_roll(learned):
    problem = SwissRoll(SMALL)
    model, losses = learned
    assert len(losses) == 1500
    report = problem.report(model)
    # A lower bound on the data's entropy: along the curve the angle is uniform, across it normal.
    angle = torch.linspace(*swiss_roll.TURNS, 1001, dtype=torch.float64)
    length = (swiss_roll.TURNS[1] - swiss_roll.TURNS[0]) * torch.sqrt(1 + angle**2)
    across = math.log(swiss_roll.THICKNESS * math.sqrt(2 * math.pi * math.e))
    entropy = float(torch.log(length * swiss_roll.SCALE).mean()) + across
    assert entropy < report["bound, nats"] < report["Gaussian fit, nats"] - 1
    assert report["samples' distance"] < 4 * report["data's distance"]
    betas = model.chain().betas
    assert float(betas[0]) == SMALL.first_beta
    assert ((betas > 0) & (betas < 1)).all()
    assert isinstance(model.schedule(), fd.NoiseSchedule)


def test_learned_betas_are_better_than_given_ones(learned):
    given = replace(SMALL, learned_betas=False)
    model, _ = swiss_roll.train(given)
    assert SwissRoll(SMALL).bound(learned.model)[0] < SwissRoll(given).bound(model)[0] - 0.1


def test_the_same_config_gives_the_same_weights():
    config = SwissRollConfig(timesteps=4, width=8, batch_size=16, fit=FitConfig(steps=3))
    first, second = (swiss_roll.train(config) for _ in range(2))
    assert first.losses == second.losses
    pairs = zip(first.model.parameters(), second.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(timesteps=1), "timesteps must be at least 2"),
        (dict(first_beta=1.0), r"first_beta must be in \(0, 1\)"),
        (dict(batch_size=0), "batch_size must be at least 1"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        SwissRollConfig(**arguments)
