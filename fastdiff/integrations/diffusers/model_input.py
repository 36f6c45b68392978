"""What a model takes and gives around a step, in torch operations: where no step's pass does it.

input  = cast(c_in sample), twice along the batch with guidance
output = o_uncond + g (o_cond - o_uncond), of the sample's dtype
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.integrations.diffusers.options import Options
from fastdiff.ops.call import compute_dtype

__all__ = ["check_shapes", "input_of", "output_of"]


def input_of(scaled: Tensor, dtype: torch.dtype, options: Options) -> Tensor:
    """The model's input from c_in times a sample of that dtype."""
    scaled = scaled.to(options.model_dtype or dtype)
    return scaled if options.copies == 1 else torch.cat([scaled] * options.copies)


def output_of(output: Tensor, sample: Tensor, options: Options) -> Tensor:
    """The model output that upstream's step takes, guided and of the sample's dtype.

    Raises:
        ValueError: its shape does not go with the sample's.
    """
    doubled = check_shapes(output, sample, options.copies)
    if options.guidance_scale is None:
        return output.to(sample.dtype)
    batch = sample.shape[0]
    wide = compute_dtype(torch.promote_types(sample.dtype, output.dtype))
    uncond, cond = output.to(wide).split(batch)
    scale = torch.as_tensor(options.guidance_scale, dtype=torch.float32, device=sample.device)
    scale = scale.to(wide).reshape(-1, *[1] * (sample.dim() - 1))
    if scale.shape[0] not in (1, batch):
        raise ValueError(
            f"guidance_scale must be a number or have shape ({batch},), not ({scale.shape[0]},)"
        )
    guided = uncond + scale * (cond - uncond)
    if doubled:  # the second half of the channels is a variance, which guidance leaves alone
        channels = sample.shape[1]
        guided = torch.cat([guided[:, :channels], cond[:, channels:]], dim=1)
    return guided.to(sample.dtype)


def check_shapes(output: Tensor, sample: Tensor, copies: int) -> bool:
    """Whether an output has twice the sample's channels (a learned variance); refuses what goes
    with neither."""
    batch, *rest = (*sample.shape,) if sample.dim() else (1,)
    if output.shape == sample.shape if copies == 1 else output.shape == (copies * batch, *rest):
        return False
    if rest and output.shape == (copies * batch, 2 * rest[0], *rest[1:]):
        return True
    twice = " twice along the batch (unconditional half first)" if copies > 1 else ""
    raise ValueError(
        f"model_output has shape {tuple(output.shape)}, which does not go with sample of "
        f"{tuple(sample.shape)}{twice}"
    )
