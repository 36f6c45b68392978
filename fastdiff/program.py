"""How the rows of a plan become calls of the fused step: what each reads, writes and keeps.

Rows of a plan differ in what they touch: a warm-up step has no history yet, Heun's second half
forgets the sample that the first half saved. Every row is run with the states that it reads and
writes only; a state that stays, or takes over the memory of another, costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdiff.ops.call import pack_table
from fastdiff.ops.checks import index_views
from fastdiff.ops.step import StepSpec

if TYPE_CHECKING:
    from fastdiff.plan import SolverPlan

__all__ = [
    "START_CHURN", "START_GIVEN", "START_NOISE", "DeviceProgram", "Mode", "Program", "RowCall",
    "Variant", "check_not_capturing", "has_whole_t", "scales_input", "start_spec", "uniform",
]  # fmt: skip

FloatArray = NDArray[np.float64]
NEW = -1  # RowCall.memory: a buffer that no state holds
# Rows of DeviceProgram.start: the sample is noise, is as given, takes the noise of the first churn.
START_NOISE, START_GIVEN, START_CHURN = range(3)


@dataclass(frozen=True)
class Mode:
    """What decides the calls besides the plan.

    Attributes:
        preview: x_0 is one more output.
        in_place: the new sample may take memory of the old; else it has memory that nothing will
            ever write to again.
        own_sample: the sample before the step is the run's: to save it is to keep it, not to copy
            it.
        fresh_outputs: the model never writes to an output again: likewise.
    """

    preview: bool = False
    in_place: bool = False
    own_sample: bool = True
    fresh_outputs: bool = False


@dataclass(frozen=True)
class Variant:
    """One structure of the step, shared by the rows that touch the same states.

    Attributes:
        reads: the states handed to the operation, S0 first.
        writes: the state of every output row, S0 first.
        preview: x_0 is the last output.
        outputs, clamp: masks over the plan's own columns [S.., o, c, z..] and [S.., o, z..].
    """

    reads: tuple[int, ...]
    writes: tuple[int, ...]
    preview: bool
    outputs: tuple[int, ...]
    clamp: int | None

    def spec(self, plan: SolverPlan, noise_dtype: torch.dtype, fast: bool = False) -> StepSpec:
        """The structure as the operation takes it, columns renumbered to the states read."""
        kept = _columns(plan, self.reads, 2)
        clamp_kept = _columns(plan, self.reads, 1)
        return StepSpec(
            states=len(self.reads), outputs=tuple(_pick(mask, kept) for mask in self.outputs),
            clamp=None if self.clamp is None else _pick(self.clamp, clamp_kept),
            draws=plan.n_draws, noise_dtype=noise_dtype, learned=plan.learned, fast=fast,
        )  # fmt: skip

    def table(self, plan: SolverPlan) -> FloatArray:
        """The float64 coefficients of all rows of the plan in this structure."""
        kept = _columns(plan, self.reads, 2)
        outputs = [plan.A[:, k][:, kept] for k in self.writes]
        if self.preview:
            outputs.append(plan.x_start[:, kept])
        clamp = None if plan.P is None else plan.P[:, _columns(plan, self.reads, 1)]
        return pack_table(plan.rows, outputs, clamp, _header(plan, "lo", "hi", "c_in", *_VARIANCE))

    def clamped_spec(self, plan: SolverPlan, noise_dtype: torch.dtype) -> StepSpec:
        """The structure of a pass that makes the clamp node's own value, before clamping."""
        assert self.clamp is not None
        mask = _pick(self.clamp, _columns(plan, self.reads, 1))
        below = (1 << len(self.reads) + 1) - 1
        return StepSpec(
            states=len(self.reads), outputs=(mask & below | (mask & ~below) << 1,),
            draws=plan.n_draws, noise_dtype=noise_dtype, learned=plan.learned,
        )  # fmt: skip

    def clamped_table(self, plan: SolverPlan) -> FloatArray:
        assert plan.P is not None
        rows = plan.P[:, _columns(plan, self.reads, 1)]
        rows = np.insert(rows, len(self.reads) + 1, 0.0, axis=1)
        return pack_table(plan.rows, [rows], header=_header(plan, *_VARIANCE))


