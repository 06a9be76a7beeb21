"""The harness lives in bench/, beside the package; rows made by hand, so that no test waits for a clock."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


@pytest.fixture
def steps() -> Any:
    """Makes a step for `bench.timing` from a forward and a backward."""

    def make(forward: Any, backward: Any = None) -> SimpleNamespace:
        return SimpleNamespace(forward=forward, backward=backward)

    return make


@pytest.fixture
def results() -> dict[str, Any]:
    """Of each family two rows, one won and one lost, one that did not run; a tiny fine-tune, and users."""

    def stat(ms: float) -> dict[str, float]:
        return {"median": ms, "p20": 0.9 * ms, "p80": 1.1 * ms}

    def entry(ms: float, overhead: float | None = None, **more: Any) -> dict[str, Any]:
        interval = {"value": overhead, "low": (overhead or 0) - 0.1, "high": (overhead or 0) + 0.1}
        return {
            "ran": "torch",
            "times": {"forward": stat(ms / 3), "backward": stat(2 * ms / 3), "both": stat(ms)},
            "host_ms": None,
            "overhead": {} if overhead is None else {"both": interval},
            "errors": {},
            "error_ratio": {"max": 1.0, "mean": 0.9},
            "saved_bytes": 1 << 20,
            "peak_bytes": None,
            "missing": "",
            "wrong": "",
            **more,
        }

    def row(family: str, tokens: int, not_run: str = "", **contenders: Any) -> dict[str, Any]:
        shape = {
            "lora": {"label": f"{tokens} × 768 → 768", "in_features": 768, "out_features": 768},
            "adapter": {"label": f"{tokens} × 768 → 48", "features": 768, "bottleneck": 48},
            "multi_lora": {
                "label": f"{tokens} × 768 → 768, 64 adapters",
                "in_features": 768,
                "out_features": 768,
                "adapters": 64,
                "rank": 16,
                "ids": "even",
                "used_adapters": 64,
                "adapter_bytes": 1 << 20,
            },
        }[family]
        return {
            "family": family,
            "dtype": "fp32",
            "mode": "train",
            "tokens": tokens,
            **shape,
            "main_pass": "both",
            "flops": 10**9,
            "bytes": 10**7,
            "rounds": 3,
            "not_run": not_run,
            "contenders": contenders,
        }

    run = {
        "losses": [[0.7, 0.6, 0.5]],
        "accuracy": [0.75, 0.77],
        "step_ms": stat(12.0),
        "model_ms": stat(10.0),
        "saved_bytes": 1 << 20,
        "peak_bytes": None,
    }
    plan = {"dtype": "fp32", "batch": 16, "length": 32, "held_out": 512, "note": ""}
    won = row("lora", 512, frozen=entry(10.0), peft_base=entry(14.0), ours_base=entry(11.0, 0.25))
    lost = row("lora", 2048, frozen=entry(40.0), peft_base=entry(44.0), ours_base=entry(46.0, 1.5))
    quick = {"ln": entry(5.0), "library": entry(21.0), "eager": entry(20.0)}
    adapters = [
        row("adapter", 512, **quick, ours=entry(8.0, 0.2)),
        row("adapter", 2048, **quick, ours=entry(30.0, 1.67, error_ratio={"max": 1, "mean": 1.2})),
        row("adapter", 8192, not_run="estimated 77 s"),
    ]
    loop = {"frozen": entry(10.0), "loop": entry(20.0), "gather": entry(15.0)}
    multi = [
        row("multi_lora", 64, **loop, ours=entry(11.0, 0.1)),
        row("multi_lora", 2048, **loop, ours=entry(21.0, 1.1)),
        *(
            {**row("multi_lora", 64, **loop, ours=entry(12.0, 0.2)), "ids": ids, "rank": rank}
            for ids, rank in (("identical", 16), ("uniform", 16), ("identical", 128))
        ),
        row("multi_lora", 8192, not_run="estimated 55 s"),
    ]
    task = {"mixed": [0.7, 0.6], "alone": [0.7, 0.5], "accuracy": 0.6, "apart": 0.0}
    users = {
        "users": 64,
        "rank": 8,
        "plan": {"present": 6, "samples": 2, "length": 24, "steps": 2, "timed": 1},
        "wrong": [],
        "tasks": [
            {"name": f"task {i}", "what": "this", "classes": 2, "among_strangers": same, **task}
            for i, same in enumerate((True, False, *[None] * 6))
        ],
        "largest_difference": 0.1,
        "gradients": [144, 144],
        "others_unchanged": True,
        "step_ms": {
            kind: stat(10.0 + i) for i, kind in enumerate(("frozen", "mixed", "loop", "alone"))
        },
        "serving": {
            "requests": 64,
            "batch": 32,
            "rounds": 3,
            "stream_ms": {
                "none": stat(100.0),
                "ours": stat(125.0),
                "loop": stat(250.0),
                "merged": stat(120.0),
                "merged by user": stat(400.0),
            },
            "errors": {"ours": 1e-6},
            "adapter_bytes": 1 << 24,
            "merged_bytes": 1 << 28,
        },
    }
    return {
        "meta": {
            "device": "Some CPU",
            "slug": "some-cpu",
            "kind": "cpu",
            "instruction_set": "AVX2",
            "threads": 2,
            "date": "2026-01-01",
            "commit": "abc1234",
            "versions": {"torch": "2.13.0", "triton": None},
            "load_average": 0.1,
        },
        "kernels": [won, lost, row("lora", 8192, not_run="estimated 99 s"), *adapters, *multi],
        "finetune": [
            {
                "plan": {"method": method, **plan},
                "trained": True,
                "replaced": "36 of 36",
                "runs": dict.fromkeys(("eager", "accelerated", "frozen"), run),
                "overhead": {"value": 0.2, "low": 0.1, "high": 0.3},
                "step_overhead": None,
            }
            for method in ("lora", "adapter")
        ],
        "users": users,
        "mixed": {
            "plan": {"layers": 2, "hidden": 768},
            "wrong": [],
            "rows": [
                {
                    "tokens": 32,
                    "train": train,
                    "rounds": 3,
                    "ms": {name: stat(ms) for name, ms in times.items()},
                    "errors": {"mixed": 1e-6, "ours": 2e-6, "library": 4e-6},
                }
                for train, times in (
                    (False, {"none": 9.0, "mixed": 10.0, "ours": 15.0, "library": 20.0}),
                    (True, {"mixed": 30.0, "ours": 15.0, "library": 20.0}),
                )
            ],
        },
        "whole": {
            "plan": {"layers": 12, "hidden": 768},
            "wrong": [],
            "rows": [
                {
                    "method": "unipelt",
                    "samples": 8 if train else 1,
                    "tokens": 32,
                    "train": train,
                    "rounds": 3,
                    "fastest_ms": dict(zip(("none", "library", "ours"), fastest, strict=True)),
                    "median_ms": dict.fromkeys(("none", "library", "ours"), 20.0),
                    "errors": {"library": 1e-6, "ours": 1e-6},
                }
                for train, fastest in ((False, (10.0, 15.0, 9.0)), (True, (10.0, 12.0, 13.0)))
            ],
        },
    }
