"""One call of an operation: where memory comes from, layout, gradient, backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastdiff.backends import operation, select
from fastdiff.ops.step import HEADER, StepSpec, step_arguments, step_values

__all__ = [
    "call_step", "compute_dtype", "derivatives", "differentiated", "drawn_from", "noise_from",
    "pack_table", "row_major", "transformed", "written",
]  # fmt: skip


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Math is float64 for float64 data and float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def pack_table(
    rows: int,
    outputs: Sequence[np.ndarray],
    clamp: np.ndarray | None = None,
    header: dict[str, np.ndarray | float] | None = None,
) -> np.ndarray:
    """The float64 table of a step: header, P, then every A row; see ops/step.py.

    Args:
        outputs: one (R, N+2+D) array per output row, columns S0.., o, c, z0..
        clamp: (R, N+1+D), columns S0.., o, z0..; zeros when there is no clamp node.
        header: arrays (R,) or numbers by the names in HEADER; the rest is -inf, inf, 1, 0, 0.
    """
    defaults = dict(zip(HEADER, (-np.inf, np.inf, 1.0, 0.0, 0.0), strict=True)) | (header or {})
    columns = [np.broadcast_to(np.asarray(defaults[name], np.float64), rows) for name in HEADER]
    if clamp is None:
        clamp = np.zeros((rows, outputs[0].shape[1] - 1))
    return np.concatenate([np.stack(columns, axis=1), clamp, *outputs], axis=1)


def noise_from(
    noise: Tensor | None,
    generator: torch.Generator | None,
    like: Tensor,
    backend: str | None = None,
    shape: Sequence[int] | None = None,
) -> list[Tensor]:
    """[noise], drawn as upstream draws it when a generator is given; [] when neither is.

    A generator draws torch.randn of the sample's shape and dtype on the generator's own device.
    """
    if generator is not None:
        select(like.device, compute_dtype(like.dtype), backend)  # before the generator moves on
        return [drawn_from(generator, shape or like.shape, like.dtype, like.device)]
    return [] if noise is None else [noise]


def drawn_from(
    generator: torch.Generator, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """torch.randn on the generator's own device, brought to `device`."""
    drawn = torch.randn(shape, dtype=dtype, device=generator.device, generator=generator)
    return drawn.to(device)


def written(tensors: Sequence[Tensor]) -> None:
    """Tells autograd that tensors were overwritten, so that it refuses to use their old values."""
    if torch.compiler.is_compiling():
        return
    torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])


class _Step(torch.autograd.Function):
    """Forward on the chosen backend; backward differentiates the definition."""

    @staticmethod
    def forward(
        ctx: Any, arguments: dict[str, Any], count: tuple[int, int, int], *inputs: Tensor
    ) -> Any:
        ctx.arguments, ctx.count = arguments, count
        ctx.save_for_backward(*inputs)
        return tuple(_run(*_split(inputs, count), **arguments))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        arguments = {k: v for k, v in ctx.arguments.items() if k != "backend"}
        spec: StepSpec = arguments["spec"]
        noise_bits = (1 << spec.draws) - 1 << spec.states + 1

        def define(leaves: list[Tensor]) -> list[Tensor]:
            states, outputs, noise, scale = _split(leaves, ctx.count)
            seeded = spec.draws > 0 and not noise
            if seeded and not spec.learned and not (spec.clamp or 0) & noise_bits:
                # The gradient does not depend on the draws: no need to make them again.
                noise = [torch.zeros_like(states[0])] * spec.draws
            return step_values(states, outputs, noise, guidance_scale=scale, **arguments)

        return (
            None,
            None,
            *derivatives(define, ctx.saved_tensors, ctx.needs_input_grad[2:], gradients),
        )


