"""The command line: `fastdiff sample | train | build | info | bench | profile | selftest`.

Wrong options end with exit status 2 before anything runs; what fails later, with 1.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import fastdiff as fd
from fastdiff import pictures
from fastdiff.models import digits, train_command
from fastdiff.models.trainer import Interrupted
from fastdiff.options import UsageError, integer, output_file, real
from fastdiff.profiling import bench_command
from fastdiff.profiling import command as profile_command
from fastdiff.selftest import command as selftest

if TYPE_CHECKING:
    from PIL.Image import Image

    from fastdiff.engine import StepState
    from fastdiff.plan import SolverPlan

__all__ = ["main"]

_SAMPLER_STEPS = {"ddim": 50, "ddpm": 250}  # and what --steps is unless given
_MOST_FRAMES = 60  # of an animation; longer runs are thinned


# Options


def _classes(text: str) -> tuple[int, ...]:
    if text.strip().lower() == "all":
        return tuple(range(digits.CLASSES))
    words = [word.strip() for word in text.split(",")]
    known = {str(k): k for k in range(digits.CLASSES)}
    for word in words:
        if word not in known:
            raise argparse.ArgumentTypeError(
                f"must be a digit 0..9, several with commas between, or 'all'; got {text!r}"
            )
    if len(set(words)) < len(words):
        raise argparse.ArgumentTypeError(f"names a digit twice: {text!r}")
    return tuple(known[word] for word in words)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastdiff", description="Diffusion sampling, every step in one pass over memory."
    )
    parser.add_argument("--version", action="version", version=f"fastdiff {fd.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)

    sample = commands.add_parser(
        "sample",
        help="draw handwritten digits with the shipped model",
        description="Draw handwritten digits with the shipped model: a labelled PNG, one row per "
        "digit, and where the time went.",
    )
    _sample_options(sample.add_argument)
    sample.set_defaults(run=_sample)

    train = commands.add_parser("train", help="train the shipped model again, or another example")
    train_command.add_commands(train)
    train.set_defaults(run=train_command.command)

    info = commands.add_parser("info", help="what is available on this machine, and why not more")
    info.set_defaults(run=_info)

    build = commands.add_parser("build", help="compile the native library for this machine")
    build.add_argument("--force", action="store_true", help="even if it is there already")
    build.add_argument("--verbose", action="store_true", help="show the compiler's commands")
    build.add_argument(
        "--cuda-archs",
        metavar="LIST",
        help='compute capabilities to build the CUDA library for, as "8.0 9.0" (default: those in '
        "FASTDIFF_CUDA_ARCHS, else of the GPUs here); where it is used FASTDIFF_CUDA_ARCHS must "
        "name the same",
    )
    build.set_defaults(run=_build)

    bench = commands.add_parser(
        "bench",
        help="measure fastdiff against PyTorch, torch.compile, diffusers and this machine's limits",
        description="Interleaved rounds of fastdiff and what people run today, each result checked "
        "first. Exit status: 1 for a wrong result, or with --compare for a regression.",
    )
    bench_command.add_options(bench.add_argument)
    bench.set_defaults(run=_bench)

    profile = commands.add_parser(
        "profile",
        help="what kernels will do on a GPU that nobody has tried, or do on the one that is here",
        description="With --target: compiles every operation for GPUs that need not be here and "
        "reports registers, spills, access widths, instructions, occupancy, and which limit will "
        "hold. Without: measures on the GPU of this machine.",
    )
    profile_command.add_options(profile.add_argument)
    profile.set_defaults(run=_profile)

    check = commands.add_parser(
        "selftest",
        help="does this machine compute what it should? --gpu: everything worth running on a GPU",
        description="Every backend against the definition, each part in a process of its own. "
        "Exit status: 0 all passed, 1 something failed, 2 no GPU or a wrong option.",
    )
    selftest.add_options(check.add_argument)
    check.set_defaults(run=_selftest)
    return parser


def _sample_options(add: Callable[..., object]) -> None:
    def option(name: str, metavar: str, help: str, **settings: Any) -> None:
        add(name, metavar=metavar, help=help, **settings)

    steps = ", ".join(f"{steps} for {name}" for name, steps in _SAMPLER_STEPS.items())
    default = "(default: %(default)s)"
    add("--sampler", choices=tuple(_SAMPLER_STEPS), default="ddim", help=f"the sampler {default}")
    option("--steps", "N", f"model calls (default: {steps})", type=integer(1, digits.TIMESTEPS))
    option("--eta", "X", "noise of DDIM: 0 none, 1 as much as DDPM (default: 0)", type=real(0, 1))
    option("--seed", "N", f"of all the noise {default}", type=integer(0, 2**64 - 1), default=0)
    option(
        "--class",
        "DIGITS",
        f"a digit, several with commas between, or 'all' {default}",
        dest="classes",
        type=_classes,
        default="all",
    )
    option(
        "--guidance",
        "X",
        f"classifier-free guidance scale; 1 is none, and half the work {default}",
        type=real(0, 100),
        default=digits.GUIDANCE_SCALE,
    )
    option("--count", "N", f"pictures of each digit {default}", type=integer(1, 100), default=8)
    backends = ("auto", *fd.backends.names())
    add("--backend", choices=backends, default="auto", help=f"who runs the steps {default}")
    option("--device", "DEVICE", "cpu or cuda (default: a GPU if there is one)", default="auto")
    option("--weights", "FILE", "of `fastdiff train` (default: the shipped ones)")
    option("--out", "FILE.png", f"the picture {default}", default="digits.png")
    option(
        "--animate",
        "FILE.gif",
        "also draw what the model makes of the noise, step by step (default name: that of --out)",
        nargs="?",
        const="",
    )


def _device(text: str) -> torch.device:
    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"argument --device: {text!r} is not there: {reason}") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"argument --device: must be cpu or cuda, got {text!r}")
    return device


# sample


@dataclass
class _Times:
    """Seconds of one run: everything, the model's part, and what was spent on showing it."""

    total: float = 0.0
    model: float = 0.0
    shown: float = 0.0

    @property
    def step(self) -> float:
        return max(0.0, self.total - self.model - self.shown)

    def report(self, steps: int, count: int) -> str:
        """How fast it was, and where the time went."""
        spent = self.model + self.step
        rates = f"{steps / spent:.1f} steps/s, {count / spent:.1f} pictures/s"
        lines = [f"time      {spent:.3f} s, {rates}"]
        for name, seconds in (("model", self.model), ("step", self.step)):
            lines.append(f"  {name:<8}{seconds:.3f} s {100 * seconds / spent:6.1f} %")
        return "\n".join(lines)


