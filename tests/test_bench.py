"""`fastdiff bench`: every case runs and is checked, and the report says what was measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastdiff.benchmarks import registry
from fastdiff.benchmarks.registry import ALL, Case, Contest, Unavailable, cases
from fastdiff.profiling import (
    bench,
    bench_job,
    bench_report,
    timing,
)
from fastdiff.profiling.bench_job import Settings, measure
from fastdiff.profiling.timing import Timing, interleaved
from tests.conftest import load_helper

ROOT = Path(__file__).resolve().parent.parent
BRIEF = Settings(rounds=2, seconds=0.0, budget=0.0)
reports = load_helper("bench_reports")
row = reports.row
OURS = ("limits", "operations", "scaling")  # tests/test_bench_cases.py has the rest
# Reasons that a contestant of a smoke run may be absent for.
MAY_LACK = ("bfloat16", "to keep the run short", "one thread only", "seconds a call")


@pytest.fixture
def smoke(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDIFF_BENCH_SMOKE", "1")


@pytest.fixture
def no_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of cases of the test's own, and this process's allocator left alone."""
    monkeypatch.setattr(registry, "_registered", {})
    monkeypatch.setattr(bench, "cases", lambda only, quick: cases(only, quick, ("own",)))
    monkeypatch.setattr(registry.importlib, "import_module", lambda name: None)
    monkeypatch.setattr(bench, "keep_memory", lambda: True)


def contest(**changes: object) -> Contest:
    """Ours and one opponent, both right."""
    parts: dict = dict(
        ours={"fastdiff": lambda: 1}, opponents={"eager": lambda: 1}, check=lambda name: None,
        elements=10, bytes=80,
    )  # fmt: skip
    return Contest(**(parts | changes))


def case(name: str = "one", **changes: object) -> Case:
    return Case("own", name, lambda: contest(**changes))


# Every case


@pytest.mark.parametrize("case", [c for c in cases() if c.group in OURS], ids=lambda c: c.id)
def test_every_case_runs_and_its_contestants_are_right(case: Case, smoke: None) -> None:
    result = measure(case, 1, BRIEF)
    assert result["status"] == "measured", result
    assert result["wrong"] == {}
    assert all(any(why in text for why in MAY_LACK) for text in result["absent"].values())
    assert result["elements"] > 0 and result["bytes"] > 0
    json.dumps(result)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("operations/normals fp32 16x4x64x64", "fastdiff"),
        ("operations/q_sample fp32 16x4x64x64", "eager"),
        ("operations/ddpm bf16 16x4x64x64", "eager"),
        ("operations/ddim+guidance fp32 16x4x64x64", "eager, fewest passes"),
        ("operations/unipc fp32+bf16 16x4x64x64", "eager, fewest passes"),
        ("scaling/size ddim 2^10", "eager, fewest passes"),
    ],
)
def test_check_of_a_case_refuses_a_result_that_is_off_by_a_tenth(
    name: str, wrong: str, smoke: None
) -> None:
    built = next(c for c in cases() if c.id == name).build()
    calls = built.ours if wrong in built.ours else built.opponents
    right = calls[wrong]

    def off() -> object:
        result = right()
        first = result if isinstance(result, torch.Tensor) else result[0]
        first.mul_(1.1)
        return result

    with torch.no_grad():
        built.check(wrong)
        calls[wrong] = off
        with pytest.raises(AssertionError):
            built.check(wrong)


def test_names_of_cases_say_group_operation_dtype_and_shape() -> None:
    listed = cases()
    assert len({c.id for c in listed}) == len(listed)
    assert all(c.group in registry.MODULES for c in listed)
    shapes = ("1x4x64x64", "16x4x64x64", "4x4x128x128", "1x16x128x128", "1x16x21x60x104",
              "64x3x256x256", "256x4x32x32", "1x16x7", "8x3x1024x1024")  # fmt: skip
    for operation in ("normals", "q_sample", "ddpm", "ddim+guidance"):
        for shape in shapes:
            assert cases([f"operations/{operation} fp32 {shape}"])


