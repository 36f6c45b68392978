"""The forward chain q(x_{1:T} | x_0) of a diffusion in one pass: x_0 is read once.

    x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) z_t        (Sohl-Dickstein 2015; Ho 2020, eq. 2)

z_t is the noise of stream 4, step t (t counts from 0, as schedules do), rounded to the dtype of
`out`; every x_t is rounded to that dtype before the next, so the chain equals T single q_step
calls bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.noise import STREAM_CHAIN, normals, sample_keys

__all__ = ["chain"]


def chain(
    x_start: Tensor,
    noise: Tensor | None,
    table: Tensor,
    slots: Tensor,
    keys: Tensor | None,
    seed: int,
    sample_offset: int,
    fast: bool,
    out: Tensor,
) -> None:
    """The `chain` operation of the reference backend.

    Args:
        x_start: (B, ...).
        noise: (T, B, ...) or None for seeded noise.
        table: float32 or float64 (T, 2), sqrt(1 - beta_t) and sqrt(beta_t).
        slots: int64 (T,); x after step t goes to out[slots[t]], nowhere when negative.
        out: (K, B, ...), the dtype of x_start.
    """
    batch = x_start.shape[0]
    compute, dtype = table.dtype, out.dtype
    x = x_start.reshape(batch, -1)
    all_keys = sample_keys(keys, seed, sample_offset, batch, x_start.device)
    # Steps that are not kept go to a spare slot: nothing here reads slots on the host.
    kept = out.new_empty((out.shape[0] + 1, batch, x.shape[1]))
    slots = torch.where(slots < 0, out.shape[0], slots)
    for t in range(table.shape[0]):
        if noise is None:
            z = normals(all_keys, t, STREAM_CHAIN, x.shape[1]).to(dtype)
        else:
            z = noise[t].reshape(batch, -1)
        a, b = table[t, 0], table[t, 1]
        acc = torch.where(a != 0, a * x.to(compute), -0.0)
        acc = torch.where(b != 0, acc + b * z.to(compute), acc)
        x = acc.to(dtype)
        kept.index_copy_(0, slots[t : t + 1], x[None])
    out.copy_(kept[:-1].reshape(out.shape))
