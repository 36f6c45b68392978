"""The loop: what it computes, what a caller may do with it, and what it refuses."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest
import torch

import fastdiff as fd

SCHEDULE = fd.schedules.linear(100, 1e-3, 0.1)
DDPM = fd.solvers.ddpm(SCHEDULE, 10)
DDIM = fd.solvers.ddim(SCHEDULE, 10)


def model(x, t):
    return torch.sin(1.7 * x + 0.01 * t.view(-1, *[1] * (x.dim() - 1))).to(x.dtype)


@pytest.mark.parametrize("plan", [DDPM, DDIM], ids=["ddpm", "ddim"])
def test_backends_sample_the_same_bits(accelerated, assert_same_bits, plan):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        options = dict(shape=(2, 3, 5, 7), seed=4, dtype=dtype)
        assert_same_bits(
            fd.sample(model, plan, backend=accelerated, **options),
            fd.sample(model, plan, backend="reference", **options),
        )


def test_guided_sampling_agrees_on_every_backend(accelerated, assert_same_bits):
    plan = fd.solvers.ddim(SCHEDULE, 6, eta=0.5)
    options = dict(shape=(3, 2, 4, 4), seed=4, guidance_scale=torch.tensor([1.0, 2.5, 7.0]),
                   model_dtype=torch.bfloat16)  # fmt: skip
    assert_same_bits(
        fd.sample(model, plan, backend=accelerated, **options),
        fd.sample(model, plan, backend="reference", **options),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_batch_of_8_is_8_batches_of_1(assert_same_bits, dtype):
    whole = fd.sample(model, DDPM, shape=(8, 3, 5), seed=7, dtype=dtype)
    singles = [fd.sample(model, DDPM, shape=(1, 3, 5), seed=7, sample_offset=b, dtype=dtype)
               for b in range(8)]  # fmt: skip
    assert_same_bits(whole, torch.cat(singles))
    ranks = [fd.sample(model, DDPM, shape=(4, 3, 5), seed=7, sample_offset=b, dtype=dtype)
             for b in (0, 4)]  # fmt: skip
    assert_same_bits(whole, torch.cat(ranks))
    seeds, order = torch.arange(8) * 31, torch.tensor([5, 2, 7, 0, 1, 6, 3, 4])
    by_seed = fd.sample(model, DDPM, shape=(8, 3, 5), seed=seeds, dtype=dtype)
    permuted = fd.sample(model, DDPM, shape=(8, 3, 5), seed=seeds[order], dtype=dtype)
    assert_same_bits(by_seed[order], permuted)


def test_the_loop_is_its_steps(assert_same_bits):
    """Sampler(...)(...), start/step by hand and p_sample by hand are one computation."""
    plan = fd.solvers.ddpm(SCHEDULE)
    looped, trajectory = fd.sample(model, plan, shape=(2, 9), seed=3, return_trajectory=True)
    run = fd.Sampler(plan).start(shape=(2, 9), seed=3)
    x = run.x
    while not run.done:
        t = run.t
        output = model(run.model_input, t)
        thin = fd.p_sample(output, x, t, SCHEDULE, seed=3)
        x = run.step(output)
        assert_same_bits(thin, x)
        assert_same_bits(trajectory[run.index], x)
    assert_same_bits(x, looped)
    assert trajectory.shape == (101, 2, 9)


def test_seeded_noise_is_randn_as_a_tensor(backend, assert_same_bits):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x_T = fd.randn((2, 11), 5, dtype=dtype)
        given = fd.sample(
            model, DDPM, x_T=x_T,
            noise=lambda i, k, d=dtype: fd.randn((2, 11), 5, step=i, stream=1, dtype=d),
        )  # fmt: skip
        assert_same_bits(fd.sample(model, DDPM, shape=(2, 11), seed=5, dtype=dtype), given)


def test_a_generator_draws_in_order(assert_same_bits):
    got = fd.sample(model, DDPM, shape=(2, 11), generator=torch.Generator().manual_seed(1))
    g = torch.Generator().manual_seed(1)
    x_T = torch.randn((2, 11), generator=g)
    draws = [torch.randn((2, 11), generator=g) for _ in range(9)]  # none at the last step
    assert_same_bits(got, fd.sample(model, DDPM, x_T=x_T, noise=lambda i, k: draws[i]))


def test_callback_sees_each_step_and_owns_what_it_gets(assert_same_bits):
    seen = []
    x, trajectory = fd.sample(
        model, DDIM, shape=(2, 6), seed=0, callback=seen.append, return_trajectory=True
    )
    assert [s.index for s in seen] == list(range(10)) and {s.steps for s in seen} == {10}
    assert [int(s.t[0]) for s in seen] == DDIM.t.astype(int).tolist()
    for i, state in enumerate(seen):
        assert_same_bits(state.x, trajectory[i + 1])
        before = trajectory[i]
        t = torch.full((2,), int(DDIM.t[i]))
        _, _, _, x_start = fd.p_mean_variance(model(before, t), before, t, SCHEDULE)
        assert_same_bits(state.x_start, x_start)
    assert_same_bits(x, fd.sample(model, DDIM, shape=(2, 6), seed=0))


def test_a_model_that_reuses_its_output_buffer_changes_nothing(assert_same_bits):
    buffer = torch.empty(2, 6)

    def reusing(x, t):
        return buffer.copy_(model(x, t))

    assert_same_bits(fd.sample(reusing, DDPM, shape=(2, 6), seed=0),
                     fd.sample(model, DDPM, shape=(2, 6), seed=0))  # fmt: skip
    # and one that returns its input, which is the sample itself
    assert_same_bits(fd.sample(lambda x, t: x, DDPM, shape=(2, 6), seed=0),
                     fd.sample(lambda x, t: x.clone(), DDPM, shape=(2, 6), seed=0))  # fmt: skip


@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_fresh_output_that_is_the_model_input_is_history(in_place, model_dtype, assert_same_bits):
    plan = fd.solvers.dpm_solver(SCHEDULE, 6, prediction_type="sample")

    def sample(identity, **options):
        run = fd.Sampler(plan).start(
            shape=(2, 6), seed=0, in_place=in_place, model_dtype=model_dtype, **options
        )
        while not run.done:
            run.step(identity(run.model_input))
        return run.x

    want = sample(torch.clone)
    assert_same_bits(sample(lambda x: x, outputs_are_fresh=True), want)
    assert_same_bits(sample(lambda x: x[:], outputs_are_fresh=True), want)


def test_guidance_on_any_stride(backend, assert_same_bits):
    def conditional(x, t):
        return model(torch.cat([x[: x.shape[0] // 2], 2 * x[x.shape[0] // 2 :]]), t)

    for scale in (torch.tensor(2.5).expand(4), torch.linspace(1, 8, 8)[::2]):
        options = dict(shape=(4, 6), seed=1)
        assert_same_bits(
            fd.sample(conditional, DDIM, guidance_scale=scale, **options),
            fd.sample(conditional, DDIM, guidance_scale=torch.tensor(scale.tolist()), **options),
        )


def test_a_model_that_writes_to_its_arguments_harms_only_its_run(assert_same_bits):
    expected = fd.sample(model, DDIM, shape=(1, 6), seed=0)
    times = []

    def careless(x, t):
        times.append(int(t[0]))
        output = model(x, t)
        t += 1
        x.mul_(0.5)
        return output

    x_T = torch.randn(1, 6)
    kept = x_T.clone()
    fd.sample(careless, DDIM, x_T=x_T, seed=0, callback=lambda state: None)
    assert torch.equal(x_T, kept) and times == DDIM.t.astype(int).tolist()
    assert_same_bits(fd.sample(model, DDIM, shape=(1, 6), seed=0), expected)


def test_gradients_of_history_guidance_and_input(assert_same_bits):
    """The step with gradients makes the same values as without, the model's input included."""
    plan = scaled_plan()

    def run_with(scale, grad):
        run = fd.Sampler(plan).start(
            shape=(2, 6), seed=2, dtype=torch.bfloat16, model_dtype=torch.float32,
            guidance_scale=scale,
        )  # fmt: skip
        inputs = []
        with torch.set_grad_enabled(grad):
            while not run.done:
                inputs.append(run.model_input.detach().clone())
                run.step(model(run.model_input, run.t))
        return run.x, inputs

    scale = torch.tensor([1.5, 3.0], requires_grad=True)
    x, inputs = run_with(scale, True)
    y, plain = run_with(scale.detach(), False)
    assert_same_bits(x.detach(), y)
    assert_same_bits(inputs, plain)
    x = fd.Sampler(plan).start(shape=(2, 6), seed=2, guidance_scale=scale)
    x.step(torch.cat([torch.zeros(2, 6), torch.ones(2, 6)]))
    (gradient,) = torch.autograd.grad(x.x.sum(), scale)
    assert gradient.tolist() == pytest.approx([0.3 * 6, 0.3 * 6], rel=1e-6)


