"""One training loop for every problem, with checkpoints from which it goes on to the same weights.

Everything that an iteration uses is a function of (seed, step), except what the loop carries: the
weights, their average, the optimizer's moments, and the state of torch's generator, which dropout
draws from. A checkpoint holds those, so a run that was killed and resumed ends with the bits of a
run that was not.

The optimizer is AdamW (Loshchilov & Hutter 2019) with a linear warm-up and half a cosine down to
zero, gradients clipped to norm 1, and the average of the weights an exponential one (Song & Ermon
2020, technique 5; Ho et al. 2020, appendix B).
"""

from __future__ import annotations

import copy
import io
import math
import os
import pickle
import signal
import threading
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

from fastdiff.files import check_writable, write_atomic
from fastdiff.models.problem import Fit, FitConfig, Problem
from fastdiff.progress import track
from fastdiff.schedules._values import as_int
from fastdiff.training import check_finite

__all__ = ["CheckpointError", "Interrupted", "TrainState", "fit", "running_means"]

_FORMAT = "fastdiff checkpoint 1"


@dataclass(frozen=True)
class TrainState:
    """What a callback gets: iterations done, of how many, and a running mean of the loss."""

    step: int
    steps: int
    loss: float


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, after the iteration was finished and a checkpoint written."""


class CheckpointError(ValueError):
    """A checkpoint that this run cannot go on from, or must not overwrite."""


def running_means(losses: Sequence[float]) -> list[float]:
    """The mean of the first losses, then one that forgets by a hundredth with each."""
    means: list[float] = []
    mean = 0.0
    for step, loss in enumerate(losses):
        mean = _moved(mean, loss, step)
        means.append(mean)
    return means


def _moved(mean: float, loss: float, step: int) -> float:
    return mean + max(0.01, 1 / (step + 1)) * (loss - mean)


def fit(
    problem: Problem,
    config: FitConfig,
    *,
    progress: bool = False,
    callback: Callable[[TrainState], None] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 500,
    resume: bool = False,
) -> Fit:
    """Train a problem's model on the CPU.

    The same problem and config give the same weights, as far as torch's operations do: with the
    same torch on the same kind of CPU. They do so however often the run was killed in between.

    Args:
        problem: see `Problem`; its `config` is a dataclass of plain values.
        config: the training; see `FitConfig`.
        progress: show a progress bar with the running mean of the loss on stderr.
        callback: called after every iteration.
        checkpoint: a file for the state of the run, rewritten atomically every `checkpoint_every`
            iterations, at the end, and at Ctrl-C. None keeps no state.
        resume: go on from the checkpoint; where there is none yet, begin.

    Returns:
        The averaged model (the model itself where ema_decay is 0), without gradients and in
        evaluation mode, and the losses of all iterations.

    Raises:
        ValueError: the checkpoint cannot be written. Before anything is trained, as the next.
        CheckpointError: the checkpoint is broken, or of another problem or configuration (naming
            what differs); or it is of an unfinished run, and resume is False.
        FloatingPointError: a loss or gradient that is not finite, naming the iteration, and the
            sample and its t where the loss is per sample. The last checkpoint stays.
        Interrupted: Ctrl-C (a second one does not wait for the iteration); only with a checkpoint,
            and in the main thread.
    """
    every = as_int("checkpoint_every", checkpoint_every, 1)
    if resume and checkpoint is None:
        raise ValueError("resume needs the checkpoint to go on from")
    path = None if checkpoint is None else check_writable(checkpoint, "checkpoint")
    settings = _settings(problem, config)
    saved = None if path is None else _read(path, settings, resume)
    with (
        _threads(config.threads),
        torch.random.fork_rng(devices=[]),
        _interrupts(path is not None) as interrupted,
    ):
        torch.manual_seed(config.seed)  # first weights, dropout
        run = _Run(problem, config)
        if saved is not None:
            run.restore(saved)
        kept = run.step  # the checkpoint's iteration, 0: none
        left = range(run.step, config.steps)
        for step in track(
            left, "training", progress, first=run.step, note=lambda: f"loss {run.mean:.4g}"
        ):
            try:
                run.iterate(step)
            except FloatingPointError as error:
                told = f"; {path} holds iteration {kept}" if kept else ""
                raise FloatingPointError(f"iteration {step + 1}: {error}{told}") from None
            if callback is not None:
                callback(TrainState(run.step, config.steps, run.mean))
            stop = interrupted()
            if path is not None and (run.step % every == 0 or run.step == config.steps or stop):
                _write(path, settings, run.state())
                kept = run.step
            if stop and run.step < config.steps:
                raise Interrupted(
                    f"interrupted after iteration {run.step} of {config.steps}, kept in {path}"
                )
    return Fit(run.result().requires_grad_(False).eval(), run.losses)


class _Run:
    """What is carried from iteration to iteration."""

    def __init__(self, problem: Problem, config: FitConfig) -> None:
        self.problem, self.config = problem, config
        self.model = problem.model().train()
        self.average: nn.Module | None = None
        if config.ema_decay:
            self.average = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.losses: list[float] = []
        self.mean = 0.0

    @property
    def step(self) -> int:
        """Iterations done."""
        return len(self.losses)

    def result(self) -> nn.Module:
        return self.model if self.average is None else self.average

    def iterate(self, step: int) -> None:
        """One iteration; raises before any weight is changed."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * _rate(step, self.config)
        batch = self.problem.batch(step)
        losses = self.problem.loss(self.model, batch, step)
        loss = losses.mean()
        value = loss.item()
        if not math.isfinite(value):
            if losses.dim() == 1:
                check_finite(losses, batch.t)
            raise FloatingPointError(f"the loss is {value}")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), 1.0))
        if not math.isfinite(norm):
            raise FloatingPointError(f"the norm of the gradient is {norm}")
        self.optimizer.step()
        if self.average is not None:
            # A young average follows faster (as in Karras et al. 2022, appendix F.2).
            decay = min(self.config.ema_decay, (step + 1) / (step + 10))
            with torch.no_grad():
                for mean, weight in zip(
                    self.average.parameters(), self.model.parameters(), strict=True
                ):
                    mean.mul_(decay).add_(weight * (1 - decay))
        self.losses.append(value)
        self.mean = _moved(self.mean, value, step)

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": torch.random.get_rng_state(),
            "losses": torch.tensor(self.losses, dtype=torch.float64),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.random.set_rng_state(state["generator"])
        self.losses = state["losses"].tolist()
        self.mean = running_means(self.losses)[-1]


