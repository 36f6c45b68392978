"""The shipped model: scikit-learn's handwritten digits, 1797 pictures of 8x8 pixels.

Data (UCI optical digits test set, Alpaydin & Kaynak 1998; values 0..16 become [-1, 1]), training,
loading, and a measure of what comes out. `fastdiff train digits` makes digits.safetensors.

The model is trained on L = E ||noise - epsilon(x_t, t, label)||^2 (Ho et al. 2020, eq. 14) with the
label dropped now and then (Ho & Salimans 2022, algorithm 1), AdamW, a cosine learning rate and an
exponential moving average of the weights, which is what is kept.
"""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import fastdiff as fd
from fastdiff.files import check_writable, write_atomic
from fastdiff.models.unet import UNet, UNetConfig
from fastdiff.progress import track

if TYPE_CHECKING:
    from fastdiff.schedules import NoiseSchedule

__all__ = [
    "CLASSES",
    "GUIDANCE_SCALE",
    "SHAPE",
    "WEIGHTS",
    "Quality",
    "TrainConfig",
    "conditional",
    "load",
    "load_data",
    "measure",
    "metadata",
    "save",
    "schedule",
    "train",
]

CLASSES = 10
SHAPE = (1, 8, 8)  # of one picture: channels, height, width
TIMESTEPS = 1000
GUIDANCE_SCALE = 2.0  # unless asked otherwise: o = o_uncond + g * (o_cond - o_uncond)
WEIGHTS = Path(__file__).with_name("digits.safetensors")


def schedule() -> NoiseSchedule:
    """The noise schedule of the shipped model (Nichol & Dhariwal 2021, eq. 17; T = 1000)."""
    return fd.schedules.cosine(TIMESTEPS)


def _require(module: str, extra: str) -> ModuleType:
    try:
        return __import__(module, fromlist=["_"])
    except ImportError as error:
        raise ImportError(
            f"{module} is needed here and is not installed: pip install 'fastdiff[{extra}]'"
        ) from error


def load_data() -> tuple[Tensor, Tensor]:
    """(pictures, labels): float32 (1797, 1, 8, 8) in [-1, 1] and int64 (1797,) in 0..9.

    Raises:
        ImportError: scikit-learn, which carries the pictures, is not installed.
    """
    digits: Any = _require("sklearn.datasets", "train").load_digits()
    pictures = torch.from_numpy(digits.images).to(torch.float32) / 8 - 1
    return pictures[:, None], torch.from_numpy(digits.target).to(torch.int64)


