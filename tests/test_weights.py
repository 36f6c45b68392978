"""Weights of multistep methods: phi functions, and integrals of Lagrange polynomials."""

from __future__ import annotations

from fractions import Fraction

import mpmath
import numpy as np
import pytest

from fastdiff.solvers.adams import ADAMS_BASHFORTH
from fastdiff.solvers.weights import adams_weights, lagrange_polynomials, phi


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_phi_functions(k):
    for z in (-30.0, -3.0, -1.0, -0.99, -1e-3, -1e-9, 0.0, 1e-9, 0.1, 0.999, 1.0, 2.5, 12.0):
        with mpmath.workdps(40):
            expected = mpmath.hyp1f1(1, k + 1, z) / mpmath.factorial(k)
        assert phi(k, z) == pytest.approx(float(expected), rel=2e-13 if abs(z) < 2 else 1e-14)
    assert phi(k, -np.inf) == 0


def test_lagrange_polynomials_are_1_at_their_node_and_0_at_the_others():
    nodes = [0.3, -1.5, 2.0, 0.0]
    values = np.polynomial.polynomial.polyval(nodes, lagrange_polynomials(nodes).T)
    np.testing.assert_allclose(values, np.eye(4), atol=1e-14)


def exact_weights(nodes, end):
    """The same integrals in rational arithmetic."""
    nodes, end = [Fraction(v) for v in nodes], Fraction(end)
    weights = []
    for j, node in enumerate(nodes):
        poly = [Fraction(1)]
        for k, other in enumerate(nodes):
            if k != j:
                shifted = [Fraction(0), *poly]
                lower = [other * c for c in poly] + [Fraction(0)]
                poly = [(a - b) / (node - other) for a, b in zip(shifted, lower, strict=True)]
        weights.append(
            float(sum(c * (end ** (m + 1) - nodes[-1] ** (m + 1)) / (m + 1)
                      for m, c in enumerate(poly)))
        )  # fmt: skip
    return weights


@pytest.mark.parametrize(
    "nodes",
    [[157.4], [157.4, 88.0], [9.0, 5.5, 3.25], [14.6, 9.7, 6.3, 4.1], [1e-3, 9e-4, 8.5e-4, 7e-4]],
)
@pytest.mark.parametrize("fraction", [0.0, 0.7, 1.0])
def test_lms_weights_are_the_exact_integrals(nodes, fraction):
    end = fraction * nodes[-1]
    got = adams_weights(np.array(nodes), end)
    np.testing.assert_allclose(got, exact_weights(nodes, end), rtol=1e-12)
    assert sum(got) == pytest.approx(end - nodes[-1], rel=1e-13, abs=0)


def test_even_steps_give_the_adams_bashforth_weights():
    for k, weights in enumerate(ADAMS_BASHFORTH, 1):
        got = adams_weights(np.arange(k) * -0.3, -0.3 * k)
        np.testing.assert_allclose(got[::-1], -0.3 * np.array(weights), rtol=1e-13)
