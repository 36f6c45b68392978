"""GaussianDiffusion: training losses and likelihood on top of the sampler.

They are PyTorch operations over the fused q_sample, posterior and p_mean_variance.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .losses import discretized_gaussian_log_likelihood, mean_flat, normal_kl
from .sampling import Sampling
from .types import LossType, ModelMeanType

__all__ = ["GaussianDiffusion"]


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

    def _vb_terms_bpd(
        self,
        model: Callable[..., Tensor],
        x_start: Tensor,
        x_t: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        model_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """One term of the variational bound in bits per dimension: "output" (B,), "pred_xstart".

        KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), and -log p(x_0 | x_1) at t = 0
        (Ho et al. 2020, eq. 5).
        """
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

    def training_losses(
        self,
        model: Callable[..., Tensor],
        x_start: Tensor,
        t: Tensor,
        model_kwargs: dict[str, Any] | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The loss of every sample: "loss" (B,), and its parts "mse" and "vb" where there are any.

        MSE:  ||target - output||^2 (Ho et al. 2020, eq. 14), plus the bound of the learned variance
        with the mean detached (Nichol & Dhariwal 2021, eq. 16; times T/1000 for RESCALED_MSE).
        KL:   the bound itself (times T for RESCALED_KL).

        x_start is (B, ...), t int64 (B,); noise is torch.randn_like(x_start) unless given.
        """
        self._rows("x_start", x_start, t)
        if noise is None:
            noise = torch.randn_like(x_start)
        x_t = self.q_sample(x_start, t, noise=noise)
        if self.loss_type.is_vb():
            loss = self._vb_terms_bpd(
                model, x_start, x_t, t, clip_denoised=False, model_kwargs=model_kwargs
            )["output"]
            scaled = self.loss_type is LossType.RESCALED_KL
            return {"loss": loss * self.num_timesteps if scaled else loss}
        output = self._called("model", model, x_t, t, model_kwargs)
        terms = {}
        if self._learned:
            output, v = output.split(x_t.shape[1], dim=1)
            frozen = torch.cat([output.detach(), v], dim=1)
            bound = self._vb_terms_bpd(
                lambda *args, **kwargs: frozen, x_start, x_t, t, clip_denoised=False
            )["output"]
            scaled = self.loss_type is LossType.RESCALED_MSE
            terms["vb"] = bound * (self.num_timesteps / 1000.0) if scaled else bound
        if self.model_mean_type is ModelMeanType.PREVIOUS_X:
            target = self.q_posterior_mean_variance(x_start=x_start, x_t=x_t, t=t)[0]
        else:
            target = x_start if self.model_mean_type is ModelMeanType.START_X else noise
        terms["mse"] = mean_flat((target - output) ** 2)
        terms["loss"] = terms["mse"] + terms["vb"] if "vb" in terms else terms["mse"]
        return terms

    def _prior_bpd(self, x_start: Tensor) -> Tensor:
        """KL(q(x_T | x_0) || N(0, I)) in bits per dimension, (B,): L_T of Ho et al. 2020, eq. 5."""
        t = torch.full((x_start.shape[0],), self.num_timesteps - 1, device=x_start.device)
        mean, _, log_variance = self.q_mean_variance(x_start, t)
        return mean_flat(normal_kl(mean, log_variance, 0.0, 0.0)) / math.log(2.0)

    def calc_bpd_loop(
        self,
        model: Callable[..., Tensor],
        x_start: Tensor,
        clip_denoised: bool = True,
        model_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """The whole bound of (B, ...) data in bits per dimension (Ho et al. 2020, eq. 5).

        "total_bpd" and "prior_bpd" are (B,); "vb", "xstart_mse" and "mse" (of epsilon) are (B, T),
        the noisiest t first. Every t draws torch.randn_like(x_start) anew.
        """
        parts: dict[str, list[Tensor]] = {"vb": [], "xstart_mse": [], "mse": []}
        for _, t in self._loop_times(x_start.shape[0], x_start.device):
            noise = torch.randn_like(x_start)
            x_t = self.q_sample(x_start=x_start, t=t, noise=noise)
            with torch.no_grad():
                out = self._vb_terms_bpd(
                    model, x_start, x_t, t, clip_denoised=clip_denoised, model_kwargs=model_kwargs
                )
            eps = self._predict_eps_from_xstart(x_t, t, out["pred_xstart"])
            parts["vb"].append(out["output"])
            parts["xstart_mse"].append(mean_flat((out["pred_xstart"] - x_start) ** 2))
            parts["mse"].append(mean_flat((eps - noise) ** 2))
        terms = {name: torch.stack(values, dim=1) for name, values in parts.items()}
        prior = self._prior_bpd(x_start)
        return {"total_bpd": terms["vb"].sum(dim=1) + prior, "prior_bpd": prior, **terms}
