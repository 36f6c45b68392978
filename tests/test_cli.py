"""The command line: what it writes, what it says, and what it refuses."""

import io
import os
import re
import shlex
import signal
import subprocess
import sys

import pytest
import torch

import fastdiff as fd
from fastdiff import cli, pictures
from fastdiff.models import digits, digits_training, heartbeat, train_command

Image = pytest.importorskip("PIL.Image")
ImageChops = pytest.importorskip("PIL.ImageChops")
pytest.importorskip("safetensors")

QUICK = ["--steps", "3", "--count", "2", "--class", "3,7"]


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_process(*words, **environment):
    return subprocess.run(
        [sys.executable, "-m", "fastdiff", *words],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def grid_of(path, rows, count):
    """The samples in a PNG, (rows, count, 8, 8) in 0..1, read back from the middle of every pixel;
    the size of the picture is checked against the layout on the way."""
    grid = pictures.Grid(tuple("0" * rows), count)
    picture = Image.open(path)
    assert picture.format == "PNG"
    assert picture.size == grid.size
    picture.load()
    samples = torch.zeros(rows, count, 8, 8)
    for row in range(rows):
        for column in range(count):
            left, top = grid.corner(row, column)
            for y in range(8):
                for x in range(8):
                    at = (left + x * grid.scale + 3, top + y * grid.scale + 3)
                    samples[row, column, y, x] = picture.getpixel(at)
    return samples


# sample


def test_picture_shows_what_was_asked_for(capsys):
    assert cli.main(["sample", "--steps", "20", "--count", "4"]) == 0
    grey = grid_of("digits.png", rows=10, count=4)
    paper, ink = float(grey.max()), float(grey.min())
    assert (paper, ink) == (243, 30)
    pixels = 2 * (paper - grey) / (paper - ink) - 1
    pytest.importorskip("sklearn")
    labels = torch.arange(10).repeat_interleave(4)
    assert digits.measure(pixels.reshape(40, 1, 8, 8), labels).accuracy >= 0.9

    said = capsys.readouterr().out
    assert "digits.png: 40 pictures" in said
    assert "ddim, 20 steps, guidance 2, seed 0" in said
    backend = fd.backends.select(torch.device("cpu"), torch.float32)
    if not torch.cuda.is_available():
        assert f"backend   {backend} on cpu" in said


def test_times_add_up(capsys):
    assert cli.main(["sample", *QUICK, "--steps", "10"]) == 0
    said = capsys.readouterr().out
    total, rate = map(float, re.search(r"time +([\d.]+) s, ([\d.]+) steps/s", said).groups())
    parts = re.findall(r"(model|step) +([\d.]+) s +([\d.]+) %", said)
    assert [name for name, _, _ in parts] == ["model", "step"]
    assert sum(float(seconds) for _, seconds, _ in parts) == pytest.approx(total, abs=0.002)
    assert sum(float(share) for _, _, share in parts) == pytest.approx(100, abs=0.2)
    assert rate == pytest.approx(10 / total, rel=0.2)
    assert float(parts[0][1]) > 0


def test_pictures_are_those_of_the_engine():
    assert cli.main(["sample", *QUICK, "--seed", "5", "--guidance", "1"]) == 0
    plan = fd.solvers.ddim(
        digits.schedule(), steps=3, eta=0.0, prediction_type="epsilon", clip=(-1, 1)
    )
    model = digits.conditional(digits.load(), torch.tensor([3, 3, 7, 7]))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        x = fd.sample(model, plan, shape=(4, 1, 8, 8), seed=5)
        expected = pictures.draw_grid(x, pictures.Grid(("3", "7"), 2), "ddim, 3 steps", "seed 5")
        assert Image.open("digits.png").tobytes() == expected.tobytes()


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_same_seed_gives_the_same_bytes_and_another_seed_others(own_folder, sampler):
    def draw(name, *more):
        words = ["sample", *QUICK, "--sampler", sampler, "--out", name, *more]
        assert cli.main([*words, "--animate"]) == 0
        return (own_folder / name).read_bytes(), (own_folder / name[:-4]).with_suffix(
            ".gif"
        ).read_bytes()

    first = draw("first.png", "--seed", "18446744073709551615")
    assert draw("again.png", "--seed", "18446744073709551615") == first
    assert draw("other.png", "--seed", "1")[0] != first[0]


def test_backends_draw_the_same_picture(own_folder):
    if fd.backends.probe("native", torch.device("cpu"), torch.float32) is not None:
        pytest.skip("no native backend on this machine")
    for backend in ("reference", "native"):
        words = ["sample", *QUICK, "--sampler", "ddpm", "--device", "cpu"]
        assert cli.main([*words, "--backend", backend, "--out", f"{backend}.png"]) == 0
    assert (own_folder / "native.png").read_bytes() == (own_folder / "reference.png").read_bytes()


def test_eta_adds_noise(own_folder):
    for eta in ("0", "1"):
        assert cli.main(["sample", *QUICK, "--eta", eta, "--out", f"{eta}.png"]) == 0
    quiet, noisy = (grid_of(f"{eta}.png", 2, 2) for eta in ("0", "1"))
    assert (quiet - noisy).abs().max() > 20


@pytest.mark.parametrize(("steps", "frames"), [(1, 1), (5, 5), (61, 60)])
def test_animation_has_a_frame_for_every_step_up_to_sixty(own_folder, steps, frames):
    words = ["sample", "--class", "3", "--count", "1", "--steps", str(steps)]
    assert cli.main([*words, "--animate", "made.gif"]) == 0
    with Image.open("made.gif") as animation:
        assert animation.n_frames == frames
        assert animation.size == pictures.Grid(("3",), 1).size
        durations = []
        for k in range(frames):
            animation.seek(k)
            durations.append(animation.info["duration"])
        assert durations[-1] >= 1000
        last = animation.convert("L")
    # The last frame is the finished picture, but for the line that counts the steps.
    still = Image.open("digits.png")
    box = (0, pictures.Grid(("3",), 1).corner(0, 0)[1], *still.size)
    difference = ImageChops.difference(last.crop(box), still.crop(box))
    assert difference.getextrema()[1] <= 9  # sixteen grey levels


def test_animation_is_named_after_the_picture(own_folder):
    assert cli.main(["sample", *QUICK, "--out", "some.png", "--animate"]) == 0
    assert sorted(path.name for path in own_folder.iterdir()) == ["some.gif", "some.png"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "0"], "argument --steps: must be in [1, 1000], got 0"),
        (["--steps", "1001"], "argument --steps: must be in [1, 1000], got 1001"),
        (["--steps", "many"], "argument --steps: must be an integer, got 'many'"),
        (["--eta", "1.5"], "argument --eta: must be in [0, 1], got 1.5"),
        (["--eta", "nan"], "argument --eta: must be in [0, 1], got nan"),
        (["--sampler", "ddpm", "--eta", "0.5"], "argument --eta: only ddim has it, not ddpm"),
        (["--sampler", "magic"], "argument --sampler: invalid choice: 'magic'"),
        (["--seed", "-1"], "argument --seed: must be in [0, 18446744073709551615], got -1"),
        (["--class", "12"], "argument --class: must be a digit 0..9"),
        (["--class", "1,,2"], "argument --class: must be a digit 0..9"),
        (["--class", "1,1"], "argument --class: names a digit twice: '1,1'"),
        (["--guidance", "-1"], "argument --guidance: must be in [0, 100], got -1"),
        (["--guidance", "inf"], "argument --guidance: must be in [0, 100], got inf"),
        (["--count", "0"], "argument --count: must be in [1, 100], got 0"),
        (["--backend", "tpu"], "argument --backend: invalid choice: 'tpu'"),
        (["--device", "abacus"], "argument --device: 'abacus' is not there"),
        (["--device", "meta"], "argument --device: must be cpu or cuda, got 'meta'"),
        (["--out", "picture.jpg"], "argument --out: must end in .png, got 'picture.jpg'"),
        (["--out", "absent/x.png"], "its folder absent does not exist"),
        (["--out", "folder.png"], "--out must be a file, folder.png is a folder"),
        (["--animate", "x.mp4"], "argument --animate: must end in .gif, got 'x.mp4'"),
        (["--animate", "absent/x.gif"], "its folder absent does not exist"),
        (["--weights", "absent"], "argument --weights: no weights at absent"),
        (["--weights", "text"], "argument --weights: text is not a safetensors file"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
    ],
)
def test_wrong_options_are_named_before_anything_runs(
    own_folder, capsys, monkeypatch, words, message
):
    def never(*args, **keywords):
        raise AssertionError("sampling began")

    monkeypatch.setattr(fd, "sample", never)
    (own_folder / "folder.png").mkdir()
    (own_folder / "text").write_text("not weights")
    before = sorted(own_folder.iterdir())
    assert cli.main(["sample", *words]) == 2
    assert message in capsys.readouterr().err
    assert sorted(own_folder.iterdir()) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="every backend serves a GPU")
