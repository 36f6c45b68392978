"""What exponential integrators in lambda = log(alpha / sigma) share: the phi functions.

Between levels s and t, h = lambda_t - lambda_s (Lu et al. 2022, "DPM-Solver", eq. 3.4, and
"DPM-Solver++", eq. 8):

    noise   x_t = alpha_t/alpha_s x_s - sigma_t int_s^t exp(lambda_t - lambda) epsilon dlambda
    data    x_t = sigma_t/sigma_s x_s + alpha_t int_s^t exp(lambda - lambda_t) x_0 dlambda

A method is what it puts for the model under the integral; its weights are phi functions of h.
"""

from __future__ import annotations

import math

from fastdiff.solvers.grid import Grid

__all__ = ["check_choice", "check_noise_prediction", "phi"]


def phi(k: int, z: float) -> float:
    """phi_k(z) = int_0^1 exp((1 - u) z) u^(k-1) / (k-1)! du, k >= 1.

    phi_1 = (e^z - 1)/z, phi_{k+1} = (phi_k - 1/k!)/z (Hochbruck & Ostermann 2010, section 2), by
    its series where that difference cancels. 0 at -inf.
    """
    if z == -math.inf:
        return 0.0
    if abs(z) < 1:
        term = total = 1 / math.factorial(k)
        for j in range(1, 20):
            term *= z / (j + k)
            total += term
        return total
    value = math.expm1(z) / z
    for j in range(1, k):
        value = (value - 1 / math.factorial(j)) / z
    return value


def check_noise_prediction(levels: Grid) -> None:
    """Refuses levels at which epsilon cannot be integrated."""
    if (levels.alpha[:-1] == 0).any():
        raise ValueError(
            "schedule begins at alpha = 0 (zero terminal SNR), where noise prediction is not "
            "defined: use data prediction"
        )


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")
