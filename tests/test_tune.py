"""Launch parameters: the table, the file of a user's own rows, and how tuning chooses them."""

import json
import logging
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from fastdiff.backends import triton as backend
from fastdiff.kernels import launch, policy
from fastdiff.kernels.policy import Parameters, Policy
from fastdiff.profiling import tune
from fastdiff.profiling.cases import Case

META = torch.device("meta")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache directory, looked at anew."""
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path / "cache"))
    policy._own_rows.cache_clear()
    yield tmp_path / "cache"
    policy._own_rows.cache_clear()
    policy.placement.cache_clear()


def gpu(name: str, monkeypatch, multiprocessors: int = 132, threads: int = 2048) -> torch.device:
    """A device that answers as a GPU of that name."""
    properties = type("Properties", (), {})()
    properties.multi_processor_count = multiprocessors
    properties.max_threads_per_multi_processor = threads
    monkeypatch.setattr(policy, "target_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    policy.placement.cache_clear()
    return torch.device("cuda", 0)


# Rows


def test_a_row_is_found_by_the_gpus_name(cache, monkeypatch):
    found = policy.placement(gpu("sm_90", monkeypatch))
    assert found == (policy.ROWS["sm_90"], 132, 2048)
    assert policy.policy_of("sm_89").registers == 40


def test_a_gpu_without_a_row_gets_the_default(cache, monkeypatch):
    assert policy.placement(gpu("sm_200", monkeypatch)).policy is policy.UNKNOWN
    assert policy.policy_of("gfx9999") is policy.UNKNOWN


def test_every_row_is_one_that_launches_can_take():
    allowed = set(policy.candidates())
    for name, row in {**policy.ROWS, "unknown": policy.UNKNOWN}.items():
        assert row.noise in allowed and row.plain in allowed, name
        assert row.source, name


def test_registers_of_a_row_are_what_all_threads_of_an_sm_can_have():
    threads = {"sm_75": 1024, "sm_80": 2048, "sm_86": 1536, "sm_89": 1536, "sm_90": 2048,
               "sm_100": 2048, "sm_103": 2048, "sm_120": 1536}  # fmt: skip
    for name, most in threads.items():
        assert policy.ROWS[name].registers == 65536 // most // 8 * 8


# The user's own rows

OWN = Policy(Parameters(16, 8, 2), Parameters(8, 2, 12), "tuned here", 32)


def test_a_kept_row_comes_before_the_tables(cache, monkeypatch):
    device = gpu("sm_90", monkeypatch)
    assert policy.placement(device).policy == policy.ROWS["sm_90"]
    path = policy.keep("sm_90", OWN)
    assert path == cache / "launch.json"
    assert policy.placement(device).policy == OWN
    assert policy.policy_of("sm_80") == policy.ROWS["sm_80"]


def test_a_kept_row_is_found_by_another_process(cache):
    policy.keep("sm_90", OWN)
    code = "from fastdiff.kernels import policy; print(policy.policy_of('sm_90').plain)"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == str(OWN.plain)


def test_a_row_is_kept_beside_those_of_other_gpus(cache):
    policy.keep("sm_90", OWN)
    policy.keep("gfx942", Policy(Parameters(8, 4, 1), Parameters(8, 4, 1), "there", None))
    assert set(json.loads(policy.policy_file().read_text())) == {"sm_90", "gfx942"}
    assert policy.policy_of("sm_90") == OWN
    assert policy.policy_of("gfx942").noise == Parameters(8, 4, 1)


DAMAGED = {
    "half a file": '{"sm_90": {"noise": {"elem',
    "not ours": '["sm_90"]',
    "no parameters": '{"sm_90": {"source": "x"}}',
    "unknown parameter": '{"sm_90": {"noise": {"threads": 3}, "plain": {}, "source": "x"}}',
    "impossible": '{"sm_90": {"noise": {"elements": 7}, "plain": {}, "source": "x"}}',
    "too many warps": '{"sm_90": {"noise": {"warps": 4096}, "plain": {}, "source": "x"}}',
    "bytes": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_ignored_with_one_warning(name, cache, caplog, monkeypatch):
    cache.mkdir()
    text = DAMAGED[name]
    policy.policy_file().write_bytes(text if isinstance(text, bytes) else text.encode())
    device = gpu("sm_90", monkeypatch)
    with caplog.at_level(logging.WARNING, "fastdiff"):
        assert policy.placement(device).policy == policy.ROWS["sm_90"]
        assert policy.policy_of("sm_80") == policy.ROWS["sm_80"]
    assert len(caplog.records) == 1
    assert "launch.json" in caplog.text and "ignored" in caplog.text


def test_a_file_that_cannot_be_read_is_ignored_with_one_warning(cache, caplog):
    policy.policy_file().mkdir(parents=True)
    with caplog.at_level(logging.WARNING, "fastdiff"):
        assert policy.policy_of("sm_90") == policy.ROWS["sm_90"]
        assert policy.policy_of("sm_90") == policy.ROWS["sm_90"]
    assert len(caplog.records) == 1


# From parameters to a launch


def prepared(case: Case, parameters: Parameters, shape=(64, 3, 256, 256)) -> launch.Launch:
    row = Policy(parameters, parameters, "given")
    return backend.prepare(case.op)(*case.arguments(shape, META), policy=row)


@pytest.mark.parametrize("elements", [8, 16])
@pytest.mark.parametrize("warps", [2, 8])
def test_a_launch_has_the_elements_and_warps_of_its_parameters(elements, warps):
    run = prepared(Case("q_sample"), Parameters(elements, warps, 1))
    assert run.options["num_warps"] == warps
    assert run.constants["BLOCK"] == 32 * warps * elements
    assert run.grid == (3 * 65536 // run.constants["BLOCK"], 64)


def test_launches_with_and_without_noise_go_by_their_own_parameters():
    row = Policy(Parameters(8, 2, 1), Parameters(16, 8, 1), "given")
    for case, block in ((Case("q_sample"), 512), (Case("ddim_guided"), 4096)):
        run = backend.prepare(case.op)(*case.arguments((64, 3, 256, 256), META), policy=row)
        assert run.constants["BLOCK"] == block


def test_a_small_sample_has_a_small_block():
    run = prepared(Case("q_sample"), Parameters(8, 4, 4), (16, 1, 10, 10))
    assert run.constants["BLOCK"] == 128 and run.options["num_warps"] == 1


def test_programs_get_several_tiles_when_they_are_more_than_the_gpu_holds():
    resident = 2112
    assert launch._programs(16, 16, 8, resident) == 16  # 256 tiles: each its own program
    assert launch._programs(10 * resident, 1, 4, resident) == 5 * resident  # not 3 waves of 4
    assert launch._programs(12 * resident, 1, 4, resident) == 3 * resident
    assert launch._programs(2, 10 * resident, 4, resident) == 1  # both tiles of every sample


@pytest.mark.parametrize("tiles", range(1, 60, 7))
@pytest.mark.parametrize("batch", [1, 5])
def test_programs_have_no_more_tiles_than_allowed(tiles, batch):
    for most in (1, 3, 8):
        programs = launch._programs(tiles, batch, most, 10)
        assert programs <= tiles <= programs * most


# Tuning


class Watch:
    """A stopwatch for which a launch takes the time that a function of it says."""

    def __init__(self, time):
        self.time, self.measured = time, []

    def prepare(self, calls, seconds):
        assert len(calls) == 1

        def measure():
            self.measured.append(calls[0])
            return self.time(calls[0])

        return measure


def makes(case=Case("q_sample"), shapes=((64, 3, 256, 256), (16, 4, 64, 64))):  # noqa: B008
    return [lambda p, shape=shape: prepared(case, p, shape) for shape in shapes]


def test_the_best_way_wins():
    def time(run):
        return 1.0 if run.constants["BLOCK"] == 2048 and run.options["num_warps"] == 4 else 1.5

    found = tune.best(makes(), Parameters(), list(policy.candidates()), Watch(time))
    assert (found.parameters.elements, found.parameters.warps) == (16, 4)
    assert found.ratio == pytest.approx(1 / 1.5)


def test_the_best_is_that_over_all_launches():
    def time(run):  # 16 elements: a little better on the large one, far worse on the small one
        small = run.grid[1] == 16
        wide = run.constants["BLOCK"] > 32 * 8 * run.options["num_warps"]
        return (3.0 if small else 0.9) if wide else 1.0

    found = tune.best(makes(), Parameters(8, 4, 4), list(policy.candidates()), Watch(time))
    assert found.parameters.elements == 8


@pytest.mark.parametrize("gain", [0.0, 0.005])
def test_a_tie_keeps_the_default(gain):
    default = Parameters(8, 4, 4)

    def time(run):
        return 1.0 - gain * (run.options["num_warps"] == 8)

    found = tune.best(makes(), default, list(policy.candidates()), Watch(time))
    assert found == tune.Choice(default, 1.0)


def test_candidates_are_measured_in_turn_and_alike_only_once():
    watch = Watch(lambda run: 1.0)
    tune.best(makes(shapes=((64, 3, 256, 256),)), Parameters(), [Parameters(16)], watch, rounds=3)
    blocks = [run.constants["BLOCK"] for run in watch.measured]
    assert blocks == [1024, 2048] * 3
    # One sample of 100 elements: both come to the same launch.
    watch = Watch(lambda run: 1.0)
    small = makes(Case("ddim"), ((1, 1, 10, 10),))
    tune.best(small, Parameters(8, 2), [Parameters(8, 4), Parameters(8, 8)], watch, rounds=2)
    assert len(watch.measured) == 2


def test_a_slow_round_does_not_decide():
    ticks = iter(range(10**6))

    def time(run):
        drift = 10.0 if next(ticks) // 2 == 1 else 1.0  # the second round, for both alike
        return drift * (0.8 if run.options["num_warps"] == 8 else 1.0)

    one = makes(shapes=((64, 3, 256, 256),))
    found = tune.best(one, Parameters(), [Parameters(8, 8)], Watch(time), rounds=5)
    assert found.parameters == Parameters(8, 8)
    assert found.ratio == pytest.approx(0.8)


def test_tuning_writes_the_row_that_launches_then_take(cache, monkeypatch):
    device = gpu("sm_90", monkeypatch)
    monkeypatch.setattr(backend, "probe", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(torch.cuda, "device", lambda _: torch.no_grad())
    arguments = Case.arguments
    monkeypatch.setattr(Case, "arguments", lambda self, shape, _: arguments(self, shape, META))

    def time(run):
        warps, noise = run.options["num_warps"], run.constants.get("DRAWS", 0)
        return 1.0 if warps == (8 if noise else 2) else 2.0

    tuned = tune.tune(device, Watch(time))
    assert (tuned.noise.parameters.warps, tuned.plain.parameters.warps) == (8, 2)
    assert policy.placement(device).policy == tuned.policy
    assert tuned.policy.registers == 32 and "a GPU" in tuned.policy.source
    assert str(tuned.path) in tune.report(tuned) and "8 warps" in tune.report(tuned)


def test_tuning_without_a_gpu_says_so():
    with pytest.raises(RuntimeError, match="tuned on a GPU, so device cannot be cpu"):
        tune.tune("cpu")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="cannot be tuned on cuda: torch finds no GPU"):
            tune.tune("cuda")
