"""csrc/cuda without a GPU: run on the host against the reference, and compiled for every GPU.

The same sources are compiled by the C++ compiler and executed (csrc/cuda/host.h), and by nvcc
for each architecture, where registers, spills, access widths and instructions are read off.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiff.backends import build
from fastdiff.backends.toolchain import find_compiler
from fastdiff.ops.schemas import SCHEMAS
from fastdiff.ops.step import HEADER, StepSpec, step_arguments
from fastdiff.profiling import sass

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
HERE = Path(__file__).parent
CSRC = build.source_root()
ARCHS = ("75", "80", "86", "89", "90", "100", "103", "120")
KERNELS = [
    str(CSRC / source.path)
    for source in build.cuda_host_target().sources
    if source.path.endswith(".cu")
]


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
        self.counter = (pick.getrandbits(62), pick.randint(0, 9), 3, 1)
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
        step(*step_arguments(
            self.spec, self.states, self.table, self.rows, out, model_outputs=self.models,
            noise=self.noise, keys=self.keys, draws=self.draws, guidance_scale=self.guidance,
            threshold=self.threshold, counter=self.counter, model_input=model_input,
        ))  # fmt: skip
        written += [*out, *([model_input] if model_input is not None else [])]


# Columns [S, o, c, z]: q_sample, Euler and DDIM, the same with noise, DDPM, DDIM that clips.
STRUCTURES = (
    (0b1001, None, 1),
    (0b0011, None, 0),
    (0b1011, None, 1),
    (0b1101, 3, 1),
    (0b101, 3, 0),
)
TYPES = ((F32, F32), (BF16, BF16), (F32, BF16), (F16, F16), (F32, F16), (BF16, F16))


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


@pytest.mark.parametrize(("mask", "clamp", "inside"), [(0b0011, None, False), (0b101, 3, True)])
@pytest.mark.parametrize("model", [F32, BF16])
def test_guidance_matters_only_to_rows_that_use_the_model(
    both: Any, mask: int, clamp: int | None, inside: bool, model: torch.dtype
) -> None:
    spec = StepSpec(1, (mask,), clamp, 0)
    case = Case(spec, 3, 2, 264, 2, model=model)
    case.rows = torch.tensor([1, 2])
    case.table[1, len(HEADER) + (1 if inside else spec.columns)] = 0.0
    case.guidance = torch.tensor([torch.inf, 2.0])

    def finite(step: Any, written: list[Tensor]) -> None:
        case(step, written)
        assert written[0].isfinite().all()

    both("step", finite)


def test_threads_that_take_several_chunks_of_several_samples(both: Any) -> None:
    """The host has 2 x 6 places for blocks of 2048 elements: 50 of them make several each."""
    for n, types in ((51_204, (F32, F32)), (51_208, (BF16, BF16)), (51_208, (F32, F16))):
        for structure, models in ((STRUCTURES[0], 0), (STRUCTURES[3], 2), (STRUCTURES[1], 2)):
            mask, clamp, draws = structure
            if models == 0 and types[0] != types[1]:
                continue
            spec = StepSpec(1, (mask,), clamp, draws, types[0])
            both("step", Case(spec, n, 2, n, models, state=types[0], model=types[1], copies=2))


def test_more_samples_than_a_grid_has_rows(both: Any) -> None:
    """Eight samples a block and 65535 rows of blocks: the others are in the grid's z."""
    batch = 8 * 65535 + 9
    both("step", Case(StepSpec(1, (0b1001,), None, 1), 5, batch, 4))


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
    """The same code under the address and alignment sanitizers; and float64 is refused.

    Not optimised: that takes a quarter of the time, and no access is left out.
    """
    compiler = find_compiler("c++")
    program = tmp_path / "check"
    command = [
        *compiler.command, "-std=c++17", "-O0", "-g0", "-Wall", "-Wextra", "-Werror",
        "-ffp-contract=off", "-fsanitize=address,alignment", "-fno-sanitize-recover=all",
        "-DFASTDIFF_CUDA_HOST", f"-I{CSRC}", "-include", "cuda/host.h",
        "-x", "c++", *KERNELS,
        str(HERE / "cuda_host_check.cpp"), "-o", str(program),
    ]  # fmt: skip
    subprocess.run(command, check=True)
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    result = subprocess.run([program], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_fast_noise_is_within_its_bound_at_the_documented_errors(tmp_path: Path) -> None:
    """The special function unit modelled on the host, each of its errors at its largest."""
    program = tmp_path / "check"
    command = [
        *find_compiler("c++").command, "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror",
        "-ffp-contract=off", "-DFASTDIFF_CUDA_HOST", "-DFASTDIFF_MODEL_FAST", f"-I{CSRC}",
        str(HERE / "fast_noise_check.cpp"), "-o", str(program),
    ]  # fmt: skip
    subprocess.run(command, check=True)
    said = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    largest, share_far = map(float, said.split())
    assert 1e-4 < largest <= 4e-4  # less than that would be the exact normals
    assert share_far <= 2e-5


# ---- compiled by nvcc


def nvcc() -> str:
    try:
        return find_compiler("nvcc").command[0]
    except build.BuildError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def library() -> Path:
    """The CUDA library for every architecture; built once for these sources, then cached."""
    nvcc()
    return build.build(build.cuda_target(ARCHS))


def most_registers(kernel: str, arch: str) -> int:
    """The bound that a kernel's launch leaves it on an architecture; see csrc/cuda/launch.cuh."""
    if kernel in ("step_kernel<2>", "step_kernel<8>"):
        return 80 if "2" in kernel else 128
    if kernel.startswith(("loss_kernel", "loss_grad_kernel")):
        if "AnyLoss" in kernel or "Hybrid" in kernel:
            return 128 if arch == "75" else 64
        if arch != "75":
            return 48 if "VelocityError" in kernel or "StepDensity" in kernel else 40
    if kernel.startswith(("bits_kernel", "bits_bound_kernel")):
        return 80
    if arch == "75" or kernel.startswith(("step_kernel", "chain_kernel", "loss_sum", "bits_")):
        return 64
    if kernel.startswith("randn_kernel") and kernel.endswith("false>"):
        return 40
    plain = re.fullmatch(r"plain_kernel<Plain<(\w+), (\w+), (\d), (\w+), (\w+), (\w+)>>", kernel)
    if plain:
        _, model, models, clamp, noise, fast = plain.groups()
        if noise == "true" and models != "0" and model != "float":
            if models == "2" and clamp == "true":
                return 48
            if models == "2" or fast == "false":
                return 40
    return 32 if arch in ("80", "90", "100") else 40


@pytest.mark.parametrize("arch", ARCHS)
def test_kernels_stay_in_their_registers(library: Path, arch: str) -> None:
    kernels = sass.read(library, f"sm_{arch}")
    assert len(kernels) > 70
    for name, kernel in kernels.items():
        assert kernel.stack == 0, f"{name} spills {kernel.stack} bytes"
        assert kernel.registers <= most_registers(name, arch), (name, kernel.registers)


def test_exact_kernels_contract_nothing(library: Path) -> None:
    # PTX has no square root by parts: any fma is a contraction, but for the two, each rounding only
    # once, beside each approximate logarithm of noise="fast".
    kernels = sass.ptx(library)
    assert len(kernels) > 70
    exact = 0
    for kernel in kernels:
        fused, logarithms = kernel.count("fma.rn.f32"), kernel.count("lg2.approx")
        assert fused == 2 * logarithms
        if not logarithms:
            exact += 1
            assert not re.search(r"\bfma\b|\.approx|\.ftz|div\.full", kernel)
    assert exact > 40


# What eight elements take: 128-bit loads and stores, roots or logarithms (one for two normals).
LOAD, STORE, ROOT = r"LDG\.E\.128(?!\.CONST)", r"STG\.E\.128", r"MUFU\.(RSQ|LG2)"
# Template arguments (state, model, model outputs, clamps, draws, fast); counts of these three for
# eight elements; instructions per element on sm_90 in the loop, and with what a thread does once.
COSTS = {
    "q_sample float32": ("float, float, 0, false, true, false", (2, 2, 4), 51, 66),
    "q_sample float32 fast": ("float, float, 0, false, true, true", (2, 2, 4), 29, 44),
    "q_sample bfloat16": ("bf16_t, bf16_t, 0, false, true, false", (1, 1, 4), 51, 67),
    "q_sample bfloat16 fast": ("bf16_t, bf16_t, 0, false, true, true", (1, 1, 4), 30, 46),
    "ddpm float32": ("float, float, 1, false, true, false", (4, 2, 4), 54, 70),
    "ddpm float32 fast": ("float, float, 1, false, true, true", (4, 2, 4), 33, 49),
    "ddpm bfloat16 fast": ("bf16_t, bf16_t, 1, false, true, true", (2, 1, 4), 34, 50),
    "ddpm clipped float32": ("float, float, 1, true, true, false", (4, 2, 4), 61, 79),
    "ddpm clipped float32 fast": ("float, float, 1, true, true, true", (4, 2, 4), 40, 58),
    "ddim guided float32": ("float, float, 2, false, false, false", (6, 2, 0), 10, 21),
    "ddim guided bfloat16": ("bf16_t, bf16_t, 2, false, false, false", (3, 1, 0), 12.5, 23),
    "ddim guided float16": ("f16_t, f16_t, 2, false, false, false", (3, 1, 0), 12.75, 23),
}


@pytest.fixture(scope="session")
def sm_90(library: Path) -> dict[str, sass.Kernel]:
    return sass.read(library, "sm_90")


@pytest.mark.parametrize("case", COSTS)
def test_instructions_per_element(sm_90: dict[str, sass.Kernel], case: str) -> None:
    template, counts, per_element, with_start = COSTS[case]
    code = sm_90[f"plain_kernel<Plain<{template}>>"].code
    chunk = dict(zip((LOAD, STORE, ROOT), counts, strict=True))
    whole = len(sass.cheapest_path(code, chunk))
    twice = len(sass.cheapest_path(code, {pattern: 2 * count for pattern, count in chunk.items()}))
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


# Run in a process of its own, since it registers the kernels of GPU tensors: the library, with a
# stand-in for what a CPU build of PyTorch does not have.
LOADS = """
import ctypes, sys
import torch
import fastdiff.backends.native  # defines the operations
ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL)
torch.ops.load_library(sys.argv[2])
for name in sys.argv[3:]:
    print(name, torch._C._dispatch_has_kernel_for_dispatch_key(f"fastdiff_native::{name}", "CUDA"))
"""
STREAM = "int aoti_torch_get_current_cuda_stream(int device, void** stream) { return 1; }"


def test_the_library_loads_and_serves_tensors_of_gpus(library: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this PyTorch has the real stream function")
    stub = tmp_path / "stub.so"
    subprocess.run(
        [*find_compiler("c++").command, "-shared", "-fPIC", "-x", "c", "-", "-o", str(stub)],
        input=STREAM, text=True, check=True,
    )  # fmt: skip
    result = subprocess.run(
        [sys.executable, "-c", LOADS, str(stub), str(library), *SCHEMAS],
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [word for name in SCHEMAS for word in (name, "True")]


def test_without_a_gpu_launches_end_with_an_error(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    program = tmp_path / "check"
    # No kernel runs, so there is no machine code of them, and no optimiser: half of the time.
    command = [
        nvcc(), "-std=c++17", "-fmad=false", "-gencode=arch=compute_90,code=compute_90",
        "-Xcicc", "-O0", "-cudart", "static", f"-I{CSRC}", "-diag-suppress=128",
        *KERNELS, str(HERE / "cuda_launch_check.cpp"), "-o", str(program),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    said = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    nothing_to_do, *launches = map(int, said.split())
    assert nothing_to_do == 0
    no_device, old_driver, no_driver = 100, 35, 34
    assert len(launches) == len(SCHEMAS) and set(launches) <= {no_device, old_driver, no_driver}
