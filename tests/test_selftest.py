"""The self-test: its runner survives whatever a part does, and its parts find faults."""

from __future__ import annotations

import json
import math
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import fastdiff as fd
from fastdiff import backends, cli
from fastdiff.profiling.cases import Case, cases
from fastdiff.selftest import equality, fast_noise, figures, loops, page, part, runner, tools
from fastdiff.selftest.command import results_folder
from fastdiff.selftest.environment import gpu_environment
from fastdiff.selftest.known_answers import KNOWN
from fastdiff.selftest.parts import GPU_PARTS, HOST_PARTS
from fastdiff.selftest.runner import Outcome, Part, Report

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
libdevice = pytest.importorskip("triton.language.extra.libdevice")

HERE = Path(__file__).parent
ENDS = ("passes", "fails", "raises", "crashes", "is_killed", "writes_garbage")


def fake(name: str, **settings) -> Part:
    return Part(name, "a fake", f"selftest_parts:{name}", **settings)


@pytest.fixture
def fakes_importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(HERE))


@pytest.fixture(autouse=True)
def _threads():
    """Parts choose their number of threads, in a process of their own."""
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


def context(tmp_path, seconds=100.0, device="cpu", passed=(), out=None, **options):
    settings = part.Settings(
        "here:here", str(tmp_path / "result.json"), device=device, passed=list(passed), out=out,
        deadline=time.monotonic() + seconds, options=options,
    )  # fmt: skip
    return part.Context(settings)


# The runner


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """A run over parts that end in every way, one of which never does."""
    out = tmp_path_factory.mktemp("results")
    parts = [
        *(fake(name) for name in ENDS),
        Part("hangs", "a fake", "selftest_parts:hangs", limit=4),
        Part("required", "a fake", "selftest_parts:skips", required=True),
        Part("needy", "a fake", "selftest_parts:passes", needs="crashes"),
        Part("last", "a fake", "selftest_parts:passes", needs="passes"),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(HERE))
        report = runner.run(parts, device="cpu", seconds=600, out=out)
    return {outcome.name: outcome for outcome in report.outcomes}, report, out


def test_every_way_of_ending_costs_no_other_part(ended):
    outcomes, report, _ = ended
    assert {name: outcome.status for name, outcome in outcomes.items()} == {
        "passes": "passed",
        "fails": "failed",
        "raises": "failed",
        "crashes": "crashed",
        "is_killed": "crashed",
        "writes_garbage": "crashed",
        "hangs": "timed out",
        "required": "failed",
        "needy": "not run",
        "last": "passed",
    }
    assert report.bad and report.left_over == []


def test_a_failure_says_what_happened(ended):
    outcomes, *_ = ended
    assert outcomes["fails"].failures == ["one and one are three"]
    assert outcomes["raises"].failures == ["stopped by ZeroDivisionError: by nought"]
    assert "SIGSEGV" in outcomes["crashes"].failures[0]
    assert "SIGKILL" in outcomes["is_killed"].failures[0]
    assert "garbage" in outcomes["writes_garbage"].failures[0]
    assert outcomes["hangs"].failures[0].startswith("its process was stopped after 4 s")
    assert outcomes["required"].failures == ["nothing was tested: there is no such tool"]
    assert outcomes["needy"].notes == ["it needs crashes, which has not passed"]


def test_checks_made_before_the_end_are_kept(ended):
    outcomes, *_ = ended
    assert [outcomes[name].checks for name in ("passes", "fails", "raises", "is_killed")] == [
        1, 2, 1, 1
    ]  # fmt: skip
    assert outcomes["last"].notes == ["after passes"]  # only what passed


def test_results_are_one_json_one_page_and_a_log(ended):
    outcomes, _, out = ended
    assert sorted(path.name for path in out.iterdir()) == ["log.txt", "report.txt", "results.json"]
    document = json.loads((out / "results.json").read_text())
    assert [o["name"] for o in document["outcomes"]] == list(outcomes)
    text = (out / "report.txt").read_text()
    assert text.splitlines()[1].startswith("FAILED: 2 passed, 3 failed, 3 crashed")
    assert all(name in text for name in outcomes) and len(text.splitlines()) <= 80
    assert b"garbage" in (out / "log.txt").read_bytes()