def test_smoke_makes_shapes_tiny_and_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTDIFF_BENCH_SMOKE", raising=False)
    assert registry.shape_of("64x3x256x256") == (64, 3, 256, 256)
    assert registry.compiled(abs) is not abs
    monkeypatch.setenv("FASTDIFF_BENCH_SMOKE", "1")
    assert registry.shape_of("64x3x256x256") == (4, 3, 4, 4)
    assert registry.compiled(abs) is abs


# One measurement


def test_contestants_take_turns_within_a_round() -> None:
    order: list[str] = []
    names = ("a", "b", "c")
    times = interleaved({n: lambda n=n: order.append(n) for n in names}, rounds=3, seconds=0.0)
    assert order[-9:] == ["a", "b", "c"] * 3
    assert all(len(times[n].seconds) == 3 for n in names)


def test_wrong_opponent_is_listed_and_not_timed() -> None:
    def check(name: str) -> None:
        assert name != "eager", "differs in 3 of 10 values"

    result = measure(case(check=check), 1, BRIEF)
    assert result["wrong"] == {"eager": "AssertionError: differs in 3 of 10 values"}
    assert result["opponents"] == {} and list(result["ours"]) == ["fastdiff"]


def test_opponent_that_does_not_run_is_absent_with_the_first_line_of_its_error() -> None:
    def compiles() -> None:
        raise RuntimeError("no compiler here\nand much more")

    result = measure(case(opponents={"compiled": compiles}), 1, BRIEF)
    assert result["absent"] == {"compiled": "RuntimeError: no compiler here"}
    assert result["status"] == "measured"


def test_quick_run_leaves_out_what_is_slow_to_compile() -> None:
    two = {"eager": lambda: 1, "compiled reference": lambda: pytest.fail("it ran")}
    listed = case(opponents=two, slow=("compiled reference",))
    result = measure(listed, 1, Settings(2, 0.0, 0.0, quick=True))
    assert "left out by --quick" in result["absent"]["compiled reference"]
    assert list(result["opponents"]) == ["eager"]


def test_case_of_which_nothing_of_ours_is_right_has_failed() -> None:
    def check(name: str) -> None:
        raise AssertionError("wrong")

    assert measure(case(check=check), 1, BRIEF)["status"] == "failed"


def test_case_that_cannot_be_built_says_why() -> None:
    def lacking() -> Contest:
        raise Unavailable("needs 12 GiB of memory, 8 are free")

    def broken() -> Contest:
        raise KeyError("x")

    missing = measure(Case("own", "a", lacking), 1, BRIEF)
    assert (missing["status"], missing["reason"]) == (
        "unavailable", "needs 12 GiB of memory, 8 are free",
    )  # fmt: skip
    assert measure(Case("own", "b", broken), 1, BRIEF)["status"] == "failed"


def test_ratios_are_those_of_rounds_and_the_slowest_kind_of_limit_binds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = {
        "fastdiff": [1.0, 2.0, 4.0], "eager": [3.0, 6.0, 8.0],
        "memory: slow copy": [0.9, 0.9, 0.9], "memory: copy": [0.5, 0.5, 0.5],
        "noise: alone": [0.8, 1.6, 3.2], "call: one": [0.1, 0.1, 0.1],
    }  # fmt: skip
    times = {name: Timing(np.array(values)) for name, values in given.items()}
    monkeypatch.setattr(bench_job, "interleaved", lambda calls, **_: {n: times[n] for n in calls})
    limits = {name: lambda: None for name in list(given)[2:]}
    result = measure(case(limits=limits), 1, BRIEF)
    low, middle, high = result["opponents"]["eager"]["ratio"]["fastdiff"]
    assert middle == 3.0 and 2.0 <= low < 3.0 and high == 3.0
    assert result["of_limit"]["fastdiff"]["limit"] == "noise: alone"
    assert result["of_limit"]["fastdiff"]["share"][1] == pytest.approx(0.8)


def test_thread_count_is_set_for_the_case_and_put_back() -> None:
    seen = []
    before = torch.get_num_threads()
    other = 1 if before > 1 else 2
    measure(case(ours={"fastdiff": lambda: seen.append(torch.get_num_threads())}), other, BRIEF)
    assert set(seen) == {other} and torch.get_num_threads() == before


