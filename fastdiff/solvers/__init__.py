"""Plan builders: the papers' formulas in float64, one family a file, no loop around a model."""

from .ddim import ddim
from .ddpm import ddpm

__all__ = ["ddim", "ddpm"]
