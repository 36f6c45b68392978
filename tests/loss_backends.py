"""Whether a backend has the fused losses for float32 and float64 on the CPU."""

from __future__ import annotations

import pytest
import torch

import fastdiff as fd


def use(name: str) -> str:
    """The backend's name, where it serves losses; else the test is skipped."""
    device = torch.device("cpu")
    if name != "reference":
        reason = fd.backends.probe(name, device, torch.float32)
        has = torch._C._dispatch_has_kernel_for_dispatch_key(f"fastdiff_{name}::loss", "CPU")
        if reason is not None or not has:
            pytest.skip(reason or f"{name} has no fused losses")
    return name
