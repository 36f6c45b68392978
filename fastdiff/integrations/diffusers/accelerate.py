"""accelerate(): the subclass that stands in for a diffusers scheduler."""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from fastdiff.integrations.diffusers import saving
from fastdiff.integrations.diffusers.model_input import input_of
from fastdiff.integrations.diffusers.noising import METHODS, Noising
from fastdiff.integrations.diffusers.options import Options
from fastdiff.integrations.diffusers.shadow import copied, said
from fastdiff.integrations.diffusers.single import SingleSteps
from fastdiff.integrations.diffusers.stepping import Stepper

__all__ = ["accelerate"]

X = TypeVar("X")
_STEPPER, _NOISING = "_fastdiff_stepper", "_fastdiff_noising"
_OPTIONS = "_fastdiff_options"


def accelerate(
    x: X,
    *,
    seed: int | Tensor | None = None,
    sample_offset: int = 0,
    float32_latents: bool = False,
    outputs_are_fresh: bool = False,
    guidance_scale: float | Tensor | None = None,
    model_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> X:
    """A scheduler, scheduler class or pipeline of diffusers whose steps are one fused pass each.

        pipe.scheduler = accelerate(pipe.scheduler)

    The result is a subclass with the same name, configuration, signatures and results: numbers,
    dtypes and random draws are upstream's own. Its steps are traced when a run begins (see
    fastdiff.trace); a scheduler or an argument that cannot be traced runs upstream's own step, and
    that is logged once.

    Args:
        x: an instance (it is not changed; the result shares its tables), a class, or a pipeline,
            whose schedulers are replaced.
        seed, sample_offset: noise by fastdiff's contract (fastdiff/noise.py) instead of a
            generator's: the same for any batch size and device, made inside the step. A
            generator given to step is then not used.
        float32_latents: keep the sample in float32 between steps; what step returns is rounded
            from it in the same pass. As long as the caller hands back what it was given, low
            precision costs one rounding of the model's input and no more. A sample that was
            edited, in place or not, is taken as it is.
        outputs_are_fresh: the model never writes again to an output it has returned (no CUDA
            graph replays into the same memory): history that is an output is kept, not copied.
        guidance_scale: g of classifier-free guidance, a number or (B,), for loops of your own;
            another g: accelerate() the result again between runs.
        model_dtype: the model's, where it is not the sample's: float32 samples then stay float32
            around a bfloat16 model.
        backend: "reference", "native" or "triton"; default the best for the device.

    With guidance_scale or model_dtype a step does what stands around the model too:

        latents = scheduler.step(model(scheduler.scale_model_input(latents, t), t), t, latents)

    scale_model_input, added where upstream has none, returns cast(c_in sample): of model_dtype and,
    with guidance, twice along the batch, the unconditional half first. For the very tensor that the
    last step returned, if unedited, it was written in that step's pass; else torch operations make
    it. step takes the model's output for that input, and o = o_uncond + g (o_cond - o_uncond) is
    computed in its pass, in at least float32 (with a learned variance of the first C channels; the
    variance is the conditional half's). Results are upstream's for an o of the sample's dtype.

    Raises:
        TypeError: x is none of these; an option is of the wrong type.
        ValueError: float32_latents beside guidance_scale or model_dtype (float32 samples with a
            model_dtype are that already); guidance_scale for a pipeline, which does its own, or for
            a scheduler whose step takes no model_output and sample.
    """
    options = Options(
        seed, sample_offset, float32_latents, outputs_are_fresh, backend, guidance_scale,
        model_dtype,
    )  # fmt: skip
    if inspect.isclass(x) and issubclass(x, SchedulerMixin):
        return cast(X, _subclass(x, options))
    if _is_pipeline(x):
        if guidance_scale is not None:
            raise ValueError("guidance_scale must be None for a pipeline, which does its own")
        pipeline: Any = x
        for name, component in pipeline.components.items():
            if isinstance(component, SchedulerMixin):
                setattr(x, name, _instance(component, options))
        return x
    if isinstance(x, SchedulerMixin):
        return cast(X, _instance(x, options))
    kind = x.__name__ if inspect.isclass(x) else type(x).__name__
    raise TypeError(f"x must be a scheduler, a scheduler class or a pipeline of diffusers: {kind}")


def _is_pipeline(x: object) -> bool:
    """Without importing pipelines: they take seconds, and a pipeline has imported them itself."""
    module = sys.modules.get("diffusers.pipelines.pipeline_utils")
    return module is not None and isinstance(x, module.DiffusionPipeline)


class Accelerated:
    """What every accelerated scheduler is, beside a scheduler of its upstream class."""

    _fastdiff_upstream: type

    def __getattr__(self, name: str) -> Any:
        stepper = vars(self).get(_STEPPER)
        if isinstance(stepper, Stepper) and stepper.serves(name):
            return stepper.attribute(name)
        return super().__getattr__(name)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        stepper = vars(self).get(_STEPPER)
        saved = saving.saved(stepper) if isinstance(stepper, Stepper) else None
        return _rebuilt, (self._fastdiff_upstream, _options(self), _state(self), saved)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        function, (upstream, options, state, saved) = self.__reduce_ex__(4)
        other = function(upstream, options, *copy.deepcopy((state, saved), memo))
        if saved is not None:
            saving.hand_on(vars(self)[_STEPPER], vars(other)[_STEPPER])
        return other


def _options(scheduler: Any) -> Options:
    options: Options = getattr(scheduler, _OPTIONS)
    return options


def _state(scheduler: Any) -> dict[str, Any]:
    """A scheduler's own attributes."""
    return {name: v for name, v in vars(scheduler).items() if name not in (_STEPPER, _NOISING)}


def _rebuilt(
    upstream: type, options: Options, state: dict[str, Any], saved: dict[str, Any] | None = None
) -> Any:
    """An accelerated scheduler with these attributes, which goes on from a run that was saved."""
    cls: Any = _subclass(upstream, options)
    scheduler = cls.__new__(cls)
    vars(scheduler).update(state)
    if saved is not None:
        saving.resume(_stepper(scheduler), saved)
    return scheduler


def _instance(scheduler: Any, options: Options) -> Any:
    upstream = _upstream_of(type(scheduler))
    state = _state(scheduler)
    stepper = vars(scheduler).get(_STEPPER)
    if not isinstance(stepper, Stepper):
        return _rebuilt(upstream, options, state)
    state = {**saving.put_away(stepper), **state}
    return _rebuilt(upstream, options, state, saving.left(stepper))


def _upstream_of(cls: type) -> type:
    return cls._fastdiff_upstream if issubclass(cls, Accelerated) else cls


def _subclass(cls: type, options: Options) -> type:
    upstream = _upstream_of(cls)
    key = (upstream, options.key)
    if key not in _subclasses:
        _subclasses[key] = _make(upstream, options)
    return _subclasses[key]


_subclasses: dict[Any, type] = {}


def _make(upstream: Any, options: Options) -> type:
    namespace: dict[str, Any] = {
        "__module__": upstream.__module__,
        "__qualname__": upstream.__qualname__,
        "__doc__": upstream.__doc__,
        "_fastdiff_upstream": upstream,
        _OPTIONS: options,
    }
    first = ("self", "model_output", "timestep", "sample")
    names = tuple(inspect.signature(upstream.step).parameters) if hasattr(upstream, "step") else ()
    if names[:4] == first and hasattr(upstream, "set_timesteps"):
        namespace["step"] = _step(upstream, names[4:])
        if options.makes_inputs:
            namespace["scale_model_input"] = _model_input(upstream)
        elif hasattr(upstream, "scale_model_input"):
            namespace["scale_model_input"] = _scaling(upstream)
        for name in ("set_timesteps", "set_begin_index"):
            if hasattr(upstream, name):
                namespace[name] = _resetting(getattr(upstream, name))
    elif {"model_output", "sample"} <= set(names):
        namespace["step"] = _single(upstream)
        if options.makes_inputs:
            namespace["scale_model_input"] = _single_input(upstream)
        if hasattr(upstream, "set_timesteps"):
            namespace["set_timesteps"] = _resetting(upstream.set_timesteps)
    elif options.makes_inputs:
        raise ValueError(
            "guidance_scale and model_dtype need a step that takes model_output and sample: "
            f"{upstream.__name__} has none"
        )
    else:
        said(upstream, "its step takes no model_output and sample")
    for name in METHODS:
        if hasattr(upstream, name):
            namespace[name] = _noising(upstream, name)
    return type(upstream.__name__, (Accelerated, upstream), namespace)


def _step(upstream: Any, others: tuple[str, ...]) -> Callable[..., Any]:
    @functools.wraps(upstream.step)
    def step(
        self: Any, model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if args:
            if len(args) > len(others):
                raise TypeError(f"step takes at most {3 + len(others)} arguments")
            kwargs.update(zip(others, args, strict=False))
        for name in kwargs:
            if name not in others:
                raise TypeError(f"step() got an unexpected keyword argument {name!r}")
        return _stepper(self).step(model_output, timestep, sample, kwargs)

    return step


def _single(upstream: Any) -> Callable[..., Any]:
    signature = inspect.signature(upstream.step)

    @functools.wraps(upstream.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(self, *args, **kwargs).arguments
        steps: SingleSteps | None = vars(self).get(_STEPPER)
        if steps is None or steps.scheduler is not self:
            steps = SingleSteps(
                self, upstream, lambda: copied(upstream, vars(self)), _options(self)
            )
            vars(self)[_STEPPER] = steps
        results = steps(arguments)
        if isinstance(results, str):
            said(upstream, results)
            return upstream.step(**steps.plain(arguments))
        return results

    return step


def _stepper(scheduler: Any) -> Stepper:
    stepper: Stepper | None = vars(scheduler).get(_STEPPER)
    if stepper is None or stepper.scheduler is not scheduler:
        stepper = Stepper(scheduler, scheduler._fastdiff_upstream, _options(scheduler))
        vars(scheduler)[_STEPPER] = stepper
    return stepper


def _scaling(upstream: Any) -> Callable[..., Any]:
    @functools.wraps(upstream.scale_model_input)
    def scale_model_input(self: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        stepper: Stepper | None = vars(self).get(_STEPPER)
        scale = None if stepper is None else stepper.scale()
        if scale is None:
            return upstream.scale_model_input(self, sample, *args, **kwargs)
        return sample if scale == 1.0 else sample * scale

    return scale_model_input


def _model_input(upstream: Any) -> Callable[..., Any]:
    def scale_model_input(self: Any, sample: Tensor, timestep: Any = None) -> Tensor:
        """The model's input, cast(c_in sample); see accelerate()."""
        return _stepper(self).model_input(sample, timestep)

    return _like_upstreams(scale_model_input, upstream)


def _single_input(upstream: Any) -> Callable[..., Any]:
    def scale_model_input(self: Any, sample: Tensor, timestep: Any = None) -> Tensor:
        """The model's input; see accelerate()."""
        if hasattr(upstream, "scale_model_input"):
            scaled = upstream.scale_model_input(self, sample, timestep)
        else:
            scaled = sample
        return input_of(scaled, sample.dtype, _options(self))

    return _like_upstreams(scale_model_input, upstream)


def _like_upstreams(method: Callable[..., Any], upstream: Any) -> Callable[..., Any]:
    theirs = getattr(upstream, method.__name__, None)
    return method if theirs is None else functools.wraps(theirs)(method)


def _noising(upstream: Any, name: str) -> Callable[..., Any]:
    method = getattr(upstream, name)
    second, third = list(inspect.signature(method).parameters)[2:4]

    @functools.wraps(method)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(method).bind(self, *args, **kwargs)
        values = bound.arguments
        _, sample, *_ = values.values()
        noise = values.get("noise")
        timesteps = values.get(third if second == "noise" else second)
        noising = vars(self).setdefault(
            _NOISING, Noising(self, upstream, lambda: copied(upstream, vars(self)))
        )
        result = noising(name, sample, noise, timesteps)
        return method(self, *args, **kwargs) if result is None else result

    return wrapper


def _resetting(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        stepper: Stepper | None = vars(self).get(_STEPPER)
        if stepper is not None:
            stepper.end()
        # Set, so that whoever puts __dict__ aside here and back later begins a run of its own.
        vars(self)[_STEPPER] = None
        return method(self, *args, **kwargs)

    return wrapper
