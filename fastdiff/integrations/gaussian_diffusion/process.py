"""The chain and one reverse transition of it: q, predictions of x_0 and eps, p_mean_variance."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.ops.call import call_step
from fastdiff.ops.checks import resolve_seed
from fastdiff.ops.forward import _q_sample_spec
from fastdiff.ops.held import held
from fastdiff.ops.step import StepSpec
from fastdiff.ops.tables import per_sample
from fastdiff.ops.tables import table_of as forward_table
from fastdiff.schedules import NoiseSchedule
from fastdiff.schedules._values import as_flag

from .arguments import (
    Hook,
    Kwargs,
    Model,
    Seed,
    chain_of,
    check_function,
    check_kwargs,
    check_shaped,
    check_t,
    promoted,
)
from .tables import LEARNED, Request, log_variances, seeded_draws, spec_of, table_of
from .types import LossType, ModelMeanType, ModelVarType, member

__all__ = ["Keys", "Process"]

# What resolve_seed makes of a seed.
Keys = tuple[Tensor | None, int, int]


class Process:
    """The tables and the transitions; see GaussianDiffusion."""

    def __init__(
        self,
        *,
        betas: Any,
        model_mean_type: ModelMeanType,
        model_var_type: ModelVarType,
        loss_type: LossType,
        rescale_timesteps: bool = False,
        seed: Seed = None,
    ) -> None:
        self.model_mean_type = member("model_mean_type", ModelMeanType, model_mean_type)
        self.model_var_type = member("model_var_type", ModelVarType, model_var_type)
        self.loss_type = member("loss_type", LossType, loss_type)
        self.rescale_timesteps = as_flag("rescale_timesteps", rescale_timesteps)
        if seed is not None and not isinstance(seed, Tensor):
            resolve_seed(seed, 0, 1, torch.device("cpu"))  # refuses
        self.seed = seed
        chain = self._chain = chain_of(betas)
        self.num_timesteps = chain.num_timesteps
        self.betas = chain.betas
        self.alphas_cumprod = chain.alphas_cumprod
        self.alphas_cumprod_prev = chain.alphas_cumprod_prev
        self.alphas_cumprod_next = chain.alphas_cumprod_next
        self.sqrt_alphas_cumprod = chain.sqrt_alphas_cumprod
        self.sqrt_one_minus_alphas_cumprod = chain.sqrt_one_minus_alphas_cumprod
        self.log_one_minus_alphas_cumprod = 2.0 * np.log(chain.sigma_t)
        self.log_one_minus_alphas_cumprod.setflags(write=False)
        self.sqrt_recip_alphas_cumprod = chain.sqrt_recip_alphas_cumprod
        self.sqrt_recipm1_alphas_cumprod = chain.sqrt_recipm1_alphas_cumprod
        self.posterior_variance = chain.posterior_variance
        self.posterior_log_variance_clipped = chain.posterior_log_variance_clipped
        self.posterior_mean_coef1 = chain.posterior_mean_coef1
        self.posterior_mean_coef2 = chain.posterior_mean_coef2

    # Arguments.

    @property
    def _learned(self) -> bool:
        return self.model_var_type in LEARNED

    def _rows(self, name: str, x: Tensor, t: object) -> Tensor:
        """t as rows of the tables."""
        return check_t(name, x, t, self.num_timesteps)

    def _request(
        self, kind: str, clip_denoised: object, denoised_fn: Hook, cond_fn: Hook, eta: float = 0.0
    ) -> Request:
        clip = as_flag("clip_denoised", clip_denoised)
        check_function("denoised_fn", denoised_fn)
        check_function("cond_fn", cond_fn)
        return Request(
            kind, self.model_mean_type, self.model_var_type, clip, denoised_fn is not None,
            cond_fn is not None, eta,
        )  # fmt: skip

    # The model.

    def _wrap_model(self, model: Model) -> Model:
        return model

    def _scale_timesteps(self, t: Tensor) -> Tensor:
        """t as the model sees it."""
        return self._model_times(t)

    @property
    def _model_times_of(self) -> tuple[bool, float | None]:
        """Whether t is mapped to the chain's timesteps, and the factor it is scaled by."""
        return False, 1000.0 / self.num_timesteps if self.rescale_timesteps else None

    def _model_times(self, t: Tensor) -> Tensor:
        mapped, factor = self._model_times_of
        if not mapped and factor is None:
            return t
        known: tuple[Process, Tensor] | None = getattr(t, "_fastdiff_times", None)
        if known is not None and known[0] is self:  # t of a loop
            return known[1]
        chain = self._chain
        return held(chain.fingerprint, _times_table, chain, mapped, factor, t.device)[t]

    def _called(
        self, name: str, function: Model, x: Tensor, t: Tensor, model_kwargs: Kwargs
    ) -> Tensor:
        """The result of the model, checked; the shape of x, or twice its channels if learned."""
        check_function(name, function, optional=False)
        check_kwargs(model_kwargs)
        wide = self._learned and name == "model"
        if wide and x.dim() < 2:
            raise ValueError("x must be (B, C, ...): a learned variance doubles the channels")
        kwargs = model_kwargs or {}
        result = self._wrap_model(function)(x, self._scale_timesteps(t), **kwargs)
        shape, like = x.shape, "x"
        if wide:
            shape = torch.Size([x.shape[0], 2 * x.shape[1], *x.shape[2:]])
            like = "x with twice the channels"
        elif name == "cond_fn" and isinstance(result, Tensor) and result.shape != shape:
            with suppress(RuntimeError):
                result = result.expand(shape)
        check_shaped(f"the result of {name}", result, like, x, shape)
        checked: Tensor = result
        return checked

    def _half(self, output: Tensor, x: Tensor) -> Tensor:
        """The prediction without the variance's channels."""
        return output[:, : x.shape[1]] if self._learned else output

    # Passes.

    def _pass(
        self,
        request: Request,
        states: list[Tensor],
        output: Tensor | None,
        rows: Tensor,
        noise: Tensor | None = None,
        keys: Keys | None = None,
        x_start_dtype: torch.dtype | None = None,
    ) -> list[Tensor]:
        """One fused step; its second output may have a dtype of its own."""
        x = states[0]
        given = [*states, *([] if output is None else [output])]
        dtype = promoted(*given)
        spec = spec_of(self._chain, request, x.dtype)
        outputs = [output] if output is not None and (
            spec.learned or spec.reads_model_output
        ) else []  # fmt: skip
        table = table_of(self._chain, request, x.device, dtype)
        out_dtypes = [dtype] * len(spec.outputs)
        if x_start_dtype is not None and dtype == torch.float32:
            out_dtypes[-1] = x_start_dtype
        return self._step(spec, table, states, outputs, rows, noise, keys, out_dtypes)

    def _step(
        self,
        spec: StepSpec,
        table: Tensor,
        states: list[Tensor],
        outputs: list[Tensor],
        rows: Tensor,
        noise: Tensor | None,
        keys: Keys | None,
        out_dtypes: list[torch.dtype],
    ) -> list[Tensor]:
        z = [noise] if spec.draws and noise is not None else []
        draws = seeded_draws(self.num_timesteps, states[0].device) if keys else None
        seeds, low, offset = keys or (None, 0, 0)
        if table.dtype == torch.float64:
            states, outputs, z = ([v.double() for v in group] for group in (states, outputs, z))
        return call_step(
            states, spec, table, rows, model_outputs=outputs, noise=z, keys=seeds, draws=draws,
            counter=(low, offset, 0, 0), out_dtypes=out_dtypes,
        )  # fmt: skip

    def _forward(self, kind: str, masks: int, states: list[Tensor], rows: Tensor) -> Tensor:
        """A pass over a table of ops/tables.py without model output or noise."""
        dtype = promoted(*states)
        like = torch.empty(0, dtype=dtype, device=states[0].device)
        spec = StepSpec(states=len(states), outputs=(masks,))
        table = forward_table(self._chain, kind, like)
        return self._step(spec, table, states, [], rows, None, None, [dtype])[0]

    # q.

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance, log-variance of q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I).

        (Ho et al. 2020, eq. 4.) x_start (B, ...), t (B,); variances are expanded views.
        """
        rows = self._rows("x_start", x_start, t)
        mean = self._forward("mean", 1, [x_start], rows)
        variance, log_variance = per_sample(self._chain, ("variance", "log_variance"), rows, mean)
        return mean, variance, log_variance

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise (Ho et al. 2020, eq. 4).

        x_start (B, ...), t (B,); noise of that shape, torch.randn_like(x_start) by default.
        """
        rows = self._rows("x_start", x_start, t)
        if noise is None:
            noise = torch.randn_like(x_start)
        check_shaped("noise", noise, "x_start", x_start)
        dtype = promoted(x_start, noise)
        like = torch.empty(0, dtype=dtype, device=x_start.device)
        spec, table = _q_sample_spec("x_t", dtype, False), forward_table(self._chain, "x_t", like)
        return self._step(spec, table, [x_start], [], rows, noise, None, [dtype])[0]

    def q_posterior_mean_variance(
        self, x_start: Tensor, x_t: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance, clipped log-variance of q(x_{t-1} | x_t, x_0) (Ho et al. 2020, eq. 7).

        x_start, x_t (B, ...), t (B,); variances are expanded views.
        """
        rows = self._rows("x_t", x_t, t)
        check_shaped("x_start", x_start, "x_t", x_t)
        mean = self._forward("posterior", 3, [x_start, x_t], rows)
        variance, log_variance = per_sample(
            self._chain, ("posterior_variance", "posterior_log_variance_clipped"), rows, mean
        )
        return mean, variance, log_variance

    # Predictions.

    def _predicted(
        self, mean_type: ModelMeanType, x_t: Tensor, t: Tensor, name: str, output: Tensor
    ) -> Tensor:
        rows = self._rows("x_t", x_t, t)
        check_shaped(name, output, "x_t", x_t)
        return self._pass(Request("x_start", mean_type), [x_t], output, rows)[0]

    def _predict_xstart_from_eps(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_0 = (x_t - sqrt(1 - abar_t) eps) / sqrt(abar_t) (Ho et al. 2020, eq. 15)."""
        return self._predicted(ModelMeanType.EPSILON, x_t, t, "eps", eps)

    def _predict_xstart_from_xprev(self, x_t: Tensor, t: Tensor, xprev: Tensor) -> Tensor:
        """x_0 = (x_{t-1} - c2_t x_t) / c1_t (Ho et al. 2020, eq. 7)."""
        return self._predicted(ModelMeanType.PREVIOUS_X, x_t, t, "xprev", xprev)

    def _predict_eps_from_xstart(self, x_t: Tensor, t: Tensor, pred_xstart: Tensor) -> Tensor:
        """eps = (x_t - sqrt(abar_t) x_0) / sqrt(1 - abar_t) (Ho et al. 2020, eq. 4)."""
        rows = self._rows("x_t", x_t, t)
        check_shaped("pred_xstart", pred_xstart, "x_t", x_t)
        return self._pass(Request("eps"), [x_t, pred_xstart], None, rows)[0]

    def _hooked(self, denoised_fn: Hook, output: Tensor, x: Tensor, rows: Tensor) -> list[Tensor]:
        """[what denoised_fn makes of x_0], or [] without it."""
        if denoised_fn is None:
            return []
        if self.model_mean_type is ModelMeanType.START_X:
            x_start = self._half(output, x)
        else:
            request = Request("x_start", self.model_mean_type, self.model_var_type)
            x_start = self._pass(request, [x], output, rows)[0]
        hooked = denoised_fn(x_start)
        check_shaped("the result of denoised_fn", hooked, "x", x)
        return [hooked]

    def _kept(self, output: Tensor, hooked: list[Tensor], x: Tensor) -> Tensor:
        """x_0 that is a tensor already, before any clamp."""
        return hooked[0] if hooked else self._half(output, x)

    def _x_start_dtype(
        self, request: Request, output: Tensor, hooked: list[Tensor]
    ) -> torch.dtype | None:
        """The dtype of an x_0 that is only clamped; None is that of the other results."""
        if not request.makes_x_start or (request.kind == "ddim" and request.guided):
            return None
        if hooked:
            return hooked[0].dtype
        return output.dtype if request.mean is ModelMeanType.START_X else None

    def p_mean_variance(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Hook = None,
        model_kwargs: Kwargs = None,
    ) -> dict[str, Tensor]:
        """p(x_{t-1} | x_t): "mean", "variance", "log_variance", "pred_xstart", all (B, ...).

        x_0 is made from model(x, t, **model_kwargs), given to denoised_fn, clamped to [-1, 1] where
        clip_denoised, and put into the posterior mean (Ho et al. 2020, eq. 7); PREVIOUS_X is the
        mean itself. Fixed variances are expanded views.
        """
        rows = self._rows("x", x, t)
        request = self._request("mean", clip_denoised, denoised_fn, None)
        spec_of(self._chain, request, x.dtype)  # refuses before the model runs
        output = self._called("model", model, x, t, model_kwargs)
        hooked = self._hooked(denoised_fn, output, x, rows)
        made: list[Tensor] = []
        if request.makes_mean or request.makes_x_start:
            made = self._pass(
                request, [x, *hooked], output, rows,
                x_start_dtype=self._x_start_dtype(request, output, hooked),
            )  # fmt: skip
        mean = made[0] if request.makes_mean else self._half(output, x)
        x_start = made[-1] if request.makes_x_start else self._kept(output, hooked, x)
        log_variance, variance = self._variance(x, output, rows)
        return {
            "mean": mean, "variance": variance, "log_variance": log_variance,
            "pred_xstart": x_start,
        }  # fmt: skip

    def _variance(self, x: Tensor, output: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Log-variance and variance (Nichol & Dhariwal 2021, eq. 15, for LEARNED_RANGE)."""
        if self.model_var_type is ModelVarType.LEARNED:
            v = output[:, x.shape[1] :]
            return v, v.exp()
        dtype = promoted(x, output)
        table = held(
            self._chain.fingerprint, _variance_table, self._chain, self.model_var_type, x.device,
            dtype,
        )  # fmt: skip
        inside = (rows >= 0) & (rows < table.shape[0])
        picked = torch.where(inside[:, None], table[torch.where(inside, rows, 0)], torch.nan)
        first, second = (picked[:, k].reshape(-1, *[1] * (x.dim() - 1)) for k in (0, 1))
        if self.model_var_type is not ModelVarType.LEARNED_RANGE:
            return first.expand(x.shape), second.expand(x.shape)
        f = output[:, x.shape[1] :].to(dtype) * 0.5 + 0.5
        log_variance = f * second + (1.0 - f) * first
        return log_variance, log_variance.exp()

    # Conditioning.

    def condition_mean(
        self,
        cond_fn: Model,
        p_mean_var: dict[str, Tensor],
        x: Tensor,
        t: Tensor,
        model_kwargs: Kwargs = None,
    ) -> Tensor:
        """mean + variance g, where g = cond_fn(x, t, **model_kwargs) is grad log p(y | x).

        (Dhariwal & Nichol 2021, algorithm 1.) At least float32; float64 stays float64.
        """
        self._rows("x", x, t)
        gradient = self._called("cond_fn", cond_fn, x, t, model_kwargs)
        mean, variance = p_mean_var["mean"], p_mean_var["variance"]
        dtype = promoted(mean, variance, gradient)
        return mean.to(dtype) + variance.to(dtype) * gradient.to(dtype)

    def condition_score(
        self,
        cond_fn: Model,
        p_mean_var: dict[str, Tensor],
        x: Tensor,
        t: Tensor,
        model_kwargs: Kwargs = None,
    ) -> dict[str, Tensor]:
        """p_mean_var with the score conditioned: eps - sqrt(1 - abar_t) cond_fn(x, t).

        (Dhariwal & Nichol 2021, algorithm 2.) "pred_xstart" and "mean" follow from that eps; x_0 is
        not clamped again.
        """
        rows = self._rows("x", x, t)
        before = p_mean_var["pred_xstart"]
        check_shaped('p_mean_var["pred_xstart"]', before, "x", x)
        gradient = self._called("cond_fn", cond_fn, x, t, model_kwargs)
        request = Request("score", hooked=True, guided=True)
        x_start, mean = self._pass(request, [x, before, gradient], None, rows)
        return p_mean_var | {"pred_xstart": x_start, "mean": mean}


def _times_table(
    chain: NoiseSchedule, mapped: bool, factor: float | None, device: torch.device
) -> Tensor:
    """What the model sees at every t: int64, or float32 where it is scaled, as upstream rounds."""
    times = chain.timesteps if mapped else np.arange(chain.num_timesteps)
    table = torch.from_numpy(np.array(times))
    return (table if factor is None else table.float() * factor).to(device)


def _variance_table(
    chain: NoiseSchedule, variance: ModelVarType, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """(T, 2): log-variance and variance, or the log bounds of LEARNED_RANGE, min and max."""
    if variance is ModelVarType.LEARNED_RANGE:
        columns = (chain.posterior_log_variance_clipped, np.log(chain.betas))
    else:
        columns = log_variances(chain, variance)
    return torch.from_numpy(np.stack(columns, axis=1)).to(device=device, dtype=dtype)
