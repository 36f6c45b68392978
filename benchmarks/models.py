"""The models that whole loops are timed around: real sizes, random weights where none are shipped.

Time does not depend on the weights, and images that two samplers make from the same random model
can be compared as well as any. A smoke run gets small ones.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.benchmarks import upstream
from fastdiff.benchmarks.registry import smoke
from fastdiff.models import digits
from fastdiff.models.unet import UNet, UNetConfig, timestep_embedding

__all__ = [
    "Model", "constant", "digits_model", "dit", "latent_unet", "pixel_unet", "policy",
]  # fmt: skip

Model = Callable[[Tensor, Tensor], Tensor]  # (x, t) -> output, x (B, ...), t (B,)


def constant(output: Tensor) -> Model:
    """A model that takes no time: what is left of a loop is the sampler's."""
    return lambda x, t: output


class PolicyUNet(nn.Module):
    """The 1-D U-Net of a robot's policy: denoises a horizon of actions given an observation.

    Temporal convolutions of kernel 5, group norm and Mish, with time and observation as a scale and
    shift in every residual block; three resolutions (Chi et al. 2023, "Diffusion Policy", section
    3.1; the U-Net is that of Janner et al. 2022).

    Args:
        actions, widths, observation, embedding: channels of the actions, of the resolutions, of the
            observation and of the time embedding.

    Shapes: x (B, horizon, actions) with a horizon divisible by 4, t (B,); the result is like x.
    """

    observation: Tensor

    def __init__(
        self,
        actions: int = 7,
        widths: tuple[int, ...] = (256, 512, 1024),
        observation: int = 40,
        embedding: int = 256,
    ) -> None:
        super().__init__()
        self.embedding = embedding
        self.time = nn.Sequential(
            nn.Linear(embedding, 4 * embedding), nn.Mish(), nn.Linear(4 * embedding, embedding)
        )
        self.register_buffer("observation", torch.zeros(1, observation))
        condition = embedding + observation

        def pair(i: int, o: int) -> _Pair:
            return _Pair(i, o, condition)

        ins = (actions, *widths[:-1])
        self.down = nn.ModuleList(pair(i, o) for i, o in zip(ins, widths, strict=True))
        self.shrink = nn.ModuleList(nn.Conv1d(w, w, 3, 2, 1) for w in widths[:-1])
        self.middle = pair(widths[-1], widths[-1])
        steps = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.up = nn.ModuleList(pair(2 * i, o) for i, o in steps)
        self.grow = nn.ModuleList(nn.ConvTranspose1d(o, o, 4, 2, 1) for _, o in steps)
        self.last = nn.Sequential(_Block(widths[0], widths[0]), nn.Conv1d(widths[0], actions, 1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time = self.time(timestep_embedding(t, self.embedding))
        condition = torch.cat([time, self.observation.expand(len(x), -1)], dim=1)
        h = x.transpose(1, 2)
        skips = []
        for level, pair in enumerate(self.down):
            h = pair(h, condition)
            skips.append(h)
            if level < len(self.shrink):
                h = self.shrink[level](h)
        h = self.middle(h, condition)
        for pair, grow in zip(self.up, self.grow, strict=True):
            h = grow(pair(torch.cat([h, skips.pop()], dim=1), condition))
        return self.last(h).transpose(1, 2)


class _Block(nn.Sequential):
    def __init__(self, ins: int, outs: int) -> None:
        super().__init__(nn.Conv1d(ins, outs, 5, padding=2), nn.GroupNorm(8, outs), nn.Mish())


class _Residual(nn.Module):
    def __init__(self, ins: int, outs: int, condition: int) -> None:
        super().__init__()
        self.first, self.second = _Block(ins, outs), _Block(outs, outs)
        self.film = nn.Sequential(nn.Mish(), nn.Linear(condition, 2 * outs))
        self.skip = nn.Identity() if ins == outs else nn.Conv1d(ins, outs, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.film(condition)[:, :, None].chunk(2, dim=1)
        return self.second(scale * self.first(x) + shift) + self.skip(x)


class _Pair(nn.Module):
    def __init__(self, ins: int, outs: int, condition: int) -> None:
        super().__init__()
        self.first, self.second = _Residual(ins, outs, condition), _Residual(outs, outs, condition)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.second(self.first(x, condition), condition)


@functools.cache
def digits_model() -> UNet:
    """The shipped digits model; its shape with random weights where safetensors is missing."""
    try:
        return digits.load()
    except ImportError:
        return _ready(UNet())


@functools.cache
def policy() -> PolicyUNet:
    """As in Diffusion Policy on low-dimensional observations: 1x16x7, 66 M weights."""
    return _ready(PolicyUNet(widths=(8, 16, 32)) if smoke() else PolicyUNet())


@functools.cache
def latent_unet() -> UNet:
    """A small U-Net of 32x32 latents of 4 channels, as a distilled few-step model might be."""
    config = UNetConfig(8 if smoke() else 64, blocks=2, image_channels=4, image_size=32)
    return _ready(UNet(config))


@functools.cache
def pixel_unet() -> Model:
    """The U-Net of DDPM for 3x32x32 pictures (Ho et al. 2020, appendix B), 36 M weights.

    Raises Unavailable without diffusers, whose module it is.
    """
    unit = 32 if smoke() else 128
    with _quietly():
        model = upstream.diffusers().UNet2DModel(
            sample_size=32, block_out_channels=(unit, 2 * unit, 2 * unit, 2 * unit),
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            layers_per_block=2,
        ).eval()  # fmt: skip
    return lambda x, t: model(x, t, return_dict=False)[0]


@functools.cache
def dit() -> Model:
    """DiT-B/2 on 4x32x32 latents (Peebles & Xie 2023, table 1), 131 M weights.

    Raises Unavailable without diffusers, whose module it is.
    """
    heads, layers = (2, 1) if smoke() else (12, 12)
    with _quietly():
        model = upstream.diffusers().DiTTransformer2DModel(
            num_attention_heads=heads, attention_head_dim=64, num_layers=layers, in_channels=4,
            out_channels=4, sample_size=32,
        ).eval()  # fmt: skip

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        labels = torch.zeros(len(x), dtype=torch.int64)
        output: Tensor = model(x, t, labels, return_dict=False)[0]
        return output

    return denoise


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _ready(model: Any) -> Any:
    """Random weights such that activations keep their size, zero-initialised layers included."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        fan_in = max(1, parameter[0].numel())
        bound = (3 / fan_in) ** 0.5 if parameter.dim() > 1 else 0.1
        kept = parameter.data if parameter.dim() == 1 else 0.0
        parameter.data = kept + torch.empty_like(parameter).uniform_(
            -bound, bound, generator=generator
        )
    return model.eval().requires_grad_(False)
