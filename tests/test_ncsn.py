"""The score network on the digits: its ladder, its loss, its file, and what Langevin draws."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import fastdiff as fd
from fastdiff.models import digits, ncsn
from fastdiff.models.problem import FitConfig
from fastdiff.models.trainer import fit
from fastdiff.models.unet import UNetConfig

pytest.importorskip("safetensors")
pytest.importorskip("sklearn")

SMALL = UNetConfig(channels=16, embedding=32)


def small(sigmas=(0.1, 0.4, 1.6), seed: int = 0) -> ncsn.ScoreNetwork:
    """A network whose last layer is not zero, as it is before training."""
    torch.manual_seed(seed)
    net = ncsn.ScoreNetwork(sigmas, SMALL).eval().requires_grad_(False)
    torch.nn.init.normal_(net.unet.conv_out.weight, std=0.1)
    return net


# The ladder (Song & Ermon 2020, techniques 1 and 2)


def test_largest_distance_is_that_of_all_pairs():
    data = torch.from_numpy(np.random.default_rng(0).normal(size=(30, 2, 3)))
    expected = max(
        math.dist(a.flatten().tolist(), b.flatten().tolist()) for a in data for b in data
    )
    assert ncsn.max_pairwise_distance(data) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match=r"data must have shape \(N, ...\), N >= 2, got \(1, 2\)"):
        ncsn.max_pairwise_distance(torch.zeros(1, 2))


@pytest.mark.parametrize("dimension", [5, 64, 3072])
def test_neighbours_overlap_as_much_as_asked(dimension):
    """The ratio of the least ladder overlaps enough; that of one level fewer would not."""
    high, low = 10.0, 0.01
    levels = ncsn.levels_between(high, low, dimension)

    def overlap(count):
        """Mass of N(0, 1), in units of sigma / sqrt(2), within three of its neighbour's shell."""
        gamma = (high / low) ** (1 / (count - 1))
        centre = math.sqrt(2 * dimension) * (gamma - 1)
        grid = np.linspace(centre - 3 * gamma, centre + 3 * gamma, 20001)
        return np.trapezoid(np.exp(-(grid**2) / 2) / math.sqrt(2 * math.pi), grid)

    assert overlap(levels) >= 0.5 - 1e-6
    assert levels == 2 or overlap(levels - 1) < 0.5


@pytest.mark.parametrize(
    ("size", "sigma_max", "published"),
    [(32, 50, 232), (64, 90, 500), (128, 190, 1086), (256, 348, 2311)],
)
def test_levels_are_about_those_of_the_paper(size, sigma_max, published):
    """Its table of configurations, sigma_min 0.01; the ratio to it is 1.06 at all sizes or so."""
    levels = ncsn.levels_between(sigma_max, 0.01, 3 * size * size)
    assert levels == pytest.approx(published, rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.0, 2.0, 64), "sigma_max must be above sigma_min = 2.0, got 1.0"),
        ((1.0, 0.0, 64), "sigma_min must be > 0"),
        ((1.0, 0.1, 4), "dimension must be >= 5, got 4"),
        ((1.0, 0.1, 64, 1.0), r"overlap must be in \(0, 0.997\), got 1.0"),
    ],
)
def test_ladders_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ncsn.levels_between(*arguments)


def test_the_ladder_is_that_of_2020_unless_asked_otherwise():
    pictures, _ = digits.load_data()
    sigmas = ncsn.NCSNConfig().sigmas(pictures)
    assert sigmas[0] == pytest.approx(ncsn.NCSNConfig().sigma_min, rel=1e-12)
    assert sigmas[-1] == pytest.approx(ncsn.max_pairwise_distance(pictures), rel=1e-12)
    assert len(sigmas) == ncsn.levels_between(sigmas[-1], sigmas[0], 64)
    ratios = np.diff(np.log(sigmas))
    assert np.ptp(ratios) < 1e-12
    of_2019 = ncsn.NCSNConfig(sigma_min=0.01, sigma_max=1.0, levels=10).sigmas(pictures)
    np.testing.assert_allclose(of_2019, np.geomspace(0.01, 1, 10), rtol=1e-12)


# The network


