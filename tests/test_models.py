"""The digits model: its network, its weights, its training, and what it draws."""

import json
import math
import re
from pathlib import Path

import pytest
import torch

import fastdiff as fd
from fastdiff.models import digits, digits_training
from fastdiff.models.digits_training import Digits, DigitsConfig
from fastdiff.models.problem import FitConfig
from fastdiff.models.unet import UNet, UNetConfig, timestep_embedding

pytest.importorskip("safetensors")
pytest.importorskip("sklearn")

SMALL = UNetConfig(channels=16, embedding=32)


@pytest.fixture(scope="module")
def model() -> UNet:
    return digits.load()


def small(seed: int = 0) -> UNet:
    """A network whose last layer is not zero, as it is before training."""
    torch.manual_seed(seed)
    net = UNet(SMALL).eval().requires_grad_(False)
    for name in ("conv_out", "attention.out", "middle.0.conv2"):
        torch.nn.init.normal_(net.get_submodule(name).weight, std=0.1)
    return net


# The network


def test_timestep_embedding_is_cosines_then_sines_of_falling_frequency():
    result = timestep_embedding(torch.tensor([0, 3, 999]), 8).double()
    for row, t in enumerate((0, 3, 999)):
        for k in range(4):
            angle = t * 10000 ** (-k / 4)
            assert result[row, k] == pytest.approx(math.cos(angle), abs=1e-4)
            assert result[row, 4 + k] == pytest.approx(math.sin(angle), abs=1e-4)


def test_samples_of_a_batch_do_not_mix():
    net, x = small(), torch.randn(5, 1, 8, 8)
    t, labels = torch.tensor([0, 10, 500, 999, 999]), torch.tensor([0, 9, 10, 3, 4])
    together = net(x, t, labels)
    assert together.shape == x.shape
    for k in range(5):
        alone = net(x[k : k + 1], t[k : k + 1], labels[k : k + 1])
        torch.testing.assert_close(alone, together[k : k + 1], rtol=1e-4, atol=1e-5)


def test_output_depends_on_every_input(model):
    x, t, labels = torch.randn(1, 1, 8, 8), torch.tensor([500]), torch.tensor([3])
    output = model(x, t, labels)
    for other in (
        model(x, torch.tensor([100]), labels),
        model(x, t, torch.tensor([8])),
        model(x, t, torch.tensor([model.config.null_class])),
        # One pixel reaches every other one: attention sees the whole picture.
        model(x + torch.eye(64)[0].view(1, 1, 8, 8), t, labels)[..., 7:, 7:],
    ):
        difference = (other - output[..., -other.shape[-2] :, -other.shape[-1] :]).abs().max()
        assert difference > 1e-3


def test_gradient_reaches_every_weight():
    net = small().requires_grad_(True)
    net(torch.randn(11, 1, 8, 8), torch.arange(11), torch.arange(11)).square().sum().backward()
    for block in (m for m in net.modules() if hasattr(m, "conv2")):
        torch.nn.init.normal_(block.conv2.weight, std=0.1)
    net.zero_grad()
    net(torch.randn(11, 1, 8, 8), torch.arange(11), torch.arange(11)).square().sum().backward()
    dead = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 1, 8, 9)}, ValueError, r"x must have shape \(N, 1, 8, 8\)"),
        ({"x": torch.zeros(2, 8, 8)}, ValueError, r"x must have shape \(N, 1, 8, 8\)"),
        ({"x": torch.zeros(2, 1, 8, 8).double()}, TypeError, "float32, got torch.float64"),
        ({"t": torch.tensor(3)}, ValueError, r"t must have one entry per sample, shape \(2,\)"),
        ({"t": torch.arange(3)}, ValueError, "t must have one entry per sample"),
        ({"labels": torch.arange(1)}, ValueError, "labels must have one entry per sample"),
        ({"labels": torch.arange(2.0)}, TypeError, "labels must be int64, got torch.float32"),
    ],
)
def test_wrong_input_is_named(change, error, message):
    fine = {"x": torch.zeros(2, 1, 8, 8), "t": torch.arange(2), "labels": torch.arange(2)}
    with pytest.raises(error, match=message):
        small()(**{**fine, **change})


# Labels for the sampler


