"""The noise contract: known answers, invariances, statistics, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import fastdiff as fd
from fastdiff.backends import operation
from fastdiff.noise import _box_muller, normals, philox4x32

CPU = torch.device("cpu")


def as_signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def hex_bits(words: list[str], dtype: torch.dtype = torch.int32) -> torch.Tensor:
    width = 1 << (8 * torch.empty(0, dtype=dtype).element_size())
    values = [int(word, 16) for word in words]
    return torch.tensor([v - width if v >= width // 2 else v for v in values], dtype=dtype)


def test_known_answers(known_answers, backend):
    """Every stored block, by the operation itself; one lies at the end of a sample's range."""
    for case in known_answers["cases"]:
        block, inside = divmod(case["first_element"], 4)
        z = torch.full((1, inside + case["n"]), torch.nan)
        operation("randn", CPU, torch.float32)(
            z, None, as_signed(case["seed"]), case["sample"], case["step"], case["stream"], block,
            False,
        )  # fmt: skip
        z_bits = z.view(torch.int32)[0, inside:]
        expected = hex_bits(case["normal_bits"])
        assert torch.equal(z_bits[: len(expected)], expected), case["first_element"]
        total = sum(int(v) & 0xFFFFFFFF for v in z_bits) % (1 << 64)
        assert total == int(case["sum_of_normal_bits_mod_2_64"])


def test_known_words_of_philox(known_answers):
    for case in known_answers["cases"]:
        n = len(case["words"]) // 4
        block = torch.arange(n) + case["first_element"] // 4
        fill = torch.full_like(block, 0)
        seed = case["seed"]
        words = philox4x32(
            (block, fill + case["sample"], fill + case["step"], fill + case["stream"]),
            (torch.tensor(seed & 0xFFFFFFFF), torch.tensor(seed >> 32)),
        )
        got = torch.stack(words, dim=1).flatten().tolist()
        assert got == [int(word, 16) for word in case["words"]]


def test_known_pairs_of_box_muller(known_answers):
    """Edge words: u that rounds to 1 (signed zeros), the largest |z|, every quadrant."""
    a, b, z0, z1 = zip(*known_answers["pairs"], strict=True)
    got = _box_muller(*(torch.tensor([int(w, 16) for w in words]) for words in (a, b)))
    assert torch.equal(got[0].view(torch.int32), hex_bits(list(z0)))
    assert torch.equal(got[1].view(torch.int32), hex_bits(list(z1)))


