"""Linear forms against the same arithmetic on tensors, and what they refuse."""

from __future__ import annotations

import copy
import importlib.util
import math
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff.tracing import LinearForm, NotAffineError, Recorder
from fastdiff.tracing.intercept import intercepted
from fastdiff.tracing.linear_form import CONSTANT

SHAPE = (1, 3, 5, 7)


class Bench:
    """Two forms beside the tensors they stand for, over the variables of one recording."""

    def __init__(self, learned_variance=False):
        self.recorder = Recorder("bench", learned_variance=learned_variance)
        x = self.recorder.begin()
        self.a, self.b = self.recorder.call(x, t=0.0)
        generator = torch.Generator().manual_seed(7)
        self._values = {}
        self._generator = generator

    def tensor(self, form):
        """The form at the variables' values."""
        total = torch.zeros(SHAPE, dtype=torch.float64)
        for key, coefficient in form.terms.items():
            total = total + coefficient * self.value(key)
        return total

    def value(self, key):
        if key == CONSTANT:
            return torch.ones(SHAPE, dtype=torch.float64)
        if key not in self._values:
            self._values[key] = torch.randn(SHAPE, generator=self._generator, dtype=torch.float64)
        return self._values[key]

    def check(self, operation):
        """operation(a, b) on forms is operation(a, b) on tensors."""
        form = operation(self.a, self.b)
        assert isinstance(form, LinearForm)
        expected = operation(self.tensor(self.a), self.tensor(self.b))
        torch.testing.assert_close(self.tensor(form), expected, rtol=1e-14, atol=1e-14)
        return form


SCALAR = torch.tensor(1.75, dtype=torch.float64)
ONE = torch.tensor([[0.375]])
OPERATIONS = {
    "a + b": lambda a, b: a + b,
    "a - b": lambda a, b: a - b,
    "a - a": lambda a, b: a - a,
    "-a": lambda a, b: -a,
    "+a": lambda a, b: +a,
    "a * number": lambda a, b: a * 0.3,
    "number * a": lambda a, b: 0.3 * a,
    "a * int": lambda a, b: a * 3,
    "int * a": lambda a, b: 3 * a,
    "a * bool": lambda a, b: a * True,
    "a * numpy": lambda a, b: a * np.float64(0.3),
    "numpy * a": lambda a, b: np.float64(0.3) * a,
    "numpy32 * a": lambda a, b: np.float32(0.3) * a,
    "a * scalar": lambda a, b: a * SCALAR,
    "scalar * a": lambda a, b: SCALAR * a,
    "a * one": lambda a, b: a * ONE,
    "one * a": lambda a, b: ONE * a,
    "a / number": lambda a, b: a / 0.3,
    "a / numpy": lambda a, b: a / np.float64(0.3),
    "a / scalar": lambda a, b: a / SCALAR,
    "a / infinity": lambda a, b: a / -math.inf,
    "a + number": lambda a, b: a + 0.3,
    "number + a": lambda a, b: 0.3 + a,
    "a - number": lambda a, b: a - 0.3,
    "number - a": lambda a, b: 0.3 - a,
    "numpy - a": lambda a, b: np.float64(0.3) - a,
    "a + scalar": lambda a, b: a + SCALAR,
    "scalar + a": lambda a, b: SCALAR + a,
    "a - scalar": lambda a, b: a - SCALAR,
    "scalar - a": lambda a, b: SCALAR - a,
    "a + 0": lambda a, b: a + 0,
    "0 + a": lambda a, b: 0 + a,
    "sum": lambda a, b: sum([a, b, a]),
    "a * 0": lambda a, b: a * 0.0,
    "torch.add": lambda a, b: torch.add(a, b),
    "torch.add alpha": lambda a, b: torch.add(a, b, alpha=2.5),
    "torch.add scalar first": lambda a, b: torch.add(SCALAR, b, alpha=2.5),
    "torch.sub": lambda a, b: torch.sub(a, b),
    "torch.sub alpha": lambda a, b: torch.sub(a, b, alpha=2.5),
    "torch.sub scalar first": lambda a, b: torch.sub(SCALAR, b, alpha=2.5),
    "torch.subtract": lambda a, b: torch.subtract(a, b),
    "torch.rsub": lambda a, b: torch.rsub(a, b),
    "torch.rsub number": lambda a, b: torch.rsub(a, 0.25),
    "torch.mul": lambda a, b: torch.mul(a, 0.3),
    "torch.mul scalar first": lambda a, b: torch.mul(SCALAR, a),
    "torch.multiply": lambda a, b: torch.multiply(a, SCALAR),
    "torch.div": lambda a, b: torch.div(a, 0.3),
    "torch.divide": lambda a, b: torch.divide(a, SCALAR),
    "torch.true_divide": lambda a, b: torch.true_divide(a, SCALAR),
    "torch.neg": lambda a, b: torch.neg(a),
    "torch.negative": lambda a, b: torch.negative(a),
    "torch.lerp": lambda a, b: torch.lerp(a, b, 0.3),
    "torch.lerp weight": lambda a, b: torch.lerp(a, b, SCALAR),
    "torch.zeros_like": lambda a, b: torch.zeros_like(a) + b,
    "torch.clone": lambda a, b: torch.clone(a),
    "add": lambda a, b: a.add(b),
    "add alpha": lambda a, b: a.add(b, alpha=0.7),
    "sub": lambda a, b: a.sub(b),
    "sub alpha": lambda a, b: a.sub(b, alpha=0.7),
    "mul": lambda a, b: a.mul(0.7),
    "div": lambda a, b: a.div(0.7),
    "neg": lambda a, b: a.neg(),
    "lerp": lambda a, b: a.lerp(b, 0.9),
    "to": lambda a, b: a.to(torch.float64),
    "to other": lambda a, b: a.to(b),
    "to device": lambda a, b: a.to("cpu"),
    "to dtype=": lambda a, b: a.to(device="cpu", dtype=torch.float64),
    "type": lambda a, b: a.type(torch.float64),
    "double": lambda a, b: a.double(),
    "clone": lambda a, b: a.clone(memory_format=torch.contiguous_format),
    "contiguous": lambda a, b: a.contiguous(),
    "detach": lambda a, b: a.detach(),
    "cpu": lambda a, b: a.cpu(),
    "einsum": lambda a, b: torch.einsum(
        "k,bkc...->bc...", torch.tensor([0.5, -2.0], dtype=torch.float64), torch.stack([a, b], 1)
    ),
    "einsum of the first dimension": lambda a, b: torch.einsum(
        "k,kbchw->bchw", torch.tensor([0.5, -2.0], dtype=torch.float64), torch.stack([a, b])
    ),
    "augmented": lambda a, b: _augmented(a, b),
}  # fmt: skip


