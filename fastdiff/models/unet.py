"""A small class-conditional U-Net for square pictures: epsilon prediction, two resolutions.

Residual blocks of GroupNorm, SiLU and 3x3 convolutions (Ho et al. 2020, appendix B); time and class
enter every block as a scale and shift of the second norm, y = norm(h) * (1 + scale) + shift (FiLM,
Perez et al. 2018; "adaptive group normalization" of Dhariwal & Nichol 2021); self-attention at the
lower resolution. One label more than there are classes stands for "no class", which is what
classifier-free guidance (Ho & Salimans 2022) compares with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["UNet", "UNetConfig", "timestep_embedding"]


@dataclass(frozen=True)
class UNetConfig:
    """What fixes the shape of a `UNet`'s weights."""

    channels: int = 32  # at full resolution; twice as many at half resolution
    blocks: int = 1  # residual blocks per resolution on the way down
    classes: int = 10
    image_channels: int = 1
    image_size: int = 8
    embedding: int = 128
    heads: int = 4
    groups: int = 8
    dropout: float = 0.1

    @property
    def null_class(self) -> int:
        """The label that means "no class"."""
        return self.classes


def timestep_embedding(t: Tensor, dimension: int, max_period: float = 10000.0) -> Tensor:
    """(cos(w_k t), sin(w_k t)) with w_k = max_period^(-k / (dimension/2)).

    Source: Vaswani et al. 2017, section 3.5, of the timestep as in Ho et al. 2020, appendix B.

    Args:
        t: timesteps, in steps of the schedule, any real dtype, shape (N,).
        dimension: even width of the result.

    Returns:
        float32 (N, dimension).
    """
    half = dimension // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = t.to(torch.float32)[:, None] * torch.exp(-math.log(max_period) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class _ResidualBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, config: UNetConfig) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(config.groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.film = nn.Linear(config.embedding, 2 * out_channels)
        self.norm2 = nn.GroupNorm(config.groups, out_channels)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        self.skip: nn.Module = (
            nn.Identity()
            if in_channels == out_channels
            else nn.Conv2d(in_channels, out_channels, 1)
        )

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(functional.silu(self.norm1(x)))
        scale, shift = self.film(embedding)[:, :, None, None].chunk(2, dim=1)
        h = functional.silu(self.norm2(h) * (1 + scale) + shift)
        return self.skip(x) + self.conv2(self.dropout(h))


class _Attention(nn.Module):
    """Self-attention over the pixels, with a residual connection."""

    def __init__(self, channels: int, config: UNetConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.norm = nn.GroupNorm(config.groups, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        n, channels, height, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(n, 3, self.heads, channels // self.heads, -1)
        q, k, v = qkv.transpose(-1, -2).unbind(dim=1)
        h = functional.scaled_dot_product_attention(q, k, v)
        return x + self.out(h.transpose(-1, -2).reshape(n, channels, height, width))


class UNet(nn.Module):
    """epsilon(x_t, t, label): the noise in x_t.

    Args:
        config: the shape; see `UNetConfig`.

    Shapes: x (N, C, H, W) in the weights' dtype, t (N,) in steps, labels (N,) int64 in
    [0, classes], where `classes` itself means no class; the result is like x.

    Raises:
        TypeError: x or labels of another dtype.
        ValueError: shapes that do not fit.
    """

    def __init__(self, config: UNetConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or UNetConfig()
        low, high = config.channels, 2 * config.channels
        width = config.embedding

        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(config.classes + 1, width)
        self.conv_in = nn.Conv2d(config.image_channels, low, 3, padding=1)

        def blocks(*sizes: tuple[int, int]) -> nn.ModuleList:
            return nn.ModuleList(_ResidualBlock(i, o, config) for i, o in sizes)

        n = config.blocks
        self.down_full = blocks(*[(low, low)] * n)
        self.downsample = nn.Conv2d(low, low, 3, stride=2, padding=1)
        self.down_half = blocks((low, high), *[(high, high)] * (n - 1))
        self.attention = _Attention(high, config)
        self.middle = blocks((high, high))
        self.up_half = blocks(*[(2 * high, high)] * (n - 1), (high + low, high))
        self.upsample = nn.Conv2d(high, high, 3, padding=1)
        self.up_full = blocks((high + low, low), *[(2 * low, low)] * (n - 1))
        self.norm_out = nn.GroupNorm(config.groups, low)
        self.conv_out = nn.Conv2d(low, config.image_channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        self._check(x, t, labels)
        config = self.config
        embedding = self.time(timestep_embedding(t, config.embedding)) + self.label(labels)
        embedding = functional.silu(embedding)

        h = self.conv_in(x)
        full = []
        for block in self.down_full:
            h = block(h, embedding)
            full.append(h)
        h = self.downsample(h)
        half = [h]
        for block in self.down_half:
            h = block(h, embedding)
            half.append(h)
        half.pop()  # the last one goes on as h
        h = self.attention(h)
        for block in self.middle:
            h = block(h, embedding)
        for block in self.up_half:
            h = block(torch.cat([h, half.pop()], dim=1), embedding)
        h = self.upsample(functional.interpolate(h, scale_factor=2.0, mode="nearest"))
        for block in self.up_full:
            h = block(torch.cat([h, full.pop()], dim=1), embedding)
        return self.conv_out(functional.silu(self.norm_out(h)))

    def _check(self, x: Tensor, t: Tensor, labels: Tensor) -> None:
        config, dtype = self.config, self.conv_in.weight.dtype
        expected = (config.image_channels, config.image_size, config.image_size)
        if x.ndim != 4 or tuple(x.shape[1:]) != expected:
            raise ValueError(
                f"x must have shape (N, {', '.join(map(str, expected))}), got {tuple(x.shape)}"
            )
        if x.dtype != dtype:
            raise TypeError(f"x must have the weights' dtype {dtype}, got {x.dtype}")
        for name, value in (("t", t), ("labels", labels)):
            if tuple(value.shape) != (x.shape[0],):
                raise ValueError(
                    f"{name} must have one entry per sample, shape ({x.shape[0]},), "
                    f"got {tuple(value.shape)}"
                )
        if labels.dtype != torch.int64:
            raise TypeError(f"labels must be int64, got {labels.dtype}")
