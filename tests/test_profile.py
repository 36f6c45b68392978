"""`fastdiff profile --target`: reading machine code, the model, the report and the command line."""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdiff.backends import build
from fastdiff.cli import main
from fastdiff.profiling import amdgcn, cuda_code, report, sass, static, table
from fastdiff.profiling.bound import REACH, occupancy, occupancy_limit, predict
from fastdiff.profiling.cases import Case, cases
from fastdiff.profiling.flow import cheapest_path
from fastdiff.profiling.gpus import ARCHITECTURES, CLASSES, GPUS, TARGETS, gpus_of
from fastdiff.profiling.paths import common_path, work_of

# ---- machine code

# What the disassembler prints of a kernel that leaves early, loops over chunks of four floats with
# a rare case beside them, and ends.
SASS = """
        /*0000*/                   S2R R0, SR_TID.X ;                     /* 0x0000000000007919 */
        /*0010*/                   ISETP.GE.AND P0, PT, R0, UR4, PT ;     /* 0x0000000400007c0c */
        /*0020*/               @P0 EXIT ;                                 /* 0x000000000000094d */
        /*0030*/                   LDG.E.128 R4, desc[UR4][R2.64] ;       /* 0x0000000402047981 */
        /*0040*/                   FSETP.NEU.AND P1, PT, R4, RZ, PT ;     /* 0x000000ff0400720b */
        /*0050*/              @!P1 BRA 0x90 ;                             /* 0x0000000000049947 */
        /*0060*/                   FMUL R4, R4, R8 ;                      /* 0x0000000804047220 */
        /*0070*/                   MUFU.RSQ R4, R4 ;                      /* 0x0000000400047308 */
        /*0080*/                   LDG.E R9, desc[UR4][R2.64+0x10] ;      /* 0x0000100402097981 */
        /*0090*/                   STG.E.128 desc[UR4][R2.64], R4 ;       /* 0x0000000402007986 */
        /*00a0*/                   BRA.U UP0, 0x30 ;                      /* 0x0000000000049947 */
        /*00b0*/                   EXIT ;                                 /* 0x000000000000794d */
        /*00c0*/                   BRA 0xc0;                              /* 0xfffffffc00fc7947 */
"""


def test_instructions_know_where_they_lead() -> None:
    code = sass.instructions(SASS)
    assert [i.address for i in code] == list(range(0, 0xD0, 0x10))
    leave, skip, again, end, stop = (code[k] for k in (2, 5, 10, 11, 12))
    assert leave.ends and leave.goes_on and end.ends and not end.goes_on
    assert skip.target == 0x90 and skip.goes_on
    assert again.target == 0x30 and again.goes_on
    assert stop.target == 0xC0 and not stop.goes_on


def test_a_far_jump_is_followed_and_a_call_returns() -> None:
    code = sass.instructions("""
        /*0000*/                   CALL.REL.NOINC 0x50 ;                  /* 0x0000000000007944 */
        /*0010*/               @P0 CALL.REL.NOINC 0x40 ;                  /* 0x0000000000007944 */
        /*0020*/                   BRA 0x10 ;                             /* 0x0000000000007947 */
        /*0030*/                   NOP ;                                  /* 0x0000000000007918 */
        /*0040*/                   EXIT ;                                 /* 0x000000000000794d */
        /*0050*/                   RET.REL.NODEC R4 0x0 ;                 /* 0x0000000000007950 */
    """)
    assert [i.address for i in cheapest_path(code, {})] == [0x00, 0x10, 0x40]
    assert not code[5].goes_on and not code[5].ends


def test_instructions_are_counted_by_pipe() -> None:
    code = sass.instructions(SASS)
    kinds = [sass.classify(i) for i in code]
    assert {kind: kinds.count(kind) for kind in CLASSES} == {
        "fp32": 1, "imad": 0, "alu": 2, "mufu": 1, "memory": 3, "other": 6
    }  # fmt: skip
    assert [sass.access(i) for i in code if sass.access(i)] == [
        ("load", 128), ("load", 32), ("store", 128)
    ]  # fmt: skip


