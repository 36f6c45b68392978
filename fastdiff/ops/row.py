"""Rows of a coefficient table, as every operation of the reference backend takes them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["index_of", "picked"]


def index_of(table: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows that can be read, 0 in place of those outside the table; and which are inside, bool."""
    inside = (rows >= 0) & (rows < table.shape[0])
    # masked_fill, not torch.where, which would copy its number to the device and wait.
    return rows.masked_fill(~inside, 0), inside


def picked(table: Tensor, rows: Tensor) -> Tensor:
    """table[rows], (B, width) for int64 rows (B,) or (1,); NaN where a row is outside the table."""
    index, inside = index_of(table, rows)
    return table[index].masked_fill(~inside[:, None], torch.nan)