@dataclass(frozen=True)
class RowCall:
    """One row as a call.

    Attributes:
        variant: index into Program.variants.
        reads, writes: as in its Variant.
        memory: for every write, the state before the call whose buffer the result may take
            (no one needs it any more), or NEW.
        moves: (k, j): state k takes over the memory of state j, untouched; in place also where k is
            forgotten and j was: memory for a later row.
        keeps_output: states that become the model output's own memory.
        clamped: whether the row uses the clamp node.
        reads_all: whether `reads` are all the states.
    """

    variant: int
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    memory: tuple[int, ...]
    moves: tuple[tuple[int, int], ...]
    keeps_output: tuple[int, ...]
    clamped: bool
    reads_all: bool


class Program:
    """The calls of all rows of a plan in one mode.

    Attributes:
        calls: one per row.
        variants: the structures that the calls share.
        spare: states that have memory from the start, though nothing is in it: a run in place
            that keeps no outputs allocates nothing in its steps.
    """

    def __init__(self, plan: SolverPlan, mode: Mode) -> None:
        self.plan = plan
        self.mode = mode
        structures: dict[tuple[tuple[int, ...], tuple[int, ...], bool], int] = {}
        masks: list[list[int]] = []
        calls = []
        # States whose memory a result may not take: the caller's or the model's.
        foreign = set(range(plan.states - len(plan.inputs), plan.states))
        keeps_sample = not mode.in_place or not mode.own_sample
        if keeps_sample:
            foreign.add(0)
        spares = mode.in_place and mode.own_sample and not mode.fresh_outputs
        self.spare = tuple(range(1, plan.states - len(plan.inputs))) if spares else ()
        held = {0, *self.spare} | foreign  # states that have memory
        for i in range(plan.rows):
            moves, kept, writes = self._sort_states(i)
            used = [_mask(plan.A[i, k]) for k in writes]
            if mode.preview:
                used.append(_mask(plan.x_start[i]))
            clamped = plan.P is not None and any(mask >> plan.states + 1 & 1 for mask in used)
            touched = _any(used)
            if clamped:
                assert plan.P is not None
                used.append(_mask(plan.P[i]))
                touched |= used[-1]
            reads = tuple(k for k in range(plan.states) if k == 0 or touched >> k & 1)
            index = structures.setdefault((reads, writes, clamped), len(structures))
            if index == len(masks):
                masks.append([0] * len(used))
            masks[index] = [a | b for a, b in zip(masks[index], used, strict=True)]
            free = held - foreign - {j for _, j in moves}
            memory = []
            for k in writes:
                choice = k if k in free else max(free, default=NEW)
                free.discard(choice)
                memory.append(choice)
            if mode.in_place:
                idle = set(range(plan.states)) - {k for k, _ in moves} - {*writes, *kept}
                moves += tuple(zip(sorted(idle), sorted(free), strict=False))
            held = {k for k, j in moves if j in held} | {*writes, *kept}
            reads_all = len(reads) == plan.states
            calls.append(
                RowCall(index, reads, writes, tuple(memory), moves, kept, clamped, reads_all)
            )
            foreign = {k for k, j in moves if j in foreign} | set(kept)
            if keeps_sample:
                foreign.add(0)
        self.calls = tuple(calls)
        self.variants = tuple(
            Variant(
                reads, writes, mode.preview, tuple(used[:-1] if clamped else used),
                used[-1] if clamped else None,
            )
            for (reads, writes, clamped), used in zip(structures, masks, strict=True)
        )  # fmt: skip

    def _sort_states(
        self, i: int
    ) -> tuple[tuple[tuple[int, int], ...], tuple[int, ...], tuple[int, ...]]:
        """The states of row i that take over memory, that keep the output, that are written.

        What is in none of them is forgotten.
        """
        plan, mode = self.plan, self.mode
        moves: list[tuple[int, int]] = []
        kept: list[int] = []
        writes = [0]
        # A state's memory may be taken over, once; that of the caller's inputs may not.
        inputs = range(plan.states - len(plan.inputs), plan.states)
        taken = set(inputs)
        for k in range(1, plan.states):
            columns = np.flatnonzero(plan.A[i, k])
            alone = len(columns) == 1 and plan.A[i, k, columns[0]] == 1
            source = int(columns[0]) if alone else NEW
            if k in inputs:
                moves.append((k, k))
            elif 0 <= source < plan.states and source not in taken and (source or mode.own_sample):
                moves.append((k, source))
                taken.add(source)
            elif source == plan.states and mode.fresh_outputs and not plan.learned:
                kept.append(k)
            elif len(columns):
                writes.append(k)
        return tuple(moves), tuple(kept), tuple(writes)

    def traffic(self, i: int) -> tuple[list[str], list[str]]:
        """Names of the full-size tensors (x, s1.., o, v) that row i reads and writes."""
        plan, call = self.plan, self.calls[i]
        rows = [plan.A[i, k] for k in call.writes]
        if self.mode.preview:
            rows.append(plan.x_start[i])
        used = np.any([row != 0 for row in rows], axis=0)
        if call.clamped:
            assert plan.P is not None
            used[: plan.states + 1] |= plan.P[i, : plan.states + 1] != 0
        names = [*plan.state_names, "o"]
        reads = [name for name, flag in zip(names, used[: plan.states + 1], strict=True) if flag]
        if plan.learned and bool(plan.draws_noise[i].any()):
            reads.append("v")
        return reads, [names[k] for k in call.writes] + ["x_0"] * self.mode.preview