def _augmented(a, b):
    total = a * 1.0
    total += b
    total -= 0.25 * a
    total *= 1.5
    total /= 0.7
    return total


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_form_computes_what_tensors_compute(name):
    Bench().check(OPERATIONS[name])


NUMBERS = st.floats(-4, 4).filter(lambda v: abs(v) > 1e-3)


@settings(max_examples=60, deadline=None)
@given(
    program=st.lists(
        st.tuples(st.sampled_from("+-r*/l"), NUMBERS, st.sampled_from(["form", "number"])),
        min_size=1,
        max_size=12,
    )
)
def test_random_expressions_agree_with_tensors(program):
    def run(a, b):
        for operation, value, kind in program:
            other = b if kind == "form" else value
            if operation == "+":
                a = a + other
            elif operation == "-":
                a = a - other
            elif operation == "r":
                a = other - a
            elif operation == "*":
                a = torch.mul(a, value)
            elif operation == "/":
                a = a / torch.tensor(value, dtype=torch.float64)
            else:
                a = torch.lerp(a, b, value)
        return a

    bench = Bench()
    form = run(bench.a, bench.b)
    expected = run(bench.tensor(bench.a), bench.tensor(bench.b))
    scale = max(1.0, float(expected.abs().max()))
    size = 1.0 + 5.0 ** len(program)  # cancellation: sums of terms of this size
    assert (bench.tensor(form) - expected).abs().max() <= 1e-14 * max(scale, size)


def test_what_cancels_exactly_leaves_no_term():
    bench = Bench()
    assert (bench.a + bench.b - bench.a).terms == bench.b.terms
    assert (bench.a - bench.a).terms == {}
    assert (bench.a * 0.0 + bench.b).terms == bench.b.terms
    assert repr(2.0 * bench.a - bench.b) == "+2 x_0 -1 o_0"
    assert repr(bench.a - bench.a) == "0"


