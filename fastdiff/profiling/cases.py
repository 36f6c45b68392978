"""The launches that reports, gates and measurements are about: what users' calls become.

    case = Case("ddpm", torch.bfloat16, fast=True)
    arguments = case.arguments((16, 4, 64, 64), "cuda")
    torch.ops.fastdiff_triton.step(*arguments)

A solver's case is the middle row of its plan, as a run that owns its sample steps it: in place,
seeds on the device. On the device "meta" the arguments have no memory, which is enough to compile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff import solvers
from fastdiff.noise import STREAM_Q_SAMPLE
from fastdiff.ops import bits, loss, step
from fastdiff.ops.step import StepSpec, step_arguments
from fastdiff.ops.tables import host_table
from fastdiff.plan import SolverPlan
from fastdiff.profiling import bits_cases, loss_cases
from fastdiff.program import Mode
from fastdiff.schedules import NoiseSchedule, linear

__all__ = ["NAMES", "Case", "cases"]

CHAIN_STEPS = 8


@dataclass(frozen=True)
class _Kind:
    """What is run, in a word for the reader, and how it is made.

    Attributes:
        about: the update, in the field's words.
        plan: the plan of a solver's case, from the schedule.
        guided: two model outputs.
        draws: whether there are normals, and so an exact and a fast kernel.
        op: the operation of fastdiff/ops/schemas.py.
    """

    about: str
    plan: Callable[[NoiseSchedule], SolverPlan] | None = None
    guided: bool = False
    draws: bool = False
    op: str = "step"


_GRADIENT = "its derivative by the model output"
_KINDS = {
    "randn": _Kind("seeded normals, stored", draws=True, op="randn"),
    "q_sample": _Kind("x_t = a x_0 + s z, its own t for every sample", draws=True),
    "q_posterior": _Kind("mean of q(x_{t-1} | x_t, x_0), its own t for every sample"),
    "chain": _Kind(f"q(x_1..x_{CHAIN_STEPS} | x_0), every step stored", draws=True, op="chain"),
    "ddpm": _Kind("DDPM step", lambda s: solvers.ddpm(s, 50, clip=None), draws=True),
    "ddpm_clipped": _Kind(
        "DDPM step, x_0 clipped to [-1, 1]", lambda s: solvers.ddpm(s, 50), draws=True
    ),
    "ddpm_learned": _Kind(
        "the same with learned variance",
        lambda s: solvers.ddpm(s, 50, variance="learned_range"),
        draws=True,
    ),
    "ddim": _Kind("DDIM or Euler step", lambda s: solvers.ddim(s, 50, clip=None)),
    "ddim_guided": _Kind(
        "the same with classifier-free guidance",
        lambda s: solvers.ddim(s, 50, clip=None),
        guided=True,
    ),
    "ddim_clipped": _Kind("DDIM step, x_0 clipped to [-1, 1]", lambda s: solvers.ddim(s, 50)),
    "dpmpp_2m": _Kind(
        "DPM-Solver++(2M) step with guidance", lambda s: solvers.dpm_solver(s, 20), guided=True
    ),
    "unipc": _Kind("UniPC-2 step with guidance", lambda s: solvers.unipc(s, 20), guided=True),
    "mse": _Kind(loss_cases.ABOUT["mse"], draws=True, op="loss"),
    "mse_grad": _Kind(_GRADIENT, draws=True, op="loss_grad"),
    "hybrid": _Kind(loss_cases.ABOUT["hybrid"], draws=True, op="loss"),
    "hybrid_grad": _Kind(_GRADIENT, draws=True, op="loss_grad"),
    "log_prob": _Kind(loss_cases.ABOUT["log_prob"], op="loss"),
    "log_prob_grad": _Kind(_GRADIENT, op="loss_grad"),
    "bits_q_sample": _Kind(bits_cases.ABOUT["bits_q_sample"], op="bits"),
    "bits_reverse": _Kind(bits_cases.ABOUT["bits_reverse"], op="bits"),
    "bits_bound": _Kind(bits_cases.ABOUT["bits_bound"], op="bits_bound"),
    "bits_bound_grad": _Kind(_GRADIENT, op="bits_bound_grad"),
}
NAMES = tuple(_KINDS)
_MODE = Mode(in_place=True)
_SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Case:
    """One launch of a fused operation.

    Attributes:
        name: one of NAMES.
        dtype: of the samples and of the noise.
        model_dtype: of model outputs and of the next model input, which is written only where it
            differs from dtype: float32 samples around a bfloat16 model.
        fast: approximate functions in the noise.
    """

    name: str
    dtype: torch.dtype = torch.float32
    model_dtype: torch.dtype | None = None
    fast: bool = False

    def __post_init__(self) -> None:
        if self.name not in _KINDS:
            raise ValueError(f"name must be one of {', '.join(NAMES)}, not {self.name!r}")
        for label, dtype in (("dtype", self.dtype), ("model_dtype", self.model_dtype)):
            if dtype is not None and dtype not in _SHORT:
                raise ValueError(f"{label} must be float32, bfloat16 or float16, not {dtype}")
        if self.fast and not self.draws:
            raise ValueError(f"fast is for cases with noise, which {self.name} has not")

    @property
    def id(self) -> str:
        """As in "ddpm fp32+bf16 fast": samples in float32, the model in bfloat16."""
        dtypes = _SHORT[self.dtype]
        if self.mixed:
            assert self.model_dtype is not None
            dtypes += "+" + _SHORT[self.model_dtype]
        return f"{self.name} {dtypes}" + (" fast" if self.fast else "")

    @property
    def about(self) -> str:
        return _KINDS[self.name].about

    @property
    def op(self) -> str:
        """The operation of fastdiff/ops/schemas.py."""
        return _KINDS[self.name].op

    @property
    def draws(self) -> bool:
        """Whether normals are made in the pass."""
        return _KINDS[self.name].draws

    @property
    def mixed(self) -> bool:
        return self.model_dtype is not None and self.model_dtype != self.dtype

    def arguments(
        self, shape: tuple[int, ...], device: torch.device | str = "meta", seed: int = 0
    ) -> tuple[Any, ...]:
        """The operation's arguments for samples of `shape`, (B, C, ...).

        On a device with memory the tensors hold normals of torch's generator of that seed.
        """
        device = torch.device(device)
        generator = None
        if device.type != "meta":
            generator = torch.Generator(device).manual_seed(seed)

        def tensor(*size: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.randn(*size, dtype=dtype, device=device, generator=generator)

        def upload(array: np.ndarray, dtype: torch.dtype) -> Tensor:
            return torch.from_numpy(np.array(array)).to(device=device, dtype=dtype)

        batch = shape[0]
        by_value = [seed, 0, 7, STREAM_Q_SAMPLE]  # seed, sample offset, step, stream
        rows = torch.arange(batch, device=device) % 1000
        if self.name == "randn":
            return (tensor(*shape), None, *by_value, 0, self.fast)
        if self.name == "chain":
            table = upload(np.array([[0.99, 0.1]] * CHAIN_STEPS), torch.float32)
            slots = torch.arange(CHAIN_STEPS, device=device)
            chain = tensor(CHAIN_STEPS, *shape)
            return (tensor(*shape), None, table, slots, None, seed, 0, self.fast, chain)
        if self.op in ("loss", "loss_grad"):
            return loss_cases.arguments(self, shape, _schedule(), rows, seed, tensor, upload)
        if self.op in ("bits", "bits_bound", "bits_bound_grad"):
            return bits_cases.arguments(self, shape, rows, seed, tensor)
        if self.name in _FORWARD:
            states, outputs, draws, kind = _FORWARD[self.name]
            spec = StepSpec(states, outputs, None, draws, self.dtype, fast=self.fast)
            return step_arguments(
                spec, [tensor(*shape) for _ in range(states)],
                upload(host_table(_schedule(), kind), torch.float32), rows, [tensor(*shape)],
                counter=by_value,
            )  # fmt: skip

        plan = _plan(self.name)
        row = plan.rows // 2
        program = plan.program(_MODE)
        call = program.calls[row]
        variant = program.variants[call.variant]
        spec = variant.spec(plan, self.dtype, self.fast)
        model_dtype = self.model_dtype or self.dtype
        guided = _KINDS[self.name].guided
        channels = shape[1] * (2 if plan.learned else 1)
        state_of = {k: tensor(*shape) for k in call.reads}
        out = [state_of[k] if k in state_of else tensor(*shape) for k in call.memory]
        copies = 2 if guided else 1
        model_outputs = [
            tensor(batch, channels, *shape[2:], dtype=model_dtype) for _ in range(copies)
        ]
        keys = torch.stack([torch.full((batch,), seed), torch.arange(batch)], 1).to(device)
        return step_arguments(
            spec, [state_of[k] for k in call.reads], upload(variant.table(plan), torch.float32),
            torch.full((1,), row, device=device), out, model_outputs=model_outputs,
            keys=keys if spec.draws else None,
            draws=upload(plan.draws, torch.int64) if spec.draws else None,
            guidance_scale=torch.full((1,), 7.5, device=device) if guided else None,
            model_input=tensor(copies * batch, *shape[1:], dtype=model_dtype)
            if self.mixed else None,
        )  # fmt: skip

    def reads(self, arguments: Sequence[Any]) -> list[Tensor]:
        """The full-size tensors among a launch's arguments that it reads."""
        if self.name == "randn":
            return []
        if self.name == "chain":
            return [arguments[0]]
        inputs, outputs, layout, *_ = arguments
        if self.op == "step":
            operands = step.unpack(inputs, outputs, step.parse(layout))
            return [*operands.states, *operands.model_outputs]
        optional: list[Tensor | None]
        if self.op == "bits":
            drawn = bits.unpack(inputs, layout)
            optional = [drawn.logits, drawn.x]
        elif self.op in ("loss", "loss_grad"):
            given = loss.unpack(inputs, loss.parse(layout))
            optional = [*given.model_outputs, given.x, given.y]
        else:
            optional = inputs[:3]  # logits, x_t, x_0
        return [tensor for tensor in optional if tensor is not None]

    def tensors(self) -> tuple[list[torch.dtype], list[torch.dtype]]:
        """The dtypes of the full-size tensors that are read, and of those that are written."""
        arguments = self.arguments((1, 1))
        if self.name == "randn":
            written = [self.dtype]
        elif self.name == "chain":
            written = [self.dtype] * CHAIN_STEPS
        elif self.op in ("loss", "bits_bound"):
            written = []
        else:
            written = _dtypes(arguments[1])
        return _dtypes(self.reads(arguments)), written

    @property
    def bytes_per_element(self) -> int:
        """Bytes read and written for an element of the sample."""
        reads, writes = self.tensors()
        return sum(dtype.itemsize for dtype in (*reads, *writes))


# states, masks over S0.., o, c, z, draws, and the table of fastdiff/ops/tables.py.
_FORWARD = {"q_sample": (1, (0b1001,), 1, "x_t"), "q_posterior": (2, (0b0011,), 0, "posterior")}


def _dtypes(tensors: Sequence[Tensor]) -> list[torch.dtype]:
    """A dtype for each element that a tensor has for one of the sample."""
    return [tensor.dtype for tensor in tensors for _ in range(tensor.numel())]


@cache
def _schedule() -> NoiseSchedule:
    return linear(1000)


@cache
def _plan(name: str) -> SolverPlan:
    make = _KINDS[name].plan
    assert make is not None
    return make(_schedule())


def cases() -> Iterator[Case]:
    """Every case that reports show and gates hold: each kind in each dtype, exact and fast."""
    for name, kind in _KINDS.items():
        for fast in (False, True) if kind.draws else (False,):
            for dtype in _SHORT:
                yield Case(name, dtype, fast=fast)
            if kind.plan is not None:
                yield Case(name, torch.float32, torch.bfloat16, fast)
