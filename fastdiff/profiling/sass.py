"""Reads NVIDIA machine code: resources of kernels, and their instructions.

kernels = read(library, "sm_90")            # a .cubin, or a library with code for sm_90
path = cheapest_path(kernels["randn_kernel"].code, {r"STG\\.E\\.128": 2})
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fastdiff.profiling.flow import Instruction, cheapest_path

__all__ = [
    "Instruction",
    "Kernel",
    "access",
    "cheapest_path",
    "classify",
    "cuobjdump",
    "demangled",
    "instructions",
    "ptx",
    "read",
]

# Opcodes by the pipe they go through; those of the uniform datapath, control flow, barriers, votes
# and special registers go through none that is counted.
_PIPES = {
    "fp32": "FADD FMUL FFMA FADD2 FMUL2 FFMA2 FADD32I FMUL32I FFMA32I HADD2 HMUL2 HFMA2",
    "imad": "IMAD IMUL IMAD32I IDP",
    "alu": "LOP3 LOP LOP32I IADD3 IADD IADD32I SHF SHL SHR LEA ISETP FSETP FSET FSEL SEL FMNMX "
    "FMNMX3 IMNMX VIMNMX VIMNMX3 VIADD VIADDMNMX PRMT PLOP3 SGXT MOV BMSK I2FP F2FP I2I I2IP IABS "
    "FCHK P2R R2P HSETP2 HSET2 HMNMX2 VABSDIFF",
    "mufu": "MUFU I2F F2I F2F FRND POPC FLO BREV",
    "memory": "LD LDG LDS LDL LDC LDSM LDGSTS ST STG STS STL ATOM ATOMG ATOMS RED",
}
_PIPE_OF = {opcode: pipe for pipe, opcodes in _PIPES.items() for opcode in opcodes.split()}
_BITS = {"256": 256, "128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}


@dataclass(frozen=True)
class Kernel:
    """registers per thread; stack and shared memory in bytes (spills are on the stack)."""

    registers: int
    stack: int
    shared: int
    code: tuple[Instruction, ...]


def classify(instruction: Instruction) -> str:
    """The class of gpus.CLASSES that an instruction counts in."""
    return _PIPE_OF.get(instruction.opcode.split(".")[0], "other")


def access(instruction: Instruction) -> tuple[str, int] | None:
    """("load" or "store", bits) of an access to global memory; None for any other instruction."""
    opcode, *flags = instruction.opcode.split(".")
    kind = {"LDG": "load", "STG": "store", "LD": "load", "ST": "store"}.get(opcode)
    if kind is None:
        return None
    return kind, next((_BITS[flag] for flag in flags if flag in _BITS), 32)


@cache
def cuobjdump() -> Path:
    """The disassembler that Triton carries. Raises RuntimeError where there is none."""
    try:
        import triton
    except ImportError as error:
        raise RuntimeError(f"no cuobjdump: it comes with triton, and {error}") from None
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not path.exists():
        raise RuntimeError(f"no cuobjdump: this triton has none at {path}")
    return path


def _run(*arguments: str) -> str:
    done = subprocess.run([str(cuobjdump()), *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise RuntimeError(
            f"{cuobjdump()} cannot read {arguments[-1]}, which may be made for a newer GPU than it "
            f"knows: {said[-1] if said else f'it ends with status {done.returncode}'}"
        )
    return done.stdout


def demangled(names: Sequence[str]) -> list[str]:
    """`step_kernel<2>` for _ZN8fastdiff11step_kernelILi2EEEv...; Triton's names are plain."""
    if not any(name.startswith("_Z") for name in names):
        return list(names)
    text = subprocess.run(
        ["c++filt"], input="\n".join(names), check=True, capture_output=True, text=True
    ).stdout
    return [
        re.sub(r"^void |fastdiff::|\(.*$| (?=>)", "", line)
        for line in text.rstrip("\n").split("\n")
    ]


def instructions(text: str) -> tuple[Instruction, ...]:
    """The instructions in what the disassembler prints of one kernel."""
    line = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?\s*([A-Z][^;]*;)")
    found = []
    for address, predicate, body in line.findall(text):
        opcode, *flags = body.split()[0].rstrip(";").split(".")
        target = None
        # BRA.DIV goes where divergent threads are joined. A call may return, or be a far jump.
        if (opcode == "BRA" and "DIV" not in flags) or (opcode == "CALL" and "REL" in flags):
            target = int(re.findall(r"0x([0-9a-f]+)", body)[-1], 16)
        # A branch on a uniform predicate has that in its operands: BRA.U UP0, 0x...
        certain = not predicate and not (opcode == "BRA" and re.search(r"\bU?P\d", body))
        leaves = opcode in ("EXIT", "RET") or (opcode == "BRA" and target is not None)
        goes_on, ends = not (certain and leaves), opcode == "EXIT"
        results = 2 if opcode in ("FADD2", "FMUL2", "FFMA2") else 1
        found.append(Instruction(int(address, 16), body, target, goes_on, ends, results))
    return tuple(found)


def read(binary: Path, arch: str) -> dict[str, Kernel]:
    """Every kernel of a .cubin or library that holds machine code for `arch` ("sm_90")."""
    text = _run("-arch", arch, "-sass", "--dump-resource-usage", str(binary))
    usage = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", text)
    _, *functions = re.split(r"\n\s*Function : ", text)
    bodies = {body.split("\n", 1)[0].strip(): body for body in functions}
    names = demangled([name for name, *_ in usage])
    return {
        name: Kernel(int(registers), int(stack), int(shared), instructions(bodies[mangled]))
        for name, (mangled, registers, stack, shared) in zip(names, usage, strict=True)
    }


def ptx(library: Path) -> list[str]:
    """The PTX of every kernel in a library, each from its mangled name on."""
    return _run("-ptx", str(library)).split(".entry ")[1:]