def test_a_run_takes_any_layout_and_owns_its_sample(backend, assert_same_bits):
    x = torch.randn(5, 2, 3).permute(1, 2, 0)
    kept = x.clone()
    expected = fd.Run(DDIM, x.contiguous(), seed=0).step(model(x, torch.tensor([99, 99])))
    run = fd.Run(DDIM, x, seed=0, in_place=True)
    assert_same_bits(run.step(model(x, torch.tensor([99, 99]))), expected)
    assert torch.equal(x, kept)
    with pytest.raises(TypeError, match="plan"):
        fd.Run(None, x)
    with pytest.raises(ValueError, match="x has an empty batch"):
        fd.Run(DDIM, x[:0], seed=0)


def test_x_T_is_never_written_to():
    x_T = torch.randn(2, 6)
    kept = x_T.clone()
    fd.sample(model, DDPM, x_T=x_T, seed=0)
    run = fd.Sampler(DDPM).start(x_T, seed=0, in_place=True)
    run.step(model(run.model_input, run.t))
    assert torch.equal(x_T, kept)


def test_guidance_is_one_call_of_a_doubled_batch(assert_same_bits):
    calls = []

    def conditional(x, t):
        calls.append((x.shape, t.shape))
        half = x.shape[0] // 2
        assert torch.equal(x[:half], x[half:])
        return torch.cat([model(x[:half], t[:half]), model(2 * x[half:], t[half:])])

    got = fd.sample(conditional, DDIM, shape=(3, 5), seed=1, guidance_scale=2.5)
    assert calls == [((6, 5), (6,))] * 10

    def combined(x, t):
        u, c = model(x, t), model(2 * x, t)
        return u + torch.tensor(2.5) * (c - u)

    assert_same_bits(got, fd.sample(combined, DDIM, shape=(3, 5), seed=1))


