"""The Triton kernels: bit for bit the reference in the interpreter, and compiled for every GPU."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiff
from fastdiff.noise import STREAM_CHAIN
from fastdiff.ops.step import StepSpec, step_arguments

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from fastdiff.backends import triton as backend  # noqa: E402
from fastdiff.kernels import chain, launch, noise, randn, step  # noqa: E402
from fastdiff.kernels.policy import Parameters, Policy  # noqa: E402

HERE = Path(__file__).parent
REFERENCE, TRITON = torch.ops.fastdiff_reference, torch.ops.fastdiff_triton
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def poisoned(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    """An output in which an element that is not written shows."""
    return torch.full(shape, torch.nan, dtype=dtype)


def floats(words: list[str]) -> Tensor:
    return torch.tensor([int(word, 16) for word in words]).to(torch.int32).view(F32)


def integers(words: list[str]) -> Tensor:
    return torch.tensor([int(word, 16) for word in words])


def cut(tiles: int, warps: int = 2) -> Policy:
    """Programs of several tiles, each tile of several pieces of 64 * 4 * warps elements."""
    parameters = Parameters(8, warps, tiles)
    return Policy(parameters, parameters, "a test")


# Noise


@triton.jit
def box_muller_kernel(words, out, FAST: tl.constexpr, BLOCK: tl.constexpr):
    pair = tl.arange(0, BLOCK)
    a = tl.load(words + 2 * pair).to(tl.uint32)
    b = tl.load(words + 2 * pair + 1).to(tl.uint32)
    z0, z1 = noise.box_muller(a, b, FAST)
    tl.store(out + 2 * pair, z0)
    tl.store(out + 2 * pair + 1, z1)


def test_box_muller_known_answers(known_answers, assert_same_bits):
    pairs = known_answers["pairs"][:64]  # a power of two; the edge cases come first
    words = torch.stack([integers(pair[:2]) for pair in pairs])
    out = poisoned(64, 2)
    box_muller_kernel[(1,)](words, out, False, 64)
    assert_same_bits(out, torch.stack([floats(pair[2:]) for pair in pairs]))


def test_fast_box_muller_is_close(known_answers):
    words = torch.randint(0, 2**32, (4096, 2), generator=torch.Generator().manual_seed(0))
    exact, fast = poisoned(4096, 2), poisoned(4096, 2)
    box_muller_kernel[(1,)](words, exact, False, 4096)
    box_muller_kernel[(1,)](words, fast, True, 4096)
    assert (exact - fast).abs().max() < 4e-4


def test_randn_known_answers(known_answers, assert_same_bits):
    for case in known_answers["cases"]:
        out = poisoned(1, case["n"])
        TRITON.randn(
            out, None, case["seed"], case["sample"], case["step"], case["stream"],
            case["first_element"] // 4, False,
        )  # fmt: skip
        count = len(case["normal_bits"])
        assert_same_bits(out[0, :count], floats(case["normal_bits"]))
        total = int((out.view(torch.int32).to(torch.int64) & 0xFFFFFFFF).sum())
        assert total == int(case["sum_of_normal_bits_mod_2_64"])


def test_randn_known_answers_of_an_odd_size(known_answers, assert_same_bits):
    expected = floats(known_answers["odd_ranges"]["normal_bits"]).reshape(3, 7)
    out, narrow = poisoned(3, 7), poisoned(3, 7, dtype=BF16)
    TRITON.randn(out, None, 99, 5, 6, 1, 0, False)
    TRITON.randn(narrow, None, 99, 5, 6, 1, 0, False)
    assert_same_bits(out, expected)
    words = integers(known_answers["odd_ranges"]["bf16_bits"]).to(torch.int16)
    assert_same_bits(narrow, words.view(BF16).reshape(3, 7))


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("n", [1, 3, 7, 127, 1023, 1024, 4097])
def test_randn_is_the_references(n, dtype, assert_same_bits):
    keys = torch.tensor([[-1, 0], [2**63 - 1, 2**32 - 1]])
    actual, expected = poisoned(2, n, dtype=dtype), poisoned(2, n, dtype=dtype)
    TRITON.randn(actual, keys, 0, 0, 2**32 - 1, 4, 2**32 - 2048, False)
    REFERENCE.randn(expected, keys, 0, 0, 2**32 - 1, 4, 2**32 - 2048, False)
    assert_same_bits(actual, expected)


@pytest.mark.parametrize("neighbours", [4, 8])
def test_noise_is_the_same_for_any_tiling(neighbours, monkeypatch, assert_same_bits):
    expected = poisoned(3, 700)
    REFERENCE.randn(expected, None, 5, 0, 0, 0, 0, False)
    for axis_limit in (launch.MAX_GRID_Y, 2):  # with 2, samples go along x
        monkeypatch.setattr(launch, "MAX_GRID_Y", axis_limit)
        out = poisoned(3, 700)
        run = randn.prepare(out, None, 5, 0, 0, 0, 0, False, nvidia=False, policy=cut(1), block=128)
        assert run.grid == ((6, 3) if axis_limit > 2 else (3, 6))
        replace(run, constants={**run.constants, "NEIGHBOURS": neighbours})()
        assert_same_bits(out, expected)


@pytest.mark.parametrize("tiles", [1, 2, 3])
def test_noise_is_the_same_for_any_number_of_tiles_a_program(tiles, assert_same_bits):
    expected, out = poisoned(2, 5 * 128 + 50), poisoned(2, 5 * 128 + 50)
    REFERENCE.randn(expected, None, 5, 0, 0, 0, 0, False)
    # More tiles than the interpreter's one multiprocessor holds, which is 16 of them.
    run = randn.prepare(
        torch.empty(64, 5 * 128 + 50), None, 5, 0, 0, 0, 0, False,
        nvidia=False, policy=cut(tiles), block=128,
    )  # fmt: skip
    programs = 6 // tiles
    assert run.grid == (programs, 64)
    replace(run, grid=(programs, 2), arguments=(out, *run.arguments[1:]))()
    assert_same_bits(out, expected)


# Step


@dataclass(frozen=True)
class Case:
    """A random table for random tensors, a third of its coefficients zero."""

    n: int = 100
    batch: int = 3
    states: int = 2
    outputs: int = 1
    models: int = 1
    clamp: bool = True
    draws: int = 1
    dtype: torch.dtype = F32
    model_dtype: torch.dtype = F32
    out_dtype: torch.dtype = F32
    noise_dtype: torch.dtype = F32
    learned: bool = False
    given_noise: bool = False
    row_per_sample: bool = True
    threshold: bool = False
    keys: bool = False
    draw_table: bool = True
    copies: int = 1
    zeros: float = 0.3
    block: int | None = None
    tiles: int | None = None

    def arguments(self, seed: int) -> tuple[dict[str, Any], list[Tensor], Tensor | None]:
        """The arguments of step_arguments() without the outputs, and these, poisoned."""
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int, dtype: torch.dtype = F32) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        state_bits, o = (1 << self.states) - 1, self.states
        z_bits = ((1 << self.draws) - 1) << (self.states + 2)
        common = state_bits | (1 << o if self.models else 0)
        mask = common | (1 << (o + 1) if self.clamp else 0) | z_bits
        spec = StepSpec(
            self.states, (mask,) * self.outputs, common | z_bits >> 1 if self.clamp else None,
            self.draws, self.noise_dtype, self.learned,
        )  # fmt: skip
        table = random(5, spec.width)
        table[torch.rand(table.shape, generator=generator) < self.zeros] = 0
        table[:, :2] = torch.tensor([-0.7, 0.9])
        shape, channels = (self.batch, self.n), self.n * (2 if self.learned else 1)
        rows = torch.randint(0, 5, (self.batch if self.row_per_sample else 1,), generator=generator)
        keys = torch.tensor([[-7 - b, 2**32 - 1 - b] for b in range(self.batch)])
        draws = torch.randint(0, 2**32, (5, self.draws, 2), generator=generator)
        arguments = dict(
            spec=spec,
            states=[random(*shape, dtype=self.dtype) for _ in range(self.states)],
            model_outputs=[
                random(self.batch, channels, dtype=self.model_dtype) for _ in range(self.models)
            ],
            noise=[random(*shape, dtype=self.dtype) for _ in range(self.draws * self.given_noise)],
            table=table,
            rows=rows,
            keys=keys if self.keys else None,
            draws=draws if self.draw_table else None,
            guidance_scale=random(self.batch) if self.models == 2 else None,
            threshold=random(1).abs() if self.threshold else None,
            counter=(2**40 + 7, 3, 9, 1),
        )
        out = [poisoned(*shape, dtype=self.out_dtype) for _ in range(self.outputs)]
        size = self.copies * self.batch
        model_input = poisoned(size, self.n, dtype=self.model_dtype) if size else None
        return arguments, out, model_input


def made(arguments: dict[str, Any], out: list[Tensor], model_input: Tensor | None) -> tuple:
    return step_arguments(**arguments, out=out, model_input=model_input)


CASES = {
    "fp32": Case(),
    "bf16": Case(dtype=BF16, model_dtype=BF16, out_dtype=BF16, noise_dtype=BF16),
    "fp16": Case(dtype=F16, model_dtype=F16, out_dtype=F16, noise_dtype=F16),
    "fp32 state, bf16 model": Case(model_dtype=BF16, noise_dtype=BF16),
    "fp16 state, fp32 model, bf16 out": Case(dtype=F16, out_dtype=BF16, noise_dtype=F16),
    "guidance": Case(models=2, copies=2),
    "guidance bf16": Case(models=2, copies=2, model_dtype=BF16),
    "learned variance": Case(learned=True),
    "learned variance, guidance, fp16": Case(learned=True, models=2, model_dtype=F16, copies=2),
    "no draws, no clamp": Case(draws=0, clamp=False, copies=0),
    "no model output": Case(models=0, outputs=2),
    "noise given": Case(given_noise=True, draws=2, dtype=BF16),
    "two draws": Case(draws=2, keys=True),
    "three draws, counter by value": Case(draws=3, draw_table=False),
    "threshold": Case(threshold=True),
    "one row": Case(row_per_sample=False),
    "six states, four outputs": Case(states=6, outputs=4),
    "dense": Case(zeros=0.0, outputs=3, block=128, n=300),
    "all zero": Case(zeros=1.0, outputs=2),
    "tiles": Case(block=128, n=300, draws=2),
    "tiles without a tail": Case(block=128, n=384, model_dtype=BF16),
    "pieces": Case(n=5000, tiles=3, zeros=0.1),
    "pieces of a dense row": Case(n=7 * 1024 + 300, tiles=3, zeros=0.0),
    "pieces of a dense row, bf16": Case(
        n=7 * 1024 + 301, tiles=2, zeros=0.0, dtype=BF16, model_dtype=BF16, noise_dtype=BF16
    ),
    "whole tiles in turn": Case(n=6 * 1024, tiles=4, zeros=0.0, batch=2),
    "one sample": Case(batch=1, n=2 * 1024 + 5, tiles=1, zeros=0.0, models=2, copies=2),
    "alike": Case(
        batch=5, n=777, draws=0, tiles=2, zeros=0.0, row_per_sample=False, models=1, copies=1
    ),
    "alike, noise given": Case(
        batch=5, n=777, given_noise=True, tiles=2, row_per_sample=False, threshold=True, copies=2
    ),
    **{f"n={n}": Case(n=n, batch=2) for n in (1, 3, 7, 127, 1023, 4097)},
}


@pytest.mark.parametrize("name", CASES)
def test_step_is_the_references(name, assert_same_bits):
    case = CASES[name]
    for seed in range(2):
        arguments, out, model_input = case.arguments(seed)
        REFERENCE.step(*made(arguments, out, model_input))
        expected = [*out, model_input] if case.copies else out
        arguments, out, model_input = case.arguments(seed)
        if case.block is None and case.tiles is None:
            TRITON.step(*made(arguments, out, model_input))
        else:
            policy = None if case.tiles is None else cut(case.tiles)
            run = step.prepare(
                *made(arguments, out, model_input), nvidia=False, policy=policy, block=case.block
            )
            run()
        assert_same_bits([*out, model_input] if case.copies else out, expected)
        assert not torch.cat(out).isnan().any()


def test_offsets_of_64_bits_give_the_same(monkeypatch, assert_same_bits):
    for name in ("guidance", "learned variance", "pieces of a dense row"):
        case = CASES[name]
        arguments, expected, expected_input = case.arguments(0)
        TRITON.step(*made(arguments, expected, expected_input))
        arguments, out, model_input = case.arguments(0)
        monkeypatch.setattr(launch, "LARGE_NUMEL", 1)
        run = step.prepare(*made(arguments, out, model_input), nvidia=False)
        assert run.constants["LARGE"]
        run()
        monkeypatch.undo()
        assert_same_bits([*out, model_input], [*expected, expected_input])


def test_samples_that_are_alike_are_one_long_sample():
    def batch_of(**changes) -> int:
        arguments, out, model_input = Case(**{"row_per_sample": False, **changes}).arguments(0)
        return step.prepare(*made(arguments, out, model_input), nvidia=False).grid[1]

    assert batch_of(draws=0) == batch_of(draws=1, given_noise=True) == 1
    assert batch_of(draws=0, threshold=True) == 1
    assert batch_of(draws=1) == 3  # noise counts elements in its sample
    assert batch_of(draws=0, row_per_sample=True) == 3
    assert batch_of(draws=0, models=2) == 3  # a guidance scale for every sample
    assert batch_of(draws=0, learned=True) == 3


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_step_on_memory_that_is_not_aligned(dtype, assert_same_bits):
    case = Case(dtype=dtype, model_dtype=dtype, out_dtype=dtype, n=1030, batch=2, zeros=0.0)
    arguments, expected, expected_input = case.arguments(0)
    REFERENCE.step(*made(arguments, expected, expected_input))

    def moved(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)

    for name in ("states", "model_outputs"):
        arguments[name] = [moved(t).copy_(t) for t in arguments[name]]
    out, model_input = [moved(t) for t in expected], moved(expected_input)
    TRITON.step(*made(arguments, out, model_input))
    assert_same_bits([*out, model_input], [*expected, expected_input])


def test_step_in_place(assert_same_bits):
    case = Case(states=3, outputs=3, zeros=0.0)
    arguments, out, model_input = case.arguments(0)
    REFERENCE.step(*made(arguments, out, model_input))
    states = arguments["states"]
    TRITON.step(*made(arguments, states, None))
    assert_same_bits(states, out)


def test_step_does_not_read_a_column_of_zero_coefficients():
    case = Case(states=2, models=2, learned=True, draws=1, given_noise=True, copies=0)
    arguments, out, _ = case.arguments(0)
    states, model_outputs, given, table = (
        arguments[name] for name in ("states", "model_outputs", "noise", "table")
    )
    table[:, 5:] = 0
    table[:, 5 + 4] = 2.0  # S0 in the output; P has the four columns S0, S1, o, z before it
    for poison in (states[1], *model_outputs, *given):
        poison.fill_(torch.nan)
    TRITON.step(*made(arguments, out, None))
    assert torch.equal(out[0], states[0] * 2)


def test_step_sum_of_nothing_is_minus_zero():
    arguments, out, _ = Case(zeros=1.0, copies=0).arguments(0)
    TRITON.step(*made(arguments, out, None))
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert out[0].signbit().all()


def test_step_of_a_row_outside_the_table_is_nan():
    arguments, out, model_input = Case(batch=4).arguments(0)
    arguments["rows"] = torch.tensor([0, -1, 5, 4])
    TRITON.step(*made(arguments, out, model_input))
    for value in (out[0], model_input):
        assert value.isnan().all(dim=1).tolist() == [False, True, True, False]


def test_step_clamp_passes_nan():
    arguments, out, _ = Case(zeros=0.0, copies=0).arguments(0)
    arguments["model_outputs"][0][1, 17] = torch.nan
    TRITON.step(*made(arguments, out, None))
    assert out[0].isnan().nonzero().tolist() == [[1, 17]]


# Chain


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("given", [False, True], ids=["seeded", "noise given"])
def test_chain_is_the_references(dtype, given, assert_same_bits):
    generator = torch.Generator().manual_seed(0)
    x_start = torch.randn(3, 270, generator=generator).to(dtype)
    given_noise = torch.randn(5, 3, 270, generator=generator).to(dtype) if given else None
    table = torch.rand(5, 2, generator=generator)
    table[1, 1] = table[2, 0] = 0
    slots = torch.tensor([1, -1, 2, -1, 0])
    keys = torch.tensor([[2**35, 0], [-3, 1], [4, 2**32 - 1]])
    expected, actual, tiled = (poisoned(3, 3, 270, dtype=dtype) for _ in range(3))
    REFERENCE.chain(x_start, given_noise, table, slots, keys, 0, 0, False, expected)
    TRITON.chain(x_start, given_noise, table, slots, keys, 0, 0, False, actual)
    chain.prepare(
        x_start, given_noise, table, slots, keys, 0, 0, False, tiled, nvidia=False, block=128
    )()
    assert_same_bits([actual, tiled], [expected, expected])


def test_chain_noise_is_that_of_its_stream(assert_same_bits):
    table = torch.tensor([[0.0, 1.0]] * 3)
    out, expected = poisoned(3, 2, 50), poisoned(3, 2, 50)
    TRITON.chain(torch.zeros(2, 50), None, table, torch.arange(3), None, 8, 1, False, out)
    for t in range(3):
        TRITON.randn(expected[t], None, 8, 1, t, STREAM_CHAIN, 0, False)
    assert_same_bits(out, expected)


# The operations as PyTorch sees them


def test_operations_pass_opcheck():
    arguments, out, model_input = Case(n=8, batch=2).arguments(0)
    chained = (torch.zeros(2, 8), None, torch.ones(3, 2), torch.arange(3), None, 1, 0, False)
    torch.library.opcheck(TRITON.randn.default, (torch.zeros(2, 8), None, 1, 0, 0, 0, 0, False))
    torch.library.opcheck(TRITON.step.default, made(arguments, out, model_input))
    torch.library.opcheck(TRITON.chain.default, (*chained, torch.zeros(3, 2, 8)))


def test_nothing_happens_to_empty_tensors():
    arguments, out, model_input = Case(n=0).arguments(0)
    TRITON.step(*made(arguments, out, model_input))
    TRITON.randn(torch.empty(0, 5), None, 0, 0, 0, 0, 0, False)
    TRITON.chain(
        torch.empty(2, 0), None, torch.ones(1, 2), torch.zeros(1, dtype=torch.int64), None, 0, 0,
        False, torch.empty(1, 2, 0),
    )  # fmt: skip


def test_probe_says_why_not(monkeypatch):
    cpu = torch.device("cpu")
    assert backend.probe(cpu, F32) is None
    assert "float64" in backend.probe(cpu, torch.float64)
    assert "mps" in backend.probe(torch.device("mps"), F32)
    if not torch.cuda.is_available():
        assert backend.probe(torch.device("cuda"), F32) == "torch finds no GPU"
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    assert "TRITON_INTERPRET=1" in backend.probe(cpu, F32)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        TRITON.randn(torch.zeros(1, 4), None, 0, 0, 0, 0, 0, False)


def test_probe_misses_what_the_launcher_is_compiled_with(monkeypatch, tmp_path):
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for name in ("CPATH", "C_INCLUDE_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CC", sys.executable)  # a program that is there
    monkeypatch.setattr(backend, "_python_include", lambda: tmp_path)
    assert f"no Python.h in {tmp_path}: install python3-dev" in backend.probe(gpu, F32)
    (tmp_path / "Python.h").touch()
    assert backend.probe(gpu, F32) is None
    monkeypatch.setenv("CC", str(tmp_path / "no-compiler"))
    assert "install gcc or clang" in backend.probe(gpu, F32)


# Ahead-of-time compilation


def environment() -> dict[str, str]:
    """For a process of its own, with Triton's compiler instead of the interpreter."""
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return {**variables, "PYTHONPATH": str(Path(fastdiff.__file__).parent.parent)}


def test_nothing_compiles_anew_from_step_to_step():
    process = subprocess.run(
        [sys.executable, str(HERE / "specialization_check.py")],
        env=environment(), check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert json.loads(process.stdout) == {
        "steps of a plan": 1,
        "other sizes": 1,
        "randn": 1,
        "chain": 1,
        "losses": 3,  # partial sums, totals, gradients
        "other losses": 5,  # and the totals are the same kernel for both
        "odd sizes": 2,  # the check itself sees a difference where there is one
        "another dtype": 2,
    }
