"""Tracing other projects' samplers: schedulers stepped by a pipeline, and sampling functions."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.plan import SolverPlan
from fastdiff.tracing.intercept import intercepted
from fastdiff.tracing.linear_form import LinearForm, NotAffineError, number
from fastdiff.tracing.record import Recorder

__all__ = ["TraceNotes", "forms_in", "trace", "trace_function", "trace_scheduler"]


def trace(
    sampler: Any,
    steps: int | None = None,
    *,
    sigmas: Sequence[float] | Tensor | None = None,
    **options: Any,
) -> SolverPlan:
    """The plan of any sampler whose steps are affine in the images, from one run of its own code.

        plan = fastdiff.trace(DPMSolverMultistepScheduler(), steps=25)
        plan = fastdiff.trace(k_diffusion.sampling.sample_dpmpp_2m, sigmas=sigmas)

    The code runs in float64 on linear forms instead of images (fastdiff/tracing/linear_form.py),
    once; random numbers that it draws become draws of the plan, clamps become its clamp node. The
    plan carries the least history that any implementation could.

    Args:
        sampler: a scheduler with set_timesteps() and step() as diffusers' have; or a function with
            k-diffusion's signature, f(model, x, sigmas, ...), around a model that returns x_0.
            It is not changed: a scheduler is copied first.
        steps: number of inference steps; None when the scheduler's timesteps are already set.
        sigmas: noise levels, for a function (required) or a scheduler that takes them.
        **options: further arguments of set_timesteps (timesteps, mu, ...) and of step (eta,
            s_churn, ...), or of the function.

    Raises:
        NotAffineError: naming the operation that is not affine and the file and line of it.
        TypeError, ValueError: wrong arguments.
    """
    if hasattr(sampler, "step") and hasattr(sampler, "set_timesteps"):
        if inspect.isclass(sampler):
            raise TypeError(f"sampler must be an instance: {sampler.__name__}(...)")
        return _trace_ready(copy.deepcopy(sampler), steps, sigmas, options)
    if callable(sampler):
        if sigmas is None:
            raise ValueError("sigmas must be given to trace a sampling function")
        if steps is not None:
            raise ValueError("steps and sigmas exclude each other for a sampling function")
        return trace_function(sampler, sigmas, **options)
    raise TypeError(f"sampler must be a scheduler or a function, not {type(sampler).__name__}")


def _trace_ready(
    scheduler: Any, steps: int | None, sigmas: Any, options: dict[str, Any]
) -> SolverPlan:
    """Sets the timesteps of a copy and traces it."""
    accepted = inspect.signature(scheduler.set_timesteps).parameters
    setting = {name: options.pop(name) for name in list(options) if name in accepted}
    if sigmas is not None:
        if "sigmas" not in accepted:
            raise TypeError(f"{type(scheduler).__name__}.set_timesteps takes no sigmas")
        setting["sigmas"] = sigmas
    if steps is not None:
        if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or steps < 1:
            raise ValueError(f"steps must be a positive integer, not {steps!r}")
        setting["num_inference_steps"] = int(steps)
    if setting:
        scheduler.set_timesteps(**setting)
    elif getattr(scheduler, "num_inference_steps", None) is None and not getattr(
        scheduler, "custom_timesteps", False
    ):
        raise ValueError("steps must be given: the scheduler's timesteps are not set")
    known = inspect.signature(scheduler.step).parameters
    for name in options:
        if name not in known:
            raise TypeError(
                f"{name} is an argument neither of {type(scheduler).__name__}.set_timesteps nor of "
                "its step"
            )
    return trace_scheduler(scheduler, scheduler.timesteps, options)


@dataclass
class TraceNotes:
    """What a trace saw beside the plan.

    Attributes:
        queries: (begin, end) that a Brownian tree was asked for, by (row, draw).
        attributes: the scheduler's attributes after every row: numbers, and forms where it keeps
            images, alone or in lists.
    """

    queries: dict[tuple[int, int], tuple[float, float]] = field(default_factory=dict)
    attributes: list[dict[str, Any]] = field(default_factory=list)
    recorder: Recorder | None = None


def trace_scheduler(
    scheduler: Any,
    timesteps: Iterable[Any],
    step_options: Mapping[str, Any] | None = None,
    *,
    exact_tables: bool = False,
    fed: bool = False,
    learned_variance: bool | None = None,
    notes: TraceNotes | None = None,
) -> SolverPlan:
    """The plan of a scheduler whose timesteps are set; the scheduler is used up.

    Args:
        timesteps: those that will be stepped, in order.
        step_options: further arguments of step().
        exact_tables: the scheduler's float32 tables are widened to float64 before it computes with
            them; else numbers are computed as upstream does, rounding included.
        fed: draws of Brownian trees will be supplied by the caller, a draw a query; otherwise they
            become independent draws with the weights in the rows.
        learned_variance: model outputs have twice the channels (default: as configured).
        notes: filled with what the plan does not say.
    """
    config = getattr(scheduler, "config", {})
    if learned_variance is None:
        kinds = ("learned", "learned_range")
        learned_variance = config.get("variance_type") in kinds
    name = type(scheduler).__name__
    timesteps = list(timesteps)
    recorder = Recorder(
        f"{name}, {len(timesteps)} calls", _about(config), learned_variance=learned_variance
    )
    if exact_tables:
        _in_float64(scheduler)
    if config.get("thresholding") and hasattr(scheduler, "_threshold_sample"):
        ratio, largest = config["dynamic_thresholding_ratio"], config["sample_max_value"]
        scheduler._threshold_sample = lambda form: recorder.threshold(form, ratio, largest)
    if hasattr(scheduler, "noise_sampler"):

        def sampler(begin: Any, end: Any) -> LinearForm:
            query = (float(begin), float(end))
            return recorder.drawn(query=query) if fed else recorder.brownian(*query)

        scheduler.noise_sampler = sampler
    options = dict(step_options or {})
    if "return_dict" in inspect.signature(scheduler.step).parameters:
        options["return_dict"] = False
    scale = number(getattr(scheduler, "init_noise_sigma", 1.0), "init_noise_sigma")
    x = recorder.begin(1.0 if scale is None else scale)
    with intercepted(recorder), torch.no_grad():
        for t in timesteps:
            x, output = recorder.call(x, t=float(t))
            if hasattr(scheduler, "scale_model_input"):
                recorder.scaled_input(x, _scale(x, scheduler.scale_model_input(x, t)))
            results: tuple[Any, ...] = scheduler.step(output, t, x, **options)
            x = results[0]
            if len(results) > 1 and isinstance(results[1], LinearForm):
                recorder.preview(results[1])
            recorder.hint(forms_in(vars(scheduler).values()))
            if notes is not None:
                notes.attributes.append(_snapshot(scheduler))
    plan = recorder.finish(x)
    if notes is not None:
        notes.recorder = recorder
        for i, row in enumerate(recorder.rows):
            for k, draw in enumerate(row.draws):
                if draw.query is not None:
                    notes.queries[i, k] = draw.query
    return plan


def trace_function(
    function: Callable[..., Any], sigmas: Sequence[float] | Tensor, **options: Any
) -> SolverPlan:
    """The plan of a whole sampling function f(model, x, sigmas, ...) of k-diffusion's kind.

    Its loop is closed: what the model sees is not changed from outside.
    """
    levels = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu")
    if levels.dim() != 1 or len(levels) < 2 or not bool(torch.isfinite(levels).all()):
        raise ValueError(f"sigmas must be at least two finite numbers, not {sigmas!r}")
    accepted = inspect.signature(function).parameters
    name = getattr(function, "__name__", type(function).__name__)
    about = {key: repr(value) for key, value in options.items()}
    recorder = Recorder(f"{name}, {len(levels) - 1} steps", about, open_loop=False)

    def model(x: Any, sigma: Any, *_: Any, **__: Any) -> LinearForm:
        level = number(sigma, "the model's sigma")
        if not isinstance(x, LinearForm) or level is None:
            raise NotAffineError("the model", f"is called with {type(x).__name__}")
        output = recorder.call(x, t=level)[1]
        recorder.preview(output)
        return output

    if "noise_sampler" in accepted and "noise_sampler" not in options:
        options["noise_sampler"] = _increments(recorder)
    if "disable" in accepted:
        options.setdefault("disable", True)
    with intercepted(recorder), torch.no_grad():
        result = function(model, recorder.begin(float(levels[0])), levels, **options)
    if not isinstance(result, LinearForm):
        raise TypeError(f"{name} must return a sample, not {type(result).__name__}")
    return recorder.finish(result)


def _increments(recorder: Recorder) -> Callable[[Any, Any], LinearForm]:
    """A noise sampler: increments of one Brownian motion, which for functions that ask for
    disjoint intervals are independent draws. Towards lower noise levels they count positive, so
    that a new interval's noise is its draw. An empty interval (a repeated noise level) gets a draw
    of its own."""

    def sampler(begin: Any, end: Any) -> LinearForm:
        high, low = float(begin), float(end)
        return recorder.drawn() if low == high else recorder.brownian(low, high)

    return sampler


def _about(config: Mapping[str, Any]) -> dict[str, str]:
    return {
        name: str(config[name]) for name in ("prediction_type", "solver_order", "algorithm_type")
        if name in config
    }  # fmt: skip


def _in_float64(scheduler: Any) -> None:
    """The tables of a copied scheduler as float64 tensors on the host, values unchanged."""
    for name, value in vars(scheduler).items():
        if isinstance(value, Tensor) and value.is_floating_point():
            vars(scheduler)[name] = value.detach().to("cpu", torch.float64)
        elif isinstance(value, np.ndarray) and value.dtype == np.float32:
            vars(scheduler)[name] = value.astype(np.float64)


def _scale(x: LinearForm, scaled: Any) -> float:
    """c_in from what scale_model_input made of the sample."""
    (key,) = x.terms
    if not isinstance(scaled, LinearForm) or set(scaled.terms) != {key}:
        raise NotAffineError("scale_model_input", "does not scale the sample")
    return scaled.terms[key]


def _snapshot(scheduler: Any) -> dict[str, Any]:
    """The attributes that steps change: forms, numbers, None and lists of them."""
    found = {}
    for name, value in vars(scheduler).items():
        scalar = value.dim() == 0 if isinstance(value, Tensor) else value is None
        if isinstance(value, list):
            found[name] = list(value)
        elif scalar or isinstance(value, LinearForm | int | float):
            found[name] = value
    return found


def forms_in(values: Iterable[Any]) -> list[LinearForm]:
    """The forms among a scheduler's attributes, by themselves or in lists."""
    return [
        item
        for value in values
        for item in (value if isinstance(value, list | tuple) else [value])
        if isinstance(item, LinearForm)
    ]
