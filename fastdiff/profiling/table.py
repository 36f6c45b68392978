"""A static report as text: tables, what decides and what would move it, and a legend."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastdiff.profiling.gpus import ARCHITECTURES, CLASSES, GPUS

__all__ = ["explanation", "text"]

Row = Mapping[str, Any]

_PIPES = {
    "issue": "instructions",
    "fma": "float and integer products",
    "imad": "integer products",
    "alu": "integer, logic and compare",
    "mufu": "special functions and conversions",
    "vector": "vector instructions",
}
_USES = {
    "issue": CLASSES,
    "fma": ("fp32", "imad"),
    "imad": ("imad",),
    "alu": ("alu",),
    "mufu": ("mufu",),
    "vector": ("fp32", "imad", "alu", "mufu"),
}
_NAMES = {
    "fp32": "float",
    "imad": "integer products",
    "alu": "integer and logic",
    "mufu": "special functions",
    "memory": "loads and stores",
    "other": "control and uniform",
}

_LEGEND = """\
case      operation, dtype of samples (+ that of the model's tensors), fast: noise="fast"
regs      registers of a thread                   sp     loads and stores of spilled registers
smem      bytes of shared memory of a block       occ    threads that fit, of a multiprocessor's
bits      width of accesses to full-size tensors  B      bytes that an element of the sample moves
instr     instructions of an element, as launched: those of the loop, and a share of those that a
          thread does once; with > at least so many: no path with all of its sums was found
loop      instructions of an element in the loop  once   instructions that a thread does once
fp32 ...  instr by pipe: float; integer products; integer, logic, compare; special functions and
          conversions; loads and stores; control, uniform datapath and the rest
GPU       10^9 elements a second that it should reach, and what holds it there: M memory, I issue of
          instructions, F float and integer products, P integer products, A integer and logic,
          S special functions, V vector instructions (AMD)

Predictions: bytes at the bandwidth that a copy reaches; instructions over the pipes' lanes times
{reach:g}, the share of the peak that kernels like these reach. That share is a rough calibration on
what others report: 0.43 to 0.58 for kernels of random numbers on an H20. They are for tensors
larger than the L2, and for GPUs at their boost clock.
NVIDIA's instructions are counted in its machine code on the cheapest path that does a whole chunk's
work; AMD's in the compiler's assembly, and their pipes are known less well."""


def text(report: Mapping[str, Any]) -> str:
    """The report for people, in lines of up to 140 characters but for the sentences.

    Sentences on what decides are about the first GPU of each target.
    """
    lines = [_head(report)]
    targets = list(dict.fromkeys(row["target"] for row in report["rows"]))
    for target in targets:
        rows = [row for row in report["rows"] if row["target"] == target]
        lines += ["", *_section(target, rows)]
    lines += ["", _LEGEND.format(reach=report["reach"]), "", "GPUs"]
    shown = {name for row in report["rows"] for name in row.get("predictions", ())}
    for gpu in GPUS:
        if gpu.name in shown:
            lines.append(
                f"  {gpu.name:<16}{gpu.target:<8}{gpu.multiprocessors:>4} multiprocessors, "
                f"{gpu.clock:g} GHz, {gpu.bandwidth:g} TB/s ({gpu.copy:g} for a copy), "
                f"L2 {gpu.l2:g} MB; {gpu.source}"
            )
    for name, reason in report["left_out"].items():
        lines += ["", f"Left out: {name} kernels. {reason[0].upper()}{reason[1:]}."]
    return "\n".join(lines)


def _head(report: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    commit = f", commit {report['commit']}" if report.get("commit") else ""
    shape = "x".join(map(str, report["shape"]))
    return f"Compiled, not run: {versions}{commit}; samples of {shape}; {report['date']}"


def _section(target: str, rows: Sequence[Row]) -> Iterator[str]:
    gpus = list(dict.fromkeys(name for row in rows for name in row.get("predictions", ())))
    arch = ARCHITECTURES[target]
    yield f"{target}: {arch.threads} threads and {arch.registers} registers a multiprocessor"
    head = f"{'case':<27}{'backend':<7}{'regs':>5}{'sp':>3}{'smem':>5}{'occ':>5}{'bits':>5}"
    head += f"{'B':>3}{'instr':>7}{'loop':>6}{'once':>5}"
    head += "".join(f"{name[:4]:>5}" for name in CLASSES)
    yield head + "".join(f"{_short(name):>8}" for name in gpus)
    for row in rows:
        start = f"{row['case']:<27}{row['backend']:<7}"
        if "error" in row:
            yield start + " " + row["error"]
            continue
        line = f"{start}{row['registers']:>5}{row['spills']:>3}{row['shared']:>5}"
        line += f"{row['occupancy']:>5.0%}"
        if "uncounted" in row:
            line += f"{'':>5}{row['bytes']:>3}  {row['uncounted']:<46}"
        else:
            line += f"{row['width']:>5}{row['bytes']:>3}"
            line += f"{'>' * row['at_least'] + _brief(row['instructions']):>7}"
            line += f"{_brief(row['loop']):>6}{row['once']:>5}"
            line += "".join(f"{_brief(row['classes'][name]):>5}" for name in CLASSES)
        for name in gpus:
            prediction = row["predictions"][name]
            line += f"{prediction['gelem_s']:>6.0f} {_LETTERS[prediction['bound']]}"
        yield line
    for name in gpus:
        found = Counter(row["predictions"][name]["bound"] for row in rows if "error" not in row)
        counts = ", ".join(f"{count} by {_held(bound)}" for bound, count in found.most_common())
        yield f"{name}: of {sum(found.values())} kernels held back {counts}"
    for name in gpus[:1]:
        yield ""
        yield f"{name}: what decides, and what would move it"
        for row in rows:
            if "error" not in row:
                yield f"  {row['case']:<28}{row['backend']:<7} {explanation(row, name, rows)}"


_LETTERS = {
    "memory": "M", "issue": "I", "fma": "F", "imad": "P", "alu": "A", "mufu": "S", "vector": "V"
}  # fmt: skip


def _short(name: str) -> str:
    for part, short in ((", one die", ""), ("RTX ", ""), (" 96GB", ""), ("SXM 80GB", "80")):
        name = name.replace(part, short)
    return name[:7].strip()


def _brief(value: float) -> str:
    return f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def _held(bound: str) -> str:
    return "memory" if bound == "memory" else _PIPES[bound]


def explanation(row: Row, gpu: str, rows: Sequence[Row]) -> str:
    """What holds a row back on a GPU and what would move it, in a sentence.

    Args:
        rows: of the same target, among which are the row's relatives: its fast and 16-bit forms.
    """
    prediction = row["predictions"][gpu]
    bound, limits = prediction["bound"], dict(prediction["limits"])
    speed = limits.pop(bound)
    # Limits are rounded; a tie is no limit to speak of.
    nearest = min(limits, key=lambda name: limits[name]) if limits else None
    said = []
    if bound == "memory":
        said.append(f"memory: {row['bytes']} bytes an element at {prediction['gb_s']} GB/s")
        if "uncounted" in row:
            said.append(f"what instructions would allow is not known: {row['uncounted']}")
        elif nearest is not None:
            said.append(f"{_held(nearest)} would allow {limits[nearest] / speed:.1f} times that")
        said.append(_narrower(row, gpu, rows))
    else:
        count = sum(row["classes"][name] for name in _USES[bound])
        said.append(
            f"{bound}: {count:.1f} {_held(bound)} an element against {row['bytes']} bytes, which "
            f"memory would move {limits['memory'] / speed:.1f} times as fast"
        )
        said.append(_fewer(row, gpu, rows))
    if row["occupancy"] < 0.5:
        limit = row["occupancy_limit"]
        said.append(f"{row['occupancy']:.0%} of the threads fit ({limit}): latency may show")
    return "; ".join(part for part in said if part)


def _relative(row: Row, case: str, rows: Sequence[Row]) -> Row | None:
    for other in rows:
        if other["case"] == case and other["backend"] == row["backend"] and "classes" in other:
            return other
    return None


def _narrower(row: Row, gpu: str, rows: Sequence[Row]) -> str:
    """What fewer bytes would bring."""
    other = None
    if " fp32" in row["case"]:
        case = row["case"].replace("fp32+bf16", "bf16").replace("fp32", "bf16")
        other = _relative(row, case, rows)
    if other is None:
        return "only fewer bytes would move it"
    gain = other["predictions"][gpu]["gelem_s"] / row["predictions"][gpu]["gelem_s"]
    return f"bf16 samples would be {gain:.1f} times as fast" if gain > 1.05 else ""


def _fewer(row: Row, gpu: str, rows: Sequence[Row]) -> str:
    """What fewer instructions would bring, and where they are."""
    other = None if row["case"].endswith(" fast") else _relative(row, row["case"] + " fast", rows)
    if other is not None:
        gain = other["predictions"][gpu]["gelem_s"] / row["predictions"][gpu]["gelem_s"]
        if gain > 1.05:
            count = other["instructions"]
            return f"noise='fast' takes {count:.1f} instructions and is {gain:.1f} times as fast"
    largest = sorted(row["classes"].items(), key=lambda item: -item[1])[:2]
    return "most are " + " and ".join(f"{_NAMES[name]} ({n:.1f})" for name, n in largest)
