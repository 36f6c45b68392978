"""The measured profile: what is timed, what is refused, and the tools around it."""

from __future__ import annotations

import contextlib
import itertools
import json
import stat
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastdiff import backends
from fastdiff.profiling import agreement, expected, gpu_state, measured, nsight, stopwatch
from fastdiff.profiling.cases import Case, cases

SHAPE = (2, 3, 16, 16)
L2 = 2**16
IN_PLACE = [c for c in cases() if c.op == "step" and c.name not in ("q_sample", "q_posterior")]


def profiled(*chosen: Case, seconds: float = 2.0, **options) -> dict:
    return measured.profile("cpu", chosen, shape=SHAPE, seconds=seconds, l2=L2, **options)


def row(report: dict, case: str, backend: str) -> dict:
    (found,) = [r for r in report["rows"] if (r["case"], r["backend"]) == (case, backend)]
    return found


@pytest.fixture(scope="module")
def report():
    chosen = [Case("randn"), Case("ddim_guided", torch.bfloat16), Case("chain", fast=True)]
    return profiled(*chosen, backends=["native", "reference"])


def test_figures_belong_together(report):
    elements = 2 * 3 * 16 * 16
    for case, size in (("randn fp32", 4), ("ddim_guided bf16", 8), ("chain fp32 fast", 36)):
        found = row(report, case, "native")
        low, middle, high = found["us"]
        assert 0 < low <= middle <= high and found["bytes"] == size
        assert found["gelem_s"] == pytest.approx(elements / middle / 1e3)
        assert found["gb_s"] == pytest.approx(size * found["gelem_s"])
        assert 0 < found["of_copy"] < 20 and found["rounds"] >= 5
        assert found["hot_us"][1] > 0 and found["host_us"] > 0
        assert row(report, case, "reference")["us"][1] > 0
    assert row(report, "ddim_guided bf16", "eager")["us"][1] > 0


def test_a_report_is_json_and_a_table(report):
    assert json.loads(json.dumps(report))["kind"] == "measured"
    assert report["machine"]["device"] == "cpu" and "torch" in report["versions"]
    lines = measured.table(report).splitlines()
    assert len(lines) == 2 + len(report["rows"])
    line = next(v for v in lines if v.startswith("randn fp32") and "native" in v)
    found = row(report, "randn fp32", "native")
    assert f"{found['us'][1]:.1f}" in line and f"{100 * found['of_copy']:.0f} %" in line
    assert max(map(len, lines[1:])) <= 140


def test_a_wrong_result_is_reported_and_not_timed(monkeypatch):
    original = backends._operations["native", "randn"]

    def wrong(out, *rest):
        original(out, *rest)
        out.view(torch.int32).flatten()[5] ^= 1

    monkeypatch.setitem(backends._operations, ("native", "randn"), wrong)
    found = row(profiled(Case("randn")), "randn fp32", "native")
    assert "1 of 1536 elements are wrong, the first at [0, 0, 0, 5]" in found["error"]
    assert "us" not in found


def test_one_case_that_cannot_be_measured_costs_no_other(monkeypatch):
    original = Case.arguments

    def arguments(self, shape, *rest, **options):
        if self.name == "randn" and shape == SHAPE:
            raise RuntimeError("out of memory")
        return original(self, shape, *rest, **options)

    monkeypatch.setattr(Case, "arguments", arguments)
    report = profiled(Case("randn"), Case("ddim"))
    assert "out of memory" in row(report, "randn fp32", "any")["error"]
    assert row(report, "ddim fp32", "native")["us"][1] > 0


def test_cases_without_time_are_named():
    report = profiled(Case("ddim"), Case("randn"), Case("chain"), seconds=0.0)
    assert {r["case"] for r in report["rows"]} == {"ddim fp32"}  # one is always measured
    assert report["left_out"] == ["randn fp32", "chain fp32"]
    assert "the time ran out for 2: randn fp32" in measured.table(report)


