"""Dynamic thresholding's quantile against torch.quantile, and where that does not reach."""

from __future__ import annotations

import math

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff.ops.quantile import threshold_of

WIDE = 1e30  # no upper bound in the way


def randn(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def expected(value, ratio, largest):
    """torch.quantile in float64, of every sample, held in [1, largest], as float32."""
    flat = value.double().abs().reshape(value.shape[0], -1)
    return torch.quantile(flat, ratio, dim=1).clamp(1.0, largest).float()


@settings(max_examples=150, deadline=None)
@given(
    size=st.integers(1, 400), batch=st.integers(1, 4), seed=st.integers(0, 10**6),
    ratio=st.sampled_from([0.0, 1.0, 0.5, 0.995, 0.9, 1 / 3]) | st.floats(0, 1),
    scale=st.sampled_from([0.1, 3.0, 100.0]), largest=st.sampled_from([1.0, 2.5, WIDE]),
    dtype=st.sampled_from([torch.float32, torch.float64]), ties=st.booleans(),
)  # fmt: skip
def test_it_is_torchs_quantile(size, batch, seed, ratio, scale, largest, dtype, ties):
    value = scale * randn(batch, size, seed=seed, dtype=dtype)
    if ties:
        value = value.round()
    actual = threshold_of(value, ratio, largest)
    assert actual.dtype == torch.float32 and actual.shape == (batch,)
    # Interpolated in float64 by both, in another order: a unit of float32 apart at most.
    torch.testing.assert_close(actual, expected(value, ratio, largest), rtol=1.2e-7, atol=0)


@pytest.mark.parametrize("shape", [(3, 3, 7, 5), (2, 1), (4, 2, 2), (1, 3, 9, 11)])
@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.995, 1.0])
def test_samples_have_their_own(shape, ratio):
    value = randn(*shape) * torch.arange(1, shape[0] + 1).view(-1, *[1] * (len(shape) - 1)) * 4
    together = threshold_of(value, ratio, WIDE)
    alone = [threshold_of(value[b : b + 1], ratio, WIDE) for b in range(shape[0])]
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(together, expected(value, ratio, WIDE))
    assert torch.equal(threshold_of(value.transpose(1, -1), ratio, WIDE), together)


def test_the_ends_are_the_smallest_and_the_largest():
    value = torch.tensor([[-7.0, 2.0, 3.0, -5.0, 4.0]])
    assert threshold_of(value, 0.0, WIDE).item() == 2.0
    assert threshold_of(value, 1.0, WIDE).item() == 7.0
    assert threshold_of(value, 0.5, WIDE).item() == 4.0
    assert threshold_of(value, 0.625, WIDE).item() == 4.5  # half way between 4 and 5
    assert threshold_of(value, 1.0, 6.0).item() == 6.0
    assert threshold_of(value / 100, 1.0, 6.0).item() == 1.0
    assert threshold_of(torch.tensor([[3.0], [-2.0]]), 0.3, WIDE).tolist() == [3.0, 2.0]
    # One value of the dtype in all places: no interpolation may leave it.
    same = torch.full((1, 1000), 1.1)
    assert threshold_of(same, 0.123, WIDE).item() == np.float32(1.1)


@pytest.mark.parametrize("ratio", [0.0, 0.4, 0.995, 1.0])
def test_nan_is_the_answer_for_its_sample_only(ratio):
    value = 3 * randn(4, 50)
    value[1, 7] = torch.nan
    value[3, :] = torch.nan
    actual = threshold_of(value, ratio, 1.5)
    assert torch.isnan(actual).tolist() == [False, True, False, True]
    assert torch.equal(actual[::2], expected(value[::2], ratio, 1.5))


def test_samples_without_elements_have_the_least():
    assert threshold_of(torch.zeros(3, 0, 2), 0.9, WIDE).tolist() == [1.0] * 3


def test_infinite_values_are_held_to_the_largest():
    value = randn(1, 101)
    value[0, :40] = math.inf
    value[0, 40:60] = -math.inf
    for ratio in (0.5, 0.9, 0.995, 1.0):
        assert threshold_of(value, ratio, 7.0).item() == 7.0
    assert threshold_of(value, 0.1, 7.0).item() == expected(value, 0.1, 7.0).item()


@pytest.mark.slow
def test_samples_may_be_larger_than_torchs_quantile_allows():
    size = (1 << 24) + 5
    value = torch.arange(size, dtype=torch.float32).remainder_(1 << 12).view(1, -1)
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(value, 0.5)
    # Of 0 .. 4095 in equal shares, and five more of the smallest.
    assert threshold_of(value, 0.9999, WIDE).item() == 4095.0
    assert threshold_of(-value, 1.0, WIDE).item() == 4095.0
    share = size / (1 << 12)
    rank = 0.9995 * (size - 1)
    assert threshold_of(value, 0.9995, WIDE).item() == math.floor((rank - 5) / (share - 5 / 4096))


def test_what_upstream_does_with_it_is_what_the_clamp_node_does():
    """diffusers' own dynamic thresholding, in float64."""
    scheduler = diffusers.DDPMScheduler(thresholding=True, dynamic_thresholding_ratio=0.9)
    value = 2 * randn(3, 3, 6, 6)
    s = threshold_of(value, 0.9, 1.0)[:, None, None, None].double()
    assert torch.equal(s.flatten(), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(
        scheduler._threshold_sample(value), value.clamp(-s, s) / s, rtol=1e-15, atol=0
    )
    scheduler = diffusers.DDPMScheduler(
        thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=50.0
    )
    s = threshold_of(value, 0.9, 50.0)[:, None, None, None].double()
    assert (s > 2).all()
    torch.testing.assert_close(
        scheduler._threshold_sample(value), value.clamp(-s, s) / s, rtol=1e-7, atol=0
    )
