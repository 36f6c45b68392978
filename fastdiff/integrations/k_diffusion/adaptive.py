"""DPM-Solver-12 and 23: steps whose size depends on the data (Lu et al. 2022, appendix C)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdiff.noise import STREAM_STEP
from fastdiff.ops.call import call_step, compute_dtype, pack_table
from fastdiff.ops.checks import check_sample
from fastdiff.ops.draw import randn
from fastdiff.ops.step import StepSpec
from fastdiff.schedules._values import as_float
from fastdiff.solvers.dpmpp_sigma import phi_2
from fastdiff.solvers.edm import ancestral_options
from fastdiff.solvers.sigma_space import ancestral

from .driver import Progress
from .network import Network, network_of
from .noise import default_noise_sampler
from .sampling import Arguments, Callback, Sampler, Seed, _check_noise

__all__ = ["sample_dpm_adaptive"]

Form = NDArray[np.float64]  # over x and the model outputs of one trial step


def sample_dpm_adaptive(
    model: Any, x: Tensor, sigma_min: float, sigma_max: float, extra_args: Arguments = None,
    callback: Callback = None, disable: bool | None = None, order: int = 3, rtol: float = 0.05,
    atol: float = 0.0078, h_init: float = 0.05, pcoeff: float = 0.0, icoeff: float = 1.0,
    dcoeff: float = 0.0, accept_safety: float = 0.81, eta: float = 0.0, s_noise: float = 1.0,
    noise_sampler: Sampler = None, return_info: bool = False, *, seed: Seed = None,
) -> Any:  # fmt: skip
    """Adaptive DPM-Solver-12 (order 2) or 23 (order 3) from sigma_max to sigma_min.

    A trial step of size h in t = -log sigma gives x_low and x_high (Lu et al. 2022, algorithms 1 to
    3) and the error

        E = |(x_low - x_high) / max(atol, rtol max(|x_low|, |x_prev|))| / sqrt(size of x)

    over the whole batch; a PID controller takes or refuses it and proposes the next h. One pass
    over memory a model call, one read of E a trial.

    Args:
        model .. disable, noise_sampler, seed: as in sampling.py; the callback is called once a
            trial, with upstream's further keys. A seed's noise: step = the accepted step's number.
        return_info: also return {"steps", "nfe", "n_accept", "n_reject"}.

    Raises:
        RuntimeError: E is not a number, where upstream would try the same step for ever.
    """
    low, high = as_float("sigma_min", sigma_min), as_float("sigma_max", sigma_max)
    if low <= 0 or high <= 0:
        raise ValueError("sigma_min and sigma_max must be > 0")
    if order not in (2, 3):
        raise ValueError(f"order must be 2 or 3, not {order!r}")
    options = ancestral_options(eta, s_noise)
    eta, s_noise = options["eta"], options["s_noise"]
    if high <= low and eta:
        raise ValueError("eta must be 0 when sigma_max <= sigma_min (sampling in reverse)")
    _check_noise(noise_sampler, seed)
    check_sample("x", x)
    network = network_of(model)
    if noise_sampler is None and seed is None:
        noise_sampler = default_noise_sampler(x)

    t, t_end = -math.log(high), -math.log(low)
    forward = t_end > t
    h = abs(as_float("h_init", h_init)) * (1 if forward else -1)
    controller = StepSizeController(h, pcoeff, icoeff, dcoeff, 1.5 if eta else order, accept_safety)
    info: dict[str, Any] = {"steps": 0, "nfe": 0, "n_accept": 0, "n_reject": 0}
    x_prev, original = x, x

    with torch.no_grad(), Progress(None, disable) as progress:
        while (t < t_end - 1e-5) if forward else (t > t_end + 1e-5):
            bound = min if forward else max
            t_next = bound(t_end, t + controller.h)
            sigma, sigma_next = math.exp(-t), math.exp(-t_next) if t_next != t_end else low
            sigma_down, sigma_up = sigma_next, 0.0
            if eta:
                sigma_down = max(low, ancestral(sigma, sigma_next, eta)[0])
                sigma_up = math.sqrt((sigma_next - sigma_down) * (sigma_next + sigma_down))
            trial = Trial(network, x, original, extra_args or {}, progress)
            x_low, x_high = trial.run(order, sigma, sigma_down, callback is not None)
            delta = torch.maximum(x_low.abs(), x_prev.abs()).mul_(rtol).clamp_(min=atol)
            error = torch.linalg.vector_norm((x_low - x_high).div_(delta)) / x.numel() ** 0.5
            value = float(error)
            if math.isnan(value):
                raise RuntimeError(f"the error from sigma {sigma} to {sigma_down} is not a number")
            if controller.accepts(value):
                x_prev, x = x_low, x_high
                if seed is not None:
                    if sigma_up:
                        z = randn(
                            x.shape, seed, step=info["n_accept"], stream=STREAM_STEP, dtype=x.dtype,
                            device=x.device,
                        )  # fmt: skip
                        x = x + (sigma_up * s_noise) * z
                else:
                    assert noise_sampler is not None
                    z = noise_sampler(_level(sigma), _level(sigma_next))
                    if sigma_up:
                        x = x + (sigma_up * s_noise) * z
                t = t_next
                info["n_accept"] += 1
            else:
                info["n_reject"] += 1
            info["nfe"] += order
            info["steps"] += 1
            if callback is not None:
                at, level = _level(t), _level(math.exp(-t))
                callback(
                    {
                        "sigma": level, "sigma_hat": level, "x": x, "i": info["steps"] - 1,
                        "t": at, "t_up": at, "denoised": trial.first_denoised, "error": error,
                        "h": controller.h, **info,
                    }
                )  # fmt: skip
    return (x, info) if return_info else x


def _level(value: float) -> Tensor:
    return torch.tensor(value)


class StepSizeController:
    """Proposes step sizes from errors: a PID controller on log(1 / error) (Soederlind 2003)."""

    def __init__(
        self, h: float, pcoeff: float, icoeff: float, dcoeff: float, order: float, safety: float
    ) -> None:
        self.h, self._safety = h, safety
        self._powers = (
            (pcoeff + icoeff + dcoeff) / order, -(pcoeff + 2 * dcoeff) / order, dcoeff / order
        )  # fmt: skip
        self._past: tuple[float, float] | None = None

    def accepts(self, error: float) -> bool:
        """Whether the step with this error stands; sets the next h."""
        inverse = 1 / (error + 1e-8)
        before, earlier = self._past or (inverse, inverse)
        b_1, b_2, b_3 = self._powers
        factor = 1 + math.atan(inverse**b_1 * before**b_2 * earlier**b_3 - 1)
        accepted = factor >= self._safety
        self._past = (inverse, before) if accepted else (before, earlier)
        self.h *= factor
        return accepted


class Trial:
    """One trial step: every tensor is a form over x and the outputs so far, made in one pass."""

    def __init__(
        self, network: Network, x: Tensor, original: Tensor, extra_args: Any, progress: Progress
    ) -> None:
        self._network, self._extra_args, self._progress = network, extra_args, progress
        self._x, self._original = x, original
        self._kept: dict[int, Tensor] = {0: x}  # by column: x and copies of outputs
        self.first_denoised: Tensor | None = None

    def run(self, order: int, sigma: float, end: float, preview: bool) -> tuple[Tensor, Tensor]:
        """(x_low, x_high) at sigma `end`."""
        h = math.log1p((sigma - end) / end)
        x = _unit(0)
        r_1 = 1 / 2 if order == 2 else 1 / 3
        s_1, s_2 = sigma * math.exp(-r_1 * h), sigma * math.exp(-h * 2 / 3)

        c_in = self._network.denoiser.scalings(sigma)[2]
        seen = self._x * c_in if self._network.wrapped else self._x
        output = self._ask(seen, sigma)
        eps = self._eps(x, sigma, 1)
        first = x - (sigma - end) * eps
        u_1 = x - (sigma - s_1) * eps
        second_order_1 = (sigma - end) / (2 * r_1)
        forms = [self._input(u_1, s_1)]
        if order == 2:
            forms.append(first)
        if preview and self._network.wrapped:
            forms.append(x - sigma * eps)
        seen, *made = self._make(1, output, forms, keep=True)
        if preview:
            self.first_denoised = made[-1] if self._network.wrapped else output

        output = self._ask(seen, s_1)
        eps_1 = self._eps(u_1, s_1, 2)
        second = first - second_order_1 * (eps_1 - eps)
        if order == 2:
            (x_high,) = self._make(2, output, [second])
            return made[0], x_high
        r_2 = 2 / 3
        u_2 = x - (sigma - s_2) * eps + (s_2 * r_2 / r_1 * phi_2(-r_2 * h)) * (eps_1 - eps)
        # eps_2 contains u_2, hence this output, unless the network predicts epsilon.
        needed = self._network.denoiser.scalings(s_2)[0] != 1
        seen, x_low = self._make(2, output, [self._input(u_2, s_2), second], keep=needed)

        output = self._ask(seen, s_2)
        eps_2 = self._eps(u_2, s_2, 3)
        (x_high,) = self._make(3, output, [first + (end / r_2 * phi_2(-h)) * (eps_2 - eps)])
        return x_low, x_high

    def _ask(self, seen: Tensor, sigma: float) -> Tensor:
        times = torch.full((1,), sigma, dtype=self._original.dtype, device=self._x.device)
        t = self._network.times(times, self._x.shape[0])[0]
        output = self._network.ask(seen, t, **self._extra_args)
        self._progress.update()
        return output

    def _eps(self, u: Form, sigma: float, column: int) -> Form:
        """(u - D(u)) / sigma, with the model's output in a column."""
        c_skip, c_out, _ = self._network.denoiser.scalings(sigma)
        eps: Form = ((1 - c_skip) / sigma) * u - (c_out / sigma) * _unit(column)
        return eps

    def _input(self, u: Form, sigma: float) -> Form:
        c_in: float = self._network.denoiser.scalings(sigma)[2]
        return c_in * u

    def _make(
        self, column: int, output: Tensor, forms: list[Form], keep: bool = False
    ) -> list[Tensor]:
        """The tensors of forms over what is kept and this output, in one pass; with `keep` the
        output is copied for later ones (a model may overwrite it at its next call)."""
        dtype = torch.promote_types(self._x.dtype, output.dtype)
        if keep:
            forms = [*forms, _unit(column)]
        columns = [*self._kept, column]
        rows = [np.insert(form[columns], len(columns), 0.0)[None] for form in forms]
        masks = tuple(sum(1 << int(k) for k in np.flatnonzero(row[0])) for row in rows)
        table = torch.from_numpy(pack_table(1, rows)).to(compute_dtype(dtype))
        states = list(self._kept.values())
        if dtype == torch.float64:
            states, output = [state.double() for state in states], output.double()
        made = call_step(
            states, StepSpec(len(states), masks), table.to(self._x.device),
            torch.zeros(1, dtype=torch.int64, device=self._x.device), model_outputs=[output],
            out_dtypes=[dtype] * len(forms),
        )  # fmt: skip
        if keep:
            self._kept[column] = made.pop()
        return made


def _unit(column: int) -> Form:
    form = np.zeros(4)
    form[column] = 1.0
    return form