def _rate(step: int, config: FitConfig) -> float:
    """Linear warm-up, then half a cosine down to zero, as a factor."""
    warmup = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    return warmup * 0.5 * (1 + math.cos(math.pi * step / config.steps))


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _interrupts(wanted: bool) -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed; the second time it does what it did before."""
    asked = False
    before = signal.getsignal(signal.SIGINT)
    if (
        not wanted
        or threading.current_thread() is not threading.main_thread()
        or not callable(before)  # ignored, as under nohup
    ):
        yield lambda: False
        return

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


# Checkpoints


def _settings(problem: Problem, config: FitConfig) -> dict[str, Any]:
    """Everything that decides the weights, by dotted name."""

    def flat(prefix: str, values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        for name, value in values.items():
            if isinstance(value, dict):
                yield from flat(f"{prefix}{name}.", value)
            else:
                yield prefix + name, value

    whole = {**asdict(problem.config), "fit": asdict(config)}
    return {"problem": type(problem).__name__, **dict(flat("", whole))}


def _write(path: Path, settings: dict[str, Any], state: dict[str, Any]) -> None:
    data = io.BytesIO()
    torch.save({"format": _FORMAT, "settings": settings, **state}, data)
    write_atomic(path, data.getvalue())


def _read(path: Path, settings: dict[str, Any], resume: bool) -> dict[str, Any] | None:
    """The state to go on from, or None to begin with."""
    if not path.is_file():
        return None
    data = io.BytesIO(path.read_bytes())
    try:
        saved = torch.load(data, map_location="cpu", weights_only=True)
        if saved["format"] != _FORMAT:
            raise ValueError(f"its format is {saved['format']!r}")
        theirs, done = saved["settings"], len(saved["losses"])
    except (RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile, EOFError, LookupError,
            TypeError, ValueError) as error:  # fmt: skip
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"checkpoint {path} is not one of this program: {reason}") from None
    if not resume:
        if done < theirs["fit.steps"]:
            raise CheckpointError(
                f"checkpoint {path} holds a run stopped at iteration {done} of "
                f"{theirs['fit.steps']}: resume it, or delete the file"
            )
        return None
    names = [name for name in {**theirs, **settings} if theirs.get(name) != settings.get(name)]
    if names:
        told = "; ".join(f"{n} {theirs.get(n)!r} there, {settings.get(n)!r} here" for n in names)
        raise CheckpointError(f"checkpoint {path} is of another configuration: {told}")
    return saved