def test_the_cheapest_path_does_what_it_must_and_no_more() -> None:
    code = sass.instructions(SASS)
    assert len(cheapest_path(code, {})) == 3  # leaves at once
    assert len(cheapest_path(code, {r"STG\.E\.128": 1})) == 9  # past the product
    assert len(cheapest_path(code, {r"STG\.E\.128": 1, "FMUL": 1})) == 12
    assert len(cheapest_path(code, {r"STG\.E\.128": 3, "FMUL": 3})) == 12 + 2 * 8
    with pytest.raises(ValueError, match="no path does"):
        cheapest_path(code, {"HMMA": 1})


def test_a_loop_is_told_from_what_a_thread_does_once() -> None:
    # The kernel above, of 0.5 roots an element: a randn whose two normals are one chunk of two.
    case = Case("randn", torch.float32)
    text = SASS.replace("LDG.E.128", "LDC.128").replace("STG.E.128", "STG.E.64")
    kernel = sass.Kernel(registers=10, stack=0, shared=0, code=sass.instructions(text))
    path = common_path(kernel, case, elements=2, loops=True)
    assert path.width == 64
    assert sum(path.round.values()) == 8 and sum(path.start.values()) == 4
    assert path.per_element(4) == {
        "fp32": 0.5, "imad": 0.0, "alu": 0.5 + 1 / 8, "mufu": 0.5, "memory": 1.5,
        "other": 1.0 + 3 / 8,
    }  # fmt: skip
    once = common_path(kernel, case, elements=2, loops=False)
    assert sum(once.per_element(4).values()) == 12 / 2


AMDGCN = """
\t.text
step_kernel:                            ; @step_kernel
; %bb.0:
\ts_load_dwordx2 s[0:1], s[0:1], 0x0
\ts_cmp_lt_i32 s2, s3
\ts_cbranch_scc1 .LBB0_2
; %bb.1:
\tbuffer_load_dwordx4 v[0:3], v8, s[4:7], 0 offen
\tv_mul_f32_e32 v0, v0, v1
\tv_mul_lo_u32 v1, v0, v2
\tv_xor_b32_e32 v1, v0, v2
\tv_sqrt_f32_e32 v0, v0
\ts_waitcnt vmcnt(0)
\tbuffer_store_dwordx4 v[0:3], v8, s[4:7], 0 offen
\ts_branch .LBB0_3
.LBB0_2:
\tbuffer_store_short v0, v8, s[4:7], 0 offen
.LBB0_3:
\ts_endpgm
.Lfunc_end0:
\t.amdhsa_next_free_vgpr 30
    .group_segment_fixed_size: 2048
    .sgpr_count:     34
    .sgpr_spill_count: 1
    .vgpr_count:     29
    .vgpr_spill_count: 2
"""


def test_amd_assembly_is_read_the_same_way() -> None:
    kernel = amdgcn.parse(AMDGCN)
    assert (kernel.registers, kernel.scalar_registers) == (29, 34)
    assert (kernel.spills, kernel.shared) == (3, 2048)
    assert len(kernel.code) == 13
    path = cheapest_path(kernel.code, {"buffer_store_dwordx4": 1})
    kinds = [amdgcn.classify(i) for i in path]
    assert {kind: kinds.count(kind) for kind in CLASSES} == {
        "fp32": 1, "imad": 1, "alu": 1, "mufu": 1, "memory": 2, "other": 6
    }  # fmt: skip
    assert [amdgcn.access(i) for i in path if amdgcn.access(i)] == [("load", 128), ("store", 128)]
    short = cheapest_path(kernel.code, {"buffer_store_short": 1})
    assert amdgcn.access(short[3]) == ("store", 16)


