"""Counts what Triton would compile for many different calls and prints it, as JSON.

A process of its own, because in the tests' process Triton is its interpreter. The driver is a
stand-in: what to compile is decided by the arguments alone, and nothing is compiled here.
"""

import json
import sys
from collections.abc import Iterator

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fastdiff.kernels import chain, loss, randn, step
from fastdiff.kernels.launch import Launch
from fastdiff.kernels.policy import policy_of
from fastdiff.ops.loss import BOUND, COLUMNS, ERROR, LossSpec, loss_arguments, partial_count
from fastdiff.ops.step import StepSpec, step_arguments


class Driver:
    """Answers what a launch asks before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def map_python_to_cpp_type(self, name: str) -> str:
        return name


def distinct(launches: Iterator[Launch | None]) -> int:
    """How many compilations the launches come to."""
    keys = set()

    def hook(*, key: str, **_: object) -> bool:
        keys.add(key)
        return True  # compile nothing

    knobs.runtime.jit_cache_hook = hook
    for launch in launches:
        assert launch is not None
        part: Launch | None = launch
        while part is not None:
            part.kernel.warmup(*part.arguments, grid=part.grid, **part.constants, **part.options)
            part = part.then
    return len(keys)


def steps(
    sizes: tuple[int, ...], rows: tuple[int, ...] = (1, 16, 17, 2**31 - 1), dtype=torch.float32
) -> Iterator[Launch | None]:
    """A plan's steps: each with its row, table, seed and counters."""
    spec = StepSpec(1, (0b1011,), None, 1, dtype)
    for n in sizes:
        x, o = torch.zeros(3, n, dtype=dtype), torch.zeros(3, n, dtype=dtype)
        for table_rows in (1, 16, 50):
            table, draws = torch.zeros(table_rows, spec.width), torch.zeros(table_rows, 1, 2).long()
            for place, number in enumerate(rows):
                row = torch.tensor(rows)[place : place + 1]  # of a plan's rows: every 8 bytes
                counter = (number - 2**30, number, number, number)
                call = step_arguments(
                    spec, [x], table, row, [x], model_outputs=[o], draws=draws, counter=counter
                )
                yield step.prepare(*call, policy=policy_of("sm_90"))


def randns() -> Iterator[Launch | None]:
    for n in (4096, 8192, 12288):
        for number in (0, 1, 16, 17, 2**32 - 1):
            yield randn.prepare(
                torch.zeros(2, n), None, number - 5, number, number, number, number, False,
                policy=policy_of("sm_90"),
            )  # fmt: skip


def chains() -> Iterator[Launch | None]:
    for count in (1, 16, 17):
        for n in (4096, 8192):
            yield chain.prepare(
                torch.zeros(2, n), None, torch.zeros(count, 2), torch.zeros(count).long(), None,
                count, count, False, torch.zeros(count, 2, n), policy=policy_of("sm_90"),
            )  # fmt: skip


def losses(
    specs: tuple[LossSpec, ...] = (LossSpec(ERROR, 0b10100),),
) -> Iterator[Launch | None]:
    """Training steps: each with its sizes, batch, rows and counters."""
    for spec in specs:
        for n in (1024, 2048, 4096, 3 * 64 * 64 + 4):
            for batch, rows in ((2, 1), (16, 1000), (17, 16)):
                x, table = torch.zeros(batch, n), torch.zeros(rows, len(COLUMNS))
                results = torch.zeros(spec.count, batch)
                partials = torch.zeros(spec.count, batch, partial_count(n))
                common = dict(
                    spec=spec, model_outputs=[x], x=x if spec.reads_x else None, y=None,
                    table=table, rows=torch.zeros(batch).long(), counter=(n, 0, n, 2),
                )  # fmt: skip
                call = loss_arguments(outputs=[results, partials], **common)
                yield loss.prepare(*call, policy=policy_of("sm_90"))
                call = loss_arguments(outputs=[x], gradients=results, **common)
                yield loss.prepare_grad(*call, policy=policy_of("sm_90"))


def main() -> None:
    driver.set_active(Driver())
    results = {
        "steps of a plan": distinct(steps((4096,))),
        "other sizes": distinct(steps((2048, 4096, 12288, 3 * 64 * 64 + 4))),
        "randn": distinct(randns()),
        "chain": distinct(chains()),
        "losses": distinct(losses()),
        "other losses": distinct(
            losses(tuple(LossSpec(BOUND, 0, 0b101, density=d) for d in (True, False)))
        ),
        "odd sizes": distinct(steps((4096, 4097))),
        "another dtype": distinct(
            launch for d in (torch.float32, torch.bfloat16) for launch in steps((4096,), dtype=d)
        ),
    }
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
