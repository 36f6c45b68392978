"""Selection, refusals with their reasons, operator checks, torch.compile."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch
import torch._dynamo.testing

import fastdiff as fd
from fastdiff import backends
from fastdiff.backends.info import info
from fastdiff.ops import held
from fastdiff.ops.bits import BOUND_COLUMNS, bits_arguments, bits_bound_arguments
from fastdiff.ops.schemas import SCHEMAS

CPU = torch.device("cpu")
SCHEDULE = fd.schedules.linear(20)
X = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))


def test_automatic_choice_on_the_cpu_is_native():
    assert backends.select(CPU, torch.float32) == "native"
    assert backends.select(CPU, torch.float64) == "native"
    assert backends.select(torch.device("meta"), torch.float32) == "reference"


def test_explicit_choices_win_innermost_first(monkeypatch):
    monkeypatch.setattr(backends, "_ENVIRONMENT", "triton")
    assert backends.select(CPU, torch.float32) == "triton"
    with fd.use_backend("reference"):
        assert backends.select(CPU, torch.float32) == "reference"
        with fd.use_backend("native"):
            assert backends.select(CPU, torch.float32) == "native"
            assert backends.select(CPU, torch.float32, "reference") == "reference"
        assert backends.select(CPU, torch.float32) == "reference"
    assert backends.select(CPU, torch.float32) == "triton"


def test_an_explicit_choice_that_cannot_serve_is_refused_with_the_reason():
    with pytest.raises(fd.BackendError, match=r"'triton' cannot serve cpu torch.float64: .*fl"):
        fd.q_sample(X.double(), 0, SCHEDULE, seed=0, backend="triton")
    with pytest.raises(ValueError, match="backend must be one of"), fd.use_backend("gpu"):
        pass


def test_the_environment_chooses_too():
    code = (
        "import torch, fastdiff as fd\n"
        "try: print(fd.backends.select(torch.device('cpu'), torch.float32))\n"
        "except fd.BackendError as error: print(error)"
    )
    assert "'triton' cannot serve cpu" in run_python(code, FASTDIFF_BACKEND="triton")
    assert run_python(code, FASTDIFF_BACKEND="").strip() == "native"


def test_what_the_environment_chooses_is_served_or_refused_by_name(monkeypatch):
    monkeypatch.setattr(backends, "_ENVIRONMENT", "reference")
    assert backends.select(CPU, torch.float32) == "reference"
    monkeypatch.setattr(backends, "_ENVIRONMENT", "cuda")
    with pytest.raises(ValueError, match="backend must be one of"):
        backends.select(CPU, torch.float32)


def test_choices_belong_to_their_thread():
    seen = {}

    def other():
        seen["thread"] = backends.select(CPU, torch.float32)

    with fd.use_backend("reference"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert seen["thread"] == "native"


def run_python(code: str, **environment: str) -> str:
    import os

    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True,
        env={**{k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}, **environment},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


def test_without_a_compiler_the_reference_serves_and_info_says_why(tmp_path):
    code = (
        "import torch, fastdiff as fd; from fastdiff.backends.info import info\n"
        "x = fd.randn((2, 5), 0); print(fd.backends.select(torch.device('cpu'), torch.float32))\n"
        "print(info())"
    )
    text = run_python(
        code, PATH=str(tmp_path), CXX=str(tmp_path / "none"), FASTDIFF_CACHE=str(tmp_path / "c")
    )
    assert text.startswith("reference")
    line = next(v for v in text.splitlines() if v.split()[:2] == ["native", "float32"])
    assert "no" in line.split() and "compiler" in line


def test_the_import_leaves_the_compiler_alone():
    """It takes longer to import than all the rest."""
    code = "import sys, fastdiff; print('torch._dynamo' in sys.modules)"
    assert run_python(code).strip() == "False"


def test_native_can_be_switched_off():
    code = (
        "import torch, fastdiff as fd\n"
        "print(fd.backends.select(torch.device('cpu'), torch.float32))"
    )
    assert run_python(code, FASTDIFF_NATIVE="0").strip() == "reference"


def test_importing_builds_nothing_and_needs_no_triton(tmp_path):
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import fastdiff as fd, torch\n"
        "from pathlib import Path\n"
        f"assert not Path({str(tmp_path / 'c')!r}).exists()\n"
        "for name in ('cpu', 'cuda'):\n"
        "    print(fd.backends.probe('triton', torch.device(name), torch.float32))"
    )
    lines = run_python(code, FASTDIFF_CACHE=str(tmp_path / "c")).splitlines()
    assert len(lines) == 2 and all(v.startswith("triton cannot be imported") for v in lines)


def test_info_lists_every_backend_and_operation():
    text = info()
    for word in ("machine", "cache", "torch", *SCHEMAS, *backends.names()):
        assert word in text
    rows = [v.split() for v in text.splitlines() if v.strip().startswith("triton ")]
    assert rows[-1][:5] == ["triton", "float64", "no", "no", "no"] and len(rows[-1]) > 5


# Operator checks.


def step_arguments():
    from fastdiff.ops import tables
    from fastdiff.ops.step import StepSpec
    from fastdiff.ops.step import step_arguments as arguments

    table = tables.uploaded(SCHEDULE, "x_t+noise", CPU, torch.float32)
    spec = StepSpec(states=1, outputs=(9, 8), draws=1)
    out = [torch.empty_like(X), torch.empty_like(X)]
    return arguments(
        spec, [X], table, torch.tensor([3, 4]), out, counter=(1, 0, 0, 2),
        model_input=torch.empty(4, 3, 5, dtype=torch.bfloat16),
    )  # fmt: skip


def bits_bound(mixture, gradients=None):
    table, rows = torch.rand(3, BOUND_COLUMNS), torch.tensor([2])
    outputs = [torch.empty(2), torch.empty(2, 1)] if gradients is None else [torch.empty_like(X)]
    return bits_bound_arguments(
        outputs, X, X.relu(), (-X).relu(), table, rows, mixture=mixture, gradients=gradients
    )


def loss(gradients=None):
    from fastdiff.ops.loss import COLUMNS, ERROR, LossSpec, loss_arguments

    table, rows = torch.rand(3, len(COLUMNS)), torch.tensor([2])
    outputs = [torch.empty(1, 2), torch.empty(1, 2, 1)]
    if gradients is not None:
        outputs = [torch.empty_like(X)]
    spec = LossSpec(ERROR, error=0b10101)
    return loss_arguments(
        spec, outputs, [X], -X, None, table, rows, gradients=gradients, counter=(5, 0, 1, 2)
    )


ARGUMENTS = {
    "loss": loss,
    "loss_grad": lambda: loss(gradients=torch.rand(1, 2)),
    "randn": lambda: (torch.empty(2, 9), None, 5, 0, 0, 1, 0, False),
    "step": step_arguments,
    "bits": lambda: bits_arguments(
        torch.empty_like(X), torch.rand(4, 4), torch.tensor([3, 1]), logits=X, x=X.relu(),
        counter=(5, 0, 1, 6),
    ),
    "bits_bound": lambda: bits_bound(mixture=True),
    "bits_bound_grad": lambda: bits_bound(mixture=False, gradients=torch.rand(2)),
    "chain": lambda: (
        X, None, torch.rand(4, 2), torch.tensor([0, -1, -1, 1]), None, 3, 0, False,
        torch.empty(2, 2, 3, 5),
    ),
}  # fmt: skip


@pytest.mark.parametrize("op", SCHEMAS)
def test_operator_checks(backend, op):
    """torch.library.opcheck: schema, fake kernel, AOT dispatch under dynamic shapes."""
    operation = backends.operation(op, CPU, torch.float32)
    result = torch.library.opcheck(operation, ARGUMENTS[op]())
    assert set(result.values()) == {"SUCCESS"}


def test_every_namespace_has_the_same_schemas(cuda_host):
    for name in backends.names():
        for op, schema in SCHEMAS.items():
            found = str(getattr(getattr(torch.ops, f"fastdiff_{name}"), op).default._schema)
            assert found == f"fastdiff_{name}::{op}{schema}"


# torch.compile.


@pytest.mark.parametrize("name", ["reference", "native"])
def test_compiled_functions_give_the_same_bits(name, assert_same_bits):
    plan = fd.solvers.ddpm(SCHEDULE)

    def training_step(x, t, step):
        x_t, noise, v = fd.q_sample(
            x, t, SCHEDULE, seed=1, step=step, return_noise=True, target="v", backend=name
        )
        mean, _, log_variance = fd.q_posterior_mean_variance(x, x_t, t, SCHEDULE, backend=name)
        y = fd.p_sample(v, x_t, t, SCHEDULE, seed=2, backend=name)
        w = fd.ddim_sample(v, x_t, t, SCHEDULE, backend=name)
        return x_t, noise, v, mean, log_variance, y, w, fd.randn((2, 3), 4, backend=name)

    compiled = torch.compile(training_step, fullgraph=True)
    t = torch.tensor([3, 19])
    for step in (0, 7):
        assert_same_bits(compiled(X, t, step), training_step(X, t, step))
    assert plan.rows == 20


def test_compiled_functions_notice_another_schedule(assert_same_bits):
    def noise_it(x, schedule):
        return fd.q_sample(x, 5, schedule, seed=0)

    compiled = torch.compile(noise_it, fullgraph=True)
    for schedule in (SCHEDULE, fd.schedules.cosine(30), fd.schedules.flow(8)):
        assert_same_bits(compiled(X, schedule), noise_it(X, schedule))


def test_a_compiled_graph_keeps_its_tables_when_others_come_and_go(monkeypatch, assert_same_bits):
    def noise_it(x):
        return fd.q_sample(x, 5, SCHEDULE, seed=0)

    monkeypatch.setattr(held, "_LIMIT", 2)
    compiled = torch.compile(noise_it, fullgraph=True)
    expected = compiled(X)
    for k in range(6):
        other = fd.schedules.cosine(20 + k)
        fd.q_sample(X, 5, other, seed=0)
        torch.compile(lambda x, s=other: fd.q_sample(x, 5, s, seed=0), backend="eager")(X)
    assert_same_bits(compiled(X), expected)
    assert_same_bits(noise_it(X), expected)


def test_a_new_training_step_does_not_recompile():
    counter = torch._dynamo.testing.CompileCounter()

    def noise_it(x, step):
        return fd.q_sample(x, 5, SCHEDULE, seed=0, step=step)

    compiled = torch.compile(noise_it, backend=counter, fullgraph=True)
    results = [compiled(X, step) for step in range(8)]
    assert counter.frame_count <= 2  # once as a constant, once for any step
    assert all(not torch.equal(results[0], r) for r in results[1:])


def test_compiled_gradients(assert_same_bits):
    x = X.clone().requires_grad_()

    def loss(x):
        return (fd.q_sample(x, 5, SCHEDULE, seed=0) ** 2).sum()

    (expected,) = torch.autograd.grad(loss(x), x)
    (actual,) = torch.autograd.grad(torch.compile(loss, fullgraph=True)(x), x)
    torch.testing.assert_close(actual, expected)