@dataclass(frozen=True)
class DeviceProgram:
    """A program's tensors on one device.

    Attributes:
        values: 1-D, float32 or float64; what the tables are views of. One upload.
        tables: per variant, (R, width).
        clamped_tables: per variant, the table of Variant.clamped_spec, for thresholding plans.
        start: (3, width), what happens before the first call, in the structure of start_spec().
        snr: (R,) of plans with Langevin correctors.
        rows: R views of one int64 tensor, the row index of every call as (1,).
        draws: int64 (R, D, 2).
        t: (R,) int64 when every t is whole, else the tables' dtype.
    """

    values: Tensor
    tables: tuple[Tensor, ...]
    clamped_tables: tuple[Tensor | None, ...]
    start: Tensor
    snr: Tensor | None
    rows: tuple[Tensor, ...]
    draws: Tensor
    t: Tensor

    @classmethod
    def upload(cls, program: Program, device: torch.device, dtype: torch.dtype) -> DeviceProgram:
        plan = program.plan
        check_not_capturing("the plan's tables are not there yet: run the loop once before", device)
        arrays = [_start_table(plan), *(variant.table(plan) for variant in program.variants)]
        thresholding = [
            index for index, variant in enumerate(program.variants)
            if plan.thresholding is not None and variant.clamp is not None
        ]  # fmt: skip
        arrays += [program.variants[index].clamped_table(plan) for index in thresholding]
        if plan.snr is not None:
            arrays.append(plan.snr)
        values, (start, *tables) = _together(arrays, device, dtype)
        extra = iter(tables[len(program.variants) :])
        return cls(
            values=values,
            tables=tuple(tables[: len(program.variants)]),
            clamped_tables=tuple(
                next(extra) if index in thresholding else None
                for index in range(len(program.variants))
            ),
            start=start,
            snr=None if plan.snr is None else tables[-1],
            rows=index_views(plan.rows, device).split([1, 1] * plan.rows)[::2],
            draws=torch.from_numpy(np.array(plan.draws)).to(device),
            t=torch.from_numpy(np.array(plan.t)).to(
                device=device, dtype=torch.int64 if has_whole_t(plan) else dtype
            ),
        )

    def copy(self) -> DeviceProgram:
        """The same values in memory of their own, for take()."""
        values = self.values.clone()

        def moved(view: Tensor) -> Tensor:
            return values.as_strided(view.shape, view.stride(), view.storage_offset())

        return replace(
            self, values=values, tables=tuple(map(moved, self.tables)), start=moved(self.start),
            clamped_tables=tuple(t if t is None else moved(t) for t in self.clamped_tables),
            snr=None if self.snr is None else moved(self.snr),
            draws=self.draws.clone(), t=self.t.clone(),
        )  # fmt: skip

    def take(self, other: DeviceProgram) -> None:
        """Overwrites the values with those of a plan for which mismatch() is None."""
        self.values.copy_(other.values)
        self.draws.copy_(other.draws)
        self.t.copy_(other.t)


