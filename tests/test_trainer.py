"""The training loop: what it computes, and that no interruption changes it."""

import copy
import math
import os
import random
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from fastdiff import progress
from fastdiff.models import digits_training, heartbeat, ncsn, swiss_roll, trainer, weights
from fastdiff.models.problem import FitConfig
from fastdiff.models.trainer import CheckpointError, Interrupted, fit, running_means
from fastdiff.models.unet import UNetConfig
from tests.conftest import load_helper

HELPER = Path(__file__).with_name("toy_training.py")
toy_training = load_helper("toy_training")
Toy, ToyConfig, FIT = toy_training.Toy, toy_training.ToyConfig, toy_training.FIT


def bits(model: nn.Module) -> list[torch.Tensor]:
    return [value.detach().contiguous().view(torch.int32) for value in model.state_dict().values()]


def same(first, second) -> bool:
    """Whether two runs ended with the same bits, every loss included."""
    pairs = zip(bits(first.model), bits(second.model), strict=True)
    return first.losses == second.losses and all(torch.equal(a, b) for a, b in pairs)


@pytest.fixture(scope="module")
def whole():
    """The run that nothing interrupted."""
    return fit(Toy(), FIT)


class Stopped(Exception):
    pass


def stop_after(step):
    def callback(state):
        if state.step == step:
            raise Stopped

    return callback


# What it computes


@pytest.mark.parametrize("averaged", [True, False])
def test_it_is_this_plain_loop(averaged):
    config = FIT if averaged else FitConfig(steps=12, seed=5)
    toy = Toy(ToyConfig(fit=config))
    result = fit(toy, config)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = toy.model()
        average = copy.deepcopy(model)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=2e-3, weight_decay=0.1 if averaged else 0.0
        )
        losses = []
        for step in range(config.steps):
            batch = toy.batch(step)
            loss = (model(batch.x)[:, 0] - batch.x.sum(1)).square().mean()
            rate = (min(1.0, (step + 1) / 5) if averaged else 1.0) * 0.5
            optimizer.param_groups[0]["lr"] = 2e-3 * (
                rate * (1 + math.cos(math.pi * step / config.steps))
            )
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
            decay = min(0.9, (step + 1) / (step + 10))
            with torch.no_grad():
                for mean, weight in zip(average.parameters(), model.parameters(), strict=True):
                    mean.copy_(mean * decay + weight * (1 - decay))
    assert result.losses == losses
    for a, b in zip(bits(result.model), bits(average if averaged else model), strict=True):
        assert torch.equal(a, b)
    assert not result.model.training
    assert not any(p.requires_grad for p in result.model.parameters())


def test_running_means_are_plain_ones_for_a_hundred_losses_and_then_forget():
    losses = [math.sin(k) + 2 for k in range(150)]
    means = running_means(losses)
    for count in (1, 2, 50, 100):
        assert means[count - 1] == pytest.approx(sum(losses[:count]) / count, rel=1e-12)
    expected = sum(losses[:100]) / 100 * 0.99**50
    expected += sum(0.01 * 0.99 ** (149 - k) * losses[k] for k in range(100, 150))
    assert means[149] == pytest.approx(expected, rel=1e-12)


def test_what_surrounds_it_is_left_as_it_was(tmp_path):
    before, threads = torch.random.get_rng_state(), torch.get_num_threads()
    handler = signal.getsignal(signal.SIGINT)
    config = replace(FIT, steps=3, threads=2)
    fit(Toy(ToyConfig(fit=config)), config, checkpoint=tmp_path / "c.ckpt")
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.get_num_threads() == threads
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_callback_sees_every_iteration():
    seen = []
    config = replace(FIT, steps=7)
    result = fit(Toy(ToyConfig(fit=config)), config, callback=seen.append)
    means = running_means(result.losses)
    assert seen == [trainer.TrainState(k + 1, 7, means[k]) for k in range(7)]


# Interruptions


