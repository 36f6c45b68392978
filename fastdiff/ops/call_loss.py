"""One call of the fused loss: where memory comes from, layout, gradient, backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff.backends import operation, select
from fastdiff.ops.call import (
    compute_dtype,
    derivatives,
    differentiated,
    row_major,
    transformed,
    written,
)
from fastdiff.ops.loss import (
    COLUMNS,
    ERROR,
    LossSpec,
    loss_arguments,
    loss_values,
    parse,
    partial_count,
    unpack,
)

__all__ = ["call_loss"]

Counter = tuple[int, int, int, int]
_SCALE, _BY_O = COLUMNS.index("error_scale"), COLUMNS.index("e_o")


class _Loss(torch.autograd.Function):
    """Forward on the chosen backend. Backward, when only model outputs need a gradient, scales the
    slopes that were kept, or is one pass that makes seeded noise again; else the definition is
    differentiated."""

    @staticmethod
    def forward(
        ctx: Any, layout: str, counter: Counter, backend: str | None, *inputs: Tensor
    ) -> Tensor:
        ctx.layout, ctx.counter, ctx.backend = layout, counter, backend
        ctx.save_for_backward(*inputs)
        ctx.slopes = torch.empty_like(inputs[0]) if parse(layout).spec.slopes else None
        return _run(inputs, layout, counter, backend, ctx.slopes)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        count, needed = int(ctx.layout[0]), ctx.needs_input_grad[3:]
        slopes, ctx.slopes = ctx.slopes, None  # used up: a second time the pass makes the gradient
        if torch.is_grad_enabled() or any(needed[count:]):
            found = derivatives(
                lambda leaves: [_definition(leaves, ctx.layout, ctx.counter)], ctx.saved_tensors,
                needed, [gradient],
            )  # fmt: skip
        elif slopes is not None:
            given = unpack(ctx.saved_tensors, parse(ctx.layout))
            found = [_scaled(slopes, given.table, given.rows, gradient[0])]
            found += [None] * (len(needed) - 1)
        else:
            found = _run_grad(ctx.saved_tensors, gradient, ctx.layout, ctx.counter, ctx.backend)
            found += [None] * (len(needed) - count)
        return None, None, None, *found


def _scaled(slopes: Tensor, table: Tensor, rows: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of a lone error by the model output, in the place of its slopes."""
    row = table.index_select(0, rows)
    factor = gradient * row.select(1, _SCALE) * row.select(1, _BY_O)
    return slopes.mul_(factor.view(-1, *[1] * (slopes.dim() - 1)))


def _definition(inputs: Sequence[Tensor], layout: str, counter: Counter) -> Tensor:
    parsed = parse(layout)
    given = unpack(inputs, parsed)
    return loss_values(
        given.model_outputs, given.x, given.y, given.noise, given.table, given.rows, given.keys,
        given.guidance_scale, parsed.spec, counter,
    )[0]  # fmt: skip


def _run(
    inputs: Sequence[Tensor],
    layout: str,
    counter: Counter,
    backend: str | None,
    stored: Tensor | None = None,
) -> Tensor:
    """The results, (K, B).

    Args:
        stored: takes x where the spec makes it, or the slopes where it keeps them.
    """
    first, spec = inputs[0], parse(layout).spec
    given = [tensor.contiguous() for tensor in inputs]
    dtype, batch = compute_dtype(first.dtype), first.shape[0]
    results = torch.empty((spec.count, batch), dtype=dtype, device=first.device)
    pieces = partial_count(first.numel() // batch // (2 if spec.learned else 1))
    outputs = [results, results.new_empty((spec.count, batch, pieces))]
    if stored is not None:
        outputs.append(row_major(stored))
    operation("loss", first.device, dtype, backend)(given, outputs, layout, *counter)
    if stored is not None and outputs[2] is not stored:
        stored.copy_(outputs[2])
    return results


def _run_grad(
    inputs: Sequence[Tensor], gradient: Tensor, layout: str, counter: Counter, backend: str | None
) -> list[Tensor | None]:
    first, count = inputs[0], int(layout[0])
    given = [tensor.contiguous() for tensor in (*inputs, gradient)]
    results = [torch.empty_like(output) for output in inputs[:count]]
    targets = [row_major(result) for result in results]
    operation("loss_grad", first.device, gradient.dtype, backend)(given, targets, layout, *counter)
    for result, target in zip(results, targets, strict=True):
        if result is not target:
            result.copy_(target)
    return list(results)


def _keeps_slopes(spec: LossSpec, model_outputs: Sequence[Tensor], backend: str | None) -> bool:
    """Whether the forward pass leaves the slopes of a lone error, which become the gradient.

    On a CPU that is less work than a pass that makes noise and reads the model output again; on a
    GPU, where noise costs no time beside memory, it is more.
    """
    first = model_outputs[0]
    return (
        first.device.type == "cpu"
        and first.requires_grad
        and torch.is_grad_enabled()
        and not (torch.compiler.is_compiling() or transformed())
        and spec.terms == ERROR
        and spec.error & 4 != 0
        and spec.clamp is None
        and not (spec.learned or spec.makes or len(model_outputs) > 1)
        and first.dtype == compute_dtype(first.dtype)
        and first.is_contiguous()
        and select(first.device, first.dtype, backend) in ("native", "reference")
    )


def call_loss(
    spec: LossSpec,
    model_outputs: Sequence[Tensor],
    x: Tensor | None,
    y: Tensor | None,
    table: Tensor,
    rows: Tensor,
    *,
    noise: Sequence[Tensor] = (),
    keys: Tensor | None = None,
    guidance_scale: Tensor | None = None,
    counter: Counter = (0, 0, 0, 0),
    made: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Runs the fused loss on checked arguments: (K, B) of the table's dtype.

    Differentiable with respect to model outputs, x, y, noise tensors and guidance scale, in
    reverse mode once by a fused pass where model outputs alone need it, and any number of times
    and forward by the definition.

    Args:
        model_outputs, x, y, table, rows, noise, keys, guidance_scale: see loss_values. x and y are
            ignored where the spec does not read them, keys where it makes no noise.
        counter: (seed, sample_offset, step, stream).
        made: the tensor (B, ...) that takes x where the spec makes it; the call then carries no
            gradient.
    """
    if noise or not spec.draws:
        keys = None
    if made is None and _keeps_slopes(spec, model_outputs, backend):
        spec = spec.keeping
    inputs, _, layout, *_ = loss_arguments(
        spec, (), model_outputs, x if spec.reads_x else None, y if spec.reads_y else None, table,
        rows, noise=noise if spec.draws else (), keys=keys, guidance_scale=guidance_scale,
    )  # fmt: skip
    if made is not None:
        results = _run(inputs, layout, counter, backend, made)
        written([made])
        return results
    if not differentiated(inputs):
        return _run(inputs, layout, counter, backend)
    if transformed():
        return _definition(inputs, layout, counter)
    if torch.compiler.is_compiling():
        if any(tensor.requires_grad for tensor in inputs[len(model_outputs) :]):
            return _definition(inputs, layout, counter)
        # Dynamo refuses the same tensor twice.
        inputs = [
            tensor.view_as(tensor) if any(tensor is other for other in inputs[:k]) else tensor
            for k, tensor in enumerate(inputs)
        ]
    result: Tensor = _Loss.apply(layout, counter, backend, *inputs)
    return result
