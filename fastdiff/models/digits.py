"""The shipped model: scikit-learn's handwritten digits, 1797 pictures of 8x8 pixels.

Data (UCI optical digits test set, Alpaydin & Kaynak 1998; values 0..16 become [-1, 1]), weights,
and a measure of what comes out. `fastdiff train digits` (digits_training.py) makes
digits.safetensors.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

import fastdiff as fd
from fastdiff.models import weights
from fastdiff.models.unet import UNet, UNetConfig
from fastdiff.models.weights import require

if TYPE_CHECKING:
    from fastdiff.schedules import NoiseSchedule

__all__ = [
    "CLASSES",
    "GUIDANCE_SCALE",
    "SHAPE",
    "TIMESTEPS",
    "WEIGHTS",
    "Quality",
    "channels_last",
    "conditional",
    "load",
    "load_data",
    "measure",
    "metadata",
    "network",
    "save",
    "schedule",
]

CLASSES = 10
SHAPE = (1, 8, 8)  # of one picture: channels, height, width
TIMESTEPS = 1000
GUIDANCE_SCALE = 2.0  # unless asked otherwise: o = o_uncond + g * (o_cond - o_uncond)
WEIGHTS = Path(__file__).with_name("digits.safetensors")


def schedule() -> NoiseSchedule:
    """The noise schedule of the shipped model (Nichol & Dhariwal 2021, eq. 17; T = 1000)."""
    return fd.schedules.cosine(TIMESTEPS)


def load_data() -> tuple[Tensor, Tensor]:
    """(pictures, labels): float32 (1797, 1, 8, 8) in [-1, 1] and int64 (1797,) in 0..9.

    Raises:
        ImportError: scikit-learn, which carries the pictures, is not installed.
    """
    digits: Any = require("sklearn.datasets", "train").load_digits()
    pictures = torch.from_numpy(digits.images).to(torch.float32) / 8 - 1
    return pictures[:, None], torch.from_numpy(digits.target).to(torch.int64)


class Conditional(Protocol):
    """A network that is told the class."""

    @property
    def config(self) -> UNetConfig: ...

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor: ...


def conditional(model: Conditional, labels: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The model of `fd.sample`, model(x, t), for one label per sample.

    With a guidance scale the sampler asks for twice the batch, the first half without a class.

    Args:
        labels: int64 (N,) in [0, classes]; `classes` means no class.

    Returns:
        A function of x (N, 1, 8, 8) or (2N, 1, 8, 8) and t of as many entries.

    Raises:
        ValueError: from here, labels out of range; from the function, any other batch.
    """
    classes = model.config.classes
    if labels.ndim != 1 or labels.dtype != torch.int64:
        raise ValueError(
            f"labels must be int64 of shape (N,), got {labels.dtype} {tuple(labels.shape)}"
        )
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) <= classes:
        raise ValueError(
            f"labels must be in [0, {classes}], got {int(labels.min())}..{int(labels.max())}"
        )
    n = labels.shape[0]
    both = torch.cat([torch.full_like(labels, classes), labels])

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        if x.shape[0] not in (n, 2 * n):
            raise ValueError(
                f"{n} labels were given: x must have {n} or {2 * n} samples, got {x.shape[0]}"
            )
        return model(x, t, labels if x.shape[0] == n else both)

    return denoise


# Weights


def save(model: UNet, path: str | os.PathLike[str], about: dict[str, Any]) -> Path:
    """Write the weights as float16 safetensors with `about` as metadata, atomically."""
    return weights.save(model, path, {"model": asdict(model.config), **about}, torch.float16)


def metadata(path: str | os.PathLike[str] = WEIGHTS) -> dict[str, Any]:
    """What `save` was told about the weights: schedule, T, training command, seed, ..."""
    return weights.metadata(path)


def load(path: str | os.PathLike[str] = WEIGHTS, device: torch.device | str | None = None) -> UNet:
    """The shipped model, or another made by `train`, in float32 and ready to sample.

    Raises:
        ImportError: safetensors is not installed.
        FileNotFoundError: no such file.
        ValueError: a file that holds something else.
    """
    about, tensors = weights.read(path)
    predicts = about.get("prediction_type", "epsilon")
    if predicts != "epsilon":
        raise ValueError(f"{os.fspath(path)} holds another model: it predicts the {predicts}")
    return network(path, about, tensors).to(device)


