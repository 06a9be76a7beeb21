"""The kernel tables as a pytest-benchmark suite: what its test files share.

Each case is measured once, its contenders taking turns, and each test hands one contender's samples
of one pass to pytest-benchmark, whose tables, JSON and comparisons then work as ever.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from .case import Case
from .family import Family
from .timing import InjectedTimer

QUICK_BUDGET_S = {
    "lora": 100.0,
    "adapter": 100.0,
    "multi_lora": 38.0,
    "multi_bottleneck": 10.0,
    "delta": 12.0,
    "compacter": 12.0,
    "prefix": 12.0,
    "fusion": 10.0,
}
FULL_BUDGET_S = {
    "lora": 1200.0,
    "adapter": 1200.0,
    "multi_lora": 600.0,
    "multi_bottleneck": 120.0,
    "delta": 120.0,
    "compacter": 120.0,
    "prefix": 60.0,
    "fusion": 120.0,
}
"""For the rows of a family."""
TIMER = InjectedTimer()
MARKS = [
    pytest.mark.benchmark(timer=TIMER),
    # a timing run is no place to fail for a deprecation inside a library or the compiler
    pytest.mark.filterwarnings("default"),
]


def parametrize(metafunc: pytest.Metafunc, family: Family) -> None:
    """A test for each row, pass and contender of the family."""
    cases = family.cases(metafunc.config.getoption("--bench-full"))
    rows = [
        (case, pass_, name) for case in cases for pass_ in case.passes for name in family.contenders
    ]
    metafunc.parametrize(
        ("case", "pass_", "contender"),
        rows,
        ids=[f"{case}-{pass_}-{name}" for case, pass_, name in rows],
    )


def report(benchmark: Any, table: Any, case: Case, pass_: str, contender: str) -> None:
    """Fails when the contender was wrong, skips when it was not measured, else injects its samples."""
    row = table.row(case)
    if row.not_run:
        pytest.skip(f"not run: {row.not_run}")
    entry = row.entries[contender]
    assert not entry.wrong, entry.wrong
    if entry.missing:
        pytest.skip(entry.missing)
    benchmark.group = f"{case} {pass_}"
    benchmark.extra_info.update(
        ran=entry.ran,
        rounds=row.rounds,
        host_ms=entry.host_ms,
        overhead=asdict(entry.overhead[pass_]) if pass_ in entry.overhead else None,
        error_ratio=asdict(entry.error_ratio) if entry.error_ratio else None,
        saved_bytes=entry.saved_bytes,
        peak_bytes=entry.peak_bytes,
    )
    TIMER.inject(benchmark, [getattr(sample, pass_) for sample in entry.samples])
