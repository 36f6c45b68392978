"""Schedulers whose step takes more than a model output, a timestep and a sample: a plan a step.

CogVideoXDPMScheduler is handed its history by the pipeline (old_pred_original_sample) and told two
timesteps. Such steps remember nothing, so each is traced by itself: images among the arguments are
inputs of a plan of one row, everything else decides the plan. Guidance, asked of accelerate(), is
torch operations before it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.integrations.diffusers.drawing import draws_of, handed
from fastdiff.integrations.diffusers.identity import Cache, digest
from fastdiff.integrations.diffusers.model_input import output_of
from fastdiff.integrations.diffusers.observe import Draws
from fastdiff.integrations.diffusers.options import Options
from fastdiff.plan import SolverPlan
from fastdiff.run import Run
from fastdiff.tracing.intercept import intercepted
from fastdiff.tracing.record import Recorder

__all__ = ["SingleSteps"]

_plans: Cache[SolverPlan | str] = Cache(1024)
_Begun = tuple[Run, Callable[..., Any], tuple[torch.dtype, ...], torch.dtype | None]
_LEFT_OUT = ("generator", "return_dict", "self")


class SingleSteps:
    """The steps of one scheduler object, each a plan of its own.

    Args:
        copied: makes a copy of the scheduler, of upstream's class, to be used up.
    """

    def __init__(
        self,
        scheduler: Any,
        upstream: Any,
        copied: Callable[[], Any],
        options: Options,
    ) -> None:
        self.scheduler, self.upstream, self.copied = scheduler, upstream, copied
        self.options = options
        self.noise: dict[str, Any] = {} if options.seed is None else {
            "seed": options.seed, "sample_offset": options.sample_offset
        }  # fmt: skip
        self._digest = ""
        self._runs: dict[Any, _Begun] = {}

    def end(self) -> None:
        """Before the timesteps are set anew."""
        self._digest = ""
        self._runs.clear()

    def plain(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments of upstream's own step."""
        sample, output = arguments.get("sample"), arguments.get("model_output")
        if not self.options.makes_inputs:
            return arguments
        if not isinstance(sample, Tensor) or not isinstance(output, Tensor):
            return arguments
        return arguments | {"model_output": output_of(output, sample, self.options)}

    def __call__(self, arguments: dict[str, Any]) -> Any:
        """What step() returns, or the reason why upstream's own must make it."""
        sample, output = arguments.get("sample"), arguments.get("model_output")
        if not isinstance(sample, Tensor) or not isinstance(output, Tensor):
            return "model_output or sample is not a tensor"
        images: dict[str, Tensor] = {}
        numbers: dict[str, Any] = {}
        for name, value in arguments.items():
            if name in _LEFT_OUT or name in ("sample", "model_output"):
                continue
            if isinstance(value, Tensor) and value.shape == sample.shape and value.numel() > 1:
                images[name] = value
            elif isinstance(value, Tensor) and value.numel() == 1:
                numbers[name] = value.item()
            elif value is None or isinstance(value, int | float | str):
                numbers[name] = value
            else:
                return f"{name} is a {type(value).__name__}"
        if self.options.makes_inputs:
            output = output_of(output, sample, self.options)
        if output.shape != sample.shape:
            return f"model_output has shape {tuple(output.shape)}, sample {tuple(sample.shape)}"
        self._digest = self._digest or digest(self.scheduler)
        key = (self.upstream, self._digest, tuple(images), tuple(sorted(numbers.items(), key=str)))
        plan = _plans.get(key)
        if plan is None:
            plan = _plans.put(key, self._trace(tuple(images), numbers))
        if isinstance(plan, str):
            return plan
        kind = (
            key, sample.shape, sample.device, sample.dtype, output.dtype,
            tuple(v.dtype for v in images.values()), arguments.get("return_dict"),
        )  # fmt: skip
        if kind not in self._runs:
            told = {k: v for k, v in arguments.items() if k == "return_dict"}
            self._runs[kind] = self._begin(plan, sample, output, images, numbers | told)
        run, made, dtypes, draw_dtype = self._runs[kind]
        draws = []
        if not self.noise:
            draws = draws_of(plan, 0, sample, arguments.get("generator"), draw_dtype)
        run.index = 0
        states = [sample, *(images[name] for name in plan.inputs)]
        result = run.advance(output, states, draws, bool(self.noise), dtypes[0], dtypes[-1])
        return made(result) if len(dtypes) == 1 else made(result, run.x_start)

    def _trace(self, images: tuple[str, ...], numbers: dict[str, Any]) -> SolverPlan | str:
        timestep = float(numbers.get("timestep") or 0)
        recorder = Recorder(f"{self.upstream.__name__} at {timestep:g}")
        try:
            with intercepted(recorder), torch.no_grad():
                x, output = recorder.call(recorder.begin(), t=timestep)
                forms = {name: recorder.input(name) for name in images}
                results = self.upstream.step(
                    self.copied(), model_output=output, sample=x, **forms, **numbers,
                    **self._tuple(),
                )  # fmt: skip
                recorder.preview(results[1] if len(results) > 1 else results[0])
                plan = recorder.finish(results[0])
        except Exception as error:
            # Whatever upstream's code does on forms, its own step on images is the answer.
            return f"{type(error).__name__}: {error}"
        # Every timestep has draws of its own: the noisiest comes first, as in other plans.
        draws = np.array(plan.draws)
        draws[..., 0] = max(int(self.scheduler.config.num_train_timesteps - 1 - timestep), 0)
        return replace(plan, draws=draws)

    def _tuple(self) -> dict[str, bool]:
        takes = "return_dict" in inspect.signature(self.upstream.step).parameters
        return {"return_dict": False} if takes else {}

    def _begin(
        self,
        plan: SolverPlan,
        sample: Tensor,
        output: Tensor,
        images: dict[str, Tensor],
        numbers: dict[str, Any],
    ) -> _Begun:
        """A run of the plan, and how upstream makes its result and its draws."""

        def small(value: Tensor) -> Tensor:
            return torch.ones([1] * value.dim(), dtype=value.dtype)

        with Draws() as drawn, torch.no_grad():
            results = self.upstream.step(
                self.copied(), model_output=small(output), sample=small(sample),
                **{name: small(value) for name, value in images.items()}, **numbers,
            )  # fmt: skip
        made: Callable[..., Any] = lambda *values: values  # noqa: E731
        if isinstance(results, dict):
            made, results = type(results), tuple(results.values())
        dtype = torch.promote_types(sample.dtype, output.dtype)
        noise: dict[str, Any] = self.noise or {"noise": handed}
        if not plan.draws_noise.any():
            noise = {}
        run = Run(
            plan, sample, borrow=True, dtype=dtype, preview=len(results) > 1,
            backend=self.options.backend, **noise,
        )  # fmt: skip
        draw_dtype = drawn.dtypes[0] if drawn.dtypes else None
        return run, made, tuple(value.dtype for value in results), draw_dtype