def test_guided_batch_is_without_class_first():
    net = small()
    x, t, labels = torch.randn(3, 1, 8, 8), torch.tensor([7, 7, 7]), torch.tensor([1, 2, 3])
    denoise = digits.conditional(net, labels)
    both = denoise(torch.cat([x, x]), torch.cat([t, t]))
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(both[:3], net(x, t, torch.full((3,), 10)), **close)
    torch.testing.assert_close(both[3:], net(x, t, labels), **close)
    assert torch.equal(denoise(x, t), net(x, t, labels))


@pytest.mark.parametrize("labels", [[11], [-1], [[1]], [1.0]])
def test_labels_that_are_none_are_refused(labels):
    with pytest.raises(ValueError, match="labels must be"):
        digits.conditional(small(), torch.tensor(labels))


def test_batch_that_fits_no_labels_is_refused():
    denoise = digits.conditional(small(), torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"must have 2 or 4 samples, got 3"):
        denoise(torch.zeros(3, 1, 8, 8), torch.zeros(3, dtype=torch.int64))


# Weights


def test_shipped_weights_are_small_and_say_where_they_come_from():
    assert digits.WEIGHTS.stat().st_size < 2_000_000
    about = digits.metadata()
    assert about["schedule"] == "cosine"
    assert about["timesteps"] == 1000
    assert about["prediction_type"] == "epsilon"
    assert about["command"].startswith("fastdiff train digits")
    assert about["training"]["seed"] == 0
    # What the command would train today is what was trained.
    today = digits_training.trained("digits", DigitsConfig(), [0.0])
    for key in ("command", "training"):
        assert about[key] == today[key]


def test_shipped_model_is_ready_to_sample(model):
    assert not model.training
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in model.parameters())
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_saved_weights_come_back_to_half_precision(tmp_path):
    net = small()
    path = digits.save(net, tmp_path / "net.safetensors", {"note": "hello"})
    back = digits.load(path)
    assert back.config == SMALL
    assert digits.metadata(path)["note"] == "hello"
    for (name, old), (other, new) in zip(
        net.state_dict().items(), back.state_dict().items(), strict=True
    ):
        assert name == other
        assert torch.equal(old.half().float(), new)
    again = digits.save(net, tmp_path / "again.safetensors", {"note": "hello"})
    assert again.read_bytes() == path.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.safetensors", "net.safetensors"]


