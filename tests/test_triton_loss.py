"""The Triton kernels of losses: bit for bit the reference in the interpreter."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdiff.ops.loss import (
    BOUND,
    COLUMNS,
    ERROR,
    PIECE,
    X_START,
    LossSpec,
    loss_arguments,
    partial_count,
)
from fastdiff.ops.loss_terms import RHOS

pytest.importorskip("triton")

from fastdiff.backends import triton as backend
from fastdiff.kernels import launch, loss
from fastdiff.kernels.policy import Parameters, Policy

REFERENCE, TRITON = torch.ops.fastdiff_reference, torch.ops.fastdiff_triton
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def poisoned(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    """An output in which an element that is not written shows."""
    return torch.full(shape, torch.nan, dtype=dtype)


@dataclass(frozen=True)
class Case:
    """A random table for random tensors; the masks are those of LossSpec."""

    terms: int = ERROR
    error: int = 0b00101
    bound: int = 0
    clamp: int | None = None
    rho: str = "square"
    density: bool = False
    learned: bool = False
    frozen: bool = False
    makes: bool = False
    n: int = 300
    batch: int = 2
    models: int = 1
    given_noise: bool = False
    keys: bool = False
    row_per_sample: bool = True
    guidance_per_sample: bool = True
    dtype: torch.dtype = F32
    model_dtype: torch.dtype = F32
    noise_dtype: torch.dtype = F32
    made_dtype: torch.dtype = F32
    discretized: float = 0.5

    @property
    def spec(self) -> LossSpec:
        return LossSpec(
            self.terms, self.error, self.bound, self.clamp, RHOS.index(self.rho), self.density,
            self.learned, self.frozen, self.makes, self.noise_dtype,
        )  # fmt: skip

    def arguments(self, seed: int) -> dict[str, Any]:
        """Those of loss_arguments() but for the outputs."""
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int, dtype: torch.dtype = F32) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        spec, shape, rows = self.spec, (self.batch, self.n), 7
        table = random(rows, len(COLUMNS))

        def set_column(name: str, value: Tensor | float) -> None:
            table[:, COLUMNS.index(name)] = value

        # An element's mean is beside x more often than not, and then a bin is about a deviation.
        set_column("d_x", 1.0)
        for name in ("d_y", "d_o", "d_c"):
            set_column(name, random(rows) * 0.01)
        set_column("lo", -0.7)
        set_column("hi", 0.9)
        set_column("delta", random(rows).abs())
        set_column("l0", random(rows) - 5.0)
        set_column("true_log_variance", random(rows) - 5.0)
        set_column("true_inverse_variance", random(rows).exp() * 150)
        set_column("half_inverse_variance", random(rows).exp() * 75)
        set_column("inverse_std", random(rows).exp() * 12)
        chosen = torch.rand(rows, generator=generator) < self.discretized
        set_column("discretized", chosen.float() * 3.0)
        set_column("floor", random(rows).abs() * 20 + 10)
        channels = self.n * (2 if self.learned else 1)
        x = random(*shape, dtype=self.dtype).mul(0.6).clamp(-1, 1)
        return dict(
            spec=spec,
            model_outputs=[
                random(self.batch, channels, dtype=self.model_dtype) for _ in range(self.models)
            ],
            x=x if spec.reads_x else None,
            y=random(*shape, dtype=self.dtype) if spec.reads_y else None,
            table=table,
            rows=torch.randint(
                0, rows, (self.batch if self.row_per_sample else 1,), generator=generator
            ),
            noise=[random(*shape, dtype=self.dtype)] * self.given_noise,
            keys=torch.tensor([[-7 - b, 2**32 - 1 - b] for b in range(self.batch)])
            if self.keys
            else None,
            guidance_scale=random(self.batch if self.guidance_per_sample else 1)
            if self.models == 2
            else None,
            counter=(2**40 + 7, 3, 9, 2),
        )


def outputs_of(case: Case) -> list[Tensor]:
    """What a `loss` writes, poisoned."""
    spec = case.spec
    results = poisoned(spec.count, case.batch)
    partials = poisoned(spec.count, case.batch, partial_count(case.n))
    made = [poisoned(case.batch, case.n, dtype=case.made_dtype)] * case.makes
    return [results, partials, *made]


def read_back(outputs: list[Tensor]) -> list[Tensor]:
    """Of these the ones that say something: partial sums are the backend's own affair."""
    return [outputs[0], *outputs[2:]]


