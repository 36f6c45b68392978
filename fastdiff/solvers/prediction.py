"""What a model predicts, as linear forms in (x_t, model output): x_0 and epsilon."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["check_clip", "denoised", "epsilon"]

FloatArray = NDArray[np.float64]
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


def denoised(
    prediction_type: str, alpha_t: FloatArray, sigma_t: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """(p, q) with x_0 = p x_t + q output, from x_t = alpha_t x_0 + sigma_t epsilon.

    epsilon       x_0 = (x_t - sigma_t o) / alpha_t          (Ho et al. 2020, eq. 15)
    sample        x_0 = o
    v_prediction  x_0 = alpha_t x_t - sigma_t o              (Salimans & Ho 2022, appendix D)
    """
    if prediction_type == "epsilon":
        if (alpha_t == 0).any():
            raise ValueError(
                "prediction_type 'epsilon' is undefined where alpha_t is 0 (zero terminal SNR): "
                "use 'v_prediction' or 'sample'"
            )
        return 1.0 / alpha_t, -sigma_t / alpha_t
    if prediction_type == "sample":
        return np.zeros_like(alpha_t), np.ones_like(alpha_t)
    if prediction_type == "v_prediction":
        return np.array(alpha_t), -sigma_t
    raise ValueError(
        f"prediction_type must be one of {', '.join(PREDICTION_TYPES)}, not {prediction_type!r}"
    )


def epsilon(
    prediction_type: str, alpha_t: FloatArray, sigma_t: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """(p, q) with epsilon = p x_t + q output, not clipped; see denoised().

    sample        epsilon = (x_t - alpha_t o) / sigma_t
    v_prediction  epsilon = sigma_t x_t + alpha_t o
    """
    if prediction_type == "epsilon":
        return np.zeros_like(alpha_t), np.ones_like(alpha_t)
    if prediction_type == "sample":
        return 1.0 / sigma_t, -alpha_t / sigma_t
    denoised(prediction_type, alpha_t, sigma_t)  # refuses unknown types
    return np.array(sigma_t), np.array(alpha_t)


def check_clip(clip: Sequence[float] | None) -> tuple[float, float] | None:
    """None, or (lo, hi) with lo < hi."""
    if clip is None:
        return None
    try:
        lo, hi = (float(bound) for bound in clip)
    except (TypeError, ValueError):
        raise TypeError(f"clip must be None or a pair (lo, hi), not {clip!r}") from None
    if not lo < hi:
        raise ValueError(f"clip must have lo < hi, not {clip!r}")
    return lo, hi
