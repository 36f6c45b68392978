"""SolverPlan: a sampler as data, one row of float64 coefficients per model call.

Between two model calls nearly every sampler is an affine map with scalar coefficients, plus at
most a clamp. A plan holds that map for every call; the fused step (fastdiff/ops/step.py) executes
it and the engine (fastdiff/engine.py) feeds it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastdiff.files import check_writable, write_atomic
from fastdiff.ops.held import faking, lasting
from fastdiff.program import DeviceProgram, Mode, Program
from fastdiff.schedules._values import as_flag, as_float

__all__ = ["SolverPlan"]

FloatArray = NDArray[np.float64]
_FORMAT = 2
DRAW_DTYPES = ("sample", "model_output", "float32")
MAX_STATES, MAX_DRAWS = 7, 4  # what the kernels serve, with a row left for the preview


@dataclass(frozen=True, eq=False)
class SolverPlan:
    """An immutable sampler: R model calls, N states (S0 is the sample), D noise draws a call.

    Per call i, with o the model output and z the draws:

        c     = clamp(P[i] . [S, o, z], lo[i], hi[i])         when P is given
        S'[k] = A[i, k] . [S, o, c, z]
        next model input = c_in[i] * S'[0]

    S0 is what the model sees next (before c_in), or the result after the last call; the other
    states are the history. A row [0 .. 0] forgets a state, a unit row keeps a tensor as it is.

    Attributes:
        name: what it is, for people.
        A: (R, N, N+2+D) state rows, columns S0.., o, c, z0..
        x_start: (R, N+2+D) the denoised preview x_0 over the same columns.
        t: (R,) the model's own t at every call.
        draws: (R, D, 2) uint32 (step, stream) of every draw.
        P, lo, hi: (R, N+1+D), (R,), (R,) the clamp node; None without one.
        thresholding: (ratio, largest): the clamp node is dynamic thresholding instead (Saharia et
            al. 2022): with s the ratio-quantile of |P . [S, o, z]| in every sample, held in
            [1, largest], c = clamp(., -s, s) / s. lo and hi are then not used.
        c_in: (R,) scale of the model input that follows the call (the last is not used).
        first_c_in: scale of the first model input.
        initial_scale: x_T = initial_scale * standard normal noise.
        first_churn: scale of noise added to x_T before the first call; its (step, stream) is
            (0, 3).
        first_drawn: whether a generator makes that draw although its scale is 0.
        inputs: names of the last states, which the caller supplies at every call (their rows keep
            them as they are).
        drawn: (R, D) draws that a generator makes, used or not, in this order (as the upstream
            code does); None: those with a coefficient.
        draw_dtype: dtype of a generator's draws: that of the "sample", of the "model_output", or
            "float32".
        half_log_variance_min, half_log_variance_max: (R,) bounds of learned-range variance, halved:
            the noise coefficient is multiplied by exp(f * max + (1 - f) * min), f = (v + 1) / 2.
            None when the model does not predict its variance.
        snr: (R,) signal-to-noise ratio r of the rows that are Langevin corrector steps, 0 for
            ordinary rows; see fastdiff/ops/corrector.py. In a corrector row the coefficients of o
            and z in A[i, 0] are multiplied by eps and sqrt(2 eps) with
            eps = 2 (r ||z|| / ||A[i, 0, o] o||)^2, measured on the device at every step.
        about: what it was built from (strings), printed and saved, not compared.
    """

    name: str
    A: FloatArray
    x_start: FloatArray
    t: FloatArray
    draws: NDArray[np.int64]
    P: FloatArray | None = None
    lo: FloatArray | None = None
    hi: FloatArray | None = None
    c_in: FloatArray | None = None
    first_c_in: float = 1.0
    initial_scale: float = 1.0
    first_churn: float = 0.0
    first_drawn: bool = False
    inputs: tuple[str, ...] = ()
    thresholding: tuple[float, float] | None = None
    drawn: NDArray[np.bool_] | None = None
    draw_dtype: str = "sample"
    half_log_variance_min: FloatArray | None = None
    half_log_variance_max: FloatArray | None = None
    snr: FloatArray | None = None
    about: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("first_c_in", "initial_scale", "first_churn"):
            object.__setattr__(self, name, as_float(name, getattr(self, name)))
        object.__setattr__(self, "first_drawn", as_flag("first_drawn", self.first_drawn))
        for name in _ARRAYS:
            value = getattr(self, name)
            if value is None:
                continue
            dtype = {"draws": np.int64, "drawn": np.bool_}.get(name, np.float64)
            if name == "draws" and np.asarray(value).dtype.kind not in "iu":
                raise TypeError(f"draws must hold integers, not {np.asarray(value).dtype}")
            array: NDArray[Any] = np.array(value, dtype=dtype)
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        if self.A.ndim != 3 or self.A.shape[0] < 1 or self.A.shape[1] < 1:
            raise ValueError(f"A must be (R, N, N+2+D) with R, N >= 1, not {self.A.shape}")
        rows, states, columns = self.A.shape
        draws = columns - states - 2
        if states > MAX_STATES or draws > MAX_DRAWS:
            raise ValueError(
                f"A must have at most {MAX_STATES} states and {MAX_DRAWS} draws, "
                f"not {states} and {draws}"
            )
        expected = {
            "A": (rows, states, columns), "x_start": (rows, columns), "t": (rows,),
            "draws": (rows, draws, 2), "P": (rows, columns - 1), "lo": (rows,), "hi": (rows,),
            "c_in": (rows,), "drawn": (rows, draws), "half_log_variance_min": (rows,),
            "half_log_variance_max": (rows,), "snr": (rows,),
        }  # fmt: skip
        if draws < 0:
            raise ValueError(f"A must be (R, N, N+2+D) with D >= 0, not {self.A.shape}")
        for name, shape in expected.items():
            value = getattr(self, name)
            if value is None:
                continue
            if value.shape != shape:
                raise ValueError(f"{name} must have shape {shape}, not {value.shape}")
            infinite_ok = name in ("lo", "hi")
            if np.isnan(value).any() or not (infinite_ok or np.isfinite(value).all()):
                raise ValueError(f"{name} has NaN or infinite entries")
        if self.lo is not None and self.hi is not None and (self.lo > self.hi).any():
            raise ValueError("lo must not exceed hi")
        if (self.P is None) != (self.lo is None) or (self.P is None) != (self.hi is None):
            raise ValueError("P, lo and hi must be given together")
        if (self.half_log_variance_min is None) != (self.half_log_variance_max is None):
            raise ValueError("half_log_variance_min and _max must be given together")
        if ((self.draws < 0) | (self.draws >= 1 << 32)).any():
            raise ValueError("draws must hold (step, stream) in [0, 2^32)")
        clamp_column = np.append(
            self.A[:, :, states + 1], self.x_start[:, None, states + 1], axis=1
        )
        if self.P is None and clamp_column.any():
            raise ValueError("the clamp column c is used, but P, lo and hi are None")
        object.__setattr__(self, "inputs", tuple(self.inputs))
        if self.thresholding is not None:
            ratio, largest = (float(value) for value in self.thresholding)
            if self.P is None or not 0 <= ratio <= 1 or not largest >= 1:
                raise ValueError(
                    "thresholding must be (ratio, largest) with 0 <= ratio <= 1 <= largest and a "
                    f"clamp node, not {self.thresholding!r}"
                )
            object.__setattr__(self, "thresholding", (ratio, largest))
        if self.draw_dtype not in DRAW_DTYPES:
            raise ValueError(
                f"draw_dtype must be one of {', '.join(DRAW_DTYPES)}, not {self.draw_dtype!r}"
            )
        self._check_history()
        self._check_correctors()

    def _check_history(self) -> None:
        """Refuses rows that read a state before any row has written it."""
        states, given = self.states, len(self.inputs)
        if states == 1 and not given:
            return
        if given >= states:
            raise ValueError(f"inputs must leave room for the sample: {given} of {states} states")
        identity = np.eye(states, self.A.shape[2])[states - given :]
        if (self.A[:, states - given :] != identity).any():
            raise ValueError("inputs must be kept as they are by every row of A")
        # States as bits: what every row of A reads, which are there, which stay as they are.
        bits = 1 << np.arange(states)
        reads = ((self.A[:, :, :states] != 0) @ bits).tolist()
        others = self.x_start[:, :states] != 0
        if self.P is not None:
            others |= self.P[:, :states] != 0
        alive = (self.A.any(axis=2) @ bits).tolist()
        alone = np.count_nonzero(self.A, axis=2) == 1
        stays = (alone & (np.einsum("ikk->ik", self.A[:, :, :states]) == 1)) @ bits
        known = int(bits[0]) | int(bits[states - given :].sum())
        for i, (rows, read, stay) in enumerate(
            zip(reads, (others @ bits).tolist(), stays.tolist(), strict=True)
        ):
            computed = known | ~stay
            for k, row in enumerate(rows):
                if computed >> k & 1:
                    read |= row
            unknown = read & ~known
            if unknown:
                first = (unknown & -unknown).bit_length() - 1
                raise ValueError(f"A reads state {first} at row {i}, before any row wrote it")
            known = alive[i] & computed

    def _check_correctors(self) -> None:
        if self.snr is None:
            return
        if (self.snr < 0).any() or self.learned:
            raise ValueError("snr must be >= 0, in a plan without learned variance")
        rows = self.A[self.snr > 0, 0]
        if (rows[:, self.states] == 0).any() or (
            (rows[:, self.states + 2 :] != 0).sum(axis=1) != 1
        ).any():
            raise ValueError("snr: a corrector row must use the model output and one draw")

    # Sizes and structure.

    @property
    def rows(self) -> int:
        """Model calls R."""
        return self.A.shape[0]

    def __len__(self) -> int:
        return self.rows

    @property
    def states(self) -> int:
        return self.A.shape[1]

    @property
    def n_draws(self) -> int:
        return self.draws.shape[1]

    @property
    def learned(self) -> bool:
        return self.half_log_variance_min is not None

    @property
    def state_names(self) -> list[str]:
        """x, the history s1.., the caller's inputs."""
        history = self.states - 1 - len(self.inputs)
        return ["x", *(f"s{k}" for k in range(1, history + 1)), *self.inputs]

    @cached_property
    def draws_noise(self) -> NDArray[np.bool_]:
        """(R, D): whether the row's draw has a non-zero coefficient anywhere."""
        first = self.states + 2
        used = (self.A[:, :, first:] != 0).any(axis=1)
        used |= self.x_start[:, first:] != 0
        if self.P is not None:
            used |= self.P[:, self.states + 1 :] != 0
        return used

    @property
    def consumes(self) -> NDArray[np.bool_]:
        """(R, D): the draws that a generator makes."""
        return self.draws_noise if self.drawn is None else self.drawn

    # Execution.

    def program(self, mode: Mode) -> Program:
        """The calls of the fused step that run this plan, worked out once per mode."""
        if mode not in self._programs:
            self._programs[mode] = Program(self, mode)
        return self._programs[mode]

    def on(self, device: torch.device, dtype: torch.dtype, mode: Mode) -> DeviceProgram:
        """The program's tensors on a device, uploaded once; dtype float32 or float64."""
        program = self.program(mode)
        if faking():
            return DeviceProgram.upload(program, device, dtype)
        key = (device, dtype, mode)
        if key not in self._uploads:
            with lasting():
                self._uploads[key] = DeviceProgram.upload(program, device, dtype)
        return self._uploads[key]

    @cached_property
    def _programs(self) -> dict[Mode, Program]:
        return {}

    @cached_property
    def _uploads(self) -> dict[tuple[torch.device, torch.dtype, Mode], DeviceProgram]:
        return {}

    # Identity.

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that decides the results (not name and about)."""
        digest = hashlib.sha256(repr([getattr(self, name) for name in _SCALARS]).encode())
        for name in _ARRAYS:
            value = getattr(self, name)
            digest.update(b"-" if value is None else repr(value.shape).encode() + value.tobytes())
        return digest.hexdigest()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SolverPlan):
            return NotImplemented
        return self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __getstate__(self) -> dict[str, Any]:
        return {item.name: getattr(self, item.name) for item in fields(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    # Files.

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan to an .npz file, whole or not at all."""
        meta = {
            "format": _FORMAT, "name": self.name, "about": self.about,
            **{name: getattr(self, name) for name in _SCALARS},
        }  # fmt: skip
        arrays = {n: getattr(self, n) for n in _ARRAYS if getattr(self, n) is not None}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, allow_pickle=False, meta=np.array(json.dumps(meta)), **arrays)
        write_atomic(check_writable(path), buffer.getvalue())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SolverPlan:
        """Reads a plan written by save(); bit-equal to the one saved."""
        refusal = ValueError(f"path {os.fspath(path)!r} is not a saved SolverPlan")
        with open(path, "rb") as stream:
            try:
                file: Any = np.load(stream, allow_pickle=False)
            except (ValueError, EOFError, zipfile.BadZipFile):
                raise refusal from None
            if "meta" not in getattr(file, "files", ()):  # an .npy is an array
                raise refusal
            meta = json.loads(str(file["meta"]))
            if meta.get("format") != _FORMAT:
                raise ValueError(
                    f"path {os.fspath(path)!r} has plan format {meta.get('format')}, "
                    f"this version reads {_FORMAT}"
                )
            arrays = {name: file[name] for name in _ARRAYS if name in file}
        del meta["format"]
        return cls(**meta, **arrays)

    # Text.

    def __repr__(self) -> str:
        return (
            f"SolverPlan({self.name!r}, calls={self.rows}, states={self.states}, "
            f"draws={self.n_draws})"
        )

    def __str__(self) -> str:
        """One line per call: t, what is read and written, bytes per element, draws."""
        kinds = [
            f"{self.rows} model calls",
            f"{self.states - 1 - len(self.inputs)} history tensors",
        ]
        if self.P is not None:
            kinds.append("clamped" if self.thresholding is None else "dynamic thresholding")
        if self.learned:
            kinds.append("learned variance")
        if self.snr is not None:
            correctors = np.count_nonzero(self.snr)
            kinds.append(f"{correctors} Langevin corrector steps (norms, noise as a tensor: +16 B)")
        lines = [
            f"{self.name}: {', '.join(kinds)}",
            "B/elt: bytes per element for float32, noise made in the kernel; fresh: when the "
            "model's outputs need no copy",
        ]
        lines += [f"  {key}: {value}" for key, value in self.about.items()]
        lines.append(
            f"{'call':>6} {'t':>10}  {'reads':<18} {'writes':<12} {'B/elt':>5} {'fresh':>5}  draws"
        )
        for i in range(self.rows):
            if self.rows > 40 and 20 <= i < self.rows - 20:
                if i == 20:
                    lines.append(f"{'...':>6}")
                continue
            reads, writes = self.traffic(i)
            fresh = sum(map(len, self.traffic(i, outputs_are_fresh=True)))
            draws = ", ".join(
                f"({step}, {stream})"
                for (step, stream), used in zip(self.draws[i], self.draws_noise[i], strict=True)
                if used
            )
            lines.append(
                f"{i:>6} {self.t[i]:>10g}  {' '.join(reads):<18} {' '.join(writes):<12} "
                f"{4 * (len(reads) + len(writes)):>5} {4 * fresh:>5}  {draws or '-'}"
            )
        return "\n".join(lines)

    def traffic(self, row: int, outputs_are_fresh: bool = False) -> tuple[list[str], list[str]]:
        """Names of the full-size tensors (x, s1.., o) that a row reads and writes."""
        return self.program(Mode(fresh_outputs=outputs_are_fresh)).traffic(row)


_ARRAYS = (
    "A", "x_start", "t", "draws", "P", "lo", "hi", "c_in", "drawn", "half_log_variance_min",
    "half_log_variance_max", "snr",
)  # fmt: skip
_SCALARS = (
    "first_c_in", "initial_scale", "first_churn", "first_drawn", "inputs", "thresholding",
    "draw_dtype",
)  # fmt: skip