def gradient_arguments(case: Case, arguments: dict[str, Any]) -> tuple[list[Tensor], tuple]:
    out = [torch.full_like(o, torch.nan) for o in arguments["model_outputs"]]
    generator = torch.Generator().manual_seed(99)
    gradients = torch.randn(case.spec.count, case.batch, generator=generator)
    return out, loss_arguments(**{**arguments, "outputs": out, "gradients": gradients})


CASES = {
    "error": Case(),
    "noise": Case(error=0b10100),
    "noise rounded to bf16": Case(error=0b10100, noise_dtype=BF16, model_dtype=BF16),
    "noise given": Case(error=0b10100, given_noise=True, dtype=F16),
    "noise by keys": Case(error=0b10110, keys=True),
    "every column": Case(error=0b11111, clamp=0b11),
    "no x": Case(error=0b10110),
    "no model output in the error": Case(error=0b00011),
    "only c": Case(error=0b01001, clamp=0b10),
    "c without the model output": Case(error=0b01101, clamp=0b01),
    "guidance": Case(models=2, error=0b10100),
    "one guidance scale, one row": Case(
        models=2, clamp=0b11, error=0b01110, row_per_sample=False, guidance_per_sample=False
    ),
    **{rho: Case(rho=rho, error=0b10111) for rho in RHOS},
    **{f"{rho}, clamp, bf16": Case(rho=rho, error=0b01111, clamp=3, dtype=BF16) for rho in RHOS},
    "closed": Case(terms=BOUND, bound=0b0111, discretized=0.0),
    "closed, learned": Case(terms=BOUND, bound=0b0111, learned=True, discretized=0.0),
    "likelihood": Case(terms=BOUND, bound=0b0111, discretized=1.0),
    "likelihood, learned": Case(terms=BOUND, bound=0b0111, learned=True, discretized=1.0),
    "either, clamp": Case(terms=BOUND, bound=0b1011, clamp=0b11, batch=6),
    "either, learned, guidance, bf16": Case(
        terms=BOUND, bound=0b1111, clamp=0b11, learned=True, models=2, model_dtype=BF16, batch=6
    ),
    "density": Case(terms=BOUND, bound=0b0111, density=True),
    "density, learned": Case(terms=BOUND, bound=0b0111, density=True, learned=True),
    "made": Case(terms=BOUND, bound=0b0111, density=True, makes=True),
    "made, learned, bf16": Case(
        terms=BOUND, bound=0b1011, clamp=0b11, density=True, makes=True, learned=True,
        made_dtype=BF16, dtype=BF16, model_dtype=BF16, noise_dtype=BF16,
    ),
    "made, noise given, fp16": Case(
        terms=BOUND, bound=0b0111, density=True, makes=True, given_noise=True, made_dtype=F16
    ),
    "error of x_start": Case(terms=X_START, clamp=0b11),
    "bound and error of x_start": Case(terms=BOUND | X_START, bound=0b1011, clamp=0b11),
    "hybrid": Case(
        terms=ERROR | BOUND, error=0b10100, bound=0b1011, clamp=0b11, learned=True, frozen=True,
        batch=6,
    ),
    "everything": Case(
        terms=ERROR | BOUND | X_START, error=0b11111, bound=0b1111, clamp=0b11, learned=True,
        models=2, rho="pseudo_huber", dtype=BF16, model_dtype=F16, noise_dtype=BF16, batch=5,
    ),
    **{f"n={n}": Case(n=n, error=0b10101, batch=2) for n in (1, 3, 4, 127, 128, 1023, 1024, 1025)},
    **{
        f"n={n}, learned": Case(
            terms=ERROR | BOUND, error=0b10100, bound=0b0111, learned=True, n=n, batch=2
        )
        for n in (1, 3, 1024, 3000)
    },
    "one sample": Case(batch=1, n=3000, error=0b10101, learned=True),
}  # fmt: skip


