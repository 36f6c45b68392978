"""What a thread issues for its elements: the common path through a kernel's machine code.

That path performs the loads and stores of a case, one root or logarithm for two normals, the words,
quotients and logarithms of bits, and the additions and products of its sums; the cheapest one that
does so leaves out what is not common: tails, rare arguments, zero coefficients. Kernels that loop
are counted for one round and for two.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from fastdiff.ops.step import parse
from fastdiff.profiling import amdgcn, sass
from fastdiff.profiling.cases import CHAIN_STEPS, Case
from fastdiff.profiling.flow import Instruction, cheapest_path
from fastdiff.profiling.gpus import CLASSES

__all__ = ["CommonPath", "Work", "common_path", "work_of"]


class Work(NamedTuple):
    """What must be done for an element of the sample, once in `steps`.

    Attributes:
        read, written: bytes of each full-size tensor's element.
        draws: normals.
        operations: additions and products that no order of evaluation saves.
        steps: how often written, draws and operations are done; more than once only in a chain.
        words: 32-bit words of Philox, where no normals are made of them.
        quotients, logarithms: of bits; a logarithm makes a float of an exponent.
    """

    read: tuple[int, ...]
    written: tuple[int, ...]
    draws: int
    operations: float
    steps: int = 1
    words: int = 0
    quotients: int = 0
    logarithms: int = 0


# Of a normal: those of the noise contract, and in the fast form the radius and its two products.
_EXACT_NORMAL, _FAST_NORMAL = 18.5, 1.5
_OF_BITS: dict[str, dict[str, int]] = {
    "bits_q_sample": {"words": 1},
    "bits_reverse": {"words": 1, "quotients": 1},
    "bits_bound": {"logarithms": 3},
    "bits_bound_grad": {"quotients": 3},
}
# Products of Philox for four words: two a round, of ten, but for two that all blocks share.
_PRODUCTS = 18


def work_of(case: Case) -> Work:
    """What the launch of a case must do for an element."""
    reads, writes = case.tensors()
    read = tuple(dtype.itemsize for dtype in reads)
    written = tuple(dtype.itemsize for dtype in writes)
    normal = _FAST_NORMAL if case.fast else _EXACT_NORMAL
    if case.name == "randn":
        return Work(read, written, 1, normal)
    if case.name == "chain":
        return Work(read, written[:1], 1, normal + 3, CHAIN_STEPS)
    if case.op in ("loss", "loss_grad"):
        return Work(read, written, int(case.draws), normal * case.draws)
    if case.name in _OF_BITS:
        return Work(read, written, 0, 0, **_OF_BITS[case.name])
    layout = parse(case.arguments((1, 1))[2])
    spec = layout.spec
    terms = [mask.bit_count() for mask in (spec.clamp or 0, *spec.outputs) if mask]
    operations = sum(2 * count - 1 for count in terms) + spec.draws * normal
    operations += 3 * (layout.model_outputs == 2) + case.mixed
    return Work(read, written, spec.draws, operations)


@dataclass(frozen=True)
class CommonPath:
    """Instructions of a thread, by class of gpus.CLASSES.

    Attributes:
        elements: that a round of the thread's loop makes; without a loop, all it makes.
        round: instructions of a round.
        start: instructions once a thread, before and after its loop; none without a loop.
        accesses: to global memory in the first round and the start, as in {("load", 128): 2}.
        width: bits that full-size tensors are accessed with.
        at_least: no path was found that makes all the sums too: these counts are lower bounds.
    """

    elements: int
    round: Mapping[str, int]
    start: Mapping[str, int]
    accesses: Mapping[tuple[str, int], int]
    width: int
    at_least: bool = False

    def per_element(self, rounds: int) -> dict[str, float]:
        """Instructions an element of a thread that goes round so often."""
        return {
            name: (self.round[name] + self.start[name] / rounds) / self.elements
            for name in self.round
        }


# How an access of so many bits is written, widest first.
_NVIDIA = {
    128: r"{}G?(?:\.\w+)*\.128\b",
    64: r"{}G?(?:\.\w+)*\.64\b",
    32: r"{}G?(?=[.\s])(?!\S*\.(?:256|128|64|[US]16|[US]8)\b)",
    16: r"{}G?(?:\.\w+)*\.[US]16\b",
}
_AMD = {
    128: r"(?:buffer|global)_{}_dwordx4",
    64: r"(?:buffer|global)_{}_dwordx2",
    32: r"(?:buffer|global)_{}_dword\b",
    16: r"(?:buffer|global)_{}_[us]?short",
}


def common_path(
    kernel: sass.Kernel | amdgcn.Kernel, case: Case, elements: int, loops: bool
) -> CommonPath:
    """The common path of a kernel whose threads make `elements` elements at a time.

    `loops`: they do so again and again. Raises ValueError when no path does the work of the case.
    """
    nvidia = isinstance(kernel, sass.Kernel)
    search = _Search(kernel.code, case, work_of(case), elements, nvidia)
    least = 8 * elements * min(search.work.read + search.work.written)
    for width in [width for width in _NVIDIA if width <= least]:
        try:
            first = search.path(width, 1, 1)
        except ValueError:
            continue
        break
    else:
        raise ValueError(f"no path through the kernel does the work of {case.id}")
    classify, access = (sass.classify, sass.access) if nvidia else (amdgcn.classify, amdgcn.access)

    def counts(path: Sequence[Instruction]) -> dict[str, int]:
        found = Counter(map(classify, path))
        return {name: found[name] for name in CLASSES}

    once = counts(first)
    steps = search.work.steps
    # Of a chain, what one more step costs; a round has all of them.
    step = dict.fromkeys(once, 0)
    if steps > 1:
        step = _minus(counts(search.path(width, 1, 2)), once)
    accesses = {
        kind: count for kind, count in Counter(map(access, first)).items() if kind is not None
    }
    round_, start = dict(once), dict.fromkeys(once, 0)
    if loops:
        round_ = _minus(_minus(counts(search.path(width, 2, 2)), once), step)
        start = _minus(_minus(once, round_), step)
        if min(*round_.values(), sum(start.values())) < 0:  # not the same way twice
            round_, start, loops = dict(once), dict.fromkeys(once, 0), False
    more = steps if loops else steps - 1
    round_ = {name: round_[name] + more * step[name] for name in round_}
    return CommonPath(elements, round_, start, accesses, width, bool(search.short))


def _minus(a: Mapping[str, int], b: Mapping[str, int]) -> dict[str, int]:
    return {name: a[name] - b[name] for name in a}


@dataclass(frozen=True)
class _Search:
    code: Sequence[Instruction]
    case: Case
    work: Work
    elements: int
    nvidia: bool
    short: list[bool] = field(default_factory=list)  # not empty: a path lacks some of the sums

    def path(self, width: int, rounds: int, steps: int) -> list[Instruction]:
        """The cheapest path with accesses of `width` bits that makes so many rounds and steps."""
        work, bits = self.work, 8 * self.elements
        if self.nvidia:
            load, store = _NVIDIA[width].format("LD"), _NVIDIA[width].format("ST")
            root = r"MUFU\.LG2" if self.case.fast else r"MUFU\.RSQ"
            operation, product = r"[FH](?:ADD|MUL|FMA)", r"IMAD\.(?:WIDE|HI)\.U32"
            quotient, exponent = r"MUFU\.RCP", r"I2FP?(?:\.F32\.S32)?\s"
        else:
            load, store = _AMD[width].format("load"), _AMD[width].format("store")
            root, operation = r"v_(?:sqrt|rsq)_", r"v_(?:pk_)?(?:add|mul|sub|fma_mix)_f32"
            product = r"v_(?:mul_hi|mad_u64)_u32"
            quotient, exponent = r"v_rcp_f32", r"v_cvt_f32_i32"
        doing = {
            load: rounds * sum(work.read) * bits // width,
            store: steps * sum(work.written) * bits // width,
            root: steps * work.draws * self.elements // 2,
            product: steps * work.words * _PRODUCTS * self.elements // 4,
            quotient: steps * work.quotients * self.elements,
            exponent: steps * work.logarithms * self.elements,
        }
        doing = {pattern: count for pattern, count in doing.items() if count}
        path = cheapest_path(self.code, doing)
        least = int(rounds * work.operations * self.elements)
        if self.case.op != "step":
            return path
        if sum(i.results for i in path if re.match(operation, i.text)) >= least:
            return path
        try:
            return cheapest_path(self.code, {**doing, operation: least})
        except ValueError:
            self.short.append(True)
            return path