def run_fakes(names: list[str], out: Path) -> subprocess.CompletedProcess:
    """A runner in a process of its own, as the command line would have it."""
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from fastdiff import cli\n"
        "from fastdiff.selftest import command, runner\n"
        "command.HOST_PARTS = tuple(\n"
        "    runner.Part(name, 'a fake', f'selftest_parts:{name}') for name in sys.argv[2:])\n"
        "sys.exit(cli.main(['selftest', '--out', sys.argv[1]]))"
    )
    return subprocess.run(
        [sys.executable, "-c", code, str(out), *names], capture_output=True, text=True
    )


def test_a_killed_run_leaves_the_results_so_far(tmp_path, fakes_importable):
    done = run_fakes(["passes", "kills_the_runner", "fails"], tmp_path / "out")
    assert done.returncode == -signal.SIGKILL
    document = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(o["name"], o["status"]) for o in document["outcomes"]] == [("passes", "passed")]
    assert document["left_over"] == ["kills_the_runner", "fails"]
    assert "NOT FINISHED (kills_the_runner, fails" in (tmp_path / "out/report.txt").read_text()


def test_a_polite_kill_prints_the_results_so_far(tmp_path, fakes_importable):
    done = run_fakes(["passes", "stops_the_runner", "fails"], tmp_path / "out")
    assert done.returncode == 130
    assert "passes" in done.stdout and "NOT FINISHED" in done.stdout
    assert "interrupted" in done.stderr


def test_processes_share_a_part(monkeypatch, fakes_importable):
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    (outcome,) = runner.run([fake("shares", shards=3)], device="cpu", seconds=300).outcomes
    assert (outcome.status, outcome.checks) == ("passed", 3)
    assert outcome.data == {"items": [0, 3, 1, 4, 2], "sum": 10}


def stubbed(monkeypatch, seconds_each: float) -> list[tuple[str, float]]:
    """Replaces the running of parts by a clock that moves on; the limits that they were given."""
    now, limits = [0.0], []

    def run_part(part, device, limit, passed, out, scratch):
        limits.append((part.name, limit))
        now[0] += min(seconds_each, limit)
        return Outcome(part.name, part.about, runner.PASSED)

    monkeypatch.setattr(runner, "_run_part", run_part)
    monkeypatch.setattr(runner.time, "monotonic", lambda: now[0])
    return limits


def test_later_parts_keep_their_least_seconds(monkeypatch):
    limits = stubbed(monkeypatch, seconds_each=100.0)
    times = {"a": (80, 0), "b": (80, 0), "c": (50, 20), "d": (50, 10)}
    parts = [Part(n, "", "", limit=limit, least=least) for n, (limit, least) in times.items()]
    report = runner.run(parts, device="cpu", seconds=120)
    assert limits == [("a", 80), ("b", 10), ("c", 20), ("d", 10)]
    assert [outcome.status for outcome in report.outcomes] == ["passed"] * 4


def test_parts_without_time_are_named_and_say_so(monkeypatch):
    limits = stubbed(monkeypatch, seconds_each=100.0)
    report = runner.run([Part(n, "", "", limit=60) for n in "abc"], device="cpu", seconds=61)
    assert limits == [("a", 60)]
    assert [outcome.status for outcome in report.outcomes] == ["passed", "not run", "not run"]
    assert report.outcomes[1].notes == ["the time ran out: 1 s were left for it"]


def test_the_parts_exist_and_fit_the_time():
    for parts in (HOST_PARTS, GPU_PARTS):
        assert len({p.name for p in parts}) == len(parts)
        for p in parts:
            module, function = p.target.split(":")
            assert callable(getattr(sys.modules[module], function)), p.target
            assert p.needs is None or p.needs in [q.name for q in parts[: parts.index(p)]]
    assert GPU_PARTS[0].gate and sum(p.least for p in GPU_PARTS) < 200


