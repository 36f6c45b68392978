"""The native CPU kernels against the reference, as integers, at every SIMD level they have."""

from __future__ import annotations

import ctypes
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdiff.backends import build as builder
from fastdiff.backends import native
from fastdiff.ops.call import pack_table
from fastdiff.ops.step import HEADER, StepSpec, step_arguments

KNOWN = json.loads((Path(__file__).parent / "data" / "noise_kat.json").read_text())
CPU = torch.device("cpu")
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

reason = native.probe(CPU, torch.float32)
pytestmark = pytest.mark.skipif(reason is not None, reason=f"no native CPU library: {reason}")


@pytest.fixture(params=["none"] if reason else native.isa_levels(), autouse=True)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    best = native.isa()
    yield native.isa(request.param)
    native.isa(best)


def op(backend: str, name: str) -> Any:
    return getattr(getattr(torch.ops, f"fastdiff_{backend}"), name).default


def bits(tensor: Tensor) -> Tensor:
    """As integers; every NaN alike."""
    view = torch.where(tensor.isnan(), torch.nan, tensor.double()).to(tensor.dtype)
    return view.view(INTEGERS[tensor.element_size()])


def assert_same_bits(actual: Tensor, expected: Tensor, what: str = "") -> None:
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    wrong = bits(actual) != bits(expected)
    if wrong.any():
        where = wrong.nonzero()[0].tolist()
        pair = actual[tuple(where)].item(), expected[tuple(where)].item()
        pytest.fail(f"{what}: {int(wrong.sum())} of {wrong.numel()} differ, first {where}: {pair}")


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, offset: int = 0) -> Tensor:
    """Contiguous, full of NaN, `offset` elements off its storage's alignment."""
    count = torch.Size(shape).numel()
    return torch.full((count + offset,), torch.nan, dtype=dtype)[offset:].reshape(shape)


def filled(shape: tuple[int, ...], dtype: torch.dtype, offset: int = 0) -> Tensor:
    return poisoned(shape, dtype, offset).copy_(torch.randn(shape) * 3)


# ---- noise


def test_normals_of_the_known_answers() -> None:
    for case in KNOWN["cases"]:
        first, n = case["first_element"], case["n"]
        out = poisoned((1, n), torch.float32)
        seed = (case["seed"] ^ 1 << 63) - (1 << 63)
        op("native", "randn")(
            out, None, seed, case["sample"], case["step"], case["stream"], first // 4, False
        )
        words = out.view(torch.int32)[0].to(torch.int64) & 0xFFFFFFFF
        known = [int(word, 16) for word in case["normal_bits"]]
        assert words[: len(known)].tolist() == known
        assert int(words.sum()) == int(case["sum_of_normal_bits_mod_2_64"])


def test_box_muller_of_the_known_pairs() -> None:
    pairs = [[int(word, 16) for word in pair] for pair in KNOWN["pairs"]]
    library = ctypes.CDLL(str(builder.build(builder.cpu_target())))
    n = len(pairs)
    words = ctypes.c_uint32 * n
    a, b = words(*(pair[0] for pair in pairs)), words(*(pair[1] for pair in pairs))
    z0, z1 = words(), words()
    library.fastdiff_box_muller(a, b, z0, z1, ctypes.c_int64(n))
    assert list(z0) == [pair[2] for pair in pairs]
    assert list(z1) == [pair[3] for pair in pairs]