def _timed(
    model: Callable[[Tensor, Tensor], Tensor], times: _Times, wait: Callable[[], None]
) -> Callable[[Tensor, Tensor], Tensor]:
    """The model, its time added up; `wait` returns when the device is done."""

    def call(x: Tensor, t: Tensor) -> Tensor:
        wait()
        begin = time.perf_counter()
        output = model(x, t)
        wait()
        times.model += time.perf_counter() - begin
        return output

    return call


def _plan(sampler: str, steps: int, eta: float) -> SolverPlan:
    schedule = digits.schedule()
    if sampler == "ddim":
        return fd.solvers.ddim(
            schedule, steps=steps, eta=eta, prediction_type="epsilon", clip=(-1, 1)
        )
    return fd.solvers.ddpm(
        schedule, steps=steps, prediction_type="epsilon", variance="fixed_small", clip=(-1, 1)
    )


def _frames_shown(steps: int) -> set[int]:
    """Which steps of a run an animation shows: the last one and as many others as fit."""
    count = min(steps, _MOST_FRAMES)
    return {steps - 1 - (k * steps) // count for k in range(count)}


def _sample(options: argparse.Namespace) -> int:
    steps = options.steps or _SAMPLER_STEPS[options.sampler]
    if options.sampler != "ddim" and options.eta is not None:
        raise UsageError(f"argument --eta: only ddim has it, not {options.sampler}")
    out = output_file("--out", options.out, ".png")
    animation: Path | None = None
    if options.animate is not None:
        animation = output_file(
            "--animate", options.animate or str(out.with_suffix(".gif")), ".gif"
        )
    device = _device(options.device)
    pictures.require_pillow()
    try:
        model = digits.load(options.weights or digits.WEIGHTS, device)
    except (FileNotFoundError, ValueError) as error:
        raise UsageError(f"argument --weights: {error}") from None

    labels = torch.tensor(options.classes, device=device).repeat_interleave(options.count)
    denoise = digits.conditional(model, labels)
    guidance = None if options.guidance == 1 else options.guidance
    title = f"{options.sampler}, {steps} steps"
    if options.eta:
        title += f", eta {options.eta:g}"
    if guidance is not None:
        title += f", guidance {guidance:g}"

    times = _Times()
    grid = pictures.Grid(tuple(map(str, options.classes)), options.count)
    frames: list[Image] = []
    shown = _frames_shown(steps)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def draw_frame(state: StepState) -> None:
        begin = time.perf_counter()
        if state.index in shown:
            note = f"seed {options.seed}, step {state.index + 1}"
            frames.append(pictures.draw_grid(state.x_start, grid, title, note))
        times.shown += time.perf_counter() - begin

    def run(model: Callable[[Tensor, Tensor], Tensor], steps: int, **more: Any) -> Tensor:
        plan = _plan(options.sampler, steps, options.eta or 0.0)
        shape = (len(labels), *digits.SHAPE)
        more = {"seed": options.seed, "guidance_scale": guidance, "device": device, **more}
        begin = time.perf_counter()
        x = fd.sample(model, plan, shape=shape, **more)
        assert isinstance(x, Tensor)  # no trajectory was asked for
        wait()
        times.total = time.perf_counter() - begin
        return x

    with fd.use_backend(None if options.backend == "auto" else options.backend):
        try:
            backend = fd.backends.select(device, torch.float32)  # builds the native one if need be
        except (fd.backends.BackendError, ValueError) as error:
            raise UsageError(f"argument --backend: {error}") from None
        # The first call of a kernel and of a model costs more than the others: not of this run.
        run(denoise, steps=min(2, steps))
        callback = draw_frame if animation else None
        x = run(
            _timed(denoise, times, wait), steps, callback=callback, progress=sys.stderr.isatty()
        )

    pictures.save_png(pictures.draw_grid(x, grid, title, f"seed {options.seed}"), out)
    if animation:
        pictures.save_gif(frames, animation)
    wrote = " and ".join(str(path) for path in (out, animation) if path)
    print(f"wrote     {wrote}: {len(labels)} pictures")
    print(f"sampler   {title}, seed {options.seed}")
    print(f"backend   {backend} on {device}")
    print(times.report(steps, len(labels)))
    return 0


# info, build


def _info(options: argparse.Namespace) -> int:
    from fastdiff.backends.info import info

    print(info())
    return 0


def _build(options: argparse.Namespace) -> int:
    archs = None
    if options.cuda_archs is not None:
        archs = options.cuda_archs.replace(",", " ").split()
        try:
            fd.backends.build.cuda_archs(archs)
        except fd.backends.build.BuildError as error:
            raise UsageError(f"argument --cuda-archs: {error}") from None
    build = fd.backends.native.build
    for path in build(force=options.force, verbose=options.verbose, archs=archs):
        print(path)
    return 0


def _bench(options: argparse.Namespace) -> int:
    try:
        return bench_command.command(options)
    except bench_command.UsageError as error:
        raise UsageError(str(error)) from None


def _profile(options: argparse.Namespace) -> int:
    try:
        return profile_command.command(options)
    except profile_command.UsageError as error:
        raise UsageError(str(error)) from None


def _selftest(options: argparse.Namespace) -> int:
    out = None
    try:
        if options.out or options.gpu:
            out = selftest.results_folder(options.out or selftest.GPU_FOLDER)
    except ValueError as error:
        raise UsageError(f"argument {error}") from None
    return selftest.selftest(options.gpu, options.minutes, out)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status.

    Args:
        argv: the words after `fastdiff`; those of this process unless given.
    """
    parser = _parser()
    try:
        options = parser.parse_args(argv)
    except SystemExit as stop:  # --help, --version, or an option that is wrong
        return int(stop.code or 0)
    name = f"fastdiff {options.command}"
    try:
        return options.run(options)
    except UsageError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 2
    except Interrupted as error:  # says where training stopped, and how it goes on
        print(f"{name}: {error}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        print(f"{name}: failed: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