def test_a_backend_that_does_not_serve_is_named_with_its_reason(monkeypatch):
    original = backends.probe
    monkeypatch.setattr(
        backends, "probe", lambda name, *rest: "no" if name == "triton" else original(name, *rest)
    )
    report = profiled(Case("randn"), backends=["triton", "native"])
    assert report["refused"] == {"triton": "no"}
    assert {r["backend"] for r in report["rows"]} == {"native", "eager"}


def test_torch_compile_takes_part_when_asked(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    report = profiled(Case("randn"), compiled=[Case("ddim")], seconds=60)
    assert row(report, "ddim fp32", "compiled")["us"][1] > 0
    assert row(report, "ddim fp32", "compiled")["compile_s"] > 0


def test_a_gpu_that_is_not_there_is_refused():
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device is cuda, and PyTorch finds no GPU"):
            measured.profile("cuda", [Case("randn")])


def test_launches_go_round_over_more_than_the_cache(monkeypatch):
    seen = []
    original = measured._Profile._rounds

    def rounds(self, case, contestants, arguments, copies, seconds):
        seen.append((case, copies, contestants))
        return original(self, case, contestants, arguments, copies, seconds)

    monkeypatch.setattr(measured._Profile, "_rounds", rounds)
    profiled(Case("ddim"), Case("randn", torch.bfloat16))
    for case, copies, contestants in seen:
        tensors = {t.data_ptr() for c in copies for t in agreement.written_by(case, c)}
        assert len(tensors) == len(copies)
        assert len(copies) * case.bytes_per_element * 1536 >= 3 * L2
        assert len(contestants["native"].calls) == len(copies)
        assert len(contestants["native, hot"].calls) == 1


def test_steps_in_place_start_from_the_same_sample_every_time():
    case = Case("ddpm")
    arguments = case.arguments(SHAPE, "cpu")
    copies = [agreement.copied(arguments, "cpu") for _ in range(2)]
    for copy in copies:
        copy[0][0].fill_(torch.inf)
    measured._restore(case, arguments, copies)
    assert all(torch.equal(copy[0][0], arguments[0][0]) for copy in copies)


def test_the_order_is_that_of_worth():
    found = [case.id for case in measured.ordered(list(cases()))]
    assert found[0] == "randn fp32" and len(found) == len(list(cases()))
    assert found.index("ddpm_clipped bf16 fast") < found.index("ddpm_clipped fp16")
    assert (
        found.index("dpmpp_2m fp16") < found.index("dpmpp_2m fp32+bf16") < found.index("chain fp32")
    )


# Agreement


@pytest.mark.parametrize("case", IN_PLACE[:6], ids=lambda case: case.id)
def test_copies_keep_what_is_one_tensor_one(case):
    arguments = case.arguments(SHAPE, "cpu")
    for offset in (0, 3):
        copy = agreement.copied(arguments, "cpu", offset=offset)
        assert copy[0][0] is copy[1][0] and copy[0][0] is not arguments[0][0]
        assert torch.equal(copy[0][0], arguments[0][0]) and copy[0][0].storage_offset() == offset
        table = next(tensor for tensor in copy[0] if tensor.dim() == 2)
        assert table.storage_offset() == 0


def test_fast_noise_may_differ_within_the_contract_only():
    expected_ = [torch.tensor([[1.0, -2.0, 0.0]])]
    near, far = expected_[0] + 3.9e-4, expected_[0] + torch.tensor([[0.0, 0.0, 5e-4]])
    assert agreement.difference([near], expected_, exact=False) is None
    assert "1 of 3 elements" in agreement.difference([far], expected_, exact=False)
    assert "3 of 3" in agreement.difference([near], expected_)
    nothing = torch.full((1, 3), torch.nan)
    assert "3 of 3" in agreement.difference([nothing], expected_, exact=False)
    assert agreement.difference([nothing], [-nothing]) is None
    assert "1 of 3" in agreement.difference([expected_[0] * torch.tensor([1, 1, -1])], expected_)


# The stopwatch of a GPU, on a GPU of paper


class PaperGpu:
    """Takes the place of torch.cuda: calls take a known time, only within a recorded graph."""

    def __init__(self, monkeypatch, each: float) -> None:
        self.now, self.graph, self.each, self.replays = 0.0, None, each, 0
        self.spins: list[int] = []
        paper = self

        class Graph:
            def __init__(self):
                self.calls = 0

            def replay(self):
                paper.now += self.calls * paper.each
                paper.replays += 1

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = paper.now

            def synchronize(self):
                pass

            def elapsed_time(self, other):
                return (other.at - self.at) * 1e3

        class Recording:
            def __init__(self, graph, stream):
                assert stream is side
                paper.graph = graph

            def __enter__(self):
                return self

            def __exit__(self, *_):
                paper.graph = None

        side, current = (SimpleNamespace(wait_stream=lambda other: None) for _ in range(2))
        for name, value in dict(
            CUDAGraph=Graph, Event=Event, graph=Recording, Stream=lambda: side,
            current_stream=lambda: current, synchronize=lambda device: None,
            _sleep=self.spins.append, device=lambda device: contextlib.nullcontext(),
        ).items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.cuda, "stream", lambda s: torch.no_grad())

    def call(self) -> None:
        if self.graph is None:
            self.now += self.each
        else:
            self.graph.calls += 1