def derivatives(
    define: Callable[[list[Tensor]], Sequence[Tensor]],
    inputs: Sequence[Tensor],
    needed: Sequence[bool],
    gradients: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The derivative by every input that needs one, for the backward pass of an autograd.Function.

    Args:
        define: the results as plain PyTorch makes them of the inputs.
        gradients: by every result; None where nothing came of it.
    """
    again = torch.is_grad_enabled()  # create_graph=True: the gradient is differentiated too
    # Views, so that gradients stop here and do not run on along paths between the inputs.
    leaves = [
        v.view_as(v) if again else v.detach().requires_grad_(wanted)
        for v, wanted in zip(inputs, needed, strict=True)
    ]
    with torch.enable_grad():
        values = define(leaves)
    pairs = [
        (value, gradient)
        for value, gradient in zip(values, gradients, strict=True)
        if gradient is not None and value.requires_grad
    ]
    found = iter(
        torch.autograd.grad(
            [value for value, _ in pairs],
            [leaf for leaf in leaves if leaf.requires_grad],
            [gradient for _, gradient in pairs],
            allow_unused=True,
            create_graph=again,
        )
    )
    return [next(found) if leaf.requires_grad else None for leaf in leaves]


def _split(
    values: Sequence[Tensor], count: tuple[int, int, int]
) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor | None]:
    n_states, n_outputs, n_noise = count
    a, b = n_states, n_states + n_outputs
    c = b + n_noise
    scale = values[c] if len(values) > c else None
    return list(values[:a]), list(values[a:b]), list(values[b:c]), scale


def _run(
    states: list[Tensor],
    model_outputs: list[Tensor],
    noise: list[Tensor],
    guidance_scale: Tensor | None,
    *,
    table: Tensor,
    rows: Tensor,
    keys: Tensor | None,
    draws: Tensor | None,
    threshold: Tensor | None,
    spec: StepSpec,
    counter: tuple[int, int, int, int],
    out_dtypes: list[torch.dtype],
    out: list[Tensor] | None = None,
    backend: str | None = None,
) -> list[Tensor]:
    first = states[0]
    results = out or [torch.empty_like(first, dtype=dtype) for dtype in out_dtypes]
    # Kernels see row-major memory; other layouts are copied in and out, which keeps the bits.
    targets = [row_major(result) for result in results]
    if noise or not spec.draws:
        keys = draws = None  # the step makes no noise
    call = step_arguments(
        spec, [s.contiguous() for s in states], table, rows, targets,
        model_outputs=[o.contiguous() for o in model_outputs],
        noise=[z.contiguous() for z in noise], keys=keys, draws=draws,
        guidance_scale=guidance_scale, threshold=threshold, counter=counter,
    )  # fmt: skip
    operation("step", first.device, table.dtype, backend)(*call)
    for k, target in enumerate(targets):
        if results[k] is not target:
            results[k].copy_(target)
    if out is not None:
        written(out)
    return results


def row_major(result: Tensor) -> Tensor:
    """What a kernel writes in place of a result: itself, or, where its memory is not row-major, an
    empty tensor that is and has to be copied to it."""
    if result.is_contiguous():
        return result
    return torch.empty_like(result, memory_format=torch.contiguous_format)


def transformed() -> bool:
    """Whether forward mode or a torch.func transform is at work; they differentiate the definition
    themselves."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def differentiated(*groups: Sequence[Tensor]) -> bool:
    """Whether a result of these tensors must carry a derivative, backward or forward."""
    if forward_ad._current_level >= 0:
        return True
    if torch.is_grad_enabled():
        for group in groups:
            for tensor in group:
                if tensor.requires_grad:
                    return True
    return False


def call_step(
    states: list[Tensor],
    spec: StepSpec,
    table: Tensor,
    rows: Tensor,
    *,
    model_outputs: list[Tensor] | None = None,
    noise: list[Tensor] | None = None,
    keys: Tensor | None = None,
    draws: Tensor | None = None,
    guidance_scale: Tensor | None = None,
    threshold: Tensor | None = None,
    counter: tuple[int, int, int, int] = (0, 0, 0, 0),
    out_dtypes: list[torch.dtype] | None = None,
    out: list[Tensor] | None = None,
    backend: str | None = None,
) -> list[Tensor]:
    """Runs one fused step on checked arguments and returns its outputs.

    Differentiable with respect to states, model outputs, noise tensors and guidance scale.
    Results have the memory layout of states[0]; with `out` they are written there.
    """
    model_outputs, noise = model_outputs or [], noise or []
    scales = [] if guidance_scale is None else [guidance_scale]
    arguments: dict[str, Any] = {
        "table": table, "rows": rows, "keys": keys, "draws": draws, "threshold": threshold,
        "spec": spec, "counter": counter,
        "out_dtypes": out_dtypes or [states[0].dtype] * len(spec.outputs),
    }  # fmt: skip
    if out is not None or not differentiated(states, model_outputs, noise, scales):
        return _run(
            states, model_outputs, noise, guidance_scale, out=out, backend=backend, **arguments
        )
    if torch.compiler.is_compiling() or transformed():  # the compiler does so too
        return step_values(states, model_outputs, noise, guidance_scale=guidance_scale, **arguments)
    arguments["backend"] = backend
    count = (len(states), len(model_outputs), len(noise))
    return list(_Step.apply(arguments, count, *states, *model_outputs, *noise, *scales))
