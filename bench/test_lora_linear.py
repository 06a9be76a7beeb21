"""The kernel table as a pytest-benchmark suite: `pytest bench` (`--bench-full`, `-k bf16`, ...).

Each case is measured once, its contenders taking turns, and each test hands one contender's samples
of one pass to pytest-benchmark, whose tables, JSON and comparisons then work as ever.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from bench.cases import Case, full_cases, quick_cases
from bench.contenders import NAMES
from bench.timing import InjectedTimer

TIMER = InjectedTimer()
pytestmark = [
    pytest.mark.benchmark(timer=TIMER),
    # a timing run is no place to fail for a deprecation inside PEFT or the compiler
    pytest.mark.filterwarnings("default"),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = full_cases() if metafunc.config.getoption("--bench-full") else quick_cases()
    rows = [(case, pass_, name) for case in cases for pass_ in case.passes for name in NAMES]
    metafunc.parametrize(
        ("case", "pass_", "contender"),
        rows,
        ids=[f"{case}-{pass_}-{name}" for case, pass_, name in rows],
    )


def test_lora_linear(benchmark: Any, table: Any, case: Case, pass_: str, contender: str) -> None:
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
