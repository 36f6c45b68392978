"""x_0 and epsilon of a model call, as forms of the recorder."""

from __future__ import annotations

from collections.abc import Sequence

from fastdiff.schedules._values import FloatArray
from fastdiff.solvers.prediction import check_clip, denoised, epsilon
from fastdiff.tracing import LinearForm, Recorder

__all__ = ["Estimates", "check_thresholding"]


class Estimates:
    """What a model's output says of x_0 and epsilon, at levels i = 0 .. R-1.

        x_0 = clip(p_i x + q_i o),   epsilon = (x - alpha_i x_0) / sigma_i

    Without clipping epsilon is the model's own, e_i x + f_i o, not divided by anything.

    Args:
        prediction_type: what o is: "epsilon", "sample", "v_prediction" or "flow", epsilon - x_0.
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
        if prediction_type == "flow":  # o = epsilon - x_0
            total = alpha + sigma
            self.p, self.q, self.e, self.f = 1 / total, -sigma / total, 1 / total, alpha / total
        else:
            self.p, self.q = denoised(prediction_type, alpha, sigma)
            self.e, self.f = epsilon(prediction_type, alpha, sigma)

    def __call__(
        self, rec: Recorder, x: LinearForm, o: LinearForm, i: int
    ) -> tuple[LinearForm, LinearForm]:
        """(x_0, epsilon) of the last call, made at level i; x_0 is its preview."""
        x_0 = self.p[i] * x + self.q[i] * o
        if self.clip is None and self.thresholding is None:
            eps = self.e[i] * x + self.f[i] * o
        else:
            if self.clip is not None:
                x_0 = rec.clamp(x_0, *self.clip)
            elif self.thresholding is not None:
                x_0 = rec.threshold(x_0, *self.thresholding)
            eps = (x - self.alpha[i] * x_0) / self.sigma[i]
        rec.preview(x_0)
        return x_0, eps


def check_thresholding(thresholding: Sequence[float] | None) -> tuple[float, float] | None:
    """None, or (ratio, largest) with 0 <= ratio <= 1 <= largest."""
    if thresholding is None:
        return None
    try:
        ratio, largest = (float(value) for value in thresholding)
    except (TypeError, ValueError):
        raise TypeError(
            f"thresholding must be None or a pair (ratio, largest), not {thresholding!r}"
        ) from None
    if not (0 <= ratio <= 1 and largest >= 1):
        raise ValueError(f"thresholding must have 0 <= ratio <= 1 <= largest, not {thresholding!r}")
    return ratio, largest