def test_the_work_of_a_case() -> None:
    # x + the two halves of guidance: 1 subtraction, 1 product, 1 addition; then a S0 + b o.
    assert work_of(Case("ddim_guided"))[:5] == ((4, 4, 4), (4,), 0, 6, 1)
    assert work_of(Case("ddim_guided", torch.float32, torch.bfloat16))[:2] == (
        (4, 2, 2), (4, 2, 2)
    )  # fmt: skip
    # a S0 + s z, and the contract's 8 additions and 10.5 products of a normal.
    assert work_of(Case("q_sample", torch.bfloat16))[:5] == ((2,), (2,), 1, 3 + 18.5, 1)
    assert work_of(Case("chain")).steps == 8
    # A bound leaves next to nothing; a bit is drawn from a word, without the normals.
    assert work_of(Case("bits_bound"))[:2] == ((4, 4, 4), ())
    reverse = work_of(Case("bits_reverse", torch.bfloat16))
    assert reverse[:3] == ((2, 2), (2,), 0) and reverse.words == reverse.quotients == 1


# ---- the model


@pytest.mark.parametrize("target", TARGETS[:8])
def test_occupancy_of_blocks_of_256(target: str) -> None:
    few = ARCHITECTURES[target].threads < 2048
    assert occupancy(target, 256, 32, 0) == 1.0
    assert occupancy(target, 256, 40, 0) == (1.0 if few else 0.75)
    if target != "sm_75":
        assert occupancy(target, 256, 72, 0) == (0.5 if few else 0.375)
    assert occupancy_limit(target, 256, 200, 0) == "registers"


def test_occupancy_by_shared_memory_and_blocks() -> None:
    # 228 KiB an SM, of which a block takes what it asks for and 1 KiB.
    assert occupancy("sm_90", 256, 32, 75 * 1024) == 3 * 256 / 2048
    assert occupancy_limit("sm_90", 256, 32, 75 * 1024) == "shared memory"
    assert occupancy("sm_90", 32, 32, 0) == 0.5  # 32 blocks of a warp
    assert occupancy("gfx942", 256, 64, 0) == 1.0
    assert occupancy("gfx942", 256, 128, 0) == 0.5


# instructions an element, bytes, and (pipe at REACH, memory) in 10^9 elements a second, by hand.
BY_HAND = [
    ("H100 SXM", 29.8, 8, 548, 375),
    ("H200", 26.1, 4, 624, 1075),
    ("B200", 29.8, 8, 648, 875),
    ("A100 SXM 80GB", 26.1, 4, 410, 450),
    ("RTX 4090", 36.0, 12, 631, 77.5),
]


@pytest.mark.parametrize(("name", "instructions", "size", "issue", "memory"), BY_HAND)
def test_predictions(
    name: str, instructions: float, size: int, issue: float, memory: float
) -> None:
    gpu = next(gpu for gpu in GPUS if gpu.name == name)
    prediction = predict(gpu, {"other": instructions}, size)
    assert prediction.limits["issue"] == pytest.approx(issue, rel=0.01)
    assert prediction.limits["memory"] == pytest.approx(memory, rel=0.01)
    assert prediction.bound == ("issue" if issue < memory else "memory")
    assert prediction.gb_s == pytest.approx(size * min(issue, memory), rel=0.01)


def test_pipes_are_shared_as_the_hardware_shares_them() -> None:
    a100 = next(gpu for gpu in GPUS if gpu.name == "A100 SXM 80GB")
    # 64 lanes for float and integer products together: 12 + 4 take a quarter of a cycle.
    prediction = predict(a100, {"fp32": 12.0, "imad": 4.0, "mufu": 2.0}, 1)
    cycles = {"issue": 18 / 128, "fma": 16 / 64, "imad": 4 / 64, "mufu": 2 / 16}
    rate = REACH * 108 * 1.41
    for pipe, count in cycles.items():
        assert prediction.limits[pipe] == pytest.approx(rate / count)
    assert prediction.bound == "fma"


def test_every_target_has_a_gpu_and_every_gpu_a_source() -> None:
    assert all(gpus_of(target) for target in TARGETS)
    for gpu in GPUS:
        assert gpu.source and gpu.copy < gpu.bandwidth and gpu.target in ARCHITECTURES


# ---- which CUDA kernel