def network(
    path: str | os.PathLike[str], about: dict[str, Any], tensors: dict[str, Tensor]
) -> UNet:
    """The U-Net of a file that was read (`weights.read`), ready to sample.

    Raises ValueError where the weights are no U-Net's, or another one's than the file says.
    """
    try:
        model = UNet(UNetConfig(**about["model"]))
        model.load_state_dict(tensors)
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{os.fspath(path)} holds another model: {error}") from error
    return channels_last(model.requires_grad_(False).eval())


def channels_last(model: UNet) -> UNet:
    """The same weights in the layout in which convolutions of few pixels are fastest."""
    for parameter in model.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return model


# Measuring


@dataclass(frozen=True)
class Quality:
    """How well pictures made on demand match the digits asked for, and how alike they are."""

    accuracy: float  # share of the pictures recognised as their label
    accuracy_per_class: tuple[float, ...]
    held_out_accuracy: float  # the classifier's own, on digits that it has not seen
    spread: float  # std over the pictures of a class, root mean square over pixels: over the data's
    novelty: float  # median distance to the nearest digit: over the median between two digits

    def report(self) -> dict[str, float]:
        """The figures of all classes together."""
        return {"accuracy": self.accuracy, "spread": self.spread, "novelty": self.novelty}


def measure(pictures: Tensor, labels: Tensor | Sequence[int]) -> Quality:
    """Judge pictures by a support vector classifier that was trained on 80 % of the digits.

    spread: sqrt(mean_pixels var_class) of the pictures over that of the digits, mean over the
    classes; near 0 when the pictures of a class are all alike, 1 when they vary as the digits do.
    novelty: median over pictures of the distance to the nearest digit, over the median over digits
    of the distance to the nearest other one; near 0 for copies, 1 for new ones of the same kind.

    Args:
        pictures: (N, 1, 8, 8) in [-1, 1].
        labels: N of 0..9.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: shapes that do not fit.
    """
    labels = torch.as_tensor(labels)
    if tuple(pictures.shape) != (len(labels), *SHAPE):
        raise ValueError(
            f"pictures must have shape ({len(labels)}, 1, 8, 8) for {len(labels)} labels, "
            f"got {tuple(pictures.shape)}"
        )
    svm = require("sklearn.svm", "train")
    selection = require("sklearn.model_selection", "train")
    digits, digit_labels = load_data()
    real = (digits.flatten(1) + 1) * 8  # 0..16, what gamma is meant for
    made = (pictures.detach().cpu().float().clamp(-1, 1).flatten(1) + 1) * 8
    train_x, test_x, train_y, test_y = selection.train_test_split(
        real.numpy(), digit_labels.numpy(), test_size=0.2, random_state=0, stratify=digit_labels
    )
    classifier = svm.SVC(gamma=0.001, C=10.0).fit(train_x, train_y)
    right = torch.from_numpy(classifier.predict(made.numpy())) == labels

    def spread(values: Tensor, classes: Tensor, label: int) -> float:
        chosen = values[classes == label]
        return float(chosen.var(dim=0, unbiased=True).mean().sqrt())

    asked = [label for label in range(CLASSES) if int((labels == label).sum()) > 1]
    ratios = [spread(made, labels, k) / spread(real, digit_labels, k) for k in asked]
    between = torch.cdist(real, real).fill_diagonal_(math.inf).min(dim=1).values
    nearest = torch.cdist(made, real).min(dim=1).values
    return Quality(
        accuracy=float(right.float().mean()),
        accuracy_per_class=tuple(float(right[labels == k].float().mean()) for k in range(CLASSES)),
        held_out_accuracy=float(classifier.score(test_x, test_y)),
        spread=sum(ratios) / len(ratios) if ratios else math.nan,
        novelty=float(nearest.median() / between.median()),
    )