@pytest.mark.parametrize("how", ["at any moment", "writing"])
def test_a_killed_process_resumes_to_the_same_weights(tmp_path, whole, how):
    path = tmp_path / "toy.ckpt"
    mode = "writing" if how == "writing" else "run"
    process = subprocess.Popen(
        [sys.executable, str(HELPER), str(path), mode],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    with process.stdout as lines:
        if how == "at any moment":
            # Anywhere in what follows the line: the process goes on meanwhile.
            last = random.SystemRandom().randrange(1, 38)
            assert any(line.strip() == str(last) for line in lines)
            process.kill()
        rest = [int(line) for line in lines]
    assert process.wait() == -signal.SIGKILL
    if how == "writing":
        assert rest[-1] == 15  # the third checkpoint's iteration; the second one is whole
        assert len(torch.load(path, weights_only=True)["losses"]) == 10
    assert same(fit(Toy(), FIT, checkpoint=path, resume=True), whole)


@pytest.mark.parametrize(("stop", "every"), [(1, 1), (9, 4), (17, 10), (39, 13)])
def test_a_run_stopped_by_an_error_resumes_to_the_same_weights(tmp_path, whole, stop, every):
    path = tmp_path / "toy.ckpt"
    options = {"checkpoint": path, "checkpoint_every": every}
    with pytest.raises(Stopped):
        fit(Toy(), FIT, **options, callback=stop_after(stop))
    # The iteration's own checkpoint is written after the callback.
    kept = (stop - 1) // every * every
    assert path.is_file() == (kept > 0)
    seen = []
    result = fit(Toy(), FIT, **options, resume=True, callback=seen.append)
    assert seen[0].step == kept + 1
    assert same(result, whole)
    assert [state.loss for state in seen] == running_means(whole.losses)[kept:]


def test_many_interruptions_are_as_one(tmp_path, whole):
    path = tmp_path / "toy.ckpt"
    for stop in (3, 8, 20, 33):
        with pytest.raises(Stopped):
            fit(
                Toy(), FIT, checkpoint=path, checkpoint_every=1, resume=True,
                callback=stop_after(stop),
            )  # fmt: skip
    assert same(fit(Toy(), FIT, checkpoint=path, resume=True), whole)


def test_ctrl_c_finishes_the_iteration_and_keeps_it(tmp_path, whole):
    class Pressed(Toy):
        def loss(self, model, batch, step):
            if step == 6:
                os.kill(os.getpid(), signal.SIGINT)
            return super().loss(model, batch, step)

    Pressed.__name__ = "Toy"
    path, handler = tmp_path / "toy.ckpt", signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match=r"after iteration 7 of 40, kept in .*toy.ckpt"):
        fit(Pressed(), FIT, checkpoint=path)
    assert signal.getsignal(signal.SIGINT) is handler
    assert torch.load(path, weights_only=True)["losses"].tolist() == whole.losses[:7]
    assert same(fit(Toy(), FIT, checkpoint=path, resume=True), whole)


def test_a_second_ctrl_c_does_not_wait(tmp_path):
    class Pressed(Toy):
        def loss(self, model, batch, step):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("the second one was not heard")

    with pytest.raises(KeyboardInterrupt) as caught:
        fit(Pressed(), FIT, checkpoint=tmp_path / "toy.ckpt")
    assert not isinstance(caught.value, Interrupted)


def test_ctrl_c_in_the_last_iteration_is_the_end(tmp_path, whole):
    class Pressed(Toy):
        def loss(self, model, batch, step):
            if step == FIT.steps - 1:
                os.kill(os.getpid(), signal.SIGINT)
            return super().loss(model, batch, step)

    assert same(fit(Pressed(), FIT, checkpoint=tmp_path / "toy.ckpt"), whole)


def test_it_runs_outside_the_main_thread(tmp_path, whole):
    results = []
    thread = threading.Thread(
        target=lambda: results.append(fit(Toy(), FIT, checkpoint=tmp_path / "toy.ckpt"))
    )
    thread.start()
    thread.join()
    assert same(results[0], whole)


# Checkpoints


def stopped_at_ten(path):
    with pytest.raises(Stopped):
        fit(Toy(), FIT, checkpoint=path, checkpoint_every=10, callback=stop_after(11))


