"""csrc/cuda without a GPU: run on the host against the reference, and compiled for every GPU.

The same kernels.cu is compiled by the C++ compiler and executed (csrc/cuda/host.h), and by nvcc
for each architecture, where registers, spills, access widths and instructions are read off.
"""

from __future__ import annotations

import importlib.util
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

from fastdiff.backends import build
from fastdiff.backends.toolchain import find_compiler
from fastdiff.ops.step import HEADER, StepSpec

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
HERE = Path(__file__).parent
CSRC = build.source_root()
ARCHS = ("75", "80", "86", "89", "90", "100", "120")


# ---- on the host, against the reference


@pytest.fixture
def both(cuda_host: str, assert_same_bits: Any) -> Any:
    """Runs an operation in both, into NaN-filled tensors, and compares what it wrote."""

    def check(name: str, call: Any) -> None:
        results = []
        for backend in (cuda_host, "reference"):
            written: list[Tensor] = []
            call(getattr(getattr(torch.ops, f"fastdiff_{backend}"), name).default, written)
            results.append(written)
        assert_same_bits(*results)

    return check


def empty(*shape: int, dtype: torch.dtype = F32, offset: int = 0) -> Tensor:
    """NaN, starting `offset` elements after an aligned address."""
    size = torch.Size(shape).numel()
    return torch.full((size + offset,), torch.nan, dtype=dtype)[offset:].reshape(shape)