def test_a_form_answers_what_samplers_ask_of_a_tensor():
    a = Bench().a
    assert (a.shape, a.ndim, a.dim(), len(a)) == (SHAPE, 4, 4, 1)
    assert (a.size(), a.size(1), a.numel()) == (SHAPE, 3, 105)
    assert (a.device, a.requires_grad) == (torch.device("cpu"), False)
    assert torch.is_floating_point(a) and a.is_floating_point()
    assert a.half().dtype == torch.float16 and a.bfloat16().dtype == torch.bfloat16
    assert a.to(torch.float32).dtype == torch.float32 and a.float().dtype == torch.float32
    assert a.half().to(a).dtype == torch.float64
    assert (a.half() + a.float()).dtype == torch.float32
    assert torch.zeros_like(a, dtype=torch.float16).dtype == torch.float16
    assert torch.equal(a.new_ones([2]), torch.ones(2, dtype=torch.float64))
    assert torch.equal(a.new_zeros([2]), torch.zeros(2, dtype=torch.float64))
    assert torch.equal(a.new_tensor([3]), torch.tensor([3.0], dtype=torch.float64))
    assert (a == None, a != None) == (False, True)  # noqa: E711
    assert copy.deepcopy([a])[0] is a
    assert {a: 1}[a] == 1


def test_hasattr_is_answered():
    a = Bench().a
    assert hasattr(a, "shape") and hasattr(a, "float")
    assert not hasattr(a, "tokens") and not hasattr(a, "__array__")
    assert getattr(a, "sample", None) is None


def test_clamps_become_the_node_of_the_call():
    bench = Bench()
    for clamp in (
        lambda x: x.clamp(-1, 1),
        lambda x: x.clip(min=-1, max=1),
        lambda x: torch.clamp(x, -1, 1),
        lambda x: torch.clip(x, min=-1.0, max=torch.tensor(1.0)),
    ):
        node = clamp(0.5 * bench.a)
        (row,) = bench.recorder.rows
        assert node.terms == {row.clamp.variable: 1.0}
        assert (row.clamp.lo, row.clamp.hi) == (-1.0, 1.0)
        assert row.clamp.form.terms == (0.5 * bench.a).terms
    open_ended = Bench()
    open_ended.a.clamp(max=2.0)
    assert (open_ended.recorder.rows[0].clamp.lo, open_ended.recorder.rows[0].clamp.hi) == (
        -math.inf, 2.0,
    )  # fmt: skip


def test_learned_variance_becomes_a_scale_of_the_noise():
    bench = Bench(learned_variance=True)
    for take in (lambda o: torch.split(o, 3, dim=1), lambda o: o.split(3, 1),
                 lambda o: o.chunk(2, dim=1), lambda o: torch.chunk(o, 2, 1)):  # fmt: skip
        output, v = take(bench.b)
        assert output.terms == bench.b.terms and output.shape == SHAPE
        assert set(v.terms).isdisjoint(output.terms)
    low, high = -3.0, -0.5
    f = (v + 1) / 2
    log_variance = f * high + (1 - f) * low
    z = torch.randn_like(bench.a)
    scaled = torch.exp(0.5 * log_variance) * z
    again = z * (0.5 * log_variance).exp()
    assert scaled.terms == again.terms
    (row,) = bench.recorder.rows
    assert scaled.terms == {row.draws[0].variable: 1.0}
    assert row.learned == pytest.approx((low / 2, high / 2), rel=1e-15)
    with pytest.raises(NotAffineError, match="two variances"):
        torch.exp(v) * z
    with pytest.raises(NotAffineError, match="of an image"):
        torch.exp(bench.a) * z
    with pytest.raises(NotAffineError, match="anything but noise"):
        torch.exp(v) * 2.0
    with pytest.raises(NotAffineError, match="anything but the step's noise"):
        torch.exp(0.5 * log_variance) * bench.a
    with pytest.raises(NotAffineError, match="not that of model output and variance"):
        bench.b.split(2, dim=1)
    with pytest.raises(NotAffineError, match="into 3"):
        bench.b.chunk(3, dim=1)