def test_backend_that_cannot_serve_is_refused_with_its_reason(own_folder):
    # A process, because the tests themselves run with Triton's interpreter, which does serve.
    done = run_process("sample", *QUICK, "--backend", "triton", TRITON_INTERPRET="0")
    assert done.returncode == 2
    assert "argument --backend: backend 'triton' cannot serve cpu" in done.stderr
    assert list(own_folder.iterdir()) == []


def test_failed_run_leaves_the_old_picture(own_folder, capsys, monkeypatch):
    (own_folder / "digits.png").write_bytes(b"old")

    def fails(*args, **keywords):
        raise RuntimeError("out of something")

    monkeypatch.setattr(fd, "sample", fails)
    assert cli.main(["sample", *QUICK]) == 1
    assert "fastdiff sample: failed: out of something" in capsys.readouterr().err
    assert (own_folder / "digits.png").read_bytes() == b"old"
    assert len(list(own_folder.iterdir())) == 1


def test_failed_write_leaves_the_old_picture(own_folder, monkeypatch):
    (own_folder / "digits.png").write_bytes(b"old")

    def fails(*args):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fails)
    assert cli.main(["sample", *QUICK]) == 1
    assert (own_folder / "digits.png").read_bytes() == b"old"
    assert len(list(own_folder.iterdir())) == 1