def assert_equal_the_references(
    case: Case, arguments: dict[str, Any], assert_same_bits: Any
) -> tuple[Tensor, list[Tensor]]:
    """Results and gradients, after they are found to have the reference's bits."""
    expected, actual = outputs_of(case), outputs_of(case)
    REFERENCE.loss(*loss_arguments(**arguments, outputs=expected))
    TRITON.loss(*loss_arguments(**arguments, outputs=actual))
    assert_same_bits(read_back(actual), read_back(expected))
    expected_gradients, call = gradient_arguments(case, arguments)
    REFERENCE.loss_grad(*call)
    gradients, call = gradient_arguments(case, arguments)
    TRITON.loss_grad(*call)
    assert_same_bits(gradients, expected_gradients)
    return actual[0], gradients


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_the_references(name, assert_same_bits):
    results, gradients = assert_equal_the_references(
        CASES[name], CASES[name].arguments(0), assert_same_bits
    )
    assert not results.isnan().any() and not torch.cat(gradients).isnan().any()


def run(*launches: launch.Launch) -> None:
    """Runs them as the operations do: of branches that are not taken numpy would warn."""
    with np.errstate(invalid="ignore", over="ignore"):
        for one in launches:
            one()


def cut(tiles: int, warps: int) -> Policy:
    """Programs of several tiles."""
    parameters = Parameters(8, warps, tiles)
    return Policy(parameters, parameters, "a test")


HYBRID = CASES["hybrid"]


@pytest.mark.parametrize(
    ("n", "tiles", "warps"),
    [(1000, 1, 2), (1024, 2, 4), (2 * 1024, 3, 2), (2 * 1024 + 3, 2, 4), (2 * 1024 + 3, 2, 8)],
)
def test_any_tiling_gives_the_same(n, tiles, warps, monkeypatch, assert_same_bits):
    case = replace(HYBRID, n=n, batch=2)
    arguments = case.arguments(0)
    expected, expected_gradients = outputs_of(case), gradient_arguments(case, arguments)
    REFERENCE.loss(*loss_arguments(**arguments, outputs=expected))
    REFERENCE.loss_grad(*expected_gradients[1])
    for axis_limit, large in ((launch.MAX_GRID_Y, launch.LARGE_NUMEL), (1, 1)):
        monkeypatch.setattr(launch, "MAX_GRID_Y", axis_limit)
        monkeypatch.setattr(launch, "LARGE_NUMEL", large)
        actual, gradients = outputs_of(case), gradient_arguments(case, arguments)
        policy = cut(tiles, warps)
        call = loss_arguments(**arguments, outputs=actual)
        forward = loss.prepare(*call, nvidia=False, policy=policy)
        backward = loss.prepare_grad(*gradients[1], nvidia=False, policy=policy)
        # Four elements a thread of 64 a warp; and sums are of whole pieces.
        assert backward.constants["BLOCK"] == 256 * warps
        assert forward.constants["BLOCK"] == max(PIECE, 256 * warps)
        run(forward, backward)
        assert_same_bits([actual[0], *gradients[0]], [expected[0], *expected_gradients[0]])


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("pieces", [2, 3, 4, 5, 9])
def test_partial_sums_are_added_by_the_tree_however_many_rounds_it_takes(
    levels, pieces, assert_same_bits
):
    case = Case(n=pieces * 1024 - 5, batch=2)
    arguments, expected, actual = case.arguments(0), outputs_of(case), outputs_of(case)
    REFERENCE.loss(*loss_arguments(**arguments, outputs=expected))
    call = loss.prepare(*loss_arguments(**arguments, outputs=actual), nvidia=False)
    call.then.constants["LEVELS"] = levels
    run(call)
    assert_same_bits(actual[0], expected[0])


