"""Does a backend's launch of a case leave what the definition leaves?

    expected = results(case, "reference", case.arguments(shape, "cpu"))
    actual = results(case, "triton", copied(case.arguments(shape, "cpu"), "cuda"))
    difference(actual, expected, exact=is_exact(case, "triton", device))     # None, or a sentence

What is profiled is checked first, and the self-test is these checks over many sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff import backends
from fastdiff.profiling.cases import Case

__all__ = [
    "FAST_BOUND",
    "copied",
    "difference",
    "is_exact",
    "launch",
    "results",
    "written_by",
]

# Of one fast normal against the exact one: the noise contract. No case scales noise by more than 1.
FAST_BOUND = 4e-4
_LARGEST_NORMAL = 6.7
_INTEGER = {
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}


def copied(
    arguments: Sequence[Any], device: torch.device | str, *, offset: int = 0
) -> tuple[Any, ...]:
    """The arguments in memory of their own; one tensor named twice (in place) stays one.

    Args:
        offset: elements between the start of an allocation and that of each sample tensor, which
            misaligns them.
    """
    device = torch.device(device)
    made: dict[int, Tensor] = {}

    def copy(value: Any) -> Any:
        if isinstance(value, list):
            return [copy(element) for element in value]
        if not isinstance(value, Tensor):
            return value
        if id(value) not in made:
            # Samples have more than two dimensions; tables, rows and keys have not.
            shift = offset if value.dim() > 2 else 0
            memory = torch.empty(value.numel() + shift, dtype=value.dtype, device=device)
            made[id(value)] = memory[shift:].view(value.shape).copy_(value)
        return made[id(value)]

    return tuple(copy(value) for value in arguments)


def written_by(case: Case, arguments: Sequence[Any]) -> list[Tensor]:
    """The tensors among a launch's arguments that it writes, but for partial sums."""
    if case.op == "randn":
        return [arguments[0]]
    if case.op == "chain":
        return [arguments[-1]]
    written: list[Tensor] = arguments[1]
    return [written[0], *written[2:]] if case.op in ("loss", "bits_bound") else written


def launch(case: Case, backend: str, arguments: Sequence[Any]) -> None:
    """One call of the backend's operation. Raises BackendError where it cannot serve."""
    device = written_by(case, arguments)[0].device
    backends.operation(case.op, device, torch.float32, backend)(*arguments)


def results(case: Case, backend: str, arguments: Sequence[Any]) -> list[Tensor]:
    """What a launch leaves; memory that it only writes holds NaN before, so gaps show."""
    out = written_by(case, arguments)
    read = arguments[0] if case.op == "step" else []
    for tensor in out:
        if not any(tensor is one for one in read):
            tensor.fill_(torch.nan)
    launch(case, backend, arguments)
    return out


def is_exact(case: Case, backend: str, device: torch.device | str) -> bool:
    """Whether the backend promises the definition's bits: all but fast noise on NVIDIA GPUs."""
    nvidia = torch.device(device).type == "cuda" and torch.version.hip is None
    return not (case.fast and nvidia and backend != "reference")


def _bits(value: Tensor) -> Tensor:
    """The integers behind a tensor, NaN payloads made equal."""
    value = torch.where(torch.isnan(value), torch.full_like(value, torch.nan), value)
    return value.contiguous().view(_INTEGER[value.dtype])


def difference(
    actual: Sequence[Tensor], expected: Sequence[Tensor], *, exact: bool = True
) -> str | None:
    """None where results agree, else what is wrong with the first that does not.

    Exact results agree as integers. Results with fast noise stay within FAST_BOUND of the exact
    ones and the roundings to their dtype: one of the noise, one of the result.
    """
    for index, (a, b) in enumerate(zip(actual, expected, strict=True)):
        a = a.to(b.device)
        if exact:
            wrong = _bits(a) != _bits(b)
        else:
            rounding = torch.finfo(b.dtype).eps * (b.float().abs() + _LARGEST_NORMAL)
            wrong = ~((a.float() - b.float()).abs() <= FAST_BOUND + rounding)
        count = int(wrong.sum())
        if count:
            where = wrong.nonzero()[0].tolist()
            found, wanted = a[wrong][0].item(), b[wrong][0].item()
            return (
                f"output {index}: {count} of {wrong.numel()} elements are wrong, the first at "
                f"{where}: {found!r} where the definition has {wanted!r}"
            )
    return None