def test_files_that_hold_no_model_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    with pytest.raises(FileNotFoundError, match="no weights at"):
        digits.load(tmp_path / "absent.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds no fastdiff model"):
        digits.load(tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("not safetensors at all")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        digits.load(tmp_path / "text.safetensors")
    larger = {"model": {**vars(SMALL), "channels": 24}}
    for about in (larger, {"model": {"depth": 3}}):
        digits.save(small(), tmp_path / "lies.safetensors", {})
        tensors = load_file(tmp_path / "lies.safetensors")
        save_file(tensors, tmp_path / "lies.safetensors", {"fastdiff": json.dumps(about)})
        with pytest.raises(ValueError, match="holds another model"):
            digits.load(tmp_path / "lies.safetensors")


# Training


def test_data_are_the_1797_digits():
    pictures, labels = digits.load_data()
    assert pictures.shape == (1797, 1, 8, 8)
    assert pictures.dtype == torch.float32
    assert (pictures.min(), pictures.max()) == (-1, 1)
    assert torch.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def config(steps: int, batch_size: int, seed: int = 0, warmup: int = 5) -> DigitsConfig:
    fit = FitConfig(steps=steps, seed=seed, warmup=warmup, weight_decay=0.01, ema_decay=0.999)
    return DigitsConfig(batch_size=batch_size, model=SMALL, fit=fit)


def test_same_seed_gives_the_same_weights(tmp_path):
    before = torch.random.get_rng_state()
    first = digits_training.train(config(20, 32), out=tmp_path / "first.safetensors")
    assert torch.equal(before, torch.random.get_rng_state())  # the caller's generator is untouched
    torch.manual_seed(1234)
    digits_training.train(config(20, 32), out=tmp_path / "second.safetensors")
    assert (tmp_path / "first.safetensors").read_bytes() == (
        tmp_path / "second.safetensors"
    ).read_bytes()

    other = digits_training.train(config(20, 32, seed=1))
    for (name, a), b in zip(first.named_parameters(), other.parameters(), strict=True):
        assert not torch.equal(a, b) or name.startswith("norm"), name


def test_training_lowers_the_loss():
    losses = []
    digits_training.train(
        config(60, 64, warmup=10), callback=lambda state: losses.append((state.step, state.loss))
    )
    assert [step for step, _ in losses] == list(range(1, 61))
    assert losses[0][1] == pytest.approx(1.0, abs=0.1)  # E noise^2: it predicts next to nothing
    assert losses[-1][1] < 0.8


def test_every_picture_is_seen_once_a_pass_and_labels_are_dropped_now_and_then():
    pictures = torch.arange(40.0).view(40, 1, 1, 1).expand(40, *digits.SHAPE)
    batches = digits_training.Batches((pictures, torch.arange(40) % 10), config(1, 8), 7)
    drawn = [batches(step) for step in range(200)]
    for first in range(0, 200, 5):
        seen = torch.cat([batch.x_start[:, 0, 0, 0] for batch in drawn[first : first + 5]])
        assert sorted(seen.tolist()) == list(range(40))
    labels = torch.cat([batch.labels for batch in drawn])
    pictured = torch.cat([batch.x_start[:, 0, 0, 0] for batch in drawn]).long() % 10
    dropped = labels == SMALL.null_class
    assert torch.equal(labels[~dropped], pictured[~dropped])
    # 1600 draws of probability 0.1: 160 with a standard deviation of 12, seeded.
    assert 110 < int(dropped.sum()) < 210
    counts = torch.bincount(torch.cat([batch.t for batch in drawn]), minlength=7)
    assert len(counts) == 7
    assert int(counts.min()) > 160  # of 229, a deviation of 14


@pytest.mark.parametrize("step", [0, 7])
def test_the_loss_and_its_gradient_are_those_of_the_noise(step):
    """And bit for bit the gradient of torch's mean square: batch and picture are powers of two."""
    problem, torch_loss = Digits(config(10, 32, seed=5)), torch.nn.functional.mse_loss
    batch = problem.batch(step)
    x_t, noise = fd.q_sample(
        batch.x_start, batch.t, digits.schedule(), seed=5, step=step, return_noise=True
    )
    seen = []

    def model(x, t, labels):
        assert t is batch.t
        assert labels is batch.labels
        seen.append(x)
        return output

    output = (x_t * 0.3).requires_grad_(True)
    losses = problem.loss(model, batch, step)
    assert torch.equal(seen[0], x_t)
    expected = (output.detach().double() - noise.double()).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(losses.detach().double(), expected, rtol=1e-6, atol=0)
    (fused,) = torch.autograd.grad(losses.mean(), output)
    (plain,) = torch.autograd.grad(torch_loss(output, noise), output)
    assert torch.equal(fused.view(torch.int32), plain.view(torch.int32))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"label_dropout": 1.5}, r"label_dropout must be in \[0, 1\], got 1.5"),
    ],
)
def test_settings_that_make_no_sense_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        DigitsConfig(**setting)


def test_place_for_the_weights_is_checked_before_training(tmp_path):
    def never(state) -> None:
        raise AssertionError("training began")

    with pytest.raises(ValueError, match=r"out is .* does not exist"):
        digits_training.train(out=tmp_path / "absent" / "w.safetensors", callback=never)


def test_the_training_loop_of_the_readme_runs_and_learns():
    text = (Path(__file__).parent.parent / "README.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(import torch\n[^`]*fd\.training\.loss[^`]*)```", text)
    assert "range(4000)" in code
    # Shorter, with the loss of every iteration kept.
    code = code.replace("range(4000)", "range(25)") + "    losses.append(loss.mean().item())\n"
    losses: list[float] = []
    torch.manual_seed(0)
    exec(compile(code, "README.md", "exec"), {"losses": losses})
    assert len(losses) == 25
    assert losses[0] == pytest.approx(1.0, abs=0.1)
    assert sum(losses[-5:]) / 5 < 0.75


