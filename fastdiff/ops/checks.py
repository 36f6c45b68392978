"""Checks of user input: every failure is a ValueError or TypeError that names the argument."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from fastdiff.ops.held import held

__all__ = [
    "FLOATING",
    "check_floating",
    "check_int",
    "check_like",
    "check_out",
    "check_sample",
    "check_shape",
    "check_uint32",
    "index_views",
    "resolve_rows",
    "resolve_seed",
]

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INTEGER = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_UINT32 = 1 << 32
_MAX_ELEMENTS = 1 << 34  # blocks of four elements are counted in 32 bits


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def check_sample(name: str, value: object) -> None:
    """A batch of samples: a floating tensor (B, ...) with B >= 1."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, not {type(value).__name__}")
    if value.layout != torch.strided:
        raise ValueError(f"{name} must be a dense (strided) tensor, not {value.layout}")
    if value.dtype not in FLOATING:
        raise TypeError(f"{name} must be one of {_names(FLOATING)}, not {value.dtype}")
    if value.dim() == 0:
        raise ValueError(f"{name} must have a batch dimension: shape (B, ...), not ()")
    if value.shape[0] == 0:
        raise ValueError(f"{name} has an empty batch: shape {tuple(value.shape)}, B must be >= 1")
    if value.numel() // value.shape[0] > _MAX_ELEMENTS:
        raise ValueError(f"{name} has more than 2^34 elements per sample")


def check_like(name: str, value: object, like_name: str, like: Tensor) -> None:
    """A floating tensor with the shape and device of another; the dtype may differ."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, not {type(value).__name__}")
    if value.layout != torch.strided:
        raise ValueError(f"{name} must be a dense (strided) tensor, not {value.layout}")
    if value.shape != like.shape:
        raise ValueError(
            f"{name} must have the shape of {like_name}, {tuple(like.shape)}, "
            f"not {tuple(value.shape)}"
        )
    if value.device != like.device:
        raise ValueError(
            f"{name} is on {value.device}, but {like_name} is on {like.device}: "
            "all tensors must be on one device"
        )
    if value.dtype not in FLOATING:
        raise TypeError(f"{name} must be one of {_names(FLOATING)}, not {value.dtype}")
    if (value.dtype == torch.float64) != (like.dtype == torch.float64):
        raise TypeError(
            f"{name} is {value.dtype} and {like_name} is {like.dtype}: "
            "float64 does not mix with other dtypes"
        )


def _span(value: Tensor) -> tuple[int, int]:
    """First and one past the last byte that a tensor touches."""
    start = value.data_ptr()
    if value.is_contiguous():
        return start, start + value.nbytes
    pairs = zip(value.shape, value.stride(), strict=True)
    reach = sum((size - 1) * stride for size, stride in pairs)
    return start, start + (reach + 1) * value.element_size()


def _overlaps_itself(value: Tensor) -> bool:
    if value.is_contiguous():
        return False
    dense = 1
    strides = [(st, s) for s, st in zip(value.shape, value.stride(), strict=True) if s > 1]
    for stride, size in sorted(strides):
        if stride < dense:
            return True
        dense = stride * (size - 1) + dense
    return False


def check_out(
    name: str, out: object, like_name: str, like: Tensor, dtype: torch.dtype,
    inputs: Sequence[Tensor],
) -> None:  # fmt: skip
    """A tensor to write into: it may be an input, but not overlap one, or itself, in part."""
    check_like(name, out, like_name, like)
    assert isinstance(out, Tensor)
    if out.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, not {out.dtype}")
    if torch.is_grad_enabled() and any(value.requires_grad for value in (out, *inputs)):
        raise ValueError(f"{name} must not be given where a gradient is wanted: it carries none")
    if torch.compiler.is_compiling() or out.numel() == 0:
        return
    if _overlaps_itself(out):
        raise ValueError(
            f"{name} has overlapping strides {out.stride()}: its elements share memory"
        )
    start, stop = _span(out)
    for value in inputs:
        if value is out or value.numel() == 0 or value.device.type == "meta":
            continue
        first, last = _span(value)
        if first >= stop or start >= last:
            continue
        same = (
            first == start and value.stride() == out.stride()
            and value.dtype == out.dtype and value.shape == out.shape
        )  # fmt: skip
        if not same:
            raise ValueError(f"{name} overlaps an input in memory without being the same tensor")


def check_int(name: str, value: object, wanted: str = "an int") -> int:
    """`value` as an int: Python's, NumPy's, or torch.compile's."""
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return value  # type: ignore[return-value]
    try:
        if isinstance(value, (bool, np.bool_, Tensor)):
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be {wanted}, not {type(value).__name__}") from None


