"""csrc/cuda/loss*.cuh without a GPU: run on the host against the definition, and as compiled.

tests/test_loss.py has what every backend does; here is what depends on how the CUDA kernels divide
their work: structures with a kernel of their own, alignment, types, pieces and the sums of pieces.
"""

from __future__ import annotations

import ctypes
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiff.backends import build
from fastdiff.backends.toolchain import find_compiler
from fastdiff.ops.loss import (
    BOUND,
    COLUMNS,
    ERROR,
    PIECE,
    X_START,
    LossSpec,
    loss_arguments,
    partial_count,
)  # fmt: skip
from fastdiff.profiling import sass

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
COLUMN = {name: index for index, name in enumerate(COLUMNS)}
# Structures with kernels of their own, by the names that these have.
KNOWN = {
    "TargetError": LossSpec(ERROR, error=0b00101),
    "NoiseError": LossSpec(ERROR, error=0b10100),
    "VelocityError": LossSpec(ERROR, error=0b10101),
    "Hybrid": LossSpec(ERROR | BOUND, error=0b10100, bound=0b0111, learned=True, frozen=True),
    "ClippedHybrid": LossSpec(
        ERROR | BOUND, error=0b10100, bound=0b1001, clamp=3, learned=True, frozen=True
    ),
    "StepDensity": LossSpec(BOUND, bound=0b0111, density=True),
}


# ---- on the host, against the reference


def table_of(rows: int) -> Tensor:
    """Coefficients of which variances, bounds and likelihoods make sense."""
    table, log_variance = torch.randn(rows, len(COLUMNS)), 4 * torch.rand(rows) - 4
    for name, value in dict(
        lo=-0.7, hi=0.9, delta=torch.rand(rows) + 0.2, l0=log_variance, l1=torch.rand(rows) - 0.5,
        true_log_variance=log_variance - 0.3, true_inverse_variance=(0.3 - log_variance).exp(),
        half_inverse_variance=0.5 * (-log_variance).exp(), inverse_std=(-log_variance / 2).exp(),
        discretized=(torch.arange(rows) % 3 == 0).float(), floor=27.6, sigma=torch.rand(rows),
    ).items():  # fmt: skip
        table[:, COLUMN[name]] = value
    return table


class Case:
    """Tensors for a loss of a given structure and its gradient, drawn from one seed."""

    def __init__(
        self, spec: LossSpec, seed: int, batch: int, n: int, *, state: torch.dtype = F32,
        model: torch.dtype = F32, models: int = 1, offset: int = 0, seeded: bool = True,
        rows: tuple[int, int] = (-1, 5),
    ) -> None:  # fmt: skip
        torch.manual_seed(seed)
        pick = random.Random(seed)
        self.offset = offset
        reads_noise = spec.draws and not seeded

        def filled(width: int, dtype: torch.dtype) -> Tensor:
            return self.empty(batch, width, dtype=dtype).copy_(torch.randn(batch, width))

        self.models = [filled(n * (1 + spec.learned), model) for _ in range(models)]
        keys = torch.randint(-(2**62), 2**62, (batch, 2))
        keys[:, 1] &= 0xFFFFFFFF
        self.case: dict[str, Any] = dict(
            spec=spec,
            model_outputs=self.models,
            # A part of an image is at the ends of its range, whose bins are open.
            x=filled(n, state).clamp_(-1, 1) if spec.reads_x else None,
            y=filled(n, state) if spec.reads_y else None,
            noise=[filled(n, state)] if reads_noise else [],
            table=table_of(4),
            # Rows 4 and -1 are outside of the table.
            rows=torch.randint(*rows, (batch if pick.random() < 0.8 else 1,)),
            keys=keys if spec.draws and not reads_noise and pick.random() < 0.5 else None,
            guidance_scale=torch.randn(pick.choice((1, batch))) if models == 2 else None,
            counter=(pick.getrandbits(62), pick.randint(0, 9), 3, 2),
        )
        self.results_grad = torch.randn(spec.count, batch)
        self.made = state
        self.n, self.batch = n, batch

    def empty(self, *shape: int, dtype: torch.dtype = F32) -> Tensor:
        """NaN, starting `offset` elements after an aligned address."""
        size = torch.Size(shape).numel()
        whole = torch.full((size + self.offset,), torch.nan, dtype=dtype)
        return whole[self.offset :].reshape(shape)

    def loss(self, backend: str) -> list[Tensor]:
        """Results, and x where it is made."""
        spec, batch = self.case["spec"], self.batch
        results = self.empty(spec.count, batch)
        partials = self.empty(spec.count, batch, partial_count(self.n))
        made = [self.empty(batch, self.n, dtype=self.made)] if spec.makes else []
        operation(backend, "loss")(*loss_arguments(**self.case, outputs=[results, partials, *made]))
        return [results, *made]

    def loss_grad(self, backend: str) -> list[Tensor]:
        """By each model output."""
        by_model = [self.empty(*model.shape, dtype=model.dtype) for model in self.models]
        operation(backend, "loss_grad")(
            *loss_arguments(**self.case, outputs=by_model, gradients=self.results_grad)
        )
        return by_model