def test_samples_that_are_not_a_multiple_of_four(known_answers, backend):
    odd = known_answers["odd_ranges"]
    z = fd.randn((3, 7), 99, sample_offset=5, step=6, stream=1)
    assert torch.equal(z.view(torch.int32).flatten(), hex_bits(odd["normal_bits"]))
    narrow = fd.randn((3, 7), 99, sample_offset=5, step=6, stream=1, dtype=torch.bfloat16)
    assert torch.equal(narrow.view(torch.int16).flatten(), hex_bits(odd["bf16_bits"], torch.int16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("n", [1, 2, 3, 5, 127, 128, 129, 1000, 4099])
def test_backends_agree(accelerated, assert_same_bits, dtype, n):
    if dtype == torch.float64 and fd.backends.probe(accelerated, CPU, torch.float64):
        pytest.skip("no float64 on this backend")
    out = torch.full((3, n), torch.nan, dtype=dtype)
    fd.randn((3, n), 7, sample_offset=11, step=3, stream=9, out=out, backend=accelerated)
    expected = fd.randn((3, n), 7, sample_offset=11, step=3, stream=9, dtype=dtype,
                        backend="reference")  # fmt: skip
    assert_same_bits(out, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_batch_is_its_samples(backend, assert_same_bits, dtype):
    """Batch of 8 = 8 batches of 1 = split ranks = permuted batch of per-sample seeds."""
    options = dict(step=4, dtype=dtype)
    whole = fd.randn((8, 3, 5, 5), 42, **options)
    singles = [fd.randn((1, 3, 5, 5), 42, sample_offset=b, **options) for b in range(8)]
    assert_same_bits(whole, torch.cat(singles))
    ranks = [fd.randn((4, 3, 5, 5), 42, sample_offset=b, **options) for b in (0, 4)]
    assert_same_bits(whole, torch.cat(ranks))
    seeds = torch.tensor([5, -1, 1 << 40, 0, 9, 2, 3, -(1 << 63)])
    order = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    by_seed = fd.randn((8, 33), seeds)
    assert_same_bits(by_seed[order], fd.randn((8, 33), seeds[order]))
    for b, seed in enumerate(seeds.tolist()):
        assert_same_bits(by_seed[b : b + 1], fd.randn((1, 33), seed % (1 << 64)))


def test_layout_does_not_change_the_noise(backend, assert_same_bits):
    expected = fd.randn((2, 3, 4, 5), 1)
    out = torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert_same_bits(fd.randn((2, 3, 4, 5), 1, out=out), expected)
    view = torch.zeros(2, 3, 4, 11)[..., 1::2]
    fd.randn((2, 3, 4, 5), 1, out=view)
    assert_same_bits(view.contiguous(), expected)
    shifted = torch.full((121,), torch.nan)
    assert_same_bits(fd.randn((2, 3, 4, 5), 1, out=shifted[1:].view(2, 3, 4, 5)), expected)
    assert torch.isnan(shifted[0])


def test_a_sample_without_elements(backend):
    assert fd.randn((3, 0), 0).shape == (3, 0)


def test_accuracy_against_float64():
    """Box-Muller in float64 of the same words: within 7.6e-7 of the contract's normals."""
    keys = torch.tensor([[123, 0]])
    n = 1 << 18
    block = torch.arange(n // 4)
    zero = torch.zeros_like(block)
    words = philox4x32((block, zero, zero, zero), (zero + 123, zero))
    w = torch.stack(words, 1).numpy().astype(np.float64)
    # The uniform as float32 gives it, the angle from the word's lower 30 bits and quadrant.
    u = ((torch.stack(words, 1).numpy() >> 1).astype(np.float32) * np.float32(2.0**-31)
         + np.float32(2.0**-32)).astype(np.float64)  # fmt: skip
    z = normals(keys, 0, 0, n)[0].double().numpy().reshape(-1, 2, 2)
    for half in (0, 1):
        r = np.sqrt(-2 * np.log(u[:, 2 * half]))
        b = w[:, 2 * half + 1].astype(np.int64)
        y = ((b << 2) & 0xFFFFFFFF).astype(np.int64)
        y = np.where(y >= 1 << 31, y - (1 << 32), y) * 2.0**-31
        s, c = np.sin(np.pi / 4 * y), np.cos(np.pi / 4 * y)
        c = np.where(b & 0x80000000, -c, c)
        swap = (b & 0x40000000) != 0
        assert np.abs(z[:, half, 0] - r * np.where(swap, s, c)).max() < 7.6e-7
        assert np.abs(z[:, half, 1] - r * np.where(swap, c, s)).max() < 7.6e-7


# Statistics. The noise is a fixed function, so these are facts about it, not chances: bounds are
# five standard errors, which a fair generator passes but for 6 in 10 million.

N = 1 << 21


@pytest.fixture(scope="module")
def z() -> np.ndarray:
    return fd.randn((1, N), 2024)[0].double().numpy()


def test_moments(z):
    for power, expected in ((1, 0), (2, 1), (3, 0), (4, 3), (5, 0), (6, 15)):
        spread = np.sqrt(stats.norm.moment(2 * power) - expected**2)
        assert abs((z**power).mean() - expected) < 5 * spread / np.sqrt(N), power


def test_tails(z):
    for bound in (1, 2, 3, 4, 4.5):
        p = stats.norm.sf(bound)
        for count in ((z > bound).sum(), (z < -bound).sum()):
            assert abs(count - N * p) < 5 * np.sqrt(N * p), bound
    assert np.abs(z).max() <= 6.66


def test_distribution(z):
    assert stats.kstest(z, "norm").pvalue > 1e-6
    cells = np.histogram(stats.norm.cdf(z), bins=1024, range=(0, 1))[0]
    assert stats.chisquare(cells).pvalue > 1e-6


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 8, 128])
def test_neighbours_are_uncorrelated(z, lag):
    for a, b in ((z[:-lag], z[lag:]), (z[:-lag] ** 2 - 1, z[lag:] ** 2 - 1)):
        correlation = (a * b).mean() / np.sqrt((a * a).mean() * (b * b).mean())
        assert abs(correlation) < 5 / np.sqrt(N)


@pytest.mark.parametrize(
    "other",
    [{"seed": 2025}, {"step": 1}, {"stream": 1}, {"sample_offset": 1}, {"seed": 2024 + (1 << 32)}],
)
def test_adjacent_counters_are_uncorrelated(z, other):
    options = {"seed": 2024} | other
    w = fd.randn((1, N), **options)[0].double().numpy()
    assert abs((z * w).mean()) < 5 / np.sqrt(N)
    assert abs(((z**2 - 1) * (w**2 - 1)).mean()) < 5 * 2 / np.sqrt(N)


# Refusals.


@pytest.mark.parametrize(
    ("arguments", "error", "names"),
    [
        (dict(shape=(2, 3), seed=-1), ValueError, "seed"),
        (dict(shape=(2, 3), seed=1 << 64), ValueError, "seed"),
        (dict(shape=(2, 3), seed=1.0), TypeError, "seed"),
        (dict(shape=(2, 3), seed=True), TypeError, "seed"),
        (dict(shape=(2, 3), seed=torch.tensor([1, 2, 3])), ValueError, "seed"),
        (dict(shape=(2, 3), seed=torch.tensor([1.0, 2.0])), TypeError, "seed"),
        (dict(shape=(2, 3), seed=torch.tensor([1, 2]), sample_offset=1), ValueError, "sample_of"),
        (dict(shape=(2, 3), seed=0, sample_offset=-1), ValueError, "sample_offset"),
        (dict(shape=(2, 3), seed=0, sample_offset=(1 << 32) - 1), ValueError, "sample_offset"),
        (dict(shape=(2, 3), seed=0, step=1 << 32), ValueError, "step"),
        (dict(shape=(2, 3), seed=0, step=0.5), TypeError, "step"),
        (dict(shape=(2, 3), seed=0, stream=-1), ValueError, "stream"),
        (dict(shape=(), seed=0), ValueError, "shape"),
        (dict(shape=(0, 3), seed=0), ValueError, "shape"),
        (dict(shape=(2, -3), seed=0), ValueError, "shape"),
        (dict(shape=(2, 3), seed=0, dtype=torch.int32), TypeError, "dtype"),
        (dict(shape=5, seed=0), TypeError, "shape"),
        (dict(shape=(2.7, 3), seed=0), TypeError, "shape"),
        (dict(shape=(2, 3), seed=0, out=torch.empty(3, 2)), ValueError, "out"),
        (dict(shape=(2, 3), seed=0, out=torch.empty(1, 3).expand(2, 3)), ValueError, "out"),
        (dict(shape=(2, 3), seed=0, backend="cuda"), ValueError, "backend"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(arguments, error, names):
    with pytest.raises(error, match=names):
        fd.randn(**arguments)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, (1 << 64) - 1), offset=st.integers(0, (1 << 32) - 4),
    step=st.integers(0, (1 << 32) - 1), stream=st.integers(0, (1 << 32) - 1), n=st.integers(1, 300),
)  # fmt: skip
def test_any_counter_gives_the_same_bits(seed, offset, step, stream, n):
    options = {"sample_offset": offset, "step": step, "stream": stream}
    native = fd.randn((3, n), seed, backend="native", **options)
    reference = fd.randn((3, n), seed, backend="reference", **options)
    assert torch.equal(native.view(torch.int32), reference.view(torch.int32))
