"""A Gaussian mixture as data: its exact denoiser and the exact solution of its sampling ODE.

    p(x_0) = sum_k w_k N(mu_k, s_k^2 I),    x_t = alpha x_0 + sigma eps

so E[x_0 | x_t] is a closed form. The probability-flow ODE (Song et al. 2021, eq. 13) written in
y = x / alpha and lambda = sigma / alpha is dy/dlambda = (y - D(y, lambda)) / lambda, with D the
denoiser of y = x_0 + lambda eps (Karras et al. 2022, eq. 3).
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

WEIGHTS = np.array([0.5, 0.3, 0.2])
MEANS = np.array([[1.0, -0.5], [-1.2, 0.4], [0.3, 1.1]])
SCALES = np.array([0.35, 0.5, 0.25])


def denoised(x: Tensor, alpha: float | Tensor, sigma: float | Tensor) -> Tensor:
    """E[x_0 | x_t = x], exact, (B, 2) float64."""
    means, scales = torch.tensor(MEANS), torch.tensor(SCALES)
    alpha, sigma = torch.as_tensor(alpha, dtype=torch.float64), torch.as_tensor(sigma)
    alpha, sigma = alpha.reshape(-1, 1), sigma.to(torch.float64).reshape(-1, 1)
    variance = alpha**2 * scales**2 + sigma**2  # (B or 1, K)
    off = x[:, None] - alpha[..., None] * means  # (B, K, 2)
    log_weight = torch.log(torch.tensor(WEIGHTS)) - torch.log(variance)
    responsibility = torch.softmax(log_weight - (off**2).sum(-1) / (2 * variance), dim=1)
    posterior = means + (alpha * scales**2 / variance)[..., None] * off
    return (responsibility[..., None] * posterior).sum(1)


def output(kind: str, x: Tensor, alpha: float | Tensor, sigma: float | Tensor) -> Tensor:
    """What an exact model of one prediction type returns for x_t = x."""
    x_0 = denoised(x, alpha, sigma)
    alpha, sigma = torch.as_tensor(alpha).reshape(-1, 1), torch.as_tensor(sigma).reshape(-1, 1)
    epsilon = (x - alpha * x_0) / sigma
    return {
        "sample": x_0,
        "epsilon": epsilon,
        "v_prediction": alpha * epsilon - sigma * x_0,
        "flow": epsilon - x_0,
        "score": -epsilon / sigma,
    }[kind]


def solve(
    x: Tensor, begin: tuple[float, float], end: tuple[float, float], tolerance: float = 1e-12
) -> Tensor:
    """x_t carried along the probability-flow ODE from (alpha, sigma) to (alpha, sigma)."""
    (alpha, sigma), (alpha_end, sigma_end) = begin, end

    def slope(rho: float, y: np.ndarray) -> np.ndarray:  # rho = log lambda
        level = torch.tensor(np.exp(rho))
        at = torch.from_numpy(y.reshape(x.shape))
        return (at - denoised(at, 1.0, level)).numpy().ravel()

    solution = solve_ivp(
        slope, (np.log(sigma / alpha), np.log(sigma_end / alpha_end)), (x / alpha).numpy().ravel(),
        method="DOP853", rtol=tolerance, atol=tolerance,
    )  # fmt: skip
    return torch.from_numpy(solution.y[:, -1].reshape(x.shape)) * alpha_end


def slope(steps: list[int], errors: list[float]) -> float:
    """Order of convergence: minus the slope of log error over log steps."""
    return -float(np.polyfit(np.log(steps), np.log(errors), 1)[0])
