"""The binary heartbeat: the paper's bound is reached, and what is sampled is a heartbeat."""

from __future__ import annotations

import math

import pytest
import torch

from fastdiff.models import heartbeat
from fastdiff.models.heartbeat import Heartbeat, HeartbeatConfig
from fastdiff.models.problem import FitConfig


def test_there_are_five_sequences():
    x = heartbeat.data()
    assert x.shape == (5, 20) and x.sum(1).tolist() == [4] * 5 and x.sum(0).tolist() == [1] * 20
    assert heartbeat.is_heartbeat(x).all()
    assert not heartbeat.is_heartbeat(1 - x).any()
    assert pytest.approx(math.log2(5)) == heartbeat.ENTROPY


def test_it_reaches_the_paper_s_bound():
    """2.414 bits in the paper; no model does better than log2 5 = 2.322."""
    config = HeartbeatConfig(fit=FitConfig(steps=1200))
    problem = Heartbeat(config)
    model, losses = heartbeat.train(config)
    assert len(losses) == 1200 and losses[-1] < losses[0] / 10
    report = problem.report(model)
    error = report["standard error, bits"]
    assert error < 0.01
    assert heartbeat.ENTROPY - 3 * error < report["bound, bits"] <= 2.414
    assert report["valid samples"] >= 0.99


def test_a_batch_and_a_loss_are_functions_of_seed_and_step():
    config = HeartbeatConfig(timesteps=7, width=8, batch_size=35, fit=FitConfig(steps=3, seed=4))
    problem, again = Heartbeat(config), Heartbeat(config)
    model = problem.model()
    for step in (5, 2):
        batch, other = problem.batch(step), again.batch(step)
        assert torch.equal(batch.t, other.t)
        assert torch.equal(problem.loss(model, batch, step), again.loss(model, other, step))
    # Every t comes, as often with every sequence.
    counts = torch.zeros(5, 7)
    for step in range(50):
        batch = problem.batch(step)
        counts.index_put_(
            (batch.x_start[:, :5].argmax(1), batch.t), torch.ones(35), accumulate=True
        )
    assert (counts == counts[:1]).all() and (counts[0] / counts[0].mean()).sub(1).abs().max() < 0.1
    first, second = (heartbeat.train(config) for _ in range(2))
    assert first.losses == second.losses
    pairs = zip(first.model.parameters(), second.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HeartbeatConfig(batch_size=7), "batch_size must be a multiple of 5"),
        (lambda: HeartbeatConfig(timesteps=0), "timesteps must be at least 1"),
        (lambda: FitConfig(steps=0), "steps must be at least 1"),
        (lambda: FitConfig(steps=1, learning_rate=0.0), "learning_rate must be positive"),
        (lambda: FitConfig(steps=1, seed=-1), "seed must be in"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()