def test_a_long_report_is_one_page():
    outcomes = [
        Outcome(
            f"part {k}",
            "about",
            "failed",
            1.0,
            9,
            [f"broken {n}" for n in range(9)],
            [f"note {n} " + "x" * 200 for n in range(40)],
        )
        for k in range(6)
    ]
    lines = page.page(Report("cpu", "today", 1.0, outcomes)).splitlines()
    assert len(lines) <= 80 and max(map(len, lines)) <= 140
    assert sum("broken 0" in line for line in lines) == 6
    assert sum("and 6 more" in line for line in lines) == 6


def test_json_has_no_strange_numbers():
    value = {"a": [math.nan, math.inf, 1.5], 2: (Path("x"), None, True)}
    assert part.plain(value) == {"a": ["nan", "inf", 1.5], "2": ["x", None, True]}


# The command


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_gpu_check_says_so(tmp_path, capsys):
    assert cli.main(["selftest", "--gpu", "--out", str(tmp_path / "out")]) == 2
    assert "there is no GPU to test: PyTorch" in capsys.readouterr().err


def test_results_that_cannot_be_written_stop_it_before_anything_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runner, "run", lambda *a, **k: pytest.fail("something ran"))
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "none" / "out"):
        assert cli.main(["selftest", "--out", str(out)]) == 2
        assert f"argument --out: results cannot be written to {out}" in capsys.readouterr().err
    assert cli.main(["selftest", "--minutes", "0"]) == 2
    assert "--minutes: must be in [0.1, 120]" in capsys.readouterr().err


def test_an_earlier_log_is_not_continued(tmp_path):
    folder = results_folder(str(tmp_path / "out"))
    (folder / "log.txt").write_text("old")
    assert not (results_folder(str(folder)) / "log.txt").exists()


