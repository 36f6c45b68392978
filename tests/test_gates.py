"""What the GPU kernels compile to, held to tests/data/gpu_gates.json; and the gates themselves.

The kernels are compiled by a process that tests/conftest.py starts with the session; these tests
come last. To record the figures anew: `fastdiff profile --target all --record
tests/data/gpu_gates.json`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastdiff.profiling import gates
from fastdiff.profiling.cases import cases
from fastdiff.profiling.gpus import TARGETS

FILE = Path(__file__).parent / "data" / "gpu_gates.json"
NVIDIA = tuple(target for target in TARGETS if target.startswith("sm_"))
PAIRS = [("triton", target) for target in TARGETS] + [("cuda", target) for target in NVIDIA]


def held(backend: str, target: str) -> list[str]:
    """The cases that are held to figures; on AMD fast is exact."""
    return [
        case.id
        for case in cases()
        if gates.covers(case, target, backend) and (target in NVIDIA or not case.fast)
    ]


@pytest.fixture(scope="session")
def recorded() -> dict[str, Any]:
    return gates.load(FILE)


@pytest.mark.parametrize(("backend", "target"), PAIRS)
def test_kernels_stay_within_their_gates(
    compiled_kernels: dict[str, Any], recorded: dict[str, Any], backend: str, target: str
) -> None:
    if backend in compiled_kernels["left_out"]:
        pytest.skip(compiled_kernels["left_out"][backend])
    rows = [
        row
        for row in compiled_kernels["rows"]
        if row["backend"] == backend and row["target"] == target
    ]
    assert [row["case"] for row in rows] == held(backend, target)
    versions = compiled_kernels["versions"]
    broken = [
        f"{row['case']}: {what}" for row in rows for what in gates.breaches(recorded, row, versions)
    ]
    assert not broken, "\n".join(broken)


def test_every_exception_is_still_needed(
    compiled_kernels: dict[str, Any], recorded: dict[str, Any]
) -> None:
    if compiled_kernels["left_out"]:
        pytest.skip(str(compiled_kernels["left_out"]))
    for exception in recorded["exceptions"]:
        assert exception["reason"]
        others = [other for other in recorded["exceptions"] if other is not exception]
        without = {**recorded, "exceptions": others}
        assert any(
            gates.breaches(without, row, {}) != gates.breaches(recorded, row, {})
            for row in compiled_kernels["rows"]
        ), f"no kernel needs {exception}"


@pytest.mark.parametrize(("backend", "target"), PAIRS)
def test_the_file_has_every_figure_and_no_other(
    recorded: dict[str, Any], backend: str, target: str
) -> None:
    found = [case for case, cells in recorded[backend].items() if target in cells]
    assert sorted(found) == sorted(held(backend, target))


# ---- the gates themselves

ROW = {
    "case": "q_sample fp32", "backend": "triton", "target": "sm_90", "registers": 32, "spills": 0,
    "stack": 0, "shared": 0, "instructions": 50.0, "loop": 48.0,
    "width": 128,
    "arithmetic": {
        "contracted": 0, "approximate": 0, "flushing": 0, "nan_dropping": 0, "narrow": 0
    },
}  # fmt: skip
GATES = {
    "versions": {"triton": "3.9.0"}, "margin": 0.02, "targets": ["sm_90"],
    "limits": [{"cases": ["*"], "targets": ["sm_90"], "registers": 32, "loop": 53}],
    "exceptions": [],
    "triton": {"q_sample fp32": {"sm_90": "32 50.00 0"}},
}  # fmt: skip
SAME, OTHER = {"triton": "3.9.1"}, {"triton": "3.6.0"}


def test_a_row_as_recorded_breaks_nothing() -> None:
    assert gates.breaches(GATES, ROW, SAME) == []
    assert gates.breaches(GATES, {**ROW, "instructions": 51.0}, SAME) == []  # the margin


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"instructions": 51.1}, "51.10 instructions an element, recorded 50.00"),
        ({"registers": 33}, "33 registers, recorded 32"),
        ({"shared": 64}, "64 bytes of shared memory, recorded 0"),
        ({"spills": 2}, "spilled registers are loaded and stored: 2"),
        ({"stack": 8}, "bytes of stack are used: 8"),
        ({"width": 64}, "tensors are accessed 64 bits at a time, not 128"),
        ({"arithmetic": {"contracted": 3}}, "3 contracted in the code"),
        ({"arithmetic": {"narrow": 1}}, "1 narrow in the code"),
        ({"error": "it does not compile"}, "it does not compile"),
        ({"target": "sm_80"}, "nothing is recorded for it: record it"),
    ],
)
def test_what_a_worse_row_breaks_is_said_with_the_figure(
    change: dict[str, Any], sentence: str
) -> None:
    assert sentence in gates.breaches(GATES, {**ROW, **change}, SAME)


def test_fast_kernels_may_approximate_but_not_be_narrow() -> None:
    row = {**ROW, "case": "q_sample fp32 fast"}
    recorded = {**GATES, "triton": {"q_sample fp32 fast": {"sm_90": "32 50.00 0"}}}
    counts = {"contracted": 4, "approximate": 16, "flushing": 16}
    assert gates.breaches(recorded, {**row, "arithmetic": counts}, SAME) == []
    broken = gates.breaches(recorded, {**row, "arithmetic": {"narrow": 1}}, SAME)
    assert broken == ["1 narrow in the code"]


def test_with_another_compiler_only_what_is_absolute_holds() -> None:
    reason = gates.same_compiler(GATES, OTHER, "triton")
    assert reason == "recorded with triton 3.9.0, and this is 3.6.0"
    assert gates.breaches(GATES, {**ROW, "instructions": 54.0}, OTHER) == []
    broken = gates.breaches(GATES, {**ROW, "loop": 56.0, "registers": 40}, OTHER)
    assert broken == [
        "40 registers, and the limit is 32",
        "56 instructions an element in the loop, and the limit is 53",
    ]


def test_a_kernel_whose_instructions_cannot_be_counted_is_held_to_the_rest() -> None:
    row = {key: value for key, value in ROW.items() if key not in ("instructions", "loop", "width")}
    row["uncounted"] = "too many paths"
    broken = gates.breaches(GATES, row, SAME)
    assert broken == ["instructions are not counted: too many paths"]
    before = {**GATES, "triton": {"q_sample fp32": {"sm_90": "32 - 0"}}}
    assert gates.breaches(before, row, SAME) == []
    assert "33 registers, recorded 32" in gates.breaches(before, {**row, "registers": 33}, SAME)


def test_an_exception_stands_in_for_a_limit() -> None:
    exception = {
        "cases": ["q_sample *"], "targets": ["sm_90"], "backends": ["triton"], "registers": 40,
        "reason": "a test",
    }  # fmt: skip
    excused = {
        **GATES, "exceptions": [exception], "triton": {"q_sample fp32": {"sm_90": "40 50.00 0"}}
    }  # fmt: skip
    assert gates.breaches(excused, {**ROW, "registers": 40}, SAME) == []
    assert "41 registers, and the limit is 40" in gates.breaches(
        excused, {**ROW, "registers": 41}, SAME
    )


def test_recording_keeps_limits_and_says_what_moved(tmp_path: Path) -> None:
    path = tmp_path / "gates.json"
    path.write_text(json.dumps(GATES))
    report = {"versions": {"triton": "3.9.0"}, "rows": [{**ROW, "instructions": 40.0}]}
    said = gates.record(report, path)
    assert said == ["q_sample fp32 by triton on sm_90: 32 50.00 0 -> 32 40.00 0"]
    after = gates.load(path)
    assert after["limits"] == GATES["limits"]
    assert after["triton"] == {"q_sample fp32": {"sm_90": "32 40.00 0"}}
    said = gates.record({**report, "rows": [{**ROW, "registers": 48}]}, path)
    assert "wrong: q_sample fp32 by triton on sm_90: 48 registers, and the limit is 32" in said
    # A line for the case: a change shows as one line of a diff.
    assert sum("q_sample fp32" in line for line in path.read_text().splitlines()) == 1