def test_normals_are_the_known_answers(cuda_host: str, known_answers: Any) -> None:
    randn = torch.ops.fastdiff_cuda_host.randn.default
    for case in known_answers["cases"]:
        first, n = case["first_element"], case["n"]
        out = empty(1, n)
        seed = (case["seed"] ^ 1 << 63) - (1 << 63)
        randn(out, None, seed, case["sample"], case["step"], case["stream"], first // 4, False)
        words = out.view(torch.int32)[0].to(torch.int64) & 0xFFFFFFFF
        known = [int(word, 16) for word in case["normal_bits"]]
        assert words[: len(known)].tolist() == known
        assert int(words.sum()) == int(case["sum_of_normal_bits_mod_2_64"])


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("offset", [0, 1])
def test_randn_of_any_size_and_alignment(both: Any, dtype: torch.dtype, offset: int) -> None:
    keys = torch.tensor([[-1, 3], [2**40 + 5, 2**32 - 1], [0, 0]])
    for n in (1, 3, 4, 7, 8, 127, 128, 132, 256, 1023, 4097):
        for key, fast in ((None, False), (keys, True)):

            def call(randn: Any, written: list[Tensor], n=n, key=key, fast=fast) -> None:
                out = empty(3, n, dtype=dtype, offset=offset)
                randn(out, key, -7, 2**32 - 2, 2**32 - 1, 3, 2**32 - 1100, fast)
                written.append(out)

            both("randn", call)


class Case:
    """Tensors for a step of a given structure, drawn from one seed; NaN where nothing is read."""

    def __init__(
        self, spec: StepSpec, seed: int, batch: int, n: int, models: int = 0, *,
        state: torch.dtype = F32, model: torch.dtype = F32, mixed: bool = False, offset: int = 0,
        zeros: float = 0.0, threshold: bool = False, seeded: bool = True, copies: int = 0,
        uniform: bool = False,
    ) -> None:  # fmt: skip
        torch.manual_seed(seed)
        pick = random.Random(seed)
        self.spec, self.batch, self.n, self.offset, self.copies = spec, batch, n, offset, copies

        def dtype(of: torch.dtype) -> torch.dtype:
            return pick.choice((F32, BF16, F16)) if mixed else of

        def filled(width: int, of: torch.dtype) -> Tensor:
            return empty(batch, width, dtype=dtype(of), offset=offset).copy_(
                2 * torch.randn(batch, width)
            )

        self.states = [filled(n, state) for _ in range(spec.states)]
        self.models = [filled(n * (1 + spec.learned), model) for _ in range(models)]
        self.noise = [] if seeded else [filled(n, state) for _ in range(spec.draws)]
        self.out_dtypes = [dtype(state) for _ in spec.outputs]
        self.input_dtype = dtype(model)
        self.table = torch.randn(4, spec.width)
        self.table[:, 0], self.table[:, 1] = -0.8, 0.9
        self.table[:, 3], self.table[:, 4] = -2.0, -0.5
        hidden = torch.rand(4, spec.width) < zeros
        hidden[:, : len(HEADER)] = False
        self.table[hidden] = 0.0
        # Rows 4 and -1 are outside of the table.
        self.rows = torch.randint(0, 4, (1,)) if uniform else torch.randint(-1, 5, (batch,))
        self.keys = self.draws = self.guidance = self.threshold = None
        if pick.random() < 0.5:
            self.keys = torch.randint(-(2**62), 2**62, (batch, 2))
            self.keys[:, 1] &= 0xFFFFFFFF
        if pick.random() < 0.5:
            self.draws = torch.randint(0, 2**32, (4, spec.draws, 2))
        if models == 2:
            self.guidance = torch.randn(1 if uniform else batch)
        if threshold:
            self.threshold = torch.rand(1 if uniform else batch) + 0.5
        self.counter = [pick.getrandbits(62), pick.randint(0, 9), 3, 1]
        self._poison(self.states)

    def _poison(self, states: list[Tensor]) -> None:
        """NaN in the states of samples whose row does not read them."""
        spec = self.spec
        first = len(HEADER) + spec.columns - 1
        for b in range(self.batch):
            row = int(self.rows[b % len(self.rows)])
            if not 0 <= row < 4:
                continue
            weights = self.table[row]
            for k, state in enumerate(states):
                inside = spec.clamp is not None and spec.clamp >> k & 1 and weights[5 + k] != 0
                used = inside or any(
                    mask >> k & 1 and weights[first + r * spec.columns + k] != 0
                    for r, mask in enumerate(spec.outputs)
                )
                if not used:
                    state[b] = torch.nan

    def __call__(self, step: Any, written: list[Tensor], out: list[Tensor] | None = None) -> None:
        if out is None:
            out = [empty(self.batch, self.n, dtype=dtype, offset=self.offset)
                   for dtype in self.out_dtypes]  # fmt: skip
        model_input = None
        if self.copies:
            model_input = empty(self.copies * self.batch, self.n, dtype=self.input_dtype)
        step(
            self.states, self.models, self.noise, self.table, self.rows, self.keys, self.draws,
            self.guidance, self.threshold, self.spec.encoded, self.counter, out, model_input,
        )  # fmt: skip
        written += [*out, *([model_input] if model_input is not None else [])]


# Columns [S, o, c, z]: q_sample, Euler and DDIM, the same with noise, DDPM, DDIM that clips.
STRUCTURES = (
    (0b1001, None, 1),
    (0b0011, None, 0),
    (0b1011, None, 1),
    (0b1101, 3, 1),
    (0b101, 3, 0),
)
TYPES = ((F32, F32), (BF16, BF16), (F32, BF16), (F16, F16))


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize(("state", "model"), TYPES)
def test_the_usual_steps(both: Any, structure: Any, state: torch.dtype, model: torch.dtype) -> None:
    mask, clamp, draws = structure
    seed = 0
    for models in (0,) if mask == 0b1001 else (1, 2):
        for n in (4, 8, 127, 128, 132, 264, 1023, 4096):
            for zeros in (0.0, 0.5):
                seed += 1
                spec = StepSpec(1, (mask,), clamp, draws, state, fast=bool(seed % 2))
                both("step", Case(
                    spec, seed, 3, n, models, state=state, model=model, zeros=zeros,
                    copies=seed % 3, uniform=seed % 5 == 0, offset=seed % 7 == 0,
                ))  # fmt: skip


@pytest.mark.parametrize("seed", range(60))
def test_any_step(both: Any, seed: int) -> None:
    pick = random.Random(seed)
    states, draws, models = pick.randint(1, 8), pick.randint(0, 4), pick.randint(0, 2)
    clamped, learned = pick.random() < 0.5, models > 0 and draws > 0 and pick.random() < 0.4
    readable = (1 << states + 2 + draws) - 1
    readable &= ~(0 if models else 1 << states) & ~(0 if clamped else 2 << states)
    masks = tuple(pick.getrandbits(16) & readable for _ in range(pick.randint(1, 8)))
    inside = (1 << states) - 1 | bool(models) << states | ((1 << draws) - 1) << states + 1
    dtype = pick.choice((F32, BF16, F16))
    spec = StepSpec(
        states, masks, pick.getrandbits(16) & inside if clamped else None, draws, dtype, learned
    )
    n = pick.choice((1, 3, 7, 8, 127, 128, 1023, 4097))
    both("step", Case(
        spec, seed, pick.randint(1, 4), n, models, state=dtype, model=dtype, zeros=0.3,
        mixed=pick.random() < 0.5, offset=pick.randint(0, 2), copies=pick.randint(0, 2),
        threshold=clamped and pick.random() < 0.5, seeded=pick.random() < 0.6,
        uniform=pick.random() < 0.3,
    ))  # fmt: skip


@pytest.mark.parametrize("seed", range(20))
def test_outputs_in_the_place_of_any_states(both: Any, seed: int) -> None:
    pick = random.Random(seed)
    outputs = pick.randint(1, 4)
    masks = tuple(pick.getrandbits(5) for _ in range(outputs))
    dtype, n = pick.choice((F32, BF16)), pick.choice((8, 130, 2048))
    case = Case(StepSpec(4, masks, None, 0), seed, 2, n, 1, state=dtype, model=dtype)
    sources, places = case.states, pick.sample(range(4), outputs)

    def call(step: Any, written: list[Tensor]) -> None:
        case.states = [state.clone() for state in sources]
        case(step, written, [case.states[place] for place in places])

    def expected(step: Any, written: list[Tensor]) -> None:
        case.states = sources
        case(step, written, [empty(2, n, dtype=dtype) for _ in places])

    both("step", lambda step, written: (
        expected if "reference" in str(step) else call)(step, written))  # fmt: skip


def test_samples_of_many_tiles(both: Any) -> None:
    for n in (200_000, 200_003):
        both("step", Case(StepSpec(1, (0b1001,), None, 1), 0, 2, n))
        both("step", Case(StepSpec(2, (0b111, 0b11), None, 0), 1, 2, n, 1))


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("seeded", [True, False])
def test_the_forward_chain(both: Any, dtype: torch.dtype, seeded: bool) -> None:
    table = torch.rand(6, 2)
    table[2, 1] = table[4, 0] = 0.0
    slots = torch.tensor([-1, 1, 0, -1, 3, 2])
    keys = torch.tensor([[7, 9], [-8, 2**32 - 1]])
    for n in (1, 7, 8, 127, 1023, 4096):
        x = torch.randn(2, n).to(dtype)
        noise = None if seeded else torch.randn(6, 2, n)
        for key in (None, keys):

            def call(chain: Any, written: list[Tensor], x=x, n=n, noise=noise, key=key) -> None:
                out = empty(4, 2, n, dtype=dtype)
                chain(x, noise, table, slots, key, -5, 2, False, out)
                written.append(out)

            both("chain", call)


def test_no_access_outside_of_tensors_or_off_their_alignment(tmp_path: Path) -> None:
    """The same code under the address and alignment sanitizers; and float64 is refused."""
    compiler = find_compiler("c++")
    program = tmp_path / "check"
    command = [
        *compiler.command, "-std=c++17", "-O1", "-g0", "-Wall", "-Wextra", "-Werror",
        "-ffp-contract=off", "-fsanitize=address,alignment", "-fno-sanitize-recover=all",
        "-DFASTDIFF_CUDA_HOST", f"-I{CSRC}", "-include", "cuda/host.h",
        "-x", "c++", str(CSRC / "cuda" / "kernels.cu"),
        str(HERE / "cuda_host_check.cpp"), "-o", str(program),
    ]  # fmt: skip
    subprocess.run(command, check=True)
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    result = subprocess.run([program], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


# ---- compiled by nvcc


def nvcc() -> str:
    try:
        return find_compiler("nvcc").command[0]
    except build.BuildError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def sass() -> Any:
    specification = importlib.util.spec_from_file_location("sass", HERE / "sass.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules["sass"] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def library() -> Path:
    """The CUDA library for every architecture; built once for these sources, then cached."""
    nvcc()
    return build.build(build.cuda_target(ARCHS))


CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def most_registers(kernel: str, arch: str) -> int:
    """The bound that a kernel's launch leaves it on an architecture; see csrc/cuda/launch.cuh."""
    if arch == "75":
        return 128 if kernel == "step_kernel<8>" else 64
    if kernel.startswith(("step_kernel", "chain_kernel")):
        return 128 if kernel == "step_kernel<8>" else 64
    plain = re.fullmatch(r"plain_kernel<Plain<(\w+), (\w+), (\w+), (\w+), (\w+), (\w+)>>", kernel)
    if plain:
        _, model, reads_model, clamp, _, fast = plain.groups()
        narrow = model == "bf16_t"
        if clamp == "true":
            return 48 if narrow or fast == "true" else 40
        if narrow and fast == reads_model == "true":
            return 40
    return 32 if arch in ("80", "90", "100") else 40


@pytest.mark.parametrize("arch", ARCHS)
def test_kernels_stay_in_their_registers(library: Path, sass: Any, arch: str) -> None:
    kernels = sass.resources(CUOBJDUMP, library, arch)
    assert len(kernels) > 30
    for name, used in kernels.items():
        assert used.stack == 0, f"{name} spills {used.stack} bytes"
        assert used.registers <= most_registers(name, arch), (name, used.registers)


def test_exact_kernels_contract_nothing(library: Path) -> None:
    # PTX has no square root by parts: any fma is a contraction, but for the exact one beside each
    # approximate logarithm of noise="fast".
    text = subprocess.run(
        [CUOBJDUMP, "-ptx", library], check=True, capture_output=True, text=True
    ).stdout
    kernels = text.split(".entry ")[1:]
    assert len(kernels) > 30
    exact = 0
    for kernel in kernels:
        fused, logarithms = kernel.count("fma.rn.f32"), kernel.count("lg2.approx")
        assert fused == logarithms
        if not logarithms:
            exact += 1
            assert not re.search(r"\bfma\b|\.approx|\.ftz|div\.full", kernel)
    assert exact > 15


# What eight elements take: 128-bit loads and stores, roots or logarithms (one for two normals),
# and the additions of guidance and of the sum, which tell guided from unguided.
LOAD, STORE, ROOT, ADD = r"LDG\.E\.128(?!\.CONST)", r"STG\.E\.128", r"MUFU\.(RSQ|LG2)", r"FADD"
# Template arguments (state, model, reads model, clamps, draws, fast); counts of these four for
# eight elements; instructions per element on sm_90 in the loop, and with what a thread does once.
COSTS = {
    "q_sample float32": ("float, float, false, false, true, false", (2, 2, 4, 0), 58, 68),
    "q_sample float32 fast": ("float, float, false, false, true, true", (2, 2, 4, 0), 38, 47),
    "q_sample bfloat16": ("bf16_t, bf16_t, false, false, true, false", (1, 1, 4, 0), 60, 70),
    "ddpm float32": ("float, float, true, false, true, false", (4, 2, 4, 0), 65, 75),
    "ddpm clipped float32": ("float, float, true, true, true, false", (4, 2, 4, 0), 76, 87),
    "ddim guided float32": ("float, float, true, false, false, false", (6, 2, 0, 24), 16, 25),
    "ddim guided bfloat16": ("bf16_t, bf16_t, true, false, false, false", (3, 1, 0, 24), 16, 25),
}


@pytest.mark.parametrize("case", COSTS)
def test_instructions_per_element(library: Path, sass: Any, case: str) -> None:
    template, counts, per_element, with_start = COSTS[case]
    kernels = sass.instructions(CUOBJDUMP, library, "90")
    code = kernels[f"plain_kernel<Plain<{template}>>"]
    patterns = (LOAD, STORE, ROOT, ADD)
    whole = sass.cheapest_path(code, dict(zip(patterns, counts, strict=True)))
    doubled = {pattern: 2 * count for pattern, count in zip(patterns, counts, strict=True)}
    twice = sass.cheapest_path(code, doubled)
    assert (twice - whole) / 8 <= per_element
    assert whole / 8 <= with_start


def test_the_binding_compiles_for_cuda_tensors() -> None:
    dry_run = [nvcc(), "--dryrun", "-x", "cu", os.devnull]
    says = subprocess.run(dry_run, capture_output=True, text=True).stderr
    include = re.search(r'INCLUDES="-I(\S+)"', says)
    if include is None:
        pytest.skip("nvcc does not say where its headers are")
    target = build.cuda_target(["90"])
    binding = next(source for source in target.sources if source.path.endswith("ops.cpp"))
    torch_include = Path(torch.__file__).parent / "include"
    defines = [flag for flag in (*target.flags, *binding.flags) if flag.startswith("-D")]
    assert "-DUSE_CUDA" in defines and "-DFASTDIFF_CUDA" in defines
    subprocess.run(
        [*find_compiler("c++").command, "-std=c++17", "-fsyntax-only", *defines,
         f"-isystem{torch_include}", f"-isystem{torch_include}/torch/csrc/api/include",
         f"-isystem{include[1]}", str(CSRC / binding.path)],
        check=True,
    )  # fmt: skip
