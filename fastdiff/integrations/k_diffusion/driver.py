"""The loop: a formula compiled to a plan and a list of calls, and run around the caller's model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.noise import STREAM_STEP_SECOND
from fastdiff.ops.call import call_step, pack_table
from fastdiff.ops.checks import FLOATING, check_sample, resolve_seed
from fastdiff.ops.draw import randn
from fastdiff.ops.step import StepSpec
from fastdiff.plan import SolverPlan
from fastdiff.run import Run
from fastdiff.solvers import dpmpp_sigma, edm
from fastdiff.solvers.sigma_space import Call, Denoiser, Tape, levels_of

from .network import Network, network_of
from .noise import NoiseSampler

__all__ = ["Progress", "Script", "check_returned", "compile_script", "read_sigmas", "run_script"]

FORMULAS = edm.FORMULAS | dpmpp_sigma.FORMULAS
# When upstream's sample takes the dtype of sigmas too (to_d() gives sigma as many dimensions as x):
# at every step, or at an Euler step to 0 only; else never.
WIDENS_ALWAYS = ("euler", "euler_ancestral", "heun", "dpm_2", "dpm_2_ancestral", "lms")
WIDENS_AT_ZERO = ("dpmpp_2s_ancestral", "dpmpp_sde")


@dataclass(frozen=True)
class Script:
    """A compiled sampler.

    Attributes:
        plan: without the churn before the first call, whose scale is `first_churn`.
        calls: one for each row of the plan.
        widens: (R,) whether upstream's x takes the dtype of sigmas at this row.
        sigmas: (R,) the level of every row.
    """

    plan: SolverPlan
    calls: tuple[Call, ...]
    first_churn: float
    widens: tuple[bool, ...]
    sigmas: tuple[float, ...]


@lru_cache(maxsize=128)
def compile_script(
    name: str,
    sigmas: tuple[float, ...],
    denoiser: Denoiser,
    split: bool,
    options: tuple[tuple[str, Any], ...],
) -> Script:
    """The script of a formula; kept by the values of sigmas and options."""
    tape = Tape(
        f"k-diffusion {name}", levels_of(sigmas), denoiser, split=split, first_churn=False,
        about={key: str(value) for key, value in options},
    )  # fmt: skip
    plan = tape.finish(FORMULAS[name](tape, **dict(options)))
    calls = tuple(tape.calls)
    alone = [
        call.opens and (k + 1 == len(calls) or calls[k + 1].opens) for k, call in enumerate(calls)
    ]
    widens = [
        name in WIDENS_ALWAYS or (name in WIDENS_AT_ZERO and single) for single in alone
    ]  # fmt: skip
    return Script(plan, calls, tape.first_churn, tuple(widens), tuple(call.sigma for call in calls))


class Progress:
    """tqdm's bar where tqdm is installed; `disable` is its argument."""

    def __init__(self, total: int | None, disable: bool | None) -> None:
        self._bar: Any = None
        if disable is not True:
            try:
                from tqdm.auto import tqdm  # type: ignore[import-untyped]
            except ImportError:
                return
            self._bar = tqdm(total=total, disable=disable)

    def update(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


def read_sigmas(sigmas: Tensor) -> tuple[float, ...]:
    """The levels on the host: the one time that they are read."""
    if not isinstance(sigmas, Tensor):
        raise TypeError(f"sigmas must be a torch.Tensor, not {type(sigmas).__name__}")
    if sigmas.dim() != 1 or not sigmas.is_floating_point():
        raise ValueError(
            f"sigmas must be 1-D and of a floating dtype, not {tuple(sigmas.shape)} {sigmas.dtype}"
        )
    return tuple(sigmas.detach().to("cpu", torch.float64).tolist())


def run_script(
    name: str,
    model: Any,
    x: Tensor,
    levels: tuple[float, ...],
    options: dict[str, Any],
    *,
    dtype: torch.dtype,
    noise: NoiseSampler | None,
    query: Callable[[str, int], tuple[Any, Any]],
    extra_args: dict[str, Any] | None,
    callback: Callable[[dict[str, Any]], Any] | None,
    about: Callable[[int, float], dict[str, Any]],
    progress: Progress,
    per_call: bool = False,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Runs a formula around a model.

    Args:
        levels: noise levels on the host, dtype: that of the caller's sigmas.
        noise, query: draws other than churn, and the two levels that each is asked for by name and
            step; noise is not used when there is a seed.
        about: what the callback is told of a step besides x, i and denoised, by (i, sigma_hat).
        per_call: progress counts model calls, not steps.
    """
    check_sample("x", x)
    if seed is not None:
        resolve_seed(seed, 0, x.shape[0], x.device)  # refuses, also where nothing is drawn
    network = network_of(model)
    extra_args = extra_args or {}
    seeded = seed is not None
    script = compile_script(name, levels, network.denoiser, seeded, tuple(options.items()))
    plan, calls = script.plan, script.calls
    original, wide = x, x.dtype
    host = torch.tensor(script.sigmas, dtype=torch.float64).to(dtype).to(x.dtype)
    times = network.times(host.to(x.device), x.shape[0]).unbind()

    if seed is not None:
        if script.first_churn:
            z = randn(
                x.shape, seed, step=0, stream=STREAM_STEP_SECOND, dtype=x.dtype, device=x.device
            )
            x = x + script.first_churn * z
    elif "s_churn" in options:
        z = torch.randn_like(x)  # upstream draws also where it does not churn
        if script.first_churn:
            x = x + script.first_churn * z

    run: Run | None = None
    preview: _Preview | None = None
    first = x.dtype
    for row, call in enumerate(calls):
        if run is not None:
            seen = run.model_input
        elif network.wrapped:
            seen = x * plan.first_c_in
        else:
            seen = x
        output = check_returned("model", network.ask(seen, times[row], **extra_args), x)
        kinds = [wide, output.dtype]
        if network.wrapped:
            kinds.append(original.dtype)  # of c_out
        denoised_dtype = _promoted(kinds)
        if callback is not None and call.opens:
            denoised = output
            if network.wrapped:
                preview = preview or _Preview(network, script.sigmas, x)
                denoised = preview(row, x, output, denoised_dtype)
            callback({"x": x, "i": call.step, "denoised": denoised, **about(call.step, call.sigma)})
        wide = _promoted([wide, denoised_dtype, *([dtype] if script.widens[row] else [])])
        drawn: Tensor | None = None
        if not seeded and call.draws:
            ((kind, step),) = call.draws
            if kind == "churn":
                drawn = torch.randn_like(original, dtype=wide)
            else:
                assert noise is not None
                drawn = check_returned("noise_sampler", noise(*query(kind, step)), x)
                wide = _promoted([wide, drawn.dtype])
        if run is None:
            used = bool(plan.draws_noise.any())
            run = Run(
                plan, x.to(wide), seed=seed if seeded and used else None,
                noise=_never if used and not seeded else None,
            )  # fmt: skip
            first = wide
        given = None
        if plan.n_draws and not seeded:
            given = [run.x if drawn is None else _fitted(drawn, run.x)] * plan.n_draws
        output = _fitted(output, run.x, draw=False)
        x = run.step(output, noise=given, result_dtype=_kept(wide, first))
        if per_call or row + 1 == len(calls) or calls[row + 1].opens:
            progress.update()
    return x.to(wide)


def _promoted(dtypes: list[torch.dtype]) -> torch.dtype:
    result = dtypes[0]
    for dtype in dtypes[1:]:
        if dtype != result:
            result = torch.promote_types(result, dtype)
    return result


def _kept(wide: torch.dtype, first: torch.dtype) -> torch.dtype | None:
    """The dtype that a row's result takes when upstream's x widens after the first row. (float64
    math is decided when the run begins.)"""
    return None if wide == first or torch.float64 in (wide, first) else wide


def _fitted(value: Tensor, x: Tensor, draw: bool = True) -> Tensor:
    """A draw or output as the step takes it: float64 with float64 only; draws row-major."""
    if value.dtype != x.dtype and torch.float64 in (value.dtype, x.dtype):
        value = value.to(x.dtype)
    return value.contiguous() if draw else value


def _never(row: int, draw: int) -> Tensor:
    raise AssertionError(f"draw {draw} of row {row} was not handed to the step")


def check_returned(name: str, value: Any, x: Tensor) -> Tensor:
    """What a model or noise sampler gave: a tensor that can stand beside x."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must return a torch.Tensor, not {type(value).__name__}")
    if value.shape != x.shape or value.device != x.device or value.dtype not in FLOATING:
        raise ValueError(
            f"{name} must return {tuple(x.shape)} of a floating dtype on {x.device}, not "
            f"{tuple(value.shape)} {value.dtype} on {value.device}"
        )
    return value


class _Preview:
    """c_skip x + c_out output of any row in one pass, for a callback; one upload a run."""

    def __init__(self, network: Network, sigmas: tuple[float, ...], x: Tensor) -> None:
        scalings = np.array([network.denoiser.scalings(sigma)[:2] for sigma in sigmas])
        rows = np.concatenate([scalings, np.zeros((len(sigmas), 1))], axis=1)  # x, o, c
        self._table = torch.from_numpy(pack_table(len(sigmas), [rows])).to(x.device)
        self._rows = torch.arange(len(sigmas), device=x.device)

    def __call__(self, row: int, x: Tensor, output: Tensor, dtype: torch.dtype) -> Tensor:
        # float64 in memory; float32 math is the rule below float64.
        table = self._table
        if dtype == torch.float64:
            x, output = x.double(), output.double()
        else:
            table = table.float()
        (denoised,) = call_step(
            [x], StepSpec(1, (0b11,)), table, self._rows[row : row + 1], model_outputs=[output],
            out_dtypes=[dtype],
        )  # fmt: skip
        return denoised
