"""diffusers: any scheduler with every step as one fused pass.

    pipe.scheduler = fastdiff.integrations.diffusers.accelerate(pipe.scheduler)
    fastdiff.integrations.diffusers.accelerate(pipe)             # every scheduler of a pipeline
    Scheduler = fastdiff.integrations.diffusers.accelerate(diffusers.DDIMScheduler)

accelerate  the subclass that stands in for a scheduler
stepping    one run of it: plan, row, noise, dtypes
observe     what upstream's own step does with dtypes and random numbers
noising     add_noise, scale_noise, get_velocity
"""

from .accelerate import accelerate

__all__ = ["accelerate"]
