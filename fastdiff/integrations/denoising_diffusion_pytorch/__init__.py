"""Fused steps for the GaussianDiffusion of the package denoising-diffusion-pytorch.

from fastdiff.integrations.denoising_diffusion_pytorch import accelerate
diffusion = accelerate(GaussianDiffusion(model, image_size=32))

The package is not imported here: an object of its class brings it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, TypeVar

from torch import nn

from .methods import MODULE, Fused

__all__ = ["accelerate"]

M = TypeVar("M", bound=nn.Module)

_CLASS = "GaussianDiffusion"

# Every method served here, and upstream's methods that it stands for: where a subclass has one of
# those its own way, the method stays as it is.
_PREDICTIONS = (
    "model_predictions", "predict_start_from_noise", "predict_noise_from_start",
    "predict_start_from_v",
)  # fmt: skip
_STANDS_FOR: dict[str, tuple[str, ...]] = {
    "predict_start_from_noise": (),
    "predict_noise_from_start": (),
    "predict_v": (),
    "predict_start_from_v": (),
    "q_posterior": (),
    "q_sample": (),
    "p_losses": ("predict_v",),
    "model_predictions": _PREDICTIONS,
    "p_mean_variance": (*_PREDICTIONS, "q_posterior"),
    "p_sample": (*_PREDICTIONS, "q_posterior", "p_mean_variance"),
    "ddim_sample": _PREDICTIONS,
}


def accelerate(diffusion: M) -> M:
    """The same diffusion with every step of sampling and noising in one pass over memory.

    The result shares all state with `diffusion` (parameters, buffers, attributes): it is the same
    module seen through a subclass of its class, with that class's name, state_dict and results to
    float32 rounding, and the same random draws. q_sample, q_posterior, predict_*, p_mean_variance,
    model_predictions, p_sample, ddim_sample and p_losses are fused, and so are the loops and
    interpolation that call them; the rest, and what a subclass overrides, is upstream's code.
    Coefficients are upstream's buffers; where those change (load_state_dict, to), tables follow.

    Args:
        diffusion: a GaussianDiffusion of denoising-diffusion-pytorch, or of a subclass.

    Raises:
        TypeError: for anything else.
    """
    base = type(diffusion)
    if _upstream(base) is None:
        raise TypeError(
            f"diffusion must be a {_CLASS} of {MODULE}, not {base.__module__}.{base.__qualname__}"
        )
    if getattr(base, "_fastdiff", False):
        return diffusion
    fused: M = _restored(base)
    object.__setattr__(fused, "__dict__", diffusion.__dict__)
    return fused


def _upstream(kind: type) -> Any:
    """The package's own class among the parents of `kind`, or None."""
    for parent in kind.__mro__:
        named = parent.__module__ == MODULE and parent.__name__ == _CLASS
        if named and "_fastdiff" not in vars(parent):
            return parent
    return None


def _restored(base: Any) -> Any:
    kind = _fused_class(base)
    return kind.__new__(kind)


@lru_cache(maxsize=64)
def _fused_class(base: Any) -> Any:
    upstream = _upstream(base)

    def untouched(name: str) -> bool:
        return getattr(base, name, None) is getattr(upstream, name)

    methods = {
        name: vars(Fused)[name]
        for name, parts in _STANDS_FOR.items()
        if all(untouched(part) for part in (name, *parts))
    }

    def reduce_ex(self: nn.Module, protocol: Any) -> Any:
        return _restored, (base,), self.__dict__

    members = {
        **methods, "_fastdiff": True, "_upstream": upstream, "__reduce_ex__": reduce_ex,
        "__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__,
    }  # fmt: skip
    return type(base.__name__, (base,), members)
