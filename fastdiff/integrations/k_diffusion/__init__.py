"""Drop-in for k_diffusion.sampling: the same functions, one fused pass over memory a model call.

from fastdiff.integrations import k_diffusion as K

    sigmas = K.get_sigmas_karras(20, 0.03, 14.6, device="cuda")
    x = K.sample_dpmpp_2m(model, torch.randn(shape, device="cuda") * sigmas[0], sigmas)

Names, arguments, callbacks, random draws and the dtype of the result are upstream's: under the same
torch.manual_seed the results agree to rounding. `seed=` (an int, or an int64 tensor with one for
each sample) makes the noise inside the pass instead, reproducibly on any device and batch size.
A denoiser of k_diffusion.external or layers.Denoiser goes into the coefficients: its inner model is
called with the input that the step before has scaled.

Files: sampling (the functions), driver (the loop), network (what the model predicts), noise (draws
and sigma ladders), adaptive (DPM-Solver-12 and 23).
"""

from .adaptive import sample_dpm_adaptive
from .noise import (
    BatchedBrownianTree,
    BrownianTreeNoiseSampler,
    append_zero,
    get_sigmas_exponential,
    get_sigmas_karras,
    get_sigmas_polyexponential,
    get_sigmas_vp,
)
from .sampling import (
    sample_dpm_2,
    sample_dpm_2_ancestral,
    sample_dpm_fast,
    sample_dpmpp_2m,
    sample_dpmpp_2m_sde,
    sample_dpmpp_2s_ancestral,
    sample_dpmpp_3m_sde,
    sample_dpmpp_sde,
    sample_euler,
    sample_euler_ancestral,
    sample_heun,
    sample_lms,
)

__all__ = [
    "BatchedBrownianTree",
    "BrownianTreeNoiseSampler",
    "append_zero",
    "get_sigmas_exponential",
    "get_sigmas_karras",
    "get_sigmas_polyexponential",
    "get_sigmas_vp",
    "sample_dpm_2",
    "sample_dpm_2_ancestral",
    "sample_dpm_adaptive",
    "sample_dpm_fast",
    "sample_dpmpp_2m",
    "sample_dpmpp_2m_sde",
    "sample_dpmpp_2s_ancestral",
    "sample_dpmpp_3m_sde",
    "sample_dpmpp_sde",
    "sample_euler",
    "sample_euler_ancestral",
    "sample_heun",
    "sample_lms",
]
