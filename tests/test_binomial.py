"""Binomial diffusion against the enumeration of every state of a small chain, in float64."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from fastdiff import binomial
from fastdiff.binomial import BinomialSchedule

F32, F64 = torch.float32, torch.float64
T = 4
BETAS = (0.15, 0.3, 0.45, 0.7)
SCHEDULE = BinomialSchedule(BETAS)
ERASING = BinomialSchedule.erasing(T)
STATES = torch.tensor(list(itertools.product((0.0, 1.0), repeat=2)), dtype=F64)  # of two bits
# A model: logits by (t, x_t), arbitrary but fixed.
LOGITS = torch.randn(T, 4, 2, generator=torch.Generator().manual_seed(2), dtype=F64) * 2


def index_of(x: torch.Tensor) -> torch.Tensor:
    return (x[:, 0] * 2 + x[:, 1]).long()


def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return LOGITS[t, index_of(x)].to(x.dtype if x.is_floating_point() else F32)


def kernel(beta: float) -> np.ndarray:
    """q(x_t | x_{t-1}) of one bit, [x_{t-1}, x_t], as the paper has it."""
    one = np.array([0.5 * beta, 1 - beta + 0.5 * beta])
    return np.stack([1 - one, one], axis=1)


def chains(betas) -> list[np.ndarray]:
    """q(x_t | x_0) of one bit for t = 0 (nothing done) to T, by multiplying the steps."""
    found = [np.eye(2)]
    for beta in betas:
        found.append(found[-1] @ kernel(beta))
    return found


def bayes(betas, t: int) -> np.ndarray:
    """q(x_{t-1} = 1 | x_t, x_0), [x_t, x_0], from the joint distribution."""
    before, step = chains(betas)[t], kernel(betas[t])
    joint = before[:, :, None] * step[None]  # [x_0, x_{t-1}, x_t]
    return (joint[:, 1] / joint.sum(axis=1)).T


def reverse(t: int, prediction: str, schedule: BinomialSchedule) -> np.ndarray:
    """p(x_{t-1} = 1 | x_t) of each bit, (4, 2), from the model's logits."""
    s = torch.sigmoid(LOGITS[t]).numpy()
    if prediction == "previous":
        return s
    q = bayes(schedule.betas, t)
    given = STATES.long().numpy()
    return q[given, 0] * (1 - s) + q[given, 1] * s


def transition(t: int, prediction: str, schedule: BinomialSchedule) -> np.ndarray:
    """p(x_{t-1} | x_t) over states, [x_t, x_{t-1}]."""
    one, states = reverse(t, prediction, schedule), STATES.numpy()
    return np.prod(np.where(states[None] == 1, one[:, None], 1 - one[:, None]), axis=2)


def model_distribution(prediction: str, schedule: BinomialSchedule) -> np.ndarray:
    """p(x_0) over states."""
    p = np.full(4, 0.25)
    for t in reversed(range(T)):
        p = p @ transition(t, prediction, schedule)
    return p


def exact_term(t: int, x_start: np.ndarray, prediction: str, schedule: BinomialSchedule) -> float:
    """E KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) in bits, over every x_t and x_{t-1}."""
    states, p = STATES.numpy(), transition(t, prediction, schedule)
    here, one = chains(schedule.betas)[t + 1], bayes(schedule.betas, t)
    start, total = x_start.astype(int), 0.0
    for x_t, state in enumerate(states.astype(int)):
        weight = np.prod(here[start, state])
        q_one = one[state, start]
        for before in range(4):
            q = np.prod(np.where(states[before] == 1, q_one, 1 - q_one))
            if q > 0:
                total += weight * q * np.log2(q / p[x_t, before])
    return total


# ---- the schedule


def test_the_paper_s_betas_erase_a_fraction_at_each_step():
    steps = 7
    schedule = BinomialSchedule.erasing(steps)
    paper = [1 / (steps - t + 1) for t in range(1, steps + 1)]
    np.testing.assert_allclose(schedule.betas, paper, rtol=1e-15)
    np.testing.assert_allclose(schedule.alphas_cumprod, 1 - np.arange(1, 8) / 7, atol=1e-15)
    assert schedule.num_timesteps == 7 and schedule == BinomialSchedule(paper)
    assert schedule != BinomialSchedule(BETAS)