def test_the_host_passes(tmp_path, capsys):
    assert cli.main(["selftest", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "PASSED: 3 passed" in text
    document = json.loads((tmp_path / "results.json").read_text())
    checks = {o["name"]: o["checks"] for o in document["outcomes"]}
    levels = len(backends.native.isa_levels())
    per_level = len(list(cases())) * sum(not s.big for s in equality.SITUATIONS)
    assert checks["native"] >= levels * per_level + len(KNOWN)


def test_make_gpu_check_is_the_command_with_this_machines_python():
    done = subprocess.run(
        ["make", "-n", "gpu-check", "PYTHON=some-python", "ARGS=--minutes 3"],
        cwd=HERE.parent, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "some-python -m fastdiff selftest --gpu --minutes 3"


def test_make_gpu_check_says_what_a_python_without_torch_lacks():
    done = subprocess.run(
        ["make", "gpu-check", "PYTHON=false"], cwd=HERE.parent, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stdout.startswith("false has no torch and triton")


# Equality


def test_the_known_answers_are_the_tests_own(known_answers):
    assert [
        (k.seed, k.sample, k.step, k.stream, k.first, k.n, [f"{b:08x}" for b in k.bits], k.total)
        for k in KNOWN
    ] == [
        (c["seed"], c["sample"], c["step"], c["stream"], c["first_element"], c["n"],
         c["normal_bits"][:4], int(c["sum_of_normal_bits_mod_2_64"]))
        for c in known_answers["cases"]
    ]  # fmt: skip


def with_operation(monkeypatch, op: str, change) -> None:
    """Makes the native operation do `change(arguments)` after its work."""
    original = backends._operations["native", op]

    def changed(*arguments):
        original(*arguments)
        change(arguments)

    monkeypatch.setitem(backends._operations, ("native", op), changed)


def one_bit(tensor: torch.Tensor) -> None:
    tensor.view(torch.int16).flatten()[-1] ^= 1


def test_equality_passes_where_bits_are_equal(tmp_path):
    found = context(tmp_path, backend="native", cases=["randn", "ddim"])
    equality.equality(found)
    assert not found.failures and found.checks > 100 and found.data["left_out"] == []


@pytest.mark.parametrize("case", [Case("randn"), Case("ddpm", torch.bfloat16), Case("chain")])
def test_equality_finds_one_wrong_bit(tmp_path, monkeypatch, case):
    def change(arguments):
        out = {"randn": lambda: arguments[0], "chain": lambda: arguments[-1],
               "step": lambda: arguments[1][0]}[case.op]()  # fmt: skip
        if out.dim() > 2:
            one_bit(out)

    with_operation(monkeypatch, case.op, change)
    found = context(tmp_path, backend="native", cases=[case.name])
    equality.equality(found)
    assert len(found.failures) >= 20
    assert case.id.split()[0] in found.failures[0] and "1 of " in found.failures[0]


def test_equality_finds_an_element_that_is_not_written(tmp_path, monkeypatch):
    def change(arguments):
        if arguments[0].dim() > 2:
            arguments[0].flatten()[0] = torch.nan

    with_operation(monkeypatch, "randn", change)
    found = context(tmp_path, backend="native", cases=["randn"])
    equality.equality(found)
    assert "nan where the definition has" in found.failures[0]


def test_big_tensors_are_compared_on_their_device(tmp_path, monkeypatch):
    big = equality.Situation("big", (2, 3, 5, 7), big=True)
    monkeypatch.setattr(equality, "SITUATIONS", (big,))
    found = context(tmp_path, backend="native", cases=["ddim"], big=True)
    equality.equality(found)
    levels = len(backends.native.isa_levels())
    assert not found.failures and found.checks == len(KNOWN) + (4 + 1) * levels
    found = context(tmp_path, backend="native", cases=["ddim"])  # on the CPU none are big
    equality.equality(found)
    assert found.checks == len(KNOWN) + levels


def test_an_operation_that_raises_is_a_failure_of_that_case_alone(tmp_path, monkeypatch):
    def change(arguments):
        if arguments[0].dim() > 2 and arguments[0].dtype == torch.float16:
            raise RuntimeError("out of luck")

    with_operation(monkeypatch, "randn", change)
    found = context(tmp_path, backend="native", cases=["randn"])
    equality.equality(found)
    failures = [failure for failure in found.failures if failure != "and more"]
    assert failures and all("fp16" in f and "out of luck" in f for f in failures)
    assert found.checks > len(found.failures)


def test_equality_stops_in_time_and_names_what_is_left(tmp_path):
    found = context(tmp_path, seconds=0.0, backend="native", cases=["randn"])
    equality.equality(found)
    assert len(found.data["left_out"]) == 6 * 8 + 2  # dtypes, exact and fast; situations
    assert found.notes[0].startswith("the time ran out for 50 comparisons, from randn fp32")


def test_a_backend_that_does_not_serve_is_skipped_with_its_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(backends, "probe", lambda *_: "it has no wings")
    found = context(tmp_path, backend="triton")
    equality.equality(found)
    assert found.skipped == "triton does not serve here: it has no wings"


def test_large_tensors_are_compared_in_windows(tmp_path):
    found = context(tmp_path, backends=["native", "reference"], elements=50_000)
    equality.large(found)
    assert not found.failures and found.checks == 30


@pytest.mark.parametrize("op", ["randn", "step"])
def test_large_tensors_show_what_is_wrong_at_the_end(tmp_path, monkeypatch, op):
    def change(arguments):
        one_bit(arguments[0] if op == "randn" else arguments[1][0][-1])

    with_operation(monkeypatch, op, change)
    found = context(tmp_path, backends=["native"], elements=50_000)
    equality.large(found)
    assert found.failures and all("1 of " in failure for failure in found.failures)


def test_fast_noise_is_held_to_its_bound(tmp_path, monkeypatch):
    options = dict(backends=["triton"], block=4096, programs=2, radius=8192, angle=8192,
                   random=8192, stored=5000)  # fmt: skip
    found = context(tmp_path, **options)
    fast_noise.fast_noise(found)
    assert not found.failures and found.checks == 11
    assert 0 < found.data["radius"]["largest"] < 2e-6  # the interpreter's functions are accurate
    assert found.data["at_one"] == {"words": 64, "exact": 0.0, "fast": 0.0}
    monkeypatch.setattr(fast_noise, "FAST_BOUND", 1e-8)
    found = context(tmp_path, **options)
    fast_noise.fast_noise(found)
    assert [f.split(":")[0] for f in found.failures] == ["radius", "angle", "random"]


@triton.jit
def wrong_log2(x):
    return tl.log2(x) * 1.00001


def test_deviations_are_counted():
    from fastdiff.kernels import probes

    words = torch.zeros(256, 2, dtype=torch.int64)
    words[:, 0] = 2 * torch.arange(256)
    exact, fast = torch.empty(256, 2), torch.empty(256, 2)
    probes.normals_of(words, exact, False)()
    original = libdevice.fast_log2f
    libdevice.fast_log2f = wrong_log2
    try:
        probes.normals_of(words, fast, True)()
        largest, counts = torch.zeros(2), torch.zeros(2, 6, dtype=torch.int32)
        probes.deviation(largest, counts, "radius", 0, 0, 128)()
    finally:
        libdevice.fast_log2f = original
    gap = (fast - exact).abs().amax(1).view(2, 128)
    assert torch.equal(largest, gap.amax(1)) and float(gap.max()) > 2e-5
    expected = [[int((row > limit).sum()) for limit in probes.THRESHOLDS] + [0] for row in gap]
    assert counts.tolist() == expected


# Loops, tools, figures


def test_loops_pass_on_the_cpu(tmp_path):
    found = context(tmp_path, timed=False)
    loops.loops(found)
    assert not found.failures and found.checks == 24
    assert {v["ours"] for v in found.data["launches"].values()} == {10}


def test_launches_are_counted():
    ours, others = loops._launches(lambda: [fd.randn((2,), seed) for seed in range(3)], "cpu")
    assert len(ours) == 3 and not others


def test_a_captured_loop_with_other_bits_is_found(tmp_path, monkeypatch):
    original = fd.capture.CapturedLoop.__call__
    monkeypatch.setattr(
        fd.capture.CapturedLoop, "__call__", lambda *a, **k: original(*a, **k) + 1e-3
    )
    found = context(tmp_path, timed=False)
    loops.captured(found)
    assert len(found.failures) == found.checks == 12


def test_end_to_end_runs(tmp_path):
    found = context(tmp_path, steps=2, count=1)
    loops.end_to_end(found)
    assert not found.failures and found.checks == 2
    assert set(found.data["loop_us_per_step"]) == {
        "fastdiff", "captured", "an operation at a time"
    }  # fmt: skip
    assert found.data["digits"]["pictures"] == 10


def test_the_environment_of_a_gpu_part_needs_a_gpu(tmp_path):
    found = context(tmp_path)
    gpu_environment(found)
    assert found.skipped is None and any("torch" in note for note in found.notes)


SANITIZER = """#!/bin/sh
[ "$1 $2 $3 $4" = "--tool memcheck --print-limit 20" ] || exit 9
shift 4
"$@"
{report}
echo "========= ERROR SUMMARY: {count} errors"
"""
FINDING = """echo "========= Invalid __global__ write of size 4 bytes"
echo "=========     at {kernel}+0x70"
echo "=========     Address 0x7f is out of bounds"
echo "=========     Saved host backtrace up to driver entry point at kernel launch time"
echo "=========         Host Frame: c10::Dispatcher::callBoxed in libtorch_cpu.so"
echo "========="
"""


@pytest.mark.parametrize(
    ("kernel", "count"), [(None, 0), ("void at::native::fill_kernel()", 1), ("step_kernel", 1)]
)
def test_memory_checks_judge_our_kernels(tmp_path, monkeypatch, kernel, count):
    script = tmp_path / "compute-sanitizer"
    report = "" if kernel is None else FINDING.format(kernel=kernel)
    script.write_text(SANITIZER.format(report=report, count=count))
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(tools, "_CHECKERS", ("memcheck",))
    monkeypatch.setattr(tools, "served", lambda context: ["native"])
    found = context(tmp_path, cases=["randn"])
    tools.memory_checks(found)
    assert found.skipped is None
    assert f"memcheck, native: ERROR SUMMARY: {count} errors" in found.notes[0]
    if kernel == "step_kernel":
        assert "1 findings" in found.failures[0] and "step_kernel" in found.failures[0]
    else:
        assert not found.failures


def test_a_memory_checker_that_does_not_work_is_no_failure(tmp_path, monkeypatch):
    script = tmp_path / "compute-sanitizer"
    script.write_text("#!/bin/sh\necho Device not supported\nexit 1\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = context(tmp_path, cases=["randn"])
    tools.memory_checks(found)
    assert found.skipped == "compute-sanitizer does not work here" and not found.failures
    assert found.notes[0] == "memcheck, triton: did not work here: Device not supported"


def test_marked_tests_report_their_failures(tmp_path):
    folder = tmp_path / "tests"
    folder.mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs one\n")
    (folder / "test_marked.py").write_text(
        "import pytest\n"
        "@pytest.mark.gpu\ndef test_good(): assert 1 == 1\n"
        "@pytest.mark.gpu\ndef test_bad(): assert 1 == 2\n"
        "def test_other(): assert 1 == 3\n"
    )
    (folder / "test_unmarked.py").write_text("import nothing_of_this_name\n")
    found = context(tmp_path, root=str(tmp_path))
    tools.marked_tests(found)
    assert len(found.failures) == 1 and "test_bad" in found.failures[0]
    assert found.checks == 1 and "1 failed, 1 passed" in found.notes[0]


def test_the_cuda_library_is_not_tried_without_nvcc(tmp_path, monkeypatch):
    from fastdiff.backends import toolchain

    def none(kind):
        raise backends.native.builder.BuildError("no nvcc: install the CUDA toolkit")

    monkeypatch.setattr(toolchain, "find_compiler", none)
    found = context(tmp_path)
    tools.cuda_library(found)
    assert found.skipped == "it cannot be built here: no nvcc: install the CUDA toolkit"


def test_figures_are_measured_and_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    found = context(
        tmp_path, seconds=300, out=str(tmp_path), large=(2, 2, 16, 16), small=(1, 2, 8, 8),
        l2=2**16, cases=["randn", "ddim_guided"],
    )  # fmt: skip
    figures.measure(found)
    assert not found.failures
    kept = json.loads((tmp_path / "profile.json").read_text())
    assert kept["kind"] == "measured"
    timed = {(row["case"], tuple(row["shape"])) for row in kept["rows"] if "us" in row}
    assert ("randn bf16 fast", (2, 2, 16, 16)) in timed
    assert ("ddim_guided fp32", (1, 2, 8, 8)) in timed
    assert any("ddim_guided fp32" in note and "native" in note for note in found.notes)


def test_predictions_that_fail_leave_the_measurements(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)

    def fails(report):
        raise OSError("no c++filt")

    original = figures.measured.profile
    monkeypatch.setattr(figures, "add_predictions", fails)
    monkeypatch.setattr(
        figures.measured, "profile", lambda device, *a, **k: original("cpu", *a, **k)
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(figures, "_PREDICTION_SECONDS", 0)
    monkeypatch.setattr(figures, "served", lambda context: ["native"])
    found = context(
        tmp_path, seconds=300, device="cuda", large=(2, 2, 8, 8), small=(1, 2, 8, 8), l2=2**12,
        cases=["ddim_guided"],
    )  # fmt: skip
    figures.measure(found)
    assert not found.failures and found.checks >= 4
    assert "no predictions: OSError: no c++filt" in found.notes
