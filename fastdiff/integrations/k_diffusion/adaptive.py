"""DPM-Solver-12 and 23: steps whose size depends on the data (Lu et al. 2022, appendix C)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdiff.noise import STREAM_STEP
from fastdiff.ops.call import call_step, compute_dtype, pack_table
from fastdiff.ops.checks import check_sample, resolve_seed
from fastdiff.ops.draw import randn
from fastdiff.ops.step import StepSpec
from fastdiff.schedules._values import as_float
from fastdiff.solvers.edm import ancestral_options
from fastdiff.solvers.sigma_space import ancestral
from fastdiff.solvers.weights import phi

from .driver import Progress, check_returned
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
    if seed is not None:
        resolve_seed(seed, 0, x.shape[0], x.device)  # refuses, also where nothing is drawn
    network = network_of(model)
    if noise_sampler is None and seed is None:
        noise_sampler = default_noise_sampler(x)

    t, t_end = -math.log(high), -math.log(low)
    forward = t_end > t
    h = abs(as_float("h_init", h_init)) * (1 if forward else -1)
    controller = StepSizeController(h, pcoeff, icoeff, dcoeff, 1.5 if eta else order, accept_safety)
    info: dict[str, Any] = {"steps": 0, "nfe": 0, "n_accept": 0, "n_reject": 0}
    x_prev, extra_args = x, extra_args or {}
    trial = Trial(network, x, order, callback is not None)

    with torch.no_grad(), Progress(None, disable) as progress:
        while (t < t_end - 1e-5) if forward else (t > t_end + 1e-5):
            bound = min if forward else max
            t_next = bound(t_end, t + controller.h)
            sigma, sigma_next = math.exp(-t), math.exp(-t_next) if t_next != t_end else low
            sigma_down, sigma_up = sigma_next, 0.0
            if eta:
                sigma_down = max(low, ancestral(sigma, sigma_next, eta)[0])
                sigma_up = math.sqrt((sigma_next - sigma_down) * (sigma_next + sigma_down))
            x_low, x_high = trial.run(x, sigma, sigma_down, extra_args, progress)
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
                    drawn = noise_sampler(_level(sigma), _level(sigma_next))
                    z = check_returned("noise_sampler", drawn, x)
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
                        "t": at, "t_up": at, "denoised": trial.denoised, "error": error,
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


@dataclass
class Pass:
    """Tensors made in one pass after a model call, as forms over what is kept and the output."""

    forms: list[Form]
    columns: list[int]
    keep: bool
    table: Tensor | None = None


class Trial:
    """One trial step of a network: every tensor is a linear form over x and the outputs so far."""

    def __init__(self, network: Network, x: Tensor, order: int, preview: bool) -> None:
        self._network, self._order, self._preview = network, order, preview
        self._sigma_dtype = x.dtype
        self._row = torch.zeros(1, dtype=torch.int64, device=x.device)
        self.denoised: Tensor | None = None

    def forms(self, sigma: float, end: float) -> tuple[list[float], list[Pass]]:
        """The levels at which the network is asked, and what is made after every call.

        The first form of a pass is the next input, but for the last pass.
        """
        h = math.log1p((sigma - end) / end)
        x, r_2 = _unit(0), 2 / 3
        r_1 = 1 / 2 if self._order == 2 else 1 / 3
        s_1, s_2 = sigma * math.exp(-r_1 * h), sigma * math.exp(-r_2 * h)
        eps = self._eps(x, sigma, 1)
        first = x - (sigma - end) * eps
        u_1 = x - (sigma - s_1) * eps
        eps_1 = self._eps(u_1, s_1, 2)
        second = first - ((sigma - end) / (2 * r_1)) * (eps_1 - eps)
        made = [self._input(u_1, s_1)]
        if self._order == 2:
            made.append(first)
        if self._preview and self._network.wrapped:
            made.append(x - sigma * eps)
        passes = [Pass(made, [0, 1], True)]
        if self._order == 2:
            return [sigma, s_1], [*passes, Pass([second], [0, 1, 2], False)]
        u_2 = x - (sigma - s_2) * eps - s_2 * r_2 / r_1 * r_2 * h * phi(2, r_2 * h) * (eps_1 - eps)
        eps_2 = self._eps(u_2, s_2, 3)
        third = first - (end / r_2 * h * phi(2, h)) * (eps_2 - eps)
        # eps_2 contains u_2, hence the second output, unless the network predicts epsilon.
        keep = bool(third[2] != 0)
        passes.append(Pass([self._input(u_2, s_2), second], [0, 1, 2], keep))
        passes.append(Pass([third], [0, 1, 2, 3] if keep else [0, 1, 3], False))
        return [sigma, s_1, s_2], passes

    def run(
        self, x: Tensor, sigma: float, end: float, extra_args: dict[str, Any], progress: Progress
    ) -> tuple[Tensor, Tensor]:
        """(x_low, x_high) at sigma `end`."""
        levels, passes = self.forms(sigma, end)
        self._upload(passes, x)
        host = torch.tensor(levels, dtype=torch.float64).to(self._sigma_dtype)
        times = self._network.times(_sent(host, x.device), x.shape[0])
        seen = x * self._network.denoiser.scalings(sigma)[2] if self._network.wrapped else x
        kept, results = [x], []
        for level, now in enumerate(passes):
            output = self._network.ask(seen, times[level], **extra_args)
            check_returned("model", output, x)
            progress.update()
            made = self._make(now, kept, output)
            if now.keep:
                kept.append(made.pop())
            if level == 0 and self._preview:
                self.denoised = made.pop() if self._network.wrapped else output
            if level + 1 < len(passes):
                seen = made.pop(0)
            results += made
        x_low, x_high = results
        return x_low, x_high

    def _eps(self, u: Form, sigma: float, column: int) -> Form:
        """(u - D(u)) / sigma, with the model's output in a column."""
        c_skip, c_out, _ = self._network.denoiser.scalings(sigma)
        eps: Form = ((1 - c_skip) / sigma) * u - (c_out / sigma) * _unit(column)
        return eps

    def _input(self, u: Form, sigma: float) -> Form:
        c_in: float = self._network.denoiser.scalings(sigma)[2]
        return c_in * u

    def _upload(self, passes: list[Pass], x: Tensor) -> None:
        """The tables of all passes, in one copy."""
        tables = []
        for now in passes:
            if now.keep:  # a copy of the output, which a model may overwrite at its next call
                now.forms = [*now.forms, _unit(now.columns[-1])]
            rows = [np.append(form[now.columns], 0.0)[None] for form in now.forms]
            tables.append(pack_table(1, rows))
        flat = torch.from_numpy(np.concatenate(tables, axis=1)).to(compute_dtype(x.dtype))
        parts = _sent(flat, x.device).split([table.shape[1] for table in tables], dim=1)
        for now, part in zip(passes, parts, strict=True):
            now.table = part.clone()

    def _make(self, now: Pass, kept: list[Tensor], output: Tensor) -> list[Tensor]:
        dtype, table = torch.promote_types(kept[0].dtype, output.dtype), now.table
        assert table is not None
        if dtype == torch.float64:
            kept, output, table = [k.double() for k in kept], output.double(), table.double()
        masks = tuple(
            sum(1 << k for k, column in enumerate(now.columns) if form[column] != 0)
            for form in now.forms
        )
        return call_step(
            kept, StepSpec(len(kept), masks), table, self._row, model_outputs=[output],
            out_dtypes=[dtype] * len(now.forms),
        )  # fmt: skip


def _sent(values: Tensor, device: torch.device) -> Tensor:
    """A copy on the device that the host does not wait for."""
    if device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def _unit(column: int) -> Form:
    form = np.zeros(4)
    form[column] = 1.0
    return form
