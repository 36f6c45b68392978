"""The fused methods of GaussianDiffusion; each says when upstream's own code must serve."""

from __future__ import annotations

import sys
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.integrations.gaussian_diffusion.arguments import check_shaped, check_t
from fastdiff.ops.call import call_step, compute_dtype
from fastdiff.ops.call_loss import call_loss
from fastdiff.ops.checks import FLOATING, index_views
from fastdiff.ops.held import held

from .tables import (
    Make,
    ancestral_step,
    ddim_pairs,
    ddim_step,
    loss_pass,
    mean_step,
    pair_step,
    predictions_step,
    tables_of,
)

__all__ = ["MODULE", "Fused"]

# Where upstream defines the class.
MODULE = "denoising_diffusion_pytorch.denoising_diffusion_pytorch"


def _promoted(module: nn.Module, *tensors: Tensor) -> torch.dtype:
    """What upstream's (B, 1, ..) coefficients and these tensors promote to."""
    coefficients = module._buffers["alphas_cumprod"]
    assert coefficients is not None
    dtypes = {coefficients.dtype, *(v.dtype for v in tensors)}
    return reduce(torch.promote_types, dtypes)


def _fusable(module: Any, t: Any, *tensors: Any) -> bool:
    """Plain batches of one shape on the module's device; upstream's code broadcasts the others."""
    first = tensors[0]
    return (
        isinstance(t, Tensor) and t.dtype == torch.int64 and isinstance(first, Tensor)
        and first.dim() > 0 and first.shape[0] > 0 and t.shape == first.shape[:1]
        and all(
            isinstance(v, Tensor) and v.shape == first.shape and v.dtype in FLOATING
            and v.device == module.device and v.layout == torch.strided
            for v in tensors
        )
    )  # fmt: skip


