"""The fused step: every backend against the definition, and the definition against NumPy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import fastdiff as fd
from fastdiff.backends import operation
from fastdiff.ops.exp import exp
from fastdiff.ops.step import HEADER, StepSpec, parse, step_arguments, unpack

CPU = torch.device("cpu")


def mask(rows: np.ndarray) -> int:
    return sum(1 << int(k) for k in np.flatnonzero((rows != 0).any(axis=0)))


def make_case(rng: np.random.Generator, n: int, dtype: torch.dtype, force: dict | None = None):
    """A random step: structure, table with zeros, tensors with NaN where nothing may be read."""
    pick = rng.integers
    force = force or {}
    states = force.get("states", int(pick(1, 5)))
    outputs = force.get("outputs", int(pick(1, 4)))
    draws = force.get("draws", int(pick(0, 3)))
    models = force.get("models", int(pick(0, 3)))
    learned = force.get("learned", bool(models and draws and pick(2)))
    clamp = force.get("clamp", bool(pick(2)))
    seeded = force.get("seeded", bool(pick(2)))
    batch, rows_count = int(pick(1, 5)), int(pick(1, 6))
    columns = states + 2 + draws
    usable = np.ones(columns, bool)
    usable[states] = models > 0
    usable[states + 1] = clamp
    model_dtype = torch.float64 if dtype == torch.float64 else \
        [torch.float32, torch.bfloat16, torch.float16, dtype][pick(4)]  # fmt: skip
    compute = torch.float64 if dtype == torch.float64 else torch.float32

    A = rng.normal(size=(rows_count, outputs, columns)) * (
        rng.random((rows_count, outputs, columns)) < 0.7
    )
    A *= usable
    P = rng.normal(size=(rows_count, columns - 1)) * (rng.random((rows_count, columns - 1)) < 0.7)
    P *= np.delete(usable, states + 1)
    spec = StepSpec(
        states=states, outputs=tuple(mask(A[:, r]) for r in range(outputs)),
        clamp=mask(P) if clamp else None, draws=draws, noise_dtype=dtype, learned=learned,
    )  # fmt: skip
    header = np.tile([-0.7, 0.9, 0.0, -2.0, -0.3], (rows_count, 1))
    header[:, 2] = rng.normal(size=rows_count)
    assert header.shape[1] == len(HEADER)
    table = torch.from_numpy(np.concatenate([header, P, A.reshape(rows_count, -1)], axis=1)).to(
        compute
    )
    assert table.shape[1] == spec.width

    generator = torch.Generator().manual_seed(int(pick(1 << 30)))

    def tensor(*shape, of=dtype):
        return torch.randn(shape, generator=generator).to(of)

    rows = torch.from_numpy(pick(0, rows_count, batch if pick(2) else 1))
    used = set()
    for r in range(outputs):
        used |= {k for k in range(columns) if spec.outputs[r] >> k & 1}
    if clamp:
        used |= {k if k <= states else k + 1 for k in range(columns - 1) if spec.clamp >> k & 1}
    state_list = [tensor(batch, n) if k in used else torch.full((batch, n), torch.nan, dtype=dtype)
                  for k in range(states)]  # fmt: skip
    model_list = [tensor(batch, (1 + learned) * n, of=model_dtype) for _ in range(models)]
    noise = [] if seeded else [tensor(batch, n) for _ in range(draws)]
    keys = torch.from_numpy(pick(-(1 << 40), 1 << 40, (batch, 2))) if pick(2) else None
    if keys is not None:
        keys[:, 1] &= 0xFFFFFFFF
    draw_table = torch.from_numpy(pick(0, 1 << 32, (rows_count, draws, 2))) if pick(2) else None
    return dict(
        states=state_list, model_outputs=model_list, noise=noise, table=table, rows=rows, keys=keys,
        draws=draw_table,
        guidance_scale=torch.from_numpy(rng.normal(size=batch if pick(2) else 1)).float()
        if models == 2 else None,
        threshold=torch.from_numpy(rng.random(batch if pick(2) else 1) + 0.3).float()
        if clamp and pick(2) else None,
        spec=spec, counter=(int(pick(-(1 << 60), 1 << 60)), int(pick(1 << 31)), 5, 1),
    ), model_dtype  # fmt: skip


def execute(backend, case, outputs, input_dtype, copies):
    x = case["states"][0]
    out = [torch.full_like(x, torch.nan) for _ in range(outputs)]
    model_input = None
    if copies:
        model_input = torch.full((copies * x.shape[0], x.shape[1]), torch.nan, dtype=input_dtype)
    call = step_arguments(**case, out=out, model_input=model_input)
    operation("step", CPU, case["table"].dtype, backend)(*call)
    return [*out, *([model_input] if copies else [])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("seed", range(12))
def test_random_steps_agree_on_every_backend(accelerated, assert_same_bits, dtype, seed):
    if dtype == torch.float64 and fd.backends.probe(accelerated, CPU, dtype):
        pytest.skip("no float64 on this backend")
    rng = np.random.default_rng([seed, len(str(dtype))])
    for n in (int(rng.integers(1, 40)), int(rng.choice([127, 128, 255, 256, 1000, 4097]))):
        case, model_dtype = make_case(rng, n, dtype)
        count, copies = len(case["spec"].outputs), int(rng.integers(0, 3))
        actual = execute(accelerated, case, count, model_dtype, copies)
        assert_same_bits(actual, execute("reference", case, count, model_dtype, copies))


@pytest.mark.parametrize("structure", [
    dict(models=2, learned=True, clamp=True, draws=2, states=4, outputs=3, seeded=True),
    dict(models=2, learned=False, clamp=False, draws=0, states=1, outputs=1),
    dict(models=1, learned=True, clamp=True, draws=1, states=1, outputs=2, seeded=True),
    dict(models=0, learned=False, clamp=False, draws=1, states=1, outputs=3, seeded=True),
    dict(models=1, learned=False, clamp=True, draws=2, states=2, outputs=2, seeded=False),
])  # fmt: skip
def test_chosen_structures_agree_on_every_backend(accelerated, assert_same_bits, structure):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        case, model_dtype = make_case(np.random.default_rng(7), 515, dtype, structure)
        count = structure["outputs"]
        actual = execute(accelerated, case, count, model_dtype, 2)
        assert_same_bits(actual, execute("reference", case, count, model_dtype, 2))


@pytest.mark.parametrize("seed", range(40))
def test_what_goes_into_the_operation_s_lists_comes_out_of_them(seed):
    """Whatever there is of optional tensors, each is found under its name again."""
    rng = np.random.default_rng(seed)
    dtype = (torch.float32, torch.bfloat16, torch.float16, torch.float64)[seed % 4]
    case, _ = make_case(rng, 3, dtype)
    case["spec"] = replace(case["spec"], fast=bool(seed % 3), noise_dtype=dtype)
    model_input = torch.empty(2) if seed % 2 else None
    out = [torch.empty(1) for _ in case["spec"].outputs]
    inputs, outputs, layout, *counter = step_arguments(**case, out=out, model_input=model_input)
    parsed = parse(layout)
    assert parsed.spec == case["spec"] and tuple(counter) == case["counter"]
    found = unpack(inputs, outputs, parsed)._asdict()
    assert found["model_input"] is model_input
    for name in ("states", "model_outputs", "noise"):
        assert list(map(id, found[name])) == list(map(id, case[name]))
    for name in ("table", "rows", "keys", "draws", "guidance_scale", "threshold"):
        assert found[name] is case[name]
    assert list(map(id, found["out"])) == list(map(id, out))


def test_known_layouts():
    """csrc/bindings/ops.cpp reads these digits."""
    spec = StepSpec(2, (0b1011, 0b1), 0b101, 1, torch.float16, learned=True)
    assert spec.layout(1, 0, keys=True, draws=True) == "1032160005000b0001"
    assert StepSpec(1, (0b11,)).layout(2, 0, guidance_scale=True) == "204100-0003"
    given = StepSpec(8, (0x3FFF,), 0, 4, torch.float64, fast=True)
    assert given.layout(0, 4, threshold=True) == "04884b00003fff"


def test_more_columns_than_a_mask_has_bits_are_refused():
    with pytest.raises(ValueError, match="at most 16 columns, not 17"):
        StepSpec(states=11, outputs=(1,), draws=4)


def test_states_may_be_overwritten(accelerated, assert_same_bits):
    """Outputs that are the states themselves: every element is read before it is written."""
    for seed in range(6):
        case, _ = make_case(np.random.default_rng(seed), 777, torch.float32,
                            dict(states=3, outputs=3, models=1))  # fmt: skip
        expected = execute("reference", case, 3, torch.float32, 0)
        case["states"] = [s.clone() for s in case["states"]]
        call = step_arguments(**case, out=case["states"])
        operation("step", CPU, torch.float32, accelerated)(*call)
        assert_same_bits(case["states"], expected)


def test_unaligned_memory(accelerated, assert_same_bits):
    case, _ = make_case(np.random.default_rng(3), 301, torch.float32, dict(states=2, models=2))

    def shift(tensors, by):
        moved = []
        for value in tensors:
            room = torch.full((value.numel() + by,), torch.nan, dtype=value.dtype)
            room[by:] = value.flatten()
            moved.append(room[by:].view(value.shape))
        return moved

    count = len(case["spec"].outputs)
    expected = execute("reference", case, count, torch.float32, 0)
    for by in (1, 2, 3):
        for name in ("states", "model_outputs", "noise"):
            case[name] = shift(case[name], by)
        assert_same_bits(execute(accelerated, case, count, torch.float32, 0), expected)


def test_threads_do_not_change_the_bits(assert_same_bits):
    case, _ = make_case(np.random.default_rng(5), 70001, torch.float32,
                        dict(states=1, draws=1, outputs=1, seeded=True))  # fmt: skip
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(execute("native", case, 1, torch.float32, 0))
    finally:
        torch.set_num_threads(before)
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


def numpy_step(case, learned):
    """The formulas of the step in float64, no rounding rules: an independent transcription."""
    f8 = np.float64
    states = [s.double().numpy() for s in case["states"]]
    batch, n = states[0].shape
    table = case["table"].numpy().astype(f8)[np.broadcast_to(case["rows"].numpy(), batch)]
    spec = case["spec"]
    models = [m.double().numpy() for m in case["model_outputs"]]
    o = np.zeros((batch, n))
    scale = 1.0
    if models:
        o = models[0][:, :n]
        if len(models) == 2:
            g = np.broadcast_to(case["guidance_scale"].numpy(), batch)[:, None]
            o = o + g * (models[1][:, :n] - o)
        if learned:
            f = (models[-1][:, n:] + 1) / 2
            scale = np.exp(f * table[:, 4:5] + (1 - f) * table[:, 3:4])
    z = [v.double().numpy() * scale for v in case["noise"]]
    s = [np.nan_to_num(v) for v in states]
    first, columns = 5, len(s) + 2 + spec.draws
    c = np.zeros((batch, n))
    if spec.clamp is not None:
        c = sum(table[:, first + k, None] * v for k, v in enumerate([*s, o, *z]))
        if case["threshold"] is None:
            c = np.clip(c, table[:, 0:1], table[:, 1:2])
        else:
            bound = np.broadcast_to(case["threshold"].numpy(), batch)[:, None].astype(f8)
            c = np.clip(c, -bound, bound) / bound
    first += columns - 1
    return [
        sum(table[:, first + r * columns + k, None] * v for k, v in enumerate([*s, o, c, *z]))
        for r in range(len(spec.outputs))
    ]


@pytest.mark.parametrize("seed", range(20))
def test_the_definition_is_the_formula(seed):
    """Float64 data against NumPy; noise given, as the noise has tests of its own."""
    rng = np.random.default_rng(seed)
    case, _ = make_case(rng, 50, torch.float64, dict(seeded=False))
    spec = case["spec"]
    actual = execute("reference", case, len(spec.outputs), torch.float64, 0)
    for got, expected in zip(actual, numpy_step(case, spec.learned), strict=True):
        np.testing.assert_allclose(
            got.numpy(), np.broadcast_to(expected, got.shape), rtol=1e-11, atol=1e-11
        )


def test_clamp_passes_nan_and_keeps_signed_zero(backend):
    spec = StepSpec(states=1, outputs=(4,), clamp=1)
    table = torch.tensor([[0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]])
    x = torch.tensor([[torch.nan, -0.0, 0.5, -2.0, 3.0, torch.inf, -torch.inf]])
    out = torch.empty_like(x)
    operation("step", CPU, torch.float32)(
        *step_arguments(spec, [x], table, torch.tensor([0]), [out])
    )
    expected = torch.tensor([[torch.nan, -0.0, 0.5, 0.0, 1.0, 1.0, 0.0]])
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out[:, 1:].view(torch.int32), expected[:, 1:].view(torch.int32))


def test_infinities_and_signed_zeros_add_as_ieee_does(backend):
    """A zero coefficient leaves infinity and -0 alone; the sum of nothing is -0."""
    spec = StepSpec(states=2, outputs=(1, 3, 0))
    columns = 4
    table = torch.zeros(1, 5 + columns - 1 + 3 * columns)
    table[0, 2] = 1.0
    table[0, 5 + 3] = 1.0  # out0 = S0
    table[0, 5 + 3 + columns + 1] = 1.0  # out1 = S1: S0's coefficient is zero
    x = torch.tensor([[-0.0, torch.inf, torch.nan]])
    y = torch.tensor([[-0.0, 2.0, 3.0]])
    out = [torch.empty_like(x) for _ in range(3)]
    operation("step", CPU, torch.float32)(
        *step_arguments(spec, [x, y], table, torch.tensor([0]), out)
    )
    assert torch.equal(out[0][:, :2].view(torch.int32), x[:, :2].view(torch.int32))
    assert torch.equal(out[1].view(torch.int32), y.view(torch.int32))
    assert torch.equal(out[2].view(torch.int32), torch.full((1, 3), -0.0).view(torch.int32))


def test_exp_is_exp():
    for dtype, low, high, bound in (
        (torch.float32, -86.9, 87.9, 1.1e-7),
        (torch.float64, -707.0, 708.0, 3e-16),
    ):
        x = torch.linspace(low, high, 300_001, dtype=dtype)
        expected = np.exp(x.numpy().astype(np.longdouble))
        assert np.abs(exp(x).numpy().astype(np.longdouble) / expected - 1).max() < bound
        ends = exp(torch.tensor([-1e9, 1e9, 0.0, -0.0, torch.nan], dtype=dtype))
        assert torch.isfinite(ends[:4]).all() and (ends[2:4] == 1).all() and ends[4].isnan()


def test_known_answers_of_exp():
    """The polynomial is part of the arithmetic contract: these bits may not change."""
    x = torch.tensor([-20.0, -3.5, -1.0, -1e-3, 0.3, 1.0, 2.5, 11.0])
    known = [0x310DA433, 0x3CF76081, 0x3EBC5AB2, 0x3F7FBE7F, 0x3FACC82C, 0x402DF854, 0x4142EB7F,
             0x4769E224]  # fmt: skip
    assert exp(x).view(torch.int32).tolist() == known


def test_exp_has_its_own_derivative():
    x = torch.linspace(-5, 5, 11, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(exp, x)