def test_the_kernel_of_a_case_is_the_one_that_it_launches(cuda_host: str) -> None:
    library = ctypes.CDLL(str(build.build(build.cuda_host_target())))
    library.fd_last_kernel.restype = ctypes.c_char_p
    shape = (2, 2, 4, 4)  # so few elements that no second launch adds sums
    for case in cases():
        getattr(torch.ops.fastdiff_cuda_host, case.op)(*case.arguments(shape, "cpu"))
        text = library.fd_last_kernel().decode()
        launched = re.search(r"kKernel = (.*?)[;\]]", text)
        assert launched is not None, text
        name = re.sub(r"fastdiff::|\(anonymous namespace\)::|\(.*$| (?=>)", "", launched[1])
        assert name == cuda_code.kernel_name(case), case.id


def test_code_that_the_disassembler_does_not_know_is_said_in_a_sentence(tmp_path: Path) -> None:
    library = tmp_path / "library.so"
    library.write_bytes(b"not machine code")
    (said,) = cuda_code.inspect(library, "sm_103", [Case("randn")])
    assert isinstance(said, str) and f"cannot read {library}" in said


def test_the_policy_of_rounds_is_that_of_the_sources() -> None:
    text = (build.source_root() / "cuda" / "launch.cuh").read_text()
    assert re.search(r"constexpr int kThreads = 256;", text)
    assert cuda_code.rounds("sm_90") == int(re.findall(r"\{90, \d+, (\d+)", text)[0])
    assert cuda_code.rounds("sm_999") == cuda_code.rounds("sm_0")


# ---- the report


def _row(case: str = "ddim fp32", **figures: Any) -> dict[str, Any]:
    row = {
        "case": case, "backend": "triton", "target": "sm_90", "bytes": 12, "registers": 32,
        "spills": 0, "stack": 0, "shared": 0, "instructions": 10.0, "occupancy": 1.0,
    }  # fmt: skip
    return {**row, **figures}


def _report(*rows: dict[str, Any], kind: str = "static") -> dict[str, Any]:
    return {"kind": kind, "rows": list(rows)}


def test_comparison_says_what_got_worse_first() -> None:
    old = _report(_row(), _row("unipc fp32"))
    new = _report(_row(instructions=10.2, registers=40), _row("unipc fp32", instructions=8.0))
    changes = report.compare(old, new)
    assert [str(change) for change in changes] == [
        "WORSE  ddim fp32 triton sm_90: registers 32 -> 40, +25.0 %",
        "better unipc fp32 triton sm_90: instructions 10 -> 8, -20.0 %",
    ]
    assert [c.figure for c in report.compare(old, new, threshold=0.01)][:2] == [
        "registers", "instructions"
    ]  # fmt: skip
    assert report.compare(old, old) == []


def test_comparison_of_what_was_nothing_or_does_not_compile() -> None:
    (change,) = report.compare(_report(_row()), _report(_row(spills=2)))
    assert change.worse and str(change) == "WORSE  ddim fp32 triton sm_90: spills 0 -> 2"
    broken = {"case": "ddim fp32", "backend": "triton", "target": "sm_90", "error": "no"}
    (change,) = report.compare(_report(_row()), _report(broken))
    assert change.worse and change.figure == "errors"


def test_comparison_of_measured_reports_takes_medians() -> None:
    def measured(us: list[float], share: float) -> dict[str, Any]:
        row = {"case": "ddim fp32", "backend": "native", "shape": [1, 2], "us": us}
        return _report({**row, "of_copy": share}, kind="measured")

    changes = report.compare(measured([1, 10, 20], 0.9), measured([9, 12, 13], 0.8))
    assert [(c.figure, c.worse) for c in changes] == [("us", True), ("of_copy", True)]
    assert report.compare(measured([1, 10, 20], 0.9), measured([9, 10.2, 13], 0.9)) == []


def test_reports_that_do_not_compare() -> None:
    with pytest.raises(ValueError, match="does not compare with"):
        report.compare(_report(_row(), kind="measured"), _report(_row()))
    with pytest.raises(ValueError, match="in common"):
        report.compare(_report(_row()), _report(_row("unipc fp32")))


