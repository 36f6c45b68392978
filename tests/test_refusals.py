"""Bad input, fuzzed: whatever is wrong, the error names the argument and nothing is written."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastdiff as fd

T = 20
SCHEDULE = fd.schedules.linear(T)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
shapes = st.lists(st.integers(1, 5), min_size=1, max_size=4)


def call(name, x, other, t, **options):
    """The operation with x as its sample and `other` as its second tensor, if it has one."""
    if name == "q_sample":
        return fd.q_sample(x, t, SCHEDULE, noise=other, **options)
    if name == "q_step":
        return fd.q_step(x, t, SCHEDULE, noise=other, **options)
    if name == "q_posterior_mean_variance":
        return fd.q_posterior_mean_variance(other, x, t, SCHEDULE, **options)
    if name == "p_sample":
        return fd.p_sample(other, x, t, SCHEDULE, seed=0, **options)
    return fd.ddim_sample(other, x, t, SCHEDULE, **options)


OPERATIONS = ("q_sample", "q_step", "q_posterior_mean_variance", "p_sample", "ddim_sample")
SECOND = {"q_sample": "noise", "q_step": "noise", "q_posterior_mean_variance": "x_",
          "p_sample": "model_output", "ddim_sample": "model_output"}  # fmt: skip


@st.composite
def bad_calls(draw):
    """(x, other, t, options, words): one thing wrong, and what the message must contain."""
    name = draw(st.sampled_from(OPERATIONS))
    shape = draw(shapes)
    dtype = draw(st.sampled_from(DTYPES))
    x, other = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)
    t, options, batch = torch.zeros(shape[0], dtype=torch.int64), {}, shape[0]
    sample = "x_"
    kind = draw(st.sampled_from([
        "shape", "dtype", "precision", "device", "t range", "t shape", "t dtype", "empty batch",
        "integer sample", "out shape", "out dtype", "out strides", "out overlap", "not a tensor",
    ]))  # fmt: skip
    words = SECOND[name]
    if kind == "shape":
        wrong = draw(shapes.filter(lambda s: s != shape))
        other = torch.zeros(wrong, dtype=dtype)
    elif kind == "dtype":
        bad = draw(st.sampled_from([torch.int64, torch.bool, torch.complex64]))
        other = other.to(bad)
    elif kind == "precision":
        other = other.float() if dtype == torch.float64 else other.double()
    elif kind == "device":
        other = other.to("meta")
    elif kind == "t range":
        t[draw(st.integers(0, batch - 1))] = draw(
            st.sampled_from([-1, T, T + 1, -(1 << 40), 1 << 40])
        )
        words = "^t must"
    elif kind == "t shape":
        t = torch.zeros(
            draw(st.sampled_from([batch + 1, (batch, 1), (1, batch, 1)])), dtype=torch.int64
        )
        words = "^t must"
    elif kind == "t dtype":
        t = t.to(draw(st.sampled_from([torch.float32, torch.bool, torch.complex64])))
        words = "^t must"
    elif kind == "empty batch":
        x, other = x[:0], other[:0]
        words = sample
    elif kind == "integer sample":
        x = x.long()
        words = "x_"
    elif kind == "not a tensor":
        other = draw(st.sampled_from([0, [0.0], "noise"]))
    else:
        words = "out"
        out = torch.zeros(shape, dtype=dtype)
        if kind == "out shape":
            out = torch.zeros([*shape, 2], dtype=dtype)
        elif kind == "out dtype":
            out = out.to(draw(st.sampled_from([d for d in DTYPES if d != dtype])))
        elif kind == "out strides":
            out = torch.zeros([1] * len(shape), dtype=dtype).expand([2, *shape[1:]])
            x, other, t = (v[:1].expand(2, *v.shape[1:]).clone() for v in (x, other, t))
        else:  # overlapping the sample by all but one element
            room = torch.zeros(x.numel() + 1, dtype=dtype)
            x, out = room[:-1].view(shape), room[1:].view(shape)
            if x.numel() == 1:
                x, out = room[:1].view(shape), room[:1].view(shape).to(torch.int64)
        options["out"] = out
    return name, x, other, t, options, words


@settings(deadline=None, max_examples=400)
@given(bad_calls())
def test_every_wrong_argument_is_named_and_nothing_is_written(case):
    name, x, other, t, options, words = case
    out = options.get("out")
    kept = None if out is None else out.clone()
    with pytest.raises((ValueError, TypeError), match=words):
        call(name, x, other, t, **options)
    if kept is not None:
        assert torch.equal(out, kept)


@settings(deadline=None, max_examples=100)
@given(shape=shapes, dtype=st.sampled_from(DTYPES), name=st.sampled_from(OPERATIONS))
def test_the_same_arguments_made_right_are_accepted(shape, dtype, name):
    """The fuzz above fails because of the one wrong thing, not because of the rest."""
    x, out = torch.zeros(shape, dtype=dtype), torch.full(shape, torch.nan, dtype=dtype)
    t = torch.zeros(shape[0], dtype=torch.int64)
    result = call(name, x, torch.zeros(shape, dtype=dtype), t, out=out)
    first = result[0] if isinstance(result, tuple) else result
    assert first is out and torch.isfinite(out).all()


@pytest.mark.parametrize("name", OPERATIONS)
def test_more_than_2_to_31_elements_on_meta(name):
    """Shapes beyond 32-bit indices pass every check and keep shape and dtype."""
    x = torch.empty((3, 1 << 30), device="meta", dtype=torch.bfloat16)
    result = call(name, x, torch.empty_like(x), 5, backend="reference")
    first = result[0] if isinstance(result, tuple) else result
    assert first.shape == x.shape and first.dtype == x.dtype