def _launch(
    module: Any,
    make: Make,
    key: tuple[Any, ...],
    rows: Tensor,
    states: list[Tensor],
    output: Tensor | None = None,
    noise: Tensor | None = None,
    x_start_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """One pass; x_start_dtype is the second output's where it is not what all promote to."""
    result = _promoted(module, *states, *([] if output is None else [output]))
    compute = compute_dtype(result)
    spec, table = tables_of(module).step(make, *key, dtype=compute)
    outputs = [] if output is None else [output]
    draws = [] if noise is None or not spec.draws else [noise]
    if compute == torch.float64:
        states, outputs, draws = ([v.double() for v in g] for g in (states, outputs, draws))
        x_start_dtype = None
    dtypes = [result] * len(spec.outputs)
    if x_start_dtype is not None:
        dtypes[-1] = x_start_dtype
    return call_step(
        states, spec, table, rows, model_outputs=outputs, noise=draws, out_dtypes=dtypes
    )


def _pair(module: Any, kind: str, t: Tensor, x: Tensor, h: Tensor) -> Tensor:
    rows = check_t("x", x, t, module.num_timesteps)
    return _launch(module, pair_step, (kind,), rows, [x, h])[0]


def _extract(values: Tensor, t: Tensor, x: Tensor) -> Tensor:
    return values.gather(-1, t).reshape(-1, *[1] * (x.dim() - 1))


def _called(module: Any, x: Tensor, t: Tensor, x_self_cond: Tensor | None) -> Tensor:
    output = module.model(x, t, x_self_cond)
    check_shaped("the result of model", output, "x", x)
    checked: Tensor = output
    return checked


def _kept_dtype(module: Any, output: Tensor) -> torch.dtype | None:
    """A predicted x_0 is only clamped: it keeps its dtype."""
    return output.dtype if module.objective == "pred_x0" else None


def _error(module: Any, output: Tensor, x_start: Tensor, noise: Tensor, rows: Tensor) -> Tensor:
    """The mean squared error of a model's output, (B,), in one pass."""
    targets = {"pred_noise": [noise], "pred_x0": [x_start], "pred_v": [x_start, noise]}
    result = _promoted(module, output, *targets[module.objective])
    compute = compute_dtype(result)
    elements = x_start.numel() // x_start.shape[0]
    spec, table = tables_of(module).step(loss_pass, module.objective, elements, dtype=compute)
    if compute == torch.float64:
        output, x_start, noise = output.double(), x_start.double(), noise.double()
    loss = call_loss(spec, [output], x_start, None, table, rows, noise=[noise])
    return loss[0].to(result)


class Fused:
    """The methods, copied into the subclass one by one; `self` is upstream's GaussianDiffusion."""

    def predict_start_from_noise(self: Any, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        if not _fusable(self, t, x_t, noise):
            return self._upstream.predict_start_from_noise(self, x_t, t, noise)
        return _pair(self, "predict_start_from_noise", t, x_t, noise)

    def predict_noise_from_start(self: Any, x_t: Tensor, t: Tensor, x0: Tensor) -> Tensor:
        if not _fusable(self, t, x_t, x0):
            return self._upstream.predict_noise_from_start(self, x_t, t, x0)
        return _pair(self, "predict_noise_from_start", t, x_t, x0)

    def predict_v(self: Any, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        if not _fusable(self, t, x_start, noise):
            return self._upstream.predict_v(self, x_start, t, noise)
        return _pair(self, "predict_v", t, x_start, noise)

    def predict_start_from_v(self: Any, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        if not _fusable(self, t, x_t, v):
            return self._upstream.predict_start_from_v(self, x_t, t, v)
        return _pair(self, "predict_start_from_v", t, x_t, v)

    def q_posterior(
        self: Any, x_start: Tensor, x_t: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        if not _fusable(self, t, x_t, x_start):
            return self._upstream.q_posterior(self, x_start, x_t, t)
        mean = _pair(self, "q_posterior", t, x_t, x_start)
        return (
            mean,
            _extract(self.posterior_variance, t, x_t),
            _extract(self.posterior_log_variance_clipped, t, x_t),
        )

    def q_sample(self: Any, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        # Immiscible noise is assigned on the host, which costs far more than the rest.
        if self.immiscible or not _fusable(self, t, x_start):
            return self._upstream.q_sample(self, x_start, t, noise)
        if noise is None:
            noise = torch.randn_like(x_start)
        elif not _fusable(self, t, x_start, noise):
            return self._upstream.q_sample(self, x_start, t, noise)
        return _pair(self, "q_sample", t, x_start, noise)

    def p_losses(
        self: Any,
        x_start: Tensor,
        t: Tensor,
        noise: Tensor | None = None,
        offset_noise_strength: float | None = None,
        loss_reduction: str = "mean",
    ) -> Tensor:
        given = [x_start] if noise is None else [x_start, noise]
        if not _fusable(self, t, *given) or x_start.dim() != 4 or x_start.numel() == 0:
            return self._upstream.p_losses(
                self, x_start, t, noise, offset_noise_strength, loss_reduction
            )
        rows = check_t("x_start", x_start, t, self.num_timesteps)
        if noise is None:
            noise = torch.randn_like(x_start)
        strength = offset_noise_strength
        strength = self.offset_noise_strength if strength is None else strength
        if strength > 0.0:
            offset = torch.randn(x_start.shape[:2], device=self.device)
            noise += strength * offset[:, :, None, None]
        x = self.q_sample(x_start=x_start, t=t, noise=noise)
        x_self_cond = None
        if self.self_condition and sys.modules[MODULE].random() < 0.5:
            with torch.no_grad():
                x_self_cond = self.model_predictions(x, t).pred_x_start
        output = _called(self, x, t, x_self_cond)
        loss = _error(self, output, x_start, noise, rows)
        loss = loss * _extract(self.loss_weight, t, loss)
        return loss if loss_reduction == "none" else loss.mean()

    def model_predictions(
        self: Any,
        x: Tensor,
        t: Tensor,
        x_self_cond: Tensor | None = None,
        clip_x_start: bool = False,
        rederive_pred_noise: bool = False,
    ) -> Any:
        if not _fusable(self, t, x):
            return self._upstream.model_predictions(
                self, x, t, x_self_cond, clip_x_start, rederive_pred_noise
            )
        rows = check_t("x", x, t, self.num_timesteps)
        output = _called(self, x, t, x_self_cond)
        clip = bool(clip_x_start)
        noise, x_start = _launch(
            self, predictions_step, (self.objective, clip), rows, [x], output,
            x_start_dtype=_kept_dtype(self, output),
        )  # fmt: skip
        if self.objective == "pred_noise" and not (clip and rederive_pred_noise):
            noise = output
        return sys.modules[MODULE].ModelPrediction(noise, x_start)

    def p_mean_variance(
        self: Any,
        x: Tensor,
        t: Tensor,
        x_self_cond: Tensor | None = None,
        clip_denoised: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if not _fusable(self, t, x):
            return self._upstream.p_mean_variance(self, x, t, x_self_cond, clip_denoised)
        rows = check_t("x", x, t, self.num_timesteps)
        output = _called(self, x, t, x_self_cond)
        mean, x_start = _launch(
            self, mean_step, (self.objective, bool(clip_denoised)), rows, [x], output,
            x_start_dtype=_kept_dtype(self, output),
        )  # fmt: skip
        return (
            mean,
            _extract(self.posterior_variance, t, x),
            _extract(self.posterior_log_variance_clipped, t, x),
            x_start,
        )

    @torch.inference_mode()
    def p_sample(
        self: Any, x: Tensor, t: int, x_self_cond: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if not isinstance(x, Tensor) or x.dim() == 0 or not isinstance(t, int):
            return self._upstream.p_sample(self, x, t, x_self_cond)
        if not 0 <= t < self.num_timesteps:
            raise ValueError(f"t must be in [0, {self.num_timesteps}), not {t}")
        times = torch.full((x.shape[0],), t, device=self.device, dtype=torch.long)
        if not _fusable(self, times, x):
            return self._upstream.p_sample(self, x, t, x_self_cond)
        output = _called(self, x, times, x_self_cond)
        # At t = 0 upstream draws nothing, and the step's coefficient is 0.
        noise = torch.randn_like(x) if t > 0 else x
        sample, x_start = _launch(
            self, ancestral_step, (self.objective,), times, [x], output, noise,
            _kept_dtype(self, output),
        )  # fmt: skip
        return sample, x_start

    @torch.inference_mode()
    def ddim_sample(
        self: Any, shape: tuple[int, ...], return_all_timesteps: bool = False
    ) -> Tensor:
        batch, device = shape[0], self.device
        pairs = ddim_pairs(self.num_timesteps, self.sampling_timesteps)
        key = (self.objective, float(self.ddim_sampling_eta), self.sampling_timesteps)
        x = torch.randn(shape, device=device)
        kept, x_start = [x], None
        every = torch.tensor([time for time, _ in pairs])[:, None].repeat(1, batch).to(device)
        rows = held("", index_views, len(pairs), device)
        progress = sys.modules[MODULE].tqdm
        for k, (_, following) in enumerate(progress(pairs, desc="sampling loop time step")):
            output = _called(self, x, every[k], x_start if self.self_condition else None)
            # Upstream draws with eta = 0 too, but not at the last step.
            noise = torch.randn_like(x) if following >= 0 else x
            sample, x_start = _launch(
                self, ddim_step, key, rows[2 * k : 2 * k + 1], [x], output, noise,
                _kept_dtype(self, output),
            )  # fmt: skip
            x = sample if following >= 0 else x_start
            if return_all_timesteps:
                kept.append(x)
        result = torch.stack(kept, dim=1) if return_all_timesteps else x
        unnormalized: Tensor = self.unnormalize(result)
        return unnormalized
