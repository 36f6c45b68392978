"""Bits of the binomial diffusion process (Sohl-Dickstein et al. 2015, appendix B), in one pass.

Every bit of a sample is a Bernoulli variable. With row i = rows[b] of the coefficient table, x the
bit that is conditioned on (0 without it) and l the model's logit, an element is 1 with probability

    p = a[x]                                      without a model: q(x_t | x_0), q(x_t | x_{t-1})
    p = a[x, 0] (1 - s(l)) + a[x, 1] s(l)         s(l) = 1 / (1 + exp(-l))

where a[x, j] = q(x_{t-1} = 1 | x_t = x, x_0 = j) for a model that gives the logit of x_0 = 1, and
a[x, 0] = 0, a[x, 1] = 1 for one that gives the logit of x_{t-1} = 1. `bits` draws it:

    out = 1 if word < 2^32 p else 0               compared exactly: p = 0 never, p = 1 always

word k of counter (block, sample, step, stream) belongs to element 4 * block + k; see noise.py.

`bits_bound` is the divergence of that p from the posterior q = q[x_t, x_0], for every sample:

    scale * sum of KL(q || p),  KL = -h - q log p - (1 - q) log(1 - p),  h the entropy of q in nats

With q[x_t, x_0] = x_0 and h = 0 it is -log p(x_0 | x_1), the last term of the variational bound.
`bits_bound_grad` is its derivative by the logits.

Math in float32 (float64 for a float64 table), exp and log by the polynomials of ops/exp.py and
ops/log.py, elements added by the tree of `pairwise_sum`. A bit is set where its tensor is not 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff.noise import sample_keys, words
from fastdiff.ops.exp import exp
from fastdiff.ops.log import log
from fastdiff.ops.loss import pairwise_sum
from fastdiff.ops.row import picked

__all__ = [
    "BOUND_COLUMNS", "BitsOperands", "bits", "bits_arguments", "bits_bound", "bits_bound_arguments",
    "bits_bound_grad", "partial_count", "unpack",
]  # fmt: skip

# A row of the table of `bits`: a[0], a[1], or with logits a[0, 0], a[0, 1], a[1, 0], a[1, 1].
# A row of the table of `bits_bound`: q, 1 - q and h by [x_t, x_0], and the scale of the sum.
BOUND_COLUMNS = 13
LEAF = 32  # elements whose sum is one entry of the partial sums, at least
LEAST = {torch.float32: 2.0**-126, torch.float64: 2.0**-1022}  # what log takes 0 for


class BitsOperands(NamedTuple):
    """The tensors of `inputs` of bits by name."""

    logits: Tensor | None
    x: Tensor | None
    table: Tensor
    rows: Tensor
    keys: Tensor | None


def bits_arguments(
    out: Tensor,
    table: Tensor,
    rows: Tensor,
    *,
    logits: Tensor | None = None,
    x: Tensor | None = None,
    keys: Tensor | None = None,
    counter: Sequence[int] = (0, 0, 0, 0),
) -> tuple[list[Tensor], list[Tensor], str, int, int, int, int]:
    """The arguments of `bits`. Its layout: three digits, whether there are logits, x and keys.

    Args:
        out: (B, ...), floating or uint8.
        table: float32 or float64, (R, 2) without and (R, 4) with logits.
        rows: int64 (B,) or (1,). A row outside the table gives NaN, in uint8 0; so does a logit
            of NaN.
        logits: floating, of out's shape.
        x: floating or uint8, of out's shape.
        keys: int64 (B, 2), seed and sample of every entry, instead of those in `counter`.
        counter: (seed, sample_offset, step, stream).
    """
    optional = (logits, x, keys)
    layout = "".join(str(int(tensor is not None)) for tensor in optional)
    inputs = [t for t in (logits, x, table, rows, keys) if t is not None]
    return inputs, [out], layout, *counter  # type: ignore[return-value]


def bits_bound_arguments(
    outputs: Sequence[Tensor],
    logits: Tensor,
    x_t: Tensor,
    x_start: Tensor,
    table: Tensor,
    rows: Tensor,
    *,
    mixture: bool,
    gradients: Tensor | None = None,
) -> tuple[list[Tensor], list[Tensor], str, int, int, int, int]:
    """The arguments of `bits_bound`, and with `gradients` those of `bits_bound_grad`.

    Args:
        outputs: of bits_bound: the results (B,) and memory for partial sums (B, partial_count(n)),
            both of the table's dtype. Of bits_bound_grad: one like the logits.
        logits: floating (B, ...).
        x_t, x_start: floating or uint8 (B, ...).
        table: float32 or float64 (R, BOUND_COLUMNS).
        rows: int64 (B,) or (1,); a row outside the table gives NaN.
        mixture: whether the logits are those of x_0 instead of x_{t-1}. It is the layout.
        gradients: (B,) of the table's dtype: the derivative by the results.
    """
    inputs = [t for t in (logits, x_t, x_start, table, rows, gradients) if t is not None]
    return inputs, list(outputs), str(int(mixture)), 0, 0, 0, 0


def partial_count(n: int) -> int:
    """Entries per sample of the buffer of partial sums of n elements: by the 32, and those again.

    A backend may add more at a time and leave the rest of the buffer as it is.
    """
    total, parts = 0, n
    while True:
        parts = -(-parts // LEAF)
        total += parts
        if parts <= 1:
            return max(total, 1)


def unpack(inputs: Sequence[Tensor], layout: str) -> BitsOperands:
    """The inputs of `bits` by name."""
    remaining = iter(inputs)
    logits = next(remaining) if layout[0] == "1" else None
    x = next(remaining) if layout[1] == "1" else None
    table, rows = next(remaining), next(remaining)
    return BitsOperands(logits, x, table, rows, next(remaining) if layout[2] == "1" else None)


def _by_bits(row: Tensor, first: int, x: Tensor, y: Tensor) -> Tensor:
    """Column first + 2 x + y of each sample's row, for bool x and y (B, n)."""
    columns = [row[:, first + k : first + k + 1] for k in range(4)]
    return torch.where(
        x, torch.where(y, columns[3], columns[2]), torch.where(y, columns[1], columns[0])
    )