def test_float32_latents_with_a_bfloat16_model_input(assert_same_bits):
    """model_input is the rounding of the latents that are kept; it is not fed back."""
    run = fd.Sampler(DDPM).start(shape=(2, 3, 8), seed=0, model_dtype=torch.bfloat16)
    assert run.x.dtype == torch.float32
    while not run.done:
        assert_same_bits(run.model_input, run.x.to(torch.bfloat16))
        run.step(model(run.model_input, run.t))
    exact = fd.sample(model, DDPM, shape=(2, 3, 8), seed=0)
    assert (run.x - exact).abs().max() < 0.1


def scaled_plan():
    """A two-state plan with input scaling, for what DDPM and DDIM do not use."""
    R = 4
    A = np.zeros((R, 2, 2 + 2 + 1))
    A[:, 0] = [0.5, 0.25, 0.3, 0.0, 0.1]
    A[:, 1] = [0.0, 0.0, 1.0, 0.0, 0.0]  # s1 keeps the last model output
    A[0, 0, 1] = 0.0
    return fd.SolverPlan(
        "two states", A, np.tile([0.0, 0.0, 1.0, 0.0, 0.0], (R, 1)),
        np.array([0.75, 0.5, 0.25, 0.1]),
        np.stack([np.arange(R), np.full(R, 1)], 1)[:, None], c_in=np.array([0.9, 0.8, 0.7, 0.6]),
        first_c_in=0.95, initial_scale=3.0,
    )  # fmt: skip


