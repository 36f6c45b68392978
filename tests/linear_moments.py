"""Mean and variance of what a plan makes of Gaussian data, exactly, from its own coefficients.

With data N(mean, std^2) and x = alpha x_0 + sigma epsilon, E[x_0 | x] is affine in x, so a plan
without clamps maps Gaussian states to Gaussian states.
"""

from __future__ import annotations

import numpy as np

from fastdiff.plan import SolverPlan


def moments(
    plan: SolverPlan, alpha: np.ndarray, sigma: np.ndarray, mean: float, std: float, data: bool
) -> tuple[float, float]:
    """(mean, variance) of the result from x_T with the exact marginal; alpha, sigma (R,) at the
    calls; the model predicts x_0 (data) or epsilon."""
    size = plan.states
    m, C = np.zeros(size), np.zeros((size, size))
    m[0], C[0, 0] = alpha[0] * mean, alpha[0] ** 2 * std**2 + sigma[0] ** 2
    for i in range(plan.rows):
        a, s = alpha[i], sigma[i]
        gain = a * std**2 / (a * a * std**2 + s * s)
        slope, offset = gain, mean - gain * a * mean  # E[x_0 | x] = slope x + offset
        if not data:
            slope, offset = (1 - a * slope) / s, -a * offset / s
        A = plan.A[i]
        M = A[:, :size].copy()
        M[:, 0] += A[:, size] * slope
        m = M @ m + A[:, size] * offset
        C = M @ C @ M.T + A[:, size + 2 :] @ A[:, size + 2 :].T
    return float(m[0]), float(C[0, 0])
