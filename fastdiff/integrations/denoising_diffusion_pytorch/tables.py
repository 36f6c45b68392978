"""The steps as rows of the fused step, made of upstream's own buffers."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastdiff.integrations.gaussian_diffusion.tables import Form, add_forms, pack_forms
from fastdiff.ops.held import lasting
from fastdiff.ops.loss import ERROR, LossSpec
from fastdiff.ops.step import StepSpec
from fastdiff.training.tables import pack_columns, target_columns, target_mask

__all__ = [
    "Make", "ancestral_step", "ddim_pairs", "ddim_step", "loss_pass", "mean_step", "pair_step",
    "predictions_step", "tables_of",
]  # fmt: skip

# The buffers in float64 on the host, a row per t.
Values = dict[str, np.ndarray]
Make = Callable[..., tuple[Any, np.ndarray]]

# The buffers that steps are made of.
_BUFFERS = (
    "alphas_cumprod", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_log_variance_clipped",
    "posterior_mean_coef1", "posterior_mean_coef2",
)  # fmt: skip


class _Tables:
    """Steps made of one state of the buffers."""

    def __init__(self, buffers: list[Tensor]) -> None:
        self.buffers = buffers
        self.versions = _versions(buffers)
        with lasting():
            host = torch.stack([b.detach().double() for b in buffers]).cpu().numpy()
        self.values: dict[str, np.ndarray] = dict(zip(_BUFFERS, host, strict=True))
        self.specs: dict[tuple[Any, ...], tuple[Any, Tensor]] = {}

    def current(self, buffers: list[Tensor]) -> bool:
        same = all(a is b for a, b in zip(self.buffers, buffers, strict=True))
        return same and self.versions == _versions(buffers)

    def step(self, make: Make, *key: Any, dtype: torch.dtype) -> tuple[Any, Tensor]:
        """make(values, *key), its table on the device; made once."""
        found = self.specs.get((make, key, dtype))
        if found is None:
            with np.errstate(all="ignore"), lasting():
                spec, table = make(self.values, *key)
                uploaded = torch.from_numpy(table).to(self.buffers[0].device, dtype)
            found = self.specs[make, key, dtype] = (spec, uploaded)
        return found


def _versions(buffers: list[Tensor]) -> list[int]:
    return [0 if b.is_inference() else b._version for b in buffers]


_known: weakref.WeakKeyDictionary[nn.Module, _Tables] = weakref.WeakKeyDictionary()


def tables_of(module: nn.Module) -> _Tables:
    buffers: list[Tensor] = [module._buffers[name] for name in _BUFFERS]  # type: ignore[misc]
    found = _known.get(module)
    if found is None or not found.current(buffers):
        found = _known[module] = _Tables(buffers)
    return found


def _x_start(values: Values, objective: str) -> Form:
    one = np.ones_like(values["alphas_cumprod"])
    if objective == "pred_noise":
        recip, recipm1 = values["sqrt_recip_alphas_cumprod"], values["sqrt_recipm1_alphas_cumprod"]
        return {"x": recip, "o": -recipm1}
    if objective == "pred_x0":
        return {"o": one}
    return {"x": values["sqrt_alphas_cumprod"], "o": -values["sqrt_one_minus_alphas_cumprod"]}


def _noise_of(values: Values, x_start: Form) -> Form:
    """epsilon = (sqrt(1 / abar) x - x_0) / sqrt(1 / abar - 1)."""
    recip, recipm1 = values["sqrt_recip_alphas_cumprod"], values["sqrt_recipm1_alphas_cumprod"]
    return add_forms((1.0 / recipm1, {"x": recip}), (-1.0 / recipm1, x_start))


def _posterior(values: Values, x_start: Form) -> Form:
    c1, c2 = values["posterior_mean_coef1"], values["posterior_mean_coef2"]
    return add_forms((c1, x_start), (c2, {"x": np.ones_like(c2)}))


def _clamped(values: Values, before: Form, clip: bool) -> tuple[Form, Form | None]:
    return ({"c": np.ones_like(values["alphas_cumprod"])}, before) if clip else (before, None)


def pair_step(values: Values, kind: str) -> tuple[StepSpec, np.ndarray]:
    """The methods of two tensors x and h."""
    a, s = values["sqrt_alphas_cumprod"], values["sqrt_one_minus_alphas_cumprod"]
    recip, recipm1 = values["sqrt_recip_alphas_cumprod"], values["sqrt_recipm1_alphas_cumprod"]
    form = {
        "predict_start_from_noise": {"x": recip, "h": -recipm1},
        "predict_noise_from_start": {"x": recip / recipm1, "h": -1.0 / recipm1},
        "predict_v": {"x": -s, "h": a},
        "predict_start_from_v": {"x": a, "h": -s},
        "q_posterior": _posterior(values, {"h": np.ones_like(a)}),
        "q_sample": {"x": a, "h": s},
    }[kind]
    return pack_forms(["x", "h"], [form])


def mean_step(values: Values, objective: str, clip: bool) -> tuple[StepSpec, np.ndarray]:
    """Posterior mean and x_0."""
    x_start, clamp = _clamped(values, _x_start(values, objective), clip)
    return pack_forms(["x"], [_posterior(values, x_start), x_start], clamp)


def predictions_step(values: Values, objective: str, clip: bool) -> tuple[StepSpec, np.ndarray]:
    """epsilon and x_0."""
    x_start, clamp = _clamped(values, _x_start(values, objective), clip)
    return pack_forms(["x"], [_noise_of(values, x_start), x_start], clamp)


def ancestral_step(values: Values, objective: str) -> tuple[StepSpec, np.ndarray]:
    """x_{t-1} and the clamped x_0; without noise at t = 0."""
    x_start, clamp = _clamped(values, _x_start(values, objective), True)
    scale = np.exp(0.5 * values["posterior_log_variance_clipped"])
    noise = {"z": np.where(np.arange(scale.size) == 0, 0.0, scale)}
    sample = add_forms((np.ones_like(scale), _posterior(values, x_start)), (scale**0, noise))
    return pack_forms(["x"], [sample, x_start], clamp)


def ddim_pairs(timesteps: int, sampling_timesteps: int) -> list[tuple[int, int]]:
    """(time, next time) of every step, downwards; the last next time is -1."""
    times = torch.linspace(-1, timesteps - 1, steps=sampling_timesteps + 1, device="cpu")
    return list(pairwise(times.int().tolist()[::-1]))  # rounded as upstream's


def ddim_step(
    values: Values, objective: str, eta: float, sampling_timesteps: int
) -> tuple[StepSpec, np.ndarray]:
    """x at the next time and the clamped x_0, a row per pair of times (Song et al. 2021, eq. 12).

    The last pair has no noise left: x is x_0.
    """
    pairs = ddim_pairs(values["alphas_cumprod"].size, sampling_timesteps)
    now, following_time = np.array(pairs).T
    at = {name: array[now] for name, array in values.items()}
    alpha = at["alphas_cumprod"]
    following = np.where(following_time < 0, 1.0, values["alphas_cumprod"][following_time])
    sigma = eta * np.sqrt((1 - alpha / following) * (1 - following) / (1 - alpha))
    x_start, clamp = _clamped(at, _x_start(at, objective), True)
    sample = add_forms(
        (np.sqrt(following), x_start),
        (np.sqrt(1 - following - sigma**2), _noise_of(at, x_start)),
        (sigma, {"z": np.ones_like(sigma)}),
    )
    return pack_forms(["x"], [sample, x_start], clamp)


def loss_pass(values: Values, objective: str, elements: int) -> tuple[LossSpec, np.ndarray]:
    """The mean squared error of the model's output, before its weight."""
    a, s = values["sqrt_alphas_cumprod"], values["sqrt_one_minus_alphas_cumprod"]
    names = {"pred_noise": "epsilon", "pred_x0": "sample", "pred_v": "v_prediction"}
    name = names[objective]
    columns = target_columns(name, a, s) | {"error_scale": 1.0 / elements}
    return LossSpec(ERROR, error=target_mask(name)), pack_columns(a.size, columns)
