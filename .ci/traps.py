"""Refuse calls and flags that compile and look right, and break the arithmetic or are slow.

A line that has to name one (a table of upstream's functions, say) ends in a comment with
`allow-trap:` and its reason.
"""

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

FOLDERS = ("fastdiff", "kernels", "csrc")
SUFFIXES = (".py", ".h", ".cpp", ".cu", ".cuh")
ALLOW = re.compile(r"(#|//).*\ballow-trap: *\w")

CONTRACTS = "contracts to an FMA on some CPUs; write separate `*` and `+`"
TRAPS = [
    (r"\baddcmul_?\(|\baddcdiv_?\(", CONTRACTS),
    (r"\.lerp_?\(", CONTRACTS),
    (r"\b(add|sub|rsub)_?\(.*\balpha *=", CONTRACTS),
    (r"\btl\.(math\.)?sqrt\(", "is approximate on GPUs; use tl.sqrt_rn"),
    (r"-ffast-math|use_fast_math", "drops IEEE rounding, NaN and signed zero"),
    (r"\bcustom_op\(", "costs 10 to 20 us a call; define the op with torch.library.Library"),
    (r"torch/extension\.h", "takes 40 s to compile; use the stable ABI's headers"),
    (r"\bSTABLE_TORCH_ERROR_CODE_CHECK\(", "is not in torch 2.10 and 2.11; use STD_TORCH_CHECK"),
]


def sources() -> Iterator[Path]:
    for top in FOLDERS:
        for folder, _, names in os.walk(top):  # does not follow fastdiff/kernels, fastdiff/csrc
            yield from (Path(folder, name) for name in sorted(names) if name.endswith(SUFFIXES))


def main() -> int:
    traps = [(re.compile(pattern), reason) for pattern, reason in TRAPS]
    found = 0
    for path in sources():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            for pattern, reason in traps:
                match = pattern.search(line)
                if match and not ALLOW.search(line):
                    print(f"{path}:{number}: {match[0]} {reason}")
                    found += 1
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
