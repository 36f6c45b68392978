"""The preconditioned network of EDM and its loss, in one pass.

D(x; sigma) = c_skip x + c_out F(c_in x; c_noise)      (Karras et al. 2022, eq. 7 and table 1)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff.ops.call import compute_dtype
from fastdiff.ops.call_loss import call_loss
from fastdiff.ops.checks import check_like, check_sample
from fastdiff.ops.held import held
from fastdiff.ops.loss import COLUMNS, ERROR, LossSpec
from fastdiff.solvers.checks import check_positive
from fastdiff.training.losses import KINDS, check_kind, check_one, noise_again
from fastdiff.training.tables import NOISE, OUTPUT, X_0, pack_columns

__all__ = ["Scalings", "edm_scalings", "preconditioned_loss"]


class Scalings(NamedTuple):
    """(B,) each, of sigma's dtype."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


def edm_scalings(sigma: Tensor, sigma_data: float = 0.5) -> Scalings:
    """c_skip, c_out, c_in, c_noise of Karras et al. 2022, table 1.

        c_skip = sigma_data^2 / (sigma^2 + sigma_data^2)    c_in = 1 / sqrt(sigma^2 + sigma_data^2)
        c_out = sigma sigma_data c_in                       c_noise = ln(sigma) / 4

    Args:
        sigma: noise levels > 0, floating, any shape.
        sigma_data: deviation of the data, > 0.

    Raises ValueError, TypeError naming the argument.
    """
    if not isinstance(sigma, Tensor) or not sigma.dtype.is_floating_point:
        raise TypeError(f"sigma must be a floating tensor, not {sigma!r}")
    s = check_positive("sigma_data", sigma_data)
    variance = sigma * sigma + s * s
    c_in = variance.rsqrt()
    return Scalings(s * s / variance, sigma * s * c_in, c_in, sigma.log() * 0.25)


def _start_row(delta: float, scale: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    columns = {"e_o": -1.0, "delta": delta, "error_scale": scale}
    return torch.from_numpy(pack_columns(1, columns)).to(device=device, dtype=dtype)


def _count(batch: int, device: torch.device) -> Tensor:
    return torch.arange(batch, device="cpu").to(device)


def preconditioned_loss(
    model_output: Tensor,
    x_start: Tensor,
    sigma: Tensor,
    *,
    sigma_data: float = 0.5,
    seed: int | Tensor | None = None,
    noise: Tensor | None = None,
    step: int = 0,
    sample_offset: int = 0,
    kind: str = "mse",
    delta: float = 1.0,
    reduction: str = "mean",
    fast: bool = False,
    backend: str | None = None,
) -> Tensor:
    """EDM's loss of every sample, of the raw network F at any noise level.

        lambda(sigma) ||D(x_0 + sigma z; sigma) - x_0||^2,
        lambda = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2     (Karras et al. 2022, table 1)

    which is ||F - target||^2, since lambda c_out^2 = 1 (their eq. 8):

        target = (sigma x_0 / sigma_data - sigma_data z) / sqrt(sigma^2 + sigma_data^2)

    Other weights: multiply the result, it is per sample.

    Args:
        model_output: F(c_in x; c_noise), (B, ...), not D.
        x_start: data x_0, (B, ...), in the dtype that the noise was made in.
        sigma: (B,) or (1,) floating, > 0; of a GPU tensor this is not checked, a level that is not
            gives a loss of no meaning.
        sigma_data: deviation of the data, > 0.
        seed, noise, step, sample_offset, fast: z, as in q_sample: stream 2 of the seed.
        kind, delta, reduction, backend: as in `loss`, of target - F.

    Returns:
        (B,) float32, float64 for float64 data; differentiable by model_output, x_start and noise.

    Raises:
        ValueError, TypeError: naming the argument; before anything runs.
    """
    check_sample("model_output", model_output)
    check_like("x_start", x_start, "model_output", model_output)
    batch, device = model_output.shape[0], model_output.device
    if not isinstance(sigma, Tensor) or not sigma.dtype.is_floating_point:
        raise TypeError(f"sigma must be a floating tensor, not {sigma!r}")
    if sigma.shape not in ((batch,), (1,)) or sigma.device != device:
        raise ValueError(
            f"sigma must have shape ({batch},) or (1,) on {device}, not {tuple(sigma.shape)} on "
            f"{sigma.device}"
        )
    plain = type(sigma) is Tensor  # a FakeTensor has no values
    readable = plain and device.type == "cpu" and not torch.compiler.is_compiling()
    if readable and not bool((sigma > 0).all() & sigma.isfinite().all()):
        raise ValueError(f"sigma must be finite and > 0, not {sigma}")
    s = check_positive("sigma_data", sigma_data)
    delta = check_kind(kind, delta, reduction)
    check_one(True, seed=seed, noise=noise)
    z, keys, counter = noise_again(x_start, seed, noise, step, sample_offset)

    scale = 1.0 / max(model_output.numel() // batch, 1) if reduction == "mean" else 1.0
    dtype = compute_dtype(model_output.dtype)
    level = sigma.detach().double()
    inverse = (level * level + s * s).rsqrt()
    table = held("", _start_row, delta, scale, device, dtype).repeat(level.shape[0], 1)
    table[:, COLUMNS.index("e_x")] = (level * inverse / s).to(dtype)
    table[:, COLUMNS.index("e_z")] = (inverse * -s).to(dtype)
    spec = LossSpec(
        ERROR, error=X_0 | OUTPUT | NOISE, rho=KINDS[kind], noise_dtype=x_start.dtype, fast=fast
    )
    return call_loss(
        spec, [model_output], x_start, None, table, held("", _count, level.shape[0], device),
        noise=z, keys=keys, counter=counter, backend=backend,
    )[0]  # fmt: skip
