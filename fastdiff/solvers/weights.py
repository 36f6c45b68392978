"""What the weights of multistep methods are made of: phi functions and Lagrange polynomials.

Exponential integrators work in lambda = log(alpha / sigma). Between levels s and t, with
h = lambda_t - lambda_s (Lu et al. 2022, "DPM-Solver", eq. 3.4, and "DPM-Solver++", eq. 8):

    noise   x_t = alpha_t/alpha_s x_s - sigma_t int_s^t exp(lambda_t - lambda) epsilon dlambda
    data    x_t = sigma_t/sigma_s x_s + alpha_t int_s^t exp(lambda - lambda_t) x_0 dlambda

A method is what it puts for the model under the integral; its weights are phi functions of h.
Adams-Bashforth methods put a polynomial through past slopes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from fastdiff.schedules._values import FloatArray

__all__ = ["adams_weights", "lagrange_polynomials", "phi"]


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


def lagrange_polynomials(nodes: Sequence[float] | FloatArray) -> FloatArray:
    """(k, k): the coefficients, ascending, of the polynomials l_j(u) = sum_m c[j, m] u^m that are 1
    at nodes[j] and 0 at the others."""
    nodes = np.asarray(nodes, np.float64)
    basis = []
    for j, node in enumerate(nodes):
        others = np.delete(nodes, j)
        basis.append(np.polynomial.polynomial.polyfromroots(others) / np.prod(node - others))
    return np.array(basis)


def adams_weights(nodes: FloatArray, end: float) -> FloatArray:
    """int_{nodes[-1]}^{end} l_j(u) du of the Lagrange polynomials over nodes: (k,), exact.

    The weights of slopes at nodes[0] .. nodes[-1] in an Adams-Bashforth step to `end`.
    """
    nodes = np.asarray(nodes)
    scale = end - nodes[-1]
    if scale == 0:
        return np.zeros(len(nodes))
    # Counted in steps from the newest: nothing over- or underflows, nothing cancels.
    basis = lagrange_polynomials((nodes - nodes[-1]) / scale)
    weights: FloatArray = scale * (basis @ (1.0 / np.arange(1, len(nodes) + 1)))
    return weights