def _power_of_two(a, b):
    a **= 2


def _item(a, b):
    a[0] = 1.0


REFUSED = {
    "power": [lambda a, b: a**2, lambda a, b: 2.0**a, lambda a, b: SCALAR**a, _power_of_two,
              lambda a, b: np.float64(2) ** a],
    "torch.pow": [lambda a, b: torch.pow(a, 2), lambda a, b: torch.pow(SCALAR, a)],
    "Tensor.pow": [lambda a, b: a.pow(2)],
    "multiply": [lambda a, b: a * b, lambda a, b: torch.mul(a, b), lambda a, b: a * math.inf,
                 lambda a, b: math.nan * a, lambda a, b: a * torch.ones(5, 7),
                 lambda a, b: torch.ones(5, 7) * a, lambda a, b: a * np.ones(7),
                 lambda a, b: np.ones(7) * a, lambda a, b: a * "2", lambda a, b: a * 1j,
                 lambda a, b: torch.lerp(a, b, a)],
    "divide": [lambda a, b: a / b, lambda a, b: 1 / a, lambda a, b: SCALAR / a,
               lambda a, b: torch.div(1.0, a), lambda a, b: torch.div(a, b),
               lambda a, b: a / 0.0, lambda a, b: np.float64(1) / a,
               lambda a, b: a / torch.ones(7)],
    "add": [lambda a, b: a + torch.ones(7), lambda a, b: torch.ones(5, 7) + a,
            lambda a, b: a + None, lambda a, b: a + np.ones(2)],
    "subtract": [lambda a, b: a - torch.ones(7), lambda a, b: "1" - a],
    "abs()": [lambda a, b: abs(a)],
    "torch.abs": [lambda a, b: torch.abs(a)],
    "Tensor.abs": [lambda a, b: a.abs()],
    "Tensor.add_": [lambda a, b: a.add_(b)],
    "bool()": [lambda a, b: 1 if a else 0, lambda a, b: not a],
    "float()": [lambda a, b: float(a)],
    "int()": [lambda a, b: int(a)],
    "comparison": [lambda a, b: a > 0, lambda a, b: a == b, lambda a, b: a != b,
                   lambda a, b: a >= 0, lambda a, b: a < b],
    "torch.gt": [lambda a, b: torch.gt(a, 0)],
    "indexing": [lambda a, b: a[0], lambda a, b: a[..., :1], lambda a, b: a[:, 0], _item],
    "iteration": [lambda a, b: list(a), lambda a, b: [*a]],
    "remainder": [lambda a, b: a % 2, lambda a, b: a // 2],
    "matrix product": [lambda a, b: a @ b, lambda a, b: np.ones(7) @ a],
    "clamp": [lambda a, b: a.clamp(b, 1), lambda a, b: torch.clamp(a, max=b),
              lambda a, b: torch.clamp(torch.ones(7), min=a),
              lambda a, b: a.clamp(-1, 1) + b.clamp(-1, 1)],
    "torch.where": [lambda a, b: torch.where(torch.tensor(True), a, b)],
    "torch.maximum": [lambda a, b: torch.maximum(a, b)],
    "torch.quantile": [lambda a, b: torch.quantile(a, 0.5)],
    "torch.einsum": [
        lambda a, b: torch.einsum("bchw,bchw->b", a, b),
        lambda a, b: torch.einsum("k,bkchw->bchw", torch.ones(2), torch.stack([a, b])),
        lambda a, b: torch.einsum("k,bkchw->bkchw", torch.ones(2), torch.stack([a, b], 1)),
        lambda a, b: torch.einsum("k,bkchw->bchw", torch.ones(3), torch.stack([a, b], 1)),
    ],
    "torch.stack": [lambda a, b: torch.stack([a, torch.ones(SHAPE)])],
    "torch.cat": [lambda a, b: torch.cat([a, b])],
    "torch.add": [lambda a, b: torch.add(a, b, out=torch.zeros(SHAPE))],
    "torch.sum": [lambda a, b: torch.sum(a)],
}  # fmt: skip


@pytest.mark.parametrize("operation", REFUSED)
def test_what_is_not_affine_is_refused_by_name(operation):
    for attempt in REFUSED[operation]:
        bench = Bench()
        with pytest.raises(NotAffineError) as caught:
            attempt(bench.a, bench.b)
        assert caught.value.operation == operation
        assert isinstance(caught.value, TypeError)
        assert caught.value.where.startswith(__file__ + ":")
        assert str(caught.value).endswith(caught.value.where)


def test_stacked_images_are_good_for_a_weighted_sum_only():
    bench = Bench()
    stacked = torch.stack([bench.a, bench.b], dim=1)
    for attempt in (lambda: torch.sum(stacked, 1), lambda: torch.exp(stacked)):
        with pytest.raises(NotAffineError, match="of stacked images is not known"):
            attempt()


def test_an_error_names_the_line_of_the_sampler(tmp_path):
    path = tmp_path / "sampler.py"
    path.write_text(
        "import torch\n"
        "def inner(x):\n"
        "    y = 2 * x\n"
        "    return torch.sqrt(\n"
        "        y)\n"
        "def outer(x):\n"
        "    return inner(x) + 1\n"
        "def attribute(x):\n"
        "    return x.sqrt()\n"
        "def inside_torch(x):\n"
        "    return torch.nn.functional.mse_loss(x, x)\n"
    )
    spec = importlib.util.spec_from_file_location("sampler_of_a_test", path)
    sampler = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sampler)
    bench = Bench()
    for function, operation, line in (
        (sampler.outer, "torch.sqrt", 4),
        (sampler.attribute, "Tensor.sqrt", 9),
        (sampler.inside_torch, "torch.mse_loss", 11),
    ):
        with pytest.raises(NotAffineError) as caught:
            function(bench.a)
        assert caught.value.operation == operation
        assert caught.value.where == f"{path}:{line}"
        assert f"{path}:{line}" in str(caught.value)


