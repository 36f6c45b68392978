"""What a model is: a black-box denoiser, or one of k-diffusion's affine wrappers seen through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import module as nn_module

from fastdiff.solvers.sigma_space import Denoiser

__all__ = ["Network", "network_of"]

# Upstream's wrapper: the file it lives in, what its inner model predicts, the method that asks it.
WRAPPERS = {
    "DiscreteEpsDDPMDenoiser": ("external", "epsilon", "get_eps"),
    "DiscreteVDDPMDenoiser": ("external", "edm_v", "get_v"),
    "VDenoiser": ("external", "edm_v", "inner_model"),
    "Denoiser": ("layers", "edm", "inner_model"),
}


class Network:
    """What is called at every level.

    Attributes:
        denoiser: how the output enters the coefficients.
        wrapped: whether a wrapper was seen through: its inner model takes c_in x.
        ask: (input, t, **extra_args) -> output.
    """

    def __init__(self, denoiser: Denoiser, ask: Callable[..., Tensor], wrapper: Any = None) -> None:
        self.denoiser, self.ask = denoiser, ask
        self.wrapped = wrapper is not None
        self._to_t: Callable[[Tensor], Tensor] | None = getattr(wrapper, "sigma_to_t", None)

    def times(self, sigmas: Tensor, batch: int) -> Tensor:
        """What the model is told at every level: (R,) to (R, B)."""
        t = sigmas if self._to_t is None else self._to_t(sigmas)
        return t[:, None].repeat(1, batch)


def network_of(model: Any) -> Network:
    """Sees through a wrapper where its forward() is upstream's own and nothing is hooked to it."""
    if not callable(model):
        raise TypeError(f"model must be callable, not {type(model).__name__}")
    black_box = Network(Denoiser("sample", "ve"), model)
    if not isinstance(model, torch.nn.Module):
        return black_box
    kind = type(model)
    base = next((cls for cls in kind.__mro__ if _is_wrapper(cls)), None)
    if base is None:
        return black_box
    _, prediction_type, method = WRAPPERS[base.__name__]
    own = ("forward", "get_scalings", "sigma_to_t", "__call__")
    plain = all(getattr(kind, name, None) is getattr(base, name, None) for name in own)
    plain = plain and not any(name in vars(model) for name in own)
    hooked = (
        model._forward_hooks, model._forward_pre_hooks, nn_module._global_forward_hooks,
        nn_module._global_forward_pre_hooks, model._compiled_call_impl,
    )  # fmt: skip
    sigma_data = float(model.sigma_data)  # type: ignore[arg-type]
    if not plain or any(hooked) or (prediction_type == "epsilon" and sigma_data != 1.0):
        return black_box
    denoiser = Denoiser(prediction_type, "vp", sigma_data)
    return Network(denoiser, getattr(model, method), model)


def _is_wrapper(cls: type) -> bool:
    known = WRAPPERS.get(cls.__name__)
    return known is not None and cls.__module__.rpartition(".")[2] == known[0]
