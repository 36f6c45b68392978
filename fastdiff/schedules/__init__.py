"""Noise schedules, sigma ladders and timestep spacings: NumPy float64 on the host, no torch.

Everything starts from the Gaussian path

    q(x_t | x_0) = N(alpha_t x_0, sigma_t^2 I),        x_t = alpha_t x_0 + sigma_t eps.

`NoiseSchedule` is the variance-preserving chain of DDPM (linear, scaled_linear, cosine, sigmoid,
custom, from_alphas_cumprod), `GaussianPath` any other path (ve, flow), `Schedule` what the two
share. Sigma ladders are the noise levels a sampler visits (karras, exponential, ...), spacings the
timesteps it visits (timestep_spacing, space_timesteps).

    schedule = fastdiff.schedules.linear(1000)
    x_t = schedule.alpha_t[t] * x_start + schedule.sigma_t[t] * noise
"""

from .constructors import cosine, custom, from_alphas_cumprod, linear, scaled_linear, sigmoid
from .gaussian_path import GaussianPath, Schedule, flow, flow_shift, resolution_mu, ve
from .noise_schedule import NoiseSchedule
from .sigmas import beta, exponential, karras, lu, polyexponential, ve_geometric
from .spacing import space_timesteps, timestep_spacing

__all__ = [
    "GaussianPath",
    "NoiseSchedule",
    "Schedule",
    "beta",
    "cosine",
    "custom",
    "exponential",
    "flow",
    "flow_shift",
    "from_alphas_cumprod",
    "karras",
    "linear",
    "lu",
    "polyexponential",
    "resolution_mu",
    "scaled_linear",
    "sigmoid",
    "space_timesteps",
    "timestep_spacing",
    "ve",
    "ve_geometric",
]
