"""The whole sampling loop as one CUDA graph, replayed with new values.

    loop = Sampler(plan).capture(model, (16, 4, 64, 64), device="cuda", guidance_scale=7.5)
    x = loop(seed=0)                        # the bits of fastdiff.sample with the same arguments
    y = loop(seed=1, guidance_scale=3.0)    # one launch of a graph that is already there

A CUDA graph repeats launches with the arguments that they were recorded with, so everything that
may change between replays lies in memory of the loop, which the recorded steps read: coefficients,
row indices, (step, stream) of the draws, the model's t, seeds, guidance scale, the given x_T. What
a launch itself is made of (which states a row reads and writes, dtypes, shapes) is recorded, and a
plan that needs it otherwise is refused. On a device without graphs the same body runs eagerly on
the same memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.noise import STREAM_INITIAL, STREAM_STEP_SECOND
from fastdiff.ops.call import written
from fastdiff.ops.checks import check_floating, check_like, check_shape, resolve_seed
from fastdiff.ops.step import StepSpec, step_arguments
from fastdiff.plan import SolverPlan
from fastdiff.program import (
    START_CHURN,
    START_GIVEN,
    START_NOISE,
    Mode,
    has_whole_t,
    scales_input,
    start_spec,
)
from fastdiff.run import Run, drawn_dtype, guidance_tensor

__all__ = ["CapturedLoop"]

Model = Callable[[Tensor, Tensor], Tensor]
_WARM_UPS = 2  # libraries, compilers and the allocator have settled when the second is over


class _StaticRun(Run):
    """A run that begins again and again in the same memory, with what its owner put there."""

    def __init__(self, plan: SolverPlan, x: Tensor, *, fast: bool, **options: Any) -> None:
        super().__init__(plan, x, seed=0, in_place=True, fast=fast, **options)
        assert self._keys is not None
        self.tables = self._tables = self._tables.copy()
        self.keys, self.guidance = self._keys, self._guidance
        self.mode, self.dtype = self._mode, self._dtype
        self.x_T: Tensor = self._states[0]
        self.start_row = torch.zeros(1, dtype=torch.int64, device=x.device)
        self._start_spec = start_spec(self._dtype, fast)
        self._churn_spec = start_spec(self._noise_dtype, fast)
        self._begins_with = list(self._states), self._input

    @property
    def makes_input(self) -> bool:
        """Whether the model takes another tensor than the sample."""
        return self._input is not None

    def restart(self) -> None:
        """Everything up to the first call: x_T or initial noise, first churn, model input, t."""
        states, model_input = self._begins_with
        self.index, self._states, self._input = 0, list(states), model_input
        self._times.copy_(self.tables.t[:, None].expand_as(self._times))
        churned = bool(self.plan.first_churn)
        self._start(
            self._start_spec, self.tables.start, self.start_row, STREAM_INITIAL,
            None if churned else model_input,
        )  # fmt: skip
        if churned:
            self._start(
                self._churn_spec, self.tables.start[START_CHURN:], self.tables.rows[0],
                STREAM_STEP_SECOND, model_input,
            )  # fmt: skip

    def _start(
        self, spec: StepSpec, table: Tensor, row: Tensor, stream: int, model_input: Tensor | None
    ) -> None:
        x = self.x_T
        self._operation(*step_arguments(
            spec, [x], table, row, [x], keys=self.keys, counter=(0, 0, 0, stream),
            model_input=model_input,
        ))  # fmt: skip
        written([x] if model_input is None else [x, model_input])


class CapturedLoop:
    """A sampling loop recorded once and replayed with new values; see Sampler.capture.

    One memory serves all calls, so they must follow each other on one stream; for loops at the
    same time capture several.

    Attributes:
        plan: the plan of the capture, which calls use unless they say otherwise.
        shape: (B, ...) of the samples.
        steps: model calls of a replay.
        x: the loop's own result, (B, ...): that of the last call, overwritten by the next.
    """

    def __init__(
        self,
        plan: SolverPlan,
        model: Model,
        shape: Sequence[int],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        guidance_scale: float | Tensor | None = None,
        model_dtype: torch.dtype | None = None,
        noise_dtype: torch.dtype | None = None,
        outputs_are_fresh: bool = False,
        fast: bool = False,
        graph: bool | None = None,
        backend: str | None = None,
    ) -> None:
        if not callable(model):
            raise TypeError(f"model must be callable, not {type(model).__name__}")
        check_floating("dtype", dtype)
        if plan.inputs:
            names = ", ".join(plan.inputs)
            raise ValueError(f"plan takes inputs at every call ({names}), which no loop can give")
        where = torch.device(device)
        if graph and where.type != "cuda":
            raise ValueError(f"graph must not be True on {where}: only CUDA devices have graphs")
        self.plan, self.shape = plan, check_shape(shape)
        self._model, self._noise_dtype = model, noise_dtype
        # Memory that calls inside and outside of inference mode may write to.
        with torch.inference_mode(False), torch.no_grad():
            run = self._run = _StaticRun(
                plan, torch.zeros(self.shape, dtype=dtype, device=where),
                guidance_scale=guidance_scale, model_dtype=model_dtype, noise_dtype=noise_dtype,
                outputs_are_fresh=outputs_are_fresh, fast=fast, backend=backend,
            )  # fmt: skip
            self._guidance = None if run.guidance is None else run.guidance.clone()
            self._entries = torch.arange(self.shape[0], device=run.x.device)
        self._loaded = plan
        self._graph: Any = None
        self.x: Tensor = run.x
        if graph or (graph is None and where.type == "cuda"):
            self._graph = _record(self._body, run.x.device)

    @property
    def steps(self) -> int:
        return self.plan.rows

    def __call__(
        self,
        *,
        seed: int | Tensor | None = None,
        sample_offset: int = 0,
        x_T: Tensor | None = None,
        guidance_scale: float | Tensor | None = None,
        plan: SolverPlan | None = None,
        clone: bool = True,
    ) -> Tensor:
        """Samples; bit for bit what fastdiff.sample gives for the same arguments.

        Args:
            seed, sample_offset: the noise contract (fastdiff/noise.py). A seed is needed for the
                initial noise, which x_T replaces, and by plans that draw.
            x_T: starting sample of the loop's shape, dtype and device, used as it is.
            guidance_scale: instead of the capture's, if that has one: a number, or (B,) when the
                capture's was (B,).
            plan: instead of the capture's: one of the same structure, as the same solver usually
                makes for another schedule, other timesteps or another eta > 0. Its first use
                copies its tables to the device, later ones copy them there.
            clone: return a copy of x, or x itself, which the next call overwrites.

        Raises:
            ValueError, TypeError: an argument that does not go with the capture; nothing ran.
        """
        run = self._run
        plan = self.plan if plan is None else plan
        if plan is not self._loaded:
            self._check_plan(plan)
        if seed is None and (x_T is None or plan.draws_noise.any() or plan.first_churn):
            raise ValueError("seed must be given (for the initial noise, or since the plan draws)")
        batch, device = self.shape[0], run.x_T.device
        keys, low, offset = resolve_seed(0 if seed is None else seed, sample_offset, batch, device)
        scale = self._scale(guidance_scale)
        if x_T is not None:
            check_like("x_T", x_T, "the captured loop's x", run.x_T)
            if x_T.dtype != run.dtype:
                raise TypeError(f"x_T must be {run.dtype} as the captured loop is, not {x_T.dtype}")
        with torch.no_grad():
            if plan is not self._loaded:
                run.tables.take(plan.on(device, run.tables.values.dtype, run.mode))
                self._loaded = plan
            if keys is not None:
                run.keys.copy_(keys)
            else:
                run.keys[:, 0].fill_(low)
                torch.add(self._entries, offset, out=run.keys[:, 1])
            if run.guidance is not None and scale is not None:
                run.guidance.copy_(scale)
            run.start_row.fill_(START_NOISE if x_T is None else START_GIVEN)
            if x_T is not None:
                run.x_T.copy_(x_T)
            if self._graph is None:
                self._body()
            else:
                self._graph.replay()
            return self.x.clone() if clone else self.x

    def _body(self) -> None:
        """What is captured: the loop from the first noise to the result."""
        run = self._run
        run.restart()
        while not run.done:
            run.step(self._model(run.model_input, run.t))
        self.x = run.x

    def _check_plan(self, plan: SolverPlan) -> None:
        if not isinstance(plan, SolverPlan):
            raise TypeError(f"plan must be a SolverPlan, not {type(plan).__name__}")
        run = self._run
        why = _mismatch(self.plan, plan, run.mode)
        if why is None and not run.makes_input and scales_input(plan):
            why = "it scales the model's input"
        if why is None:
            given, wanted = (
                drawn_dtype(p, self._noise_dtype, run.dtype) for p in (plan, self.plan)
            )
            if given != wanted:
                why = f"its noise is {given}, not {wanted}"
        if why is not None:
            raise ValueError(
                f"plan {plan.name!r} is not of the structure that was captured: {why}; "
                "capture a loop of its own"
            )

    def _scale(self, guidance_scale: float | Tensor | None) -> Tensor | None:
        if guidance_scale is None:
            return self._guidance
        if self._guidance is None:
            raise ValueError(
                "guidance_scale must be None: the loop was captured without guidance, for a model "
                "that sees every sample once"
            )
        batch, device = self.shape[0], self._guidance.device
        scale = guidance_tensor(guidance_scale, batch, device)
        assert scale is not None
        if scale.numel() > self._guidance.numel():
            raise ValueError(
                "guidance_scale must be one number: the loop was captured with one; capture with a "
                f"tensor of shape ({batch},) for a scale per sample"
            )
        return scale


def _mismatch(plan: SolverPlan, other: SolverPlan, mode: Mode) -> str | None:
    """Why calls that were recorded for `plan` cannot run `other`, in words; None when they can.

    Everything that lives in a DeviceProgram may differ. A coefficient may be zero where the
    recorded one is not, since zeros are found in the table; not the reverse.
    """
    sizes = {
        "model calls": (plan.rows, other.rows),
        "states": (plan.states, other.states),
        "draws a call": (plan.n_draws, other.n_draws),
    }
    for what, (recorded, wanted) in sizes.items():
        if recorded != wanted:
            return f"it has {wanted} {what}, not {recorded}"
    if plan.inputs != other.inputs:
        return "it takes other inputs"
    if plan.learned != other.learned:
        return "only one of the two learns its variance"
    if plan.thresholding != other.thresholding:
        return f"its thresholding is {other.thresholding}, not {plan.thresholding}"
    if has_whole_t(plan) != has_whole_t(other):
        return "only one of the two has whole timesteps, so the dtype of t differs"
    if other.first_churn and not plan.first_churn:
        return "it churns the first sample"
    ours, theirs = plan.program(mode), other.program(mode)
    for i, (a, b) in enumerate(zip(ours.calls, theirs.calls, strict=True)):
        if a != b:
            return f"call {i} reads, writes or keeps other states"
    for i, call in enumerate(ours.calls):
        mine, its = ours.variants[call.variant], theirs.variants[call.variant]
        pairs = zip([*mine.outputs, mine.clamp or 0], [*its.outputs, its.clamp or 0], strict=True)
        if any(used & ~known for known, used in pairs):
            return f"call {i} uses a coefficient that was zero (noise, for example)"
    if (plan.snr is None) != (other.snr is None):
        return "only one of the two has Langevin corrector steps"
    if plan.snr is not None and other.snr is not None:
        draws = slice(plan.states + 2, None)
        same = (
            np.array_equal(plan.snr > 0, other.snr > 0)
            and np.array_equal(plan.draws, other.draws)
            and np.array_equal(plan.draws_noise, other.draws_noise)
            and np.array_equal(plan.A[:, 0, draws] != 0, other.A[:, 0, draws] != 0)
        )
        if not same:
            return "its Langevin corrector steps are other calls, or draw otherwise"
    return None


def _record(body: Callable[[], None], device: torch.device) -> Any:
    """`body` as a CUDA graph, after it has run to warm up on a stream beside the current one."""
    with torch.no_grad(), torch.cuda.device(device):
        side, current = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                body()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            # On this device's stream, where the libraries have settled: PyTorch's own for captures
            # is of the device that captured first. A capture that fails stays on its stream, hence
            # the outer block, which returns.
            with torch.cuda.stream(current), torch.cuda.graph(graph, stream=side):
                body()
        except RuntimeError as error:
            raise RuntimeError(
                "the loop cannot be captured in a CUDA graph: the model must not wait for the "
                "device, copy from the host or replay graphs of its own (as torch.compile does in "
                "mode='reduce-overhead'); graph=False runs the loop without one"
            ) from error
    return graph
