"""What a self-test consists of, in order of worth."""

from __future__ import annotations

from fastdiff.selftest.runner import Part
from fastdiff.selftest.tools import LIBRARY

__all__ = ["GPU_PARTS", "HOST_PARTS"]

_HERE = "fastdiff.selftest"

HOST_PARTS = (
    Part(
        "reference",
        "the definition: known noise",
        f"{_HERE}.equality:definition",
        limit=300,
        required=True,
    ),
    Part(
        "native",
        "the C++ kernels, every instruction level: known noise, all cases, bit for bit",
        f"{_HERE}.equality:equality",
        limit=300,
        shards=2,
        options={"backend": "native"},
    ),
    Part(
        "loops",
        "one launch a step; captured loops equal ordinary ones",
        f"{_HERE}.loops:loops",
        limit=300,
        options={"timed": False},
    ),
)

GPU_PARTS = (
    Part(
        "machine",
        "what this machine is",
        f"{_HERE}.environment:gpu_environment",
        limit=60,
        gate=True,
    ),
    Part(
        "triton",
        "Triton kernels against the CPU's bits: known noise, all cases, sizes, alignments",
        f"{_HERE}.equality:equality",
        limit=150,
        shards=8,
        required=True,
        options={"backend": "triton"},
    ),
    Part(
        "reference",
        "the definition on the GPU against the CPU's bits",
        f"{_HERE}.equality:equality",
        limit=45,
        shards=4,
        required=True,
        options={"backend": "reference"},
    ),
    Part(
        "large tensors",
        "more than 2^31 elements",
        f"{_HERE}.equality:large",
        limit=45,
        options={"backends": ["triton"]},
    ),
    Part(
        "fast noise",
        "its error, over every word",
        f"{_HERE}.fast_noise:fast_noise",
        limit=45,
        options={"backends": ["triton"]},
    ),
    Part(
        "steps",
        "a warm loop waits for nothing and launches one kernel a step",
        f"{_HERE}.loops:steps",
        limit=40,
    ),
    Part(
        "captured loop",
        "CUDA graphs of whole loops, replayed with new values",
        f"{_HERE}.loops:captured",
        limit=45,
    ),
    Part(
        LIBRARY,
        "csrc compiled by nvcc for this GPU",
        f"{_HERE}.tools:cuda_library",
        limit=100,
    ),
    Part(
        "native",
        "CUDA C++ kernels against the CPU's bits",
        f"{_HERE}.equality:equality",
        limit=60,
        shards=4,
        needs=LIBRARY,
        options={"backend": "native"},
    ),
    Part(
        "native, large",
        "CUDA C++ kernels: more than 2^31 elements",
        f"{_HERE}.equality:large",
        limit=40,
        needs=LIBRARY,
        options={"backends": ["native"]},
    ),
    Part(
        "native, fast noise",
        "CUDA C++ kernels: its error",
        f"{_HERE}.fast_noise:fast_noise",
        limit=30,
        needs=LIBRARY,
        options={"backends": ["native"]},
    ),
    Part(
        "memory checks",
        "compute-sanitizer: memcheck, racecheck, initcheck",
        f"{_HERE}.tools:memory_checks",
        limit=90,
        options={
            "cases": ["randn", "q_sample", "ddpm_clipped", "ddim_guided", "chain"],
        },
    ),
    Part(
        "marked tests",
        "the tests that are for GPUs",
        f"{_HERE}.tools:marked_tests",
        limit=60,
    ),
    Part(
        "measured profile",
        "time, GB/s and share of the copy's speed (profile.json)",
        f"{_HERE}.figures:measure",
        limit=180,
        least=90,
    ),
    Part(
        "end to end",
        "the shipped model, and a loop's own time",
        f"{_HERE}.loops:end_to_end",
        limit=40,
        least=15,
    ),
    Part(
        "tuning",
        "launch parameters for this GPU (launch.json, which nothing reads there)",
        f"{_HERE}.figures:tuning",
        limit=240,
        least=10,
        optional=True,
    ),
)