# A run


def test_jobs_resolve_threads_and_repeat_cold_cases(
    no_cases: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "cores", lambda: 4)
    registry.register(Case("own", "a", contest, quick=True, threads=(1, 2, ALL, 8), cold=True))
    registry.register(Case("own", "b", contest))

    def listed(**options: object) -> list[tuple[str, int, str]]:
        return [(j.case.name, j.threads, j.memory) for j in bench.jobs(bench.Options(**options))]

    assert listed() == [
        ("a", 1, "warm"), ("a", 2, "warm"), ("a", 4, "warm"), ("b", 1, "warm"), ("a", 1, "cold"),
    ]  # fmt: skip
    assert listed(quick=True) == [("a", 1, "warm")]
    assert listed(only=["own/b"], threads=(3,), cold=True) == [("b", 3, "cold")]
    with pytest.raises(ValueError, match="'zzz' matches no case"):
        listed(only=["zzz"])
    with pytest.raises(ValueError, match="threads is 5, and this process may use 4 cores"):
        listed(threads=(5,))
    with pytest.raises(ValueError, match="no quick case"):
        listed(only=["own/b"], quick=True)


def test_a_full_run_is_planned_under_twenty_minutes_and_a_quick_one_under_two(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench, "cores", lambda: 2)
    for quick, minutes in ((False, 20), (True, 2)):
        options = bench.Options(quick=quick)
        assert bench.expected_seconds(bench.jobs(options), options) < 60 * minutes


def test_interrupted_run_keeps_what_was_measured(
    no_cases: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in "abc":
        registry.register(case(name))
    saved = []

    def measured(case: Case, threads: int, settings: Settings) -> dict:
        if case.name == "c":
            raise KeyboardInterrupt
        if case.name == "b":
            saved.append(len(bench.read(tmp_path / "report.json")["rows"]))
        return row(case.name)

    monkeypatch.setattr(bench, "measure", measured)
    result = bench.run(bench.Options(), tmp_path / "report.json")
    assert saved == [1]  # written after the first case
    assert result["interrupted"] and [r["name"] for r in result["rows"]] == ["a", "b"]
    assert bench.read(tmp_path / "report.json") == json.loads(json.dumps(result))
    assert "interrupted" in bench_report.text(result)


def test_budget_left_is_shared_among_the_cases_left(
    no_cases: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abcd":
        registry.register(case(name))
    budgets = []

    def measured(case: Case, threads: int, settings: Settings) -> dict:
        budgets.append(settings.budget)
        return row(case.name)

    monkeypatch.setattr(bench, "measure", measured)
    bench.run(bench.Options(budget=12.0))
    assert budgets[0] == pytest.approx(12 / 4 - bench.PREPARATION, abs=0.5)
    assert all(bench.LEAST <= b <= bench.MOST for b in budgets)


@pytest.mark.parametrize("memory", ["warm", "cold"])
def test_command_measures_and_writes_the_report(tmp_path: Path, memory: str) -> None:
    """In a process of its own: with warm memory it changes the allocator for good."""
    words = ["--only", "limits/one element", "--rounds", "2", "--seconds", "0.001"]
    words += ["--json", "r.json", "--markdown", "r.md", *(["--cold"] if memory == "cold" else [])]
    done = subprocess.run(
        [sys.executable, "-m", "fastdiff", "bench", *words],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env={**os.environ, "FASTDIFF_BENCH_SMOKE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (result,) = bench.read(tmp_path / "r.json")["rows"]
    assert (result["status"], result["memory"], result["rounds"]) == ("measured", memory, 2)
    assert f"one element, 1 thread, {memory} memory, 2 rounds" in done.stdout
    assert "| one element |" in (tmp_path / "r.md").read_text()


def test_conditions_and_machine_are_plain_values() -> None:
    assert set(timing.conditions()) == {"load", "mhz"}
    assert int(timing.machine()["cores"]) == timing.cores() >= 1