def _logistic(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(e, a, b) with e = exp(-|l|), 1 - s(l) = a / (1 + e), s(l) = b / (1 + e)."""
    e, one = exp(-logits.abs()), torch.ones_like(logits)
    return e, torch.where(logits > 0, e, one), torch.where(logits < 0, e, one)


def probability(logits: Tensor | None, x: Tensor, row: Tensor) -> Tensor:
    """p of every element, (B, n): logits of the row's dtype or None, x bool, row (B or 1, 2 or 4).

    A sum of terms that are not negative, so nothing cancels and p is at most 1.
    """
    if logits is None:
        return torch.where(x, row[:, 1:2], row[:, 0:1])
    e, a, b = _logistic(logits)
    zero = torch.where(x, row[:, 2:3], row[:, 0:1])
    one = torch.where(x, row[:, 3:4], row[:, 1:2])
    return (zero * a + one * b) / (e + 1.0)


def bits(
    inputs: list[Tensor],
    outputs: list[Tensor],
    layout: str,
    seed: int,
    sample_offset: int,
    step: int,
    stream: int,
) -> None:
    """The `bits` operation of the reference backend."""
    given, (out,) = unpack(inputs, layout), outputs
    batch = out.shape[0]
    n = out.numel() // batch
    row = picked(given.table, given.rows)
    if given.x is None:
        x = torch.zeros((batch, n), dtype=torch.bool, device=out.device)
    else:
        x = given.x.reshape(batch, n) != 0
    logits = None if given.logits is None else given.logits.reshape(batch, n).to(row.dtype)
    p = probability(logits, x, row)
    keys = sample_keys(given.keys, seed, sample_offset, batch, out.device)
    # 32-bit words and 2^32 p are exact in float64.
    drawn = words(keys, step, stream, n).double() < p.double() * 2.0**32
    if out.dtype == torch.uint8:
        out.copy_(drawn.reshape(out.shape))
    else:
        out.copy_(torch.where(torch.isnan(p), torch.nan, drawn.to(p.dtype)).reshape(out.shape))


def _bound(
    logits: Tensor, x_t: Tensor, x_start: Tensor, row: Tensor, mixture: bool
) -> tuple[Tensor, Tensor]:
    """KL(q || p) of every element and its derivative by the logit, (B, n) each.

    log p = log P - log(1 + e) and log(1 - p) = log R - log(1 + e) for a mixture.
    """
    e, a, b = _logistic(logits)
    q = _by_bits(row, 0, x_t, x_start)
    entropy = _by_bits(row, 8, x_t, x_start)
    softplus = log(e + 1.0)
    if not mixture:
        softplus = torch.where(logits > 0, logits, torch.zeros_like(logits)) + softplus
        return softplus - q * logits - entropy, b / (e + 1.0) - q
    unset, set_ = torch.zeros_like(x_t), torch.ones_like(x_t)
    rest = _by_bits(row, 4, x_t, x_start)
    q_0, q_1 = _by_bits(row, 0, x_t, unset), _by_bits(row, 0, x_t, set_)
    rest_0, rest_1 = _by_bits(row, 4, x_t, unset), _by_bits(row, 4, x_t, set_)
    least = LEAST[row.dtype]
    one = q_0 * a + q_1 * b
    one = torch.where(one < least, least, one)
    other = rest_0 * a + rest_1 * b
    other = torch.where(other < least, least, other)
    value = softplus - q * log(one) - rest * log(other) - entropy
    slope = (rest / other - q / one) * (q_1 - q_0) * e / (e + 1.0)
    return value, slope


def bits_bound(
    inputs: list[Tensor],
    outputs: list[Tensor],
    layout: str,
    seed: int,
    sample_offset: int,
    step: int,
    stream: int,
) -> None:
    """The `bits_bound` operation of the reference backend; it draws nothing."""
    elements, row = _elements(inputs)
    value, _ = _bound(*elements, row, layout == "1")
    outputs[0].copy_(pairwise_sum(value) * row[:, 12])


def bits_bound_grad(
    inputs: list[Tensor],
    outputs: list[Tensor],
    layout: str,
    seed: int,
    sample_offset: int,
    step: int,
    stream: int,
) -> None:
    """The `bits_bound_grad` operation of the reference backend."""
    elements, row = _elements(inputs)
    _, slope = _bound(*elements, row, layout == "1")
    weight = inputs[5] * row[:, 12]
    outputs[0].copy_((slope * weight[:, None]).reshape(outputs[0].shape))


def _elements(inputs: Sequence[Tensor]) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Logits, x_t and x_0 of bits_bound as (B, n), and every sample's row."""
    logits, x_t, x_start, table, rows = inputs[:5]
    batch = logits.shape[0]
    flat = logits.reshape(batch, -1).to(table.dtype)
    row = picked(table, rows)
    return (flat, x_t.reshape(batch, -1) != 0, x_start.reshape(batch, -1) != 0), row
