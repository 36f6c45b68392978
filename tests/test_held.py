"""Device tables kept between calls: right for every thread, mode and default device."""

from __future__ import annotations

import sys
import threading

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastdiff as fd
from fastdiff.ops import held

T = 50
SCHEDULE = fd.schedules.linear(T, 1e-3, 0.2)


def data(shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def test_tables_made_in_other_modes_serve_everyone(assert_same_bits):
    """Inference mode, fake tensors and export meet the caches first; then ordinary calls come."""
    schedule = fd.schedules.linear(37, 1e-3, 0.1)
    plan = fd.solvers.ddim(schedule, 5)
    x = data((2, 6))

    class Module(torch.nn.Module):
        def forward(self, x):
            y = fd.q_sample(x, 3, schedule, seed=0)
            return fd.p_sample(y, y, 3, schedule, seed=0)

    def guided(**options):
        return fd.sample(lambda x, t: x * 0.5, plan, shape=(2, 6), seed=0, guidance_scale=2.0,
                         **options)  # fmt: skip

    with torch.inference_mode():
        first = guided()
    with FakeTensorMode():
        fake = torch.empty(2, 6)
        Module()(fake)
        fd.q_sample(fake, torch.zeros(2, dtype=torch.int64), schedule, seed=0, backend="reference")
    exported = torch.export.export(Module(), (x,)).module()
    expected = Module()(x)
    assert_same_bits(exported(x), expected)
    assert_same_bits(torch.compile(Module(), fullgraph=True)(x), expected)
    assert_same_bits(guided(), first)
    run = fd.Sampler(plan).start(shape=(2, 6), seed=0, guidance_scale=2.0)
    scale = torch.tensor(0.5, requires_grad=True)
    while not run.done:
        run.step(scale * run.model_input)
    assert torch.isfinite(torch.autograd.grad(run.x.sum(), scale)[0])
    assert_same_bits(run.x.detach(), first)
    with FakeTensorMode():
        assert fd.q_sample(torch.empty(2, 6), 3, schedule, seed=0).shape == (2, 6)


def test_tables_made_by_many_threads_at_once():
    """The first use of many schedules from many threads: everyone gets their own coefficients."""
    schedules = [fd.schedules.linear(40 + k, 1e-3, 0.1) for k in range(24)]
    x = data((1, 8))
    expected = [fd.q_sample(x, 9, s, seed=0, backend="reference") for s in schedules]
    held._tensors.clear()
    wrong: list[int] = []

    def work():
        for k, schedule in enumerate(schedules):
            if not torch.equal(fd.q_sample(x, 9, schedule, seed=0, backend="native"), expected[k]):
                wrong.append(k)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong


def test_other_default_devices_and_fake_tensors_leave_no_trace():
    schedule = fd.schedules.linear(33, 1e-3, 0.1)
    x = data((2, 6))
    with FakeTensorMode():
        fake = torch.empty(2, 6)
        assert fd.q_sample(fake, 3, schedule, seed=0, backend="reference").shape == (2, 6)
    expected = fd.q_sample(x, 3, schedule, seed=0)
    held._tensors.clear()
    torch.set_default_device("meta")
    try:
        results = [
            fd.q_sample(x, 3, schedule, seed=0),
            fd.q_step(x, 3, schedule, seed=0),
            fd.q_chain(x, schedule, seed=0, at=[2])[0],
            fd.sample(lambda x, t: x, fd.solvers.ddpm(schedule, variance="fixed_large"),
                      shape=(2, 6), seed=0, device="cpu"),
        ]  # fmt: skip
    finally:
        torch.set_default_device(None)
    assert torch.equal(results[0], expected)
    assert all(torch.isfinite(r).all() for r in results)
