"""diffusers: any scheduler with every step as one fused pass.

    pipe.scheduler = fastdiff.integrations.diffusers.accelerate(pipe.scheduler)
    fastdiff.integrations.diffusers.accelerate(pipe)             # every scheduler of a pipeline
    Scheduler = fastdiff.integrations.diffusers.accelerate(diffusers.DDIMScheduler)

accelerate   the subclass that stands in for a scheduler
options      what accelerate() was asked for
stepping     one run of it: which row a step is, and the step
single       steps that are plans of their own
places       where a timestep stands among the scheduler's
traced       from a scheduler to a plan
observe      what upstream's own step does with dtypes and random numbers
drawing      random numbers as upstream draws them
model_input  guidance and the model's input where no step makes them
serving      attributes that are made from the history of a run
saving       runs that are copied, pickled or left
noising      add_noise, scale_noise, get_velocity
shadow       copies to be used up
identity     what decides a plan, as a key
"""

from .accelerate import accelerate

__all__ = ["accelerate"]