def operation(backend: str, name: str) -> Any:
    return getattr(getattr(torch.ops, f"fastdiff_{backend}"), name).default


@pytest.fixture
def check(cuda_host: str, assert_same_bits: Any) -> Any:
    """Runs a case on the host and by the definition; returns the kernels that were launched."""
    library = ctypes.CDLL(str(build.build(build.cuda_host_target())))
    library.fd_last_kernel.restype = ctypes.c_char_p

    def run(case: Case) -> list[str]:
        launched = []
        for function in (case.loss, case.loss_grad):
            assert_same_bits(function(cuda_host), function("reference"))
            found = re.search(r"kKernel = fastdiff::(.*?)[;\]]", library.fd_last_kernel().decode())
            assert found is not None
            launched.append(found[1].replace("fastdiff::", ""))
        return launched

    return run


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize(("state", "model"), [(F32, F32), (BF16, BF16), (F32, BF16), (F16, F32)])
def test_structures_with_kernels_of_their_own(
    check: Any, name: str, state: torch.dtype, model: torch.dtype
) -> None:
    spec, seed = KNOWN[name], 0
    for n in (1, 3, 4, 8, 72, 127, 128, 264, 1000, 1024, 1025, 1028, 1032, 5000):
        for offset in (0, 1):
            seed += 1
            chosen = replace(spec, noise_dtype=state, fast=bool(seed % 2))
            case = Case(chosen, seed, 3, n, state=state, model=model, offset=offset)
            loss, grad = check(case)
            # Noise is no tensor.
            types = (model, model) if name == "NoiseError" else (state, model)
            whole = n % (4 if types == (F32, F32) else 8) == 0 and offset == 0
            known = whole and F16 not in types and not ("Hybrid" in name and state == BF16)
            kind = f"<KnownLoss<{name}, " if known else "<AnyLoss>"
            assert f"loss_grad_kernel{kind}" in grad
            assert (loss == "loss_sum_kernel") if n > PIECE else f"loss_kernel{kind}" in loss


@pytest.mark.parametrize("seed", range(40))
def test_any_loss_of_whole_and_of_broken_groups(check: Any, seed: int) -> None:
    pick = random.Random(seed)
    terms = pick.randint(1, 7)
    clamp = pick.randint(1, 3) if terms & X_START or pick.random() < 0.5 else None
    readable = ~(0 if clamp else 8)
    makes = bool(terms & BOUND) and pick.random() < 0.3
    state = pick.choice((F32, BF16, F16))
    spec = LossSpec(
        terms, (pick.randint(1, 31) & readable or 4) if terms & ERROR else 0,
        (pick.randint(1, 15) & readable | (4 if makes else 1)) if terms & BOUND else 0, clamp,
        pick.randint(0, 3), *(pick.random() < 0.5 for _ in range(3)), makes=makes,
        noise_dtype=state,
    )  # fmt: skip
    if terms & BOUND and not (spec.density or spec.reads_x or makes):
        spec = replace(spec, density=True)
    check(Case(
        spec, seed, pick.randint(1, 4), pick.choice((8, 64, 128, 520, 1024, 1032, 2050)),
        state=state, model=pick.choice((F32, BF16, F16)), models=pick.randint(1, 2),
        offset=pick.choice((0, 0, 1)), seeded=pick.random() < 0.5,
    ))  # fmt: skip


@pytest.mark.parametrize("n", [PIECE * 33, 300_000, 300_003])
def test_blocks_that_take_several_pieces_of_several_samples(check: Any, n: int) -> None:
    """The host has places for 24 blocks of 128 threads: fewer than there are pieces."""
    for name in ("TargetError", "StepDensity"):
        check(Case(KNOWN[name], n, 2, n))


