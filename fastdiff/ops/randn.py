"""Normals of the noise contract, written into a tensor."""

from __future__ import annotations

from torch import Tensor

from fastdiff.noise import normals, sample_keys

__all__ = ["randn"]


def randn(
    out: Tensor,
    keys: Tensor | None,
    seed: int,
    sample_offset: int,
    step: int,
    stream: int,
    first_block: int,
    fast: bool,
) -> None:
    """The `randn` operation of the reference backend.

    Args:
        out: (B, ...); element e of entry b becomes element 4 * first_block + e of that sample's
            noise, rounded to out's dtype.
    """
    batch = out.shape[0]
    all_keys = sample_keys(keys, seed, sample_offset, batch, out.device)
    n = out.numel() // batch
    out.copy_(normals(all_keys, step, stream, n, first_block).reshape(out.shape))