@pytest.mark.parametrize("n", [1, 2, 3, 1024, 1025, 2048])
def test_the_sign_of_an_empty_total_is_the_references(n, assert_same_bits):
    # Every element is -0: of a power of two of them the sum is too, else the tree has added +0.
    case = Case(terms=BOUND, bound=0b0111, density=True, n=n, batch=1)
    arguments, expected, actual = case.arguments(0), outputs_of(case), outputs_of(case)
    for name, value in (
        ("half_inverse_variance", 0.0), ("bound_scale", 1.0), ("bound_offset", -0.0),
    ):  # fmt: skip
        arguments["table"][:, COLUMNS.index(name)] = value
    REFERENCE.loss(*loss_arguments(**arguments, outputs=expected))
    TRITON.loss(*loss_arguments(**arguments, outputs=actual))
    assert_same_bits(actual[0], expected[0])
    assert actual[0].signbit().item() == (n & (n - 1) == 0)


def test_rows_outside_the_table_give_nan(assert_same_bits):
    for name in ("everything", "error of x_start", "abs"):
        case = replace(CASES[name], batch=6)
        arguments = case.arguments(0)
        arguments["rows"] = torch.tensor([0, -1, 6, 7, 2**32, -(2**63)])
        results, _ = assert_equal_the_references(case, arguments, assert_same_bits)
        inside = torch.tensor([True, False, True, False, False, False])
        assert (results.isnan() == ~inside).all()


@pytest.mark.parametrize(
    "name",
    [
        *RHOS, *(f"{rho}, clamp, bf16" for rho in RHOS), "either, clamp", "everything", "hybrid",
        "likelihood, learned", "closed, learned", "density, learned",
    ],
)  # fmt: skip
def test_what_is_not_an_ordinary_number_passes_as_in_the_reference(name, assert_same_bits):
    values = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e38, 1e-40, -0.0])
    case = replace(CASES[name], n=5, batch=len(values))
    arguments = case.arguments(0)
    tensors = [*arguments["model_outputs"], arguments["x"], arguments["y"]]
    for k, tensor in enumerate(t for t in tensors if t is not None):
        tensor[:, k] = values.to(tensor.dtype)
    assert_equal_the_references(case, arguments, assert_same_bits)


def test_memory_that_is_not_aligned(assert_same_bits):
    case = replace(HYBRID, n=1030)
    arguments, expected = case.arguments(0), outputs_of(case)
    REFERENCE.loss(*loss_arguments(**arguments, outputs=expected))

    def moved(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)

    arguments["model_outputs"] = [moved(t).copy_(t) for t in arguments["model_outputs"]]
    arguments["x"] = moved(arguments["x"]).copy_(arguments["x"])
    actual = outputs_of(case)
    TRITON.loss(*loss_arguments(**arguments, outputs=actual))
    assert_same_bits(actual[0], expected[0])


def test_nothing_is_launched_for_nothing():
    empty = Case(batch=0)
    arguments = empty.arguments(0)
    assert loss.prepare(*loss_arguments(**arguments, outputs=outputs_of(empty))) is None
    assert loss.prepare_grad(*gradient_arguments(empty, arguments)[1]) is None


def test_a_sample_without_elements_has_its_offset(assert_same_bits):
    case = Case(n=0, batch=2)
    arguments, outputs = case.arguments(0), outputs_of(case)
    TRITON.loss(*loss_arguments(**arguments, outputs=outputs))
    offsets = arguments["table"][arguments["rows"], COLUMNS.index("error_offset")]
    assert_same_bits(outputs[0], offsets[None])


def test_a_loss_is_two_launches_and_its_gradient_one():
    arguments = HYBRID.arguments(0)
    run = backend.prepare("loss")(*loss_arguments(**arguments, outputs=outputs_of(HYBRID)))
    assert run.then is not None and run.then.then is None
    assert run.then.grid == (HYBRID.batch, 1)
    run = backend.prepare("loss_grad")(*gradient_arguments(HYBRID, arguments)[1])
    assert run.then is None


def test_float64_noise_is_refused():
    case = Case(error=0b10100, noise_dtype=torch.float64)
    call = loss_arguments(**case.arguments(0), outputs=outputs_of(case))
    with pytest.raises(TypeError, match="float64 noise"):
        TRITON.loss(*call)