def test_sums_of_more_pieces_than_a_piece_has_elements(check: Any) -> None:
    """1026 pieces: two launches add them up, the second one two sums."""
    check(Case(KNOWN["TargetError"], 1, 1, PIECE * 1025 + 4, rows=(0, 4)))


@pytest.mark.parametrize("n", [4, 12, 1024, 1028, 2048, 3072])
@pytest.mark.parametrize("offset", [0, 1])
def test_the_sign_of_a_sum_of_zeros(cuda_host: str, check: Any, n: int, offset: int) -> None:
    """-0 only where the tree adds nothing that is not there."""
    case = Case(KNOWN["StepDensity"], 1, 1, n, offset=offset, rows=(0, 4))
    for tensor in (case.case["x"], case.case["y"], *case.models):
        tensor.zero_()
    case.case["table"][:, COLUMN["bound_scale"]] = 1.0
    case.case["table"][:, COLUMN["bound_offset"]] = -0.0
    check(case)
    (result,) = case.loss(cuda_host)
    assert result.item() == 0 and torch.signbit(result).item() == (n & (n - 1) == 0)


# ---- as nvcc compiles them

ARCHS = ("75", "80", "86", "89", "90", "100", "103", "120")


@pytest.fixture(scope="session")
def library() -> Path:
    """The CUDA library for every architecture; built once for these sources, then cached."""
    try:
        find_compiler("nvcc")
    except build.BuildError as error:
        pytest.skip(str(error))
    return build.build(build.cuda_target(ARCHS))


# What a chunk takes: 128-bit loads (64-bit ones of four bfloat16), shuffles, roots or logarithms.
LOADS, SHUFFLE, ROOT = r"LDG\.E\.(128|64)(?!\.CONST)", r"SHFL", r"MUFU\.(RSQ|LG2)"
# Kernel: elements of a chunk, counts of these three, and instructions per element on sm_90 from one
# piece to the next.
COSTS = {
    "loss_kernel<KnownLoss<NoiseError, float, float, false>>": (8, (2, 6, 4), 58),
    "loss_kernel<KnownLoss<NoiseError, float, float, true>>": (8, (2, 6, 4), 37),
    "loss_kernel<KnownLoss<NoiseError, bf16_t, bf16_t, true>>": (8, (1, 5, 4), 37),
    "loss_kernel<KnownLoss<TargetError, float, float, false>>": (8, (4, 6, 0), 15),
    "loss_kernel<KnownLoss<TargetError, bf16_t, bf16_t, false>>": (8, (2, 5, 0), 16),
    "loss_kernel<KnownLoss<Hybrid, float, float, true>>": (4, (4, 10, 2), 102),
    "loss_kernel<KnownLoss<ClippedHybrid, float, float, true>>": (4, (4, 10, 2), 103),
    "loss_kernel<KnownLoss<StepDensity, float, float, false>>": (8, (6, 6, 0), 21),
    "loss_grad_kernel<KnownLoss<NoiseError, float, float, true>>": (8, (2, 0, 4), 30),
    "loss_grad_kernel<KnownLoss<TargetError, float, float, false>>": (8, (4, 0, 0), 9.5),
    "loss_grad_kernel<KnownLoss<Hybrid, float, float, true>>": (4, (4, 0, 2), 84),
    "loss_grad_kernel<KnownLoss<ClippedHybrid, float, float, true>>": (4, (4, 0, 2), 89),
    "loss_grad_kernel<KnownLoss<StepDensity, bf16_t, bf16_t, false>>": (8, (3, 0, 0), 19),
}


@pytest.fixture(scope="module")
def sm_90(library: Path) -> dict[str, sass.Kernel]:
    return sass.read(library, "sm_90")


@pytest.mark.parametrize("kernel", COSTS)
def test_instructions_per_element(sm_90: dict[str, sass.Kernel], kernel: str) -> None:
    width, counts, per_element = COSTS[kernel]
    code = sm_90[kernel].code
    chunk = dict(zip((LOADS, SHUFFLE, ROOT), counts, strict=True))
    once = len(sass.cheapest_path(code, chunk))
    twice = len(sass.cheapest_path(code, {pattern: 2 * n for pattern, n in chunk.items()}))
    assert (twice - once) / width <= per_element
