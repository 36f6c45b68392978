"""Backends under test: every implementation that this machine can execute.

reference             the definition
native-<level>        the CPU kernels at every instruction level of this machine
cuda_host             csrc/cuda compiled by g++ and run on the host
triton                the Triton kernels in Triton's interpreter
"""

from __future__ import annotations

import os

# Both are read at the first import, so before anything else.
os.environ["TRITON_INTERPRET"] = "1"
# Tensors here are small, and the other cores compile kernels (below): threads would mostly wait for
# each other. Tests of what threads might change set their number.
os.environ["OMP_NUM_THREADS"] = "1"

import importlib.util
import json
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor

import fastdiff as fd
from fastdiff.backends import build, native

HERE = Path(__file__).parent
LEVELS = ("avx512_bf16", "avx512", "avx2", "portable")
BACKENDS = ("reference", *(f"native-{level}" for level in LEVELS), "cuda_host", "triton")
ACCELERATED = BACKENDS[1:]

# The same examples at every run; HYPOTHESIS_PROFILE=default explores others.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

INTEGER_VIEW = {
    torch.float32: torch.int32, torch.float64: torch.int64,
    torch.bfloat16: torch.int16, torch.float16: torch.int16,
}  # fmt: skip


def load_helper(name: str) -> Any:
    """A module of this folder that is not a test (tests are imported without a package)."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_is_gate)  # what they wait for goes on meanwhile
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="session", autouse=True)
def _interpreter() -> None:
    """Mends what Triton's interpreter gets wrong (bfloat16 casts)."""
    load_helper("triton_interpreter").install()


@pytest.fixture(scope="session")
def cuda_host() -> str:
    """The CUDA sources compiled for the host, registered as a backend named cuda_host."""
    from fastdiff.ops.schemas import define

    if "cuda_host" not in fd.backends.names():
        cuda_host.library = define("cuda_host")  # type: ignore[attr-defined]
        torch.ops.load_library(build.build(build.cuda_host_target()))
        fd.backends.register(
            "cuda_host",
            lambda device, dtype: (
                "the CUDA kernels have no float64" if dtype == torch.float64 else None
            ),
        )
    return "cuda_host"


def _enter(name: str, request: pytest.FixtureRequest) -> str:
    """Selects one of BACKENDS and returns the name that fastdiff knows it by."""
    if name == "cuda_host":
        return request.getfixturevalue("cuda_host")
    if name.startswith("native-"):
        reason = fd.backends.probe("native", torch.device("cpu"), torch.float32)
        assert reason is None, reason
        level = name.removeprefix("native-")
        if level not in native.isa_levels():
            pytest.skip(f"this CPU does not run {level}")
        best = native.isa()
        native.isa(level)
        request.addfinalizer(lambda: native.isa(best))
        return "native"
    return name


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend in turn, made the choice of the test's own calls."""
    name = _enter(request.param, request)
    with fd.use_backend(name):
        yield name


@pytest.fixture(params=ACCELERATED)
def accelerated(request: pytest.FixtureRequest) -> str:
    """Each backend but the reference; pass it as backend=."""
    return _enter(request.param, request)


def bits(value: Tensor) -> Tensor:
    """The integers behind a tensor, NaN payloads made equal."""
    value = torch.where(torch.isnan(value), torch.full_like(value, torch.nan), value)
    return value.contiguous().view(INTEGER_VIEW[value.dtype])


@pytest.fixture(scope="session")
def assert_same_bits() -> Callable[..., None]:
    """Asserts that tensors (or sequences of tensors) agree as integers."""

    def check(actual: Any, expected: Any) -> None:
        if isinstance(actual, Tensor):
            actual, expected = [actual], [expected]
        assert len(actual) == len(expected)
        for index, (a, b) in enumerate(zip(actual, expected, strict=True)):
            assert a.dtype == b.dtype and a.shape == b.shape, (index, a.dtype, b.dtype, a.shape)
            wrong = bits(a) != bits(b)
            assert not wrong.any(), (
                f"output {index}: {int(wrong.sum())} of {wrong.numel()} differ, first at "
                f"{wrong.nonzero()[0].tolist()}: {a[wrong][0].item()} != {b[wrong][0].item()}"
            )

    return check


@pytest.fixture(scope="session")
def known_answers() -> dict[str, Any]:
    """Known answers of the noise contract."""
    return json.loads((HERE / "data" / "noise_kat.json").read_text())


# ---- tests/test_gates.py: every kernel for every GPU, compiled beside the other tests

_COMPILING = pytest.StashKey[tuple[subprocess.Popen[str], Path]]()


def _is_gate(item: pytest.Item) -> bool:
    return "compiled_kernels" in getattr(item, "fixturenames", ())


def _step_aside() -> None:
    """A process group of its own that runs only where no test wants to: even a polite neighbour
    takes slices of time, for which the threads of a test then wait."""
    os.setpgrp()
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Starts the compilation, in processes in which Triton is a compiler."""
    if session.config.option.collectonly or not any(map(_is_gate, session.items)):
        return
    out = Path(tempfile.mkdtemp(prefix="fastdiff-gates-")) / "report.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fastdiff", "profile", "--target", "all"]
    with (out.parent / "stderr").open("w") as stderr:
        process = subprocess.Popen(
            [*command, "--gated", "--jobs", "2", "--json", str(out)],
            cwd=HERE.parent, env=environment, text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=stderr, preexec_fn=_step_aside,
        )  # fmt: skip
    session.config.stash[_COMPILING] = process, out


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _COMPILING in session.config.stash:
        process, out = session.config.stash[_COMPILING]
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
        shutil.rmtree(out.parent)


@pytest.fixture(scope="session")
def compiled_kernels(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The report of `fastdiff profile --target all --gated`."""
    process, out = request.config.stash[_COMPILING]
    status = process.wait()
    assert status == 0, (out.parent / "stderr").read_text()
    return json.loads(out.read_text())
