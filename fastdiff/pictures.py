"""Pictures of samples: a labelled grid as PNG, the making of it as an animated GIF; loss curves.

Every row of the grid is one class, every pixel of a sample a crisp square. Pillow draws; it is
imported when something is drawn, so that the rest of fastdiff works without it.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastdiff.files import write_atomic
from fastdiff.profiling.roofline import require_matplotlib

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

__all__ = ["Grid", "draw_grid", "require_pillow", "save_curve", "save_gif", "save_png"]

_PAGE, _TEXT, _FAINT = 255, 30, 120  # grey levels
_PAPER = 243  # where a sample is -1; +1 is drawn in the colour of the text


def require_pillow() -> None:
    """Raises ImportError, saying what to install, where Pillow is missing."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "drawing needs Pillow, which is not installed: pip install 'fastdiff[sample]'"
        ) from error


@dataclass(frozen=True)
class Grid:
    """How a batch of samples is laid out: one row per label, `count` samples in each.

    Sizes in pixels of the result.
    """

    labels: tuple[str, ...]
    count: int
    sample_size: int = 8  # pixels of a sample, in both directions
    scale: int = 7  # what a pixel of a sample becomes
    gap: int = 6
    margin: int = 18
    gutter: int = 34  # the column of labels
    header: int = 50  # two lines of text on top
    least_width: int = 260  # room for the text, however few the samples

    def __post_init__(self) -> None:
        if not self.labels or self.count < 1:
            raise ValueError(
                f"a grid needs at least one label and one sample per label, "
                f"got {len(self.labels)} labels and count {self.count}"
            )

    @property
    def tile(self) -> int:
        return self.sample_size * self.scale

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the picture."""
        width = self.gutter + self.count * self.tile + (self.count - 1) * self.gap
        rows = len(self.labels)
        height = self.header + rows * self.tile + (rows - 1) * self.gap
        return max(width + 2 * self.margin, self.least_width), height + 2 * self.margin

    def corner(self, row: int, column: int) -> tuple[int, int]:
        """(x, y) of the upper left corner of a tile."""
        pitch = self.tile + self.gap
        return (
            self.margin + self.gutter + column * pitch,
            self.margin + self.header + row * pitch,
        )


def _text(
    draw: ImageDraw, at: tuple[float, float], text: str, size: int, fill: int, anchor: str
) -> None:
    from PIL import ImageFont

    font = ImageFont.load_default(size)
    # Without FreeType there is only a bitmap font, which knows no anchors.
    scalable = isinstance(font, ImageFont.FreeTypeFont)
    draw.text(at, text, fill=fill, font=font, anchor=anchor if scalable else None)


def draw_grid(samples: Tensor, grid: Grid, title: str = "", note: str = "") -> Image:
    """A grey picture of the samples, row after row.

    Args:
        samples: (rows * count, 1, size, size), values in [-1, 1] (others are clamped): -1 is paper,
            1 is ink.
        grid: the layout.
        title: text above the grid.
        note: fainter text below the title.

    Raises:
        ImportError: Pillow is not installed.
        ValueError: samples that do not fill the grid.
    """
    require_pillow()
    from PIL import Image, ImageDraw

    expected = (len(grid.labels) * grid.count, 1, grid.sample_size, grid.sample_size)
    if tuple(samples.shape) != expected:
        raise ValueError(f"samples must have shape {expected}, got {tuple(samples.shape)}")

    ink = (samples.detach().cpu().float().nan_to_num(-1.0).clamp(-1, 1) + 1) / 2
    grey = (_PAPER + ink * (_TEXT - _PAPER)).round().to(torch.uint8)
    grey = grey.repeat_interleave(grid.scale, dim=2).repeat_interleave(grid.scale, dim=3)

    picture = Image.new("L", grid.size, _PAGE)
    draw = ImageDraw.Draw(picture)
    _text(draw, (grid.margin, grid.margin + 4), title, 15, _TEXT, "lm")
    _text(draw, (grid.margin, grid.margin + 25), note, 13, _FAINT, "lm")
    for row, label in enumerate(grid.labels):
        _, y = grid.corner(row, 0)
        _text(draw, (grid.margin + 2, y + grid.tile / 2), label, 24, _FAINT, "lm")
        for column in range(grid.count):
            tile = grey[row * grid.count + column, 0].numpy()
            picture.paste(Image.fromarray(tile), grid.corner(row, column))
    return picture


def save_png(picture: Image, path: str | os.PathLike[str]) -> Path:
    """Write a picture as PNG, whole or not at all."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return write_atomic(path, buffer.getvalue())


def save_gif(
    frames: Sequence[Image],
    path: str | os.PathLike[str],
    *,
    seconds: float = 4.0,
    hold: float = 2.0,
) -> Path:
    """Write frames as an animated GIF that repeats, whole or not at all.

    Sixteen levels of grey are kept: the file is a sixth of what it would be. Equal frames in a row
    are merged by Pillow.

    Args:
        frames: at least one, of one size.
        path: the file.
        seconds: how long all frames but the last take together; a frame lasts at least 20 ms.
        hold: how long the last one stays.
    """
    if not frames:
        raise ValueError("an animation needs at least one frame")
    # GIF counts in hundredths of a second, and viewers slow down what is faster than 2 of them.
    each = max(2, round(100 * seconds / len(frames))) * 10
    coarse = [frame.point([17 * round(grey / 17) for grey in range(256)]) for frame in frames]
    buffer = io.BytesIO()
    coarse[0].save(
        buffer,
        format="GIF",
        save_all=True,
        append_images=coarse[1:],
        duration=[each] * (len(frames) - 1) + [round(hold * 1000)],
        loop=0,
    )
    return write_atomic(path, buffer.getvalue())


def save_curve(
    losses: Sequence[float], means: Sequence[float], path: str | os.PathLike[str], title: str = ""
) -> Path:
    """Draw the loss of every iteration and its running mean as PNG, whole or not at all.

    The scale is logarithmic where all losses are positive. matplotlib draws.

    Args:
        losses: at least one.
        means: as many.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; says what to install.
        ValueError: no losses, or not as many means.
    """
    if not losses or len(means) != len(losses):
        raise ValueError(
            f"a curve needs losses and as many means, got {len(losses)} and {len(means)}"
        )
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    steps = range(1, len(losses) + 1)
    axes.plot(steps, losses, color="#56B4E9", linewidth=0.4, alpha=0.7, label="of an iteration")
    axes.plot(steps, means, color="#0072B2", linewidth=1.5, label="running mean")
    if min(losses) > 0:
        axes.set_yscale("log")
    axes.set(xlabel="iteration", ylabel="loss", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return write_atomic(path, buffer.getvalue())