@pytest.mark.parametrize(("each", "replay"), [(5e-6, 200 * 5e-6), (2e-8, 1998 * 2e-8)])
def test_graphs_are_as_long_as_asked_and_timed_by_the_call(monkeypatch, each, replay):
    gpu = PaperGpu(monkeypatch, each)
    measure = stopwatch.stopwatch("cuda").prepare([gpu.call] * (2 if each > 1e-6 else 3), 1e-3)
    before = gpu.now
    assert measure() == pytest.approx(each)
    assert gpu.now - before == pytest.approx(replay)


def test_the_gpu_spins_for_longer_than_a_graph_takes_to_start(monkeypatch):
    gpu = PaperGpu(monkeypatch, 5e-6)
    ticks = itertools.count()
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: 1e-3 * next(ticks))
    stopwatch.stopwatch("cuda").prepare([gpu.call], 1e-3)()
    assert set(gpu.spins) == {200_000 + 2 * 2_000_000}


def test_plain_calls_are_timed_by_events(monkeypatch):
    gpu = PaperGpu(monkeypatch, 7e-6)
    call, host = stopwatch.stopwatch("cuda").plain(gpu.call, 10)
    assert call == pytest.approx(7e-6) and 0 < host < 1e-3


# Predictions


def test_the_gpu_of_a_report_is_found_in_the_table():
    machine = {"arch": "sm_90", "multiprocessors": 120, "l2": 5e7}
    for name, found in (("NVIDIA H200", "H200"), ("NVIDIA H100 PCIe", "H100 PCIe"),
                        ("NVIDIA H100 80GB HBM3", "H100 SXM")):  # fmt: skip
        assert expected.row_of({**machine, "gpu": name}, {}, 1.0).name == found
    unknown = expected.row_of({**machine, "gpu": "NVIDIA H400"}, {"clocks.max.sm": "2100"}, 4.0)
    assert (unknown.multiprocessors, unknown.clock, unknown.copy) == (120, 2.1, 4.0)
    assert expected.row_of({**machine, "gpu": "x", "arch": "sm_130"}, {}, 1.0) is None


def test_predictions_stand_beside_measurements(monkeypatch):
    def static_report(targets, chosen, backends, *, gpus, shape, jobs):
        assert (targets, backends, shape) == (["sm_90"], ["cuda", "triton"], (1, 2))
        classes = {"alu": 1.0}
        kernels = [
            {"case": c.id, "backend": b, "classes": classes} for c in chosen for b in backends
        ]
        return {"rows": kernels}

    monkeypatch.setattr(expected.static, "profile", static_report)
    rows = [
        dict(case="ddim fp32", backend=b, shape=[1, 2], bytes=12, of_copy=0.9, gb_s=4e3)
        for b in ("native", "triton")
    ]
    report = {"rows": [*rows, dict(case="ddim fp32", backend="eager", shape=[1, 2])],
              "machine": {"gpu": "NVIDIA H200", "arch": "sm_90"}, "state_before": {}}  # fmt: skip
    expected.add_predictions(report)
    assert [r.get("bound") for r in report["rows"]] == ["memory", "memory", None]
    assert rows[0]["predicted_gelem_s"] == pytest.approx(4300 / 12)
    report["machine"]["arch"] = "sm_130"
    rows[0].pop("predicted_gelem_s")
    expected.add_predictions(report)
    assert report["unpredicted"] == "the table of GPUs has no sm_130"


