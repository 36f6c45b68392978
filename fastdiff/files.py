"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["check_writable", "write_atomic"]


def check_writable(path: str | os.PathLike[str], name: str = "path") -> Path:
    """The path, if a file can be written there; asked before the work whose result goes into it.

    Raises:
        ValueError: naming `name`: a folder that does not exist or may not be written to, or a
            folder where the file would be.
    """
    result = Path(path)
    folder = result.parent
    if result.is_dir():
        raise ValueError(f"{name} must be a file, {result} is a folder")
    if not folder.is_dir():
        raise ValueError(f"{name} is {result}, and its folder {folder} does not exist")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{name} is {result}, and its folder {folder} is not writable")
    return result


def write_atomic(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write a file beside its place and move it there, so that no reader sees half of it."""
    result = Path(path)
    temporary = result.with_name(f".{result.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, result)
    finally:
        temporary.unlink(missing_ok=True)
    return result