def _predicted(case: str, bound: str, instructions: float, **limits: float) -> dict[str, Any]:
    classes = dict.fromkeys(CLASSES, 0.0) | {"alu": instructions - 4, "fp32": 4.0}
    prediction = {"bound": bound, "gelem_s": limits[bound], "gb_s": 3000, "limits": limits}
    return _row(
        case, classes=classes, instructions=instructions, predictions={"H100 SXM": prediction},
        occupancy_limit="registers",
    )  # fmt: skip


def test_the_sentence_says_what_holds_and_what_would_move_it() -> None:
    exact = _predicted("q_sample fp32", "issue", 60.0, memory=375.0, issue=250.0)
    fast = _predicted("q_sample fp32 fast", "memory", 30.0, memory=375.0, issue=500.0)
    narrow = _predicted("q_sample bf16 fast", "issue", 33.0, memory=750.0, issue=450.0)
    rows = [exact, fast, narrow]
    assert table.explanation(exact, "H100 SXM", rows) == (
        "issue: 60.0 instructions an element against 12 bytes, which memory would move 1.5 times "
        "as fast; noise='fast' takes 30.0 instructions and is 1.5 times as fast"
    )
    assert table.explanation(fast, "H100 SXM", rows) == (
        "memory: 12 bytes an element at 3000 GB/s; instructions would allow 1.3 times that; "
        "bf16 samples would be 1.2 times as fast"
    )
    low = {**narrow, "occupancy": 0.375}
    assert table.explanation(low, "H100 SXM", rows).endswith(
        "most are integer and logic (29.0) and float (4.0); 38% of the threads fit (registers): "
        "latency may show"
    )


def test_a_backend_that_cannot_compile_is_left_out_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # In this process Triton is its interpreter.
    chosen = [Case("ddim")]
    with pytest.raises(static.ProfileError, match="TRITON_INTERPRET is set"):
        static.profile(["gfx942"], chosen)

    def no_compiler(target: build.Target) -> Path:
        raise build.BuildError(f"no nvcc for the {target.label}")

    monkeypatch.setattr(build, "build", no_compiler)
    with pytest.raises(
        static.ProfileError,
        match=r"^cuda: no nvcc for the native CUDA library for sm_90; triton: TRITON_INTERPRET",
    ):
        static.profile(["gfx942", "sm_90"], chosen)


# ---- the command line


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([], "there is no GPU here to measure on: name what to compile for, as in --target sm_90"),
        (["--target", "sm_91"], "there is no target 'sm_91'; there are sm_75, sm_80"),
        (["--gpu", "H900"], "there is no GPU 'H900' in the table; there are T4, "),
        (["--target", "sm_80", "--gpu", "H100 SXM"], "H100 SXM is sm_90, which --target lacks"),
        (["--target", "sm_90", "--op", "gemm"], "there is no operation 'gemm'"),
        (["--target", "sm_90", "--backend", "native"], "with --target triton or cuda"),
        (["--target", "sm_90", "--op", "randn", "--dtype", "fp32+bf16"], "have none of these"),
        (["--target", "sm_90", "--json", "/nowhere/a.json"], "folder /nowhere does not exist"),
        (["--target", "sm_90", "--shape", "16"], "must be like 16x4x64x64, batch first"),
        (["--gated"], "it is for --target"),
        (["--target", "sm_90", "--plot", "a.pdf"], "must end in .png"),
        (["--target", "sm_90", "--compare", "/nowhere.json"], "cannot be read"),
        (["--target", "sm_90", "--jobs", "0"], "must be at least 1"),
        (["--target", "sm_90", "--tune"], "it measures, and --target does not"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_compiled(
    options: list[str],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["profile", *options]) == 2
    assert sentence in " ".join(capsys.readouterr().err.split())


def test_a_file_that_is_no_report_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "old.json").write_text("[1]")
    options = ["--target", "sm_90", "--compare", str(tmp_path / "old.json")]
    assert main(["profile", *options]) == 2
    assert "is not a report of fastdiff" in capsys.readouterr().err


