"""noise="fast" against the exact noise, on the hardware whose approximations it uses.

Every word that a normal's radius can come from is tried, every word of the angle at the largest
radius, and many random pairs. The contract: a normal is off by 4e-4 at most, nearly all by 2e-5.
"""

from __future__ import annotations

import torch

from fastdiff import backends
from fastdiff.profiling.agreement import FAST_BOUND
from fastdiff.selftest.part import Context

__all__ = ["fast_noise"]

_USUAL = 2e-5
_USUAL_SHARE = 0.999  # "nearly all"
_BLOCK = 1024
_PROGRAMS = 1 << 16  # of a launch
# Words of the radius to try, of the angle, and random pairs.
_ALL = {"radius": 1 << 31, "angle": 1 << 32, "random": 1 << 33}
_FIXED = {"radius": 0, "angle": 0, "random": 12345}


def fast_noise(context: Context) -> None:
    """Options: backends; block, programs of a launch; words of each way, all unless given."""
    device = torch.device(context.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        context.skip("PyTorch finds no GPU")
        return
    if device.type == "cuda" and torch.version.hip is not None:
        context.skip('on AMD GPUs noise="fast" is exact')
        return
    for backend in context.options["backends"]:
        reason = backends.probe(backend, device, torch.float32)
        if reason is not None:
            context.skip(f"{backend} does not serve here: {reason}")
            continue
        if backend == "triton":
            _sweeps(context, device)
            _near_one(context, device)
        _stored(context, backend, device)


def _sweeps(context: Context, device: torch.device) -> None:
    from fastdiff.kernels.probes import THRESHOLDS, deviation

    block = int(context.options.get("block", _BLOCK))
    programs = int(context.options.get("programs", _PROGRAMS))
    largest = torch.zeros(programs, device=device)
    counts = torch.zeros(programs, len(THRESHOLDS) + 1, dtype=torch.int32, device=device)
    step = block * programs
    for way, words in _ALL.items():
        words = int(context.options.get(way, words))
        most = torch.zeros((), device=device)
        total = torch.zeros(len(THRESHOLDS) + 1, dtype=torch.int64, device=device)
        done = 0
        while done < words and context.left > 2:
            deviation(largest, counts, way, done, _FIXED[way], block)()
            most = torch.maximum(most, largest.max())
            total += counts.sum(0)
            done += step
            if done // step % 16 == 0 and device.type == "cuda":
                torch.cuda.synchronize()  # else the clock above runs ahead of the GPU
        worst = float(most)
        above = dict(zip((*map(str, THRESHOLDS), "nan"), total.tolist(), strict=True))
        context.data[way] = {"pairs": done, "largest": worst, "above": above}
        usual = above[str(_USUAL)] / max(done, 1)
        context.note(
            f"{way}: {done:,} pairs of {words:,}, largest error {worst:.3g}, "
            f"{usual:.2g} of them above {_USUAL:g}, {above['nan']} NaN"
        )
        context.check(worst <= FAST_BOUND, f"{way}: a fast normal is off by {worst:.3g}")
        context.check(above["nan"] == 0, f"{way}: {above['nan']} fast normals are NaN")
        if way == "random":
            context.check(
                usual <= 1 - _USUAL_SHARE,
                f"random: {usual:.2%} of fast normals are off by more than {_USUAL:g}",
            )
        context.save(complete=False)


def _near_one(context: Context, device: torch.device) -> None:
    """The words whose uniform rounds to 1, where the logarithm should be 0."""
    from fastdiff.kernels.probes import normals_of

    words = torch.zeros(128, 2, dtype=torch.int64)
    words[:, 0] = torch.arange(2**32 - 256, 2**32, 2)
    uniform = (words[:, 0] >> 1).to(torch.float32) * 2.0**-31 + 2.0**-32
    words = words.to(device)
    found = {}
    for name, fast in (("exact", False), ("fast", True)):
        out = torch.full((128, 2), torch.nan, device=device)
        normals_of(words, out, fast)()
        found[name] = out[:, 0].cpu()
    at_one = uniform == 1.0
    radius = float(found["fast"][at_one].abs().max())
    wanted = float(found["exact"][at_one].abs().max())
    context.data["at_one"] = {"words": int(at_one.sum()), "exact": wanted, "fast": radius}
    context.note(
        f"log2(1): the fast radius is {radius:.3g}, the exact one {wanted:.3g} "
        f"({int(at_one.sum())} words have u = 1)"
    )
    context.check(radius <= FAST_BOUND, f"at u = 1 the fast radius is {radius:.3g}")


def _stored(context: Context, backend: str, device: torch.device) -> None:
    """What `randn` stores with fast against without."""
    n = int(context.options.get("stored", 1 << 26))
    randn = backends.operation("randn", device, torch.float32, backend)
    exact, fast = (torch.full((2, n // 2), torch.nan, device=device) for _ in range(2))
    randn(exact, None, 1, 0, 0, 0, 0, False)
    randn(fast, None, 1, 0, 0, 0, 0, True)
    gap = (fast - exact).abs()
    worst, changed = float(gap.max()), float((gap > 0).float().mean())
    nan = int(gap.isnan().sum())
    usual = float((gap <= _USUAL).float().mean())
    context.data[backend] = {
        "normals": n, "largest": worst, "share_within_2e-5": usual, "share_changed": changed,
    }  # fmt: skip
    context.note(
        f"{backend} randn: {n:,} normals, largest error {worst:.3g}, {usual:.4%} within "
        f"{_USUAL:g}, {changed:.1%} differ from the exact ones"
    )
    context.check(nan == 0, f"{backend}: {nan} fast normals are NaN")
    context.check(worst <= FAST_BOUND, f"{backend}: a fast normal is off by {worst:.3g}")
    context.check(usual >= _USUAL_SHARE, f"{backend}: only {usual:.2%} are within {_USUAL:g}")