# Clocks, power, other profilers


def program(folder, name: str, text: str) -> None:
    path = folder / name
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


SMI = """#!/bin/sh
for word in "$@"; do case "$word" in
  --query-gpu=*mig.mode.current*|--query-gpu=*clocks_event_reasons*) exit 2;;
  --query-gpu=clocks_throttle_reasons.active) echo 0x0000000000000024; exit 0;;
  --query-gpu=ecc.mode.current) echo "[N/A]"; exit 0;;
  --query-gpu=power.draw) echo 71.5; exit 0;;
  --query-gpu=*,*) exit 2;;
  --query-gpu=*) echo "value of ${word#--query-gpu=}"; exit 0;;
esac; done
"""


def test_the_state_of_a_gpu_is_read_field_by_field_where_it_must_be(tmp_path, monkeypatch):
    program(tmp_path, "nvidia-smi", SMI)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = gpu_state.state("cuda")
    assert found["power.draw"] == "71.5" and found["name"] == "value of name"
    assert found["throttle"] == "power cap, software thermal"
    assert "mig.mode.current" not in found and "ecc.mode.current" not in found
    assert gpu_state.state("cpu") == {}


def test_without_nvidia_smi_there_is_no_state(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_state.state("cuda") == {}


RAW = """==PROF== Connected to process 1
"ID","Kernel Name","gpu__time_duration.sum","dram__bytes_read.sum","launch__registers_per_thread"
"","","us","Mbyte","register/thread"
"0","step_kernel","12.5","50.3","32"
"""


def test_counters_come_in_base_units(tmp_path, monkeypatch):
    program(tmp_path, "ncu", f"#!/bin/sh\ncat <<'END'\n{RAW}END\n")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = nsight.counters(Case("ddim"), "triton", SHAPE)
    assert found == {
        "gpu__time_duration.sum": pytest.approx(12.5e-6),
        "dram__bytes_read.sum": pytest.approx(50.3e6),
        "launch__registers_per_thread": 32.0,
    }


def test_a_profiler_that_is_not_there_or_may_not_count_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(nsight, "find_tool", lambda name: None)
    with pytest.raises(nsight.ProfilerError, match=r"ncu .* is not on PATH"):
        nsight.counters(Case("ddim"), "triton", SHAPE)
    program(tmp_path, "ncu", "#!/bin/sh\necho '==ERROR== ERR_NVGPUCTRPERM no permission'\nexit 1\n")
    monkeypatch.setattr(nsight, "find_tool", lambda name: str(tmp_path / name))
    with pytest.raises(nsight.ProfilerError, match=r"counted nothing: .*ERR_NVGPUCTRPERM"):
        nsight.counters(Case("ddim"), "triton", SHAPE)


def test_a_trace_names_the_cases(tmp_path):
    path = nsight.trace(tmp_path / "trace.json", [Case("ddim")], ["native"], SHAPE, "cpu")
    names = [event.get("name") for event in json.loads(path.read_text())["traceEvents"]]
    assert "ddim fp32, native" in names
    assert sum(name == "fastdiff_native::step" for name in names) == 3
    with pytest.raises(ValueError, match=r"its folder .*none does not exist"):
        nsight.trace(tmp_path / "none" / "t.json", [Case("ddim")], ["native"], SHAPE, "cpu")


def test_percentiles_are_microseconds():
    assert measured._percentiles(np.array([1e-6, 2e-6, 3e-6]))[1] == pytest.approx(2.0)
