"""SolverPlan: immutable, compared by what it computes, saved and loaded exactly, printed."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import numpy as np
import pytest

import fastdiff as fd

SCHEDULE = fd.schedules.linear(100)


def plans():
    return [
        fd.solvers.ddpm(SCHEDULE, 7, variance="learned_range"),
        fd.solvers.ddpm(SCHEDULE, 7, clip=None),
        fd.solvers.ddim(SCHEDULE, 7, eta=0.3),
    ]


@pytest.mark.parametrize("plan", plans(), ids=lambda p: p.name)
def test_saved_plans_load_bit_equal(plan, tmp_path):
    path = tmp_path / "plan.npz"
    plan.save(path)
    loaded = fd.SolverPlan.load(path)
    assert loaded == plan and hash(loaded) == hash(plan)
    assert loaded.name == plan.name and loaded.about == plan.about
    for field in dataclasses.fields(plan):
        a, b = getattr(plan, field.name), getattr(loaded, field.name)
        if isinstance(a, np.ndarray):
            assert a.dtype == b.dtype and a.tobytes() == b.tobytes(), field.name
    assert [p.name for p in tmp_path.iterdir()] == ["plan.npz"]


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "plan.npz"
    old, new = plans()[:2]
    old.save(path)

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr("fastdiff.files.os.replace", full)
    with pytest.raises(OSError, match="disk full"):
        new.save(path)
    assert fd.SolverPlan.load(path) == old
    assert [p.name for p in tmp_path.iterdir()] == ["plan.npz"]


def test_other_files_are_refused(tmp_path):
    np.savez(tmp_path / "arrays.npz", A=np.zeros(3))
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "text").write_text("a plan")
    (tmp_path / "empty").touch()
    plans()[0].save(tmp_path / "whole")
    (tmp_path / "torn").write_bytes((tmp_path / "whole").read_bytes()[:100])
    for name in ("arrays.npz", "array.npy", "text", "empty", "torn"):
        with pytest.raises(ValueError, match="not a saved SolverPlan"):
            fd.SolverPlan.load(tmp_path / name)


def test_equality_is_about_the_numbers():
    a, b = fd.solvers.ddim(SCHEDULE, 7), fd.solvers.ddim(SCHEDULE, 7)
    assert a == b and hash(a) == hash(b)
    assert dataclasses.replace(a, name="other", about={}) == a
    assert fd.solvers.ddim(SCHEDULE, 7, eta=0.1) != a
    assert dataclasses.replace(a, initial_scale=2.0) != a
    assert a != "plan"
    for twin in (pickle.loads(pickle.dumps(a)), copy.deepcopy(a)):
        assert twin == a and not twin.A.flags.writeable


def test_numbers_of_any_type_are_the_same_plan(tmp_path):
    plan = dataclasses.replace(fd.solvers.ddim(SCHEDULE, 7), initial_scale=2.0, first_churn=1.0)
    numpy = dataclasses.replace(
        plan, initial_scale=np.float32(2), first_churn=np.float64(1), first_c_in=1,
        first_drawn=np.bool_(False),
    )  # fmt: skip
    assert numpy == plan
    numpy.save(tmp_path / "plan.npz")
    assert fd.SolverPlan.load(tmp_path / "plan.npz") == plan


def test_plans_do_not_change():
    plan = plans()[0]
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.name = "x"
    for array in (plan.A, plan.P, plan.t, plan.draws, plan.lo):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0
    source = np.array(plan.A)
    mine = dataclasses.replace(plan, A=source)
    source[...] = 0
    assert mine == plan


def test_printing_shows_traffic_and_draws():
    text = str(fd.solvers.ddpm(SCHEDULE, 7))
    lines = text.splitlines()
    assert "7 model calls" in lines[0] and "clamped" in lines[0]
    rows = [line.split() for line in lines[-7:]]
    # call, t, reads x and o, writes x, 12 bytes, one draw (step, stream 1); none at the last step
    assert rows[0][:6] == ["0", "99", "x", "o", "x", "12"] and lines[-7].endswith("(0, 1)")
    assert lines[-1].endswith("-")
    assert len(str(fd.solvers.ddpm(SCHEDULE)).splitlines()) < 55
    assert repr(plans()[2]) == "SolverPlan('DDIM, 7 steps', calls=7, states=1, draws=1)"


def test_traffic_counts_what_the_row_uses():
    ddim = fd.solvers.ddim(SCHEDULE, 5, clip=None)
    assert ddim.traffic(0) == (["x", "o"], ["x"])
    sample = fd.solvers.ddim(SCHEDULE, 5, prediction_type="sample", clip=None)
    assert sample.traffic(4) == (["o"], ["x"])  # the last step is x_0 itself
    learned = plans()[0]
    assert learned.traffic(0) == (["x", "o", "v"], ["x"])
    assert learned.traffic(6) == (["x", "o"], ["x"])  # no noise at the last step


def test_draws_noise_only_where_it_counts():
    assert fd.solvers.ddpm(SCHEDULE, 5).draws_noise[:, 0].tolist() == [True] * 4 + [False]
    assert not fd.solvers.ddim(SCHEDULE, 5).draws_noise.any()


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (dict(A=np.zeros((7, 4))), "A must"),
        (dict(A=np.zeros((7, 2, 3))), "A must"),
        (dict(t=np.zeros(6)), "t must"),
        (dict(x_start=np.zeros((7, 2))), "x_start must"),
        (dict(draws=np.zeros((7, 1), int)), "draws must"),
        (dict(draws=np.full((7, 1, 2), -1)), "draws must"),
        (dict(A=np.full((7, 1, 4), np.nan)), "A has NaN"),
        (dict(t=np.full(7, np.inf)), "t has NaN"),
        (dict(P=None), "together"),
        (dict(lo=np.full(7, 2.0)), "lo must not exceed hi"),
        (dict(A=np.zeros((7, 8, 11))), "at most 7 states"),
        (dict(A=np.zeros((7, 1, 8))), "at most 7 states and 4 draws"),
        (dict(P=None, lo=None, hi=None), "clamp column"),
        (dict(half_log_variance_min=np.zeros(7)), "together"),
        (dict(initial_scale=np.nan), "initial_scale must"),
        (dict(first_churn=np.inf), "first_churn must"),
        (dict(first_c_in=np.nan), "first_c_in must"),
    ],
)  # fmt: skip
def test_inconsistent_plans_are_refused(change, names):
    with pytest.raises(ValueError, match=names):
        dataclasses.replace(fd.solvers.ddpm(SCHEDULE, 7), **change)