def test_a_checkpoint_of_another_configuration_is_refused_naming_it(tmp_path):
    path = tmp_path / "toy.ckpt"
    stopped_at_ten(path)
    data = path.read_bytes()
    for config, message in (
        (ToyConfig(fit=replace(FIT, seed=4)), r"fit\.seed 3 there, 4 here$"),
        (ToyConfig(fit=replace(FIT, learning_rate=0.1)), r"fit\.learning_rate 0\.002 there"),
        (ToyConfig(fit=replace(FIT, steps=41, threads=2)), r"steps 40 .* here; fit\.threads 1"),
        (ToyConfig(width=17), r"another configuration: width 16 there, 17 here$"),
    ):
        with pytest.raises(CheckpointError, match=message):
            fit(Toy(config), config.fit, checkpoint=path, resume=True)
    config = heartbeat.HeartbeatConfig(timesteps=5, fit=FIT)
    with pytest.raises(CheckpointError, match="problem 'Toy' there, 'Heartbeat' here"):
        fit(heartbeat.Heartbeat(config), FIT, checkpoint=path, resume=True)
    assert path.read_bytes() == data


def test_an_unfinished_run_is_not_overwritten(tmp_path, whole):
    path = tmp_path / "toy.ckpt"
    stopped_at_ten(path)
    data = path.read_bytes()
    with pytest.raises(CheckpointError, match="stopped at iteration 10 of 40: resume it, or"):
        fit(Toy(), FIT, checkpoint=path)
    assert path.read_bytes() == data
    assert same(fit(Toy(), FIT, checkpoint=path, resume=True), whole)
    # A finished one is: its weights are written elsewhere.
    other = ToyConfig(width=4)
    fit(Toy(other), FIT, checkpoint=path)
    # And resuming it has nothing left to do.
    again = fit(Toy(other), FIT, checkpoint=path, resume=True, callback=stop_after(40))
    assert same(again, fit(Toy(other), FIT))


def test_files_that_are_no_checkpoints_are_refused(tmp_path):
    path = tmp_path / "toy.ckpt"
    stopped_at_ten(path)
    good = path.read_bytes()

    def torch_file(value):
        torch.save(value, path)
        return path.read_bytes()

    for data in (
        b"", b"hello", good[:1000], good[:-1], torch_file({"a": 1}), torch_file([1]),
        torch_file({"format": "other", "settings": {}, "losses": []}),
    ):  # fmt: skip
        path.write_bytes(data)
        for resume in (False, True):
            with pytest.raises(CheckpointError, match=r"toy.ckpt is not one of this program"):
                fit(Toy(), FIT, checkpoint=path, resume=resume)
        assert path.read_bytes() == data


def test_wrong_arguments_are_named_before_training(tmp_path):
    never = stop_after(1)
    with pytest.raises(ValueError, match="resume needs the checkpoint"):
        fit(Toy(), FIT, resume=True, callback=never)
    with pytest.raises(ValueError, match="checkpoint_every must be >= 1, got 0"):
        fit(Toy(), FIT, checkpoint=tmp_path / "a", checkpoint_every=0, callback=never)
    with pytest.raises(ValueError, match=r"checkpoint is .* does not exist"):
        fit(Toy(), FIT, checkpoint=tmp_path / "absent" / "a", callback=never)
    for change, message in (
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"seed": -1}, r"seed must be in \[0, 2\^63\), got -1"),
        ({"warmup": -1}, "warmup must be at least 0, got -1"),
        ({"weight_decay": math.nan}, "weight_decay must be at least 0, got nan"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\), got 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(FIT, **change)


# Losses that are not finite


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_its_sample_and_leaves_the_checkpoint(tmp_path, wrong):
    class Wrong(Toy):
        def loss(self, model, batch, step):
            factor = torch.ones(8)
            if step == 13:
                factor[[5, 7]] = wrong
            return super().loss(model, batch, step) * factor

    path, t = tmp_path / "toy.ckpt", int(Toy().batch(13).t[5])
    expected = (
        rf"iteration 14: loss\[5\] is {wrong} at t = {t}; 2 of 8 samples are not finite; "
        r".*toy.ckpt holds iteration 10$"
    )
    with pytest.raises(FloatingPointError, match=expected):
        fit(Wrong(), FIT, checkpoint=path, checkpoint_every=5)
    assert len(torch.load(path, weights_only=True)["losses"]) == 10