def check_uint32(name: str, value: object) -> int:
    number = check_int(name, value)
    if not 0 <= number < _UINT32:
        raise ValueError(f"{name} must be in [0, 2^32), not {number}")
    return number


def check_shape(shape: object) -> tuple[int, ...]:
    """(B, ...) as ints, B >= 1."""
    if isinstance(shape, (str, bytes)) or not isinstance(shape, Iterable):
        raise TypeError(f"shape must be a sequence of ints, not {type(shape).__name__}")
    sizes = tuple(check_int("shape", size, "a sequence of ints") for size in shape)
    if not sizes or sizes[0] < 1 or min(sizes) < 0:
        raise ValueError(f"shape must be (B, ...) with B >= 1 and no negative size, not {sizes}")
    return sizes


def check_floating(name: str, dtype: object) -> None:
    if dtype not in FLOATING:
        raise TypeError(f"{name} must be one of {_names(FLOATING)}, not {dtype}")


def resolve_seed(
    seed: int | Tensor, sample_offset: int, batch: int, device: torch.device
) -> tuple[Tensor | None, int, int]:
    """(keys, seed, sample_offset) of the operations; see the noise contract in fastdiff/noise.py.

    An int seed gives batch entry b the pair (seed, sample_offset + b), a tensor of per-sample
    seeds the pair (seed[b], 0).
    """
    sample_offset = check_uint32("sample_offset", sample_offset)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"a seed tensor must be int64, not {seed.dtype}")
        if seed.shape != (batch,):
            raise ValueError(
                f"a seed tensor must have one seed per sample: shape ({batch},), "
                f"not {tuple(seed.shape)}"
            )
        if sample_offset != 0:
            raise ValueError(
                "sample_offset must be 0 with a tensor of seeds: every sample has its own"
            )
        seed = seed.to(device)
        return torch.stack([seed, torch.zeros_like(seed)], dim=1), 0, 0
    seed = check_int("seed", seed, "an int or an int64 tensor")
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed must be in [0, 2^64), not {seed}")
    if sample_offset + batch > _UINT32:
        raise ValueError(
            f"sample_offset + batch must be at most 2^32, not {sample_offset} + {batch}"
        )
    return None, seed - (1 << 64) if seed >= 1 << 63 else seed, sample_offset


def resolve_rows(
    t: int | Tensor, count: int, batch: int, device: torch.device, check: bool, name: str = "t"
) -> Tensor:
    """`t` as int64 (B,) or (1,) on the device; refusals call it `name`.

    An out-of-range t is refused where it can be read without waiting: an int, or a CPU tensor. On
    a GPU it gives NaN for its sample; check=True synchronizes and raises instead.
    """
    if isinstance(t, Tensor):
        if t.dtype not in _INTEGER:
            raise TypeError(f"{name} must be an integer tensor, not {t.dtype}")
        if t.dim() > 1 or t.numel() not in (1, batch):
            raise ValueError(f"{name} must have shape ({batch},) or (1,), not {tuple(t.shape)}")
        plain = type(t) is Tensor or isinstance(t, torch.nn.Parameter)  # a FakeTensor has no values
        readable = plain and t.device.type == "cpu" and not torch.compiler.is_compiling()
        if (readable or check) and t.device.type != "meta":
            low, high = (t, t) if t.numel() == 1 else torch.aminmax(t)
            if int(low) < 0 or int(high) >= count:
                raise ValueError(
                    f"{name} must be in [0, {count}), but has {int(low)} to {int(high)}"
                )
        if t.dim() == 1 and t.dtype == torch.int64 and t.device == device:
            return t.contiguous()
        return t.reshape(-1).to(device=device, dtype=torch.int64).contiguous()
    t = check_int(name, t, "an int or an integer tensor")
    if not 0 <= t < count:
        raise ValueError(f"{name} must be in [0, {count}), not {t}")
    if torch.compiler.is_compiling():
        return torch.full((1,), t, dtype=torch.int64, device=device)
    return held("", index_views, count, device)[2 * t : 2 * t + 1]  # no launch, unlike torch.full


def index_views(count: int, device: torch.device) -> Tensor:
    """0, 0, 1, 1, 2, 2 ..: index i as the view [2i : 2i + 1], always at a multiple of 16 bytes.

    Triton compiles a kernel again for a pointer of another alignment.
    """
    return torch.arange(count, device="cpu").repeat_interleave(2).to(device)
