"""Sums by the tree of `pairwise_sum` (fastdiff/ops/loss.py): neighbours, then neighbouring sums."""

import triton
import triton.language as tl

from fastdiff.kernels.launch import empty_sum


@triton.jit
def pairwise(values, LEVELS: tl.constexpr):
    """Neighbours added, LEVELS times: a tensor 2^LEVELS times shorter."""
    for _ in tl.static_range(LEVELS):
        # A sum of two has but one order; across threads it is a shuffle, where tl.split would
        # go through shared memory.
        values = tl.sum(tl.reshape(values, (values.shape[0] // 2, 2)), axis=1)
    return values


@triton.jit
def total_of(partials, count, n, LEVELS: tl.constexpr):
    """The sum of `count` partial sums in memory, of n elements; they are used up.

    For a program alone with them, which adds 2^LEVELS at a time.
    """
    CHUNK: tl.constexpr = 1 << LEVELS
    while count > 1:
        chunk = tl.full((), 0, tl.int32)
        while chunk * CHUNK < count:
            index = chunk * CHUNK + tl.arange(0, CHUNK)
            mask = index < count
            value = tl.where(mask, tl.load(partials + index, mask=mask), empty_sum(CHUNK))
            tl.store(partials + chunk + tl.arange(0, 1), pairwise(value, LEVELS))
            chunk += 1
        count = chunk
        tl.debug_barrier()  # until every thread sees what others stored
    total = tl.where(n > 0, tl.load(partials), 0.0)
    # Where a sum has no neighbour, for all n but powers of two, the tree adds +0 to it, which only
    # a total of -0 shows.
    if (n & (n - 1)) != 0:
        total = total + 0.0
    return total
