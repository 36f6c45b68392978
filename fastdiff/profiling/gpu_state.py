"""What a GPU is and how it fares: clocks, power, temperature, throttling. Read, never set."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence

import torch

__all__ = ["describe", "find_tool", "first_line", "state"]

_FIELDS = (
    "name", "driver_version", "pstate", "temperature.gpu", "power.draw", "power.limit",
    "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "utilization.gpu",
    "ecc.mode.current", "mig.mode.current",
)  # fmt: skip
# The name of one field changed with driver 535 or so; whichever the tool knows is taken.
_THROTTLE = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
# nvidia-smi's bits, those that can be seen under load.
_REASONS = {
    0x1: "idle",
    0x2: "application clocks",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal",
    0x40: "hardware thermal",
    0x80: "hardware power brake",
    0x100: "display clocks",
}


def find_tool(name: str) -> str | None:
    """A program of the CUDA toolkit, looked for where nvcc is (fastdiff/backends/toolchain.py)."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [f"{home}/bin/{name}" for home in homes if home]
    return next(filter(None, map(shutil.which, [*places[:-1], name, places[-1]])), None)


def _ask(program: str, *arguments: str, seconds: float = 10.0) -> str | None:
    """What a program prints, None when it fails, hangs or is not there."""
    try:
        done = subprocess.run(
            [program, *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None


def first_line(program: str, *arguments: str, containing: str = "") -> str | None:
    """The first line that a program prints with `containing` in it; None where there is none."""
    text = _ask(program, *arguments) or ""
    lines = [line.strip() for line in text.splitlines()]
    return next((line for line in lines if line and containing in line), None)


def _query(fields: Sequence[str], gpu: Sequence[str]) -> dict[str, str] | None:
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return None
    text = _ask(smi, *gpu, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits")
    if not text:
        return None
    values = [value.strip() for value in text.splitlines()[0].split(",")]
    return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else None


def state(device: torch.device | str = "cuda") -> dict[str, str]:
    """What nvidia-smi says of the GPU now; empty where it cannot be asked.

    Units are nvidia-smi's: W, MHz, degrees Celsius. `throttle` names the reasons for lower clocks.
    """
    device = torch.device(device)
    if device.type != "cuda" or shutil.which("nvidia-smi") is None:
        return {}
    uuid = ""
    if torch.cuda.is_available():
        uuid = str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))
    gpu = ["-i", uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"] if uuid else []
    if gpu and _query(["name"], gpu) is None:
        gpu = []  # a name that this tool does not know
    found = _query(_FIELDS, gpu)
    if found is None:  # one unknown field and nvidia-smi answers nothing at all
        found = {}
        for name in _FIELDS:
            found.update(_query([name], gpu) or {})
    found = {k: v for k, v in found.items() if v and "N/A" not in v and "Not Supported" not in v}
    for name in _THROTTLE:
        answer = _query([name], gpu)
        if answer is not None:
            found["throttle"] = _reasons(answer[name])
            break
    return found


def _reasons(text: str) -> str:
    try:
        bits = int(text, 16)
    except ValueError:
        return text
    return ", ".join(name for bit, name in _REASONS.items() if bits & bit) or "none"


def describe(device: torch.device | str = "cuda") -> dict[str, object]:
    """What PyTorch says of a GPU: name, arch ("sm_90"), multiprocessors, memory and L2 in bytes."""
    properties = torch.cuda.get_device_properties(torch.device(device))
    capability = f"sm_{properties.major}{properties.minor}"
    return {
        "gpu": properties.name,
        "arch": capability if torch.version.hip is None else properties.gcnArchName.split(":")[0],
        "multiprocessors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "l2": int(getattr(properties, "L2_cache_size", 0)),
    }
