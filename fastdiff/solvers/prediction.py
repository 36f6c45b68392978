"""What a model predicts: x_0 and epsilon from its output, for x_t = alpha_t x_0 + sigma_t epsilon.

epsilon        x_0 = (x_t - sigma_t o) / alpha_t                (Ho et al. 2020, eq. 15)
sample         epsilon = (x_t - alpha_t o) / sigma_t
v_prediction   x_0 = alpha_t x_t - sigma_t o,   epsilon = sigma_t x_t + alpha_t o
               o = alpha_t epsilon - sigma_t x_0                (Salimans & Ho 2022, appendix D)
flow           x_0 = (x_t - sigma_t o) / (alpha_t + sigma_t)
               epsilon = (x_t + alpha_t o) / (alpha_t + sigma_t)
               o = epsilon - x_0                                (Lipman et al. 2023)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastdiff.schedules._values import FloatArray
from fastdiff.solvers.checks import check_choice, check_clip, check_thresholding
from fastdiff.tracing import LinearForm, Recorder

__all__ = ["PREDICTION_TYPES", "Estimates", "denoised", "epsilon"]

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow")


def denoised(
    prediction_type: str, alpha_t: FloatArray, sigma_t: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """(p, q) with x_0 = p x_t + q output."""
    check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
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
    total = alpha_t + sigma_t
    return 1.0 / total, -sigma_t / total


def epsilon(
    prediction_type: str, alpha_t: FloatArray, sigma_t: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """(e, f) with epsilon = e x_t + f output, not clipped."""
    check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
    if prediction_type == "epsilon":
        return np.zeros_like(alpha_t), np.ones_like(alpha_t)
    if prediction_type == "sample":
        return 1.0 / sigma_t, -alpha_t / sigma_t
    if prediction_type == "v_prediction":
        return np.array(sigma_t), np.array(alpha_t)
    total = alpha_t + sigma_t
    return 1.0 / total, alpha_t / total


class Estimates:
    """What a model's output says of x_0 and epsilon, at levels i = 0 .. R-1.

        x_0 = clip(p_i x + q_i o),   epsilon = (x - alpha_i x_0) / sigma_i

    Without clipping epsilon is the model's own, e_i x + f_i o, not divided by anything.

    Args:
        prediction_type: what o is: "epsilon", "sample", "v_prediction" or "flow".
        alpha, sigma: (R,) of x = alpha x_0 + sigma epsilon.
        clip: (lo, hi) bounds of x_0, or None.
        thresholding: (ratio, largest) of dynamic thresholding instead, or None.
    """

    def __init__(
        self,
        prediction_type: str,
        alpha: FloatArray,
        sigma: FloatArray,
        clip: Sequence[float] | None = None,
        thresholding: Sequence[float] | None = None,
    ) -> None:
        self.clip = check_clip(clip)
        self.thresholding = check_thresholding(thresholding)
        if self.clip is not None and self.thresholding is not None:
            raise ValueError("clip and thresholding exclude each other")
        self.alpha, self.sigma = alpha, sigma
        self.p, self.q = denoised(prediction_type, alpha, sigma)
        self.e, self.f = epsilon(prediction_type, alpha, sigma)

    def __call__(
        self, rec: Recorder, x: LinearForm, o: LinearForm, i: int
    ) -> tuple[LinearForm, LinearForm]:
        """(x_0, epsilon) of the last call, made at level i; x_0 is its preview."""
        x_0 = self.p[i] * x + self.q[i] * o
        if self.clip is not None:
            x_0 = rec.clamp(x_0, *self.clip)
        elif self.thresholding is not None:
            x_0 = rec.threshold(x_0, *self.thresholding)
        rec.preview(x_0)
        if self.clip is None and self.thresholding is None:
            return x_0, self.own_epsilon(x, o, i)
        return x_0, (x - self.alpha[i] * x_0) / self.sigma[i]

    def own_epsilon(self, x: LinearForm, o: LinearForm, i: int) -> LinearForm:
        """The model's epsilon, whatever x_0 is clipped to."""
        return self.e[i] * x + self.f[i] * o
