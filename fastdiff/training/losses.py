"""Training losses, one number per sample, each in one pass over memory forward and one backward.

Noise is made again from the seed that q_sample made it from, never stored; gradients go to the
model output by a fused pass (fastdiff/ops/loss.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdiff.noise import STREAM_Q_SAMPLE
from fastdiff.ops.call import compute_dtype
from fastdiff.ops.call_loss import call_loss
from fastdiff.ops.checks import check_like, check_sample, check_uint32, resolve_rows, resolve_seed
from fastdiff.ops.forward import _check_schedule
from fastdiff.ops.held import held, remembered
from fastdiff.ops.loss import ERROR, LossSpec
from fastdiff.ops.loss_terms import RHOS
from fastdiff.ops.reverse import _check_model_output
from fastdiff.schedules import NoiseSchedule, Schedule
from fastdiff.schedules._values import FloatArray, refuse_where
from fastdiff.solvers.checks import check_choice, check_clip, check_positive
from fastdiff.training.tables import (
    LEARNED,
    NOISE,
    BoundKind,
    bound_spec,
    pack_columns,
    table_of,
    target_columns,
    target_mask,
)
from fastdiff.training.weighting import (
    TARGETS,
    AnyWeighting,
    Weighting,
    from_parts,
    parts_of,
    weighting_of,
    weights,
)

__all__ = [
    "KINDS", "REDUCTIONS", "HybridLoss", "check_finite", "check_kind", "check_one", "hybrid_loss",
    "loss", "noise_again", "score_matching_loss",
]  # fmt: skip

KINDS = dict(zip(("mse", "l1", "huber", "pseudo_huber"), range(len(RHOS)), strict=True))
REDUCTIONS = ("mean", "sum")
GIVEN = "given"  # the target is a tensor
_COLUMNS_OF = {"v": "v_prediction", GIVEN: "sample"}  # other names than target_columns has


class NoiseAgain(NamedTuple):
    """Where a loss has its noise from: the arguments of call_loss."""

    noise: list[Tensor]
    keys: Tensor | None
    counter: tuple[int, int, int, int]


def noise_again(
    like: Tensor,
    seed: int | Tensor | None,
    noise: Tensor | None,
    step: int,
    sample_offset: int,
) -> NoiseAgain:
    """The noise of fastdiff.q_sample(x_start, ..) with the same arguments; refuses them as it does.

    Args:
        like: x_start.
    """
    step = check_uint32("step", step)
    if noise is not None:
        check_like("noise", noise, "x_start", like)
    keys, low, offset = resolve_seed(
        0 if seed is None else seed, sample_offset, like.shape[0], like.device
    )
    given = [] if noise is None else [noise]
    return NoiseAgain(given, keys, (low, offset, step, STREAM_Q_SAMPLE))


def check_one(needed: bool, **sources: object) -> None:
    """Refuses more than one of the named arguments, and none of them where one is needed."""
    given = [name for name, value in sources.items() if value is not None]
    if len(given) > 1 or (needed and not given):
        *names, last = sources
        raise ValueError(
            f"exactly one of {', '.join(names)} and {last} must be given, "
            f"not {' and '.join(given) or 'none'}"
        )


def check_kind(kind: str, delta: float, reduction: str) -> float:
    """Refuses an unknown kind or reduction; delta as a float > 0."""
    check_choice("kind", kind, tuple(KINDS))
    check_choice("reduction", reduction, REDUCTIONS)
    return check_positive("delta", delta)


@remembered
def _spec(target: str, from_x_t: bool, kind: str, dtype: torch.dtype, fast: bool) -> LossSpec:
    error = target_mask(_COLUMNS_OF.get(target, target), from_x_t)
    return LossSpec(ERROR, error=error, rho=KINDS[kind], noise_dtype=dtype, fast=fast)


def _table(
    schedule: Schedule, target: str, from_x_t: bool, weighting: Any, delta: float, scale: float,
    device: torch.device, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    weight: FloatArray | float = 1.0
    if weighting is not None:
        weight = weights(from_parts(weighting), schedule, "" if target == GIVEN else target)
    columns = target_columns(
        _COLUMNS_OF.get(target, target), schedule.alpha_t, schedule.sigma_t, from_x_t
    )
    for name, values in columns.items():
        values = np.broadcast_to(values, len(schedule))
        refuse_where(
            f"schedule: target {target!r} is undefined, {name}", values, ~np.isfinite(values),
            "be finite",
        )  # fmt: skip
    rows = pack_columns(
        len(schedule), {**columns, "delta": delta, "error_scale": weight * scale}
    )  # fmt: skip
    return torch.from_numpy(rows).to(device=device, dtype=dtype)


def loss(
    model_output: Tensor,
    x_start: Tensor,
    t: int | Tensor,
    schedule: Schedule,
    *,
    x_t: Tensor | None = None,
    target: str | Tensor = "epsilon",
    seed: int | Tensor | None = None,
    noise: Tensor | None = None,
    step: int = 0,
    sample_offset: int = 0,
    kind: str = "mse",
    delta: float = 1.0,
    weighting: AnyWeighting = None,
    reduction: str = "mean",
    fast: bool = False,
    check: bool = False,
    backend: str | None = None,
) -> Tensor:
    """The loss of every sample, w(t) times the mean over its elements of rho(target - output).

        x_t = fd.q_sample(x_start, t, schedule, seed=0, step=iteration)
        loss = fd.training.loss(model(x_t, t), x_start, t, schedule, seed=0, step=iteration)
        loss.mean().backward()

    Other weights, masks of samples: multiply the result, it is per sample.

    Args:
        model_output: (B, ...), float32, bfloat16, float16 or float64.
        x_start: data x_0, of its shape, in the dtype that q_sample had it.
        t, schedule: as in q_sample.
        target: "epsilon" (z; Ho et al. 2020, eq. 14), "sample" (x_0), "v" (alpha_t z - sigma_t x_0;
            Salimans & Ho 2022), "flow" (z - x_0; Lipman et al. 2023), "score" (-z / sigma_t;
            Vincent 2011), or a tensor (B, ...).
        seed, noise, step, sample_offset, fast: those that q_sample had: z is made again.
        x_t: instead of them, z = (x_t - alpha_t x_0) / sigma_t. Reads a tensor more, and loses
            digits to cancellation where sigma_t is small.
        kind: rho(e): "mse" e^2, "l1" |e|, "huber" e^2/2 or delta (|e| - delta/2) beyond delta,
            "pseudo_huber" sqrt(e^2 + delta^2) - delta (Charbonnier et al. 1994). All are of one
            element; that of Song & Dhariwal 2024, eq. 8, is of the norm of a sample:
            (loss(.., reduction="sum") + delta^2).sqrt() - delta, with "mse".
        delta: > 0.
        weighting: w: a name of fastdiff.training.weighting.NAMES such as "min_snr", a Weighting
            with its parameters, a function of the schedule that returns (T,) numbers (keep it: its
            table is made once for the same function), or None for 1. Of a tensor target, whose
            meaning nobody knows, a function or None.
        reduction: "mean" over the elements of a sample, or "sum".
        check: read t back from a GPU and refuse values out of range (synchronizes).
        backend: "reference", "native" or "triton"; default automatic.

    Returns:
        (B,) float32, float64 for float64 data; differentiable with respect to all tensors.

    Raises:
        ValueError, TypeError: naming the argument; before anything runs.
    """
    return _loss(
        model_output, x_start, t, schedule, x_t, target, seed, noise, step, sample_offset, kind,
        delta, weighting, reduction, 1.0, fast, check, backend,
    )  # fmt: skip


def _loss(
    model_output: Tensor,
    x_start: Tensor,
    t: int | Tensor,
    schedule: Schedule,
    x_t: Tensor | None,
    target: str | Tensor,
    seed: int | Tensor | None,
    noise: Tensor | None,
    step: int,
    sample_offset: int,
    kind: str,
    delta: float,
    weighting: AnyWeighting,
    reduction: str,
    scale: float,
    fast: bool,
    check: bool,
    backend: str | None,
) -> Tensor:
    check_sample("model_output", model_output)
    check_like("x_start", x_start, "model_output", model_output)
    _check_schedule(schedule)
    x, name = x_start, target
    if isinstance(target, Tensor):
        check_like("target", target, "model_output", model_output)
        x, name = target, GIVEN
    else:
        check_choice("target", target, TARGETS)
    assert isinstance(name, str)
    delta = check_kind(kind, delta, reduction)
    if weighting is not None:
        weighting = weighting_of(weighting)
        if name == GIVEN and isinstance(weighting, Weighting):
            raise ValueError(f"weighting {weighting!r} needs a target by name, not a tensor")
    spec = _spec(name, x_t is not None, kind, x_start.dtype, fast)
    needed = name not in ("sample", GIVEN)
    check_one(needed, seed=seed, noise=noise, x_t=x_t)
    if x_t is not None:
        check_like("x_t", x_t, "model_output", model_output)
    z, keys, counter = noise_again(x_start, seed, noise, step, sample_offset)
    batch, device = model_output.shape[0], model_output.device
    rows = resolve_rows(t, schedule.num_timesteps, batch, device, check)
    if reduction == "mean":
        scale /= max(model_output.numel() // batch, 1)
    table = held(
        schedule.fingerprint, _table, schedule, name, x_t is not None, parts_of(weighting), delta,
        scale, device, compute_dtype(model_output.dtype),
    )  # fmt: skip
    return call_loss(
        spec, [model_output], x, x_t, table, rows, noise=z, keys=keys, counter=counter,
        backend=backend,
    )[0]  # fmt: skip


def score_matching_loss(
    score: Tensor,
    x_start: Tensor,
    t: int | Tensor,
    schedule: Schedule,
    *,
    x_t: Tensor | None = None,
    seed: int | Tensor | None = None,
    noise: Tensor | None = None,
    step: int = 0,
    sample_offset: int = 0,
    weighting: AnyWeighting = "sigma_squared",
    fast: bool = False,
    check: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Denoising score matching of every sample, summed over its elements:

        lambda(sigma_t) / 2 ||score + z / sigma_t||^2      (Vincent 2011; Song & Ermon 2019, eq. 5)

    Their mean over samples with t drawn evenly is eq. 6; lambda(sigma) = sigma^2 by default.

    Args:
        score: s(x_t, sigma_t), (B, ...).
        weighting: lambda: as in `loss`, of the score.
        others: as in `loss`.

    Raises:
        ValueError, TypeError: as `loss`; and where sigma_t is 0.
    """
    return _loss(
        score, x_start, t, schedule, x_t, "score", seed, noise, step, sample_offset, "mse", 1.0,
        weighting, "sum", 0.5, fast, check, backend,
    )  # fmt: skip