def test_samples_of_odd_sizes_in_float32_and_bfloat16() -> None:
    known = KNOWN["odd_ranges"]
    for dtype, key, mask in ((torch.float32, "normal_bits", -1), (torch.bfloat16, "bf16_bits", -1)):
        out = poisoned((3, 7), dtype)
        op("native", "randn")(out, None, 99, 5, 6, 1, 0, False)
        width = 1 << 8 * out.element_size()
        words = [word % width for word in out.view(INTEGERS[out.element_size()]).flatten().tolist()]
        assert words == [int(word, 16) & mask for word in known[key]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_randn_equals_the_reference(dtype: torch.dtype) -> None:
    keys = torch.tensor([[-1, 3], [2**40 + 5, 2**32 - 1], [0, 0]])
    for n in (1, 3, 127, 128, 129, 512, 515, 1029):
        for first_block in (0, 1, 2**32 - 300):
            out, expected = poisoned((3, n), dtype, offset=1), poisoned((3, n), dtype)
            arguments = (keys, 0, 0, 2**32 - 1, 7, first_block, False)
            op("native", "randn")(out, *arguments)
            op("reference", "randn")(expected, *arguments)
            assert_same_bits(out, expected, f"n={n} first_block={first_block}")


# ---- conversions


def identity_step(value: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` through the step 1 * S0 into `dtype`."""
    spec = StepSpec(states=1, outputs=(1,))
    table = torch.zeros(1, spec.width)
    table[0, len(HEADER) + 2] = 1.0
    out = poisoned(tuple(value.shape), dtype)
    rows = torch.zeros(1, dtype=torch.int64)
    op("native", "step")(*step_arguments(spec, [value], table, rows, [out]))
    return out


def test_every_16_bit_pattern_reads_as_torch_reads_it() -> None:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        value = patterns.view(dtype)[None]
        assert_same_bits(identity_step(value, torch.float32), value.float(), str(dtype))
        assert_same_bits(identity_step(value, dtype), value, str(dtype))


def test_float32_rounds_to_16_bits_as_torch_rounds_it() -> None:
    # Every exponent and sign, with mantissas at and around each tie of both types.
    exponents = torch.arange(512, dtype=torch.int64) << 23
    low = torch.tensor([0, 1, 0xFFF, 0x1000, 0x1001, 0x1FFF, 0x2000, 0x3000, 0x7FFF, 0x8000])
    high = torch.tensor([0, 0x10000, 0x18000, 0x7F0000, 0x7FE000, 0x7F8000, 0x400000])
    mantissas = torch.cat([(high[:, None] | low).flatten(), 1 << torch.arange(23)])
    mantissas = torch.cat([mantissas, mantissas - 1, mantissas + 1]).clamp(0, 0x7FFFFF)
    words = (exponents[:, None] | mantissas.unique()).flatten()
    value = words.to(torch.int32).view(torch.float32)[None]
    for dtype in (torch.bfloat16, torch.float16):
        assert_same_bits(identity_step(value, dtype), value.to(dtype), str(dtype))


def test_bfloat16_sums_round_as_torch_rounds_them() -> None:
    # Products that are ties, denormal, zero and infinite, in runs of 16-bit loads and stores.
    spec = StepSpec(states=1, outputs=(1,))
    value = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    for coefficient in (1 + 2**-8, 1 + 2**-7 + 2**-8, 2**-3, -(2**-20), 1.5 * 2**-126, 2.0**100):
        table = torch.zeros(1, spec.width)
        table[0, len(HEADER) + 2] = coefficient
        out = poisoned((1, 2**16), torch.bfloat16)
        rows = torch.zeros(1, dtype=torch.int64)
        op("native", "step")(*step_arguments(spec, [value[None]], table, rows, [out]))
        expected = (value.float() * coefficient).to(torch.bfloat16)[None]
        assert_same_bits(out, expected, f"{coefficient}")


# ---- step


class Case:
    """A random step: structure, table and tensors drawn from one seed."""

    def __init__(self, seed: int, compute: torch.dtype, batch: int, n: int, offset: int = 0):
        choose = random.Random(seed)
        torch.manual_seed(seed)
        states, draws = choose.randint(1, 4), choose.randint(0, 2)
        models = choose.randint(0, 2)
        learned = models > 0 and draws > 0 and choose.random() < 0.4
        clamped = choose.random() < 0.5
        model_bit, clamp_bit = 1 << states, 1 << states + 1
        readable = (1 << states + 2 + draws) - 1
        readable &= ~(0 if models else model_bit) & ~(0 if clamped else clamp_bit)
        masks = [choose.getrandbits(16) & readable for _ in range(choose.randint(1, 3))]
        clamp_mask = None
        if clamped:
            below = (1 << states) - 1 | (model_bit if models else 0)
            noise_bits = ((1 << draws) - 1) << states + 1
            clamp_mask = choose.getrandbits(16) & (below | noise_bits)
        dtypes = (torch.float32, torch.bfloat16, torch.float16)
        if compute == torch.float64:
            dtypes = DTYPES
        mixed = choose.random() < 0.5
        common = choose.choice(dtypes)

        def dtype() -> torch.dtype:
            return choose.choice(DTYPES) if mixed else common

        self.spec = StepSpec(
            states=states, outputs=tuple(masks), clamp=clamp_mask, draws=draws,
            noise_dtype=common, learned=learned,
        )  # fmt: skip
        shape = (batch, n, 1)
        self.states = [filled(shape, dtype(), offset) for _ in range(states)]
        model_shape = (batch, 2 * n, 1) if learned else shape
        model_dtype = dtype()
        self.model_outputs = [filled(model_shape, model_dtype, offset) for _ in range(models)]
        self.seeded = choose.random() < 0.6
        noise_dtype = dtype()
        self.noise = [filled(shape, noise_dtype) for _ in range(0 if self.seeded else draws)]
        self.table = torch.randn(5, self.spec.width, dtype=torch.float64).to(compute)
        zeros = torch.rand(5, self.spec.width) < 0.25
        zeros[:, : len(HEADER)] = False
        self.table[zeros] = 0.0
        self.table[:, 0] = -self.table[:, 1].abs()
        self.table[:, 1] = self.table[:, 1].abs()
        self._poison_what_no_row_reads()
        per_sample = choose.random() < 0.5
        self.rows = torch.randint(-1, 6, (batch if per_sample else 1,))
        if not per_sample:
            self.rows.clamp_(0, 4)
        self.keys = torch.randint(-(2**62), 2**62, (batch, 2)) if choose.random() < 0.5 else None
        if self.keys is not None:
            self.keys[:, 1] &= 0xFFFFFFFF
        self.draws = torch.randint(0, 2**32, (5, draws, 2)) if choose.random() < 0.5 else None
        self.guidance = None
        if models == 2:
            self.guidance = torch.randn(choose.choice((1, batch)))
        self.threshold = None
        if clamped and choose.random() < 0.5:
            self.threshold = torch.rand(choose.choice((1, batch))) + 0.5
        self.counter = (choose.getrandbits(62), choose.randint(0, 9), 3, 1)
        self.out_dtypes = [dtype() for _ in masks]
        self.input_copies, self.input_dtype = choose.choice((0, 1, 2)), dtype()
        self.offset = offset

    def _poison_what_no_row_reads(self) -> None:
        """NaN in every tensor and table column that the masks leave out."""
        spec, header = self.spec, len(HEADER)
        used = 0
        table_columns = [(spec.clamp or 0, header, spec.columns - 1)]
        for r, mask in enumerate(spec.outputs):
            used |= mask
            first = header + spec.columns - 1 + r * spec.columns
            table_columns.append((mask, first, spec.columns))
        for mask, first, count in table_columns:
            for column in range(count):
                if not mask >> column & 1:
                    self.table[:, first + column] = torch.nan
        used |= spec.clamp or 0
        for k, state in enumerate(self.states):
            if not used >> k & 1:
                state.fill_(torch.nan)

    def run(
        self, backend: str, out: list[Tensor] | None = None, model_input: Tensor | None = None
    ) -> list[Tensor]:
        shape = tuple(self.states[0].shape)
        if out is None:
            out = [poisoned(shape, dtype, self.offset) for dtype in self.out_dtypes]
        if model_input is None and self.input_copies:
            batch = self.input_copies * shape[0]
            model_input = poisoned((batch, *shape[1:]), self.input_dtype, self.offset)
        op(backend, "step")(*step_arguments(
            self.spec, self.states, self.table, self.rows, out, model_outputs=self.model_outputs,
            noise=self.noise, keys=self.keys, draws=self.draws, guidance_scale=self.guidance,
            threshold=self.threshold, counter=self.counter, model_input=model_input,
        ))  # fmt: skip
        return out + ([] if model_input is None else [model_input])

    def check(self, what: str) -> None:
        for k, (actual, expected) in enumerate(
            zip(self.run("native"), self.run("reference"), strict=True)
        ):
            assert_same_bits(actual, expected, f"{what} output {k} {self.spec}")


@pytest.mark.parametrize("compute", [torch.float32, torch.float64])
def test_random_steps_equal_the_reference(compute: torch.dtype) -> None:
    sizes = ((1, 1), (3, 7), (2, 128), (2, 300), (1, 512), (2, 1027))
    for seed in range(120):
        batch, n = sizes[seed % len(sizes)]
        Case(seed, compute, batch, n, offset=seed % 3).check(f"seed {seed} n={n}")


@pytest.mark.parametrize("source", DTYPES)
def test_clamp_node_between_any_source_and_output_types(source: torch.dtype) -> None:
    # The kernels keep the node in the order that suits the sources, if every reader can take it.
    spec = StepSpec(states=1, outputs=(0b111, 0b101), clamp=0b11)
    table = torch.randn(2, spec.width)
    table[:, 0], table[:, 1] = -0.7, 0.9
    x, uncond, cond = (filled((2, 300), source) for _ in range(3))
    for models in ([uncond], [uncond, cond]):
        guidance = torch.tensor([1.5]) if len(models) == 2 else None
        for first in DTYPES:
            for second in DTYPES:
                results = []
                for backend in ("native", "reference"):
                    out = [poisoned((2, 300), first), poisoned((2, 300), second)]
                    op(backend, "step")(*step_arguments(
                        spec, [x], table, torch.tensor([1, 0]), out, model_outputs=models,
                        guidance_scale=guidance,
                    ))  # fmt: skip
                    results.append(out)
                for actual, expected in zip(*results, strict=True):
                    assert_same_bits(actual, expected, f"{first} {second}")


@pytest.mark.parametrize("compute", [torch.float32, torch.float64])
def test_learned_variance_outside_every_range(compute: torch.dtype) -> None:
    spec = StepSpec(states=1, outputs=(0b1011,), draws=1, learned=True, noise_dtype=compute)
    table = torch.ones(3, spec.width, dtype=compute)
    limits = ((-720.0, 720.0), (-90.0, 90.0), (-1e-3, 1e-4))
    table[:, 3:5] = torch.tensor(limits, dtype=compute)
    v = torch.cat(
        [torch.linspace(-1.2, 1.2, 997), torch.tensor([torch.nan, torch.inf, -torch.inf])]
    )
    output = torch.cat([torch.randn(3, 1000), v.expand(3, -1)], dim=1).to(compute)
    x = torch.randn(3, 1000, dtype=compute)
    results = []
    for backend in ("native", "reference"):
        out = poisoned((3, 1000), compute)
        op(backend, "step")(*step_arguments(
            spec, [x], table, torch.arange(3), [out], model_outputs=[output], counter=(5, 0, 1, 1)
        ))  # fmt: skip
        results.append(out)
    assert_same_bits(*results)


@pytest.mark.parametrize("compute", [torch.float32, torch.float64])
def test_outputs_may_be_the_states_they_replace(compute: torch.dtype) -> None:
    aliased = 0
    for seed in range(80):
        batch, n = ((2, 5), (2, 256), (1, 1500))[seed % 3]
        case = Case(seed, compute, batch, n)
        case.out_dtypes = [  # as many outputs as possible take the place of a state
            case.states[r % len(case.states)].dtype for r in range(len(case.out_dtypes))
        ]
        expected = case.run("reference")
        places = list(range(len(case.states)))
        random.Random(seed).shuffle(places)  # also out[0] in the place of another state
        out = []
        for dtype in case.out_dtypes:
            match = next((k for k in places if case.states[k].dtype == dtype), None)
            if match is None:
                out.append(poisoned((batch, n, 1), dtype))
            else:
                places.remove(match)
                out.append(case.states[match])
                aliased += 1
        for actual, wanted in zip(case.run("native", out=out), expected, strict=True):
            assert_same_bits(actual, wanted, f"seed {seed} {case.spec}")
    assert aliased > 100


def test_the_model_input_may_replace_a_state() -> None:
    for seed in range(40):
        case = Case(seed, torch.float32, 2, 300)
        case.input_copies, case.input_dtype = 1, case.states[0].dtype
        expected = case.run("reference")
        for actual, wanted in zip(
            case.run("native", model_input=case.states[0]), expected, strict=True
        ):
            assert_same_bits(actual, wanted, f"seed {seed} {case.spec}")


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_results_do_not_depend_on_the_number_of_threads(set_threads: Callable[[int], None]) -> None:
    for seed in range(4):
        case = Case(seed, torch.float32, 3, 20001)
        set_threads(1)
        expected = case.run("native")
        set_threads(2)
        actual = case.run("native")
        for a, b in zip(actual, expected, strict=True):
            assert_same_bits(a, b, f"seed {seed}")


def test_noise_and_chains_do_not_depend_on_it_either(set_threads: Callable[[int], None]) -> None:
    table, slots = torch.rand(3, 2), torch.tensor([0, -1, 1])
    x = torch.randn(3, 20001)
    found = []
    for threads in (1, 2, 3):
        set_threads(threads)
        z, states = poisoned((3, 20001), torch.float32), poisoned((2, 3, 20001), torch.float32)
        op("native", "randn")(z, None, 1, 0, 0, 7, 0, False)
        op("native", "chain")(x, None, table, slots, None, 1, 0, False, states)
        found.append((z, states))
    for pair in found[1:]:
        for a, b in zip(pair, found[0], strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_larger_than_the_caches(dtype: torch.dtype) -> None:
    # Guidance without noise: the path that stores past the caches.
    n = (32 << 20) // dtype.itemsize // 2 + 192
    spec = StepSpec(states=1, outputs=(0b11,))
    table = torch.randn(2, spec.width)
    x, uncond, cond = (torch.randn(2, n).to(dtype) for _ in range(3))
    out, expected = poisoned((2, n), dtype), poisoned((2, n), dtype)
    op("native", "step")(*step_arguments(
        spec, [x], table, torch.tensor([1, 0]), [out], model_outputs=[uncond, cond],
        guidance_scale=torch.tensor([7.5]),
    ))  # fmt: skip
    a, b = (table[[1, 0], len(HEADER) + 2 + k, None] for k in (0, 1))
    u, c = uncond.float(), cond.float()
    expected = (a * x.float() + b * (u + 7.5 * (c - u))).to(dtype)
    assert torch.equal(out.view(INTEGERS[dtype.itemsize]), expected.view(INTEGERS[dtype.itemsize]))


def test_mixed_results_larger_than_the_caches() -> None:
    # float32 states and two copies of a bfloat16 model input, each past the caches, with a tail.
    n = (32 << 20) // 4 + 64
    spec = StepSpec(states=1, outputs=(0b11, 0b01))
    table = torch.randn(1, spec.width)
    x, model = torch.randn(1, n), torch.randn(1, n).bfloat16()
    out = [poisoned((1, n), torch.float32) for _ in range(2)]
    model_input = poisoned((2, n), torch.bfloat16)
    op("native", "step")(*step_arguments(
        spec, [x], table, torch.tensor([0]), out, model_outputs=[model], model_input=model_input
    ))  # fmt: skip
    first = spec.columns - 1 + len(HEADER)
    a, b = table[0, first], table[0, first + 1]
    expected = a * x + b * model.float()
    assert torch.equal(out[0].view(torch.int32), expected.view(torch.int32))
    second = table[0, first + spec.columns] * x
    assert torch.equal(out[1].view(torch.int32), second.view(torch.int32))
    wanted = (table[0, 2] * expected).bfloat16().expand(2, -1)
    assert torch.equal(model_input.view(torch.int16), wanted.contiguous().view(torch.int16))


# ---- chain


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seeded", [True, False])
def test_chain_equals_the_reference(dtype: torch.dtype, seeded: bool) -> None:
    steps = 6
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    table = torch.rand(steps, 2, dtype=torch.float64).to(compute)
    table[2, 0] = table[3, 1] = 0.0
    slots = torch.tensor([0, -1, 2, 1, -1, 3])
    for batch, n in ((1, 1), (2, 7), (2, 300), (1, 2050)):
        x = filled((batch, n), dtype, offset=1)
        noise = None if seeded else filled((steps, batch, n), torch.float32)
        out, expected = (poisoned((4, batch, n), dtype) for _ in range(2))
        arguments = (x, noise, table, slots, None, -3, 5, False)
        op("native", "chain")(*arguments, out)
        op("reference", "chain")(*arguments, expected)
        assert_same_bits(out, expected, f"batch={batch} n={n}")


# ---- the module


def test_an_unknown_level_is_refused_with_the_known_ones() -> None:
    before = native.isa()
    with pytest.raises(RuntimeError, match=r"isa must be one of .*portable, not sse9"):
        native.isa("sse9")
    assert native.isa() == before


def test_what_cannot_be_served_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "not for meta" in str(native.probe(torch.device("meta"), torch.float32))
    assert "not in torch.bfloat16" in str(native.probe(CPU, torch.bfloat16))
    monkeypatch.setattr(native, "_state", {})
    monkeypatch.setenv("FASTDIFF_NATIVE", "0")
    assert native.probe(CPU, torch.float32) == "switched off by FASTDIFF_NATIVE=0"
    monkeypatch.setenv("FASTDIFF_NATIVE", "1")
    monkeypatch.setattr(native, "_state", {})

    def no_compiler(*_: object, **__: object) -> Path:
        raise builder.BuildError("no C++ compiler")

    monkeypatch.setattr(builder, "build", no_compiler)
    assert native.probe(CPU, torch.float32) == "build failed: no C++ compiler"
    with pytest.raises(RuntimeError, match="no native CPU kernels: build failed"):
        native.isa()


@pytest.mark.parametrize("mask", [0b010, 0b100])
def test_columns_without_a_tensor_are_refused(mask: int) -> None:
    spec = StepSpec(states=1, outputs=(mask,))
    x, rows = torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="does not have"):
        op("native", "step")(*step_arguments(
            spec, [x], torch.ones(1, spec.width), rows, [torch.zeros(1, 4)]
        ))  # fmt: skip


def test_empty_batches_and_samples_write_nothing() -> None:
    for shape in ((0, 5), (3, 0)):
        out = poisoned(shape, torch.float32)
        op("native", "randn")(out, None, 0, 0, 0, 0, 0, False)
        op("native", "chain")(
            out, None, torch.ones(2, 2), torch.tensor([0, 1]), None, 0, 0, False,
            poisoned((2, *shape), torch.float32),
        )  # fmt: skip


def test_normals_near_the_end_of_the_largest_sample() -> None:
    first_block = 2**32 - 2
    out = poisoned((1, 8), torch.float32)
    op("native", "randn")(out, None, 7, 1, 2, 3, first_block, False)
    whole = poisoned((1, 4 * 600), torch.float32)
    op("reference", "randn")(whole, None, 7, 1, 2, 3, 2**32 - 600, False)
    assert_same_bits(out, whole[:, -8:])


def test_operands_of_another_size_are_refused_by_the_kernel_itself():
    x = torch.zeros(2, 3)
    table = torch.from_numpy(pack_table(1, [np.array([[1.0, 1.0, 0.0]])])).float()
    spec = StepSpec(1, (0b11,))
    rows = torch.zeros(1, dtype=torch.int64)
    for states, outputs in (([x], [torch.ones(1)]), ([torch.ones(1)], [x])):
        with pytest.raises(RuntimeError, match="6 elements each, not 1"):
            torch.ops.fastdiff_native.step(*step_arguments(
                spec, states, table, rows, [torch.empty(2, 3)], model_outputs=outputs
            ))  # fmt: skip


def small_step(**changes: Any) -> tuple[Any, ...]:
    """A step that every optional tensor belongs to: two samples of 3 elements, 4 rows."""
    spec = StepSpec(1, (0b1111,), 0b11, 1)
    x = torch.zeros(2, 3)
    made = dict(
        spec=spec, states=[x], table=torch.ones(4, spec.width),
        rows=torch.zeros(2, dtype=torch.int64), out=[torch.empty(2, 3)], model_outputs=[x, x],
        keys=torch.zeros(2, 2, dtype=torch.int64), draws=torch.zeros(4, 1, 2, dtype=torch.int64),
        guidance_scale=torch.ones(1), threshold=torch.ones(2),
    )  # fmt: skip
    return step_arguments(**{**made, **changes})


@pytest.mark.parametrize(("changes", "reason"), [
    (dict(rows=torch.zeros(3, dtype=torch.int64)), "rows must have 1 or 2 elements, not 3"),
    (dict(rows=torch.zeros(2, dtype=torch.int32)), "rows is of another dtype"),
    (dict(keys=torch.zeros(1, 2, dtype=torch.int64)), "keys must have 4 elements each, not 2"),
    (dict(keys=torch.zeros(2, 2)), "keys is of another dtype"),
    (dict(draws=torch.zeros(3, 1, 2, dtype=torch.int64)), "draws must have 8 elements each"),
    (dict(guidance_scale=torch.ones(3)), "guidance_scale must have 1 or 2 elements, not 3"),
    (dict(guidance_scale=torch.ones(2).double()), "guidance_scale is of another dtype"),
    (dict(threshold=torch.ones(5)), "threshold must have 1 or 2 elements, not 5"),
    (dict(table=torch.ones(4, 9)), "9 columns, which is not the width"),
    (dict(table=torch.ones(0, 12), draws=None), "table must have a row"),
    (dict(model_input=torch.empty(6, 3)), "the batch once or twice"),
    (dict(guidance_scale=None), "two model outputs need guidance_scale"),
    (dict(noise=[torch.zeros(2, 3)] * 2), "expected 1 noise tensors, not 2"),
])  # fmt: skip
def test_tensors_that_do_not_fit_are_refused_by_the_kernel_itself(changes, reason) -> None:
    op("native", "step")(*small_step())
    with pytest.raises(RuntimeError, match=reason):
        op("native", "step")(*small_step(**changes))


@pytest.mark.parametrize(("layout", "reason"), [
    ("", "layout must be"),
    ("20f11", "layout must be"),
    ("20f1100003", "must have an output"),
    ("20f1100003000", "layout must be"),
    ("20f110000300zf", "layout must be"),
    ("20f110-000f", "does not have"),  # the clamp node
    ("20f1100003001f", "does not have"),  # a second draw
    ("20f1100008000f", "does not have"),  # likewise, in the clamp node
    ("20f9100003000f", "at most 8 states, not 9"),
    ("20f1500003000f", "at most 4 draws, not 5"),
    ("30f1100003000f", "at most 2 model outputs, not 3"),
    ("20f1100003" + 9 * "000f", "at most 8 outputs, not 9"),
    ("20f1100003" + 2 * "000f", "more tensors than there are: no outputs"),
    ("20f2100003000f", "table must have|elements each"),
    ("2071100003000f", "more tensors than layout names"),
    ("20f1140003000f", "model outputs must have 12 elements each, not 6"),
])  # fmt: skip
def test_layouts_that_do_not_fit_are_refused_by_the_kernel_itself(layout, reason) -> None:
    inputs, outputs, right, *counter = small_step()
    assert right == "20f1100003000f"
    with pytest.raises(RuntimeError, match=reason):
        op("native", "step")(inputs, outputs, layout, *counter)
