"""GaussianDiffusion: training losses and likelihood on top of the sampler.

All terms of a loss are one pass over memory (fastdiff/training), besides the draw and q_sample.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastdiff.ops.checks import check_sample
from fastdiff.ops.tables import per_sample
from fastdiff.schedules._values import as_flag
from fastdiff.training.likelihood import bound_terms, prior_term
from fastdiff.training.tables import UPSTREAM_FLOOR, BoundKind, table_of

from .arguments import Kwargs, Model, check_shaped, promoted
from .losses import discretized_gaussian_log_likelihood, mean_flat, normal_kl
from .sampling import Sampling
from .tables import Request
from .types import LossType, ModelMeanType

__all__ = ["GaussianDiffusion"]

_PREDICTION_TYPES = {
    ModelMeanType.EPSILON: "epsilon",
    ModelMeanType.START_X: "sample",
    ModelMeanType.PREVIOUS_X: "previous",
}


class GaussianDiffusion(Sampling):
    """A diffusion chain and the model's part in it, with fused steps.

    Args:
        betas: (T,), each in (0, 1]; or a NoiseSchedule.
        model_mean_type: what the model predicts.
        model_var_type: the variance of p(x_{t-1} | x_t).
        loss_type: what training_losses gives.
        rescale_timesteps: the model sees t * 1000 / T in float32 instead of t.
        seed: int in [0, 2^64) or int64 (B,) with one seed per sample: initial and step noise come
            from fastdiff's contract (streams 0 and 1, as in fastdiff.sample), made inside the
            step. None draws as upstream does: torch.randn, and torch.randn_like at every step,
            also at t = 0 and with eta = 0.

    `betas`, `alphas_cumprod`, `posterior_variance` and the like are read-only float64 NumPy arrays
    (T,). t is an int64 tensor (B,) on x's device and may differ between samples; out of range it
    raises on a CPU, and on a GPU gives NaN for its sample. Results are float64 where an input is
    and float32 otherwise (also for float16 and bfloat16: the tables promote); x_0 that is only
    clamped keeps the dtype of the model's (START_X) or denoised_fn's result. All methods are
    differentiable.

    Raises:
        ValueError, TypeError: naming the argument.
    """

    _fused_bound: ClassVar[bool] = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = cls._vb_terms_bpd is not GaussianDiffusion._vb_terms_bpd
        cls._fused_bound = cls._fused and not own

    # Terms.

    def _kind(self, clip_denoised: bool, **terms: Any) -> BoundKind:
        return BoundKind(
            _PREDICTION_TYPES[self.model_mean_type], self.model_var_type.name.lower(),
            (-1.0, 1.0) if clip_denoised else None, floor=UPSTREAM_FLOOR, **terms,
        )  # fmt: skip

    def _refuse(self, kind: BoundKind, x_start: Tensor) -> None:
        """Refuses what is not defined on this chain, before the model runs."""
        elements = x_start.numel() // x_start.shape[0]
        table_of(self._chain, kind, elements, x_start.device, promoted(x_start))

    def _terms(
        self,
        kind: BoundKind,
        output: Tensor,
        x_start: Tensor,
        x_t: Tensor,
        rows: Tensor,
        noise: Tensor | None = None,
    ) -> Tensor:
        """The terms of `kind`, one pass: (K, B)."""
        given = [output, x_start, x_t, *([] if noise is None else [noise])]
        if promoted(*given) == torch.float64:
            given = [value.double() for value in given]
        output, x_start, x_t, *drawn = given
        return bound_terms(self._chain, kind, output, x_start, x_t, rows, noise=drawn)

    def _vb_terms_bpd(
        self,
        model: Model,
        x_start: Tensor,
        x_t: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        model_kwargs: Kwargs = None,
    ) -> dict[str, Tensor]:
        """One term of the variational bound in bits per dimension: "output" (B,), "pred_xstart".

        KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), and -log p(x_0 | x_1) at t = 0
        (Ho et al. 2020, eq. 5).
        """
        if not self._fused:
            return self._composed_bound(model, x_start, x_t, t, clip_denoised, model_kwargs)
        rows = self._rows("x_t", x_t, t)
        check_shaped("x_start", x_start, "x_t", x_t)
        clip = as_flag("clip_denoised", clip_denoised)
        kind = self._kind(clip)
        self._refuse(kind, x_start)
        output = self._called("model", model, x_t, t, model_kwargs)
        bound = self._terms(kind, output, x_start, x_t, rows)[0]
        request = Request("x_start", self.model_mean_type, self.model_var_type, clip)
        predicted = self._half(output, x_t)
        if request.makes_x_start:
            dtype = self._x_start_dtype(request, output, [])
            predicted = self._pass(request, [x_t], output, rows, x_start_dtype=dtype)[0]
        return {"output": bound, "pred_xstart": predicted}

    def _composed_bound(
        self,
        model: Model,
        x_start: Tensor,
        x_t: Tensor,
        t: Tensor,
        clip_denoised: bool,
        model_kwargs: Kwargs,
    ) -> dict[str, Tensor]:
        """The same through the methods that a subclass has made its own."""
        mean, _, log_variance = self.q_posterior_mean_variance(x_start=x_start, x_t=x_t, t=t)
        out = self.p_mean_variance(
            model, x_t, t, clip_denoised=clip_denoised, model_kwargs=model_kwargs
        )
        kl = mean_flat(normal_kl(mean, log_variance, out["mean"], out["log_variance"]))
        likelihood = discretized_gaussian_log_likelihood(
            x_start, means=out["mean"], log_scales=0.5 * out["log_variance"]
        )
        nats = torch.where(t == 0, -mean_flat(likelihood), kl)
        return {"output": nats / math.log(2.0), "pred_xstart": out["pred_xstart"]}

    # Losses.

    def training_losses(
        self,
        model: Model,
        x_start: Tensor,
        t: Tensor,
        model_kwargs: Kwargs = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The loss of every sample: "loss" (B,), and its parts "mse" and "vb" where there are any.

        MSE:  ||target - output||^2 (Ho et al. 2020, eq. 14), plus the bound of the learned variance
        with the mean detached (Nichol & Dhariwal 2021, eq. 16; times T/1000 for RESCALED_MSE).
        KL:   the bound itself (times T for RESCALED_KL).

        x_start is (B, ...), t int64 (B,); noise is torch.randn_like(x_start) unless given.
        """
        rows = self._rows("x_start", x_start, t)
        if noise is None:
            noise = torch.randn_like(x_start)
        x_t = self.q_sample(x_start, t, noise=noise)
        if self.loss_type.is_vb():
            return {"loss": self._bound_loss(model, x_start, x_t, t, rows, model_kwargs)}
        scaled = self.loss_type is LossType.RESCALED_MSE
        scale = self.num_timesteps / 1000.0 if scaled else 1.0
        # The bound's part that is not the mean's: of the data too, where these need a gradient.
        apart = torch.is_grad_enabled() and x_t.requires_grad
        together = self._learned and self._fused_bound and not apart
        kind = self._kind(
            False, scale=scale, bound=together, target_error=True, frozen=together
        )  # fmt: skip
        self._refuse(kind, x_start)
        output = self._called("model", model, x_t, t, model_kwargs)
        mse, *bounds = self._terms(kind, output, x_start, x_t, rows, noise)
        target = {ModelMeanType.EPSILON: noise, ModelMeanType.START_X: x_start}
        terms = {}
        if together:
            terms["vb"] = bounds[0]
        elif self._learned:
            mean, v = output.split(x_t.shape[1], dim=1)
            frozen = torch.cat([mean.detach(), v], dim=1)
            terms["vb"] = (
                scale
                * self._vb_terms_bpd(
                    lambda *args, **kwargs: frozen, x_start, x_t, t, clip_denoised=False
                )["output"]
            )
        dtype = target.get(self.model_mean_type, mse).dtype
        terms["mse"] = mse.to(torch.promote_types(dtype, output.dtype))
        terms["loss"] = terms["mse"] + terms["vb"] if "vb" in terms else terms["mse"]
        return terms

    def _bound_loss(
        self,
        model: Model,
        x_start: Tensor,
        x_t: Tensor,
        t: Tensor,
        rows: Tensor,
        model_kwargs: Kwargs,
    ) -> Tensor:
        scaled = self.loss_type is LossType.RESCALED_KL
        scale = float(self.num_timesteps) if scaled else 1.0
        if not self._fused_bound:
            bound = self._vb_terms_bpd(
                model, x_start, x_t, t, clip_denoised=False, model_kwargs=model_kwargs
            )["output"]
            return bound * scale
        kind = self._kind(False, scale=scale)
        self._refuse(kind, x_start)
        output = self._called("model", model, x_t, t, model_kwargs)
        return self._terms(kind, output, x_start, x_t, rows)[0]

    # Likelihood.

    def _prior_bpd(self, x_start: Tensor) -> Tensor:
        """KL(q(x_T | x_0) || N(0, I)) in bits per dimension, (B,): L_T of Ho et al. 2020, eq. 5."""
        check_sample("x_start", x_start)
        return prior_term(x_start, self._chain)

    def calc_bpd_loop(
        self,
        model: Model,
        x_start: Tensor,
        clip_denoised: bool = True,
        model_kwargs: Kwargs = None,
    ) -> dict[str, Tensor]:
        """The whole bound of (B, ...) data in bits per dimension (Ho et al. 2020, eq. 5).

        "total_bpd" and "prior_bpd" are (B,); "vb", "xstart_mse" and "mse" (of epsilon) are (B, T),
        the noisiest t first. Every t draws torch.randn_like(x_start) anew.
        """
        check_sample("x_start", x_start)
        kind = self._kind(as_flag("clip_denoised", clip_denoised), x_start_error=True)
        self._refuse(kind, x_start)
        found = []
        for _, t in self._loop_times(x_start.shape[0], x_start.device):
            noise = torch.randn_like(x_start)
            x_t = self.q_sample(x_start=x_start, t=t, noise=noise)
            with torch.no_grad():
                if self._fused_bound:
                    output = self._called("model", model, x_t, t, model_kwargs)
                    terms = self._terms(kind, output, x_start, x_t, t)
                else:
                    out = self._vb_terms_bpd(
                        model, x_start, x_t, t, clip_denoised=clip_denoised,
                        model_kwargs=model_kwargs,
                    )  # fmt: skip
                    error = mean_flat((out["pred_xstart"] - x_start) ** 2)
                    terms = torch.stack([out["output"], error])
            found.append(terms)
        vb, xstart_mse = torch.stack(found, dim=2)
        down = torch.arange(self.num_timesteps - 1, -1, -1, device=x_start.device)
        # x_t holds the noise, so epsilon is wrong by alpha_t / sigma_t times what x_0 is.
        (snr,) = per_sample(self._chain, ("snr",), down, xstart_mse[0])
        mse = xstart_mse * snr
        prior = self._prior_bpd(x_start)
        return {
            "total_bpd": vb.sum(dim=1) + prior, "prior_bpd": prior, "vb": vb,
            "xstart_mse": xstart_mse, "mse": mse,
        }  # fmt: skip
