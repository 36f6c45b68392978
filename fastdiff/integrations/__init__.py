"""Drop-ins for the code that people already run. Each is imported when it is first named, so that
nothing needs diffusers or k-diffusion but the drop-in of it.

diffusers                   accelerate(scheduler, scheduler class or pipeline)
k_diffusion                 the sampling functions of k_diffusion.sampling
gaussian_diffusion          the classes of guided-diffusion and improved-diffusion
denoising_diffusion_pytorch accelerate(diffusion)
"""

import importlib
from types import ModuleType

__all__ = ["denoising_diffusion_pytorch", "diffusers", "gaussian_diffusion", "k_diffusion"]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