def _run(*options: str) -> subprocess.CompletedProcess[str]:
    """The command in a process in which Triton compiles."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "fastdiff", "profile", *options],
        env=environment, capture_output=True, text=True, cwd=Path(__file__).parent.parent,
    )  # fmt: skip


def test_the_command_from_end_to_end(tmp_path: Path) -> None:
    out = tmp_path / "new.json"
    select = ["--gpu", "H100 SXM", "--backend", "triton", "--op", "ddim", "--dtype", "fp32,bf16"]
    first = _run(*select, "--json", str(out))
    assert first.returncode == 0, first.stderr
    made = json.loads(out.read_text())
    assert made["kind"] == "static" and made["left_out"] == {}
    assert made["versions"]["triton"] and made["machine"]["processor"]
    assert [row["case"] for row in made["rows"]] == ["ddim fp32", "ddim bf16"]
    for row in made["rows"]:
        assert row["bytes"] == {"ddim fp32": 12, "ddim bf16": 6}[row["case"]]
        assert row["width"] == 128 and row["spills"] == row["stack"] == 0
        assert row["accesses"]["load 128"] == row["elements"] * row["bytes"] * 2 // 3 // 16
        assert sum(row["classes"].values()) == pytest.approx(row["instructions"], abs=0.01)
        prediction = row["predictions"]["H100 SXM"]
        assert prediction["bound"] == "memory" and prediction["gb_s"] == 3000
    lines = first.stdout.splitlines()
    assert any(re.match(r"ddim fp32 +triton +\d+ .* 250 M$", line) for line in lines)
    assert "  ddim bf16" in first.stdout and "memory: 6 bytes an element" in first.stdout
    tables = [line for line in lines if "bytes an element" not in line and "; data" not in line]
    assert max(map(len, tables)) <= 140

    # Against itself, and against one that was better.
    for row in made["rows"]:
        row["instructions"] *= 0.9
    (tmp_path / "better.json").write_text(json.dumps(made))
    again = _run(*select, "--compare", str(out))
    assert again.returncode == 0 and "0 figures are worse" in again.stdout, again.stdout
    worse = _run(*select, "--compare", str(tmp_path / "better.json"))
    assert worse.returncode == 1
    assert "WORSE  ddim fp32 triton sm_90: instructions" in worse.stdout


def test_samples_of_an_odd_size_are_wide_where_all_are_treated_alike(tmp_path: Path) -> None:
    out = tmp_path / "odd.json"
    select = ["--target", "sm_90,gfx942", "--backend", "triton", "--op", "ddim_guided"]
    run = _run(*select, "--dtype", "fp32,bf16", "--shape", "15x1x37x37", "--json", str(out))
    assert run.returncode == 0, run.stderr
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 4
    for row in rows:
        assert row["width"] == 128 and row["spills"] == 0
        # But for the last few of all, which 16-bit elements take one at a time.
        assert (row["arithmetic"]["narrow"] > 0) == ("bf16" in row["case"])


def test_the_picture_shows_every_operation(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from PIL import Image

    from fastdiff.profiling.roofline import draw

    rows = []
    for case in cases():
        gpu = gpus_of("sm_90")[0]
        classes = dict.fromkeys(CLASSES, 1.0) | {"alu": 5.0 + 20 * case.draws}
        prediction = predict(gpu, classes, case.bytes_per_element)
        figures = {"bound": prediction.bound, "gelem_s": prediction.gelem_s}
        rows.append(
            _row(
                case.id, classes=classes, bytes=case.bytes_per_element,
                predictions={gpu.name: figures},
            )
        )  # fmt: skip
    draw(_report(*rows), tmp_path / "roof.png")
    picture = Image.open(tmp_path / "roof.png").convert("RGB")
    colours = {colour for _, colour in picture.getcolors(1 << 20)}
    assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x00, 0x9E, 0x73)} <= colours
