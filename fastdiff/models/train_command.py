"""`fastdiff train digits | ncsn | heartbeat | swiss_roll`."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdiff import pictures
from fastdiff.models import digits, digits_training, heartbeat, ncsn, swiss_roll, weights
from fastdiff.models.trainer import CheckpointError, Interrupted, TrainState, fit, running_means
from fastdiff.options import UsageError, integer, output_file

__all__ = ["PROBLEMS", "add_commands", "command"]

CHECKPOINT_EVERY = 250  # iterations; of the digits about 20 seconds


@dataclass(frozen=True)
class Trainable:
    """A problem by name: what it is, how it is configured and made, and how weights are kept."""

    about: str
    config: Callable[[], Any]
    problem: Callable[[Any], Any]
    save: Callable[[Any, Any, list[float], Path], object]


def _save_digits(
    problem: digits_training.Digits, model: Any, losses: list[float], path: Path
) -> Path:
    return digits.save(model, path, problem.about(losses))


def _save_ncsn(problem: ncsn.NCSN, model: Any, losses: list[float], path: Path) -> Path:
    return ncsn.save(model, path, problem.about(losses))


def _save(problem: Any, model: nn.Module, losses: list[float], path: Path) -> Path:
    """Weights as they are, for problem.model().load_state_dict(weights.read(path)[1])."""
    about = {
        "problem": type(problem).__name__,
        "config": asdict(problem.config),
        "loss": running_means(losses)[-1],
        "torch": str(torch.__version__),
    }
    return weights.save(model, path, about)


PROBLEMS = {
    "digits": Trainable(
        "handwritten digits, 8x8, the shipped model (Ho et al. 2020)",
        digits_training.DigitsConfig, digits_training.Digits, _save_digits,
    ),
    "ncsn": Trainable(
        "a score network on the digits (Song & Ermon 2019, 2020)",
        ncsn.NCSNConfig, ncsn.NCSN, _save_ncsn,
    ),
    "heartbeat": Trainable(
        "bits by binomial diffusion (Sohl-Dickstein et al. 2015, section 3.1.2)",
        heartbeat.HeartbeatConfig, heartbeat.Heartbeat, _save,
    ),
    "swiss_roll": Trainable(
        "a Gaussian chain that learns its betas (Sohl-Dickstein et al. 2015, section 3.1.1)",
        swiss_roll.SwissRollConfig, swiss_roll.SwissRoll, _save,
    ),
}  # fmt: skip


def add_commands(parser: argparse.ArgumentParser) -> None:
    """A command for every problem, on the parser of `train`."""
    commands = parser.add_subparsers(dest="what", metavar="what", required=True)
    for name, trainable in PROBLEMS.items():
        sub = commands.add_parser(
            name,
            help=trainable.about,
            description=f"Train {trainable.about}. The same seed gives the same weights, however "
            "often the run was stopped and resumed.",
        )
        _add_options(sub.add_argument, name, trainable.config().fit.steps)


def _add_options(add: Callable[..., object], name: str, steps: int) -> None:
    default = "(default: %(default)s)"
    out = f"{name}.safetensors"
    add("--out", metavar="FILE.safetensors", default=out, help=f"the weights {default}")

    def number(option: str, low: int, high: int, value: int, help: str) -> None:
        add(option, metavar="N", type=integer(low, high), default=value, help=f"{help} {default}")

    number("--steps", 1, 10**7, steps, "training iterations")
    number("--seed", 0, 2**63 - 1, 0, "of the first weights, the order and the noise")
    number("--threads", 1, 1024, 1, "of the CPU; another number gives other roundings")
    number(
        "--checkpoint-every", 1, 10**7, CHECKPOINT_EVERY,
        "iterations between checkpoints, which lie beside the weights and end in .ckpt",
    )  # fmt: skip
    add("--resume", action="store_true", help="go on from the checkpoint, if there is one")
    add(
        "--curve",
        metavar="FILE.png",
        nargs="?",
        const="",
        help="also draw the loss (default name: that of --out)",
    )


def command(options: argparse.Namespace) -> int:
    """Train, write, report. Raises UsageError for a wrong option, before anything is trained."""
    trainable = PROBLEMS[options.what]
    out = output_file("--out", options.out, ".safetensors")
    checkpoint = output_file("--out", str(out.with_suffix(".ckpt")), ".ckpt")
    curve: Path | None = None
    if options.curve is not None:
        curve = output_file("--curve", options.curve or str(out.with_suffix(".png")), ".png")
    weights.require("safetensors.torch", "sample")
    config = trainable.config()
    chosen = {"steps": options.steps, "seed": options.seed, "threads": options.threads}
    config = replace(config, fit=replace(config.fit, **chosen))
    problem = trainable.problem(config)
    if options.resume and not checkpoint.is_file():
        print(f"there is no checkpoint {checkpoint} yet: beginning", file=sys.stderr)

    terminal, begin = sys.stderr.isatty(), time.perf_counter()
    try:
        model, losses = fit(
            problem, config.fit, progress=terminal, callback=None if terminal else _tenths,
            checkpoint=checkpoint, checkpoint_every=options.checkpoint_every,
            resume=options.resume,
        )  # fmt: skip
    except CheckpointError as error:
        raise UsageError(str(error)) from None
    except Interrupted as error:
        raise Interrupted(f"{error}; go on with:\n  {_again(options)}") from None
    seconds = time.perf_counter() - begin
    trainable.save(problem, model, losses, out)
    print(f"wrote     {out}: {out.stat().st_size / 1e6:.2f} MB")
    mean = running_means(losses)[-1]
    print(f"training  {config.fit.steps} iterations, loss {mean:.4f}; this run {seconds:.0f} s")
    if curve is not None:
        _draw(losses, curve, f"fastdiff train {options.what}, seed {options.seed}")
    print("report")
    for name, value in problem.report(model).items():
        print(f"  {name:<24}{value:.4f}")
    return 0


def _tenths(state: TrainState) -> None:
    if state.step * 10 // state.steps > (state.step - 1) * 10 // state.steps:
        text = f"training {state.step}/{state.steps} loss {state.loss:.4f}"
        print(text, file=sys.stderr, flush=True)


def _again(options: argparse.Namespace) -> str:
    """The command that resumes this one."""
    words = ["fastdiff", "train", options.what, "--out", options.out]
    for name in ("steps", "seed", "threads", "checkpoint_every"):
        words += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    if options.curve is not None:
        words += ["--curve", *([options.curve] if options.curve else [])]
    return shlex.join([*words, "--resume"])


def _draw(losses: Sequence[float], path: Path, title: str) -> None:
    try:
        pictures.save_curve(losses, running_means(losses), path, title)
    except ModuleNotFoundError as error:
        print(f"curve     not drawn: {error}")
        return
    print(f"wrote     {path}: the loss")
