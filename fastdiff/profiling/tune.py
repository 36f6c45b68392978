"""Finds the launch parameters of the Triton kernels for the GPU that is here.

    print(report(tune("cuda")))

Each way to cut the work (kernels/policy.py) is timed on launches that users make, large and small,
all ways in turn within a round. The best becomes the GPU's row in launch.json of the cache
directory, which comes before the table of kernels/policy.py. Deleting the file undoes it.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastdiff.backends import triton as backend
from fastdiff.profiling.cases import Case
from fastdiff.profiling.stopwatch import Stopwatch, stopwatch

if TYPE_CHECKING:
    from fastdiff.kernels.launch import Launch
    from fastdiff.kernels.policy import Parameters, Policy

__all__ = ["Choice", "Tuned", "best", "report", "tune"]

# Memory-bound and not, 16-bit and 32-bit; by which parameters of a policy they go.
_CASES = {
    "noise": (
        Case("q_sample"),
        Case("q_sample", torch.bfloat16, fast=True),
        Case("ddpm_clipped", torch.bfloat16),
    ),
    "plain": (
        Case("ddim_guided"),
        Case("ddim_guided", torch.bfloat16),
        Case("dpmpp_2m"),
    ),
}
_SHAPES = ((64, 3, 256, 256), (16, 4, 64, 64))  # past every L2, and a few programs an SM
_ROUNDS = 7
_SECONDS = 1e-3  # of one measurement
_WORTH = 0.99  # of the default's time: a row must gain more than one measures by chance


@dataclass(frozen=True)
class Choice:
    """The parameters chosen, and their time over the default's: geometric mean over launches."""

    parameters: Parameters
    ratio: float


@dataclass(frozen=True)
class Tuned:
    """What came of it: the GPU's row, where it was written, and the choice for each kind."""

    gpu: str
    policy: Policy
    path: Path
    noise: Choice
    plain: Choice


Make = Callable[["Parameters"], "Launch"]


def best(
    makes: Sequence[Make],
    default: Parameters,
    tried: Sequence[Parameters],
    watch: Stopwatch,
    rounds: int = _ROUNDS,
) -> Choice:
    """The parameters of least time over all launches; the default unless they clearly gain.

    Args:
        makes: for every launch, what prepares it under given parameters.
        default: what the others are compared with.
        tried: the parameters to compare.
        watch: measures calls.
        rounds: in each of which every candidate is measured once.
    """
    contestants = list(dict.fromkeys([default, *tried]))
    logarithms = np.zeros(len(contestants))
    for make in makes:
        # Ways that come to the same launch need one measurement.
        launches = [make(parameters) for parameters in contestants]
        cut = [(launch.grid, launch.constants, launch.options) for launch in launches]
        place = [cut.index(same) for same in cut]
        kept = sorted(set(place))
        place = [kept.index(first) for first in place]
        measures = [watch.prepare([launches[first]], _SECONDS) for first in kept]
        seconds = np.array([[measure() for measure in measures] for _ in range(rounds)])
        ratios = np.median(seconds / seconds[:, place[0] : place[0] + 1], axis=0)
        logarithms += np.log(ratios[place])
    ratios = np.exp(logarithms / len(makes))
    winner = int(ratios.argmin())
    if ratios[winner] >= _WORTH:
        return Choice(default, 1.0)
    return Choice(contestants[winner], float(ratios[winner]))


def _maker(case: Case, arguments: tuple[Any, ...], nvidia: bool) -> Make:
    from fastdiff.kernels.policy import Policy

    def make(parameters: Parameters) -> Launch:
        policy = Policy(parameters, parameters, "a candidate")
        launch: Launch | None = backend.prepare(case.op)(*arguments, nvidia=nvidia, policy=policy)
        assert launch is not None
        return launch

    return make


def tune(device: torch.device | str = "cuda", watch: Stopwatch | None = None) -> Tuned:
    """Times candidates on a GPU and writes the best as its row. Takes a few minutes.

    Args:
        device: the GPU.
        watch: measures calls on it; events around replayed graphs by default.

    Raises:
        RuntimeError: there is no such GPU, or no Triton that serves it.
        OSError: the row cannot be written.
    """
    device = torch.device(device)
    if device.type != "cuda":
        raise RuntimeError(f"launch parameters are tuned on a GPU, so device cannot be {device}")
    reason = backend.probe(device, torch.float32)
    if reason is not None:
        raise RuntimeError(f"launch parameters cannot be tuned on {device}: {reason}")
    from fastdiff.kernels import policy

    watch = watch or stopwatch(device)
    name = policy.target_name(device)
    # The table's row, so that tuning again does not start from what tuning found.
    start = policy.ROWS.get(name, policy.UNKNOWN)
    choices = {}
    with torch.cuda.device(device):
        for kind, cases in _CASES.items():
            default: Parameters = getattr(start, kind)
            makes = [
                _maker(case, case.arguments(shape, device), torch.version.hip is None)
                for case in cases
                for shape in _SHAPES
            ]
            choices[kind] = best(makes, default, list(policy.candidates()), watch)
    today = datetime.date.today().isoformat()
    source = f"tuned on {torch.cuda.get_device_name(device)}, {today}, torch {torch.__version__}"
    row = policy.Policy(
        choices["noise"].parameters, choices["plain"].parameters, source, start.registers
    )
    return Tuned(name, row, policy.keep(name, row), choices["noise"], choices["plain"])


def report(tuned: Tuned) -> str:
    """What was chosen, in a few lines."""
    lines = [f"Launch parameters for {tuned.gpu} are in {tuned.path}"]
    for kind, choice in (("with noise", tuned.noise), ("without", tuned.plain)):
        elements, warps, tiles = choice.parameters
        gain = "the default" if choice.ratio == 1.0 else f"{choice.ratio:.3f} of the default's time"
        lines.append(
            f"  launches {kind}: {elements} elements a thread, {warps} warps, up to {tiles} tiles "
            f"a program ({gain})"
        )
    return "\n".join(lines)
