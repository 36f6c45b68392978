"""Log-density of a sampler's step, for reinforcement learning of diffusion models.

A stochastic sampler is a policy: the model's output is its mean, x_next its action (Black et al.
2024, "Training diffusion models with reinforcement learning", section 4.3; Fan et al. 2023).
"""

from __future__ import annotations

from torch import Tensor

from fastdiff.density import density_spec, density_table
from fastdiff.ops.call import compute_dtype
from fastdiff.ops.call_loss import call_loss
from fastdiff.ops.checks import check_like, check_sample, resolve_rows
from fastdiff.plan import SolverPlan
from fastdiff.run import guidance_tensor
from fastdiff.solvers.checks import check_choice

__all__ = ["log_prob"]


def log_prob(
    plan: SolverPlan,
    i: int | Tensor,
    x: Tensor,
    model_output: Tensor,
    x_next: Tensor,
    *,
    guidance_scale: float | Tensor | None = None,
    reduction: str = "sum",
    check: bool = False,
    backend: str | None = None,
) -> Tensor:
    """log p(x_next | x) of the step that row i of a plan makes, in one pass each way.

        log N(x_next; mean(x, model_output), std^2 I)

    `Run.step(output, log_prob=True)` gives the same bits while sampling, so the importance ratio
    exp(log_prob - old) of an unchanged model is exactly 1.

    Args:
        plan: one state, one draw: ddpm, ddim with eta > 0, flow_sde ..; the variance may be
            learned.
        i: the row, int, or integer tensor (B,) or (1,) with a row for every sample.
        x, x_next: (B, ...), the sample before and after the step.
        model_output: (B, ...), or (2B, ...) with guidance_scale (unconditional half first), with
            twice the channels (dim 1) where the variance is learned.
        guidance_scale: g, a number or (B,), as in Sampler.start.
        reduction: "sum" over the elements of a sample, or their "mean".
        check: read i back from a GPU and refuse values out of range (synchronizes).
        backend: "reference", "native" or "triton"; default automatic.

    Returns:
        (B,) float32, whatever the inputs' dtypes (float64 for float64 data); 0 for rows that add no
        noise, which are point masses. Differentiable: by model_output in a fused pass, by the other
        tensors too.

    Raises:
        ValueError, TypeError: naming the argument; before anything runs.
    """
    if not isinstance(plan, SolverPlan):
        raise TypeError(f"plan must be a SolverPlan, not {type(plan).__name__}")
    spec = density_spec(plan, None)
    check_choice("reduction", reduction, ("sum", "mean"))
    check_sample("x", x)
    check_like("x_next", x_next, "x", x)
    batch, device = x.shape[0], x.device
    guidance = guidance_tensor(guidance_scale, batch, device)
    copies = 1 if guidance is None else 2
    shape = (copies * batch, *x.shape[1:])
    if spec.learned:
        if x.dim() < 2:
            raise ValueError("x must be (B, C, ...): a learned variance doubles the channels")
        shape = (copies * batch, 2 * x.shape[1], *x.shape[2:])
    check_like("model_output", model_output, f"{copies} x the batch", x.new_empty(1).expand(shape))
    rows = resolve_rows(i, len(plan.A), batch, device, check, "i")
    elements = x.numel() // batch
    table = density_table(plan, elements, reduction == "mean", device, compute_dtype(x.dtype))
    halves = [model_output] if guidance is None else list(model_output.split(batch))
    return call_loss(
        spec, halves, x_next, x, table, rows, guidance_scale=guidance, backend=backend
    )[0]