@pytest.mark.parametrize("schedule", [SCHEDULE, ERASING], ids=["some", "erasing"])
def test_posterior_and_marginals_are_those_of_the_chain(schedule):
    for t in range(T):
        np.testing.assert_allclose(schedule.posterior[t], bayes(schedule.betas, t), atol=1e-14)
        marginal = chains(schedule.betas)[t + 1][:, 1]
        known = schedule.alphas_cumprod[t]
        np.testing.assert_allclose(marginal, [(1 - known) / 2, (1 + known) / 2], atol=1e-14)
    x_t, x_start = torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([[0.0, 1, 0, 1]])
    for t in range(T):
        found = binomial.posterior(x_start, x_t, t, schedule)
        np.testing.assert_allclose(found[0], schedule.posterior[t].ravel(), rtol=1e-6, atol=1e-7)
    per_sample = binomial.posterior(
        x_start.expand(2, 4), x_t.expand(2, 4), torch.tensor([1, 3]), schedule
    )
    np.testing.assert_allclose(per_sample[1], schedule.posterior[3].ravel(), rtol=1e-6)


# ---- drawing


def frequencies(x: torch.Tensor) -> torch.Tensor:
    return torch.bincount(index_of(x.double()), minlength=4).double() / len(x)


def assert_near(found: torch.Tensor, expected: np.ndarray, count: int) -> None:
    """Within four standard deviations of each frequency."""
    expected = torch.from_numpy(np.asarray(expected))
    limit = 4 * torch.sqrt(expected * (1 - expected) / count)
    assert ((found - expected).abs() <= limit + 1e-12).all(), (found, expected)


def test_forward_draws_follow_the_chain():
    count = 20000
    x_start = torch.tensor([[0.0, 1.0]]).expand(count, 2)
    for t in (0, 2, 3):
        one = chains(BETAS)[t + 1][[0, 1], 1]
        x_t = binomial.q_sample(x_start, t, SCHEDULE, seed=3)
        expected = np.prod(np.where(STATES.numpy() == 1, one, 1 - one), axis=1)
        assert_near(frequencies(x_t), expected, count)
    x = x_start
    for t in range(T):
        x = binomial.q_step(x, t, SCHEDULE, seed=4)
    one = chains(BETAS)[T][[0, 1], 1]
    assert_near(frequencies(x), np.prod(np.where(STATES == 1, one, 1 - one), axis=1), count)


@pytest.mark.parametrize("prediction", ["sample", "previous"])
def test_samples_follow_the_model_s_distribution(prediction):
    count = 20000
    for schedule in (SCHEDULE, ERASING):
        x = binomial.sample(model, schedule, (count, 2), seed=8, prediction_type=prediction)
        assert_near(frequencies(x), model_distribution(prediction, schedule), count)


def test_draws_are_a_function_of_the_seed_and_the_sample(backend, assert_same_bits):
    x, t = torch.ones(6, 10), torch.tensor([0, 1, 2, 3, 1, 2])
    whole = binomial.q_sample(x, t, SCHEDULE, seed=5, step=9)
    half = binomial.q_sample(x[3:], t[3:], SCHEDULE, seed=5, step=9, sample_offset=3)
    assert_same_bits(half, whole[3:])
    for dtype in (torch.bfloat16, torch.float16, torch.uint8, torch.bool):
        other = binomial.q_sample(x.to(dtype), t, SCHEDULE, seed=5, step=9)
        assert other.dtype == dtype and torch.equal(other.float(), whole)
    assert not torch.equal(binomial.q_sample(x, t, SCHEDULE, seed=5, step=10), whole)
    assert not torch.equal(binomial.q_sample(x, t, SCHEDULE, seed=6, step=9), whole)
    seeds = torch.tensor([5, 7])
    each = binomial.sample(model, SCHEDULE, (2, 2), seed=seeds, dtype=torch.uint8)
    alone = binomial.sample(model, SCHEDULE, (1, 2), seed=7, dtype=torch.uint8)
    assert torch.equal(each[1:], alone)


def test_layouts_and_float64_draw_the_same():
    x = (torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    expected = binomial.q_sample(x, 2, SCHEDULE, seed=1)
    for other in (x.contiguous(memory_format=torch.channels_last), x.double()):
        assert torch.equal(binomial.q_sample(other, 2, SCHEDULE, seed=1).float(), expected)
    logits = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(1))
    expected = binomial.p_sample(logits, x, 2, SCHEDULE, seed=1)
    assert torch.equal(binomial.p_sample(logits, x.bool(), 2, SCHEDULE, seed=1), expected.bool())
    mixed = binomial.p_sample(logits, x.double(), 2, SCHEDULE, seed=1)
    assert mixed.dtype == F64 and torch.equal(mixed.float(), expected)


# ---- the bound


