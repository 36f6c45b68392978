"""The schemas of the fused operations: one list, defined alike for every backend.

`torch.ops.fastdiff_reference.step`, `torch.ops.fastdiff_native.step` and
`torch.ops.fastdiff_triton.step` take the same arguments and leave the same bits. Every operation
writes into tensors that the caller allocated and returns nothing, so its fake kernel is empty and
the caller decides where memory comes from. What each one means stands in the module of its name.

Arguments common to the three (of `step` keys stands in inputs, fast in layout):
    keys            int64 (B, 2): seed and sample of every batch entry, on the device; or None, and
                    then entry b has (seed, sample_offset + b) from the by-value integers.
    seed            the 64 bits of the seed as a signed integer.
                    SymInt, so that a compiled training step is not compiled again at every step.
    fast            GPUs may use their approximate log2, sin, cos and sqrt in the noise.
All tensors are contiguous and on one device; the backends do not check what ops/ has checked.
"""

from __future__ import annotations

import torch
from torch.library import Library

__all__ = ["DTYPE_CODES", "SCHEMAS", "define"]

SCHEMAS = {
    # out (B, ...): elements 4*first_block.. of the noise of every sample, rounded to out's dtype.
    "randn": (
        "(Tensor(a!) out, Tensor? keys, SymInt seed, SymInt sample_offset, SymInt step, "
        "SymInt stream, int first_block, bool fast) -> ()"
    ),
    # The fused solver step, ops/step.py, whose step_arguments() makes these from named tensors:
    # inputs   states.., model outputs.., noise.., table, rows, and those that there are of keys,
    #          draws, guidance_scale and threshold
    # outputs  out.., and the next model input where there is one
    # layout   the static structure, which also says what the lists hold: StepSpec.layout(), digits
    # A step costs 2 us less so than with an argument for each: the dispatcher takes its time for
    # every argument, above all for lists of integers and for None.
    "step": (
        "(Tensor[] inputs, Tensor(a!)[] outputs, str layout, SymInt seed, SymInt sample_offset, "
        "SymInt step, SymInt stream) -> ()"
    ),
    # Per-sample losses and bounds, ops/loss.py, whose loss_arguments() makes these:
    # inputs   model outputs.., x, y, noise.., table, rows, keys and guidance_scale, as there are
    # outputs  results (K, B), partial sums (K, B, P), and x where it is made
    "loss": (
        "(Tensor[] inputs, Tensor(a!)[] outputs, str layout, SymInt seed, SymInt sample_offset, "
        "SymInt step, SymInt stream) -> ()"
    ),
    # The derivative of `loss` by its model outputs; inputs end with the gradients (K, B), outputs
    # are one tensor for each model output.
    "loss_grad": (
        "(Tensor[] inputs, Tensor(a!)[] outputs, str layout, SymInt seed, SymInt sample_offset, "
        "SymInt step, SymInt stream) -> ()"
    ),
    # Bits of the binomial process, ops/bits.py: bits_arguments() and bits_bound_arguments().
    # bits             inputs logits, x, table, rows and keys, as there are; outputs the bits
    # bits_bound       inputs logits, x_t, x_start, table, rows; outputs results (B,), partial sums
    # bits_bound_grad  inputs the same and gradients (B,); outputs the derivative by the logits
    **dict.fromkeys(
        ("bits", "bits_bound", "bits_bound_grad"),
        "(Tensor[] inputs, Tensor(a!)[] outputs, str layout, SymInt seed, SymInt sample_offset, "
        "SymInt step, SymInt stream) -> ()",
    ),
    # The forward chain q(x_{1:T} | x_0), ops/chain.py.
    "chain": (
        "(Tensor x_start, Tensor? noise, Tensor table, Tensor slots, Tensor? keys, SymInt seed, "
        "SymInt sample_offset, bool fast, Tensor(a!) out) -> ()"
    ),
}

# How a dtype is named in the layout of `step`; csrc/include/dtype.h agrees.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


def define(backend: str) -> Library:
    """Defines every operation in the namespace of one backend, with its fake kernel."""
    library = Library(f"fastdiff_{backend}", "DEF")
    for name, schema in SCHEMAS.items():
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"fastdiff_{backend}::{name}", _writes_only, lib=library)
    return library


def _writes_only(*_arguments: object) -> None:
    """The fake kernel of every operation: they return nothing and allocate nothing."""