def test_score_is_minus_the_noise_over_sigma():
    net = small()
    x, labels = torch.randn(4, 1, 8, 8), torch.tensor([0, 3, 9, 10])
    t = torch.tensor([0, 1, 2, 1])
    sigma = torch.tensor([0.1, 0.4, 1.6, 0.4], dtype=torch.float64)[:, None, None, None]
    given = (x.double() / (1 + sigma**2).sqrt()).float()
    expected = -net.unet(given, t, labels).double() / sigma
    torch.testing.assert_close(net(x, t, labels).double(), expected, rtol=1e-4, atol=1e-5)
    # The order of the levels given does not matter, and t may be a solver's float.
    other = small((1.6, 0.1, 0.4))
    assert torch.equal(net(x, t, labels), other(x, t.float(), labels))
    assert net.path.sigma_t.tolist() == [0.1, 0.4, 1.6]
    assert net.path.timesteps.tolist() == [0, 1, 2]


def test_loss_is_that_of_denoising_score_matching():
    config = ncsn.NCSNConfig(batch_size=16, model=SMALL, fit=FitConfig(steps=5, seed=3))
    problem = ncsn.NCSN(config)
    model = problem.model().eval()
    torch.nn.init.normal_(model.unet.conv_out.weight, std=0.1)
    batch = problem.batch(2)
    z = fd.randn((16, 1, 8, 8), 3, step=2, stream=fd.noise.STREAM_Q_SAMPLE).double()
    sigma = torch.tensor(problem.sigmas, dtype=torch.float64)[batch.t][:, None, None, None]
    x_t = batch.x_start.double() + sigma * z
    score = model(x_t.float(), batch.t, batch.labels).double()
    # Eq. 5 with the gradient of log q(x_t | x_0) = -(x_t - x_0) / sigma^2, times sigma^2, 2 / D.
    target = -(x_t - batch.x_start) / sigma**2
    expected = ((score - target).square() / 2).sum(dim=(1, 2, 3)) * sigma[:, 0, 0, 0] ** 2 / 32
    losses = problem.loss(model, batch, 2)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-4, atol=1e-5)
    losses.mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_training_lowers_the_loss():
    config = ncsn.NCSNConfig(
        batch_size=64,
        model=SMALL,
        fit=FitConfig(steps=60, warmup=10, ema_decay=0.999),
    )
    losses = fit(ncsn.NCSN(config), config.fit).losses
    assert losses[0] == pytest.approx(1.0, abs=0.1)  # E z^2: it says nothing yet
    assert sum(losses[-10:]) / 10 < 0.7


# Files


def test_saved_networks_come_back_to_half_precision(tmp_path):
    net = small()
    about = {"sigmas": net.path.sigma_t.tolist(), "prediction_type": "score"}
    path = ncsn.save(net, tmp_path / "net.safetensors", about)
    back = ncsn.load(path)
    assert back.config == SMALL
    assert back.path.sigma_t.tolist() == net.path.sigma_t.tolist()
    for (name, old), (other, new) in zip(
        net.state_dict().items(), back.state_dict().items(), strict=True
    ):
        assert name == other
        assert torch.equal(old.half().float(), new)
    with pytest.raises(ValueError, match="holds another model: it predicts the score"):
        digits.load(path)
    with pytest.raises(ValueError, match="holds another model: it predicts no score"):
        ncsn.load(digits.WEIGHTS)
    with pytest.raises(FileNotFoundError, match="no weights at"):
        ncsn.load(tmp_path / "absent.safetensors")


def test_the_file_says_how_it_was_trained():
    config = ncsn.NCSNConfig(fit=replace(ncsn.NCSNConfig().fit, seed=7, threads=2))
    about = ncsn.NCSN(config).about([0.5, 0.25])
    steps = config.fit.steps
    assert about["command"] == f"fastdiff train ncsn --steps {steps} --seed 7 --threads 2"
    assert about["loss"] == 0.375
    assert about["prediction_type"] == "score"


# The shipped network: the figures in the README


def test_shipped_weights_are_small_and_say_where_they_come_from():
    assert ncsn.WEIGHTS.stat().st_size < 1_000_000
    about, model = digits.metadata(ncsn.WEIGHTS), ncsn.load()
    today = ncsn.NCSN().about([0.0])
    # What the command would train today is what was trained.
    for key in ("command", "training", "sigmas", "prediction_type", "data"):
        assert about[key] == today[key]
    assert not model.training
    assert all(bool(p.isfinite().all()) and not p.requires_grad for p in model.parameters())


def test_a_classifier_recognises_what_was_asked_for():
    """By the samplers of 2020 and of 2019, 6 samples of every class."""
    report = ncsn.NCSN().report(ncsn.load(), count=6)
    for name in ("NCSNv2", "NCSN"):
        assert report[f"accuracy, {name}"] >= 0.93
        # Neither one picture for all, nor noise around it; and not the digits of the training set.
        assert 0.8 <= report[f"spread, {name}"] <= 1.2
        assert 0.8 <= report[f"novelty, {name}"] <= 1.3
