"""Linear functionals of a recording's inputs, and the linear algebra of deciding what spans what.

A functional is a vector of its coefficients times the natural sizes of the variables, so that its
norm is its size in images, and it carries the rounding that it may have: what was added up to it,
cancelled or not, times the rounding of float64 (LinearForm.magnitude), and what Gram-Schmidt made
of that since. Whether a part of one is nothing is asked of that alone: first steps from sigma 1e4
mix sizes of which a rounding level relative to the norm knows nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "NOTHING", "NO_VECTOR", "ROUNDING", "Chosen", "Functional", "Space", "independent", "missing",
    "solve", "stacked",
]  # fmt: skip

FloatArray = NDArray[np.float64]
Terms = dict[int, float]

# Rounding of a form by the arithmetic that made it, relative to its magnitude: a few operations.
ROUNDING = 8 * 2.0**-53
# What is left of a functional is nothing when it is less than this many times its rounding, which
# is a bound that Gram-Schmidt adds up, not a guess.
NOTHING = 16.0


@dataclass(eq=False)
class Functional:
    """A linear functional of the inputs; vector is weighted, and ends where its last call does."""

    terms: Terms
    vector: FloatArray
    noise: float

    def __post_init__(self) -> None:
        self.size = math.sqrt(self.vector @ self.vector)


NO_VECTOR = np.zeros(0)


@dataclass
class Space:
    """Functionals, and an orthonormal basis of what they (and others first) span; `noise` is that
    of every basis vector."""

    rows: list[Functional]
    basis: FloatArray
    noise: FloatArray


def stacked(rows: list[Functional], width: int) -> FloatArray:
    matrix = np.zeros((len(rows), width))
    for vector, row in zip(matrix, rows, strict=True):
        vector[: len(row.vector)] = row.vector
    return matrix


def independent(rows: list[Functional], modulo: list[Functional], width: int) -> Space:
    """A largest independent part of the rows, most significant first."""
    if len(rows) == 1 and not modulo:
        (row,) = rows
        return Space(rows, row.vector[None] / row.size, np.array([row.noise / row.size]))
    every = [*modulo, *rows]
    rest = stacked(every, width)
    noise = np.array([row.noise for row in every])
    basis, noises, picked = [], [], []
    candidates = list(range(len(modulo))), list(range(len(modulo), len(every)))
    for left in candidates:
        while left:
            sizes = np.sqrt(np.einsum("ij,ij->i", rest[left], rest[left]))
            significance = sizes / noise[left]
            best = int(significance.argmax())
            if significance[best] <= NOTHING:
                break
            k = left.pop(best)
            vector, level = rest[k] / sizes[best], noise[k] / sizes[best]
            parts = rest @ vector
            rest -= parts[:, None] * vector
            noise += np.abs(parts) * level
            basis.append(vector)
            noises.append(level)
            if k >= len(modulo):
                picked.append(every[k])
    return Space(picked, np.array(basis).reshape(-1, width), np.array(noises))


class Chosen:
    """Directions in the coordinates of a space, the natural ones of it taken as history."""

    def __init__(self, dimension: int, sample: FloatArray) -> None:
        self.basis = np.zeros((0, dimension))
        for coordinates in sample:
            self.add(coordinates, 0.0)

    def add(self, coordinates: FloatArray, least: float) -> bool:
        """Takes in coordinates when at least that part of them is new."""
        rest = coordinates / math.sqrt(coordinates @ coordinates)
        if len(self.basis):
            for _ in range(2):  # once more: Gram-Schmidt loses orthogonality
                rest = rest - (self.basis @ rest) @ self.basis
        length = math.sqrt(rest @ rest)
        if length < least or length == 0.0:
            return False
        self.basis = np.concatenate([self.basis, rest[None] / length])
        return True

    def others(self) -> FloatArray:
        """An orthonormal basis of the directions not taken."""
        if not len(self.basis):
            return np.eye(self.basis.shape[1])
        return np.linalg.svd(self.basis, full_matrices=True)[2][len(self.basis) :]


def solve(target: Functional, sources: dict[int, Functional]) -> dict[int, float]:
    """The a of least squares, target = sum_k a_k source_k."""
    if not sources:
        return {}
    if len(sources) == 1:
        ((k, source),) = sources.items()
        n = min(len(source.vector), len(target.vector))
        best = int(np.abs(source.vector[:n]).argmax())
        return {k: float(target.vector[best] / source.vector[best])}
    width = max(len(f.vector) for f in (target, *sources.values()))
    vector, *matrix = stacked([target, *sources.values()], width)
    sizes = np.array([source.size for source in sources.values()])
    values = np.linalg.lstsq((np.array(matrix) / sizes[:, None]).T, vector, rcond=None)[0]
    nothing = np.abs(values) <= max(1e-13 * target.size, target.noise)
    values = np.where(nothing, 0.0, values / sizes)
    return {k: float(v) for k, v in zip(sources, values, strict=True) if v}


def missing(target: Functional, sources: list[Functional], noisy: float = 0.0) -> float:
    """The size of what no combination of the sources gives, and `noisy` times their rounding."""
    width = max(len(f.vector) for f in (target, *sources))
    (rest,) = stacked([target], width)
    noise = 0.0
    for k, value in solve(target, dict(enumerate(sources))).items():
        vector = sources[k].vector
        rest[: len(vector)] -= value * vector
        noise += abs(value) * sources[k].noise
    return math.sqrt(rest @ rest) + noisy * noise