def test_missing_extras_are_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    assert cli.main(["sample", *QUICK]) == 1
    assert "pip install 'fastdiff[sample]'" in capsys.readouterr().err


def test_missing_scikit_learn_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert cli.main(["train", "digits", "--steps", "1"]) == 1
    assert "pip install 'fastdiff[train]'" in capsys.readouterr().err


# the others


def test_training_writes_weights_that_sample_reads(own_folder, capsys, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(digits_training.Digits, "report", lambda self, model: {"accuracy": 0.125})
    words = ["train", "digits", "--steps", "10", "--seed", "3", "--out", "own.safetensors"]
    assert cli.main(words) == 0
    said = capsys.readouterr()
    assert "own.safetensors" in said.out
    assert "10 iterations" in said.out
    assert "accuracy                0.1250" in said.out
    about = digits.metadata("own.safetensors")
    assert about["command"] == "fastdiff train digits --steps 10 --seed 3"
    assert cli.main(["sample", *QUICK, "--weights", "own.safetensors"]) == 0
    assert cli.main(["sample", *QUICK, "--out", "shipped.png"]) == 0
    assert (own_folder / "digits.png").read_bytes() != (own_folder / "shipped.png").read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: what"),
        (["cats"], "invalid choice: 'cats'"),
        (["digits", "--steps", "0"], "argument --steps: must be in [1, 10000000], got 0"),
        (["digits", "--seed", "x"], "argument --seed: must be an integer, got 'x'"),
        (["digits", "--out", "absent/w.safetensors"], "its folder absent does not exist"),
        (["digits", "--out", "w.pt"], "argument --out: must end in .safetensors, got 'w.pt'"),
        (["ncsn", "--threads", "0"], "argument --threads: must be in [1, 1024], got 0"),
        (["ncsn", "--checkpoint-every", "0"], "argument --checkpoint-every: must be in [1,"),
        (["heartbeat", "--curve", "c.pdf"], "argument --curve: must end in .png, got 'c.pdf'"),
        (["swiss_roll", "--curve", "absent/c.png"], "its folder absent does not exist"),
    ],
)
def test_wrong_training_options_are_named(capsys, monkeypatch, words, message):
    def never(*args, **keywords):
        raise AssertionError("training began")

    monkeypatch.setattr(train_command, "fit", never)
    assert cli.main(["train", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def quick_heartbeat(monkeypatch):
    """The smallest problem, and a report that takes no time."""
    monkeypatch.setattr(heartbeat.Heartbeat, "report", lambda self, model: {"bound, bits": 2.5})
    return ["train", "heartbeat", "--steps", "12", "--checkpoint-every", "5"]


def test_ctrl_c_says_how_to_go_on_and_that_gives_the_same_weights(
    capsys, monkeypatch, own_folder, quick_heartbeat
):
    assert cli.main([*quick_heartbeat, "--out", "whole.safetensors"]) == 0
    assert "bound, bits             2.5000" in capsys.readouterr().out
    loss = heartbeat.Heartbeat.loss

    def pressed(self, model, batch, step):
        if step == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return loss(self, model, batch, step)

    with monkeypatch.context() as patch:
        patch.setattr(heartbeat.Heartbeat, "loss", pressed)
        assert cli.main([*quick_heartbeat, "--out", "a b.safetensors"]) == 130
    said = capsys.readouterr().err
    assert "interrupted after iteration 8 of 12, kept in a b.ckpt; go on with:" in said
    assert not (own_folder / "a b.safetensors").exists()
    # Not without being told to, and not as another run.
    assert cli.main([*quick_heartbeat, "--out", "a b.safetensors"]) == 2
    assert "stopped at iteration 8 of 12: resume it, or delete" in capsys.readouterr().err
    assert cli.main([*quick_heartbeat, "--out", "a b.safetensors", "--resume", "--seed", "1"]) == 2
    assert "fit.seed 0 there, 1 here" in capsys.readouterr().err

    fastdiff, *words = shlex.split(said.splitlines()[-1])
    assert (fastdiff, words[-1]) == ("fastdiff", "--resume")
    assert cli.main(words) == 0
    files = [(own_folder / name).read_bytes() for name in ("a b.safetensors", "whole.safetensors")]
    assert files[0] == files[1]


def test_resuming_what_was_not_begun_begins(capsys, own_folder, quick_heartbeat):
    assert cli.main([*quick_heartbeat, "--resume"]) == 0
    assert "there is no checkpoint heartbeat.ckpt yet: beginning" in capsys.readouterr().err
    names = sorted(path.name for path in own_folder.iterdir())
    assert names == ["heartbeat.ckpt", "heartbeat.safetensors"]


def test_the_loss_is_drawn_where_matplotlib_is(capsys, monkeypatch, own_folder, quick_heartbeat):
    pytest.importorskip("matplotlib")
    assert cli.main([*quick_heartbeat, "--curve"]) == 0
    assert "heartbeat.png: the loss" in capsys.readouterr().out
    with Image.open("heartbeat.png") as picture:
        assert picture.size == (840, 480)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main([*quick_heartbeat, "--curve", "other.png"]) == 0
    assert "curve     not drawn: pictures need matplotlib: pip" in capsys.readouterr().out
    assert not (own_folder / "other.png").exists()


def test_a_curve_is_of_the_losses(own_folder):
    pytest.importorskip("matplotlib")
    losses = [2.0 / (k + 1) for k in range(20)]
    draws = {
        "falling": (losses, losses), "rising": (losses[::-1], losses[::-1]),
        "negative": ([-x for x in losses], [-x for x in losses]),
    }  # fmt: skip
    data = {
        name: pictures.save_curve(*both, f"{name}.png", "a title").read_bytes()
        for name, both in draws.items()
    }
    assert len(set(data.values())) == 3
    again = pictures.save_curve(*draws["rising"], "again.png", "a title")
    assert again.read_bytes() == data["rising"]
    for wrong in ([], [1.0]):
        with pytest.raises(ValueError, match=f"losses and as many means, got {len(wrong)} and 2"):
            pictures.save_curve(wrong, [1.0, 1.0], "wrong.png")


def test_version_and_help(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastdiff {fd.__version__}\n"
    assert cli.main(["--help"]) == 0
    said = capsys.readouterr().out
    for command in ("sample", "train", "info", "build"):
        assert command in said
        assert cli.main([command, "--help"]) == 0
    assert cli.main([]) == 2
    assert "required: command" in capsys.readouterr().err


def test_info_names_every_backend(capsys):
    assert cli.main(["info"]) == 0
    said = capsys.readouterr().out
    for name in fd.backends.names():
        assert name in said


def test_build_says_where_the_library_is(capsys):
    if fd.backends.probe("native", torch.device("cpu"), torch.float32) is not None:
        pytest.skip("no native backend on this machine")
    assert cli.main(["build"]) == 0
    paths = capsys.readouterr().out.split()
    assert paths
    assert all(os.path.isfile(path) for path in paths)


def test_failed_build_says_why(capsys, monkeypatch):
    def fails(**keywords):
        assert keywords == {"force": True, "verbose": False, "archs": None}
        raise RuntimeError("no compiler")

    monkeypatch.setattr(fd.backends.native, "build", fails)
    assert cli.main(["build", "--force"]) == 1
    assert "fastdiff build: failed: no compiler" in capsys.readouterr().err


def test_interrupt_is_not_a_traceback(capsys, monkeypatch):
    def interrupted(*args, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr(fd, "sample", interrupted)
    assert cli.main(["sample", *QUICK]) == 130
    assert capsys.readouterr().err == "fastdiff sample: interrupted\n"


def test_as_a_process(own_folder):
    done = run_process("sample", *QUICK, "--out", "process.png")
    assert done.returncode == 0, done.stderr
    assert "wrote     process.png" in done.stdout
    assert "Traceback" not in done.stderr
    assert cli.main(["sample", *QUICK, "--out", "here.png"]) == 0
    assert (own_folder / "process.png").read_bytes() == (own_folder / "here.png").read_bytes()
    refused = run_process("sample", "--steps", "0")
    assert refused.returncode == 2
    assert refused.stdout == ""
    assert "argument --steps" in refused.stderr


# pictures


def test_rows_are_labelled():
    x = -torch.ones(2, 1, 8, 8)
    grid = pictures.Grid(("3", "7"), 1)
    picture = pictures.draw_grid(x, grid)
    left = (grid.margin, grid.margin + grid.header)
    right = (grid.margin + grid.gutter, grid.size[1] - grid.margin)
    column = picture.crop((*left, *right))
    halves = (
        column.crop((0, 0, grid.gutter, grid.tile)),
        column.crop((0, grid.tile + grid.gap, grid.gutter, 2 * grid.tile + grid.gap)),
    )
    assert all(half.getextrema()[0] < 200 for half in halves)  # there is text in both,
    assert halves[0].tobytes() != halves[1].tobytes()  # and not the same


def test_ink_is_dark_and_out_of_range_is_clamped():
    x = torch.full((1, 1, 8, 8), -1.0)
    x[0, 0, 0] = torch.tensor([-1.0, 1.0, 0.0, -9.0, 9.0, torch.nan, torch.inf, -torch.inf])
    grid = pictures.Grid(("0",), 1)
    picture = pictures.draw_grid(x, grid)
    left, top = grid.corner(0, 0)
    row = [picture.getpixel((left + k * grid.scale, top)) for k in range(8)]
    assert row == [243, 30, 136, 243, 30, 243, 30, 243]


@pytest.mark.parametrize("shape", [(3, 1, 8, 8), (4, 3, 8, 8), (4, 1, 8, 7), (4, 8, 8)])
def test_samples_that_do_not_fill_the_grid_are_refused(shape):
    with pytest.raises(ValueError, match=r"samples must have shape \(4, 1, 8, 8\)"):
        pictures.draw_grid(torch.zeros(shape), pictures.Grid(("0", "1"), 2))


def test_empty_grids_and_animations_are_refused(own_folder):
    with pytest.raises(ValueError, match="at least one label"):
        pictures.Grid((), 1)
    with pytest.raises(ValueError, match="count 0"):
        pictures.Grid(("0",), 0)
    with pytest.raises(ValueError, match="at least one frame"):
        pictures.save_gif([], own_folder / "x.gif")


def test_png_is_the_picture(own_folder):
    picture = pictures.draw_grid(torch.rand(1, 1, 8, 8), pictures.Grid(("0",), 1), "a title")
    path = pictures.save_png(picture, own_folder / "x.png")
    with Image.open(io.BytesIO(path.read_bytes())) as back:
        assert back.tobytes() == picture.tobytes()
