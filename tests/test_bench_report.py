"""Benchmark reports: as text, compared, in README.md, as pictures, and the command around them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from fastdiff import cli
from fastdiff.benchmarks import goals, registry
from fastdiff.profiling import bench, bench_command, bench_compare, bench_readme, bench_report
from tests.conftest import load_helper

ROOT = Path(__file__).resolve().parent.parent
reports = load_helper("bench_reports")
row, report = reports.row, reports.report


def test_reports_of_other_kinds_and_schemas_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    with pytest.raises(ValueError, match="cannot be read"):
        bench.read(path)
    for text, message in (
        ("[", "is not JSON"),
        ("{}", "it has no rows"),
        (json.dumps({"kind": "bench", "schema": 0, "rows": []}), "has schema 0"),
        (json.dumps({"kind": "static", "rows": []}), "not a report of `fastdiff bench`"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            bench.read(path)


# Text


def test_text_fits_a_terminal_and_names_times_ratios_and_the_limit() -> None:
    slow = row("two") | {"absent": {"compiled": "x" * 200}, "wrong": {"stock": "off by one"}}
    failed = {"case": "own/c", "group": "own", "name": "c", "threads": 2, "memory": "cold",
              "status": "failed", "reason": "y" * 200}  # fmt: skip
    text = bench_report.text(report(row(), slow, failed))
    assert max(map(len, text.splitlines())) <= 120
    assert "1 ms" in text and "2.00x [1.82..2.20]" in text
    assert "90 % [80..95] of memory: copy_" in text
    assert "8 GB/s" in text and "wrong  stock: off by one" in text and "c, 2 threads, cold" in text


def test_load_that_disturbs_is_said_and_so_is_a_smoke_run() -> None:
    busy = report(row(), before={"load": 1.5, "mhz": None})
    assert "WARNING  the load was 1.5" in bench_report.text(busy)
    assert "WARNING" not in bench_report.text(report(row()))
    assert "no figure means anything" in bench_report.text(report(row(), smoke=True))


@pytest.mark.parametrize(
    ("seconds", "text"), [(1.5, "1.5 s"), (2e-3, "2 ms"), (14.24e-6, "14.2 µs"), (8e-8, "80 ns")]
)
def test_times_are_written_with_their_unit(seconds: float, text: str) -> None:
    assert bench_report.time_of(seconds) == text


def test_markdown_table_has_a_line_for_every_case_and_a_column_for_every_opponent() -> None:
    other = row("two", ours=1e-3, eager=12.34e-3)
    other["opponents"] = {"stock": other["opponents"]["eager"]}
    lines = bench_report.markdown_table([row(), other]).splitlines()
    assert lines[0] == "| case | fastdiff | of the limit | eager | stock |"
    assert lines[2] == "| one | 1 ms | 90 %, memory | 2.00x |  |"
    assert lines[3] == "| two | 1 ms | 90 %, memory |  | 12.3x |"
    page = bench_report.markdown(report(row() | {"wrong": {"stock": "no"}}))
    assert "- own/one, stock: WRONG RESULT: no" in page


# Comparison


def test_comparison_finds_what_got_slower_and_what_got_faster() -> None:
    old = report(row("a"), row("b"), row("c"), row("gone"))
    new = report(row("a", ours=1.2e-3), row("b", ours=0.8e-3), row("c", ours=1.01e-3))
    text, worse = bench_compare.comparison(old, new, 0.05)
    assert worse
    slower, faster = text.split("faster by more")
    assert "1.20x  own/a, 1 threads, warm: fastdiff: 1 ms -> 1.2 ms" in slower
    assert "own/b" in faster and "own/b" not in slower and "own/c" not in text
    assert "own/gone" in text and "3 compared, 1 slower, 1 faster" in text
    assert bench_compare.comparison(old, old, 0.05)[1] is False


def test_change_that_opponents_share_is_the_machine_and_no_regression() -> None:
    old, new = report(row()), report(row(ours=1.5e-3, eager=3e-3))
    new["rows"][0]["limits"]["memory: copy_"]["seconds"] = [1.3e-3, 1.35e-3, 1.4e-3]
    (change,) = bench_compare.changes(old, new)
    assert change.drift == pytest.approx(1.5) and change.ratio == pytest.approx(1.0)
    assert not change.slower(0.05)


def test_change_within_the_spread_of_the_rounds_is_no_regression() -> None:
    old, new = report(row(spread=1.4)), report(row(ours=1.3e-3, spread=1.4))
    assert not bench_compare.comparison(old, new, 0.05)[1]
    assert bench_compare.comparison(report(row()), report(row(ours=1.3e-3)), 0.05)[1]


def test_wrong_result_in_the_new_report_is_a_regression() -> None:
    new = report(row() | {"wrong": {"fastdiff in place": "bits"}})
    text, worse = bench_compare.comparison(report(row()), new, 0.05)
    assert worse and "own/one: fastdiff in place: bits" in text


# README


MARKED = "top\n<!-- bench own/* threads=1 -->\nold\n<!-- end bench -->\nbottom\n"


def test_marked_tables_are_made_anew_and_the_rest_is_left() -> None:
    new = bench_readme.rewritten(MARKED, report(row(), row("two") | {"threads": 2}))
    assert new.startswith("top\n<!-- bench own/* threads=1 -->\n| case |")
    assert new.endswith("<!-- end bench -->\nbottom\n")
    assert "| one |" in new and "two" not in new and "old" not in new
    assert bench_readme.rewritten(new, report(row())) == new
    machine = bench_readme.rewritten("<!-- bench machine -->\n<!-- end bench -->", report(row()))
    assert "machine  P, 2 cores" in machine


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        ("nothing marked", {}, "no <!-- bench"),
        (MARKED.replace("own/*", "other/*"), {}, "no case for"),
        (MARKED.replace("threads=1", "threads=x"), {}, "'threads=x' is not"),
        (MARKED, {"smoke": True}, "smoke run"),
    ],
)
def test_tables_that_cannot_be_made_are_refused(text: str, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bench_readme.rewritten(text, report(row(), **changes))


def test_readme_is_what_the_committed_report_says() -> None:
    results = ROOT / "benchmarks" / "results" / "cpu.json"
    readme = (ROOT / "README.md").read_text("utf-8")
    assert results.exists() == ("<!-- bench " in readme)
    if results.exists():
        assert bench_readme.rewritten(readme, bench.read(results)) == readme


# Pictures


def test_plots_without_matplotlib_are_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(bench, "run", lambda *_, **__: pytest.fail("it ran"))
    assert cli.main(["bench", "--plots", str(tmp_path)]) == 2
    assert "matplotlib" in capsys.readouterr().err


def test_pictures_are_drawn_of_what_the_report_has(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from fastdiff.profiling import plots

    speed = row("q_sample fp32 16x4x64x64") | {"case": "operations/q_sample fp32 16x4x64x64"}
    sizes = [
        row(name) | {"case": f"scaling/{name}", "elements": 2**k, "bytes": 8 * 2**k}
        for k, name in ((10, "size ddim 2^10"), (12, "size ddim 2^12"))
    ]
    share = row("policy") | {"case": "share/policy", "beside": {"model": row()["ours"]["fastdiff"]}}
    made = plots.draw(report(speed, *sizes, share), tmp_path)
    assert [path.name for path in made] == ["speedups.png", "bandwidth.png", "share.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in made)
    assert plots.draw(report(), tmp_path) == []


# The command


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "zzz"], "'zzz' matches no case"),
        (["--threads", "0"], "must be at least 1"),
        (["--rounds", "x"], "must be a number"),
        (["--threshold", "120%"], "must be a share"),
        (["--json", "{tmp}/no/x.json"], "its folder {tmp}/no does not exist"),
        (["--markdown", "{tmp}"], "is a folder"),
        (["--isa", "sse9"], "not 'sse9'"),
        (["--compare", "{tmp}/a.json", "{tmp}/b.json"], "{tmp}/a.json cannot be read"),
        (["--readme", "{tmp}/a.json"], "{tmp}/a.json cannot be read"),
    ],
)
def test_wrong_options_end_with_status_2_before_anything_runs(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(bench, "run", lambda *_, **__: pytest.fail("it ran"))
    assert cli.main(["bench", *(word.replace("{tmp}", str(tmp_path)) for word in words)]) == 2
    assert message.replace("{tmp}", str(tmp_path)) in capsys.readouterr().err


def test_list_prints_the_measurements(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--list", "--only", "limits/one element"]) == 0
    assert capsys.readouterr().out == "limits/one element, 1 thread, warm memory\n"


def test_regression_gives_status_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(json.dumps(report(row())))
    new.write_text(json.dumps(report(row(ours=1.2e-3))))
    command = ["bench", "--compare", str(old), str(new)]
    assert cli.main(command) == 1
    assert cli.main([*command, "--threshold", "25%"]) == 0
    assert cli.main(["bench", "--compare", str(new), str(old)]) == 0
    assert "1.20x" in capsys.readouterr().out


def test_readme_is_rewritten_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    readme, figures = tmp_path / "README.md", tmp_path / "r.json"
    readme.write_text(MARKED)
    figures.write_text(json.dumps(report(row())))
    monkeypatch.setattr(bench_command, "README", readme)
    command = ["bench", "--readme", str(figures)]
    assert cli.main([*command, "--check"]) == 1 and readme.read_text() == MARKED
    assert cli.main(command) == 0 and "| one |" in readme.read_text()
    assert cli.main([*command, "--check"]) == 0
    assert "does not match" in capsys.readouterr().out


# Goals


def figures(seconds: float, ratio: dict[str, float] | None = None) -> dict:
    taken: dict = {"seconds": [seconds] * 3, "best": seconds}
    return taken | ({"ratio": {k: [v] * 3 for k, v in ratio.items()}} if ratio else {})


def test_a_goal_takes_the_better_of_our_contestants_and_says_why_it_is_missed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def goal(least: float, **options: object) -> goals.Goal:
        return goals.Goal("it", ("own/one",), "x stock", least, **options)  # type: ignore[arg-type]

    better = row() | {
        "ours": {"fastdiff": figures(2e-3), "fastdiff in place": figures(1e-3)},
        "opponents": {"stock": figures(4e-3, {"fastdiff": 2.0, "fastdiff in place": 4.0})},
    }
    monkeypatch.setattr(bench_report, "GOALS", (goal(3), goal(5, why="there is no more")))
    lines = bench_report.goals_table(report(better)).splitlines()
    assert lines[2] == "| it | x stock | at least 3 | 4.00 | yes |"
    assert lines[3] == "| it | x stock | at least 5 | 4.00 | no (1) |"
    assert lines[-1] == "(1) there is no more"
    text = bench_report.text(report(better))
    assert "it, x stock, at least 5: 4.00; met: no, because there is no more" in text
    # Several threads, cold memory and failures do not count.
    others = [
        better | change for change in ({"threads": 2}, {"memory": "cold"}, {"status": "failed"})
    ]
    assert bench_report.goals_table(report(*others[:2])) == ""
    assert bench_report.goals_table(report(others[2] | {"reason": ""})) == ""


def test_goals_are_of_cases_that_exist_and_of_contestants_they_have() -> None:
    ids = {case.id for case in registry.cases()}
    named = {case for goal in goals.GOALS for case in goal.cases}
    assert named <= ids


def test_every_kind_of_figure() -> None:
    measured = row() | {
        "ours": {"fastdiff": figures(2e-3)}, "elements": 4_000_000, "work": {"steps": 4},
        "of_limit": {"fastdiff": {"share": [0.8, 0.9, 1.0], "limit": "memory: copy_"}},
        "opponents": {"stock": figures(4e-3, {"fastdiff": 2.0})},
        "beside": {"trace of 30 steps": figures(8e-3), "float32 in place": figures(3e-3)},
    }  # fmt: skip
    found = {
        figure: dict(goals.figures_of(goals.Goal("", ("own/one",), figure), [measured]))["own/one"]
        for figure in ("G/s", "us", "limit", "trace", "x float32", "x stock")
    }
    expected = {
        "G/s": 2.0,
        "us": 500.0,
        "limit": 0.9,
        "trace": 2.0,
        "x float32": 1.5,
        "x stock": 2.0,
    }
    assert found == pytest.approx(expected)
    assert not list(goals.figures_of(goals.Goal("", ("own/one",), "x nobody"), [measured]))
