"""Our own contestants under pytest-benchmark; ratios and limits are `fastdiff bench`'s business.

pytest benchmarks/ -k operations            the quick cases
pytest benchmarks/ -m "slow or not slow"    all of them
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from fastdiff.benchmarks.registry import Case, Unavailable, cases
from fastdiff.profiling.timing import Prepared


def _parameter(case: Case) -> Any:
    return pytest.param(case, id=case.id, marks=() if case.quick else pytest.mark.slow)


@pytest.mark.parametrize("case", [_parameter(case) for case in cases()])
def test_speed(benchmark: Any, case: Case) -> None:
    """The first contestant of ours on one thread, after its check."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what upstream's code deprecates
            try:
                contest = case.build()
            except Unavailable as error:
                pytest.skip(str(error))
            name, call = next(iter(contest.ours.items()))
            call()
            contest.check(name)
            benchmark.group = case.group
            benchmark.extra_info |= {"elements": contest.elements, "bytes": contest.bytes}
            if isinstance(call, Prepared):
                benchmark.pedantic(call.run, setup=lambda: ((call.prepare(),), {}), rounds=20)
            else:
                benchmark(call)
    finally:
        torch.set_num_threads(threads)