def test_an_interrupted_training_resumes_to_the_same_file(tmp_path):
    """Dropout of torch's generator and of labels, the order of pictures, layout of weights."""

    class Stopped(Exception):
        pass

    def stop(state):
        if state.step == 5:
            raise Stopped

    options = {"checkpoint": tmp_path / "c.ckpt", "checkpoint_every": 4}
    with pytest.raises(Stopped):
        digits_training.train(config(8, 32), callback=stop, **options)
    digits_training.train(config(8, 32), out=tmp_path / "a.safetensors", resume=True, **options)
    digits_training.train(config(8, 32), out=tmp_path / "b.safetensors")
    files = [(tmp_path / name).read_bytes() for name in ("a.safetensors", "b.safetensors")]
    assert files[0] == files[1]


# What it draws: the figures in the README


def draw(model: UNet, sampler: str, guidance: float | None, count: int) -> digits.Quality:
    labels = torch.arange(digits.CLASSES).repeat_interleave(count)
    schedule = digits.schedule()
    if sampler == "ddim":
        plan = fd.solvers.ddim(schedule, steps=50, prediction_type="epsilon", clip=(-1, 1))
    else:
        plan = fd.solvers.ddpm(
            schedule, steps=250, prediction_type="epsilon", variance="fixed_small", clip=(-1, 1)
        )
    x = fd.sample(
        digits.conditional(model, labels),
        plan,
        shape=(len(labels), *digits.SHAPE),
        seed=0,
        guidance_scale=guidance,
    )
    return digits.measure(x, labels)


@pytest.mark.parametrize("guidance", [digits.GUIDANCE_SCALE, None], ids=["guided", "unguided"])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_classifier_recognises_what_was_asked_for(model, sampler, guidance):
    quality = draw(model, sampler, guidance, count=20 if sampler == "ddim" else 10)
    assert quality.held_out_accuracy >= 0.98
    assert quality.accuracy >= 0.95
    assert min(quality.accuracy_per_class) >= 0.8
    # Neither one picture for all, nor noise around it; and not the digits of the training set.
    assert 0.8 <= quality.spread <= 1.1
    assert 0.8 <= quality.novelty <= 1.2


def test_bits_per_dimension_are_those_of_the_readme(model):
    """3.92 of 200 pictures, here of 16 of them; four standard errors of both."""
    x_start, labels = (values[:16] for values in digits.load_data())
    bits = fd.training.calc_bpd_loop(
        digits.conditional(model, labels), x_start, digits.schedule(), seed=0
    )
    error = math.hypot(float(bits.total_bpd.std()) / 4, 0.03)
    assert error < 0.15
    assert float(bits.total_bpd.mean()) == pytest.approx(3.92, abs=4 * error)
    # Nearly all of it is the first steps': x_T is noise to 1e-8 bits, and half of the chain adds
    # less than a tenth.
    assert float(bits.prior_bpd.max()) < 1e-8
    assert float(bits.vb[:, :500].sum(1).mean()) < 0.1 * float(bits.total_bpd.mean())


def test_the_report_of_training_is_the_measure(model):
    report = Digits().report(model, count=3)
    assert report["accuracy"] >= 0.9
    assert 0.5 <= report["spread"] <= 1.2
    assert 0.7 <= report["novelty"] <= 1.3


def test_the_measure_sees_what_is_wrong():
    pictures, labels = digits.load_data()
    pictures, labels = pictures[::9], labels[::9]
    copies = digits.measure(pictures, labels)
    assert copies.novelty == pytest.approx(0, abs=1e-3)
    assert copies.accuracy >= 0.98
    assert copies.spread == pytest.approx(1, abs=0.1)
    means = torch.stack([pictures[labels == k].mean(dim=0) for k in range(10)])
    alike = digits.measure(means.repeat(20, 1, 1, 1), torch.arange(10).repeat(20))
    assert alike.spread == pytest.approx(0, abs=1e-3)
    mislabelled = digits.measure(pictures, (labels + 1) % 10)
    assert mislabelled.accuracy <= 0.02
    assert digits.measure(torch.randn(200, 1, 8, 8), labels).novelty > 1.5


def test_the_measure_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"pictures must have shape \(3, 1, 8, 8\)"):
        digits.measure(torch.zeros(2, 1, 8, 8), [1, 2, 3])


def test_weights_are_beside_the_module():
    assert Path(digits.__file__).parent / "digits.safetensors" == digits.WEIGHTS