def conditional(model: UNet, labels: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
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
    safetensors = _require("safetensors.torch", "sample")
    tensors = {name: p.to(torch.float16).contiguous() for name, p in model.state_dict().items()}
    # One key: safetensors does not promise an order of several, and the bytes should not vary.
    text = json.dumps({"model": asdict(model.config), **about})
    return write_atomic(path, safetensors.save(tensors, metadata={"fastdiff": text}))


def metadata(path: str | os.PathLike[str] = WEIGHTS) -> dict[str, Any]:
    """What `save` was told about the weights: schedule, T, training command, seed, ..."""
    safetensors = _require("safetensors", "sample")
    try:
        with safetensors.safe_open(os.fspath(path), framework="pt") as file:
            text = (file.metadata() or {}).get("fastdiff")
    except safetensors.SafetensorError as error:
        raise ValueError(f"{os.fspath(path)} is not a safetensors file: {error}") from error
    if text is None:
        raise ValueError(f"{os.fspath(path)} holds no fastdiff model: its metadata says nothing")
    return json.loads(text)


def load(path: str | os.PathLike[str] = WEIGHTS, device: torch.device | str | None = None) -> UNet:
    """The shipped model, or another made by `train`, in float32 and ready to sample.

    Raises:
        ImportError: safetensors is not installed.
        FileNotFoundError: no such file.
        ValueError: a file that holds something else.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no weights at {os.fspath(path)}")
    about = metadata(path)
    tensors = _require("safetensors.torch", "sample").load_file(os.fspath(path))
    try:
        model = UNet(UNetConfig(**about["model"]))
        model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{os.fspath(path)} holds another model: {error}") from error
    model.requires_grad_(False).eval()
    return _channels_last(model.to(device))


def _channels_last(model: UNet) -> UNet:
    """The same weights in the layout in which convolutions of few pixels are fastest."""
    for parameter in model.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return model


# Training


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the weights."""

    steps: int = 4000
    seed: int = 0
    batch_size: int = 128
    learning_rate: float = 2e-3
    warmup: int = 200
    weight_decay: float = 0.01
    label_dropout: float = 0.1
    ema_decay: float = 0.999
    threads: int = 1  # the sums depend on it; one costs little, as the pictures are tiny
    model: UNetConfig = field(default_factory=UNetConfig)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be in [0, 2^63), got {self.seed}")


@dataclass(frozen=True)
class TrainState:
    """What a callback gets: iterations done, of how many, and a running mean of the loss."""

    step: int
    steps: int
    loss: float


def _learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then half a cosine down to zero, as a factor."""
    warmup = min(1.0, (step + 1) / config.warmup)
    return warmup * 0.5 * (1 + math.cos(math.pi * step / config.steps))


def _batches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of one batch after another, each picture once per pass."""
    size = min(size, count)
    while True:
        order = torch.randperm(count, generator=generator)
        yield from (order[i : i + size] for i in range(0, count - size + 1, size))


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train(
    config: TrainConfig | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    progress: bool = False,
    callback: Callable[[TrainState], None] | None = None,
    data: tuple[Tensor, Tensor] | None = None,
) -> UNet:
    """Train on the digits and return the model with averaged weights, on the CPU in float32.

    The noise of iteration i is stream 2 of the noise contract at step i, so it is the same on every
    backend; everything else is drawn from torch generators with the same seed. The same config
    gives the same weights, as far as torch's convolutions do: on the same kind of CPU.

    Args:
        config: see `TrainConfig`.
        out: where to write the weights; the folder is checked before training begins.
        progress: show a progress bar on stderr.
        callback: called after every iteration.
        data: (pictures, labels) instead of all the digits.

    Raises:
        ImportError: scikit-learn or safetensors is not installed.
        ValueError: a config that makes no sense, or `out` that cannot be written.
    """
    config = config or TrainConfig()
    if out is not None:
        check_writable(out, "out")
        _require("safetensors.torch", "sample")
    pictures, labels = data if data is not None else load_data()
    noise_schedule = schedule()

    with _threads(config.threads), torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)  # first weights, dropout
        generator = torch.Generator().manual_seed(config.seed)
        model = _channels_last(UNet(config.model)).train()
        average = copy.deepcopy(model).requires_grad_(False).eval()
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        rates = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: _learning_rate(step, config)
        )
        batches = _batches(len(pictures), config.batch_size, generator)
        loss_mean = 0.0
        for step in track(range(config.steps), "training", enabled=progress):
            index = next(batches)
            x_start, label = pictures[index], labels[index]
            drop = torch.rand(label.shape, generator=generator) < config.label_dropout
            label = label.masked_fill(drop, config.model.null_class)
            t = torch.randint(TIMESTEPS, label.shape, generator=generator)
            x_t, noise = fd.q_sample(
                x_start, t, noise_schedule, seed=config.seed, step=step, return_noise=True
            )
            x_t = x_t.contiguous(memory_format=torch.channels_last)
            loss = torch.nn.functional.mse_loss(model(x_t, t, label), noise)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            rates.step()
            # A young average follows faster (as in Karras et al. 2022, appendix F.2).
            decay = min(config.ema_decay, (step + 1) / (step + 10))
            with torch.no_grad():
                for mean, value in zip(average.parameters(), model.parameters(), strict=True):
                    mean.mul_(decay).add_(value * (1 - decay))
            weight = max(0.01, 1 / (step + 1))
            loss_mean += weight * (loss.item() - loss_mean)
            if callback is not None:
                callback(TrainState(step + 1, config.steps, loss_mean))

    if out is not None:
        settings = {name: value for name, value in asdict(config).items() if name != "model"}
        about = {
            "data": "scikit-learn load_digits, values 0..16 to [-1, 1]",
            "schedule": "cosine",
            "timesteps": TIMESTEPS,
            "prediction_type": "epsilon",
            "command": f"fastdiff train digits --steps {config.steps} --seed {config.seed}",
            "training": settings,
            "loss": round(loss_mean, 5),
            "torch": str(torch.__version__),
        }
        save(average, out, about)
    return average


# Measuring


@dataclass(frozen=True)
class Quality:
    """How well pictures made on demand match the digits asked for, and how alike they are."""

    accuracy: float  # share of the pictures recognised as their label
    accuracy_per_class: tuple[float, ...]
    held_out_accuracy: float  # the classifier's own, on digits that it has not seen
    spread: float  # std over the pictures of a class, root mean square over pixels: over the data's
    novelty: float  # median distance to the nearest digit: over the median between two digits


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
    svm = _require("sklearn.svm", "train")
    selection = _require("sklearn.model_selection", "train")
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
