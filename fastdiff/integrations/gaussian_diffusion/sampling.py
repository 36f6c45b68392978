"""Ancestral and DDIM sampling: single steps at any t, and the loops."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastdiff.ops.checks import check_sample, check_shape, resolve_seed
from fastdiff.ops.draw import randn
from fastdiff.progress import track
from fastdiff.schedules._values import as_float

from .arguments import Hook, Kwargs, Model, Seed, check_function
from .process import Keys, Process
from .tables import Request, spec_of

__all__ = ["Sampling"]

Result = dict[str, Tensor]

# What a fused step replaces: a subclass with its own is stepped through it.
_PARTS = (
    "p_mean_variance", "condition_mean", "condition_score", "q_posterior_mean_variance",
    "_predict_xstart_from_eps", "_predict_xstart_from_xprev", "_predict_eps_from_xstart",
)  # fmt: skip


class Sampling(Process):
    """Process with samplers; see GaussianDiffusion."""

    _fused: ClassVar[bool] = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._fused = all(getattr(cls, name) is getattr(Process, name) for name in _PARTS)

    # One step.

    def _drawn(self, x: Tensor, keys: Keys | None) -> Tensor | None:
        """Upstream's draw; None where the kernel makes the noise."""
        return torch.randn_like(x) if keys is None else None

    def _sampled(
        self,
        request: Request,
        model: Model,
        x: Tensor,
        t: Tensor,
        denoised_fn: Hook,
        cond_fn: Hook,
        model_kwargs: Kwargs,
        seed: Seed,
    ) -> Result:
        rows = self._rows("x", x, t)
        seed = self.seed if seed is None else seed
        keys = None if seed is None else resolve_seed(seed, 0, x.shape[0], x.device)
        spec_of(self._chain, request, x.dtype)  # refuses before the model runs
        if not self._fused:
            return self._composed(
                request, model, x, t, rows, denoised_fn, cond_fn, model_kwargs, keys
            )
        output = self._called("model", model, x, t, model_kwargs)
        hooked = self._hooked(denoised_fn, output, x, rows)
        # Upstream's order of draws and of what cond_fn may draw.
        noise = self._drawn(x, keys) if request.kind == "p" else None
        gradient: list[Tensor] = []
        if cond_fn is not None:
            gradient = [self._called("cond_fn", cond_fn, x, t, model_kwargs)]
            if request.kind == "p" and request.learned:
                shift = Request("shift", variance=request.variance)
                gradient = self._pass(shift, gradient, output, rows, noise=gradient[0])
        if request.kind == "ddim":
            noise = self._drawn(x, keys)
        made = self._pass(
            request, [x, *hooked, *gradient], output, rows, noise, keys,
            self._x_start_dtype(request, output, hooked),
        )  # fmt: skip
        x_start = made[1] if request.makes_x_start else self._kept(output, hooked, x)
        return {"sample": made[0], "pred_xstart": x_start}

    def _composed(
        self,
        request: Request,
        model: Model,
        x: Tensor,
        t: Tensor,
        rows: Tensor,
        denoised_fn: Hook,
        cond_fn: Hook,
        model_kwargs: Kwargs,
        keys: Keys | None,
    ) -> Result:
        """The same through the methods that a subclass has made its own."""
        out = self.p_mean_variance(
            model, x, t, clip_denoised=request.clip, denoised_fn=denoised_fn,
            model_kwargs=model_kwargs,
        )  # fmt: skip
        if request.kind == "p":
            noise = self._drawn(x, keys)
            if noise is None:
                noise = self._pass(Request("z"), [x], None, rows, keys=keys)[0]
            mean = out["mean"]
            if cond_fn is not None:
                mean = self.condition_mean(cond_fn, out, x, t, model_kwargs=model_kwargs)
            keep = (t != 0).reshape(-1, *[1] * (x.dim() - 1))
            sample = mean + keep * torch.exp(0.5 * out["log_variance"]) * noise
            return {"sample": sample, "pred_xstart": out["pred_xstart"]}
        if cond_fn is not None:
            out = self.condition_score(cond_fn, out, x, t, model_kwargs=model_kwargs)
        noise = self._drawn(x, keys) if request.kind == "ddim" else None
        plain = Request(request.kind, hooked=True, eta=request.eta)
        made = self._pass(plain, [x, out["pred_xstart"]], None, rows, noise, keys)
        return {"sample": made[0], "pred_xstart": out["pred_xstart"]}

    def p_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Hook = None,
        cond_fn: Hook = None,
        model_kwargs: Kwargs = None,
        *,
        seed: Seed = None,
    ) -> Result:
        """x_{t-1} ~ p(x_{t-1} | x_t) as "sample", and "pred_xstart" (Ho et al. 2020, algorithm 2).

        cond_fn shifts the mean (Dhariwal & Nichol 2021, algorithm 1). Without hooks one pass over
        memory and the draw; denoised_fn and, for a learned variance, cond_fn add one.

        Args:
            model: model(x, t, **model_kwargs) of x's shape, or twice the channels if learned.
            x: (B, ...); t: int64 (B,).
            clip_denoised: clamp x_0 to [-1, 1].
            denoised_fn: x_0 to x_0, before the clamp.
            cond_fn: cond_fn(x, t, **model_kwargs), the gradient of log p(y | x).
            seed: see the class; that of the constructor by default.
        """
        request = self._request("p", clip_denoised, denoised_fn, cond_fn)
        return self._sampled(request, model, x, t, denoised_fn, cond_fn, model_kwargs, seed)

    def ddim_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Hook = None,
        cond_fn: Hook = None,
        model_kwargs: Kwargs = None,
        eta: float = 0.0,
        *,
        seed: Seed = None,
    ) -> Result:
        """x_{t-1} of DDIM as "sample", and "pred_xstart" (Song et al. 2021, eqs. 12 and 16).

        epsilon is derived from the clamped x_0; cond_fn conditions the score (Dhariwal & Nichol
        2021, algorithm 2). Arguments as in p_sample; eta >= 0.
        """
        eta = as_float("eta", eta)
        if eta < 0:
            raise ValueError(f"eta must be >= 0, not {eta}")
        request = self._request("ddim", clip_denoised, denoised_fn, cond_fn, eta)
        return self._sampled(request, model, x, t, denoised_fn, cond_fn, model_kwargs, seed)

    def ddim_reverse_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Hook = None,
        model_kwargs: Kwargs = None,
        eta: float = 0.0,
    ) -> Result:
        """x_{t+1} along the DDIM ODE as "sample", and "pred_xstart" (Song et al. 2021, eq. 14).

        Arguments as in p_sample; eta must be 0.
        """
        if as_float("eta", eta) != 0.0:
            raise ValueError(f"eta must be 0: the reverse ODE is deterministic, not {eta}")
        request = self._request("reverse", clip_denoised, denoised_fn, None)
        return self._sampled(request, model, x, t, denoised_fn, None, model_kwargs, None)

    # Loops.

    def _loop_times(self, batch: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
        """(t, t as int64 (batch,)), the noisiest first; views of tables made here."""
        padded = batch + batch % 2  # Triton compiles again for another alignment
        count = self.num_timesteps
        every = torch.arange(count, device=device)[:, None].expand(count, padded).contiguous()
        seen = self._model_times(every)
        for i in reversed(range(count)):
            t = every[i, :batch]
            # Saves the gather at every step; the owner, because models may hold other diffusions.
            t._fastdiff_times = (self, seen[i, :batch])  # type: ignore[attr-defined]
            yield i, t

    def _loop(
        self,
        step: Callable[..., Result],
        model: Model,
        shape: tuple[int, ...] | list[int],
        noise: Tensor | None,
        device: torch.device | str | None,
        progress: bool,
        seed: Seed,
        options: dict[str, Any],
    ) -> Iterator[Result]:
        """Checks, then the generator of the steps' results."""
        check_function("model", model, optional=False)
        sizes = check_shape(shape)
        if noise is not None:
            check_sample("noise", noise)
            if noise.shape != sizes:
                raise ValueError(f"noise must have shape {sizes}, not {tuple(noise.shape)}")
        if device is None:
            parameter = next(model.parameters(), None) if hasattr(model, "parameters") else None
            if noise is None and parameter is None:
                raise ValueError("device must be given: model has no parameters to take it from")
            device = (parameter if noise is None else noise).device  # type: ignore[union-attr]
        place = torch.device(device)
        if seed is not None:
            resolve_seed(seed, 0, sizes[0], place)
            options = options | {"seed": seed}
        return self._steps(step, model, sizes, noise, place, progress, seed, options)

    def _steps(
        self,
        step: Callable[..., Result],
        model: Model,
        shape: tuple[int, ...],
        noise: Tensor | None,
        device: torch.device,
        progress: bool,
        seed: Seed,
        options: dict[str, Any],
    ) -> Iterator[Result]:
        seed = self.seed if seed is None else seed
        if noise is not None:
            x = noise
        elif seed is not None:
            x = randn(shape, seed, device=device)
        else:
            x = torch.randn(*shape, device=device)
        times = self._loop_times(shape[0], device)
        for _ in track(range(self.num_timesteps), "sampling", enabled=progress):
            _, t = next(times)
            with torch.no_grad():
                out = step(model, x, t, **options)
            yield out
            x = out["sample"]

    def p_sample_loop(
        self,
        model: Model,
        shape: tuple[int, ...] | list[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Hook = None,
        cond_fn: Hook = None,
        model_kwargs: Kwargs = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        *,
        seed: Seed = None,
    ) -> Tensor:
        """A sample of the model: p_sample from t = T - 1 to 0 (Ho et al. 2020, algorithm 2).

        Args:
            shape: (B, ...).
            noise: x_T; torch.randn(*shape, device=device) by default.
            device: by default that of noise, else of the model's parameters.
            progress: show a progress bar on stderr.
            The others as in p_sample; the model runs under torch.no_grad.
        """
        out: Result = {}
        for out in self.p_sample_loop_progressive(  # noqa: B007
            model, shape, noise, clip_denoised, denoised_fn, cond_fn, model_kwargs, device,
            progress, **_given(seed),
        ):  # fmt: skip
            pass
        return out["sample"]

    def p_sample_loop_progressive(
        self,
        model: Model,
        shape: tuple[int, ...] | list[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Hook = None,
        cond_fn: Hook = None,
        model_kwargs: Kwargs = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        *,
        seed: Seed = None,
    ) -> Iterator[Result]:
        """p_sample_loop that yields the result of every p_sample."""
        options = {
            "clip_denoised": clip_denoised, "denoised_fn": denoised_fn, "cond_fn": cond_fn,
            "model_kwargs": model_kwargs,
        }  # fmt: skip
        return self._loop(self.p_sample, model, shape, noise, device, progress, seed, options)

    def ddim_sample_loop(
        self,
        model: Model,
        shape: tuple[int, ...] | list[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Hook = None,
        cond_fn: Hook = None,
        model_kwargs: Kwargs = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
        *,
        seed: Seed = None,
    ) -> Tensor:
        """A sample of the model by DDIM (Song et al. 2021); arguments as in p_sample_loop."""
        out: Result = {}
        for out in self.ddim_sample_loop_progressive(  # noqa: B007
            model, shape, noise, clip_denoised, denoised_fn, cond_fn, model_kwargs, device,
            progress, eta, **_given(seed),
        ):  # fmt: skip
            pass
        return out["sample"]

    def ddim_sample_loop_progressive(
        self,
        model: Model,
        shape: tuple[int, ...] | list[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Hook = None,
        cond_fn: Hook = None,
        model_kwargs: Kwargs = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
        *,
        seed: Seed = None,
    ) -> Iterator[Result]:
        """ddim_sample_loop that yields the result of every ddim_sample."""
        options = {
            "clip_denoised": clip_denoised, "denoised_fn": denoised_fn, "cond_fn": cond_fn,
            "model_kwargs": model_kwargs, "eta": eta,
        }  # fmt: skip
        return self._loop(self.ddim_sample, model, shape, noise, device, progress, seed, options)


def _given(seed: Seed) -> dict[str, Any]:
    """The seed where there is one: methods of subclasses may not know the argument."""
    return {} if seed is None else {"seed": seed}