def test_a_scalar_loss_or_a_gradient_that_is_not_finite_is_refused():
    class Scalar(Toy):
        def loss(self, model, batch, step):
            return super().loss(model, batch, step).mean() * (math.nan if step == 2 else 1)

    class Steep(Toy):
        def loss(self, model, batch, step):
            output = model(batch.x)[:, 0]
            return (output - output.detach()).clamp(min=0).sqrt()  # 0, of infinite slope

    with pytest.raises(FloatingPointError, match=r"^iteration 3: the loss is nan$"):
        fit(Scalar(), FIT)
    with pytest.raises(FloatingPointError, match=r"^iteration 1: the norm of the gradient is nan"):
        fit(Steep(), FIT)


# The problems that it is for

TINY = {
    "digits": lambda: digits_training.Digits(
        digits_training.DigitsConfig(
            batch_size=8,
            model=UNetConfig(channels=8, embedding=16),
            fit=replace(FIT, steps=8),
        )
    ),
    "ncsn": lambda: ncsn.NCSN(
        ncsn.NCSNConfig(
            batch_size=8,
            model=UNetConfig(channels=8, embedding=16),
            fit=replace(FIT, steps=8),
        )
    ),
    "heartbeat": lambda: heartbeat.Heartbeat(
        heartbeat.HeartbeatConfig(timesteps=7, width=8, batch_size=35, fit=replace(FIT, steps=8))
    ),
    "swiss_roll": lambda: swiss_roll.SwissRoll(
        swiss_roll.SwissRollConfig(timesteps=6, width=8, batch_size=18, fit=replace(FIT, steps=8))
    ),
}


@pytest.fixture(params=TINY)
def problem(request):
    if request.param in ("digits", "ncsn"):
        pytest.importorskip("sklearn")
    return TINY[request.param]


def test_a_problem_is_a_function_of_seed_and_step(problem):
    first, second = problem(), problem()
    torch.manual_seed(0)
    model, seen = first.model(), []
    for step in (0, 3, 7, 2):  # forwards, and back
        a, b = first.batch(step), second.batch(step)
        for x, y in zip(a, b, strict=True):
            assert torch.equal(x, y)
        losses = []
        for which, batch in ((first, a), (second, b)):
            torch.manual_seed(9)  # dropout's, which the trainer carries
            losses.append(which.loss(model, batch, step))
        assert torch.equal(*losses)
        assert losses[0].dim() == 0 or a.t.shape == losses[0].shape
        seen.append(losses[0].mean().item())
    assert len(set(seen)) == 4


def test_every_problem_resumes_to_the_same_weights(problem, tmp_path):
    path = tmp_path / "c.ckpt"
    config = problem().config.fit
    with pytest.raises(Stopped):
        fit(problem(), config, checkpoint=path, checkpoint_every=3, callback=stop_after(5))
    resumed = fit(problem(), config, checkpoint=path, resume=True)
    assert same(resumed, fit(problem(), config))


def test_weights_of_any_model_come_back_as_they_were(problem, tmp_path):
    pytest.importorskip("safetensors")
    torch.manual_seed(1)
    model = problem().model()
    path = weights.save(model, tmp_path / "w.safetensors", {"note": 1})
    about, tensors = weights.read(path)
    assert about == {"note": 1}
    torch.manual_seed(2)
    other = problem().model()
    other.load_state_dict(tensors)
    for a, b in zip(bits(model), bits(other), strict=True):
        assert torch.equal(a, b)


# What it shows


@pytest.mark.parametrize("rich", [True, False])
def test_progress_counts_what_was_done_before_and_shows_the_loss(monkeypatch, capsys, rich):
    if rich:
        pytest.importorskip("rich")
    else:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    shown = list(progress.track(range(4, 10), "training", first=4, note=lambda: "loss 0.25"))
    assert shown == list(range(4, 10))
    said = capsys.readouterr().err
    assert "training" in said and "loss 0.25" in said
    assert ("100%" if rich else "10/10") in said
