"""Weights of a model as a safetensors file that says what they are."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.files import write_atomic

__all__ = ["metadata", "read", "require", "save"]


def require(module: str, extra: str) -> ModuleType:
    """The module. Raises ImportError, saying what to install, where it is missing."""
    try:
        return __import__(module, fromlist=["_"])
    except ImportError as error:
        raise ImportError(
            f"{module} is needed here and is not installed: pip install 'fastdiff[{extra}]'"
        ) from error


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    about: dict[str, Any],
    dtype: torch.dtype | None = None,
) -> Path:
    """Write the weights as safetensors with `about` as metadata, atomically.

    Args:
        dtype: of all weights in the file; None keeps each one's own.

    Raises ImportError where safetensors is not installed.
    """
    safetensors = require("safetensors.torch", "sample")
    tensors = {
        name: value.detach().to(dtype or value.dtype).contiguous()
        for name, value in model.state_dict().items()
    }
    # One key: safetensors does not promise an order of several, and the bytes should not vary.
    return write_atomic(path, safetensors.save(tensors, metadata={"fastdiff": json.dumps(about)}))


def metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `save` was told about the weights.

    Raises ImportError as `save` does, ValueError for a file that holds something else.
    """
    safetensors = require("safetensors", "sample")
    try:
        with safetensors.safe_open(os.fspath(path), framework="pt") as file:
            text = (file.metadata() or {}).get("fastdiff")
    except safetensors.SafetensorError as error:
        raise ValueError(f"{os.fspath(path)} is not a safetensors file: {error}") from error
    if text is None:
        raise ValueError(f"{os.fspath(path)} holds no fastdiff model: its metadata says nothing")
    about: dict[str, Any] = json.loads(text)
    return about


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(metadata, weights by name in float32, float64 where they are).

    Raises as `metadata`; FileNotFoundError where there is no such file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no weights at {os.fspath(path)}")
    about = metadata(path)
    tensors = require("safetensors.torch", "sample").load_file(os.fspath(path))
    wide = {name: x if x.dtype == torch.float64 else x.float() for name, x in tensors.items()}
    return about, wide
