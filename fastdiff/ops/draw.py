"""randn, as users call it: the noise contract as a tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdiff.backends import operation
from fastdiff.ops.call import compute_dtype, row_major, written
from fastdiff.ops.checks import (
    check_floating,
    check_out,
    check_sample,
    check_shape,
    check_uint32,
    resolve_seed,
)

__all__ = ["randn"]


def randn(
    shape: Sequence[int],
    seed: int | Tensor,
    *,
    sample_offset: int = 0,
    step: int = 0,
    stream: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    out: Tensor | None = None,
    fast: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Standard normals as a pure function of (seed, sample, step, stream, element).

    The same bits on every backend, in any batch split, order or memory layout; see
    fastdiff/noise.py. Entry b of the first dimension is sample (seed, sample_offset + b), or
    (seed[b], 0) for an int64 tensor of seeds.

    Args:
        shape: (B, ...), B >= 1.
        seed: int in [0, 2^64) or int64 (B,).
        sample_offset, step, stream: counters in [0, 2^32); streams are listed in fastdiff/noise.py.
        dtype: float32 normals are rounded to it (float64: widened).
        out: tensor of that shape and dtype to write into; its dtype and device then count.
    """
    sizes = check_shape(shape)
    check_floating("dtype", dtype)
    step, stream = check_uint32("step", step), check_uint32("stream", stream)
    if out is None:
        result = torch.empty(sizes, dtype=dtype, device=device)
        check_sample("shape", result)
    else:
        check_sample("out", out)
        if out.shape != sizes:
            raise ValueError(f"out must have shape {sizes}, not {tuple(out.shape)}")
        check_out("out", out, "shape", out, out.dtype, [])
        result = out
    keys, low, offset = resolve_seed(seed, sample_offset, sizes[0], result.device)
    target = row_major(result)
    operation("randn", result.device, compute_dtype(result.dtype), backend)(
        target, keys, low, offset, step, stream, 0, fast
    )
    if target is not result:
        result.copy_(target)
    if out is not None:
        written([out])
    return result
