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
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdiff.files import check_writable, write_atomic
from fastdiff.ops.call import pack_table
from fastdiff.ops.checks import index_views
from fastdiff.ops.held import faking, lasting
from fastdiff.ops.step import StepSpec

__all__ = ["DevicePlan", "SolverPlan"]

FloatArray = NDArray[np.float64]
_FORMAT = 1
MAX_STATES, MAX_DRAWS = 7, 4  # what the kernels serve, with a row left for the preview


@dataclass(frozen=True, eq=False)
class SolverPlan:
    """An immutable sampler: R model calls, N states (S0 is the sample), D noise draws a call.

    Per call i, with o the model output and z the draws:

        c     = clamp(P[i] . [S, o, z], lo[i], hi[i])         when P is given
        S'[k] = A[i, k] . [S, o, c, z]
        next model input = c_in[i] * S'[0]

    Attributes:
        name: what it is, for people.
        A: (R, N, N+2+D) state rows, columns S0.., o, c, z0..
        x_start: (R, N+2) the denoised preview x_0 over S0.., o, c.
        t: (R,) the model's own t at every call.
        draws: (R, D, 2) uint32 (step, stream) of every draw.
        P, lo, hi: (R, N+1+D), (R,), (R,) the clamp node; None without one.
        c_in: (R,) scale of the model input that follows the call (the last is not used).
        first_c_in: scale of the first model input.
        initial_scale: x_T = initial_scale * standard normal noise.
        half_log_variance_min, half_log_variance_max: (R,) bounds of learned-range variance, halved:
            the noise coefficient is multiplied by exp(f * max + (1 - f) * min), f = (v + 1) / 2.
            None when the model does not predict its variance.
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
    half_log_variance_min: FloatArray | None = None
    half_log_variance_max: FloatArray | None = None
    about: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in _ARRAYS:
            value = getattr(self, name)
            if value is None:
                continue
            dtype = np.int64 if name == "draws" else np.float64
            if name == "draws" and np.asarray(value).dtype.kind not in "iu":
                raise TypeError(f"draws must hold integers, not {np.asarray(value).dtype}")
            array = np.array(value, dtype=dtype)
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
            "A": (rows, states, columns), "x_start": (rows, states + 2), "t": (rows,),
            "draws": (rows, draws, 2), "P": (rows, columns - 1), "lo": (rows,), "hi": (rows,),
            "c_in": (rows,), "half_log_variance_min": (rows,), "half_log_variance_max": (rows,),
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
        if self.P is None and (self.A[:, :, states + 1].any() or self.x_start[:, -1].any()):
            raise ValueError("the clamp column c is used, but P, lo and hi are None")

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

    @cached_property
    def changing(self) -> tuple[int, ...]:
        """Indices of the states that some row changes; the others are only read."""
        identity = np.eye(self.states, self.A.shape[2])
        return tuple(k for k in range(self.states) if k == 0 or (self.A[:, k] != identity[k]).any())

    @cached_property
    def draws_noise(self) -> NDArray[np.bool_]:
        """(R, D): whether the row's draw has a non-zero coefficient anywhere."""
        first = self.states + 2
        used = (self.A[:, :, first:] != 0).any(axis=1)
        if self.P is not None:
            used |= self.P[:, self.states + 1 :] != 0
        return used

    # Execution.

    def spec(self, noise_dtype: torch.dtype, preview: bool = False, fast: bool = False) -> StepSpec:
        """The step's structure: outputs are the changing states, then x_0 when preview."""
        masks = [_mask(self.A[:, k]) for k in self.changing]
        if preview:
            masks.append(_mask(self.x_start))
        return StepSpec(
            states=self.states, outputs=tuple(masks), draws=self.n_draws, learned=self.learned,
            clamp=None if self.P is None else _mask(self.P), noise_dtype=noise_dtype, fast=fast,
        )  # fmt: skip

    def table(self, preview: bool = False) -> FloatArray:
        """The float64 coefficient table that goes with spec()."""
        outputs = [self.A[:, k] for k in self.changing]
        if preview:
            outputs.append(np.pad(self.x_start, ((0, 0), (0, self.n_draws))))
        header: dict[str, Any] = {}
        for name in ("lo", "hi", "c_in", "half_log_variance_min", "half_log_variance_max"):
            if getattr(self, name) is not None:
                header[name] = getattr(self, name)
        return pack_table(self.rows, outputs, self.P, header)

    def on(self, device: torch.device, dtype: torch.dtype, preview: bool = False) -> DevicePlan:
        """The plan's tensors on a device, uploaded once; dtype float32 or float64."""
        if faking():
            return DevicePlan.upload(self, device, dtype, preview)
        key = (device, dtype, preview)
        if key not in self._uploads:
            with lasting():
                self._uploads[key] = DevicePlan.upload(self, device, dtype, preview)
        return self._uploads[key]

    @cached_property
    def _uploads(self) -> dict[tuple[torch.device, torch.dtype, bool], DevicePlan]:
        return {}

    # Identity.

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that decides the results (not name and about)."""
        digest = hashlib.sha256(repr((self.first_c_in, self.initial_scale)).encode())
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
            "first_c_in": float(self.first_c_in).hex(),
            "initial_scale": float(self.initial_scale).hex(),
        }  # fmt: skip
        arrays = {n: getattr(self, n) for n in _ARRAYS if getattr(self, n) is not None}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, allow_pickle=False, meta=np.array(json.dumps(meta)), **arrays)
        write_atomic(check_writable(path), buffer.getvalue())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SolverPlan:
        """Reads a plan written by save(); bit-equal to the one saved."""
        with np.load(path, allow_pickle=False) as file:
            if "meta" not in file:
                raise ValueError(f"path {os.fspath(path)!r} is not a saved SolverPlan")
            meta = json.loads(str(file["meta"]))
            if meta.get("format") != _FORMAT:
                raise ValueError(
                    f"path {os.fspath(path)!r} has plan format {meta.get('format')}, "
                    f"this version reads {_FORMAT}"
                )
            arrays = {name: file[name] for name in _ARRAYS if name in file}
        return cls(
            name=meta["name"], about=meta["about"],
            first_c_in=float.fromhex(meta["first_c_in"]),
            initial_scale=float.fromhex(meta["initial_scale"]), **arrays,
        )  # fmt: skip

    # Text.

    def __repr__(self) -> str:
        return (
            f"SolverPlan({self.name!r}, calls={self.rows}, states={self.states}, "
            f"draws={self.n_draws})"
        )

    def __str__(self) -> str:
        """One line per call: t, what is read and written, bytes per element, draws."""
        lines = [
            f"{self.name}: {self.rows} model calls, {self.states - 1} history tensors, "
            f"{'clamped, ' if self.P is not None else ''}"
            f"{'learned variance, ' if self.learned else ''}"
            f"bytes per element for float32, noise made in the kernel"
        ]
        lines += [f"  {key}: {value}" for key, value in self.about.items()]
        lines.append(f"{'call':>6} {'t':>10}  {'reads':<18} {'writes':<12} {'B/elt':>5}  draws")
        shown = range(self.rows)
        for i in shown:
            if self.rows > 40 and 20 <= i < self.rows - 20:
                if i == 20:
                    lines.append(f"{'...':>6}")
                continue
            reads, writes = self.traffic(i)
            draws = ", ".join(
                f"({step}, {stream})"
                for (step, stream), used in zip(self.draws[i], self.draws_noise[i], strict=True)
                if used
            )
            size = 4 * (len(reads) + len(writes))
            lines.append(
                f"{i:>6} {self.t[i]:>10g}  {' '.join(reads):<18} {' '.join(writes):<12} "
                f"{size:>5}  {draws or '-'}"
            )
        return "\n".join(lines)

    def traffic(self, row: int) -> tuple[list[str], list[str]]:
        """Names of the full-size tensors (x, s1.., o) that a row reads and writes."""
        names = ["x", *(f"s{k}" for k in range(1, self.states)), "o"]
        used = np.zeros(self.states + 1, dtype=bool)
        clamp_used = False
        for k in self.changing:
            used |= self.A[row, k, : self.states + 1] != 0
            clamp_used |= bool(self.A[row, k, self.states + 1] != 0)
        if clamp_used and self.P is not None:
            used |= self.P[row, : self.states + 1] != 0
        if self.learned:
            names.append("v")
            used = np.append(used, bool(self.draws_noise[row].any()))
        reads = [name for name, flag in zip(names, used, strict=True) if flag]
        return reads, [names[k] for k in self.changing]


_ARRAYS = (
    "A", "x_start", "t", "draws", "P", "lo", "hi", "c_in", "half_log_variance_min",
    "half_log_variance_max",
)  # fmt: skip


def _mask(rows: FloatArray) -> int:
    """Bit k is set when any row uses column k."""
    return sum(1 << int(k) for k in np.flatnonzero((rows != 0).any(axis=0)))


@dataclass(frozen=True)
class DevicePlan:
    """A plan's tensors on one device.

    Attributes:
        table: (R, width) float32 or float64.
        rows: R views of one int64 tensor, the row index of every call as (1,).
        draws: int64 (R, D, 2).
        t: (R,) int64 when every t is whole, else the table's dtype.
    """

    table: Tensor
    rows: tuple[Tensor, ...]
    draws: Tensor
    t: Tensor

    @classmethod
    def upload(
        cls, plan: SolverPlan, device: torch.device, dtype: torch.dtype, preview: bool
    ) -> DevicePlan:
        whole = bool((plan.t == np.floor(plan.t)).all())
        return cls(
            table=torch.from_numpy(plan.table(preview)).to(device=device, dtype=dtype),
            rows=index_views(plan.rows, device).split([1, 1] * plan.rows)[::2],
            draws=torch.from_numpy(np.array(plan.draws)).to(device),
            t=torch.from_numpy(np.array(plan.t)).to(
                device=device, dtype=torch.int64 if whole else dtype
            ),
        )
