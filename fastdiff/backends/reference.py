"""The reference backend: the definitions in fastdiff/ops, in plain PyTorch.

Registered as composite operations, so torch.compile sees through them and fuses what they do.
"""

from __future__ import annotations

import torch

from fastdiff.ops.bits import bits, bits_bound, bits_bound_grad
from fastdiff.ops.chain import chain
from fastdiff.ops.loss import loss, loss_grad
from fastdiff.ops.randn import randn
from fastdiff.ops.schemas import define
from fastdiff.ops.step import step

__all__ = ["probe"]

_library = define("reference")
_library.impl("randn", randn, "CompositeImplicitAutograd")
_library.impl("step", step, "CompositeImplicitAutograd")
_library.impl("loss", loss, "CompositeImplicitAutograd")
_library.impl("loss_grad", loss_grad, "CompositeImplicitAutograd")
_library.impl("bits", bits, "CompositeImplicitAutograd")
_library.impl("bits_bound", bits_bound, "CompositeImplicitAutograd")
_library.impl("bits_bound_grad", bits_bound_grad, "CompositeImplicitAutograd")
_library.impl("chain", chain, "CompositeImplicitAutograd")


def probe(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reference serves every device and dtype that PyTorch does."""
    return None