def test_input_scale_history_and_fractional_t(backend):
    plan = scaled_plan()
    run = fd.Sampler(plan).start(shape=(2, 6), seed=2)
    x = fd.randn((2, 6), 2) * 3.0
    assert torch.equal(run.x, x) and run.t.dtype == torch.float32
    history, scale = None, 0.95
    for i, t in enumerate((0.75, 0.5, 0.25, 0.1)):
        assert run.t.tolist() == pytest.approx([t, t])
        assert torch.equal(run.model_input, torch.tensor(scale) * x)
        o = model(run.model_input, run.t)
        z = fd.randn((2, 6), 2, step=i, stream=1)
        acc = 0.5 * x
        if history is not None:
            acc = acc + 0.25 * history
        x = (acc + torch.tensor(0.3) * o) + torch.tensor(0.1) * z
        history, scale = o, [0.9, 0.8, 0.7, 0.6][i]
        assert torch.equal(run.step(o), x)
    assert run.done


def test_channels_last_latents(assert_same_bits):
    x_T = fd.randn((2, 3, 4, 5), 1)
    last = x_T.to(memory_format=torch.channels_last)
    assert_same_bits(
        fd.sample(model, DDPM, x_T=last, seed=1), fd.sample(model, DDPM, x_T=x_T, seed=1)
    )

    def last_model(x, t):
        return model(x, t).to(memory_format=torch.channels_last)

    assert_same_bits(
        fd.sample(last_model, DDPM, x_T=x_T, seed=1), fd.sample(model, DDPM, x_T=x_T, seed=1)
    )


def test_gradients_flow_through_steps(backend):
    """DRaFT-style: d x_0 / d parameter through every step equals the reference's autograd."""

    def run_with(scale):
        run = fd.Sampler(DDPM).start(shape=(1, 4), seed=0, dtype=torch.float32)
        while not run.done:
            run.step(scale * model(run.model_input, run.t))
        return run.x.sum()

    scale = torch.tensor(0.7, requires_grad=True)
    (gradient,) = torch.autograd.grad(run_with(scale), scale)
    with fd.use_backend("reference"):
        (expected,) = torch.autograd.grad(run_with(scale), scale)
    assert gradient.item() == pytest.approx(expected.item(), rel=1e-6)
    h = 1e-2
    numeric = (run_with(torch.tensor(0.7 + h)) - run_with(torch.tensor(0.7 - h))) / (2 * h)
    assert gradient.item() == pytest.approx(numeric.item(), rel=2e-2)


