"""Benchmark reports made by hand."""

from __future__ import annotations

from fastdiff.profiling import bench


def row(name: str = "one", ours: float = 1e-3, eager: float = 2e-3, spread: float = 1.02) -> dict:
    """A row as a measurement leaves it, ours and the opponent with that spread."""

    def seconds(middle: float) -> dict:
        return {"seconds": [middle / spread, middle, middle * spread], "best": middle / spread}

    ratio = eager / ours
    return {
        "case": f"own/{name}", "group": "own", "name": name, "threads": 1, "memory": "warm",
        "status": "measured", "rounds": 30, "elements": 10**6, "bytes": 8 * 10**6,
        "operations": None, "work": {}, "absent": {}, "wrong": {}, "first_call_seconds": {},
        "ours": {"fastdiff": seconds(ours)}, "beside": {},
        "opponents": {
            "eager": seconds(eager) | {"ratio": {"fastdiff": [ratio / 1.1, ratio, ratio * 1.1]}}
        },
        "limits": {"memory: copy_": seconds(0.9e-3)},
        "of_limit": {"fastdiff": {"limit": "memory: copy_", "share": [0.8, 0.9, 0.95]}},
    }  # fmt: skip


def report(*rows: dict, **changes: object) -> dict:
    head = {
        "kind": "bench", "schema": bench.SCHEMA, "commit": "0123456789ab", "date": "2026-01-01",
        "machine": dict(processor="P", cores="2", system="S", python="3") | {"cpu kernels": "n"},
        "versions": {"torch": "2.0"}, "options": {}, "smoke": False, "interrupted": False,
        "before": {"load": 0.1, "mhz": 2000}, "after": {"load": 0.2, "mhz": 2000},
        "rows": list(rows),
    }  # fmt: skip
    return head | changes
