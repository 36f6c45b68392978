"""The cases around other projects' samplers: each runs and is checked, and its check can fail."""

from __future__ import annotations

import sys

import pytest
import torch

from fastdiff import engine
from fastdiff.benchmarks import loops, models, samplers, schedulers, share, upstream
from fastdiff.benchmarks.registry import Case, Contest, Unavailable, cases
from fastdiff.integrations import diffusers as drop_in
from fastdiff.integrations import k_diffusion as K
from fastdiff.profiling.bench_job import Settings, measure

MODULES = ("schedulers", "samplers", "loops", "share")
BRIEF = Settings(rounds=1, seconds=0.0, budget=0.0)
CASES = {case.id: case for case in cases(modules=MODULES)}


@pytest.fixture(autouse=True)
def smoke(monkeypatch):
    """Tiny and uncompiled."""
    monkeypatch.setenv("FASTDIFF_BENCH_SMOKE", "1")


@pytest.fixture(autouse=True)
def no_models_kept():
    """Models of a smoke run are small: none is left for others, nor taken from them."""
    made = (models.policy, models.latent_unet, models.pixel_unet, models.dit)
    for function in made:
        function.cache_clear()
    yield
    for function in made:
        function.cache_clear()


def measured(build):
    return measure(Case("own", "one", build), 1, BRIEF)


@pytest.mark.parametrize("name", CASES)
def test_every_case_runs_with_everything_right(name):
    row = measure(CASES[name], 1, BRIEF)
    assert row["status"] == "measured", row.get("reason")
    assert row["wrong"] == {} and row["absent"] == {}
    assert row["opponents"] and row["work"]["steps"] >= 3
    times = [figures["seconds"] for kind in ("ours", "opponents") for figures in row[kind].values()]
    assert all(0 < low <= high for low, _, high in times)


def test_what_the_readme_shows_is_among_the_cases():
    names = set(CASES)
    for scheduler in ("DDIM", "DDPM", "DPM++ 2M", "UniPC", "LMS", "SA-Solver"):
        assert {f"schedulers/{scheduler} 1x1x2x2", f"schedulers/{scheduler} 16x4x64x64"} <= names
    for pipeline in loops.PIPELINES:
        assert {f"loops/{pipeline}", f"loops/{pipeline}, model left out"} <= names


# Checks that fail


def broken_accelerate(monkeypatch, when):
    """accelerate() takes outputs for another prediction where `when` says so of its options."""
    original = drop_in.accelerate

    def accelerate(scheduler, **options):
        if when(options):
            scheduler = type(scheduler)(**{**scheduler.config, "prediction_type": "v_prediction"})
        return original(scheduler, **options)

    monkeypatch.setattr(drop_in, "accelerate", accelerate)


def test_a_wrong_scheduler_is_not_timed(monkeypatch):
    broken_accelerate(monkeypatch, lambda options: "backend" not in options)
    row = measured(lambda: schedulers.build("DDPMScheduler", {}, "1x1x2x2"))
    assert row["status"] == "failed"
    assert set(row["wrong"]) == {"accelerated", "accelerated, seed="}


def test_a_wrong_compiled_step_is_not_timed(monkeypatch):
    plain = schedulers.Compiled.run
    monkeypatch.setattr(schedulers.Compiled, "run", lambda self, ts: 1.01 * plain(self, ts))
    row = measured(lambda: schedulers.build("DDIMScheduler", {}, "1x1x2x2"))
    assert set(row["wrong"]) == {"compiled stock"}
    assert "compiled stock" not in row["opponents"] and "stock" in row["opponents"]


def test_a_wrong_sampling_function_is_not_timed(monkeypatch):
    plain = K.sample_euler
    monkeypatch.setattr(K, "sample_euler", lambda *args, **options: 1.001 * plain(*args, **options))
    row = measured(lambda: samplers.k_diffusion("euler", "1x1x2x2"))
    assert row["status"] == "failed" and set(row["wrong"]) == {"fastdiff"}


def test_a_wrong_eager_step_is_not_timed(monkeypatch):
    plain = samplers.Eager.p_sample
    monkeypatch.setattr(samplers.Eager, "p_sample", lambda *args: 1.001 * plain(*args))
    row = measured(lambda: samplers.gaussian_diffusion("DDPM", "1x1x2x2"))
    assert set(row["wrong"]) == {"eager", "compiled eager"} and row["opponents"] == {}


@pytest.mark.parametrize("left_out", [False, True])
def test_a_loop_that_makes_other_images_is_not_timed(monkeypatch, left_out):
    broken_accelerate(monkeypatch, lambda options: True)
    plain = engine.Sampler.__call__
    monkeypatch.setattr(
        engine.Sampler, "__call__",
        lambda self, *args, **options: plain(self, *args, **options)
        + (0.01 if self.backend is None else 0.0),
    )  # fmt: skip
    row = measured(lambda: loops.build(loops.PIPELINES["latents, LCM 4"], left_out))
    wrong = {"fd.sample", "accelerated"} | ({loops.SEEDED} if left_out else set())
    assert row["status"] == "failed" and set(row["wrong"]) == wrong


def test_a_wrong_step_has_no_share(monkeypatch):
    broken_accelerate(monkeypatch, lambda options: True)
    row = measured(lambda: share.build(share.CASES["policy 1x16x7, DDPM"]))
    assert set(row["wrong"]) == {share.OURS} and set(row["ours"]) == {share.WITHOUT}
    assert list(share.rule([row])) == []


