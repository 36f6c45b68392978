"""Drawing bits and bounding them: every backend against the definition, that against float64."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

import fastdiff as fd
from fastdiff.backends import operation
from fastdiff.noise import words
from fastdiff.ops.bits import (
    BOUND_COLUMNS,
    bits_arguments,
    bits_bound_arguments,
    partial_count,
)

CPU = torch.device("cpu")
F32, F64, BF16, F16, U8 = torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8
SIZES = (1, 3, 127, 1024, 1025, 3000)
# (of the logits, of the bits)
DTYPES = ((F32, F32), (F32, U8), (BF16, BF16), (F16, U8), (F16, F32), (F64, F64), (F64, U8))
GUARD = 9  # elements behind an output, which nobody may write


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def coins(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randint(0, 2, shape, generator=generator(seed)).to(dtype)


def logits_of(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 3) -> torch.Tensor:
    """Small and large ones, and where there is room what needs care."""
    values = torch.randn(shape, generator=generator(seed), dtype=F64) * 8
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, 500.0, -500.0, math.nan], dtype=F64)
    if shape[1] > 100:
        values[0, 40 : 40 + len(special)] = special
    return values.to(dtype)


def guarded(*shape: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """An output in which unwritten elements show, and what lies behind it in memory."""
    poison = 7 if dtype == U8 else math.nan
    memory = torch.full((math.prod(shape) + GUARD,), poison, dtype=dtype)
    memory[-GUARD:] = 5
    return memory[:-GUARD].view(shape), memory[-GUARD:]


def probabilities(columns: int, compute: torch.dtype) -> torch.Tensor:
    """Rows of a table of `bits`, with certainties and what is nearly one."""
    table = torch.rand(4, columns, generator=generator(5), dtype=F64)
    table[0, 0], table[0, 1] = 1.0, 0.0
    table[1, 0], table[1, 1] = 1e-9, 1 - 2.0**-24
    return table.to(compute)


def bound_table(compute: torch.dtype) -> torch.Tensor:
    """Random rows, and a first one in which x_0 is known."""
    q = torch.rand(4, 4, generator=generator(6), dtype=F64)
    q[0] = torch.tensor([0, 1, 0, 1], dtype=F64)
    q[1] = torch.tensor([0.02, 0.4, 0.6, 0.99], dtype=F64)
    h = -torch.xlogy(q, q) - torch.xlogy(1 - q, 1 - q)
    scale = torch.tensor([[1.0], [1 / math.log(2)], [3.0], [0.5]], dtype=F64)
    return torch.cat([q, 1 - q, h, scale], dim=1).to(compute)


def draw(backend, logits, x, out_dtype, n, compute, rows, keys=None, counter=(5, 1, 2, 6), batch=3):
    out, guard = guarded(batch, n, dtype=out_dtype)
    table = probabilities(2 if logits is None else 4, compute)
    operation("bits", CPU, compute, backend)(
        *bits_arguments(out, table, rows, logits=logits, x=x, keys=keys, counter=counter)
    )
    assert (guard == 5).all()
    return out


def divergence(backend, logits, x_t, x_start, mixture, rows, gradients=None):
    compute = F64 if logits.dtype == F64 else F32
    batch, n = logits.shape
    name = "bits_bound" if gradients is None else "bits_bound_grad"
    if gradients is None:
        partials = torch.full((batch, partial_count(n)), math.nan, dtype=compute)
        out, guard = guarded(batch, dtype=compute)
        outputs = [out, partials]
    else:
        out, guard = guarded(batch, n, dtype=logits.dtype)
        outputs = [out]
    operation(name, CPU, compute, backend)(
        *bits_bound_arguments(
            outputs, logits, x_t, x_start, bound_table(compute), rows, mixture=mixture,
            gradients=None if gradients is None else gradients.to(compute),
        )
    )  # fmt: skip
    assert (guard == 5).all()
    return out


def dtypes_for(backend: str) -> tuple[tuple[torch.dtype, torch.dtype], ...]:
    """float64 is for the CPU alone; the interpreter is slow, and conversions have other tests."""
    return DTYPES if backend == "native" else DTYPES[:5] if backend == "cuda_host" else DTYPES[:3]


@pytest.mark.parametrize("n", SIZES)
def test_backends_draw_the_same_bits(accelerated, assert_same_bits, n):
    keys = torch.tensor([[1 << 40, 7], [-3, 2**32 - 1], [0, 0]])
    for k, (dtype, bit) in enumerate(dtypes_for(accelerated)):
        compute = F64 if dtype == F64 else F32
        rows = torch.tensor([0, 1, 9]) if k % 2 else torch.tensor([1])  # 9: outside of the table
        logits = logits_of((3, n), dtype)
        for with_logits, with_x in ((0, 0), (0, 1), (1, 0), (1, 1)):
            arguments = (
                logits if with_logits else None, coins((3, n), bit, 1) if with_x else None,
                bit, n, compute, rows, keys if k % 3 == 1 else None,
            )  # fmt: skip
            expected = draw("reference", *arguments)
            assert_same_bits_or_bytes(assert_same_bits, draw(accelerated, *arguments), expected)


def assert_same_bits_or_bytes(assert_same_bits, actual, expected):
    if expected.dtype == U8:
        assert torch.equal(actual, expected)
    else:
        assert_same_bits(actual, expected)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("mixture", [False, True], ids=["previous", "sample"])
def test_backends_bound_alike(accelerated, assert_same_bits, n, mixture):
    for k, (dtype, bit) in enumerate(dtypes_for(accelerated)):
        rows = torch.tensor([0, 1, 9]) if k % 2 else torch.tensor([1])
        logits = logits_of((3, n), dtype)
        arguments = (logits, coins((3, n), bit, 1), coins((3, n), bit, 2), mixture, rows)
        for gradients in (None, torch.tensor([1.0, -2.5, 0.1])):
            expected = divergence("reference", *arguments, gradients)
            assert_same_bits(divergence(accelerated, *arguments, gradients), expected)


def test_neither_threads_nor_batches_change_anything(assert_same_bits):
    n = 9000
    logits, x = logits_of((4, n), F32), coins((4, n), F32, 1)
    rows = torch.tensor([0, 1, 2, 3])
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            drawn = draw("native", logits, x, F32, n, F32, rows, batch=4)
            bound = (logits, x, 1 - x, True, rows)
            gradient = divergence("native", *bound, torch.arange(4.0))
            found.append((drawn, divergence("native", *bound), gradient))
    finally:
        torch.set_num_threads(before)
    for results in found[1:]:
        assert_same_bits(results, found[0])
    half = draw("native", logits[2:], x[2:], F32, n, F32, rows[2:], counter=(5, 3, 2, 6), batch=2)
    assert_same_bits(half, found[0][0][2:])
    assert_same_bits(
        divergence("native", logits[2:], x[2:], 1 - x[2:], True, rows[2:]), found[0][1][2:]
    )


def test_a_bit_is_its_word_against_its_probability_exactly():
    """In rational numbers, for every element; the words beside the threshold decide either way."""
    n = 64
    word = words(torch.tensor([[5, 1]]), 2, 6, n)[0].tolist()
    for compute in (F32, F64):
        for shift in (-1, 0, 1):
            # float64 holds the word's own probability, float32 a neighbour of it.
            p = torch.tensor([[(w + shift) / 2**32, 0.5] for w in word], dtype=F64).to(compute)
            for k in range(n):
                out = torch.empty(1, n, dtype=compute)
                operation("bits", CPU, compute, "native")(
                    *bits_arguments(out, p[k : k + 1], torch.tensor([0]), counter=(5, 1, 2, 6))
                )
                threshold = Fraction(p[k, 0].item()) * 2**32
                assert out[0].tolist() == [float(w < threshold) for w in word]


def test_certain_bits_are_certain_and_others_as_often_as_they_should(backend):
    n = 40000
    for p in (0.0, 2.0**-40, 0.1, 0.5, 0.937, 1.0):
        out = torch.empty(1, n)
        operation("bits", CPU, F32, backend)(
            *bits_arguments(out, torch.tensor([[p, 0.3]]), torch.tensor([0]), counter=(11, 0, 0, 6))
        )
        error = 4 * math.sqrt(p * (1 - p) * n)
        assert abs(float(out.sum()) - p * n) <= error
        assert set(out.unique().tolist()) <= {0.0, 1.0}


def test_words_follow_the_noise_contract():
    """One element is one word of its block's counter; those of normals are the same words."""
    keys = torch.tensor([[1 << 33, 4]])
    found = words(keys, 3, 6, 10)[0]
    for element in range(10):
        counter = tuple(torch.tensor(v) for v in (element // 4, 4, 3, 6))
        block = fd.noise.philox4x32(counter, (torch.tensor(0), torch.tensor(2)))
        assert int(found[element]) == int(block[element % 4])


# ---- the definition


def expected_divergence(logits, x_t, x_start, row, mixture):
    """KL(q || p) in float64, from torch's own logarithms."""
    q_by = row[:4].reshape(2, 2)
    q = q_by[x_t.long(), x_start.long()]
    if mixture:
        s = torch.sigmoid(logits)
        p = q_by[x_t.long(), 0] * (1 - s) + q_by[x_t.long(), 1] * s
    else:
        p = torch.sigmoid(logits)
    entropy = -torch.xlogy(q, q) - torch.xlogy(1 - q, 1 - q)
    return -q * torch.log(p) - (1 - q) * torch.log(1 - p) - entropy


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("mixture", [False, True], ids=["previous", "sample"])
@pytest.mark.parametrize("row", [0, 1, 2])
def test_the_bound_is_the_divergence_and_its_slope_the_derivative(dtype, mixture, row):
    n = 200
    x_t, x_start = coins((1, n), F64, 1), coins((1, n), F64, 2)
    logits = torch.randn(1, n, generator=generator(4), dtype=F64).mul(3).to(dtype)
    table, rows = bound_table(F64), torch.tensor([row])
    exact = logits.double().clone().requires_grad_()
    values = expected_divergence(exact, x_t, x_start, table[row], mixture)
    total = values.sum() * table[row, 12]
    (slope,) = torch.autograd.grad(total, exact)
    total = total.detach()
    given = (logits, x_t.to(dtype), x_start.to(dtype), mixture, rows)
    found = divergence("reference", *given)
    gradient = divergence("reference", *given, torch.ones(1))
    # A sum of terms below 30: each is right to some units of rounding.
    tolerance = 2e-6 if dtype == F32 else 1e-13
    assert abs(float(found) - float(total)) <= tolerance * n
    torch.testing.assert_close(gradient.double(), slope, rtol=0, atol=20 * tolerance)


def test_extreme_logits_give_finite_bounds():
    """-log2 of a probability that rounds to 0: exact for x_{t-1}, at least 87 nats for x_0."""
    logits = torch.tensor([[1000.0], [-1000.0], [60.0], [-60.0]])
    x_start = torch.tensor([[0.0], [1.0], [0.0], [1.0]])
    rows = torch.tensor([0])  # x_0 is known, the scale is 1
    direct = divergence("reference", logits, x_start, x_start, False, rows)
    assert direct.tolist() == [1000.0, 1000.0, 60.0, 60.0]
    mixed = divergence("reference", logits, x_start, x_start, True, rows)
    assert ((mixed >= torch.tensor([87.0, 87.0, 59.99, 59.99])) & (mixed < 88)).all()
    slope = divergence("reference", logits, x_start, x_start, True, rows, torch.ones(4))
    assert slope.flatten().tolist() == pytest.approx([1, -1, 1, -1])


def test_the_native_operations_refuse_what_they_would_read_past():
    logits, table, rows = torch.zeros(2, 9), bound_table(F32), torch.tensor([0])
    x, results = torch.zeros(2, 9), torch.zeros(2)
    native = torch.ops.fastdiff_native
    fd.backends.probe("native", CPU, F32)

    def bound(x_t=x, wide=table, partials=1, row=rows):
        native.bits_bound(
            *bits_bound_arguments(
                [results, torch.zeros(2, partials)], logits, x_t, x, wide, row, mixture=True
            )
        )

    bound()
    assert table.shape[1] == BOUND_COLUMNS
    with pytest.raises(RuntimeError, match="x_t must have 18 elements"):
        bound(x_t=x[:, 1:].contiguous())
    with pytest.raises(RuntimeError, match="13 columns"):
        bound(wide=table[:, 1:].contiguous())
    with pytest.raises(RuntimeError, match="partial sums need"):
        bound(partials=0)
    with pytest.raises(RuntimeError, match="rows must have 1 or 2"):
        bound(row=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="must have 1 or 2"):
        native.bits(*bits_arguments(x, probabilities(2, F32), torch.zeros(3, dtype=torch.int64)))
    with pytest.raises(RuntimeError, match="2 columns"):
        native.bits(*bits_arguments(x, probabilities(4, F32), rows))
    with pytest.raises(RuntimeError, match="more tensors than layout names"):
        native.bits([probabilities(2, F32), rows, x], [x], "000", 0, 0, 0, 0)