class HybridLoss(NamedTuple):
    """loss = mse + vb, (B,) each."""

    loss: Tensor
    mse: Tensor
    vb: Tensor


def hybrid_loss(
    model_output: Tensor,
    x_start: Tensor,
    x_t: Tensor,
    t: int | Tensor,
    schedule: NoiseSchedule,
    *,
    prediction_type: str = "epsilon",
    variance: str = "learned_range",
    vlb_weight: float = 1e-3,
    clip: Sequence[float] | None = None,
    seed: int | Tensor | None = None,
    noise: Tensor | None = None,
    step: int = 0,
    sample_offset: int = 0,
    fast: bool = False,
    check: bool = False,
    backend: str | None = None,
) -> HybridLoss:
    """L_simple + lambda L_vlb of a model that learns its variance, in one pass each way.

        mse = mean (target - output)^2,   vb = lambda T (bound's term of t, bits per dimension)

    (Nichol & Dhariwal 2021, eq. 16; T because L_vlb is a sum over t and t is drawn evenly.) The
    bound trains the variance only, its mean is frozen (their section 3.1).

    Args:
        model_output: (B, 2C, ...): the prediction, then the variance's channels.
        x_start, x_t: (B, C, ...); x_t of q_sample with the noise named here.
        prediction_type: "epsilon", "sample", "v_prediction", "flow", or "previous": the output is
            the mean of x_{t-1}. The target of "sample" and "previous" is made without the noise.
        variance: "learned_range" or "learned".
        vlb_weight: lambda.
        clip: bounds of the predicted x_0 in the bound, or None.
        others: as in `loss`.

    Returns:
        HybridLoss(loss, mse, vb), float32, float64 for float64 data; differentiable.

    Raises:
        ValueError, TypeError: naming the argument; before anything runs.
    """
    check_sample("x_start", x_start)
    check_like("x_t", x_t, "x_start", x_start)
    _check_schedule(schedule, chain=True)
    check_choice("variance", variance, LEARNED)
    _check_model_output(model_output, x_start, learned=True)
    scale = check_positive("vlb_weight", vlb_weight, zero=True) * schedule.num_timesteps
    kind = BoundKind(
        prediction_type, variance, check_clip(clip), scale=scale, target_error=True, frozen=True
    )
    spec = replace(bound_spec(kind), noise_dtype=x_start.dtype, fast=fast)
    check_one(bool(spec.error & NOISE), seed=seed, noise=noise)
    z, keys, counter = noise_again(x_start, seed, noise, step, sample_offset)
    batch, device = x_start.shape[0], x_start.device
    rows = resolve_rows(t, schedule.num_timesteps, batch, device, check)
    elements = x_start.numel() // batch
    table = table_of(schedule, kind, elements, device, compute_dtype(x_start.dtype))
    mse, vb = call_loss(
        spec, [model_output], x_start, x_t, table, rows, noise=z, keys=keys, counter=counter,
        backend=backend,
    )  # fmt: skip
    return HybridLoss(mse + vb, mse, vb)


def check_finite(loss: Tensor, t: int | Tensor) -> Tensor:
    """The loss itself, where every sample's is finite. Waits for the device.

    Args:
        loss: (B,).
        t: int, or a tensor (B,) or (1,): what the error says.

    Raises:
        FloatingPointError: naming the first sample whose loss is not finite, and its t.
        ValueError, TypeError: loss is no (B,) tensor, or t no number for each.
    """
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss must be a torch.Tensor, not {type(loss).__name__}")
    if loss.dim() != 1:
        raise ValueError(f"loss must have shape (B,), not {tuple(loss.shape)}")
    at = torch.as_tensor(t).reshape(-1)
    if at.numel() not in (1, len(loss)):
        raise ValueError(f"t must have shape ({len(loss)},) or (1,), not {tuple(at.shape)}")
    values = loss.detach().to("cpu", torch.float64).numpy()
    wrong = ~np.isfinite(values)
    if wrong.any():
        b = int(np.argmax(wrong))
        raise FloatingPointError(
            f"loss[{b}] is {values[b]} at t = {at.expand(len(values))[b].item()}; "
            f"{int(wrong.sum())} of {len(values)} samples are not finite"
        )
    return loss
