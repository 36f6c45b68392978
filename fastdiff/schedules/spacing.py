"""Which of the T training timesteps a sampler with fewer steps visits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ._values import IntArray, as_int

SPACINGS = ("leading", "linspace", "trailing")


def timestep_spacing(
    T: int, steps: int, spacing: str = "leading", *, steps_offset: int = 0
) -> IntArray:
    """`steps` of the timesteps 0 .. T-1, descending int64 (steps,): the order of sampling.

        leading     t_i = i (T // steps) + steps_offset,        i = steps-1 .. 0
        linspace    t_i = round(i (T - 1)/(steps - 1)),         i = steps-1 .. 0;  [0] for one step
        trailing    t_i = round(T - i T/steps) - 1,             i = 0 .. steps-1

    Lin et al. 2023, table 2; to the timestep what diffusers' DDIM and DDPM schedulers give for
    these names (ties round to even). Leading stays below T-1 and trailing above 0 unless steps is
    large; linspace (from 2 steps on) contains both.

    steps_offset: used by leading only (1 for Stable Diffusion), ignored by the others as upstream.

    Raises TypeError, ValueError unless 1 <= steps <= T, spacing is one of the three, steps_offset
    >= 0 and, for leading, the largest timestep stays below T.
    """
    T = as_int("T", T, 1)
    steps = as_int("steps", steps, 1, T)
    if not isinstance(spacing, str) or spacing not in SPACINGS:
        raise ValueError(f"spacing must be one of {', '.join(SPACINGS)}, got {spacing!r}")
    offset = as_int("steps_offset", steps_offset, 0)
    if spacing == "leading":
        largest = (steps - 1) * (T // steps)
        if largest + offset >= T:
            limit = T - 1 - largest
            raise ValueError(
                f"steps_offset must be <= {limit} for {steps} leading steps of {T}, got {offset}"
            )
        timesteps = np.arange(steps) * (T // steps) + offset
        return timesteps[::-1].astype(np.int64)
    if spacing == "linspace":
        return np.linspace(0, T - 1, steps).round()[::-1].astype(np.int64)
    # arange, rather than i * T / steps, because its rounding decides ties such as 937.5; it may
    # give one entry too many.
    return np.arange(T, 0, -T / steps)[:steps].round().astype(np.int64) - 1


def space_timesteps(T: int, section_counts: int | str | Sequence[int]) -> IntArray:
    """The timesteps to keep in a shorter chain, in the notation of guided-diffusion; ascending.

        250 or "250"             250 of T, evenly: round(j (T - 1)/249)
        [10, 15, 20], "10,15,20" T in 3 equal sections (the first get the remainder), with 10, 15
                                 and 20 evenly spaced timesteps, ends included; 1 gives the first
        "ddim50"                 range(0, T, i) with the smallest integer stride i that gives 50

    Nichol, Dhariwal 2021, section 4 (K evenly spaced numbers between 1 and T); Song, Meng, Ermon
    2021 (DDIM), appendix D.2 for the stride. Returns int64 (sum of counts,), strictly increasing.

    Raises TypeError, ValueError for a malformed string, a count below 0 or above the size of its
    section, no timestep at all, or a stride that does not exist.
    """
    return keep_timesteps("section_counts", as_int("T", T, 1), section_counts)


def keep_timesteps(name: str, T: int, section_counts: Any) -> IntArray:
    """`space_timesteps`, calling the argument `name` in errors."""
    if isinstance(section_counts, str):
        text = section_counts.strip()
        if text.startswith("ddim"):
            return _integer_stride(T, _parse_count(name, section_counts, text[4:]))
        counts = [_parse_count(name, section_counts, part) for part in text.split(",")]
    elif np.ndim(section_counts) == 0:
        counts = [as_int(name, section_counts, 0)]
    else:
        counts = [as_int(f"{name}[{i}]", count, 0) for i, count in enumerate(section_counts)]
    if sum(counts) < 1:
        raise ValueError(f"{name} must keep at least one timestep, got {section_counts!r}")

    sizes = [T // len(counts) + (i < T % len(counts)) for i in range(len(counts))]
    for size, count in zip(sizes, counts, strict=True):
        if count > size:
            raise ValueError(
                f"{name} must fit: {count} timesteps in a section of {size}, got {section_counts!r}"
            )
    starts = np.cumsum([0, *sizes[:-1]])
    kept = []
    for start, size, count in zip(starts, sizes, counts, strict=True):
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        # Summed rather than multiplied: its rounding decides ties, and models were sampled so.
        offsets = np.cumsum([0.0] + [stride] * (count - 1)) if count else np.zeros(0)
        kept.append(start + offsets.round().astype(np.int64))
    return np.concatenate(kept)


def _integer_stride(T: int, count: int) -> IntArray:
    if count >= 1:
        for stride in range(1, T + 1):
            if len(range(0, T, stride)) == count:
                return np.arange(0, T, stride, dtype=np.int64)
    raise ValueError(f"no integer stride through {T} timesteps gives exactly {count}")


def _parse_count(name: str, whole: str, part: str) -> int:
    if not (part.strip().isascii() and part.strip().isdigit()):
        raise ValueError(f'{name} must look like "250", "10,15,20" or "ddim50", got {whole!r}')
    return int(part)
