"""How far the forward process is from its isotropic limit: x_T -> N(0, I), measured for every t."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdiff.files import check_writable, write_atomic
from fastdiff.ops.checks import check_sample
from fastdiff.profiling.roofline import require_matplotlib
from fastdiff.schedules import GaussianPath, NoiseSchedule, Schedule
from fastdiff.schedules._values import FloatArray, as_float, freeze

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["VISIBLE_BITS", "Isotropic", "isotropic", "plot_isotropic", "warn_unless_isotropic"]

# Bits per dimension are given to two decimals: a prior term above half a unit of the second one
# shows in them. For data of second moment 1 that is a terminal SNR of about 0.007.
VISIBLE_BITS = 0.005


class Isotropic(NamedTuple):
    """The limit N(0, limit_std^2 I) and the way there; float64 (T,), read-only.

    Attributes:
        bits: KL(q(x_t | x_0) || N(0, limit_std^2 I)) per dimension in bits.
        mean_scale: alpha_t, the factor of x_0 in the mean of q(x_t | x_0).
        variance: sigma_t^2.
        second_moment: E[x_0^2] over elements, in squared data units.
        limit_std: of the limit.
    """

    bits: FloatArray
    mean_scale: FloatArray
    variance: FloatArray
    second_moment: float
    limit_std: float


# Fingerprints of schedules: looked at with data of second moment 1, and warned of.
_known: set[str] = set()
_warned: set[str] = set()


def isotropic(
    schedule: Schedule, data: Tensor | float | Sequence[float] | None = None
) -> Isotropic:
    """KL(q(x_t | x_0) || N(0, I)) per dimension in bits for every t, and the moments of q.

        KL = 0.5 (alpha_t^2 E[x_0^2] + sigma_t^2 - 1 - log sigma_t^2) / ln 2

    The last entry is the bound's term L_T (Ho et al. 2020, eq. 5). The limit of a GaussianPath is
    N(0, sigma_T^2 I), as of variance-exploding paths (Song et al. 2021, appendix C).

    Args:
        schedule: any schedule of fastdiff.schedules.
        data: x_0 (B, ...), or the second moment E[x_0^2], or (mean, variance) of the elements;
            by default data of second moment 1.

    Warns:
        UserWarning: once per schedule, where the last term would show in bits per dimension that
            are given to two decimals (more than 0.005).

    Raises:
        ValueError, TypeError: naming the argument.
    """
    if not isinstance(schedule, (NoiseSchedule, GaussianPath)):
        raise TypeError(
            f"schedule must be a schedule of fastdiff.schedules, not {type(schedule).__name__}"
        )
    moment = _second_moment(data)
    alpha, variance = schedule.alpha_t, np.square(schedule.sigma_t)
    if isinstance(schedule, NoiseSchedule):
        limit_std = 1.0
        nats = schedule.prior_kl(moment)
    else:
        limit_std = float(schedule.sigma_t[-1])
        if limit_std == 0.0:
            raise ValueError("schedule has no noise: its last sigma_t is 0")
        ratio = variance / limit_std**2
        with np.errstate(divide="ignore"):
            nats = 0.5 * (np.square(alpha / limit_std) * moment + (ratio - 1.0) - np.log(ratio))
    result = Isotropic(
        freeze(nats / math.log(2.0)), alpha, freeze(variance), moment, limit_std
    )  # fmt: skip
    _warn(schedule, float(result.bits[-1]), moment)
    return result


def warn_unless_isotropic(schedule: NoiseSchedule) -> None:
    """Warns once per schedule where x_T is not nearly N(0, I): see `isotropic`."""
    if torch.compiler.is_compiling() or schedule.fingerprint in _known:
        return
    _known.add(schedule.fingerprint)
    _warn(schedule, float(schedule.prior_kl()[-1]) / math.log(2.0), 1.0)


def _warn(schedule: Schedule, bits: float, moment: float) -> None:
    if bits <= VISIBLE_BITS or schedule.fingerprint in _warned:
        return
    _warned.add(schedule.fingerprint)
    warnings.warn(
        f"schedule {schedule.name!r} ends at a signal-to-noise ratio of {schedule.snr[-1]:.3g}: "
        f"x_T is {bits:.3g} bits per dimension from its isotropic limit (second moment of the data "
        f"{moment:.3g}), more than the {VISIBLE_BITS} that go unseen in bits per dimension of two "
        "decimals; sampling from the limit starts off the process that the model learns",
        UserWarning,
        stacklevel=3,
    )


def _second_moment(data: Tensor | float | Sequence[float] | None) -> float:
    if data is None:
        return 1.0
    if isinstance(data, Tensor):
        check_sample("data", data)
        if data.numel() == 0:
            raise ValueError(f"data must have elements, not shape {tuple(data.shape)}")
        return float(data.detach().double().square().mean())
    if isinstance(data, (tuple, list)):
        if len(data) != 2:
            raise ValueError(f"data must be (mean, variance), not {len(data)} numbers")
        mean, spread = (as_float("data", value) for value in data)
        if spread < 0:
            raise ValueError(f"data must have a variance >= 0, not {spread}")
        return mean * mean + spread
    moment = as_float("data", data)
    if moment < 0:
        raise ValueError(f"data must have a second moment >= 0, not {moment}")
    return moment


# Colours that colour-blind readers tell apart (Okabe and Ito).
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")


def plot_isotropic(
    schedules: Mapping[str, Schedule] | Sequence[Schedule],
    path: str | Path,
    data: Tensor | float | Sequence[float] | None = None,
) -> Path:
    """Draws the way to the isotropic limit as PNG: bits, mean and variance against t / T.

    Args:
        schedules: by the names to show, or a sequence (shown by their own).
        path: the file.
        data: as in `isotropic`.

    Raises:
        ModuleNotFoundError: matplotlib (extra `plot`) is not installed.
        ValueError, TypeError: naming the argument, before anything is written.
    """
    require_matplotlib()
    target = check_writable(path)
    if isinstance(schedules, Mapping):
        named = list(schedules.items())
    elif isinstance(schedules, Sequence):
        named = [(getattr(schedule, "name", ""), schedule) for schedule in schedules]
    else:
        raise TypeError(
            f"schedules must be a mapping or a sequence, not {type(schedules).__name__}"
        )
    if not named:
        raise ValueError("schedules must hold at least one schedule")
    buffer = io.BytesIO()
    _drawn([(name, isotropic(schedule, data)) for name, schedule in named]).savefig(
        buffer, format="png", dpi=150, facecolor="white"
    )
    return write_atomic(target, buffer.getvalue())


def _drawn(curves: list[tuple[str, Isotropic]]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    bits, mean, variance = figure.subplots(1, 3)
    for k, (name, found) in enumerate(curves):
        place = np.arange(1, found.bits.size + 1) / found.bits.size
        style = {"color": _COLOURS[k % len(_COLOURS)], "label": name, "lw": 1.6}
        # A logarithm has no place for infinities and zeros.
        shown = np.where(np.isfinite(found.bits) & (found.bits > 0), found.bits, np.nan)
        bits.plot(place, shown, **style)
        mean.plot(place, found.mean_scale, **style)
        variance.plot(place, found.variance / found.limit_std**2, **style)
    bits.axhline(VISIBLE_BITS, color="#888888", lw=0.8, ls="--")
    bits.set_yscale("log")
    titles = {
        bits: "bits per dimension from the limit", mean: "factor of x_0 in the mean",
        variance: "variance over the limit's",
    }  # fmt: skip
    for axes, title in titles.items():
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("t / T", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e4e4e4", lw=0.6)
    bits.legend(fontsize=8, frameon=False)
    return figure