def test_random_images_become_draws_of_the_last_call():
    recorder = Recorder("draws")
    x, _ = recorder.call(recorder.begin(), t=0.0)
    with intercepted(recorder):
        first = torch.randn(SHAPE, generator=torch.Generator(), dtype=torch.float16)
        second = torch.randn(*SHAPE)
        third = torch.randn_like(x)
    draws = recorder.rows[0].draws
    assert [form.terms for form in (first, second, third)] == [{d.variable: 1.0} for d in draws]
    assert [(d.step, d.stream) for d in draws] == [(0, 1), (0, 3), (0, 5)]
    assert [d.dtype for d in draws] == [torch.float16, torch.float32, torch.float64]
    assert first.dtype == torch.float16 and third.shape == SHAPE


def test_random_numbers_that_are_not_a_normal_image_are_refused():
    recorder = Recorder("draws")
    recorder.call(recorder.begin(), t=0.0)
    with intercepted(recorder):
        for attempt in (
            lambda: torch.rand(SHAPE), lambda: torch.randint(3, (2,)), lambda: torch.randn(2),
            lambda: torch.randn((1,)), lambda: torch.normal(0.0, 1.0, SHAPE),
            lambda: torch.rand_like(torch.zeros(2)), lambda: torch.empty(3).normal_(),
        ):  # fmt: skip
            with pytest.raises(NotAffineError, match=r"torch\.\w+ .*noise|is not a normal draw"):
                attempt()


def test_only_the_tracing_thread_is_intercepted():
    recorder = Recorder("draws")
    recorder.call(recorder.begin(), t=0.0)
    inside, drawn = threading.Event(), []

    def other():
        inside.wait()
        drawn.append(torch.randn(SHAPE, generator=torch.Generator().manual_seed(3)))
        drawn.append(torch.rand(2))

    thread = threading.Thread(target=other)
    thread.start()
    with intercepted(recorder):
        inside.set()
        thread.join()
        assert isinstance(torch.randn(SHAPE), LinearForm)
    assert torch.equal(drawn[0], torch.randn(SHAPE, generator=torch.Generator().manual_seed(3)))
    assert len(recorder.rows[0].draws) == 1


def test_interception_ends_with_an_error():
    recorder = Recorder("draws")
    recorder.call(recorder.begin(), t=0.0)
    with pytest.raises(NotAffineError), intercepted(recorder):
        torch.rand(SHAPE)
    assert isinstance(torch.randn(SHAPE), torch.Tensor)
    assert isinstance(torch.rand(2), torch.Tensor)