# Machines that lack something


@pytest.fixture
def core_only(monkeypatch):
    for name in ("diffusers", "k_diffusion", "denoising_diffusion_pytorch", "torchsde"):
        monkeypatch.setitem(sys.modules, name, None)
    upstream.k_diffusion.cache_clear()
    yield
    upstream.k_diffusion.cache_clear()


def test_without_diffusers_our_loops_run_and_stock_is_absent(core_only):
    for build in (
        lambda: loops.build(loops.PIPELINES["policy, DDIM 10"], False),
        lambda: loops.build(loops.PIPELINES["latents, LCM 4"], True),
        lambda: share.build(share.CASES["digits 16x1x8x8, DDIM"]),
    ):
        row = measured(build)
        assert row["status"] == "measured" and row["wrong"] == {} and row["opponents"] == {}
        assert len(row["ours"]) == 1
        assert row["absent"] == {
            "stock": "diffusers is not installed: pip install 'fastdiff[diffusers]'"
        }


def test_without_k_diffusion_our_function_runs_and_theirs_is_absent(core_only):
    row = measured(lambda: samplers.k_diffusion("dpmpp_2m_sde", "1x1x2x2"))
    assert row["status"] == "measured" and set(row["ours"]) == {"fastdiff, seed="}
    assert row["wrong"] == {} and set(row["absent"]) == {"fastdiff", "k-diffusion"}
    assert row["absent"]["k-diffusion"] == "k-diffusion is not installed: pip install k-diffusion"


def test_what_cannot_run_at_all_says_why(core_only):
    for build, word in (
        (lambda: schedulers.build("DDIMScheduler", {}, "1x1x2x2"), "fastdiff[diffusers]"),
        (lambda: samplers.denoising_diffusion_pytorch("DDPM", "1x1x2x2"), "denoising-diffusion"),
        (lambda: share.build(share.CASES["DiT-B/2 1x4x32x32, DPM++ 2M"]), "fastdiff[diffusers]"),
    ):
        row = measured(build)
        assert row["status"] == "unavailable" and word in row["reason"]


def test_a_scheduler_of_another_release_is_unavailable():
    with pytest.raises(Unavailable, match="has no NoSuchScheduler"):
        schedulers.build("NoSuchScheduler", {}, "1x1x2x2")


# torch.compile of the stock step


def test_a_step_that_does_not_compile_is_absent_with_the_reason(monkeypatch):
    monkeypatch.delenv("FASTDIFF_BENCH_SMOKE")
    row = measured(lambda: schedulers.build("DDPMScheduler", {}, "1x1x2x2"))
    assert row["status"] == "measured" and set(row["opponents"]) == {"stock"}
    assert "Data-dependent branching" in row["absent"]["compiled stock"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "whole"), [("HeunDiscrete", False), ("DDIM", True)])
def test_a_step_that_compiles_takes_part(monkeypatch, name, whole):
    """DDIM's compiles with integers for timesteps only."""
    monkeypatch.delenv("FASTDIFF_BENCH_SMOKE")
    contests: list[Contest] = []

    def build():
        contests.append(schedulers.build(f"{name}Scheduler", {}, "1x1x2x2"))
        return contests[0]

    row = measured(build)
    assert row["wrong"] == row["absent"] == {} and "compiled stock" in row["opponents"]
    call = contests[0].opponents["compiled stock"]
    assert call.prepare.__self__.whole is whole


# Models and figures


def test_the_policy_is_of_the_size_that_robots_run():
    with torch.device("meta"):
        weights = sum(p.numel() for p in models.PolicyUNet().parameters())
    assert 60e6 < weights < 70e6
    model = models.policy()
    x, t = torch.randn(2, 16, 7), torch.tensor([3, 50])
    assert model(x, t).shape == x.shape
    assert torch.allclose(model(x, t)[1:], model(x[1:], t[1:]), atol=1e-5)
    assert not torch.allclose(model(x, t), model(x, t + 1), atol=1e-4)


def test_random_models_keep_the_size_of_their_input():
    """What comes out is of the order of 1 and depends on all of x, so that images can be told."""
    for model, shape in ((models.policy(), (1, 16, 7)), (models.latent_unet(), (1, 4, 32, 32))):
        x, t = torch.randn(shape, generator=torch.Generator().manual_seed(0)), torch.tensor([400])
        labels = (torch.zeros(1, dtype=torch.int64),) if len(shape) == 4 else ()
        output = model(x, t, *labels)
        assert 0.05 < float(output.std()) < 5
        assert float((model(2 * x, t, *labels) - output).abs().mean()) > 0.01


def test_the_rule_of_break_even():
    row = {
        "status": "measured", "name": "tiny", "work": {"steps": 10},
        "ours": {share.OURS: {"seconds": [0, 2e-4, 0]}},
        "opponents": {"stock": {"seconds": [0, 1.2e-3, 0]}},
        "beside": {"model": {"seconds": [0, 8.8e-3, 0]}},
    }  # fmt: skip
    (line,) = share.rule([row, {"status": "failed"}])
    # Per step: stock 120 us, ours 20 us, the model 880 us.
    assert line == (
        "tiny: stock's share 12 %, ours 2.2 %: 11 % more images/s; 1 % if the model took 10 ms"
    )