def check_not_capturing(why: str, device: torch.device) -> None:
    """Refuses a copy from the host while a CUDA graph is captured: it would break the capture."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"nothing can be copied to {device} while a CUDA graph is captured; {why}"
        )


def has_whole_t(plan: SolverPlan) -> bool:
    """Whether the model's t are integers."""
    return bool((plan.t == np.floor(plan.t)).all())


def scales_input(plan: SolverPlan) -> bool:
    """Whether the model sees another multiple of the sample than 1."""
    return plan.first_c_in != 1.0 or bool(plan.c_in is not None and (plan.c_in != 1.0).any())


def start_spec(noise_dtype: torch.dtype, fast: bool) -> StepSpec:
    """The structure of DeviceProgram.start: of the sample S0 and one draw."""
    return StepSpec(1, (0b1001,), draws=1, noise_dtype=noise_dtype, fast=fast)


def _start_table(plan: SolverPlan) -> FloatArray:
    rows = np.zeros((3, 4))  # columns S0, o, c, z
    rows[START_NOISE, 3] = plan.initial_scale
    rows[START_GIVEN, 0] = 1.0
    rows[START_CHURN, [0, 3]] = 1.0, plan.first_churn
    return pack_table(3, [rows], header={"c_in": plan.first_c_in})


def uniform(plan: SolverPlan, preview: bool) -> Variant:
    """One structure that serves all rows at once: for a batch whose samples stand at different
    rows."""
    outputs = [plan.A[:, k] for k in range(plan.states)]
    if preview:
        outputs.append(plan.x_start)
    states = tuple(range(plan.states))
    clamp = None if plan.P is None else _any([_mask(row) for row in plan.P])
    masks = tuple(_any([_mask(row) for row in rows]) for rows in outputs)
    return Variant(states, states, preview, masks, clamp)


def _together(
    arrays: list[FloatArray], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor]]:
    """One uploaded buffer, and arrays as views of it, each on a 16-byte boundary."""
    sizes = [-(-array.size // 4) * 4 for array in arrays]
    flat = np.zeros(sum(sizes))
    views, begin = [], 0
    for array, size in zip(arrays, sizes, strict=True):
        flat[begin : begin + array.size] = array.ravel()
        begin += size
    uploaded = torch.from_numpy(flat).to(device=device, dtype=dtype)
    for array, part in zip(arrays, uploaded.split(sizes), strict=True):
        views.append(part[: array.size].view(array.shape))
    return uploaded, views


_VARIANCE = ("half_log_variance_min", "half_log_variance_max")


def _header(plan: SolverPlan, *names: str) -> dict[str, Any]:
    return {name: getattr(plan, name) for name in names if getattr(plan, name) is not None}


def _columns(plan: SolverPlan, reads: tuple[int, ...], fixed: int) -> list[int]:
    """The plan's columns that remain: the states read, `fixed` columns after them, the draws."""
    return [*reads, *range(plan.states, plan.states + fixed + plan.n_draws)]


def _pick(mask: int, columns: list[int]) -> int:
    return sum(1 << new for new, old in enumerate(columns) if mask >> old & 1)


def _mask(row: FloatArray) -> int:
    """Bit k is set when column k is used."""
    return sum(1 << int(k) for k in np.flatnonzero(row))


def _any(masks: list[int]) -> int:
    union = 0
    for mask in masks:
        union |= mask
    return union
