"""Timestep spacings and the section notation."""

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff.schedules import space_timesteps, timestep_spacing

mp = mpmath.mp.clone()
mp.dps = 50


def test_spacings_of_50_steps_are_the_known_ones():
    assert timestep_spacing(1000, 50).tolist() == list(range(980, -1, -20))
    assert timestep_spacing(1000, 50, steps_offset=1).tolist() == list(range(981, 0, -20))
    assert timestep_spacing(1000, 50, "trailing").tolist() == list(range(999, 0, -20))
    assert timestep_spacing(1000, 5, "linspace").tolist() == [999, 749, 500, 250, 0]
    assert timestep_spacing(10, 4, "linspace").tolist() == [9, 6, 3, 0]
    # The table of Lin et al. 2023 for 10 steps, counted from 0.
    assert timestep_spacing(1000, 10, "trailing").tolist() == list(range(999, 0, -100))
    assert timestep_spacing(1000, 10, "leading").tolist() == list(range(900, -1, -100))
    # A tie, decided as the field's float64 arithmetic decides it: 1000 - 3 * 1000 / 48 = 937.5.
    assert timestep_spacing(1000, 48, "trailing")[3] == 936


@pytest.mark.parametrize("T", [1, 2, 7, 100, 1000])
def test_spacings_are_the_formulas_for_every_number_of_steps(T):
    for steps in range(1, T + 1):
        leading = [i * (T // steps) for i in reversed(range(steps))]
        assert timestep_spacing(T, steps, "leading").tolist() == leading
        for spacing in ("linspace", "trailing"):
            got = timestep_spacing(T, steps, spacing)
            assert got.dtype == np.int64
            assert got.size == steps
            assert (np.diff(got) < 0).all()
            assert 0 <= got[-1] <= got[0] < T
            i = np.arange(steps)
            if spacing == "linspace":
                exact = (T - 1) * (1 - i / (steps - 1)) if steps > 1 else np.zeros(1)
            else:
                exact = T - i * T / steps - 1
                assert got[0] == T - 1
            assert np.abs(got - exact).max() <= 0.5 + 1e-9


@pytest.mark.parametrize(
    "T, counts, expected",
    [
        (1000, "ddim50", list(range(0, 1000, 20))),
        (1000, "ddim25", list(range(0, 1000, 40))),
        (10, "ddim4", [0, 3, 6, 9]),
        (300, "1,1,1", [0, 100, 200]),
        (10, 10, list(range(10))),
        (10, "4", [0, 3, 6, 9]),
        (11, [2, 3], [0, 5, 6, 8, 10]),
        (11, (0, 2), [6, 10]),
        (6, [3], [0, 2, 5]),  # 2.5 rounds to even
        (1, 1, [0]),
    ],
)
def test_space_timesteps_reads_the_section_notation(T, counts, expected):
    got = space_timesteps(T, counts)
    assert got.dtype == np.int64
    assert got.tolist() == expected


def test_sections_are_equal_parts_that_keep_their_ends():
    got = space_timesteps(300, "10,15,20")
    assert got.size == 45
    for section, count in enumerate((10, 15, 20)):
        part = got[(got >= 100 * section) & (got < 100 * (section + 1))]
        ideal = 100 * section + 99 * np.arange(count) / (count - 1)
        assert part.size == count
        assert np.abs(part - ideal).max() <= 0.5


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_space_timesteps_increases_and_stays_in_its_sections(data):
    T = data.draw(st.integers(1, 1200))
    number = data.draw(st.integers(1, min(T, 6)))
    sizes = [T // number + (i < T % number) for i in range(number)]
    counts = [data.draw(st.integers(0, size)) for size in sizes]
    counts[0] = max(counts[0], 1)
    got = space_timesteps(T, ",".join(map(str, counts)))
    assert (np.diff(got) > 0).all()
    ends = np.cumsum([0, *sizes])
    assert np.histogram(got, np.r_[ends[:-1], T])[0].tolist() == counts
    assert got.max() < T