@pytest.mark.parametrize("prediction", ["sample", "previous"])
@pytest.mark.parametrize("schedule", [SCHEDULE, ERASING], ids=["some", "erasing"])
def test_a_term_is_its_enumeration(prediction, schedule):
    """sum over every x_t of q(x_t | x_0) times bound(), against sums over x_t and x_{t-1}."""
    for dtype, tolerance in ((F32, 3e-6), (F64, 1e-12)):
        for start, t in itertools.product(range(4), range(T)):
            x_start = STATES[start].expand(4, 2).to(dtype)
            x_t = STATES.to(dtype)
            found = binomial.bound(
                model(x_t, torch.full((4,), t)), x_start, x_t, t, schedule,
                prediction_type=prediction,
            )  # fmt: skip
            here = chains(schedule.betas)[t + 1]
            state = STATES.long().numpy()
            weight = np.prod(here[state[start], state], axis=1)
            total = float((found.double() * torch.from_numpy(weight)).sum())
            exact = exact_term(t, STATES[start].numpy(), prediction, schedule)
            assert total == pytest.approx(exact, abs=tolerance)


@pytest.mark.parametrize("prediction", ["sample", "previous"])
@pytest.mark.parametrize("schedule", [SCHEDULE, ERASING], ids=["some", "erasing"])
def test_the_variational_bound_is_the_enumerated_one_and_a_bound(prediction, schedule):
    draws = 1500
    x_start = STATES.float()
    found = binomial.variational_bound(
        model, x_start.repeat(20, 1), schedule, seed=1, draws=draws // 20,
        prediction_type=prediction,
    )  # fmt: skip
    terms = found.terms.reshape(T, 20, 4)
    p = model_distribution(prediction, schedule)
    end = (1 - schedule.alphas_cumprod[-1]) / 2
    prior = 2 * (1 + end * np.log2(end) + (1 - end) * np.log2(1 - end))
    assert found.prior == pytest.approx(prior, abs=1e-12)
    for start in range(4):
        exact = [exact_term(t, STATES[start].numpy(), prediction, schedule) for t in range(T)]
        error = terms[:, :, start].std(dim=1) / math.sqrt(20)
        difference = terms[:, :, start].mean(dim=1) - torch.tensor(exact)
        assert (difference.abs() <= 4.5 * error + 1e-6).all()
        assert sum(exact) + prior >= -np.log2(p[start])  # eq. 13: K is below the log likelihood


def test_the_last_step_turned_round_costs_the_first_step_s_entropy():
    """p(x_0 | x_1) = q(x_1 | x_0) pi(x_0) / pi(x_1): its term is H_q(x_1 | x_0), eq. 14."""
    x_start = STATES.float()
    paper = binomial.variational_bound(model, x_start, SCHEDULE, seed=1, last_step="forward")
    ours = binomial.variational_bound(model, x_start, SCHEDULE, seed=1)
    b = BETAS[0] / 2
    entropy = -2 * (b * math.log2(b) + (1 - b) * math.log2(1 - b))
    assert paper.terms[0].tolist() == pytest.approx([entropy] * 4, rel=1e-6)
    assert torch.equal(paper.terms[1:], ours.terms[1:])
    assert paper.total.tolist() == pytest.approx((paper.terms.sum(0) + paper.prior).tolist())


def test_the_bound_is_the_entropy_where_the_model_can_be_right():
    """Independent bits: the reverse chain is a product, so E bound = sum of the bits' entropies."""
    rates = torch.tensor([0.2, 0.65], dtype=F64)
    schedule = ERASING
    weights = torch.prod(torch.where(STATES == 1, rates, 1 - rates), dim=1)
    known = torch.from_numpy(schedule.alphas_cumprod.copy())

    def right(x, t):
        """The logit of p(x_0 = 1 | x_t), by Bayes."""
        sign = 2 * x - 1
        a = known[t][:, None].clamp(max=1 - 1e-15)
        return torch.logit(rates) + torch.log((1 + a) / (1 - a)) * sign

    total = 0.0
    for t in range(T):
        here = chains(schedule.betas)[t + 1]
        for start in range(4):
            state = STATES.long().numpy()
            weight = torch.from_numpy(np.prod(here[state[start], state], axis=1)) * weights[start]
            term = binomial.bound(
                right(STATES, torch.full((4,), t)), STATES[start].expand(4, 2), STATES, t, schedule
            )
            total += float((term * weight).sum())
    entropy = -(rates * rates.log2() + (1 - rates) * (1 - rates).log2()).sum()
    assert total == pytest.approx(float(entropy), abs=1e-12)