def test_one_plan_serves_threads_at_once(assert_same_bits):
    sampler = fd.Sampler(DDPM)
    expected = [fd.sample(model, DDPM, shape=(2, 300), seed=s) for s in range(6)]
    results: list = [None] * 6

    def work(s):
        results[s] = sampler(model, (2, 300), seed=s)

    threads = [threading.Thread(target=work, args=(s,)) for s in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_same_bits(results, expected)


def test_one_plan_serves_interleaved_tasks(assert_same_bits):
    async def work(seed):
        run = fd.Sampler(DDPM).start(shape=(2, 30), seed=seed)
        while not run.done:
            output = model(run.model_input, run.t)
            await asyncio.sleep(0)
            run.step(output)
        return run.x

    async def every():
        return await asyncio.gather(*(work(s) for s in range(5)))

    expected = [fd.sample(model, DDPM, shape=(2, 30), seed=s) for s in range(5)]
    assert_same_bits(asyncio.run(every()), expected)


def test_progress_is_shown_on_stderr(capsys):
    fd.sample(model, DDIM, shape=(1, 4), seed=0, progress=True)
    captured = capsys.readouterr()
    assert "DDIM, 10 steps" in captured.err and captured.out == ""


# Refusals.


@pytest.mark.parametrize(
    ("options", "error", "names"),
    [
        (dict(), ValueError, "x_T and shape"),
        (dict(shape=(2, 3), x_T=torch.zeros(2, 3), seed=0), ValueError, "x_T and shape"),
        (dict(shape=(2, 3)), ValueError, "seed"),
        (dict(shape=(0, 3), seed=0), ValueError, "shape"),
        (dict(shape=(2, -3), seed=0), ValueError, "shape"),
        (dict(shape=(2, 3), seed=-1), ValueError, "seed"),
        (dict(shape=(2, 3), seed=0, generator=torch.Generator()), ValueError, "seed"),
        (dict(x_T=torch.zeros(2, 3)), ValueError, "noise"),
        (dict(x_T=torch.zeros(0, 3), seed=0), ValueError, "x_T"),
        (dict(x_T=torch.zeros(2, 3).long(), seed=0), TypeError, "x_T"),
        (dict(shape=(2, 3), seed=0, dtype=torch.int32), TypeError, "dtype"),
        (dict(shape=(2, 3), seed=0, model_dtype=torch.int32), TypeError, "model_dtype"),
        (dict(shape=(2, 3), seed=0, noise_dtype=torch.int32), TypeError, "noise_dtype"),
        (dict(shape=(2, 3), seed=0, guidance_scale=torch.ones(3)), ValueError, "guidance_scale"),
        (dict(shape=(2, 3), seed=0, guidance_scale=float("nan")), ValueError, "guidance_scale"),
        (dict(shape=(2, 3), seed=0, guidance_scale=1e39), ValueError, "finite in float32"),
        (dict(shape=(2, 3), seed=0, guidance_scale=torch.tensor(torch.inf)), ValueError, "finite"),
        (dict(shape=(2, 3), seed=0, preview=True), TypeError, "preview"),
        (dict(shape=(2, 3), seed=0, guidance_scale="7"), TypeError, "guidance_scale"),
        (dict(shape=(2, 3), seed=0, guidance_scale=torch.tensor([1j])), TypeError,
         "guidance_scale"),
        (dict(shape=16, seed=0), TypeError, "shape"),
        (dict(shape=(2, 3), seed=0, model_dtype=torch.float64), TypeError, "model_dtype"),
        (dict(shape=(2, 3), seed=0, dtype=torch.float64, model_dtype=torch.float32), TypeError,
         "model_dtype"),
        (dict(shape=(2, 3), seed=0, callback=5), TypeError, "callback"),
        (dict(x_T=torch.zeros(2, 3), noise=5), TypeError, "noise"),
        (dict(shape=(2, 3), generator=5), TypeError, "generator"),
        (dict(shape=(2, 3), seed=0, backend="gpu"), ValueError, "backend"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(options, error, names):
    def unused(x, t):
        raise AssertionError("the model ran before the arguments were checked")

    with pytest.raises(error, match=names):
        fd.sample(unused, DDPM, **options)


def test_a_plan_and_a_model_are_needed():
    with pytest.raises(TypeError, match="plan"):
        fd.Sampler(SCHEDULE)
    with pytest.raises(TypeError, match="model"):
        fd.sample(None, DDPM, shape=(2, 3), seed=0)


def test_given_noise_may_have_any_stride(assert_same_bits):
    x, z = torch.ones(2, 3, 5, 4), fd.randn((2, 4, 5, 3), seed=1).permute(0, 3, 2, 1)
    run, twin = (fd.Sampler(DDPM).start(x, seed=0) for _ in range(2))
    assert_same_bits(run.step(x, noise=[z]), twin.step(x, noise=[z.contiguous()]))


@pytest.mark.parametrize(
    ("options", "error", "names"),
    [
        (dict(noise=[]), ValueError, "noise must hold 1"),
        (dict(noise=[torch.zeros(2, 3)] * 2), ValueError, "noise must hold 1"),
        (dict(noise=torch.zeros(1, 2, 3)), TypeError, "noise"),
        (dict(noise=[torch.zeros(1)]), ValueError, r"noise\[0\]"),
        (dict(noise=[torch.zeros(2, 3).double()]), TypeError, r"noise\[0\]"),
        (dict(noise=[torch.zeros(2, 3).int()]), TypeError, r"noise\[0\]"),
        (dict(noise=[torch.zeros(2, 3).to_sparse()]), ValueError, r"noise\[0\]"),
        (dict(x=torch.zeros(2, 3).to_sparse()), ValueError, "x must"),
        (dict(result_dtype=torch.int32), TypeError, "result_dtype"),
        (dict(result_dtype=torch.float64), TypeError, "result_dtype"),
        (dict(preview_dtype=torch.float64), TypeError, "preview_dtype"),
    ],
)
def test_a_bad_argument_of_a_step_leaves_the_run_unharmed(options, error, names, assert_same_bits):
    generator = torch.Generator().manual_seed(0)
    run = fd.Sampler(DDPM).start(shape=(2, 3), generator=generator)
    before, drawn = run.x.clone(), generator.get_state()
    with pytest.raises(error, match=names):
        run.step(torch.zeros(2, 3), **options)
    assert run.index == 0 and torch.equal(generator.get_state(), drawn)
    assert_same_bits(run.x, before)


def test_a_bad_output_leaves_the_run_unharmed(assert_same_bits):
    run = fd.Sampler(DDPM).start(shape=(2, 3), seed=0)
    good = model(run.model_input, run.t)
    before = run.x.clone()
    for bad, error in (
        (good[:1], ValueError), (good.double(), TypeError), (good.long(), TypeError),
        (good.to("meta"), ValueError), ((good, good), TypeError), (good.to_sparse(), ValueError),
    ):  # fmt: skip
        with pytest.raises(error, match="output"):
            run.step(bad)
    assert run.index == 0
    assert_same_bits(run.x, before)
    while not run.done:
        run.step(model(run.model_input, run.t))
    with pytest.raises(ValueError, match="done"):
        run.step(good)
    with pytest.raises(ValueError, match="done"):
        run.t  # noqa: B018
    assert_same_bits(run.x, fd.sample(model, DDPM, shape=(2, 3), seed=0))


def test_an_assigned_sample_is_what_the_model_sees_and_the_step_starts_from(assert_same_bits):
    plan = scaled_plan()
    mask, other = torch.tensor([1.0, 0.0]).repeat(2, 3), torch.randn(2, 6)

    def masked(x):
        return mask * x + (1 - mask) * other

    run = fd.Sampler(plan).start(shape=(2, 6), seed=2, guidance_scale=2.0)
    twin = fd.Sampler(plan).start(shape=(2, 6), seed=2, guidance_scale=2.0)
    while not run.done:
        scale = plan.first_c_in if run.index == 0 else plan.c_in[run.index - 1]
        run.x = kept = masked(run.x)
        assert_same_bits(run.model_input, torch.cat([kept * float(scale)] * 2))
        output = model(run.model_input, run.t)
        kept = kept.clone()
        run.step(output)
        twin.step(output, x=kept)
        assert_same_bits(run.x, twin.x)
    with pytest.raises(ValueError, match="x must"):
        run.x = torch.zeros(3, 6)


def test_a_plan_with_inputs_is_refused_before_the_model_runs():
    plan = fd.SolverPlan(
        "with input", np.tile([[[0.5, 0.1, 1.0, 0.0], [0.0, 1.0, 0.0, 0.0]]], (2, 1, 1)),
        np.zeros((2, 4)), np.arange(2.0), np.zeros((2, 0, 2), int), inputs=("known",),
    )  # fmt: skip
    with pytest.raises(ValueError, match="known"):
        fd.sample(lambda x, t: pytest.fail("the model ran"), plan, shape=(2, 3), seed=0)