@pytest.mark.parametrize("prediction", ["sample", "previous"])
def test_gradients(backend, prediction):
    """Against finite differences in float64; other dtypes against float64."""
    g = torch.Generator().manual_seed(3)
    logits = torch.randn(3, 7, generator=g, dtype=F64) * 3
    x_t, x_start = (torch.randint(0, 2, (3, 7), generator=g).to(torch.uint8) for _ in range(2))
    t = torch.tensor([0, 1, 3])
    weight = torch.tensor([1.0, -0.5, 2.0], dtype=F64)

    def value(logits):
        return binomial.bound(logits, x_start, x_t, t, SCHEDULE, prediction_type=prediction)

    if backend in ("triton", "cuda_host"):
        with pytest.raises(RuntimeError):
            value(logits)
    else:
        assert torch.autograd.gradcheck(value, (logits.clone().requires_grad_(),))
    with torch.enable_grad():
        exact = logits.clone().requires_grad_()
        binomial.bound(
            exact, x_start, x_t, t, SCHEDULE, prediction_type=prediction, backend="reference"
        ).mul(weight).sum().backward()
    for dtype, tolerance in ((F32, 3e-6), (torch.bfloat16, 0.05)):
        leaf = logits.to(dtype).requires_grad_()
        found = value(leaf)
        assert found.dtype == F32
        found.mul(weight.float()).sum().backward()
        assert leaf.grad.dtype == dtype
        torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=0, atol=tolerance)
    twice = logits.float().requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(value(twice).sum(), twice, create_graph=True)


def test_a_training_step_compiles_whole(assert_same_bits):
    x = torch.randint(0, 2, (4, 9), generator=torch.Generator().manual_seed(0)).float()
    w = torch.randn(9, 9, generator=torch.Generator().manual_seed(1)).requires_grad_()

    def training_step(w, t, step):
        x_t = binomial.q_sample(x, t, SCHEDULE, seed=2, step=step)
        return binomial.bound(x_t @ w, x, x_t, t, SCHEDULE)

    compiled = torch.compile(training_step, fullgraph=True)
    t = torch.tensor([0, 1, 2, 3])
    for step in (0, 5):
        results = []
        for function in (training_step, compiled):
            w.grad = None
            found = function(w, t, step)
            found.sum().backward()
            results.append([found.detach(), w.grad])
        # The matrix product is torch's, whose order of sums may differ when it is compiled.
        torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


def test_samples_without_elements_cost_nothing():
    empty = torch.zeros(3, 0)
    assert binomial.q_sample(empty, 1, SCHEDULE, seed=0).shape == (3, 0)
    assert binomial.bound(empty, empty, empty, 1, SCHEDULE).tolist() == [0, 0, 0]


X = torch.zeros(2, 3)


def refuse_to_run(x, t):
    raise AssertionError("called")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: BinomialSchedule([0.1, 0.0]), ValueError, "betas must be in"),
        (lambda: BinomialSchedule([0.1, math.nan]), ValueError, "betas"),
        (lambda: BinomialSchedule.erasing(0), ValueError, "steps must be >= 1"),
        (lambda: binomial.q_sample(X, 4, SCHEDULE, seed=0), ValueError, r"t must be in \[0, 4\)"),
        (lambda: binomial.q_sample(X.long(), 0, SCHEDULE, seed=0), TypeError, "x_start must be"),
        (lambda: binomial.q_sample(X, 0, SCHEDULE, seed=None), TypeError, "seed must be given"),
        (lambda: binomial.q_sample(X, 0, "linear", seed=0), TypeError, "schedule must be a Bin"),
        (lambda: binomial.q_sample(X, 0, SCHEDULE, seed=0, step=-1), ValueError, "step must be"),
        (lambda: binomial.q_step(X, torch.tensor([1, 2]), SCHEDULE, seed=0), TypeError, "t must"),
        (lambda: binomial.p_sample(X, X[:1], 0, SCHEDULE, seed=0), ValueError, "x_t must have"),
        (lambda: binomial.p_sample(X.bool(), X, 0, SCHEDULE, seed=0), TypeError, "model_output"),
        (lambda: binomial.p_sample(X, X, 0, SCHEDULE, seed=0, prediction_type="epsilon"),
         ValueError, "prediction_type must be one of sample, previous"),
        (lambda: binomial.bound(X, X[:, :2], X, 0, SCHEDULE), ValueError, "x_start must have"),
        (lambda: binomial.sample(model, SCHEDULE, (0, 2), seed=0), ValueError, "shape must be"),
        (lambda: binomial.sample(model, SCHEDULE, (1, 2), seed=0, dtype=torch.int64), TypeError,
         "dtype must be"),
        (lambda: binomial.variational_bound(model, X, SCHEDULE, seed=0, draws=0), ValueError,
         "draws must be at least 1"),
        (lambda: binomial.variational_bound(None, X, SCHEDULE, seed=0), TypeError,
         "model must be callable"),
        (lambda: binomial.sample(None, SCHEDULE, (1, 2), seed=0), TypeError,
         "model must be callable"),
        (lambda: binomial.variational_bound(refuse_to_run, X, SCHEDULE, seed=0,
                                            prediction_type="epsilon"),
         ValueError, "prediction_type must be one of sample, previous"),
        (lambda: binomial.variational_bound(model, X, SCHEDULE, seed=0, last_step="x"),
         ValueError, "last_step must be"),
    ],
)  # fmt: skip
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()
